"""Steps on a CUDA GPU as graphs: a step's hundreds of kernels started at once, where Python takes longer to start them
one by one than the GPU to run them.

A graph is recorded for a number of rows, of new tokens in each, and a bound on the tokens that they look back on.
Which tokens these are, their positions, and where their entries go, it reads from buffers that are filled before it
runs: of all that, nothing may be known to Python while it is recorded, and nothing read back.
"""

from collections import Counter
from collections.abc import Callable
from functools import cached_property

import torch
from torch import Tensor

from moonwhale.infer.cache import LatentCache
from moonwhale.infer.feed_forward import FEW
from moonwhale.infer.placement import Placement

BOUND = 256  # tokens of the smallest bound; the others are its doubles
WORTH = 32  # steps of the same size before one is recorded, which takes about as long as they


class Graphs:
    """What has been recorded for one cache as it is: steps of sequences from the first slot on, of at most `longest`
    new tokens each.

    The number of rows is rounded up. Rows that are none write their entries at the end of a slot, which the scheduler
    leaves free. Only as many tokens as go through all experts: where these are chosen, somebody has to wait.
    """

    def __init__(self, longest: int):
        self.longest = longest
        self._forget([])

    def serve(self, placement: Placement) -> bool:
        tokens = _rounded(len(placement.start)) * placement.length
        return placement.first == 0 and placement.length <= min(self.longest, placement.size) and tokens <= FEW

    def __call__(
        self, function: Callable[..., Tensor], tensors: tuple[Tensor, ...], cache: LatentCache, placement: Placement
    ):
        """Returns `function(*tensors, cache, placement)`; the result stays valid until the next call.

        `tensors` are (B, Q, …).
        """
        if self._keys is not cache.keys:  # another cache, or one that has been resized
            self._forget(cache.keys)
        rows = min(_rounded(len(placement.start)), cache.slots)
        end = min(-(-_bound(placement.end) // placement.size) * placement.size, cache.length)
        size = function, rows, placement.length, end
        self._asked[size] += 1
        if self._asked[size] <= WORTH:
            return function(*tensors, cache, placement)
        if size not in self._recorded:
            self._recorded[size] = _Step(function, tensors, cache, placement, rows, end, self._pool)
            self._pool = self._recorded[size].pool
        return self._recorded[size](tensors, placement)

    def _forget(self, keys: list[Tensor]) -> None:
        self._keys, self._asked, self._pool = keys, Counter(), None
        self._recorded: dict[tuple, _Step] = {}


class _Step:
    """One function recorded for spans of certain sizes."""

    def __init__(
        self, function, tensors: tuple[Tensor, ...], cache: LatentCache, placement: Placement, rows: int, end: int, pool
    ):
        self.inputs = [tensor.new_zeros(rows, *tensor.shape[1:]) for tensor in tensors]
        self.slot = torch.arange(rows)[:, None]
        self.ahead, self.stride = torch.arange(placement.length), cache.length
        self.where = torch.zeros(
            2, rows, placement.length, dtype=torch.long, device=cache.device
        )  # positions and places
        self._fill(tensors, placement)
        self.replay, self.out, self.pool = record(
            lambda: function(*self.inputs, cache, _AnyPlacement(placement, cache, end, *self.where)), pool
        )

    def __call__(self, tensors: tuple[Tensor, ...], placement: Placement) -> Tensor:
        self._fill(tensors, placement)
        self.replay()
        return self.out[: len(placement.start)]

    def _fill(self, tensors: tuple[Tensor, ...], placement: Placement) -> None:
        rows = len(placement.start)
        for buffer, tensor in zip(self.inputs, tensors, strict=True):
            buffer[:rows] = tensor
        start = torch.zeros_like(self.slot)
        start[:rows, 0] = torch.tensor(placement.start)
        positions = start + self.ahead
        written = positions.clone()
        written[rows:] = self.stride - placement.length + self.ahead
        self.where.copy_(torch.stack([positions, self.slot * self.stride + written]))


class _AnyPlacement(Placement):
    """All spans of the same sizes: where the tokens are is in buffers, positions and places (B, Q) each."""

    def __init__(self, like: Placement, cache: LatentCache, end: int, positions: Tensor, places: Tensor):
        rows, length = positions.shape
        super().__init__(like.size, like.rotations, cache, 0, [end - length] * rows, length)
        self.positions, self.place, self.ends = positions, places.flatten(), False

    @cached_property
    def last_full(self) -> Tensor:
        """(B) the last block, among all slots', that a sequence has filled: its first one as long as there is none.

        These tokens have filled no other, as they are no more than a block holds.
        """
        slot = self.slot[:, 0]
        tokens = self.place.view(len(slot), -1)[:, -1] - slot * self.stride + 1
        return slot * (self.stride // self.size) + (tokens // self.size - 1).clamp(min=0)

    def average(self, keys: Tensor, means: Tensor) -> None:
        entries = keys.view(-1, self.size, keys.shape[-1]).index_select(0, self.last_full)
        means.flatten(0, 1).index_copy_(0, self.last_full, entries.mean(1, dtype=torch.float32))


def record(function: Callable[[], Tensor], pool=None) -> tuple[Callable[[], None], Tensor, object]:
    """What runs the function again, the tensor into which its result then comes, and the memory for what lies between,
    which others share that don't run at the same time.
    """
    aside = torch.cuda.Stream()
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):  # libraries set themselves up at their first call, which can't be recorded
        function()
    torch.cuda.current_stream().wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool):
        out = function()
    return graph.replay, out, graph.pool()


def _rounded(rows: int) -> int:
    """Powers of two, from 8 on multiples of 8."""
    return -(-rows // 8) * 8 if rows > 8 else 1 << (rows - 1).bit_length()


def _bound(tokens: int) -> int:
    return max(BOUND, 1 << (tokens - 1).bit_length())
