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

    def __call__(self, x: Tensor, entries: tuple, placement: PlacementStruct) -> Tensor:
        """Run the block on x (B, Q, hidden) of any dtype, which may be overwritten. The result is fp32.

        `entries` are the block's keys, values and means in the cache.

        Raises:
            MemoryError: there is no memory for intermediate values.
            IndexError: the placement lies outside the cache.
        """
        x = x.float().contiguous()
        keys, values, means = entries
        cache = CacheStruct(address(keys), address(values), address(means), *keys.shape[:2], DTYPE_CODES[keys.dtype])
        structures = map(ctypes.byref, (self._block, cache, placement))
        match build.library().run_block(*structures, x.data_ptr()):
            case 1:
                raise MemoryError(f"no memory for a decoding step of {len(x)} sequences")
            case 2:
                raise IndexError(f"a decoding step lies outside the cache of {tuple(keys.shape[:2])} slots and tokens")
        return x

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
            self._kept.append(value)
            if isinstance(value, PackedLinear):
                return value.matrix
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
