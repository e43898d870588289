"""Which versions exist, and which serve with which share of the visitors: a folder of artifacts and
one small file beside them.

<root>/<version>/...      artifacts, never changed once published
<root>/SERVING.json       {"serving": {"champion": ..., "shares": {...}}, "before": [...]}
<root>/.SERVING.copy.json  the same, for `repair`
<root>/DECISIONS.jsonl     what became of canaries, and why; a line each

The file is replaced at once under a lock, so that promotions at the same time follow each other and
a reader sees one of them whole. Processes that serve keep what they have while it is damaged.
"""

import difflib
import fcntl
import hashlib
import json
import os
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from recsys.artifact import MANIFEST, number_of
from recsys.errors import ArtifactError

_SERVING = "SERVING.json"
_COPY = ".SERVING.copy.json"
_LOCK = ".SERVING.lock"
_DECISIONS = "DECISIONS.jsonl"
_MAX_BEFORE = 50
_MAX_NAMED = 5


@dataclass(frozen=True)
class Serving:
    """What serves: a champion, and canaries with their shares of the visitors."""

    champion: str
    shares: Mapping[str, float] = field(default_factory=dict)
    """Of the other versions, each above 0, below 1 together; the champion has the rest."""

    @property
    def versions(self) -> tuple[str, ...]:
        """The champion, then the others."""
        return (self.champion, *self.shares)

    def share_of(self, version: str) -> float:
        """Share of the visitors who see a version."""
        if version == self.champion:
            return 1.0 - sum(self.shares.values())
        return self.shares.get(version, 0.0)

    def choose(self, visitor: str) -> str:
        """The version of a visitor, always the same one while shares stay.

        A visitor of a canary keeps it while its share grows. Who sees a canary depends on its name,
        so that the next one meets other people.
        """
        remaining = 1.0
        for version, share in self.shares.items():
            if _uniform(f"{version}:{visitor}") < share / remaining:
                return version
            remaining -= share
        return self.champion


def list_versions(root: Path) -> list[str]:
    """Published versions in the order of their numbers; those without one come first, by name."""
    folders = [path.parent for path in root.glob(f"[!.]*/{MANIFEST}")]
    return [path.name for path in sorted(folders, key=lambda path: (number_of(path), path.name))]


def check_version(root: Path, version: str) -> None:
    """Raises: ArtifactError that names the nearest versions when there is no such one."""
    versions = list_versions(root)
    if version in versions:
        return
    nearest = difflib.get_close_matches(version, versions, _MAX_NAMED, cutoff=0.5)
    if len(versions) <= _MAX_NAMED:
        known = f"it holds: {', '.join(versions) or 'none'}"
    elif nearest:
        known = f"the nearest of {len(versions)}: {', '.join(nearest)}"
    else:
        known = f"the newest of {len(versions)}: {', '.join(versions[-_MAX_NAMED:])}"
    raise ArtifactError(f"Version {version} is not in {root}; {known}.")


def read_serving(root: Path) -> Serving:
    """What serves. Raises ArtifactError when nothing was promoted, or the file is damaged."""
    content = _read(root)
    if content is None:
        raise ArtifactError(f"No version in {root} serves yet; run ray_jobs.publish first.")
    return _parse(root, content["serving"])


def serving_version(root: Path) -> str:
    """The champion. Raises ArtifactError as `read_serving`."""
    return read_serving(root).champion


def list_states(root: Path) -> list[Serving]:
    """Everything that served, as far as it is remembered, oldest first; what serves now is the
    last.

    Raises: ArtifactError as `read_serving`.
    """
    now = read_serving(root)
    content = _read(root)
    before = [] if content is None else content["before"]
    return [*(_parse(root, state) for state in before), now]


def promote(
    root: Path, version: str, share: float = 1.0, *, champion: str | None = None
) -> Serving:
    """Gives a published version a share of the visitors; all of them make it the champion, and end
    every canary.

    Args:
        champion: the version that it was compared with; another one may have taken over since.

    Raises: ArtifactError for a version that does not exist, a share that is none, a canary without
    a champion, or another champion than the one given.
    """
    check_version(root, version)
    if not 0 < share <= 1:
        raise ArtifactError(f"A share of {share:g} is none; give a number above 0, at most 1.")

    def change(serving: Serving | None) -> Serving:
        found = None if serving is None else serving.champion
        if champion is not None and champion != found:
            raise ArtifactError(
                f"Version {version} was compared with {champion}, and {found} serves by now; "
                "compare it with that one, then promote it."
            )
        if share == 1:
            return Serving(version)
        if serving is None or serving.champion == version:
            raise ArtifactError(
                f"Version {version} cannot have a share of {share:g} beside no other champion; "
                "promote it with a share of 1."
            )
        shares = {**serving.shares, version: share}
        if sum(shares.values()) >= 1:
            raise ArtifactError(
                f"The shares {_written(shares)} leave nothing for {serving.champion}; give less."
            )
        return Serving(serving.champion, shares)

    return _change(root, change)


def end_canary(root: Path, version: str) -> Serving:
    """Takes its visitors from one canary; other canaries keep theirs.

    Raises: ArtifactError when it is none.
    """

    def change(serving: Serving | None) -> Serving:
        if serving is None or version not in serving.shares:
            serves = "nothing" if serving is None else ", ".join(serving.versions)
            raise ArtifactError(f"Version {version} is no canary in {root}; {serves} serves.")
        others = {name: share for name, share in serving.shares.items() if name != version}
        return Serving(serving.champion, others)

    return _change(root, change)


def record_decision(root: Path, decision: Mapping[str, Any]) -> None:
    """Notes what was decided on a version, under `version`, before it is done."""
    path = root / _DECISIONS
    with _locked(root), path.open("a") as file:
        # A line that was cut off stays a line of its own.
        is_cut = path.read_bytes()[-1:] not in (b"", b"\n")
        file.write("\n" * is_cut + json.dumps(decision) + "\n")
        file.flush()
        os.fsync(file.fileno())


def read_decisions(root: Path, version: str) -> list[dict[str, Any]]:
    """What was decided on a version, oldest first. A line that was cut off is passed over."""
    path = root / _DECISIONS
    lines = path.read_text().splitlines() if path.exists() else []
    found = [decision for line in lines if (decision := _try_json(line)) is not None]
    return [decision for decision in found if decision.get("version") == version]


def roll_back(root: Path) -> Serving:
    """Ends the canaries if there are any; else brings back what served before.

    Raises: ArtifactError when nothing did.
    """
    with _locked(root):
        content = _read(root)
        if content is None:
            raise ArtifactError(f"No version in {root} serves yet; there is nothing to roll back.")
        serving = _parse(root, content["serving"])
        before = [_parse(root, state) for state in content["before"]]
        if serving.shares:
            found = Serving(serving.champion)
        else:
            champions = [state for state in before if state.champion != serving.champion]
            if not champions:
                raise ArtifactError(
                    f"Nothing served in {root} before {serving.champion}; promote a version."
                )
            found = Serving(champions[-1].champion)
            # What is rolled back is not what "before" means the next time.
            before = before[: before.index(champions[-1])]
        _write(root, found, before)
    return found


def repair(root: Path) -> str:
    """Makes a damaged file readable again, from the copy of the last state that was written; says
    what was done.

    Raises: ArtifactError when the copy is no better; what served before is then not known, and the
    damaged file is put aside, so that a version can be promoted.
    """
    with _locked(root):
        serving = _try_file(root, _SERVING)
        if serving is not None:
            # The copy may be what is damaged, or behind.
            _copy(root)
            return f"{root / _SERVING} is whole; {serving.champion} serves."
        found = _try_file(root, _COPY)
        aside = _put_aside(root)
        if found is None:
            raise ArtifactError(
                f"No copy of {root / _SERVING} is whole, so nothing serves{aside}; promote one of "
                f"{', '.join(list_versions(root)[-_MAX_NAMED:]) or 'none'}."
            )
        os.replace(_write_beside(root, (root / _COPY).read_text()), root / _SERVING)
        return f"{found.champion} serves, as the copy says{aside}."


def _try_file(root: Path, name: str) -> Serving | None:
    """What a file says; None where it is damaged, or names what is not there."""
    try:
        content = _read(root, name)
        if content is None:
            return None
        for state in content["before"]:
            _parse(root, state)
        serving = _parse(root, content["serving"])
    except ArtifactError:
        return None
    return serving if set(serving.versions) <= set(list_versions(root)) else None


def _put_aside(root: Path) -> str:
    if not (root / _SERVING).exists():
        return ""
    aside = root / f".{_SERVING}.damaged-{uuid.uuid4().hex[:8]}"
    os.replace(root / _SERVING, aside)
    return f", and the damaged file is now {aside.name}"


def _change(root: Path, change: Callable[[Serving | None], Serving]) -> Serving:
    with _locked(root):
        content = _read(root)
        serving = None if content is None else _parse(root, content["serving"])
        before = [] if content is None else [_parse(root, state) for state in content["before"]]
        found = change(serving)
        _write(root, found, before if serving is None else [*before, serving])
    return found


@contextmanager
def _locked(root: Path) -> Iterator[None]:
    with (root / _LOCK).open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _read(root: Path, name: str = _SERVING) -> dict[str, Any] | None:
    try:
        content = json.loads((root / name).read_text())
        if isinstance(content["before"], list) and isinstance(content["serving"], dict):
            return dict(content)
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError):
        pass
    raise _damaged(root)


def _parse(root: Path, state: Any) -> Serving:
    try:
        return Serving(
            str(state["champion"]), {str(key): float(s) for key, s in state["shares"].items()}
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise _damaged(root) from error


def _damaged(root: Path) -> ArtifactError:
    return ArtifactError(
        f"{root / _SERVING} is damaged; run python -m ray_jobs.registry repair, which brings back "
        "the last state that was written."
    )


def _write(root: Path, serving: Serving, before: list[Serving]) -> None:
    states = [
        {"champion": state.champion, "shares": dict(state.shares)} for state in [*before, serving]
    ]
    content = {"serving": states[-1], "before": states[:-1][-_MAX_BEFORE:]}
    os.replace(_write_beside(root, json.dumps(content, indent=1)), root / _SERVING)
    _copy(root)


def _copy(root: Path) -> None:
    os.replace(_write_beside(root, (root / _SERVING).read_text()), root / _COPY)


def _write_beside(root: Path, text: str) -> Path:
    """A file that is on the disk before it takes another one's place, whenever the power fails."""
    temporary = root / f".{_SERVING}.{uuid.uuid4().hex}"
    with temporary.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    return temporary


def _try_json(line: str) -> dict[str, Any] | None:
    try:
        return dict(json.loads(line))
    except (ValueError, TypeError):
        return None


def _uniform(text: str) -> float:
    digest = hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest) / 2**64


def _written(shares: Mapping[str, float]) -> str:
    return ", ".join(f"{version}: {share:g}" for version, share in shares.items())
