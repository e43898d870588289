"""The test events that a run is evaluated on."""

from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from ray_jobs.config import PipelineConfig
from ray_jobs.errors import JobError
from recsys.catalogue import Catalogue
from recsys.interactions import training_counts
from recsys.leaderboard import Row, ranks_table
from recsys.splits import Split, SplitConfig, split_tokens
from recsys.targets import TargetEvents
from recsys.tokens import TokenStore
from recsys.validation import sample_users


@dataclass(frozen=True)
class Targets:
    """What is ranked: N test events and what may be learned before them."""

    store: TokenStore
    split: Split
    users_N: np.ndarray
    targets_N: np.ndarray
    counts_I: np.ndarray
    """Training events of each catalogue row."""
    catalogue: Catalogue

    @property
    def where(self) -> tuple[TokenStore, np.ndarray, np.ndarray]:
        """The arguments that name them."""
        return self.store, self.users_N, self.targets_N

    def ranks(self, rows: tuple[Row, ...] = ()) -> pa.Table:
        """See `leaderboard.ranks_table`."""
        return ranks_table(*self.where, self.catalogue, rows)


def choose_targets(
    store: TokenStore,
    split_config: SplitConfig,
    catalogue: Catalogue,
    config: PipelineConfig,
    target_events: TargetEvents | None = None,
) -> Targets:
    """The test events of all users, or of a seeded sample of `evaluate.max_users`.

    Raises: JobError when there is none.
    """
    split = split_tokens(store, split_config, target_events)
    if not (split.test_U >= 0).any():
        raise JobError(
            f"No user has a test event under the {split_config.kind} split; users need three "
            "events, or events on both sides of test_from, of the types that train.targets names."
        )
    users = sample_users(split.test_U, config.evaluate.max_users, config.seed)
    counts_I = training_counts(store, split, catalogue.num_rows)
    return Targets(store, split, users, split.test_U[users], counts_I, catalogue)
