"""Which document each token of a batch belongs to, and the key blocks that MoBA cuts each document into."""

from dataclasses import dataclass, field, replace

import torch
import torch.nn.functional as F
from torch import Tensor

PADDING_BETWEEN_TOKENS = (
    "attention_mask has padding between tokens, which a convolution cannot skip: pad at the left, "
    "or let position_ids restart at 0 after it"
)


def needs_static_shapes(device: torch.device | str) -> bool:
    """Return whether tensor shapes must not depend on the values in a tensor.

    torch.compile does not know the values while it traces a graph. On CUDA, reading a value forces a host sync. There,
    code allocates for the worst case. Elsewhere exact sizes are read from the data, which saves work.
    """
    return torch.compiler.is_compiling() or torch.device(device).type == "cuda"


def require(ok: Tensor, problem: str) -> None:
    """Raise a ValueError unless `ok` (0-d) is true, or assert it on the device where its value can't be read."""
    if needs_static_shapes(ok.device):
        torch._assert_async(ok, problem)
    elif not bool(ok):
        raise ValueError(problem)


@dataclass
class BlockTable:
    """The MoBA blocks of a batch. Block n of a row owns the slots n * size … (n + 1) * size - 1.

    The first token of a document always opens a block, so a block never spans two documents. Tokens fill a block from
    the front, and only the last block of a document may be partly empty. That is why neither padding nor packing needs
    a mask inside a block.
    """

    size: int  # tokens per block
    count: int  # blocks per row, the same for every row
    slot: Tensor | None  # (B, T) slot of each token, 0 for padding. None: token t is in slot t
    token: Tensor | None  # (B, count * size) token in each slot, 0 where it is empty. None: slot t holds token t
    first: Tensor  # (B or 1, count) for each block, the first block of the same document

    def block_of(self, n_tokens: int) -> Tensor:
        """Return the block of each token, (B or 1, n_tokens)."""
        slot = torch.arange(n_tokens, device=self.first.device)[None] if self.slot is None else self.slot
        return slot // self.size

    def to_slots(self, x: Tensor) -> Tensor:
        """Move x from tokens (B, H, T, D) to slots (B, H, count * size, D). Empty slots hold arbitrary values."""
        if self.token is None:
            missing = -x.shape[2] % self.size
            return F.pad(x, (0, 0, 0, missing)) if missing else x
        return take_rows(x, self.token)

    def to_tokens(self, x: Tensor, n_tokens: int) -> Tensor:
        """Move x from slots (B, H, count * size, …) back to tokens (B, H, T, …)."""
        if self.slot is None:
            return x[:, :, :n_tokens]
        return take_rows(x, self.slot)


def take_rows(x: Tensor, index: Tensor) -> Tensor:
    """Gather x (B, H, N, …) along dimension 2 at `index` (B, M). Copying whole rows is several times as fast as
    `torch.gather`.
    """
    batch, heads, n = x.shape[:3]
    base = torch.arange(batch * heads, device=x.device).view(batch, heads, 1) * n
    rows = (base + index[:, None]).flatten()  # (B * H * M,)
    return x.flatten(0, 2).index_select(0, rows).view(batch, heads, -1, *x.shape[3:])  # (B, H, M, …)


@dataclass
class Documents:
    """Which document each of the T tokens of B rows belongs to.

    A row holds one document or several packed end to end, with or without padding. Attention, MoBA's blocks, RoPE's
    positions and the targets of the loss all follow from this one description.
    """

    document_ids: Tensor  # (B, T) index of the token's document within its row, -1 for padding
    positions: Tensor  # (B, T) position of the token within its document, 0 for the first one
    valid: Tensor  # (B, T) whether the token counts in statistics (expert loads, largest logits). False for padding
    ranks: Tensor  # (B, T) tokens of its document before it. Equal to `positions` without padding between tokens
    # Every row is one document without padding, so causality is all the masking attention needs. False means "not known
    # to be", since finding out may force a host sync.
    one_per_row: bool
    _tables: dict[int, BlockTable] = field(default_factory=dict)

    @classmethod
    def from_inputs(
        cls,
        batch: int,
        length: int,
        device: torch.device | str,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
    ) -> "Documents":
        """Read padding from `attention_mask` (B, T), 0 for padding, and document starts from `position_ids` (B, T).

        A document starts with the first token, and where `position_ids` does not continue the position before. After
        padding it starts only where they restart at 0: otherwise the document goes on there, as right-padded prompts do
        when they are continued.

        Raises:
            ValueError: the mask is not (B, T).
        """
        if attention_mask is not None and attention_mask.shape != (batch, length):
            raise ValueError(
                f"attention_mask has shape {tuple(attention_mask.shape)}, not {(batch, length)}: "
                "give 0 for padding and 1 for a token"
            )
        document_ids, positions, real, ranks = _find_documents(batch, length, device, attention_mask, position_ids)
        one_per_row = attention_mask is None and position_ids is None
        # In training on CUDA and in compiled graphs no value is read. In inference on CUDA one is: a host sync pays for
        # the simpler attention of rows that are one document each.
        trains = torch.is_grad_enabled() or torch.compiler.is_compiling()
        if not one_per_row and not (needs_static_shapes(device) and trains):
            one_per_row = not bool(document_ids.any())
        return cls(document_ids, positions, real, ranks, one_per_row)

    def to(self, device: torch.device | str | int, non_blocking: bool = False) -> "Documents":
        """Return a copy on another device, by which accelerate serves a model that is spread over several GPUs."""
        if torch.device(device) == self.document_ids.device:
            return self
        ids, positions, valid, ranks = (
            x.to(device, non_blocking=non_blocking) for x in (self.document_ids, self.positions, self.valid, self.ranks)
        )
        return Documents(ids, positions, valid, ranks if self.may_have_padding else positions, self.one_per_row)

    def with_successor(self, k: int) -> "Documents":
        """Return a copy in which a token is valid only if the k-th token after it is in the same document.

        MTP module k reads that token's embedding, so its other positions must not count in any statistic. Padding in
        between would make it another token's.
        """
        same_document = torch.zeros_like(self.valid)
        same_document[:, :-k] = self.document_ids[:, k:] == self.document_ids[:, :-k]
        same_document[:, :-k] &= self.ranks[:, k:] == self.ranks[:, :-k] + k
        return replace(self, valid=self.valid & same_document)

    @property
    def may_have_padding(self) -> bool:
        """Whether a mask was given."""
        return self.ranks is not self.positions

    def check_unbroken(self) -> None:
        """Check that no padding interrupts a document. A convolution reads the tokens before by their index.

        Raises:
            ValueError: it does. On CUDA this is a device-side assertion.
        """
        if self.may_have_padding:
            require((self.ranks == self.positions).all(), PADDING_BETWEEN_TOKENS)

    @property
    def ids_to_mask_by(self) -> Tensor | None:
        """The document ids (B, T) that full attention has to compare, or None if causality is enough."""
        return None if self.one_per_row else self.document_ids

    def visible(self, n_queries: int) -> Tensor:
        """Return which keys the last `n_queries` tokens see under full attention, (B, n_queries, T)."""
        index = torch.arange(self.document_ids.shape[1], device=self.document_ids.device)
        same_document = self.document_ids[:, -n_queries:, None] == self.document_ids[:, None]
        return same_document & (index[-n_queries:, None] >= index)

    def block_table(self, size: int) -> BlockTable:
        """Return the MoBA blocks of `size` tokens. They are computed once and shared by all layers."""
        if size not in self._tables:
            self._tables[size] = self._build_table(size)
        return self._tables[size]

    def _build_table(self, size: int) -> BlockTable:
        batch, length = self.document_ids.shape
        device = self.document_ids.device
        if self.one_per_row:
            count = -(-length // size)
            return BlockTable(size, count, None, None, torch.zeros(1, count, dtype=torch.long, device=device))

        real = self.document_ids >= 0
        opens_block = (self.ranks % size == 0) & real  # (B, T)
        block = opens_block.cumsum(1) - 1
        slot = torch.where(real, block * size + self.ranks % size, 0)
        count = max(int(opens_block.sum(1).max()), 1)

        # Padding goes to one extra slot, and tokens that open no block to one extra block. Both are cut off at the end.
        index = torch.arange(length, device=device).expand(batch, length)
        token = torch.zeros(batch, count * size + 1, dtype=torch.long, device=device)
        token.scatter_(1, torch.where(real, slot, count * size), index)
        opens_document = opens_block & (self.ranks == 0)
        first_of_document = torch.where(opens_document, block, 0).cummax(1).values
        first = torch.zeros(batch, count + 1, dtype=torch.long, device=device)
        first.scatter_(1, torch.where(opens_block, block, count), first_of_document)
        return BlockTable(size, count, slot, token[:, :-1], first[:, :-1])


def _find_documents(
    batch: int, length: int, device, attention_mask: Tensor | None, position_ids: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return document ids, positions, which tokens are real, and ranks within the document, each (B, T)."""
    index = torch.arange(length, device=device).expand(batch, length)
    real = torch.ones_like(index, dtype=torch.bool) if attention_mask is None else attention_mask.bool()
    starts = torch.zeros_like(real)
    if position_ids is not None:
        after_padding = ~real[:, :-1]
        jumps = position_ids[:, 1:] != position_ids[:, :-1] + 1
        starts[:, 1:] = torch.where(after_padding, position_ids[:, 1:] == 0, jumps)
    count = real.cumsum(1)
    starts = (starts | (count == 1)) & real  # a row's first token starts a document
    document_ids = (starts.cumsum(1) - 1).masked_fill(~real, -1)
    first_token = torch.where(starts, index, 0).cummax(1).values
    positions = (index - first_token).masked_fill(~real, 0)
    if attention_mask is None:
        return document_ids, positions, real, positions
    ranks = (count - count.gather(1, first_token)).masked_fill(~real, 0)
    return document_ids, positions, real, ranks
