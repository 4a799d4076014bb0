"""DeepSeekMoE (arXiv 2401.06066; V3 §2.1.2): many small routed experts, shared experts, and a balanced router."""

from collections.abc import Callable
from itertools import pairwise
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from .configuration_moonwhale import MoonwhaleConfig
from .documents import needs_static_shapes
from .gated import gated, gated_rows, gated_rows_backward
from .groups import line_up
from .step_statistics import Statistics, collects

EXPERT_ROW_MULTIPLE = 64  # each expert's rows are padded to a multiple, so that shapes of products are few


class MLP(nn.Module):
    """The gated feed-forward network (SwiGLU) of a dense block, or of the shared experts together."""

    def __init__(self, config, intermediate_size: int):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, intermediate_size, bias=False)
        self.down_proj = nn.Linear(intermediate_size, config.hidden_size, bias=False)
        self.down_proj.starts_at_zero = config.zero_init_residual

    def forward(self, x: Tensor) -> Tensor:
        """Map (…, hidden) to the same shape."""
        return self.down_proj(gated(self.gate_proj(x), self.up_proj(x)))


class Routing(NamedTuple):
    """The router's decision for N tokens."""

    scores: Tensor  # (N, E) affinities in fp32, without the bias
    index: Tensor  # (N, K) chosen experts
    gates: Tensor  # (N, K) weights of their outputs in fp32


class Router(Statistics):
    """Scores the experts, chooses K of them by score + bias, and weights their outputs by score alone.

    `e_score_correction_bias` is a buffer, not a parameter. It steers only the choice and has no gradient.
    """

    def __init__(self, config):
        super().__init__()
        self.n_experts, self.topk = config.n_routed_experts, config.num_experts_per_tok
        self.groups, self.topk_groups = config.n_group, config.topk_group
        self.normalise, self.factor = config.norm_topk_prob, config.routed_scaling_factor
        self.sigmoid = config.scoring_func == "sigmoid"
        self.weight = nn.Parameter(torch.empty(self.n_experts, config.hidden_size))
        self.register_buffer("e_score_correction_bias", torch.zeros(self.n_experts, dtype=torch.float32))

    def reset_parameters(self) -> None:
        """Draw the weights as `nn.Linear` does."""
        _draw_as_linear_(self.weight)

    def forward(self, x: Tensor) -> Routing:
        """Route tokens x (N, hidden). This is computed in fp32 whatever the precision around it."""
        with torch.autocast(x.device.type, enabled=False):
            logits = F.linear(x.float(), self.weight.float())  # (N, E)
        scores = logits.sigmoid() if self.sigmoid else logits.softmax(-1)
        index = self.choose(scores + self.e_score_correction_bias)
        gates = scores.gather(1, index)  # (N, K)
        if self.normalise:
            gates = gates / (gates.sum(-1, keepdim=True) + 1e-20)
        return Routing(scores, index, gates * self.factor)

    def choose(self, scores: Tensor) -> Tensor:
        """Return the K best experts (N, K) of `scores` (N, E).

        With groups of experts, only the groups whose two best experts score highest take part (V3 §2.1.2).
        """
        if self.groups > 1:
            grouped = scores.view(-1, self.groups, self.n_experts // self.groups)  # (N, groups, E / groups)
            group_scores = grouped.topk(2, dim=-1).values.sum(-1)
            best = group_scores.topk(self.topk_groups, dim=-1).indices
            closed = torch.ones(grouped.shape[:2], dtype=torch.bool, device=scores.device).scatter_(1, best, False)
            scores = grouped.masked_fill(closed.unsqueeze(-1), -torch.inf).flatten(1)  # (N, E)
        return scores.topk(self.topk, dim=-1, sorted=False).indices


class Experts(nn.Module):
    """E gated feed-forward networks, stored as two stacks of matrices. No token is dropped: each reaches its K experts.

    Set `product` to replace the matrix products, as FP8 training does. It is a differentiable function
    `product(rows (R, in), stack (E, out, in), ends (E,)) -> (R, out)`. The rows of expert e end before `ends[e]`, where
    those of expert e + 1 begin, and each end is a multiple of `row_multiple`.
    """

    product: Callable[[Tensor, Tensor, Tensor], Tensor] | None = None
    row_multiple = EXPERT_ROW_MULTIPLE

    def __init__(self, config):
        super().__init__()
        experts, hidden, inner = config.n_routed_experts, config.hidden_size, config.moe_intermediate_size
        self.gate_up_proj = nn.Parameter(torch.empty(experts, 2 * inner, hidden))
        self.down_proj = nn.Parameter(torch.empty(experts, hidden, inner))
        self.starts_at_zero = config.zero_init_residual  # down_proj does

    def reset_parameters(self) -> None:
        """Draw the weights as `nn.Linear` does, each expert being linear layers of its own."""
        _draw_as_linear_(self.gate_up_proj)
        _draw_as_linear_(self.down_proj)

    def forward(self, x: Tensor, index: Tensor, gates: Tensor) -> Tensor:
        """Send x (N, hidden) through each token's experts `index` (N, K), weighting their outputs by `gates` (N, K)."""
        if self.product is None:
            return _GroupedExperts.apply(x, self.gate_up_proj, self.down_proj, index, gates)
        token, row_of_pair, ends = line_up_by_expert(index, len(self.down_proj), self.row_multiple)
        pairs = x.repeat_interleave(index.shape[1], 0)  # (N * K, hidden)
        rows = x.new_zeros(len(token), x.shape[1]).index_copy(0, row_of_pair, pairs)  # (R, hidden)
        gate, up = self.product(rows, self.gate_up_proj, ends).chunk(2, dim=-1)
        out = self.product(F.silu(gate) * up, self.down_proj, ends)
        out = out.index_select(0, row_of_pair).view(*index.shape, -1)  # (N, K, hidden)
        return (out * gates.unsqueeze(-1).to(x.dtype)).sum(1, dtype=x.dtype)  # CUDA's autocast would return fp32


def _draw_as_linear_(weight: Tensor) -> None:
    bound = weight.shape[-1] ** -0.5
    nn.init.uniform_(weight, -bound, bound)


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


class _GroupedExperts(torch.autograd.Function):
    """Lines tokens up by expert, computes two grouped products, and sums each token's rows.

    The gradient is written out because autograd's would add rows up through indexing, and would save more of them.
    """

    @staticmethod
    def forward(ctx, x, gate_up_proj, down_proj, index, gates):
        token, row_of_pair, ends = line_up_by_expert(index, len(down_proj), EXPERT_ROW_MULTIPLE)
        weight = gates.new_zeros(len(token)).scatter_(0, row_of_pair, gates.flatten())  # 0 for padding rows
        gate_up_proj, down_proj = gate_up_proj.to(x.dtype), down_proj.to(x.dtype)
        rows = x.index_select(0, token)  # (R, hidden)
        inner = grouped_product(rows, gate_up_proj.transpose(1, 2), ends)  # (R, 2 * inner)
        product, kept = gated_rows(inner, weight)
        out = grouped_product(product, down_proj.transpose(1, 2), ends)  # (R, hidden)
        ctx.save_for_backward(rows, gate_up_proj, down_proj, weight, token, row_of_pair, ends, *kept)
        ctx.shape = index.shape
        return F.embedding_bag(row_of_pair.view(index.shape), out, mode="sum")  # (N, hidden), summed in one pass

    @staticmethod
    @once_differentiable
    def backward(ctx, d_out):
        rows, gate_up_proj, down_proj, weight, token, row_of_pair, ends, *kept = ctx.saved_tensors
        d_rows = d_out.index_select(0, token)
        d_product = grouped_product(d_rows, down_proj, ends)
        d_inner, d_weight, product = gated_rows_backward(d_product, weight, kept)
        d_gates = d_weight.index_select(0, row_of_pair).view(ctx.shape)
        d_down = grouped_product(d_rows.T, product, ends)
        d_gate_up = grouped_product(d_inner.T, rows, ends)
        d_rows = grouped_product(d_inner, gate_up_proj, ends)
        d_x = F.embedding_bag(row_of_pair.view(ctx.shape), d_rows, mode="sum")
        return d_x, d_gate_up, d_down, None, d_gates


class DeepseekMoE(Statistics):
    """Shared experts for every token, and K routed experts per token.

    It can be a part of any module: `config` is a MoonwhaleConfig, or has its fields about experts, and x alone is
    enough for `forward`. Its weights start as `nn.Linear`'s do; with `initialise=False` the caller sets those of the
    router and the routed experts.

    The buffer `load` (E,) counts the tokens that chose each expert since the last optimizer step, for `update_bias_`.
    """

    load: Tensor

    def __init__(self, config: MoonwhaleConfig, initialise: bool = True):
        super().__init__()
        self.experts = Experts(config)
        self.gate = Router(config)
        if initialise:
            self.gate.reset_parameters()
            self.experts.reset_parameters()
        self.shared_experts = (
            MLP(config, config.moe_intermediate_size * config.n_shared_experts) if config.n_shared_experts else None
        )
        self.balance, self.alpha = config.balance_loss, config.aux_loss_alpha
        self.device_groups, self.bias_speed = config.n_device_groups, config.bias_update_speed
        self.register_buffer("load", torch.zeros(config.n_routed_experts, dtype=torch.float32), persistent=False)

    def forward(
        self, x: Tensor, valid: Tensor | None = None, collect_statistics: bool | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Apply the experts to x (B, T, hidden).

        Args:
            valid: (B, T), which tokens count in the loss and the load. None: all.
            collect_statistics: whether the pass counts in the buffer `load`. None: if gradients are enabled.

        Returns:
            the output (B, T, hidden), the weighted balance loss (0-d), and how many tokens chose each expert (E,).
        """
        if valid is None:
            valid = torch.ones(x.shape[:2], dtype=torch.bool, device=x.device)
        flat = x.flatten(0, 1)  # (B * T, hidden)
        routing = self.gate(flat)
        out = self.experts(flat, routing.index, routing.gates).view_as(x)
        if self.shared_experts is not None:
            out = out + self.shared_experts(x)
        load = self.count(routing.index, valid.flatten()).sum(0)
        if collects(collect_statistics):
            self.load += load
        return out, self.balance_loss(routing, valid), load

    def count(self, index: Tensor, valid: Tensor) -> Tensor:
        """Return ones where a valid token chose an expert, (N, E), from the choices `index` (N, K) and `valid` (N,)."""
        chosen = torch.zeros(len(index), self.gate.n_experts, device=index.device)
        return chosen.scatter_(1, index, valid[:, None].to(chosen.dtype).expand_as(index))

    def balance_loss(self, routing: Routing, valid: Tensor) -> Tensor:
        """Return α Σ_i f_i P_i in fp32, with f_i the share of choices that expert i got (1 when even) and P_i its mean
        score.

        "sequence" is DeepSeek-V3 eq. 17-20: each sequence by itself, scores normalised over experts, choices made
        without the bias and, as in eq. 18, among all experts even if the router has groups. "expert" is DeepSeekMoE
        eq. 12-14, over the whole batch. "device" is its eq. 15-17, over groups of experts.
        """
        if self.balance == "none" or self.alpha == 0:
            return routing.scores.new_zeros(())
        scores, index = routing.scores, routing.index
        if self.balance == "sequence":
            scores = scores / (scores.sum(-1, keepdim=True) + 1e-20)
            index = routing.scores.topk(self.gate.topk, sorted=False).indices
            rows = valid.shape
        else:
            rows = (1, valid.numel())
        n_experts, topk = self.gate.n_experts, self.gate.topk
        weight = valid.reshape(*rows, 1).to(scores.dtype)
        tokens = weight.sum(1).clamp(min=1)  # (sequences, 1)
        f = self.count(index, valid.flatten()).view(*rows, n_experts).sum(1) * n_experts / (topk * tokens)
        p = (scores.view(*rows, n_experts) * weight).sum(1) / tokens  # (sequences, E), as f
        if self.balance == "device":
            f = f.unflatten(1, (self.device_groups, -1)).mean(-1)
            p = p.unflatten(1, (self.device_groups, -1)).sum(-1)
        return self.alpha * (f * p).sum(1).mean()

    @torch.no_grad()
    def update_bias_(self) -> None:
        """Balance without an auxiliary loss (V3 §2.1.2): raise the bias of experts with less than the mean load, and
        lower that of experts with more. Nothing happens if the router is frozen.
        """
        if not self.gate.weight.requires_grad:
            return
        self.gate.e_score_correction_bias += self.bias_speed * torch.sign(self.load.mean() - self.load)
