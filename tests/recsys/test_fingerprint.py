"""What a training goes on from, and what it refuses."""

import pytest

from recsys.fingerprint import refuse_another, take_fingerprint
from recsys.recipe import read_recipe
from recsys.splits import leave_one_out


@pytest.fixture
def taken(make_store):
    """The fingerprint of a small training, by what its recipe replaces."""
    store = make_store([[0, 1, 2, 3]] * 3)
    split = leave_one_out(store.offsets_U)

    def take(**overrides):
        recipe = read_recipe("sasrec-ce", overrides)
        return take_fingerprint(recipe, 0, store, split, None, num_windows=3)

    return take


def test_a_setting_that_is_newer_than_the_training_was_at_its_default(taken):
    began = taken()
    del began["item_start"], began["model.time_bias"]
    refuse_another(began, taken())
    with pytest.raises(ValueError, match=r"^item_start was random and is spectral$"):
        refuse_another(began, taken(item_start="spectral"))
    with pytest.raises(ValueError, match=r"^model\.time_bias was False and is True$"):
        refuse_another(began, taken(model={"time_bias": True}))


def test_what_is_no_setting_is_not_filled_in(taken):
    began = taken()
    del began["seed"]
    with pytest.raises(ValueError, match=r"^seed was None and is 0$"):
        refuse_another(began, taken())


def test_a_part_that_one_of_them_lacks_is_named(taken):
    with pytest.raises(ValueError, match=r"model\.item_codes\.length was None and is 8;"):
        refuse_another(taken(), taken(model={"item_codes": {"length": 8}}))
