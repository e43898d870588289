"""One encoder for every recipe: items, positions and context are added, attention mixes them, and
the states at the scored positions are compared with the item table.

Sources: BERT4Rec (Sun et al., 2019, doi:10.1145/3357384.3357895), SASRec (Kang & McAuley, 2018,
doi:10.1109/ICDM.2018.00035).
"""

import copy
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from recsys.blocks import BLOCKS, Dropout, Seen, bucket_ages
from recsys.catalogue import MASK, NUM_SPECIAL, PAD
from recsys.item_table import (
    AttributeBias,
    AttributedCodedTable,
    AttributedTable,
    CodedTable,
    ItemFeatures,
    ItemTable,
    Rows,
    Table,
    make_table,
)
from recsys.model_config import ModelConfig
from recsys.packing import Packed, can_pack, pack
from recsys.randomness import Noise
from recsys.touched_rows import TouchedRows

_INITIAL_STD = 0.02
_START_LENGTH = 3
"""How many times as long as random item vectors are those that begin elsewhere."""


class ContextEmbedding(nn.Module):
    """Sum of one embedding a field; the unknown code of a field is a vector of its own, which adds
    nothing until it is trained.
    """

    def __init__(self, sizes: tuple[int, ...], dim: int) -> None:
        super().__init__()
        self.table = nn.Embedding(sum(sizes), dim)
        starts_F = torch.tensor([0, *sizes[:-1]], dtype=torch.int64).cumsum(0)
        self.starts_F: Tensor
        self.register_buffer("starts_F", starts_F, persistent=False)

    def forward(self, context_BLF: Tensor) -> Tensor:
        B, L, num_fields = context_BLF.shape
        rows = (context_BLF + self.starts_F).view(B * L, num_fields)
        if torch.compiler.is_exporting():
            # A graph would loop over the tokens instead.
            summed: Tensor = self.table(rows).sum(1)
        else:
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
        whole = num_rows, config.dim, features, config.item_codes
        self.items = make_table(*whole)
        self.outputs = make_table(*whole) if config.separate_output else None
        if isinstance(self.items, CodedTable) and isinstance(self.outputs, CodedTable):
            self.outputs.codes.copy_(self.items.codes)
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
        self.blocks = nn.ModuleList(BLOCKS[config.block](config) for _ in range(config.num_layers))
        self.norm = nn.LayerNorm(config.dim)
        self.apply(_initialise)

    @property
    def output_table_ID(self) -> Tensor:
        """The vectors that states are compared with."""
        return self.output_table.all()

    @property
    def output_bias_I(self) -> Tensor:
        """What is added to the scores."""
        return self.item_bias if self.attribute_bias is None else self._biases()

    def output_rows(self) -> tuple[Tensor | Rows, Tensor | Rows]:
        """The vectors `[I, D]` and biases `[I]` of items as losses look at them: rows that cost
        something are computed when they are indexed.
        """
        table, num_rows = self.output_table, len(self.item_bias)
        is_whole = self.items.touched is None
        if type(table) is ItemTable and is_whole:
            return table.weight, self.item_bias
        vectors = Rows(lambda items: table.all() if items is None else table(items), num_rows)
        if self.attribute_bias is None and is_whole:
            return vectors, self.item_bias
        return vectors, Rows(self._biases, num_rows)

    def touch(self, touched: TouchedRows | None) -> None:
        """Where training looks up the rows of items on from here; None: in the tables."""
        for table in self._tables:
            table.touched = touched

    @property
    def item_parameters(self) -> list[Tensor]:
        """The parameters that have a row an item."""
        tables = [table.weight for table in self._tables if isinstance(table, ItemTable)]
        return [*tables, self.item_bias]

    def load_codes(self, codes_IC: Tensor) -> None:
        """Takes the codes of all rows, uint8, as `item_codes.learn_codes` gives them."""
        for table in self._tables:
            if isinstance(table, CodedTable):
                table.load_codes(codes_IC)

    def start_items(self, directions_ID: Tensor) -> None:
        """Item vectors begin in these directions, of length 1 or 0 each; rows of zeros stay at
        random. Longer than random ones by `_START_LENGTH`, they are not lost in the first steps.
        """
        length = _START_LENGTH * _INITIAL_STD * self.config.dim**0.5
        for table in self._tables:
            if isinstance(table, ItemTable):
                start_ID = directions_ID.to(table.weight)
                is_known_I = start_ID.any(dim=1)
                with torch.no_grad():
                    table.weight[is_known_I] = length * start_ID[is_known_I]

    @property
    def lacks_codes(self) -> bool:
        """Whether items are put together from codes that nobody has loaded."""
        return any(isinstance(table, CodedTable) and not table.has_codes for table in self._tables)

    def hide_ids(self, generator: torch.Generator) -> None:
        """Draws whose ids are hidden in the next training step; nothing without attributes."""
        if self.attribute_bias is not None:
            self.attribute_bias.features.draw_hidden(self.config.id_dropout, generator)

    def materialised(self) -> "NextItemModel":
        """The model as it serves, in evaluation mode: a copy with plain item tables that hold what
        ids and attributes add up to. Without attributes it is the model itself, codes and all.
        """
        self.eval()
        if self.attribute_bias is None:
            return self
        with torch.no_grad():
            # What the copy finds in here it takes instead of copying.
            plain: dict[int, Any] = {id(self.item_bias): nn.Parameter(self._biases())}
            for table in self._tables:
                plain[id(table)] = ItemTable(len(self.item_bias), self.config.dim, table.all())
            plain[id(self.attribute_bias)] = None
            return copy.deepcopy(self, plain)

    def forward(
        self,
        items_BL: Tensor,
        context_BLF: Tensor,
        request_BLF: Tensor,
        seconds_BL2: Tensor,
        noise: Noise | None = None,
        rows_M: Tensor | None = None,
    ) -> Tensor:
        """States `[B, L, D]`, or `[M, D]` of the positions `rows_M` alone.

        Args:
            items_BL: int64, left-padded, L at most `max_len`; the last column is the most recent.
            context_BLF: int64, codes of each position's own event; 0 where masked or padded.
            request_BLF: int64, codes of the request that follows each position; a causal model
                alone reads it.
            seconds_BL2: int, when each position's own event happened and when the request that
                follows it came, in seconds from any origin; 0 where unknown. A model with
                `time_bias` alone reads it.
            noise: of the training step, for dropout.
            rows_M: flat indices into `[B * L]`; the last block spares the other positions.
        """
        L = items_BL.shape[1]
        # Positions count back from the most recent one, whatever the length of the batch.
        x_BLD = self.items(items_BL) * (self.config.dim**0.5 if self.config.scale_items else 1.0)
        x_BLD = x_BLD + self.positions.weight[self.config.max_len - L :]
        if self.context is not None:
            x_BLD = x_BLD + self.context(context_BLF)
        if self.request is not None:
            x_BLD = x_BLD + self.request(request_BLF)

        x_BLD = self.dropout(x_BLD, noise)
        return self.mix(x_BLD, items_BL, seconds_BL2, noise, rows_M)

    def mix(
        self,
        x_BLD: Tensor,
        items_BL: Tensor,
        seconds_BL2: Tensor,
        noise: Noise | None = None,
        rows_M: Tensor | None = None,
    ) -> Tensor:
        """The states that the blocks make of embedded positions, see `forward`. On a GPU padding is
        left out where few positions are asked for.
        """
        if rows_M is None or not can_pack(self.config, x_BLD):
            return self._run(x_BLD, self._seen(items_BL, seconds_BL2), noise, rows_M)
        is_causal = self.config.attention == "causal"
        packed, places_M = pack(items_BL, rows_M, is_causal=is_causal)
        x_TD = x_BLD.flatten(0, 1).index_select(0, packed.rows_T)
        return self._run(x_TD, packed, None if noise is None else noise.at(packed.rows_T), places_M)

    def _run(
        self, x: Tensor, seen: Seen | Packed, noise: Noise | None, rows_M: Tensor | None
    ) -> Tensor:
        *earlier, last = self.blocks
        for block in earlier:
            x = block(x, seen, noise)
        normed: Tensor = self.norm(last(x, seen, noise, rows_M))
        return normed

    def scores(self, hidden_BD: Tensor) -> Tensor:
        """Scores `[B, I]`; padding and mask are -inf."""
        scores_BI = self.output_table.products(hidden_BD).float().add_(self.output_bias_I)
        scores_BI[:, :NUM_SPECIAL] = float("-inf")
        return scores_BI

    @property
    def output_table(self) -> Table:
        """What knows the vectors that states are compared with."""
        return self.items if self.outputs is None else self.outputs

    @property
    def _tables(self) -> list[Table]:
        return [self.items] if self.outputs is None else [self.items, self.outputs]

    def _biases(self, items: Tensor | None = None) -> Tensor:
        ids = cast(Tensor, self.item_bias)
        if items is not None:
            touched = self.items.touched if self.training else None
            ids = ids[items] if touched is None else touched.look_up(self.item_bias, items)
        if self.attribute_bias is None:
            return ids
        biases: Tensor = self.attribute_bias(ids, items)
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
        nn.init.trunc_normal_(module.weight, std=_INITIAL_STD)
    if isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight)
        nn.init.zeros_(module.bias)
    if isinstance(module, nn.Embedding) and module.padding_idx is not None:
        with torch.no_grad():
            module.weight[module.padding_idx].zero_()
    if isinstance(module, CodedTable):
        module.reset_parameters()
    if isinstance(module, AttributedTable | AttributedCodedTable):
        # Most often no trained item lacks an attribute, and unknown then means nothing.
        with torch.no_grad():
            module.attributes.weight[module.features.unknown_codes_F] = 0
    if isinstance(module, ContextEmbedding):
        # Training may know a field of every event, and serving is told less.
        with torch.no_grad():
            module.table.weight[module.starts_F] = 0
