import hashlib
import hmac
import logging
from types import SimpleNamespace

import pytest

from serve_app.keys import hash_key, main
from serve_app.settings import Settings

READ, WRITE, WRONG = "key-that-reads", "key-that-writes", "key-that-nobody-knows"
BODY = {"user_history": ["i1", "i2"]}


def by_header(key):
    return {"X-API-Key": key}


def as_bearer(key):
    return {"Authorization": f"Bearer {key}"}


def as_basic(key):
    return {"Authorization": f"Basic {key}"}


@pytest.fixture
def guarded(open_front):
    return open_front(api_keys={hash_key(READ): ["read"], hash_key(WRITE): ["write"]})


@pytest.mark.parametrize("send", [by_header, as_bearer])
def test_key_opens_what_its_scope_says(guarded, send):
    def status(method, path, key):
        return guarded.client.request(method, path, json=BODY, headers=send(key)).status_code

    assert status("POST", "/v1/recommend", READ) == 200
    assert status("POST", "/v1/recommend", WRITE) == 403
    assert status("POST", "/v1/events", WRITE) == 422
    assert status("POST", "/v1/events", READ) == 403
    assert status("GET", "/v1/users/u/history", READ) == 200
    assert status("DELETE", "/v1/users/u/history", WRITE) == 403
    assert status("POST", "/v1/recommend", WRONG) == 401


@pytest.mark.parametrize(
    "headers", [{}, by_header(""), as_basic(READ), as_bearer(""), as_bearer("é")]
)
def test_missing_key_is_told_how_to_come(guarded, headers):
    raw = [(name.encode(), value.encode("latin-1")) for name, value in headers.items()]

    response = guarded.client.post("/v1/recommend", json=BODY, headers=raw)

    problem = response.json()
    assert (response.status_code, problem["code"]) == (401, "unauthorized")
    assert response.headers["WWW-Authenticate"] == "Bearer"
    assert problem["detail"] == "Send a valid key as X-API-Key."


def test_key_without_the_scope_is_told_which(guarded):
    response = guarded.client.post("/v1/events", json={}, headers=by_header(READ))

    assert response.status_code == 403
    assert response.json()["detail"] == "This key does not have the scope write."


def test_wrong_body_tells_nothing_to_who_has_no_key(guarded):
    response = guarded.client.post("/v1/recommend", json={"topk": 1})

    assert response.status_code == 401


@pytest.mark.parametrize("send", [by_header, as_bearer, as_basic])
def test_no_key_reaches_a_log_a_metric_or_an_answer(guarded, caplog, send):
    caplog.set_level(logging.DEBUG)
    answers = [
        guarded.client.post(path, json=body, headers=send(key))
        for path in ("/v1/recommend", "/v1/events", "/v1/similar", "/nothing")
        for body in (BODY, {}, {"item_id": "i1"})
        for key in (READ, WRITE, WRONG)
    ]
    guarded.ranker.error = KeyError("a bug")
    answers += [guarded.client.post("/v1/recommend", json=BODY, headers=send(READ))]
    answers += [guarded.client.get("/metrics"), guarded.client.get("/openapi.json")]

    told = caplog.text + "".join(f"{answer.headers}{answer.text}" for answer in answers)

    assert any(answer.status_code in (401, 403) for answer in answers)
    for key in (READ, WRITE, WRONG):
        assert key not in told
        assert hash_key(key) not in told


def test_every_key_is_compared_in_constant_time(guarded, monkeypatch):
    compared = []

    def compare(known, given):
        compared.append(known)
        return hmac.compare_digest(known, given)

    monkeypatch.setattr("serve_app.keys.hmac", SimpleNamespace(compare_digest=compare))

    guarded.client.post("/v1/recommend", json=BODY, headers=by_header(READ))

    assert compared == [hash_key(READ), hash_key(WRITE)]


def test_new_key_comes_with_the_setting_that_lets_it_in(capsys):
    main(["read", "write"])

    client_line, service_line = capsys.readouterr().out.splitlines()
    key = client_line.partition("X-API-Key: ")[2]
    value = service_line.partition("NEXTITEM_API_KEYS=")[2]
    settings = Settings.from_environment({"NEXTITEM_REGISTRY": "r", "NEXTITEM_API_KEYS": value})
    assert len(key) >= 43
    assert key not in service_line
    assert settings.api_keys == {hashlib.sha256(key.encode()).hexdigest(): ("read", "write")}


def test_two_new_keys_differ(capsys):
    main(["read"])
    main(["read"])

    lines = capsys.readouterr().out.splitlines()
    assert lines[0] != lines[2]


def test_scope_that_does_not_exist_is_refused(capsys):
    with pytest.raises(SystemExit):
        main(["everything"])

    assert "invalid choice: 'everything'" in capsys.readouterr().err
