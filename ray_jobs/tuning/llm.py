"""Proposals of a language model that reads the trials so far, from any endpoint that speaks
OpenAI's chat protocol. It is off unless the environment names one:

    NEXTITEM_LLM_URL    e.g. http://127.0.0.1:8080/v1; `/chat/completions` is appended
    NEXTITEM_LLM_MODEL  name of the model there
    NEXTITEM_LLM_KEY    sent as a bearer token; left out where the endpoint needs none

An answer is data: it is one JSON object that fits the space, or it is refused, and TPE proposes
that trial instead. The key is read at each request and kept nowhere.
"""

import json
import os
import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import httpx

from ray_jobs.errors import ConfigError
from ray_jobs.tuning.searchers import Proposal, Searcher, is_repeated
from ray_jobs.tuning.space import Space, Values
from ray_jobs.tuning.trials import Trial

URL, MODEL, KEY = "NEXTITEM_LLM_URL", "NEXTITEM_LLM_MODEL", "NEXTITEM_LLM_KEY"
MAX_ANSWER_BYTES = 256 * 2**10
_MAX_TRIALS_SHOWN = 100
_INSTRUCTION = (
    "You choose hyper-parameters of a neural next-item recommender. The objective is NDCG@10 on "
    "validation users, larger is better; its standard error is given. Learn from the trials so far "
    "and propose the one trial that is most worth its cost: exploit what works, and explore where "
    "nothing is known. Answer with one flat JSON object that maps each path to a value, and with "
    "nothing else. A path whose condition does not hold must be left out."
)
_FENCE = re.compile(r"\A\s*```(?:json)?\s*\n(.*)\n\s*```\s*\Z", re.DOTALL)


class AnswerError(Exception):
    """No usable answer; the message says why, in a few words."""


@dataclass(frozen=True)
class ChatEndpoint:
    """Where the model is asked, without its key."""

    url: str
    model: str
    timeout_s: float = 30.0
    """From the request to the last byte of the answer."""

    @classmethod
    def from_environment(
        cls, timeout_s: float = 30.0, environment: Mapping[str, str] | None = None
    ) -> "ChatEndpoint":
        """Raises: ConfigError when the environment does not name one."""
        found = os.environ if environment is None else environment
        missing = [name for name in (URL, MODEL) if not found.get(name)]
        if missing:
            raise ConfigError(
                f"tune.searcher is 'llm' and {' and '.join(missing)} is not set; set it to an "
                "endpoint and a model, or choose another searcher."
            )
        if not re.match(r"https?://[^/]", found[URL]):
            raise ConfigError(f"{URL} is {found[URL]!r}; set it to an http or https address.")
        return cls(found[URL].rstrip("/"), found[MODEL], timeout_s)

    def ask(self, messages: Sequence[Mapping[str, str]]) -> str:
        """The text of the first choice. Raises: AnswerError."""
        request = {"model": self.model, "messages": list(messages)}
        body = self._post(json.dumps(request).encode())
        try:
            text = json.loads(body)["choices"][0]["message"]["content"]
        except (ValueError, LookupError, TypeError, RecursionError):
            raise AnswerError("the answer is not of the chat protocol") from None
        if not isinstance(text, str):
            raise AnswerError("the answer holds no text")
        return text

    def _post(self, content: bytes) -> bytes:
        key = os.environ.get(KEY)
        headers = {"content-type": "application/json"}
        if key:
            headers["authorization"] = f"Bearer {key}"
        deadline_s = time.monotonic() + self.timeout_s
        try:
            # Redirects are not followed: the key is for this address alone.
            with httpx.stream(
                "POST",
                f"{self.url}/chat/completions",
                content=content,
                headers=headers,
                timeout=self.timeout_s,
            ) as response:
                if response.status_code != 200:
                    raise AnswerError(f"status {response.status_code}")
                return _read_within(response, deadline_s)
        except httpx.TimeoutException:
            raise AnswerError(f"no answer within {self.timeout_s:g} s") from None
        except (httpx.HTTPError, httpx.InvalidURL, UnicodeError) as error:
            raise AnswerError(f"no connection ({type(error).__name__})") from None


def _read_within(response: httpx.Response, deadline_s: float) -> bytes:
    """A timeout counts from byte to byte; one that drips would never end."""
    body = b""
    for part in response.iter_bytes():
        body += part
        if len(body) > MAX_ANSWER_BYTES:
            raise AnswerError(f"more than {MAX_ANSWER_BYTES:,} bytes")
        if time.monotonic() > deadline_s:
            raise AnswerError("the answer came too slowly")
    return body


@dataclass(frozen=True)
class LanguageModelSearch:
    """Asks the model, and `fallback` where its answer is bad, late or missing."""

    space: Space
    ask: Callable[[Sequence[Mapping[str, str]]], str]
    fallback: Searcher

    def propose(self, trials: Sequence[Trial]) -> Proposal | None:
        try:
            values = read_answer(self.ask(messages(self.space, trials)), self.space, trials)
        except AnswerError as error:
            proposal = self.fallback.propose(trials)
            note = f"the language model was not followed: {error}"
            return None if proposal is None else replace(proposal, notes=(note,))
        return Proposal(values, "llm")


def read_answer(text: str, space: Space, trials: Sequence[Trial]) -> Values:
    """The proposal in an answer: one JSON object, alone or in one fenced block.

    Raises: AnswerError when it is none, does not fit the space or repeats a trial.
    """
    fenced = _FENCE.match(text)
    try:
        proposed = json.loads(fenced[1] if fenced else text, object_pairs_hook=_without_repetition)
    except (ValueError, RecursionError):
        raise AnswerError("the answer is not one JSON object") from None
    try:
        values = space.check(proposed)
    except ValueError as error:
        raise AnswerError(_shortened(f"the answer does not fit the space: {error}")) from None
    if is_repeated(values, trials):
        raise AnswerError("the answer repeats a trial")
    return values


def messages(space: Space, trials: Sequence[Trial]) -> list[dict[str, str]]:
    """What the model is shown: the space, and the latest trials as JSON, oldest first."""
    shown = [_describe_trial(trial) for trial in trials[-_MAX_TRIALS_SHOWN:]]
    parameters = {
        path: parameter.model_dump(mode="json", exclude_defaults=True)
        for path, parameter in space.parameters.items()
    }
    content = json.dumps({"space": parameters, "trials": shown})
    return [{"role": "system", "content": _INSTRUCTION}, {"role": "user", "content": content}]


def _describe_trial(trial: Trial) -> dict[str, Any]:
    told: dict[str, Any] = {"values": trial.values, "ending": trial.ending or "running"}
    if trial.best is not None:
        told |= {"ndcg10": round(trial.best.ndcg10, 5), "error": round(trial.best.error, 5)}
        told |= {"best_epoch": trial.best.epoch, "epochs": trial.epochs[-1].epoch}
    if trial.reason:
        told["reason"] = _shortened(trial.reason)
    return told


def _without_repetition(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len({key for key, _ in pairs}) < len(pairs):
        raise ValueError("a key stands twice")
    return dict(pairs)


def _shortened(text: str) -> str:
    return text if len(text) <= 300 else f"{text[:297]}..."
