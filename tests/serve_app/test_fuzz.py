"""Requests that nobody wrote, made from the app's own description: whatever comes, the answer is
one that the description knows, and never an error of ours.
"""

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from schemathesis.checks import CHECKS, load_all_checks
from schemathesis.generation import GenerationMode

from tests.serve_app.conftest import ShopFront
from tests.serve_app.http_server import running

OPERATIONS = [
    ("POST", "/v1/recommend"),
    ("POST", "/v1/recommend:batch"),
    ("POST", "/v1/similar"),
    ("POST", "/v1/events"),
    ("GET", "/v1/users/{user_id}/history"),
    ("DELETE", "/v1/users/{user_id}/history"),
    ("GET", "/health"),
    ("GET", "/health/live"),
    ("GET", "/health/ready"),
]
CHECK_NAMES = (
    "not_a_server_error",
    "status_code_conformance",
    "content_type_conformance",
    "response_schema_conformance",
    "response_headers_conformance",
    "unsupported_method",
)
PER_ENTRY = ("/v1/events", "/v1/recommend:batch")
"""Each entry is judged by itself: a wrong one is no error of the request."""
FEW = settings(
    max_examples=25,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=list(HealthCheck),
)
MANY = settings(FEW, max_examples=150, derandomize=False)


@pytest.fixture(scope="module")
def described(registry, tmp_path_factory):
    """The app's description of itself, as a client reads it."""
    load_all_checks()
    front = ShopFront(registry, tmp_path_factory.mktemp("fuzz"), deadline_ms=2000)
    with running(front.app) as port:
        yield schemathesis.openapi.from_url(f"http://127.0.0.1:{port}/openapi.json")
    front.client.runner.close()


def fuzz(operation, extent):
    """Sends what fits the description, and what nearly does."""
    takes_nothing = not (operation.body or operation.path_parameters or operation.query)
    for mode in (GenerationMode.POSITIVE,) if takes_nothing else GenerationMode:

        @extent
        @given(case=operation.as_strategy(generation_mode=mode))
        def answer_conforms(case):
            check(case)

        answer_conforms()


def check(case):
    is_judged_whole = case.operation.path not in PER_ENTRY
    names = [*CHECK_NAMES, *(["negative_data_rejection"] if is_judged_whole else [])]
    response = case.call()
    case.validate_response(response, checks=[CHECKS.get_one(name) for name in names])
    if response.status_code >= 400:
        problem = response.json()
        assert response.headers["content-type"] == ["application/problem+json"]
        assert problem["status"] == response.status_code
        assert [problem["request_id"]] == response.headers["x-request-id"]
        assert problem["code"]


def test_every_operation_is_tried(described):
    found = [result.ok() for result in described.get_all_operations()]

    assert {(operation.method.upper(), operation.path) for operation in found} == set(OPERATIONS)


@pytest.mark.parametrize(("method", "path"), OPERATIONS)
def test_answers_conform_to_their_description(described, method, path):
    fuzz(described[path][method], FEW)


@pytest.mark.slow
@pytest.mark.parametrize(("method", "path"), OPERATIONS)
def test_many_answers_conform_to_their_description(described, method, path):
    fuzz(described[path][method], MANY)
