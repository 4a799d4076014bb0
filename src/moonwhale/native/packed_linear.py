"""`PackedLinear`: matrix products with weights that do not change, in the model's dtype or in 8 bits."""

import ctypes

import torch
import torch.nn.functional as F
from torch import Tensor

from moonwhale.native import build
from moonwhale.native.structures import DTYPE_CODES, MatrixStruct, address

PANEL_WIDTH = 64  # outputs of a panel
MAX_ROWS_FOR_NATIVE_PRODUCT = 64  # with more rows of one sequence PyTorch's product is faster


class PackedLinear:
    """Computes `x @ weight.T + bias` for x (..., in) and weight (out, in), in the weight's dtype.

    With `int8`, each row of the weight is stored as integers from -127 to 127 and a scale. Where compiled steps are
    available, the weight is stored in panels only. Products with few rows are then native, and as fast as memory.

    Whether a product is native depends on the rows of one sequence (Q in `(B, Q, in)`), never on the number B of
    sequences. In a native product a row's result does not depend on the other rows.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None = None, int8: bool = False):
        self.dtype, self.out, self.scale = weight.dtype, len(weight), None
        self.bias = None if bias is None else bias.float().contiguous()
        native = build.supports(weight)
        if int8:
            self.scale = weight.float().abs().amax(1).clamp_(min=1e-12) / 127
            weight = (weight.float() / self.scale[:, None]).round_().to(torch.int8)
        self.weight = panels(weight) if native else weight.contiguous()
        self.matrix = None
        if native:
            addresses = map(address, (self.weight, self.scale, self.bias))
            self.matrix = MatrixStruct(*addresses, *weight.shape, DTYPE_CODES[weight.dtype])

    def __call__(self, x: Tensor) -> Tensor:
        rows = x.flatten(0, -2)
        if self.matrix and x.shape[-2] <= MAX_ROWS_FOR_NATIVE_PRODUCT:
            return self._native_product(rows.float().contiguous()).to(self.dtype).unflatten(0, x.shape[:-1])
        weight = self.weight.to(self.dtype)
        if self.matrix:
            by_panel = rows @ weight  # (panels, N, 64)
            out = by_panel.transpose(0, 1).flatten(1)[:, : self.out]
        else:
            out = F.linear(rows, weight)
        if self.scale is not None:
            out = (out * self.scale).to(self.dtype)
        if self.bias is not None:
            out = out + self.bias.to(self.dtype)
        return out.unflatten(0, x.shape[:-1])

    def _native_product(self, x: Tensor) -> Tensor:
        if x.shape[1] != self.weight.shape[1]:
            raise ValueError(f"a product of x {tuple(x.shape)} and a weight of {self.weight.shape[1]} inputs")
        out, threads = torch.empty(len(x), self.out), torch.get_num_threads()
        if build.library("step").run_product(ctypes.byref(self.matrix), out.data_ptr(), x.data_ptr(), len(x), threads):
            raise ValueError(f"no product of {len(x)} rows on {threads} threads")
        return out


def panels(weight: Tensor) -> Tensor:
    """Rearrange a weight (out, in) into panels (ceil(out / 64), in, 64), padded with zeros.

    The weights of 64 outputs for one input are adjacent, so that a product reads one stream and adds whole vectors.
    """
    padded = torch.cat([weight, weight.new_zeros(-len(weight) % PANEL_WIDTH, weight.shape[1])])
    return padded.unflatten(0, (-1, PANEL_WIDTH)).transpose(1, 2).contiguous()
