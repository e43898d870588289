"""What no client should send, over real HTTP: every answer is a client error that says what is
wrong.
"""

import json
import threading

import pytest

from tests.serve_app.conftest import ShopFront
from tests.serve_app.http_server import connect, read_answer, running, send

_HEAD = b"POST /v1/recommend HTTP/1.1\r\nHost: shop\r\nContent-Type: application/json\r\n"
_NESTED = b"[" * 600 + b"]" * 600


@pytest.fixture(scope="module")
def port(registry, tmp_path_factory):
    limits = {"max_body_bytes": 200_000, "body_timeout_s": 0.3, "deadline_ms": 2000}
    front = ShopFront(registry, tmp_path_factory.mktemp("hostile"), **limits)
    with running(front.app) as port:
        yield port
    front.client.runner.close()


def problem_of(answer, status, code):
    problem = answer.json()
    assert answer.status == status, problem
    assert answer.headers["Content-Type"] == "application/problem+json"
    assert (problem["status"], problem["code"]) == (status, code)
    assert problem["request_id"] == answer.headers["X-Request-ID"]
    assert len(answer.body) < 10_000
    return problem


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (b"{", "not JSON"),
        (b"\xef\xbb\xbf{}", "not JSON"),
        (b"\xff\xfe\xfd", "not UTF-8"),
        ('{"user_id": "u"}'.encode("utf-16"), "not UTF-8"),
        ('{"user_id": "u"}'.encode("utf-16-le"), "not JSON"),
        ('{"user_id": "u"}'.encode("utf-32"), "not UTF-8"),
        (b'{"user_id": "\xc3"}', "not UTF-8"),
        (b"[" * 150_000, "nested too deeply"),
        (b'{"a":' * 30_000, "nested too deeply"),
        (b'{"user_id": "u", "user_id": "v"}', "'user_id' comes twice"),
        (b'{"filter": {"\\ud800": 1, "\\ud800": 2}}', "\\ud800' comes twice"),
        (b'{"%s": 1, "%s": 2}' % (b"x" * 90_000, b"x" * 90_000), "comes twice"),
        (b'{"user_id": %s}' % (b"9" * 5000), "digits"),
        (b'{"user_id": "u"} {}', "not JSON"),
        (b"{\"user_id\": 'u'}", "not JSON"),
        (b'{"user_id": "a\nb"}', "not JSON"),
    ],
)
def test_what_is_no_json_is_a_malformed_body(port, body, words):
    problem = problem_of(send(port, body), 400, "malformed_body")

    assert words in problem["detail"]


@pytest.mark.parametrize(
    "body",
    [
        b"null",
        b"[]",
        b"17",
        b'""',
        _NESTED,
        b'{"user_history": %s}' % _NESTED,
        b'{"user_id": "u", "context": {"x": %s}}' % _NESTED,
        b'{"user_id": "u", "context": %s}' % (b'{"x":' * 600 + b"1" + b"}" * 600),
        b'{"user_id": NaN}',
        b'{"user_id": -Infinity}',
        b'{"user_id": "u", "top_k": Infinity}',
        b'{"user_id": "u", "top_k": 1e999}',
        b'{"user_id": "u", "timeout_ms": 1e3}',
        b'{"user_id": "u", "context": {"x": NaN}}',
        b'{"user_id": "u", "context": {"x": 1e999}}',
        b'{"user_id": "u", "context": {"x": 1%s}}' % (b"0" * 400),
        b'{"user_id": "u", "context": {"timestamp": NaN}}',
        b'{"user_id": "u", "context": {"timestamp": 1e300}}',
        b'{"user_id": "u", "context": {"timestamp": 1%s}}' % (b"0" * 400),
        b'{"user_id": "u", "context": {"timestamp": "0000-00-00T00:00:00Z"}}',
        b'{"user_id": "u", "context": {"timezone": "%s"}}' % (b"../" * 40),
        b'{"user_id": "u", "filter": {"min_price": Infinity}}',
        b'{"user_id": "u", "filter": {"min_price": 1%s}}' % (b"0" * 400),
        b'{"user_id": %s}' % (b"9" * 400),
        b'{"user_history": [%s]}' % b",".join(b"%d" % n for n in range(10_000)),
        b'{"user_id": ["u"]}',
        b'{"user_id": {"$ne": null}}',
        b'{"user_id": "\\ud800"}',
        b'{"user_id": "u", "\\ud800": 1}',
        b'{"user_id": "u", "context": {"\\udfff": %s}}' % _NESTED,
        b'{"user_id": "u", "%s": 1}' % (b"x" * 150_000),
        b'{"user_id": "u", "filter": {"include_categories": [%s]}}' % b",".join([b'""'] * 101),
        b'{"__class__": "os.system", "user_id": "u"}',
    ],
    ids=lambda body: body[:48].decode(),
)
def test_what_does_not_fit_is_an_invalid_request(port, body):
    problem = problem_of(send(port, body), 422, "invalid_request")

    assert 1 <= len(problem["fields"]) <= 20


@pytest.mark.parametrize(
    "body",
    [
        {"user_history": ["i1"] * 1000},
        {"user_history": [f"nothing{n}" for n in range(1000)]},
        {"user_history": [-(2**63), 2**63 - 1, "i1"]},
        {"user_history": []},
        {"recent_events": []},
        {"user_id": "'; DROP TABLE events; --"},
        {"user_id": "\x00"},
        {"user_id": "u", "context": {"x": "\udfff", "": None}},
        {"user_id": "u", "filter": {"exclude_items": ["i1"] * 1000}},
    ],
    ids=lambda body: json.dumps(body)[:48],
)
def test_what_is_odd_and_yet_allowed_gets_a_full_list(port, body):
    answer = send(port, json.dumps(body).encode())

    assert answer.status == 200, answer.body
    assert len(answer.json()["recommendations"]) == 10


def test_events_of_any_kind_are_judged_one_by_one(port):
    good = {"event_id": "e", "user_id": "u", "item_id": "i1", "timestamp": 1_769_999_000}
    bad = [
        {},
        {**good, "event_id": "\ud800"},
        {**good, "event_id": ["e"]},
        {**good, "timestamp": float("nan")},
        {**good, "timestamp": 10**400},
        {**good, "price": float("inf")},
        {**good, "quantity": 10**400},
        {**good, "item_id": {}},
        {**good, "x" * 1000: 1},
    ]

    answer = send(port, json.dumps({"events": [*bad, good]}).encode(), path="/v1/events")

    assert answer.status == 202, answer.body
    assert answer.json()["rejected"] == len(bad)
    assert answer.json()["accepted"] == 1


@pytest.mark.parametrize("content_type", ["", "text/plain", "application/x-www-form-urlencoded"])
def test_another_kind_of_body_is_refused(port, content_type):
    answer = send(port, b'{"user_id": "u"}', content_type=content_type)

    problem_of(answer, 415, "unsupported_media_type")


@pytest.mark.parametrize(
    "content_type", ["application/json; charset=utf-8", "Application/JSON", "application/a+json"]
)
def test_json_by_its_other_names_is_taken(port, content_type):
    assert send(port, b'{"user_id": "u"}', content_type=content_type).status == 200


def test_no_body_at_all_is_an_invalid_request(port):
    problem_of(send(port, b"", content_type=""), 422, "invalid_request")


def test_a_giant_that_says_so_is_not_read(port):
    with connect(port) as connection:
        connection.sendall(_HEAD + b"Content-Length: 100000000000\r\n\r\n")
        problem_of(read_answer(connection), 413, "body_too_large")


def test_a_giant_that_does_not_say_so_is_cut_off(port):
    with connect(port) as connection:
        connection.sendall(_HEAD + b"Transfer-Encoding: chunked\r\n\r\n")
        for _ in range(4):
            connection.sendall(b"ffff\r\n" + b" " * 0xFFFF + b"\r\n")
        problem_of(read_answer(connection), 413, "body_too_large")


def test_a_body_that_never_ends_gives_its_place_back(open_front):
    with running(open_front(max_in_flight=1, body_timeout_s=0.5).app) as port:
        with connect(port) as connection:
            connection.sendall(_HEAD + b"Content-Length: 100\r\n\r\n{")
            problem = problem_of(read_answer(connection), 408, "body_too_slow")
            assert connection.recv(1) == b""

        assert problem["detail"] == "The body did not come within 0.5 s; send it at once."
        assert send(port, b'{"user_id": "u"}').status == 200


def test_drops_of_a_body_do_not_buy_time(port):
    with connect(port) as connection:
        connection.sendall(_HEAD + b"Transfer-Encoding: chunked\r\n\r\n")
        is_over = threading.Event()

        def drip():
            while not is_over.wait(0.05):
                try:
                    connection.sendall(b"1\r\n \r\n")
                except OSError:
                    return

        thread = threading.Thread(target=drip)
        thread.start()
        answer = read_answer(connection)
        is_over.set()
        thread.join()

    problem_of(answer, 408, "body_too_slow")


def test_a_client_that_leaves_midway_is_not_an_error_of_ours(port):
    with connect(port) as connection:
        connection.sendall(_HEAD + b"Content-Length: 100\r\n\r\n{")

    assert send(port, b'{"user_id": "u"}').status == 200


def test_a_flood_of_headers_is_refused(port):
    flood = b"".join(b"X-%d: %s\r\n" % (n, b"y" * 400) for n in range(100))

    problem_of(send(port, b'{"user_id": "u"}', headers=flood), 431, "headers_too_large")


@pytest.mark.parametrize("given", [b"\xff\xfe", b"a b", b"<script>", b"x" * 200, b"a\tb", b""])
def test_request_ids_inject_nothing(port, given):
    answer = send(port, b"{}", headers=b"X-Request-ID: " + given + b"\r\n")

    assert len(problem_of(answer, 422, "invalid_request")["request_id"]) == 32
    assert answer.headers.get_all("X-Request-ID") == [answer.json()["request_id"]]


@pytest.mark.parametrize(
    ("line", "status", "code"),
    [
        (b"PUT /v1/recommend", 405, "method_not_allowed"),
        (b"GET /v1/users/%00/history?limit=0", 422, "invalid_request"),
        (b"GET /v1/users/%00/history?limit=1e3", 422, "invalid_request"),
        (b"GET /v1/users/" + b"x" * 200 + b"/history", 422, "invalid_request"),
        (b"GET /v1/users//history", 422, "invalid_request"),
        (b"GET /../../etc/passwd", 404, "not_found"),
        (b"GET /%ED%A0%80", 404, "not_found"),
    ],
)
def test_paths_and_methods_are_bounded_too(port, line, status, code):
    with connect(port) as connection:
        connection.sendall(line + b" HTTP/1.1\r\nHost: shop\r\n\r\n")
        problem_of(read_answer(connection), status, code)
