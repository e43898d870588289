"""What the rows of the leader board are, as `leaderboard.toml` has them."""

import tomllib
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict

from benchmarks.published import NO_CONTEXT
from recsys.attributes import AttributesConfig
from recsys.context import ContextConfig
from recsys.splits import CutTarget

Pair = tuple[float, float]


def _as_steps(aim: Any) -> Any:
    """A pair by itself is the only step."""
    if aim is None:
        return ()
    is_pair = len(aim) > 0 and isinstance(aim[0], int | float)
    return (aim,) if is_pair else aim


class Entry(BaseModel):
    """A row of the leader board."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    dataset: str
    context: ContextConfig = NO_CONTEXT
    attributes: AttributesConfig = AttributesConfig()
    cut: Pair | None = None
    """By time, see `published.read_dataset`; by default the last event of each user tests."""
    cut_target: CutTarget = "first"
    """Which event of a user in a period is ranked."""
    recipe: str
    max_epochs: int
    floor: Pair | None = None
    """HR@10 and NDCG@10 that the row is to reach at least."""
    aim: Annotated[tuple[Pair, ...], BeforeValidator(_as_steps)] = ()
    """HR@10 and NDCG@10 that the row is hoped to reach: a pair, or several, the nearest first."""
    published: str = ""
    max_users: int = 30_000
    """At most so many users, a seeded sample, are validated, and as many are tested."""
    overrides: dict[str, Any] = {}
    patience: int = 1_000
    """Validations without gain before training ends; by default the schedule is run to its end."""

    @property
    def settings(self) -> dict[str, Any]:
        """What a training depends on: all but our goals and the words about others."""
        return self.model_dump(mode="json", exclude={"floor", "aim", "published"})


class Goal(BaseModel):
    """What the best row of a data set is to reach under leave-one-out."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    dataset: str
    floor: Pair
    aim: Pair


GOALS = (
    Goal(name="time-blind", dataset="ml-1m.txt", floor=(0.321, 0.186), aim=(0.326, 0.193)),
    Goal(name="time-aware", dataset="ml-1m", floor=(0.341, 0.198), aim=(0.364, 0.216)),
    Goal(name="of all recipes", dataset="beauty", floor=(0.092, 0.053), aim=(0.097, 0.059)),
)


def read_entries() -> dict[str, Entry]:
    """The rows by name."""
    content = tomllib.loads(Path(__file__).with_name("leaderboard.toml").read_text())
    return {name: Entry.model_validate(row) for name, row in content.items()}
