"""Stub until the readers of raw logs land."""
from pydantic import BaseModel


class IngestConfig(BaseModel):
    user_id: str = "int64"
    item_id: str = "int64"
    num_buckets: int = 16
