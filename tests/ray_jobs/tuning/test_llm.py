"""The language model's proposals, against a server that speaks the protocol, well and badly."""

import contextlib
import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from ray_jobs.errors import ConfigError
from ray_jobs.tuning import llm
from ray_jobs.tuning.llm import (
    AnswerError,
    ChatEndpoint,
    LanguageModelSearch,
    messages,
    read_answer,
)
from ray_jobs.tuning.searchers import RandomSearch
from tests.ray_jobs.tuning.made_up import trial
from tests.ray_jobs.tuning.test_searchers import SPACE

GOOD = {"optimiser.learning_rate": 0.003, "loss.kind": "full-softmax", "model.num_layers": 2}


def chat(text):
    return json.dumps({"choices": [{"message": {"role": "assistant", "content": text}}]}).encode()


@contextlib.contextmanager
def answering(answer):
    """A server on a free port, its address and the requests that came; `answer(handler)` sends."""
    requests = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["content-length"])))
            requests.append((self.path, dict(self.headers), body))
            with contextlib.suppress(ConnectionError):
                answer(self)

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/v1", requests
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def send(body, status=200, headers=()):
    def answer(handler):
        handler.send_response(status)
        for name, value in headers:
            handler.send_header(name, value)
        handler.send_header("content-length", str(len(body)))
        handler.end_headers()
        handler.wfile.write(body)

    return answer


def silent(handler):
    time.sleep(0.6)


def dripping(handler):
    handler.send_response(200)
    handler.end_headers()
    for _ in range(40):
        handler.wfile.write(b" ")
        handler.wfile.flush()
        time.sleep(0.05)


def endless(handler):
    handler.send_response(200)
    handler.end_headers()
    for _ in range(200):
        handler.wfile.write(b"x" * 65_536)


def hanging_up(handler):
    handler.close_connection = True


def propose(answer, trials=(), timeout_s=5.0):
    with answering(answer) as (url, requests):
        endpoint = ChatEndpoint(url, "some-model", timeout_s)
        searcher = LanguageModelSearch(SPACE, endpoint.ask, RandomSearch(SPACE, 5))
        return searcher.propose(trials), requests


def test_a_good_answer_is_followed(monkeypatch):
    monkeypatch.setenv(llm.KEY, "sesame")
    proposal, ((path, headers, body),) = propose(send(chat(json.dumps(GOOD))))
    assert (proposal.values, proposal.origin, proposal.notes) == (GOOD, "llm", ())
    assert path == "/v1/chat/completions"
    assert {name.lower(): value for name, value in headers.items()}["authorization"] == (
        "Bearer sesame"
    )
    assert body["model"] == "some-model"


@pytest.mark.parametrize(
    ("answer", "timeout_s", "why"),
    [
        (send(b"{}", status=500), 5, "status 500"),
        (send(b"", status=302, headers=[("location", "http://127.0.0.1:1/")]), 5, "status 302"),
        (silent, 0.2, "no answer within 0.2 s"),
        (dripping, 0.3, "the answer came too slowly"),
        (endless, 5, "more than 262,144 bytes"),
        (hanging_up, 5, "no connection (RemoteProtocolError)"),
        (send(b"<html>"), 5, "the answer is not of the chat protocol"),
        (send(b"[" * 100_000), 5, "the answer is not of the chat protocol"),
        (send(b'{"choices": []}'), 5, "the answer is not of the chat protocol"),
        (send(b'{"choices": [{"message": {"content": null}}]}'), 5, "the answer holds no text"),
        (send(chat("I would try 0.01.")), 5, "the answer is not one JSON object"),
        (send(chat(json.dumps(GOOD | {"model.num_layers": 9}))), 5, "9 is not between 1 and 3"),
        (send(chat(json.dumps(GOOD | {"seed": 4}))), 5, "there is no 'seed'"),
        (send(chat('{"loss.kind": "gbce", "loss.kind": "gbce"}')), 5, "is not one JSON object"),
    ],
)
def test_after_a_bad_or_late_answer_the_fallback_proposes_and_says_why(answer, timeout_s, why):
    proposal, _ = propose(answer, timeout_s=timeout_s)
    assert proposal.origin == "random"
    assert proposal.values == RandomSearch(SPACE, 5).propose([]).values
    (note,) = proposal.notes
    assert note.startswith("the language model was not followed: ")
    assert why in note


def test_nobody_listening_is_a_missing_answer():
    with answering(silent) as (url, _):
        pass
    with pytest.raises(AnswerError, match="no connection"):
        ChatEndpoint(url, "some-model").ask([])


def test_a_repetition_is_not_followed():
    proposal, _ = propose(send(chat(json.dumps(GOOD))), [trial(0, 0.1, values=GOOD)])
    assert proposal.origin == "random"
    assert "repeats a trial" in proposal.notes[0]


def test_a_fenced_block_is_read_and_words_around_it_are_not():
    text = json.dumps(GOOD)
    assert read_answer(f"```json\n{text}\n```", SPACE, []) == GOOD
    with pytest.raises(AnswerError):
        read_answer(f"Here:\n```json\n{text}\n```", SPACE, [])


def test_the_model_is_shown_the_space_and_the_trials():
    failed = trial(1, ending="failed", values={"loss.kind": "gbce"}, reason="x" * 1_000)
    _, shown = messages(SPACE, [trial(0, 0.1, 0.2, 0.15, values=GOOD), failed])
    content = json.loads(shown["content"])
    assert content["space"]["loss.calibration"]["when"] == {"loss.kind": ["gbce"]}
    first, second = content["trials"]
    assert first["values"] == GOOD
    assert (first["ndcg10"], first["best_epoch"], first["epochs"]) == (0.2, 2, 3)
    assert second["ending"] == "failed"
    assert len(second["reason"]) == 300


def test_it_is_off_unless_the_environment_names_an_endpoint():
    with pytest.raises(ConfigError, match="NEXTITEM_LLM_URL and NEXTITEM_LLM_MODEL is not set"):
        ChatEndpoint.from_environment(environment={})
    with pytest.raises(ConfigError, match="is 'file:///etc'; set it to an http or https address"):
        ChatEndpoint.from_environment(environment={llm.URL: "file:///etc", llm.MODEL: "m"})
    found = ChatEndpoint.from_environment(
        7.0, {llm.URL: "http://127.0.0.1:8080/v1/", llm.MODEL: "m", llm.KEY: "sesame"}
    )
    assert found == ChatEndpoint("http://127.0.0.1:8080/v1", "m", 7.0)
    assert "sesame" not in repr(found)
