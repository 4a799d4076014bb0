"""`NativeBlock`: a block of the decoder as the compiled steps run it."""

import ctypes
from collections.abc import Mapping

import torch
from torch import Tensor

from moonwhale.native import build
from moonwhale.native.packed_linear import PackedLinear
from moonwhale.native.structures import (
    DTYPE_CODES,
    INTEGER,
    POINTER,
    REAL,
    AttentionStruct,
    BlockStruct,
    CacheStruct,
    FeedForwardStruct,
    MatrixStruct,
    NetworkStruct,
    NormStruct,
    PlacementStruct,
    address,
)


class NativeBlock:
    """Runs a block in C++ on the decoder's own weights, with a residual stream in fp32.

    `attention` and `feed_forward` map the names of the fields in `step/structures.h` to their values: numbers, tensors,
    `PackedLinear`s, norms (objects with `weight` and `eps`) or None. `networks` is a list of (up, down) pairs. `before`
    and `after` are the norms before the attention and before the feed-forward half.
    """

    def __init__(self, before, attention: Mapping, after, feed_forward: Mapping):
        self._kept: list = []  # the tensors whose addresses the structure holds
        dense = dict.fromkeys(name for name, _ in FeedForwardStruct._fields_)  # a dense network has no routing fields
        self._block = BlockStruct(
            hidden=len(before.weight),
            before=self._value(NormStruct, before),
            after=self._value(NormStruct, after),
            attention=self._fill(AttentionStruct, attention),
            feed_forward=self._fill(FeedForwardStruct, dense | dict(feed_forward)),
        )
        w = self._block.attention
        width = w.rank + w.rope
        self._sizes = self._block.hidden, w.rank, width, w.rank if w.taps else width, w.block_size  # for `_check`

    def __call__(self, x: Tensor, entries: tuple, placement: PlacementStruct, added: Tensor | None = None) -> Tensor:
        """Run the block on x (B, Q, hidden) of any dtype, which may be overwritten. The result is fp32.

        `entries` are the block's keys, values and means in the cache. `added` (B, Q, rank) is added to the new tokens'
        latents.

        Raises:
            MemoryError: there is no memory for intermediate values.
            IndexError: the placement lies outside the cache.
            ValueError: shapes or fields contradict each other.
        """
        x = x.float().contiguous()
        added = None if added is None else added.float().contiguous()
        keys, values, means = entries
        self._check(x, keys, values, means, placement, added)
        dtype = DTYPE_CODES.get(keys.dtype, -1)  # which the step refuses
        blocks = 0 if means is None else means.shape[1]
        cache = CacheStruct(address(keys), address(values), address(means), *keys.shape[:2], blocks, dtype)
        structures = map(ctypes.byref, (self._block, cache, placement))
        match build.library("step").run_block(*structures, x.data_ptr(), address(added)):
            case 1:
                raise MemoryError(f"no memory for a decoding step of {len(x)} sequences")
            case 2:
                raise IndexError(f"a decoding step lies outside the cache of {tuple(keys.shape[:2])} slots and tokens")
            case 3:
                raise ValueError("the fields of a compiled block contradict each other")
        return x

    def _check(
        self,
        x: Tensor,
        keys: Tensor,
        values: Tensor,
        means: Tensor | None,
        placement: PlacementStruct,
        added: Tensor | None,
    ) -> None:
        """Raise ValueError if tensors are not what the compiled step, which sees only addresses, takes them to be."""
        hidden, rank, width, values_width, block_size = self._sizes
        slots, length = keys.shape[:2]
        good = x.shape == (placement.rows, placement.length, hidden)
        good &= added is None or added.shape == (*x.shape[:2], rank)
        good &= keys.shape == (slots, length, width) and keys.is_contiguous()
        if values is not keys or values_width != width:
            good &= values.shape == (slots, length, values_width) and values.is_contiguous()
            good &= values.dtype is keys.dtype
        if means is not None:
            good &= means.shape == (slots, length // block_size, width) and means.is_contiguous()
            good &= means.dtype is torch.float32
        if not good:
            raise ValueError("the tensors of a decoding step do not fit the compiled block")

    def _fill(self, structure: type, values: Mapping):
        """Fill each field with the value of its name. Raises KeyError if a value is missing."""
        return structure(
            **{
                name: self._value(field_type, values[name])
                for name, field_type in structure._fields_
                if values[name] is not None
            }
        )

    def _value(self, field_type: type, value):
        """Convert a value to a field's type, and keep alive what the field points to."""
        if field_type is INTEGER:
            return int(value)
        if field_type is REAL:
            return float(value)
        if field_type is NormStruct:
            return NormStruct(self._fp32(value.weight), value.eps)
        if field_type is MatrixStruct:
            if isinstance(value, PackedLinear):
                self._kept.append(value)
                return value.matrix
            value = value.contiguous()
            self._kept.append(value)
            return MatrixStruct(address(value), None, None, *value.shape, DTYPE_CODES[value.dtype])  # not in panels
        assert field_type is POINTER, f"no way to fill a field of type {field_type}"
        return self._fp32(value) if isinstance(value, Tensor) else self._networks(value)

    def _fp32(self, tensor: Tensor) -> int:
        """Return the address of a copy in fp32."""
        self._kept.append(tensor.detach().to(torch.float32).contiguous())
        return address(self._kept[-1])

    def _networks(self, pairs: list[tuple[PackedLinear, PackedLinear]]) -> int:
        networks = (NetworkStruct * len(pairs))(*(NetworkStruct(up.matrix, down.matrix) for up, down in pairs))
        self._kept += [pairs, networks]
        return ctypes.addressof(networks)
