"""Sizes and choices of the encoder."""

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from recsys.item_codes import ItemCodesConfig


class ModelConfig(BaseModel):
    """Sizes of the encoder."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    attention: Literal["bidirectional", "causal"] = "bidirectional"
    """bidirectional scores a mask token (BERT4Rec); causal scores the position before (SASRec)."""
    dim: int = Field(64, ge=8)
    num_layers: int = Field(2, ge=1)
    num_heads: int = Field(2, ge=1)
    max_len: int = Field(50, ge=2)
    """Positions, the mask token of a bidirectional model included."""
    dropout: float = Field(0.1, ge=0, lt=1)
    block: Literal["transformer", "ligr"] = "transformer"
    """ligr: residuals with a gate and SwiGLU, which stay trainable when layers are many."""
    separate_output: bool = False
    """Items are scored by vectors of their own instead of those that sequences are read with."""
    scale_items: bool = False
    """Multiplies item vectors by the root of `dim` before positions are added to them (Vaswani et
    al., 2017, and SASRec), so that the item itself weighs more in what the blocks pass on."""
    item_codes: ItemCodesConfig | None = None
    """Vectors of items are put together from shared centroids that a few bytes an item choose;
    None: a vector of its own for each item."""
    id_dropout: float = Field(0.2, ge=0, lt=1)
    """With attributes: share of the items whose ids are hidden in a training step, so that their
    attributes learn to stand for an item that is new."""
    relative_bias: bool = False
    """Adds to attention what a head learned of the distance between two positions (Raffel et al.,
    2020). A mask token then finds its neighbours at once, wherever it stands."""
    time_bias: bool = False
    """Adds to attention what a head learned of the time between two events, in steps of a third on
    a logarithmic scale; a scored position counts from the time of its request (Zhai et al., 2024,
    arXiv:2402.17152)."""

    @model_validator(mode="after")
    def _heads_divide_dim(self) -> "ModelConfig":
        if self.dim % self.num_heads:
            raise ValueError(f"dim {self.dim} is not divisible by num_heads {self.num_heads}")
        return self

    @model_validator(mode="after")
    def _codes_divide_dim(self) -> "ModelConfig":
        if self.item_codes is not None and self.dim % self.item_codes.length:
            raise ValueError(
                f"dim {self.dim} is not divisible by item_codes.length {self.item_codes.length}"
            )
        return self

    @property
    def history_len(self) -> int:
        """Events of a history that the model reads when it recommends."""
        return self.max_len - 1 if self.attention == "bidirectional" else self.max_len
