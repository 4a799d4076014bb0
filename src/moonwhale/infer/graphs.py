"""Decoding steps as CUDA graphs, which start a step's hundreds of kernels at once.

Without them Python takes longer to launch the kernels one by one than the GPU takes to run them.

A graph is captured for a number of rows, a number of new tokens in each, and a bound on the context. Tokens, positions
and cache indices are read from buffers that are filled before each replay. So during capture no Python number may
depend on them, and nothing may be read back from the GPU.
"""

from collections import Counter
from collections.abc import Callable
from functools import cached_property

import torch
from torch import Tensor

from moonwhale.infer.cache import LatentCache
from moonwhale.infer.placement import Placement
from moonwhale.model.thresholds import CAPTURE_AFTER, MAX_TOKENS_FOR_ALL_EXPERTS

MIN_CONTEXT_BOUND = 256  # tokens; the other bounds are this number doubled


class Graphs:
    """The graphs captured for one cache at its current size. They serve sequences from the first slot on.

    The number of rows is rounded up. Padding rows write to the unused end of a slot, which the scheduler leaves free.
    Only batches small enough to run all experts are captured, because choosing experts would need a device sync.
    """

    def __init__(self, max_length: int):
        """`max_length` is the largest number of new tokens in a row."""
        self.max_length = max_length
        self._forget([])

    def serves(self, placement: Placement) -> bool:
        """Return whether a step at this placement can run as a graph."""
        tokens = _round_rows(len(placement.start)) * placement.length
        short = placement.length <= min(self.max_length, placement.block_size)
        return placement.first_slot == 0 and short and tokens <= MAX_TOKENS_FOR_ALL_EXPERTS

    def __call__(
        self,
        depth: int,
        function: Callable[..., Tensor],
        tensors: tuple[Tensor, ...],
        cache: LatentCache,
        placement: Placement,
    ) -> Tensor:
        """Return `function(*tensors, cache, placement)` for `tensors` (B, Q, ...). It is valid until the next call.

        depth: tells the function from others: 0 for the main blocks, k for MTP module k. (The functions themselves are
            not kept: they hold the decoder, which would then hold itself, and its GPU memory, for long.)
        """
        if self._keys is not cache.keys:  # the cache is another one, or has been resized
            self._forget(cache.keys)
        rows = min(_round_rows(len(placement.start)), cache.slots)
        size = placement.block_size
        end = min(-(-_context_bound(placement.end) // size) * size, cache.length)
        key = depth, rows, placement.length, end
        self._uses[key] += 1
        if self._uses[key] <= CAPTURE_AFTER:
            return function(*tensors, cache, placement)
        if key not in self._captured:
            self._captured[key] = CapturedStep(function, tensors, cache, placement, rows, end, self._pool)
            self._pool = self._captured[key].pool
        return self._captured[key](tensors, placement)

    def _forget(self, keys: list[Tensor]) -> None:
        self._keys, self._uses, self._pool = keys, Counter(), None
        self._captured: dict[tuple, CapturedStep] = {}


class CapturedStep:
    """One function, captured for placements of one size."""

    def __init__(
        self, function, tensors: tuple[Tensor, ...], cache: LatentCache, placement: Placement, rows: int, end: int, pool
    ):
        self.inputs = [tensor.new_zeros(rows, *tensor.shape[1:]) for tensor in tensors]
        self.slot = torch.arange(rows)[:, None]
        self.ahead, self.slot_length = torch.arange(placement.length), cache.length
        # positions and entry indices of the new tokens, (2, rows, Q)
        self.indices = torch.zeros(2, rows, placement.length, dtype=torch.long, device=cache.device)
        self._fill(tensors, placement)
        self.replay, self.out, self.pool = capture(
            lambda: function(*self.inputs, cache, BufferedPlacement(placement, cache, end, *self.indices)),
            cache.device,
            pool,
        )

    def __call__(self, tensors: tuple[Tensor, ...], placement: Placement) -> Tensor:
        self._fill(tensors, placement)
        self.replay()
        return self.out[: len(placement.start)]

    def _fill(self, tensors: tuple[Tensor, ...], placement: Placement) -> None:
        """Copy a step's tensors and indices into the buffers that the graph reads."""
        rows = len(placement.start)
        for buffer, tensor in zip(self.inputs, tensors, strict=True):
            buffer[:rows] = tensor
        start = torch.zeros_like(self.slot)
        start[:rows, 0] = torch.tensor(placement.start)
        positions = start + self.ahead
        written = positions.clone()
        written[rows:] = self.slot_length - placement.length + self.ahead  # padding rows: the end of their slots
        self.indices.copy_(torch.stack([positions, self.slot * self.slot_length + written]))


class BufferedPlacement(Placement):
    """A placement of fixed sizes whose positions and entry indices (B, Q) are read from buffers."""

    def __init__(self, like: Placement, cache: LatentCache, end: int, positions: Tensor, entry_index: Tensor):
        rows, length = positions.shape
        super().__init__(cache, like.rotations, 0, [end - length] * rows, length)
        self.positions, self.entry_index, self.needs_mask = positions, entry_index.flatten(), True

    @cached_property
    def last_full(self) -> Tensor:
        """The last block (B) that each sequence has filled, among all slots' blocks, or its first block before that.

        The new tokens are no more than a block holds, so they have filled no other block.
        """
        slot = self.slot_index[:, 0]
        tokens = self.entry_index.view(len(slot), -1)[:, -1] - slot * self.slot_length + 1
        return slot * (self.slot_length // self.block_size) + (tokens // self.block_size - 1).clamp(min=0)

    def write_means(self, keys: Tensor, means: Tensor) -> None:
        entries = keys.view(-1, self.block_size, keys.shape[-1]).index_select(0, self.last_full)
        means.flatten(0, 1).index_copy_(0, self.last_full, entries.mean(1, dtype=torch.float32))


def capture(
    function: Callable[[], Tensor], device: torch.device, pool=None
) -> tuple[Callable[[], None], Tensor, object]:
    """Capture a function that computes on a GPU as a CUDA graph.

    Returns:
        a function that replays the graph, the tensor that then holds the result, and the memory pool. Graphs that never
        run at the same time can share a pool.
    """
    with torch.cuda.device(device):  # streams are the current device's, and a graph of another's would stay empty
        memory, stream = pool or (None, torch.cuda.Stream())
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):  # libraries initialise at their first call, which cannot be captured
            function()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        # "thread_local": another thread that allocates GPU memory meanwhile does not break the capture
        with torch.cuda.graph(graph, pool=memory, stream=stream, capture_error_mode="thread_local"):
            out = function()
    return graph.replay, out, (graph.pool(), stream)


def _round_rows(rows: int) -> int:
    """Round up to a power of two, above 8 to a multiple of 8."""
    return -(-rows // 8) * 8 if rows > 8 else 1 << (rows - 1).bit_length()


def _context_bound(tokens: int) -> int:
    return max(MIN_CONTEXT_BOUND, 1 << (tokens - 1).bit_length())
