"""What a first pass over a bucket counts, against the store that training cuts."""

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_lake.schemas import sequences_schema
from ray_jobs.bucket_tasks import add_up_counts, count_bucket
from ray_jobs.sections.models import TrainConfig
from recsys.catalogue import Catalogue
from recsys.context import ContextConfig, ContextEncoder
from recsys.splits import SplitConfig, can_train, split_tokens
from recsys.targets import TargetsConfig, find_targets
from recsys.tokens import TokenStore

_TYPES = ("view", "add_to_cart", "purchase")


def _sequences(num_users=40):
    rng = np.random.default_rng(0)
    rows = [
        {
            "user_id": f"u{user}",
            "item_ids": rng.choice(list("abcdefgh"), length).tolist(),
            "event_types": rng.choice([*_TYPES, None], length, p=[0.6, 0.2, 0.15, 0.05]).tolist(),
            "timestamps": list(range(length)),
            "devices": [None] * length,
            "user_bucket": 0,
        }
        for user, length in enumerate(rng.integers(1, 15, num_users))
    ]
    return pa.Table.from_pylist(rows, sequences_schema("string", "string"))


def _count(path, targets, new_since_s=None):
    batch = pa.table({"files": [[str(path)]]})
    counted = count_bucket(
        batch,
        split=SplitConfig(),
        targets=targets,
        fields=["event_type"],
        options={},
        new_since_s=new_since_s,
    )
    return {
        field: {
            row["value"] or row["item_id"]: row["count"]
            for row in counted.to_pylist()
            if row["field"] == field
        }
        for field in ("users", "item_id", "event_type", "trained_until_us")
    }


@pytest.mark.parametrize("event_types", [(), ("purchase",), ("purchase", "add_to_cart")])
def test_counts_agree_with_the_split_that_trains(tmp_path, event_types):
    sequences, config = _sequences(), TargetsConfig(event_types=event_types)
    pq.write_table(sequences, tmp_path / "bucket.parquet")
    counts = _count(tmp_path / "bucket.parquet", config)

    catalogue = Catalogue.build(pa.array(list("abcdefgh")), np.ones(8, int), None)
    encoder = ContextEncoder.learn(
        ContextConfig(categorical=("event_type",), time=()),
        {"event_type": dict.fromkeys(_TYPES, 1)},
    )
    store = TokenStore.from_sequences(sequences, catalogue, encoder)
    targets = find_targets(config, encoder)
    split = split_tokens(store, SplitConfig(), targets)
    is_target_T = None if targets is None else targets.mark(store.context_TF)
    assert counts["users"] == {
        "trainable": can_train(store.offsets_U, split, is_target_T).sum(),
        "validated": (split.validation_U >= 0).sum(),
    }
    num_training = (split.train_end_U - store.offsets_U[:-1]).sum()
    assert sum(counts["item_id"].values()) == num_training
    is_training_T = np.arange(store.num_tokens) < np.repeat(
        split.train_end_U, np.diff(store.offsets_U)
    )
    assert counts["trained_until_us"] == {None: store.timestamps_T[is_training_T].max()}
    assert 0 < counts["users"]["validated"] < len(sequences)


def test_counts_of_many_buckets_add_up():
    tables = [
        pa.table(
            {
                "field": ["item_id", "item_id", "users", "trained_until_us"],
                "item_id": [number % 3, 99, None, None],
                "value": [None, None, "trainable", None],
                "count": [number, 1, 2, 1_000 - number],
            }
        )
        for number in range(40)
    ]
    of_items, others = add_up_counts(iter(tables))
    assert dict(zip(*of_items.to_pydict().values(), strict=True)) == {
        0: sum(range(0, 40, 3)),
        1: sum(range(1, 40, 3)),
        2: sum(range(2, 40, 3)),
        99: 40,
    }
    sums, ends = others.sort_by([("field", "descending")]).to_pylist()
    assert (sums["field"], sums["value"], sums["count_sum"]) == ("users", "trainable", 80)
    assert (ends["field"], ends["count_max"]) == ("trained_until_us", 1_000)


def test_only_users_with_a_new_training_event_can_be_trained_on(tmp_path):
    seconds = [[1, 2, 3, 4, 5], [1, 2, 3, 6, 7], [1, 4, 5], [4, 5]]
    rows = [
        {
            "user_id": f"u{user}",
            "item_ids": list("abcde")[: len(times)],
            "event_types": ["view"] * len(times),
            "timestamps": [second * 1_000_000 for second in times],
            "devices": [None] * len(times),
            "user_bucket": 0,
        }
        for user, times in enumerate(seconds)
    ]
    schema = sequences_schema("string", "string")
    pq.write_table(pa.Table.from_pylist(rows, schema), tmp_path / "bucket.parquet")
    # All but the last two events train, and of the last user, who has no more, both.
    for new_since_s, trainable in [(None, 3), (3, 3), (4, 1), (6, 0)]:
        counts = _count(tmp_path / "bucket.parquet", TargetsConfig(), new_since_s)
        assert counts["users"] == {"trainable": trainable, "validated": 3}
        assert counts["trained_until_us"] == {None: 5_000_000}


def test_targets_need_the_event_type_among_the_context():
    context = ContextConfig(categorical=("device",))
    with pytest.raises(ValueError, match=r"tell events apart by 'event_type', which context"):
        TrainConfig(context=context, targets=TargetsConfig(event_types=("purchase",)))
    assert not TrainConfig(context=context).targets.are_needed
