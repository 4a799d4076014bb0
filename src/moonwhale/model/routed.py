"""Routed experts: tokens lined up by expert, two grouped products, and the sum of each token's rows."""

from itertools import pairwise
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from .documents import needs_static_shapes
from .gated import gated_rows, gated_rows_backward
from .groups import line_up
from .kernels import compiled_for_experts

# Each expert's rows are padded to a multiple, so that shapes of products are few. native/step/routed.h takes as many at
# a time, so its BLOCK_ROWS must divide this.
EXPERT_ROW_MULTIPLE = 64


class ExpertRows(NamedTuple):
    """The rows of all (token, expert) pairs, lined up by expert."""

    token: Tensor  # (R,) of each row, 0 for padding rows
    row: Tensor  # (N, K) of each pair
    ends: Tensor  # (E,) int32, where the rows of each expert end
    weight: Tensor  # (R,) fp32, of the expert's output for this token; 0 for padding rows


def line_up_by_expert(index: Tensor, n_experts: int, multiple: int) -> tuple[Tensor, Tensor, Tensor]:
    """Sort the (token, expert) pairs of `index` (N, K) into rows by expert, and pad each expert's rows to a multiple.

    Padding keeps the shapes of the products few. For bf16 on a CPU a kernel library compiles a kernel for each shape
    (1.5 ms each), and token counts hardly ever repeat.

    Returns:
        the token of each row (R,), 0 for padding rows; the row of each pair (N * K,); the end of each expert's rows
        (E,), int32. With static shapes, spare rows go to the last expert.
    """
    static_shapes = needs_static_shapes(index.device)
    pair, row_of_pair, ends = line_up(index.flatten(), n_experts, multiple, static_shapes)
    if static_shapes:
        ends[-1] = len(pair)
    token = (pair // index.shape[1]).clamp(min=0)
    return token, row_of_pair, ends.to(torch.int32)


def grouped_product(a: Tensor, b: Tensor, ends: Tensor) -> Tensor:
    """Multiply groups of rows by a matrix each, with `F.grouped_mm`. `ends` (E,) is where the groups end.

    Returns:
        (R, out) for rows a (R, in) and a stack b (E, in, out); or, for a (M, R) and b (R, N), each group's own product
        (E, M, N).
    """
    # In a graph F.grouped_mm supports bf16 only, and fp64 nowhere. A custom operator hides these from the compiler.
    needs_custom_op = a.dtype == torch.float64 or (torch.compiler.is_compiling() and a.dtype != torch.bfloat16)
    return _grouped_product(a, b, ends) if needs_custom_op else F.grouped_mm(a, b, offs=ends)


@torch.library.custom_op("moonwhale::grouped_product", mutates_args=())
def _grouped_product(a: Tensor, b: Tensor, ends: Tensor) -> Tensor:
    if a.dtype != torch.float64:
        return F.grouped_mm(a, b, offs=ends)
    groups = list(pairwise([0, *ends.tolist()]))
    if b.ndim == 2:
        return torch.stack([a[:, i:j] @ b[i:j] for i, j in groups])
    out = a.new_zeros(len(a), b.shape[-1])
    for matrix, (i, j) in zip(b, groups, strict=True):
        out[i:j] = a[i:j] @ matrix
    return out


@_grouped_product.register_fake
def _(a, b, ends):
    return a.new_empty(*([len(ends)] if b.ndim == 2 else []), len(a), b.shape[-1])


class RoutedExperts(torch.autograd.Function):
    """Sends x (N, hidden) through each token's experts `index` (N, K), weighting their outputs by `gates` (N, K).

    On a CPU with bf16 products, each block of rows passes both products of its expert while it is in the caches
    (native/step/routed.h); otherwise this is PyTorch. The gradient is written out because autograd's would add rows up
    through indexing, and would save more of them.
    """

    @staticmethod
    def forward(ctx, x, gate_up_proj, down_proj, index, gates):
        token, row_of_pair, ends = line_up_by_expert(index, len(down_proj), EXPERT_ROW_MULTIPLE)
        weight = gates.new_zeros(len(token)).scatter_(0, row_of_pair, gates.flatten())
        rows = ExpertRows(token, row_of_pair.view(index.shape), ends, weight)
        weights = gate_up_proj.to(x.dtype), down_proj.to(x.dtype)
        if compiled := compiled_for_experts(x, gate_up_proj, down_proj):
            out, *kept = compiled.routed(x, *weights, rows)
        else:
            out, *kept = _forward(x, *weights, rows)
        ctx.save_for_backward(x, *weights, *rows, *kept)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, d_out):
        x, gate_up_proj, down_proj, *saved = ctx.saved_tensors
        rows, kept = ExpertRows(*saved[:4]), saved[4:]
        compiled = compiled_for_experts(x, gate_up_proj, down_proj)
        backward = compiled.routed_backward if compiled and len(kept) == 1 else _backward
        d_x, d_gate_up, d_down, d_weight = backward(d_out, x, gate_up_proj, down_proj, rows, *kept)
        return d_x, d_gate_up, d_down, None, d_weight[rows.row]


def _forward(x: Tensor, gate_up_proj: Tensor, down_proj: Tensor, rows: ExpertRows) -> tuple[Tensor, ...]:
    """Return the experts' weighted outputs (N, hidden), and what `_backward` needs of the activation."""
    inner = grouped_product(x.index_select(0, rows.token), gate_up_proj.transpose(1, 2), rows.ends)  # (R, 2 * inner)
    product, kept = gated_rows(inner, rows.weight)
    out = grouped_product(product, down_proj.transpose(1, 2), rows.ends)  # (R, hidden)
    return F.embedding_bag(rows.row, out, mode="sum"), *kept  # summed in one pass


def _backward(
    d_out: Tensor, x: Tensor, gate_up_proj: Tensor, down_proj: Tensor, rows: ExpertRows, *kept: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of x, of both stacks of weights, and of the rows' weights."""
    d_rows = d_out.index_select(0, rows.token)
    d_product = grouped_product(d_rows, down_proj, rows.ends)
    d_inner, d_weight, product = gated_rows_backward(d_product, rows.weight, kept)
    d_down = grouped_product(d_rows.T, product, rows.ends)
    d_gate_up = grouped_product(d_inner.T, x.index_select(0, rows.token), rows.ends)
    d_x = F.embedding_bag(rows.row, grouped_product(d_inner, gate_up_proj, rows.ends), mode="sum")
    return d_x, d_gate_up, d_down, d_weight
