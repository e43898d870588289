"""Who proposes the next trial, given all that was tried: TPE, random draws, a grid.

A searcher keeps no state: what it proposes follows from the seed and from the trials so far, so
that a search that goes on after its driver died proposes as if nothing had happened.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import optuna

from ray_jobs.tuning.space import Choice, Integer, LogUniform, Space, Values
from ray_jobs.tuning.trials import Trial

_WORST_NDCG = 0.0


@dataclass(frozen=True)
class Proposal:
    """Values for the next trial."""

    values: Values
    origin: str
    """Who proposed it."""
    notes: tuple[str, ...] = ()
    """What happened on the way, for the report."""


class Searcher(Protocol):
    """Anything that proposes."""

    def propose(self, trials: Sequence[Trial]) -> Proposal | None:
        """The next trial, None when there is nothing left to try.

        Args:
            trials: all that were started, in the order of their numbers; running ones included.
        """
        ...


@dataclass(frozen=True)
class RandomSearch:
    """Independent draws from the space."""

    space: Space
    seed: int

    def propose(self, trials: Sequence[Trial]) -> Proposal | None:
        rng = np.random.default_rng([self.seed, len(trials)])
        return Proposal(self.space.sample(rng), "random")


@dataclass(frozen=True)
class GridSearch:
    """Every combination once, `points` values of each range."""

    space: Space
    points: int

    def propose(self, trials: Sequence[Trial]) -> Proposal | None:
        tried = [trial.values for trial in trials]
        found = (values for values in self.space.grid(self.points) if values not in tried)
        values = next(found, None)
        return None if values is None else Proposal(values, "grid")


@dataclass(frozen=True)
class TpeSearch:
    """Optuna's tree-structured Parzen estimator, after `num_random` random draws.

    Trials that failed by their own values count as NDCG@10 of 0, so that it keeps away from them;
    lost ones say nothing. Running ones are taken to end badly, so that trials at the same time are
    not the same. Source: Bergstra et al. (2011), Algorithms for Hyper-Parameter Optimization.
    """

    space: Space
    seed: int
    num_random: int = 10

    def propose(self, trials: Sequence[Trial]) -> Proposal | None:
        # Told anew each time: the study is what the trials say, and nothing else.
        sampler = optuna.samplers.TPESampler(
            n_startup_trials=self.num_random, seed=_mixed(self.seed, len(trials))
        )
        optuna.logging.set_verbosity(optuna.logging.WARNING)  # or each study would say hello
        study = optuna.create_study(direction="maximize", sampler=sampler)
        study.add_trials([self._as_known(trial) for trial in trials])
        asked = study.ask()
        values = self.space.build(lambda path, one: _suggest(asked, path, one))
        return Proposal(self.space.check(values), "tpe")

    def _as_known(self, trial: Trial) -> optuna.trial.FrozenTrial:
        states = optuna.trial.TrialState
        told: dict[str, Any]
        if trial.ending is None:
            told = {"state": states.RUNNING}
        elif trial.counts:
            told = {"state": states.COMPLETE, "value": trial.objective}
        elif trial.ending in ("failed", "out-of-memory"):
            told = {"state": states.COMPLETE, "value": _WORST_NDCG}
        else:
            told = {"state": states.FAIL}
        spread = {path: _distribution(self.space.parameters[path]) for path in trial.values}
        return optuna.trial.create_trial(params=dict(trial.values), distributions=spread, **told)


def _suggest(asked: optuna.Trial, path: str, parameter: Any) -> Any:
    if isinstance(parameter, Choice):
        return asked.suggest_categorical(path, parameter.values)
    if isinstance(parameter, Integer):
        return asked.suggest_int(path, parameter.low, parameter.high)
    is_log = isinstance(parameter, LogUniform)
    return asked.suggest_float(path, parameter.low, parameter.high, log=is_log)


def _distribution(parameter: Any) -> optuna.distributions.BaseDistribution:
    if isinstance(parameter, Choice):
        return optuna.distributions.CategoricalDistribution(parameter.values)
    if isinstance(parameter, Integer):
        return optuna.distributions.IntDistribution(parameter.low, parameter.high)
    is_log = isinstance(parameter, LogUniform)
    return optuna.distributions.FloatDistribution(parameter.low, parameter.high, log=is_log)


def _mixed(seed: int, number: int) -> int:
    """A seed of its own for each proposal."""
    return int(np.random.SeedSequence([seed, number]).generate_state(1)[0])


def is_repeated(values: Values, trials: Sequence[Trial]) -> bool:
    """Whether the same was tried, ranges compared to nine digits."""
    return any(_is_same(values, trial.values) for trial in trials)


def _is_same(ours: Values, theirs: Values) -> bool:
    return ours.keys() == theirs.keys() and all(
        _is_near(value, theirs[path]) for path, value in ours.items()
    )


def _is_near(ours: bool | int | float | str, theirs: bool | int | float | str) -> bool:
    if isinstance(ours, float) and isinstance(theirs, float):
        return math.isclose(ours, theirs, rel_tol=1e-9)
    return ours == theirs
