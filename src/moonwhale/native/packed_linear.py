"""Matrix products with weights that never change again, in the model's own bits or in 8."""

import torch
import torch.nn.functional as F
from torch import Tensor

from moonwhale.native import bindings

FEW = 64  # rows up to which the compiled product is the faster


class Linear:
    """`x -> x @ weight.T + bias` for x (…, in) and weight (out, in), in the weight's dtype.

    With `int8`, a row of the weight is whole numbers from -127 to 127 and a scale. Where steps are compiled, the weight
    is kept in panels only: for few rows the product is native, which reads memory as fast as it goes.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None = None, int8: bool = False):
        self.dtype, self.out, self.scale = weight.dtype, len(weight), None
        self.bias = None if bias is None else bias.float()
        compiled = bindings.serves(weight)
        if int8:
            self.scale = weight.float().abs().amax(1).clamp_(min=1e-12) / 127
            weight = (weight.float() / self.scale[:, None]).round_().to(torch.int8)
        self.weight = bindings.panels(weight) if compiled else weight.contiguous()
        self.matrix = bindings.Matrix.of(self.weight, self.out, self.scale, self.bias) if compiled else None

    def __call__(self, x: Tensor) -> Tensor:
        rows = x.flatten(0, -2)
        if self.matrix and len(rows) <= FEW:
            return bindings.product(self.matrix, rows).to(self.dtype).unflatten(0, x.shape[:-1])
        weight = self.weight.to(self.dtype)
        by_panel = rows @ weight if self.matrix else None  # (panels, N, 64)
        out = F.linear(rows, weight) if by_panel is None else by_panel.transpose(0, 1).flatten(1)[:, : self.out]
        if self.scale is not None:
            out = (out * self.scale).to(self.dtype)
        if self.bias is not None:
            out = out + self.bias.to(self.dtype)
        return out.unflatten(0, x.shape[:-1])
