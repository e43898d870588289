"""Files of other people's format as token stores."""

import numpy as np
import pytest

from benchmarks import published
from benchmarks.published import Events, make_shop, read_dataset, read_lists, read_pairs
from data_lake.synthetic import ShopConfig
from recsys.catalogue import NUM_SPECIAL
from recsys.context import NO_TIME, ContextConfig

_DAY_US = 86_400_000_000


@pytest.fixture
def two_users(monkeypatch):
    """User 1 has items 5, 9, 5, 7 and user 4 items 9, 7, one a day; the rows are mixed."""
    days = np.array([1, 0, 2, 1, 3, 0])
    events = Events(np.array([4, 1, 1, 1, 1, 4]), np.array([7, 5, 5, 9, 7, 9]), days * _DAY_US)
    monkeypatch.setattr(published, "DATASETS", {"two": lambda: events})


def test_pairs_keep_the_order_of_the_file(tmp_path):
    (tmp_path / "pairs.txt").write_text("1 5\n1 3\n2 5\n")
    events = read_pairs(tmp_path / "pairs.txt")
    assert (events.users_T.tolist(), events.items_T.tolist()) == ([1, 1, 2], [5, 3, 5])
    assert (events.timestamps_T == NO_TIME).all()


def test_lists_have_a_user_and_then_items(tmp_path):
    (tmp_path / "lists.txt").write_text("7 5 3\n8 4\n")
    events = read_lists(tmp_path / "lists.txt")
    assert (events.users_T.tolist(), events.items_T.tolist()) == ([7, 7, 8], [5, 3, 4])


def test_ratings_bring_time_and_segment(tmp_path):
    (tmp_path / "ratings.dat").write_text("2::10::5::100\n1::11::3::90\n")
    (tmp_path / "users.dat").write_text("1::F::25::4::1\n2::M::35::4::1\n")
    events = published.read_ratings(tmp_path)
    assert events.timestamps_T.tolist() == [100_000_000, 90_000_000]
    assert events.columns["segment"].to_pylist() == ["M 35", "F 25"]


def test_ratings_say_which_times_are_original(tmp_path, monkeypatch):
    # Of 3 and less before December 2nd, 2000 they are not; rows of user 1 are not in order.
    lines = ["1::10::3::975715200", "1::11::3::975715199", "1::12::4::100", "2::10::1::7"]
    (tmp_path / "ratings.dat").write_text("".join(f"{line}\n" for line in lines))
    (tmp_path / "users.dat").write_text("1::F::25::4::1\n2::M::35::4::1\n")
    monkeypatch.setattr(
        published, "DATASETS", {"ratings": lambda: published.read_ratings(tmp_path)}
    )
    marks = read_dataset("ratings").marks
    assert marks[published.ORIGINAL_TIMES].tolist() == [True, False, True, False]


@pytest.mark.usefixtures("two_users")
def test_events_are_sorted_by_user_and_time():
    store = read_dataset("two").store
    assert store.offsets_U.tolist() == [0, 4, 6]
    # Items 5, 7 and 9 are the rows 2, 3 and 4.
    assert (store.items_T - NUM_SPECIAL).tolist() == [0, 2, 0, 1, 2, 1]


@pytest.mark.usefixtures("two_users")
def test_counts_are_those_of_training():
    catalogue = read_dataset("two").catalogue
    # Of user 1 items 5 and 9 train; user 4 has too few events for a target, so both train.
    assert catalogue.table.to_pydict() == {"item_id": [5, 7, 9], "count": [1, 1, 2]}


@pytest.mark.usefixtures("two_users")
def test_a_cut_takes_the_first_event_after_each_quantile():
    # Days 0, 0, 1, 1, 2, 3: validation from day 1 on, test from day 2.
    split = read_dataset("two", cut=(0.5, 0.75)).split
    assert split.validation_U.tolist() == [1, 5]
    assert split.test_U.tolist() == [2, -1]
    last = read_dataset("two", cut=(0.5, 0.75), cut_target="last")
    assert last.split.test_U.tolist() == [3, -1]
    assert last.protocol == "temporal cut at 50% and 75%, last targets"


def test_a_file_without_times_cannot_be_cut(monkeypatch):
    timeless = Events(np.array([1]), np.array([1]), np.array([NO_TIME]))
    monkeypatch.setattr(published, "DATASETS", {"timeless": lambda: timeless})
    with pytest.raises(ValueError, match="no times, so it cannot be cut"):
        read_dataset("timeless", cut=(0.8, 0.9))


def test_the_shop_has_what_a_context_may_name(monkeypatch):
    config = ShopConfig(num_users=30, num_items=20, num_categories=3, num_parts=2)
    monkeypatch.setattr(published, "DATASETS", {"shop": lambda: make_shop(config, 1)})
    dataset = read_dataset("shop", ContextConfig())
    assert dataset.store.num_users == 30
    assert dataset.context.vocabularies["segment"]
    assert (dataset.store.context_TF[:, :3] > 0).mean() > 0.95
