"""Where in the cache new tokens go, and what they may look back on."""

from functools import cached_property

import torch
from torch import Tensor

from moonwhale.infer.cache import LatentCache
from moonwhale.native import bindings


class Placement:
    """Where Q new tokens of each of B sequences go: sequence i sits in slot `first + i` and has `start[i]` tokens."""

    def __init__(
        self, size: int, rotations: tuple[Tensor, Tensor], cache: LatentCache, first: int, start: list[int], length: int
    ):
        """`size` is a MoBA block's, `rotations` the cosines and sines (T, rope / 2) fp32 of all positions."""
        self.size, self.start, self.length, self.end = size, start, length, max(start) + length
        self.first, self.tokens, self.stride, self.device = first, len(start) * length, cache.length, cache.device
        self.full = (self.end - 1) // size  # blocks that are an earlier one for some token
        self.ends = self.tokens == 1  # whether nothing lies behind a token
        self.slots = slice(first, first + len(start))
        self.rotations, self._dtype = rotations, cache.dtype

    @cached_property
    def for_native(self) -> bindings.Span:
        self._start = torch.tensor(self.start)
        tensors = (self._start, *self.rotations)
        return bindings.Span(
            len(self.start), self.length, self.first, torch.get_num_threads(), *map(bindings.address, tensors)
        )

    @cached_property
    def positions(self) -> Tensor:
        """(B, Q) of the new tokens."""
        return torch.tensor([list(range(n, n + self.length)) for n in self.start], device=self.device)

    @cached_property
    def place(self) -> Tensor:
        """(B * Q) of each token among all slots' entries."""
        return (self.slot * self.stride + self.positions).flatten()

    @cached_property
    def rotation(self) -> tuple[Tensor, Tensor]:
        """Cosines and sines (B, Q, 1, rope / 2)."""
        return tuple(table[self.positions].unsqueeze(2).to(self._dtype) for table in self.rotations)

    @cached_property
    def future(self) -> Tensor | None:
        """(B, Q, 1, end) what lies behind a token; None where nothing does."""
        if self.ends:
            return None
        return (torch.arange(self.end, device=self.device) > self.positions[..., None])[:, :, None]

    @cached_property
    def slot(self) -> Tensor:
        """(B, 1) of each sequence."""
        return torch.arange(self.first, self.slots.stop, device=self.device)[:, None]

    @cached_property
    def own(self) -> Tensor:
        """(B, Q, 1, 1) a token's own MoBA block."""
        return (self.positions // self.size)[:, :, None, None]

    @cached_property
    def not_earlier(self) -> Tensor:
        """(B, Q, 1, full + 1) blocks that are no earlier ones of a token."""
        return torch.arange(self.full + 1, device=self.device) >= self.own

    @cached_property
    def behind(self) -> Tensor:
        """(B, Q, 1, 1, size) what of its own block lies behind a token."""
        return torch.arange(self.size, device=self.device) > (self.positions % self.size)[:, :, None, None, None]

    def average(self, keys: Tensor, means: Tensor) -> None:
        """Writes the mean entry of each block whose last token is among these, of a layer's keys and means."""
        for slot, start in enumerate(self.start, self.first):
            for block in range(start // self.size, (start + self.length) // self.size):
                entries = keys[slot, block * self.size : (block + 1) * self.size]
                means[slot, block] = entries.mean(0, dtype=torch.float32)
