"""Calls into the compiled steps, and the structures that describe tensors to them.

A structure holds the addresses of tensors. Its maker keeps these tensors alive.
"""

import ctypes
from collections.abc import Sequence

import torch
from torch import Tensor

from moonwhale.native import build
from moonwhale.native.structures import BlockStruct, CacheStruct, MatrixStruct, NetworkStruct, PlacementStruct

DTYPE_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.int8: 2}  # as `Dtype` in structures.h
PANEL_WIDTH = 64  # outputs of a panel


def supports(weight: Tensor) -> bool:
    """Return whether compiled steps are available here for such weights."""
    return weight.device.type == "cpu" and weight.dtype in DTYPE_CODES and not build.unavailable_reason()


def address(thing: Tensor | ctypes.Array | None) -> int | None:
    """Return the address of the first number. The caller keeps `thing` alive."""
    if thing is None:
        return None
    return thing.data_ptr() if isinstance(thing, Tensor) else ctypes.addressof(thing)


def panels(weight: Tensor) -> Tensor:
    """Rearrange a weight (out, in) into panels (ceil(out / 64), in, 64), padded with zeros.

    The weights of 64 outputs for one input are adjacent, so that a product reads one stream and adds whole vectors.
    """
    padded = torch.cat([weight, weight.new_zeros(-len(weight) % PANEL_WIDTH, weight.shape[1])])
    return padded.unflatten(0, (-1, PANEL_WIDTH)).transpose(1, 2).contiguous()


def panel_matrix(panels: Tensor, out: int, scale: Tensor | None = None, bias: Tensor | None = None) -> MatrixStruct:
    """Describe a weight (out, in) in panels. scale and bias (out) are fp32."""
    code = DTYPE_CODES[panels.dtype]
    return MatrixStruct(address(panels), address(scale), address(bias), out, panels.shape[1], code)


def plain_matrix(weight: Tensor) -> MatrixStruct:
    """Describe a weight (out, in) as it is, for the steps that do not read panels."""
    return MatrixStruct(address(weight), None, None, *weight.shape, DTYPE_CODES[weight.dtype])


def networks(pairs: Sequence[tuple[MatrixStruct, MatrixStruct]]) -> ctypes.Array:
    """Make an array of gated networks from the two matrices of each."""
    return (NetworkStruct * len(pairs))(*(NetworkStruct(*pair) for pair in pairs))


def placement(first_slot: int, start: Tensor, length: int, rotations: tuple[Tensor, Tensor]) -> PlacementStruct:
    """Describe where new tokens go: `length` tokens of each row, from position start (B) int64 on."""
    cos, sin = rotations
    threads = torch.get_num_threads()
    return PlacementStruct(len(start), length, first_slot, threads, address(start), address(cos), address(sin))


def product(matrix: MatrixStruct, x: Tensor) -> Tensor:
    """Return x (N, in) @ matrix.T in fp32."""
    x, out = x.float().contiguous(), torch.empty(len(x), matrix.out)
    build.library().run_product(ctypes.byref(matrix), out.data_ptr(), x.data_ptr(), len(x), torch.get_num_threads())
    return out


def run_block(
    block: BlockStruct, keys: Tensor, values: Tensor, means: Tensor | None, placement: PlacementStruct, x: Tensor
) -> None:
    """Run a block on x (tokens, hidden) fp32 in place. `keys`, `values` and `means` are its tensors of the cache."""
    cache = CacheStruct(address(keys), address(values), address(means), keys.shape[1], DTYPE_CODES[keys.dtype])
    build.library().run_block(ctypes.byref(block), ctypes.byref(cache), ctypes.byref(placement), x.data_ptr())
