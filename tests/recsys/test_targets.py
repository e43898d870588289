"""Which events are targets and what they weigh, in names and in codes."""

import numpy as np
import pyarrow as pa
import pytest
from pydantic import ValidationError

from recsys.context import ContextConfig, ContextEncoder
from recsys.errors import TrainingError
from recsys.targets import TargetsConfig, find_targets

_ENCODER = ContextEncoder.learn(
    ContextConfig(categorical=("device", "event_type"), time=()),
    {"device": {"mobile": 1}, "event_type": {"view": 9, "add_to_cart": 3, "purchase": 2}},
)


def _find(**config):
    return find_targets(TargetsConfig(**config), _ENCODER)


def test_by_default_every_event_is_a_target_and_nothing_is_looked_up():
    assert _find() is None


def test_chosen_types_weigh_one_and_the_others_nothing():
    # Codes: 0 unknown, 1 view, 2 add_to_cart, 3 purchase.
    targets = _find(event_types=["purchase", "add_to_cart"])
    assert targets.weights_V.tolist() == [0, 0, 1, 1]
    assert not targets.is_weighted


def test_weights_without_types_leave_every_event_a_target():
    targets = _find(weights={"purchase": 3, "view": 0.5})
    assert targets.weights_V.tolist() == [1, 0.5, 1, 3]
    assert targets.is_weighted


def test_one_weight_for_all_targets_is_none():
    assert not _find(event_types=["purchase"], weights={"purchase": 3}).is_weighted


def test_events_are_marked_by_the_code_of_their_type():
    targets = _find(event_types=["purchase"])
    context_TF = np.array([[1, 3], [3, 1], [0, 0], [0, 3]], np.uint8)
    assert targets.mark(context_TF).tolist() == [True, False, False, True]


@pytest.mark.parametrize("encode", [lambda values: values, pa.Array.dictionary_encode])
def test_names_and_codes_mark_the_same_events(encode):
    config = TargetsConfig(event_types=["purchase", "view"])
    names = pa.array(["view", "purchase", None, "add_to_cart", "unheard of"], pa.string())
    codes = _ENCODER.encode(np.zeros(5, int), np.zeros(5, int), {"event_type": names})
    by_code = find_targets(config, _ENCODER).mark(codes)
    by_name = config.mark(encode(names))
    assert by_name.tolist() == by_code.tolist() == [True, True, False, False, False]


def test_a_type_that_does_not_occur_is_refused_with_those_that_do():
    message = r"train.targets names buy, which no training event is; there are: view, add_to_cart"
    with pytest.raises(TrainingError, match=message):
        _find(event_types=["buy"])
    with pytest.raises(TrainingError, match=message):
        _find(weights={"buy": 2})


def test_event_types_must_be_a_context_field():
    encoder = ContextEncoder.learn(ContextConfig(categorical=("device",)), {})
    with pytest.raises(TrainingError, match=r"needs 'event_type' in .*which has device; add it"):
        find_targets(TargetsConfig(event_types=["purchase"]), encoder)


def test_what_is_no_target_has_no_weight():
    with pytest.raises(ValidationError, match="weights names view, which event_types does not"):
        TargetsConfig(event_types=["purchase"], weights={"view": 0.5})


@pytest.mark.parametrize("weight", [0, -1])
def test_weights_are_above_zero(weight):
    with pytest.raises(ValidationError, match="greater than 0"):
        TargetsConfig(weights={"view": weight})
