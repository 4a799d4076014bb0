"""`Placement`: where new tokens go in the cache, and which entries they attend to."""

from functools import cached_property

import torch
from torch import Tensor

from moonwhale.infer.cache import LatentCache
from moonwhale.native.structures import PlacementStruct, address


class Placement:
    """Q new tokens for each of B sequences. Sequence i is in slot `first_slot + i` and has `start[i]` tokens already.

    Masks and indices are computed at their first use, then shared by all blocks of the model.
    """

    def __init__(
        self, cache: LatentCache, rotations: tuple[Tensor, Tensor], first_slot: int, start: list[int], length: int
    ):
        """`rotations` are the cosines and sines (T, rope / 2) fp32 of all positions."""
        self.block_size, self.rotations = cache.config.moba_block_size, rotations
        self.first_slot, self.start, self.length = first_slot, start, length
        self.end = max(start) + length
        self.tokens = len(start) * length
        self.slots = slice(first_slot, first_slot + len(start))
        self.slot_length, self.device, self._dtype = cache.length, cache.device, cache.dtype
        self.full_blocks = (self.end - 1) // self.block_size  # blocks that are an earlier block of some token
        self.needs_mask = self.tokens > 1  # a single token is the last entry of its sequence

    @cached_property
    def for_native(self) -> PlacementStruct:
        self._start = torch.tensor(self.start)  # kept alive for the structure
        sizes = len(self.start), self.length, self.first_slot, torch.get_num_threads(), len(self.rotations[0])
        return PlacementStruct(*sizes, *map(address, (self._start, *self.rotations)))

    @cached_property
    def positions(self) -> Tensor:
        """The new tokens' positions (B, Q)."""
        return torch.tensor([list(range(n, n + self.length)) for n in self.start], device=self.device)

    @cached_property
    def slot_index(self) -> Tensor:
        """Each sequence's slot (B, 1)."""
        return torch.arange(self.first_slot, self.slots.stop, device=self.device)[:, None]

    @cached_property
    def entry_index(self) -> Tensor:
        """The index (B * Q) of each new token's entry, among the entries of all slots."""
        return (self.slot_index * self.slot_length + self.positions).flatten()

    @cached_property
    def rotation(self) -> tuple[Tensor, Tensor]:
        """Cosines and sines (B, Q, 1, rope / 2) of the new tokens."""
        return tuple(table[self.positions].unsqueeze(2).to(self._dtype) for table in self.rotations)

    @cached_property
    def future(self) -> Tensor | None:
        """Mask (B, Q, 1, end) of the entries after a token, or None if there are none."""
        if not self.needs_mask:
            return None
        return (torch.arange(self.end, device=self.device) > self.positions[..., None])[:, :, None]

    @cached_property
    def own_block(self) -> Tensor:
        """The MoBA block (B, Q, 1, 1) that holds a token."""
        return (self.positions // self.block_size)[:, :, None, None]

    @cached_property
    def not_earlier_blocks(self) -> Tensor:
        """Mask (B, Q, 1, full_blocks + 1) of the blocks that do not precede a token's own."""
        return torch.arange(self.full_blocks + 1, device=self.device) >= self.own_block

    @cached_property
    def future_in_own_block(self) -> Tensor:
        """Mask (B, Q, 1, 1, block_size) of the entries of its own block that come after a token."""
        return (
            torch.arange(self.block_size, device=self.device)
            > (self.positions % self.block_size)[:, :, None, None, None]
        )

    def write_means(self, keys: Tensor, means: Tensor) -> None:
        """Write the mean entry of each block whose last token is among the new ones, for one layer's keys and means."""
        size = self.block_size
        for slot, start in enumerate(self.start, self.first_slot):
            for block in range(start // size, (start + self.length) // size):
                entries = keys[slot, block * size : (block + 1) * size]
                means[slot, block] = entries.mean(0, dtype=torch.float32)
