"""Matrix products with weights that never change again, in the model's own bits or in 8."""

import torch
import torch.nn.functional as F
from torch import Tensor

from moonwhale.infer import native

FEW = 64  # rows up to which the compiled product is the faster


class Linear:
    """`x -> x @ weight.T + bias` for x (…, in) and weight (out, in), in the weight's dtype.

    With `int8`, a row of the weight is whole numbers from -127 to 127 and a scale. For few rows on a CPU the product is
    native, which reads memory as fast as it goes.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None = None, int8: bool = False):
        self.dtype, self.weight, self.scale = weight.dtype, weight.contiguous(), None
        self.bias = None if bias is None else bias.float()
        if int8:
            self.scale = weight.float().abs().amax(1).clamp_(min=1e-12) / 127
            self.weight = (weight.float() / self.scale[:, None]).round_().to(torch.int8)
        self.matrix = native.Matrix.of(self.weight, self.scale, self.bias) if native.serves(weight) else None

    def __call__(self, x: Tensor) -> Tensor:
        rows = x.flatten(0, -2)
        if self.matrix and len(rows) <= FEW:
            return native.product(self.matrix, rows).to(self.dtype).unflatten(0, x.shape[:-1])
        if self.scale is not None:
            out = F.linear(rows, self.weight.to(self.dtype)).mul_(self.scale)
            return (out if self.bias is None else out.add_(self.bias)).unflatten(0, x.shape[:-1])
        return F.linear(x, self.weight, None if self.bias is None else self.bias.to(self.dtype))
