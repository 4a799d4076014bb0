"""Matrix products with weights that never change again: laid out once for the machine, in 16 or 8 bits if so wanted."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

LARGE = 1 << 18  # numbers of an fp32 weight from which oneDNN's product is the faster for a single row
FEW = 8  # rows up to which torch's 8-bit product beats widening the weights first


def linear(weight: Tensor, bias: Tensor | None = None, int8: bool = False) -> Callable[[Tensor], Tensor]:
    """`x -> x @ weight.T + bias` for x (…, in) and weight (out, in), in the weight's dtype.

    On a CPU a bf16 or large weight is laid out as oneDNN wants it: for one row that is twice as fast as `F.linear`, and
    reads memory as fast as it goes. With `int8`, a row of the weight is whole numbers from -127 to 127 and a scale.
    """
    if int8:
        return _int8(weight, bias)
    pays = weight.dtype is torch.bfloat16 or (weight.dtype is torch.float32 and weight.numel() >= LARGE)
    if weight.device.type == "cpu" and pays and _can_pack():
        packed = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous())

        def product(x: Tensor) -> Tensor:
            return torch.ops.mkldnn._linear_pointwise(x, packed, bias, "none", [], "")

        return product
    return lambda x: F.linear(x, weight, bias)


def _int8(weight: Tensor, bias: Tensor | None) -> Callable[[Tensor], Tensor]:
    scale = weight.float().abs().amax(1).clamp_(min=1e-12) / 127
    whole = (weight.float() / scale[:, None]).round_().to(torch.int8)
    scale = scale.to(weight.dtype)

    def product(x: Tensor) -> Tensor:
        rows = x.flatten(0, -2)
        if len(rows) <= FEW and x.dtype is torch.bfloat16 and whole.shape[1] % 32 == 0:  # else it reads beyond its end
            out = torch._weight_int8pack_mm(rows, whole, scale)
        else:
            out = F.linear(rows, whole.to(x.dtype)) * scale
        return (out if bias is None else out + bias).unflatten(0, x.shape[:-1])

    return product


def _can_pack() -> bool:
    """Whether this torch has oneDNN and its packed products, which are not part of its public interface."""
    ops = torch.ops.mkldnn
    return torch.backends.mkldnn.is_available() and all(
        hasattr(ops, name) for name in ("_reorder_linear_weight", "_linear_pointwise")
    )
