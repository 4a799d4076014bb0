"""Where the tokens of a batch belong: padding, packed documents, and the blocks MoBA cuts them into."""

from dataclasses import dataclass, field, replace

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass
class BlockTable:
    """The blocks of a batch, in slot order: block n of a row owns the slots `n * size … (n + 1) * size - 1`.

    A sequence's first token opens a block, so a block never spans two sequences, its tokens fill it from the front, and
    every block but a sequence's last is full. That is why neither padding nor packing needs a mask inside a block.
    """

    size: int
    count: int  # blocks a row, the same for every row
    slot: Tensor | None  # (B, T) slot of each token, 0 for padding; None: token t sits in slot t
    token: Tensor | None  # (B, count * size) token of each slot, 0 where the slot is empty
    first: Tensor  # (B or 1, count) first block of the same sequence

    def block_of(self, n_tokens: int) -> Tensor:
        """Block of each token, (B or 1, n_tokens)."""
        slot = torch.arange(n_tokens, device=self.first.device)[None] if self.slot is None else self.slot
        return slot // self.size

    def to_slots(self, x: Tensor) -> Tensor:
        """(B, H, T, D) tokens to (B, H, count * size, D) slots; what an empty slot holds has no meaning."""
        if self.token is None:
            missing = -x.shape[2] % self.size
            return F.pad(x, (0, 0, 0, missing)) if missing else x
        return _take(x, self.token)

    def to_tokens(self, x: Tensor, n_tokens: int) -> Tensor:
        """(B, H, count * size, …) slots back to (B, H, T, …) tokens."""
        if self.slot is None:
            return x[:, :, :n_tokens]
        return _take(x, self.slot)


def unseen(device) -> bool:
    """Whether no size may depend on what a tensor holds: a graph being compiled does not know it, and a GPU would have
    to be waited for. Upper bounds stand in there; on a CPU, exact sizes are the faster ones.
    """
    return torch.compiler.is_compiling() or torch.device(device).type == "cuda"


def _take(x: Tensor, index: Tensor) -> Tensor:
    """x (B, H, N, …) at index (B, M) of its third dimension, in whole rows: several times faster than `gather`."""
    batch, heads, n = x.shape[:3]
    base = torch.arange(batch * heads, device=x.device).view(batch, heads, 1) * n
    return x.flatten(0, 2).index_select(0, (base + index[:, None]).flatten()).view(batch, heads, -1, *x.shape[3:])


@dataclass
class Documents:
    """Which sequence each of the T tokens of B rows belongs to.

    segment: (B, T) number of the token's own sequence in its row, -1 for padding.
    offset: (B, T) the token's position in its own sequence, 0 for its first.
    valid: (B, T) whether the token counts in statistics (loads, largest logits).
    plain: every row is one unpadded sequence, so that causality is all the masking it needs.
    """

    segment: Tensor
    offset: Tensor
    valid: Tensor
    plain: bool
    _tables: dict[int, BlockTable] = field(default_factory=dict)

    @classmethod
    def of(
        cls, batch: int, length: int, device, attention_mask: Tensor | None, position_ids: Tensor | None
    ) -> "Documents":
        """Reads padding from a (B, T) `attention_mask` (0 = padding) and document starts from (B, T) `position_ids`
        that restart.

        Raises:
            ValueError: the mask is not (B, T), or has padding between tokens where no document ends.
        """
        if attention_mask is not None and attention_mask.shape != (batch, length):
            raise ValueError(
                f"attention_mask has shape {tuple(attention_mask.shape)}, not {(batch, length)}: "
                "give 0 for padding and 1 for a token"
            )
        index = torch.arange(length, device=device).expand(batch, length)
        real = torch.ones_like(index, dtype=torch.bool) if attention_mask is None else attention_mask.bool()
        starts = torch.zeros_like(real)
        starts[:, 0] = True
        starts[:, 1:] |= real[:, 1:] & ~real[:, :-1]
        if position_ids is not None:
            starts[:, 1:] |= position_ids[:, 1:] != position_ids[:, :-1] + 1
        starts &= real
        segment = (starts.cumsum(1) - 1).masked_fill(~real, -1)
        begin = torch.where(starts, index, 0).cummax(1).values
        plain = attention_mask is None and position_ids is None
        if not plain and not (unseen(device) and (torch.is_grad_enabled() or torch.compiler.is_compiling())):
            plain = not bool(segment.any())
        if not plain and attention_mask is not None:
            reopened = starts[:, 1:] & ~real[:, :-1] & (segment[:, 1:] > 0)
            wrong = (reopened if position_ids is None else reopened & (position_ids[:, 1:] != 0)).any()
            message = (
                "attention_mask has padding between tokens: pad at one end (the left, to generate), "
                "or let position_ids restart at 0 behind it"
            )
            if unseen(device):  # said by the device, when it gets there
                torch._assert_async(~wrong, message)
            elif bool(wrong):
                raise ValueError(message)
        return cls(segment, (index - begin).masked_fill(~real, 0), real, plain)

    def ahead(self, k: int) -> "Documents":
        """The layout of MTP module k, where a token counts only if the k-th token after it is of its own sequence."""
        same = torch.zeros_like(self.valid)
        same[:, :-k] = self.segment[:, k:] == self.segment[:, :-k]
        return replace(self, valid=self.valid & same)

    @property
    def packing(self) -> Tensor | None:
        """What `attend` has to be told besides causality: `segment`, or nothing if there is one document a row."""
        return None if self.plain else self.segment

    def visible(self, n_queries: int) -> Tensor:
        """Which tokens the last `n_queries` see under full attention, (B, n_queries, T)."""
        index = torch.arange(self.segment.shape[1], device=self.segment.device)
        same = self.segment[:, -n_queries:, None] == self.segment[:, None]
        return same & (index[-n_queries:, None] >= index)

    def blocks(self, size: int) -> BlockTable:
        """The MoBA blocks of `size` tokens (computed once for all layers)."""
        if size not in self._tables:
            self._tables[size] = self._block_table(size)
        return self._tables[size]

    def _block_table(self, size: int) -> BlockTable:
        batch, length = self.segment.shape
        device = self.segment.device
        if self.plain:
            count = -(-length // size)
            return BlockTable(size, count, None, None, torch.zeros(1, count, dtype=torch.long, device=device))
        real = self.segment >= 0
        opens = (self.offset % size == 0) & real
        block = opens.cumsum(1) - 1
        slot = torch.where(real, block * size + self.offset % size, 0)
        count = max(int(opens.sum(1).max()), 1)
        index = torch.arange(length, device=device).expand(batch, length)
        # Padding is scattered to one slot, and blocks to one entry, more than there are: thrown away at the end.
        token = torch.zeros(batch, count * size + 1, dtype=torch.long, device=device)
        token.scatter_(1, torch.where(real, slot, count * size), index)
        first = torch.zeros(batch, count + 1, dtype=torch.long, device=device)
        first.scatter_(
            1, torch.where(opens, block, count), torch.where(opens & (self.offset == 0), block, 0).cummax(1).values
        )
        return BlockTable(size, count, slot, token[:, :-1], first[:, :-1])
