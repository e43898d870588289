"""A search space: which values the keys of a recipe may take, and on what that depends.

    [tune.space."optimiser.learning_rate"]
    kind = "log-uniform"
    low = 1e-4
    high = 1e-2

    [tune.space."loss.kind"]
    kind = "choice"
    values = ["full-softmax", "gbce"]

    [tune.space."loss.calibration"]
    kind = "uniform"
    low = 0.5
    high = 1.0
    when = { "loss.kind" = ["gbce"] }

A key is the path of a value in a recipe. What is proposed is `{path: value}`; a path whose
condition does not hold takes no part and has no value.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import product
from typing import Annotated, Any, Literal, Self, TypeAlias

import numpy as np
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    StrictBool,
    StrictFloat,
    StrictInt,
    StrictStr,
    model_validator,
)

from recsys.recipe import Recipe, merge_overrides

Value: TypeAlias = StrictBool | StrictInt | StrictFloat | StrictStr
Values: TypeAlias = dict[str, bool | int | float | str]
"""What a trial was given: `{path: value}`."""


class _Parameter(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    when: dict[str, tuple[Value, ...]] = Field(default_factory=dict)
    """Takes part where each of these choices has one of these values."""


class _Range(_Parameter):
    low: float
    high: float

    @model_validator(mode="after")
    def _goes_up(self) -> Self:
        is_finite = math.isfinite(self.low) and math.isfinite(self.high)
        if not is_finite or self.low >= self.high:
            raise ValueError(f"low {self.low} is not below high {self.high}; give other ends")
        return self


class Uniform(_Range):
    """Any number between two."""

    kind: Literal["uniform"]

    def draw(self, rng: np.random.Generator) -> float:
        return float(rng.uniform(self.low, self.high))

    def steps(self, num: int) -> list[float]:
        """Evenly from end to end."""
        return [float(value) for value in np.linspace(self.low, self.high, num)]

    def check(self, value: Any) -> float:
        """The value as it is tried. Raises: ValueError."""
        return _number_within(value, self.low, self.high)


class LogUniform(_Range):
    """Any number between two, each power of ten alike."""

    kind: Literal["log-uniform"]
    low: float = Field(gt=0)

    def draw(self, rng: np.random.Generator) -> float:
        drawn = math.exp(rng.uniform(math.log(self.low), math.log(self.high)))
        return min(max(drawn, self.low), self.high)

    def steps(self, num: int) -> list[float]:
        """Evenly in the logarithm, from end to end."""
        return [min(float(v), self.high) for v in np.geomspace(self.low, self.high, num)]

    def check(self, value: Any) -> float:
        """The value as it is tried. Raises: ValueError."""
        return _number_within(value, self.low, self.high)


class Integer(_Range):
    """Any whole number from one to another, both included."""

    kind: Literal["integer"]
    low: StrictInt
    high: StrictInt

    def draw(self, rng: np.random.Generator) -> int:
        return int(rng.integers(self.low, self.high, endpoint=True))

    def steps(self, num: int) -> list[int]:
        """Evenly from end to end, without repetition."""
        return sorted({round(value) for value in np.linspace(self.low, self.high, num)})

    def check(self, value: Any) -> int:
        """The value as it is tried. Raises: ValueError."""
        number = _number_within(value, self.low, self.high)
        if number != int(number):
            raise ValueError(f"{value!r} is not a whole number")
        return int(number)


class Choice(_Parameter):
    """One of several values."""

    kind: Literal["choice"]
    values: tuple[Value, ...] = Field(min_length=1)

    @model_validator(mode="after")
    def _has_no_value_twice(self) -> Self:
        if len({(type(value), value) for value in self.values}) < len(self.values):
            raise ValueError(f"a value stands twice among {list(self.values)}; leave one out")
        return self

    def draw(self, rng: np.random.Generator) -> Value:
        return self.values[int(rng.integers(len(self.values)))]

    def steps(self, num: int) -> list[Value]:
        """All of them."""
        return list(self.values)

    def check(self, value: Any) -> Value:
        """The value as it is tried. Raises: ValueError."""
        for known in self.values:
            # True is no 1; but a model that answers 64.0 means 64.
            if value == known and isinstance(value, bool) == isinstance(known, bool):
                return known
        raise ValueError(f"{value!r} is none of {list(self.values)}")


Parameter: TypeAlias = Annotated[
    Uniform | LogUniform | Integer | Choice, Field(discriminator="kind")
]


@dataclass(frozen=True)
class Space:
    """Parameters by path; those on which others depend come first."""

    parameters: Mapping[str, Parameter]

    @classmethod
    def of(cls, parameters: Mapping[str, Parameter]) -> "Space":
        """Raises: ValueError when a path is no key of a recipe, or a condition cannot hold."""
        for path in parameters:
            refuse_unknown_path(path)
        for path, parameter in parameters.items():
            _refuse_impossible_condition(path, parameter, parameters)
        return cls(_in_order(parameters))

    def active(self, values: Mapping[str, Any]) -> list[str]:
        """Paths that take part, given the values of those before them."""
        taking_part: list[str] = []
        for path, parameter in self.parameters.items():
            if all(
                on in taking_part and values.get(on) in wanted
                for on, wanted in parameter.when.items()
            ):
                taking_part.append(path)
        return taking_part

    def build(self, value_of: Callable[[str, Any], Any]) -> Values:
        """Calls `value_of(path, parameter)` for each path that takes part, in their order."""
        values: Values = {}
        for path, parameter in self.parameters.items():
            if path in self.active(values):
                values[path] = value_of(path, parameter)
        return values

    def sample(self, rng: np.random.Generator) -> Values:
        """A draw of every parameter that takes part."""
        return self.build(lambda _, parameter: parameter.draw(rng))

    def check(self, proposed: Any) -> Values:
        """What was proposed, with values of the types that the space has.

        Raises: ValueError that names every fault: no mapping, a path that is unknown, missing or
            takes no part, a value out of its range.
        """
        if not isinstance(proposed, Mapping):
            raise ValueError(f"a proposal is a mapping of paths, not {_short(proposed)}")
        faults = [f"there is no {_short(path)}" for path in proposed if path not in self.parameters]
        values: Values = {}
        for path, parameter in self.parameters.items():
            is_active = path in self.active(values)
            if path not in proposed:
                faults += [f"{path} is missing"] if is_active else []
            elif not is_active:
                faults.append(f"{path} takes no part here")
            else:
                try:
                    values[path] = parameter.check(proposed[path])
                except ValueError as error:
                    faults.append(f"{path}: {error}")
        if faults:
            raise ValueError("; ".join(faults))
        return values

    def grid(self, points: int) -> Iterator[Values]:
        """Every combination of all choices and of `points` values of each range, once."""
        return self._combine(dict(self.parameters), points, {})

    def ends(self) -> Iterator[Values]:
        """Every combination of the choices, with all ranges at their low ends and at their high
        ones."""
        choices = {path: one for path, one in self.parameters.items() if isinstance(one, Choice)}
        for picked in product(*(choice.values for choice in choices.values())):
            of_choice = dict(zip(choices, picked, strict=True))
            for end in (0, -1):
                yield self.build(partial(_end_of, of_choice, end))

    def _combine(self, left: dict[str, Any], points: int, values: Values) -> Iterator[Values]:
        if not left:
            yield values
            return
        path = next(iter(left))
        others = {key: parameter for key, parameter in left.items() if key != path}
        if path not in self.active(values):
            yield from self._combine(others, points, values)
            return
        for value in left[path].steps(points):
            yield from self._combine(others, points, {**values, path: value})


def as_overrides(values: Mapping[str, Any], recipe: str, base: Mapping[str, Any]) -> dict[str, Any]:
    """Overrides of a built-in recipe: `base`, and on top of it `{"model.dim": 64}` as
    `{"model": {"dim": 64}}`. Another loss or objective begins with its own defaults.

    Raises: ValueError for an unknown recipe or key.
    """
    changes: dict[str, Any] = {}
    for path, value in values.items():
        *parents, leaf = path.split(".")
        section = changes
        for parent in parents:
            section = section.setdefault(parent, {})
        section[leaf] = value
    return merge_overrides(recipe, dict(base), changes)


def refuse_unknown_path(path: str) -> None:
    """Raises: ValueError when no recipe has such a value."""
    model: Any = Recipe
    for depth, name in enumerate(path.split(".")):
        fields = getattr(model, "model_fields", {})
        if name not in fields or path == "name":
            where = ".".join(path.split(".")[:depth]) or "a recipe"
            known = [field for field in fields if field != "name"] if depth == 0 else list(fields)
            raise ValueError(
                f"there is no {path!r} in a recipe; {where} has: {', '.join(known) or 'no parts'}"
            )
        model = _section_of(fields[name].annotation)
    if model is not None:
        raise ValueError(
            f"{path!r} is a section of a recipe and no value; name one of its values, e.g. "
            f"{path}.{next(iter(model.model_fields))}"
        )


def _section_of(annotation: Any) -> type[BaseModel] | None:
    candidates = (annotation, *getattr(annotation, "__args__", ()))
    return next(
        (one for one in candidates if isinstance(one, type) and issubclass(one, BaseModel)), None
    )


def _refuse_impossible_condition(
    path: str, parameter: Parameter, parameters: Mapping[str, Parameter]
) -> None:
    for on, wanted in parameter.when.items():
        choice = parameters.get(on)
        if not isinstance(choice, Choice):
            raise ValueError(
                f"{path} depends on {on!r}, which is no choice of the space; add it to tune.space"
            )
        unknown = [value for value in wanted if value not in choice.values]
        if unknown or not wanted:
            raise ValueError(
                f"{path} takes part when {on} is {', '.join(map(str, unknown)) or 'nothing'}, and "
                f"{on} is one of {list(choice.values)}"
            )


def _in_order(parameters: Mapping[str, Parameter]) -> dict[str, Parameter]:
    """Raises: ValueError when parameters wait for each other."""
    ordered: dict[str, Parameter] = {}
    while len(ordered) < len(parameters):
        ready = {
            path: parameter
            for path, parameter in parameters.items()
            if path not in ordered and all(on in ordered for on in parameter.when)
        }
        if not ready:
            stuck = sorted(set(parameters) - set(ordered))
            raise ValueError(f"{', '.join(stuck)} depend on each other; remove one condition")
        ordered |= ready
    return ordered


def _number_within(value: Any, low: float, high: float) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"{_short(value)} is not a number")
    if not low <= value <= high:
        raise ValueError(f"{value!r} is not between {low} and {high}")
    return float(value)


def _end_of(of_choice: Mapping[str, Any], end: int, path: str, parameter: Any) -> Any:
    return of_choice[path] if path in of_choice else parameter.steps(2)[end]


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
