"""Which events are worth predicting, and what each weighs in the loss, by the type of the event.

What a model reads is another matter: event types as inputs are a context field (`recsys.context`).
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pydantic import BaseModel, ConfigDict, Field, PositiveFloat, model_validator

from recsys.context import ContextEncoder
from recsys.errors import TrainingError

FIELD = "event_type"
"""The context field that targets are told apart by."""


class TargetsConfig(BaseModel):
    """What the model is asked for: the next event of any type, or e.g. the next purchase."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    event_types: tuple[str, ...] = ()
    """Types that are predicted, in training, validation and test alike; empty: every event. All
    events stay inputs. What is bought has often been viewed before, so `evaluate.filter_seen =
    false`, and `exclude_seen = false` in requests, belong to purchases as targets: with seen items
    left out such a target ranks last, whatever the model says. (With `sequences.drop_repeats` a
    purchase and the views right before it are one position, of the type purchase.)"""
    weights: Mapping[str, PositiveFloat] = Field(default_factory=dict)
    """Weight of a target in the training loss by its type, 1 where none is given, e.g.
    `{ purchase = 3, view = 0.5 }`; metrics count every target alike."""

    @model_validator(mode="after")
    def _weighs_targets_alone(self) -> "TargetsConfig":
        others = sorted(set(self.weights) - set(self.event_types))
        if self.event_types and others:
            raise ValueError(
                f"weights names {', '.join(others)}, which event_types does not; such events are "
                "no targets and weigh nothing"
            )
        return self

    @property
    def are_needed(self) -> bool:
        """Whether event types must be known: some are no targets, or weigh differently."""
        return bool(self.event_types or self.weights)

    def mark(self, event_types_T: pa.Array) -> np.ndarray:
        """Which of these events are targets, bool `[T]`."""
        if not self.event_types:
            return np.ones(len(event_types_T), bool)
        if pa.types.is_dictionary(event_types_T.type):
            event_types_T = event_types_T.dictionary_decode()
        chosen = pa.array(self.event_types, event_types_T.type)
        marks_T: np.ndarray = pc.is_in(event_types_T, chosen).to_numpy(zero_copy_only=False)
        return marks_T


@dataclass(frozen=True)
class TargetEvents:
    """The same over the codes of a token store."""

    field: int
    """Column of the context that holds the event type."""
    weights_V: np.ndarray
    """fp32, weight in the loss of each code of that field; 0 where it is no target."""
    is_weighted: bool
    """Whether targets weigh differently."""

    def mark(self, context_TF: np.ndarray) -> np.ndarray:
        """Which events of a store are targets, bool `[T]`."""
        marks_T: np.ndarray = (self.weights_V > 0)[context_TF[:, self.field]]
        return marks_T


def find_targets(config: TargetsConfig, encoder: ContextEncoder) -> TargetEvents | None:
    """The configured targets as codes; None where every event is one and all weigh the same.

    Raises: TrainingError when the event type is not among the context fields, or a configured one
        does not occur in training.
    """
    if not config.are_needed:
        return None
    if FIELD not in encoder.fields:
        raise TrainingError(
            f"train.targets needs {FIELD!r} in train.context.categorical, which has "
            f"{', '.join(encoder.config.categorical) or 'nothing'}; add it there."
        )
    known = encoder.vocabularies[FIELD]
    unknown = sorted({*config.event_types, *config.weights} - set(known))
    if unknown:
        raise TrainingError(
            f"train.targets names {', '.join(unknown)}, which no training event is; there are: "
            f"{', '.join(known) or 'none'}."
        )
    weights = [
        config.weights.get(name, 1.0) if name in (config.event_types or known) else 0.0
        for name in known
    ]
    # Code 0, a type that training did not know, can only be a target where every event is one.
    weights_V = np.array([0.0 if config.event_types else 1.0, *weights], np.float32)
    is_weighted = len(np.unique(weights_V[weights_V > 0])) > 1
    return TargetEvents(encoder.fields.index(FIELD), weights_V, is_weighted)
