"""The parts of a published version that the ingress works with."""

import hashlib
from collections.abc import Hashable
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

import torch

from recsys.artifact import Artifact, load_artifact
from recsys.blocks import bucket_ages
from recsys.fallback import Fallback
from recsys.filters import ItemIndex
from recsys.ladder import Ladder
from recsys.model_config import ModelConfig
from recsys.queries import Query, encode_queries
from recsys.ranker import SimilarQuery


@dataclass(frozen=True)
class Model:
    """One version: its items, what is asked in the ranker's place, and what a question is to it."""

    version: str
    index: ItemIndex
    fallback: Fallback
    ladder: Ladder
    config: ModelConfig
    artifact: Artifact

    @classmethod
    def load(cls, folder: Path) -> "Model":
        """From the folder of a version. Raises ArtifactError."""
        return cls.of(load_artifact(folder))

    @classmethod
    def of(cls, artifact: Artifact) -> "Model":
        """Raises ArtifactError when the fallback tables are missing."""
        index = ItemIndex(artifact.catalogue)
        fallback = Fallback.read(artifact.path / "fallback")
        config = ModelConfig.model_validate(artifact.config["model"])
        return cls(artifact.version, index, fallback, Ladder(fallback, index), config, artifact)

    @property
    def published_s(self) -> float | None:
        """When it was published, in seconds since 1970; None where its manifest does not say."""
        published = self.artifact.manifest.get("published_at")
        return None if published is None else datetime.fromisoformat(published).timestamp()

    def digest(self, query: Query | SimilarQuery) -> bytes:
        """Equal, in every process, for questions that this version answers alike."""
        if isinstance(query, SimilarQuery):
            return _digest(("similar", str(query.item_id), *_limits(query)))
        return _digest((self._digest_input(query), query.exclude_seen, *_limits(query)))

    def _digest_input(self, query: Query) -> bytes:
        # Hours, gaps and the ages of events count by their buckets.
        encoded = encode_queries(
            [query], self.index, self.artifact.context, self.config.history_len
        )
        seen = self.index.encode([event.item_id for event in query.history])
        parts = [encoded.items_BL, encoded.context_BLF, encoded.request_BF, seen]
        if self.config.time_bias:
            seconds_BL = torch.from_numpy(encoded.seconds_BL)
            asked_B1 = torch.from_numpy(encoded.request_seconds_B)[:, None]
            parts += [encoded.seconds_BL, bucket_ages(asked_B1, seconds_BL).numpy()]
        digest = hashlib.blake2b(repr([part.shape for part in parts]).encode())
        for part in parts:
            digest.update(part.tobytes())
        return digest.digest()


def _limits(query: Query | SimilarQuery) -> tuple[Hashable, ...]:
    wanted = query.attributes
    return (
        query.k,
        # Sets have another order in every process.
        tuple(sorted(map(str, query.exclude_items))),
        tuple(sorted(wanted.include_categories)),
        tuple(sorted(wanted.exclude_categories)),
        wanted.available_only,
        wanted.min_price,
        wanted.max_price,
    )


def _digest(parts: tuple[Hashable, ...]) -> bytes:
    return hashlib.blake2b(repr(parts).encode("utf-8", "surrogatepass"), digest_size=24).digest()
