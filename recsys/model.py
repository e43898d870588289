"""One encoder for every recipe: items, positions and context are added, attention mixes them, and
the states at the scored positions are compared with the item table.

Sources: BERT4Rec (Sun et al., 2019, doi:10.1145/3357384.3357895), SASRec (Kang & McAuley, 2018,
doi:10.1109/ICDM.2018.00035).
"""

import copy
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor, nn

from recsys.catalogue import MASK, NUM_SPECIAL, PAD
from recsys.item_table import (
    AttributeBias,
    AttributedTable,
    ItemFeatures,
    ItemTable,
    Rows,
    make_table,
)


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

    @property
    def history_len(self) -> int:
        """Events of a history that the model reads when it recommends."""
        return self.max_len - 1 if self.attention == "bidirectional" else self.max_len


_NUM_AGES = 80
"""Steps of the logarithm of a time; 80 reach beyond 900 years."""


class Seen(NamedTuple):
    """What stands between each two positions, the same for every block."""

    hidden_B1LL: Tensor
    """0 where a position (row) may look, -inf where it may not."""
    distances_LL: Tensor
    """Rows of `Block.distances`: from the furthest position ahead to the furthest behind."""
    ages_BLL: Tensor | None
    """Rows of `Block.ages`, see `bucket_ages`; None where no block reads times."""


def bucket_ages(asked_BL: Tensor, happened_BL: Tensor) -> Tensor:
    """How long before the moments `asked` each event happened, as rows of a table, `[B, L, L]`.

    `floor(ln(seconds) / 0.301)`, as HSTU has it, counted apart for events that lie ahead. Row 0
    stands for an unknown time.

    Args:
        asked_BL: int, seconds from any origin, 0 where unknown.
        happened_BL: the same of the events.
    """
    passed_BLL = asked_BL[:, :, None] - happened_BL[:, None, :]
    steps_BLL = passed_BLL.abs().clamp(min=1).float().log().div(0.301).int() + 1
    rows_BLL = steps_BLL.clamp(max=_NUM_AGES - 1) + _NUM_AGES * (passed_BLL < 0)
    is_known_BLL = (asked_BL != 0)[:, :, None] & (happened_BL != 0)[:, None, :]
    return rows_BLL * is_known_BLL


class Dropout(nn.Module):
    """Dropout that draws one byte a value on a CPU, where the generator is what it costs; its
    probability is rounded to a 256th.
    """

    def __init__(self, p: float) -> None:
        super().__init__()
        self.p = p

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.p == 0:
            return x
        if x.is_cuda:
            return F.dropout(x, self.p)
        num_dropped = round(self.p * 256)
        words = torch.empty(-(-x.numel() // 8), dtype=torch.int64).random_(-(2**63), None)
        is_kept = words.view(torch.uint8)[: x.numel()].view(x.shape) >= num_dropped
        return x * is_kept * (256 / (256 - num_dropped))


class Block(nn.Module):
    """Pre-norm transformer block: attention, then a feed-forward net four times as wide."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        dim = config.dim
        self.num_heads = config.num_heads
        self.norm_attention = nn.LayerNorm(dim)
        self.qkv = nn.Linear(dim, 3 * dim)
        self.project = nn.Linear(dim, dim)
        self.norm_mlp = nn.LayerNorm(dim)
        self.widen = nn.Linear(dim, 4 * dim)
        self.narrow = nn.Linear(4 * dim, dim)
        self.dropout = Dropout(config.dropout)
        distances = 2 * config.max_len - 1
        self.distances = nn.Embedding(distances, config.num_heads) if config.relative_bias else None
        self.ages = nn.Embedding(2 * _NUM_AGES, config.num_heads) if config.time_bias else None

    def forward(self, x_BLD: Tensor, seen: "Seen") -> Tensor:
        x_BLD = x_BLD + self.dropout(self._attend(self.norm_attention(x_BLD), seen))
        wide = F.gelu(self.widen(self.norm_mlp(x_BLD)))
        added: Tensor = x_BLD + self.dropout(self.narrow(wide))
        return added

    def _attend(self, x_BLD: Tensor, seen: "Seen") -> Tensor:
        B, L, D = x_BLD.shape
        qkv = self.qkv(x_BLD).view(B, L, 3, self.num_heads, D // self.num_heads)
        q_BHLd, k_BHLd, v_BHLd = qkv.permute(2, 0, 3, 1, 4)

        mixed_BHLd = attend(q_BHLd, k_BHLd, v_BHLd, self._bias(seen, q_BHLd.dtype))
        projected: Tensor = self.project(mixed_BHLd.transpose(1, 2).reshape(B, L, D))
        return projected

    def _bias(self, seen: "Seen", dtype: torch.dtype) -> Tensor:
        bias_BHLL = seen.hidden_B1LL.to(dtype)
        if self.distances is not None:
            bias_BHLL = bias_BHLL + self.distances(seen.distances_LL).permute(2, 0, 1).to(dtype)
        if self.ages is not None:
            bias_BHLL = bias_BHLL + self.ages.weight.to(dtype)[seen.ages_BLL].permute(0, 3, 1, 2)
        return bias_BHLL


def attend(q_BHLd: Tensor, k_BHLd: Tensor, v_BHLd: Tensor, bias_BHLL: Tensor) -> Tensor:
    """Attention with an additive bias, `[B, H, L, d]`."""
    if q_BHLd.is_cuda:
        return F.scaled_dot_product_attention(q_BHLd, k_BHLd, v_BHLd, attn_mask=bias_BHLL)
    # At these lengths two products and a softmax take half the time of the fused kernel of a CPU.
    scores_BHLL = (q_BHLd * q_BHLd.shape[-1] ** -0.5) @ k_BHLd.transpose(-1, -2) + bias_BHLL
    return torch.softmax(scores_BHLL, dim=-1) @ v_BHLd


class GatedBlock(Block):
    """LiGR: what attention and the feed-forward net (SwiGLU) add passes a gate that reads their
    input (Borisyuk et al., 2025, arXiv:2502.03417), as in eSASRec (Tikhonovich et al., 2025).
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        dim = config.dim
        self.widen = nn.Linear(dim, 2 * 4 * dim)
        self.gate_attention = nn.Linear(dim, dim)
        self.gate_mlp = nn.Linear(dim, dim)

    def forward(self, x_BLD: Tensor, seen: "Seen") -> Tensor:
        attended = self._attend(self.norm_attention(x_BLD), seen)
        x_BLD = x_BLD + torch.sigmoid(self.gate_attention(x_BLD)) * self.dropout(attended)

        gate, value = self.widen(self.norm_mlp(x_BLD)).chunk(2, dim=-1)
        narrow = self.narrow(F.silu(gate) * value)
        added: Tensor = x_BLD + torch.sigmoid(self.gate_mlp(x_BLD)) * self.dropout(narrow)
        return added


_BLOCKS = {"transformer": Block, "ligr": GatedBlock}


class ContextEmbedding(nn.Module):
    """Sum of one embedding a field; the unknown code of a field is a vector of its own."""

    def __init__(self, sizes: tuple[int, ...], dim: int) -> None:
        super().__init__()
        self.table = nn.Embedding(sum(sizes), dim)
        starts_F = torch.tensor([0, *sizes[:-1]], dtype=torch.int64).cumsum(0)
        self.starts_F: Tensor
        self.register_buffer("starts_F", starts_F, persistent=False)

    def forward(self, context_BLF: Tensor) -> Tensor:
        B, L, num_fields = context_BLF.shape
        rows = (context_BLF + self.starts_F).view(B * L, num_fields)
        summed = F.embedding_bag(rows, self.table.weight, mode="sum")
        return summed.view(B, L, -1)


class NextItemModel(nn.Module):
    """Scores every item of a catalogue as the next one of a sequence.

    Args:
        num_rows: rows of the item table, padding and mask included.
        context_sizes: number of codes of each context field; empty for none.
        features: attributes of the items; None for items that are known by their ids alone.
    """

    def __init__(
        self,
        config: ModelConfig,
        num_rows: int,
        context_sizes: tuple[int, ...],
        features: ItemFeatures | None = None,
    ) -> None:
        super().__init__()
        self.config = config
        self.items = make_table(num_rows, config.dim, features)
        self.outputs = (
            make_table(num_rows, config.dim, features) if config.separate_output else None
        )
        self.item_bias = nn.Parameter(torch.zeros(num_rows))
        self.attribute_bias = AttributeBias(features) if features is not None else None
        self.positions = nn.Embedding(config.max_len, config.dim)
        self.context = ContextEmbedding(context_sizes, config.dim) if context_sizes else None
        # A causal position reads its own event and, apart from it, the context of the request that
        # follows.
        is_causal = config.attention == "causal"
        self.request = (
            ContextEmbedding(context_sizes, config.dim) if context_sizes and is_causal else None
        )
        self.dropout = Dropout(config.dropout)
        self.blocks = nn.ModuleList(_BLOCKS[config.block](config) for _ in range(config.num_layers))
        self.norm = nn.LayerNorm(config.dim)
        self.apply(_initialise)

    @property
    def output_table_ID(self) -> Tensor:
        """The vectors that states are compared with."""
        return self._output_table.all()

    @property
    def output_bias_I(self) -> Tensor:
        """What is added to the scores."""
        return self.item_bias if self.attribute_bias is None else self._biases()

    def output_rows(self) -> tuple[Tensor | Rows, Tensor | Rows]:
        """The vectors `[I, D]` and biases `[I]` of items as losses look at them: rows that cost
        something are computed when they are indexed.
        """
        if self.attribute_bias is None:
            return self.output_table_ID, self.item_bias
        table, num_rows = self._output_table, len(self.item_bias)
        vectors = Rows(lambda items: table.all() if items is None else table(items), num_rows)
        return vectors, Rows(self._biases, num_rows)

    def hide_ids(self, generator: torch.Generator) -> None:
        """Draws whose ids are hidden in the next training step; nothing without attributes."""
        if self.attribute_bias is not None:
            self.attribute_bias.features.draw_hidden(self.config.id_dropout, generator)

    def materialised(self) -> "NextItemModel":
        """The model as it serves, in evaluation mode: a copy with plain item tables that hold what
        ids and attributes add up to. Without attributes it is the model itself.
        """
        self.eval()
        if self.attribute_bias is None:
            return self
        with torch.no_grad():
            # What the copy finds in here it takes instead of copying.
            plain: dict[int, Any] = {id(self.item_bias): nn.Parameter(self._biases())}
            for table in filter(None, (self.items, self.outputs)):
                plain[id(table)] = ItemTable(len(table.weight), self.config.dim, table.all())
            plain[id(self.attribute_bias)] = None
            return copy.deepcopy(self, plain)

    def forward(
        self, items_BL: Tensor, context_BLF: Tensor, request_BLF: Tensor, seconds_BL2: Tensor
    ) -> Tensor:
        """States `[B, L, D]`.

        Args:
            items_BL: int64, left-padded, L at most `max_len`; the last column is the most recent.
            context_BLF: int64, codes of each position's own event; 0 where masked or padded.
            request_BLF: int64, codes of the request that follows each position; a causal model
                alone reads it.
            seconds_BL2: int, when each position's own event happened and when the request that
                follows it came, in seconds from any origin; 0 where unknown. A model with
                `time_bias` alone reads it.
        """
        L = items_BL.shape[1]
        # Positions count back from the most recent one, whatever the length of the batch.
        x_BLD = self.items(items_BL) + self.positions.weight[self.config.max_len - L :]
        if self.context is not None:
            x_BLD = x_BLD + self.context(context_BLF)
        if self.request is not None:
            x_BLD = x_BLD + self.request(request_BLF)

        x_BLD = self.dropout(x_BLD)
        seen = self._seen(items_BL, seconds_BL2)
        for block in self.blocks:
            x_BLD = block(x_BLD, seen)
        normed: Tensor = self.norm(x_BLD)
        return normed

    def scores(self, hidden_BD: Tensor) -> Tensor:
        """Scores `[B, I]`; padding and mask are -inf."""
        table_ID = self.output_table_ID.to(hidden_BD.dtype)
        scores_BI = (hidden_BD @ table_ID.T).float().add_(self.output_bias_I)
        scores_BI[:, :NUM_SPECIAL] = float("-inf")
        return scores_BI

    @property
    def _output_table(self) -> ItemTable:
        return self.items if self.outputs is None else self.outputs

    def _biases(self, items: Tensor | None = None) -> Tensor:
        assert self.attribute_bias is not None
        biases: Tensor = self.attribute_bias(self.item_bias, items)
        return biases

    def _seen(self, items_BL: Tensor, seconds_BL2: Tensor) -> Seen:
        L, is_causal = items_BL.shape[1], self.config.attention == "causal"
        places_L = torch.arange(L, device=items_BL.device)
        distances_LL = places_L[:, None] - places_L
        visible_BLL = (items_BL != PAD)[:, None, :].expand(-1, L, -1)
        if is_causal:
            visible_BLL = visible_BLL & (distances_LL >= 0)
        # A padded position sees itself, so that no row of the softmax is empty.
        visible_BLL = visible_BLL | (distances_LL == 0)
        hidden_BLL = torch.zeros_like(visible_BLL, dtype=torch.float32)
        hidden_BLL = hidden_BLL.masked_fill(~visible_BLL, float("-inf"))

        ages_BLL = None
        if self.config.time_bias:
            # A causal position answers the request that follows it; a mask stands at its own.
            happened_BL, follows_BL = seconds_BL2.unbind(2)
            ages_BLL = bucket_ages(follows_BL if is_causal else happened_BL, happened_BL)
        return Seen(hidden_BLL[:, None], distances_LL + self.config.max_len - 1, ages_BLL)


class Request(NamedTuple):
    """What is known when B recommendations are asked for."""

    context_BF: Tensor
    """Codes, 0 for what is not told."""
    seconds_B: Tensor
    """Time, from the same origin as that of the events; 0 where unknown."""


def append_request(
    config: ModelConfig,
    items_BL: Tensor,
    context_BLF: Tensor,
    seconds_BL: Tensor,
    request: Request,
    known_at_request_F: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Inputs of `NextItemModel.forward` whose last position answers a request.

    Args:
        items_BL: left-padded histories, L at most `history_len`; a causal model needs one event at
            least.
        context_BLF: codes of those events.
        seconds_BL: times of those events.
        known_at_request_F: bool; the other fields are hidden from every request, as in training.
    """
    request_BF, seconds_B1 = request.context_BF * known_at_request_F, request.seconds_B[:, None]
    following_BL = torch.cat([seconds_BL[:, 1:], seconds_B1], dim=1)
    if config.attention == "causal":
        following_BLF = context_BLF[:, 1:] * known_at_request_F
        request_BLF = torch.cat([following_BLF, request_BF[:, None]], dim=1)
        return items_BL, context_BLF, request_BLF, torch.stack([seconds_BL, following_BL], dim=2)
    mask_B1 = torch.full((len(items_BL), 1), MASK, dtype=items_BL.dtype, device=items_BL.device)
    items_BL = torch.cat([items_BL, mask_B1], dim=1)
    context_BLF = torch.cat([context_BLF, request_BF[:, None]], dim=1)
    seconds_BL = torch.cat([seconds_BL, seconds_B1], dim=1)
    seconds_BL2 = torch.stack([seconds_BL, torch.zeros_like(seconds_BL)], dim=2)
    return items_BL, context_BLF, torch.zeros_like(context_BLF), seconds_BL2


def _initialise(module: nn.Module) -> None:
    if isinstance(module, nn.Embedding):
        nn.init.trunc_normal_(module.weight, std=0.02)
    if isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight)
        nn.init.zeros_(module.bias)
    if isinstance(module, nn.Embedding) and module.padding_idx is not None:
        with torch.no_grad():
            module.weight[module.padding_idx].zero_()
    if isinstance(module, AttributedTable):
        # Most often no trained item lacks an attribute, and unknown then means nothing.
        with torch.no_grad():
            module.attributes.weight[module.features.unknown_codes_F] = 0
