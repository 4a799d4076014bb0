"""DeepSeekMoE (arXiv 2401.06066; V3 §2.1.2): many small routed experts, shared ones, and a router kept balanced."""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from .documents import unseen

STEP = 64  # rows by which an expert's share grows


class MLP(nn.Module):
    """A gated feed-forward network: a dense block's, or the shared experts'."""

    def __init__(self, config, intermediate_size: int):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, intermediate_size, bias=False)
        self.down_proj = nn.Linear(intermediate_size, config.hidden_size, bias=False)
        self.down_proj.starts_at_zero = True

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Routing(NamedTuple):
    """What the router decided for N tokens."""

    scores: Tensor  # (N, E) fp32 affinities, before the bias
    index: Tensor  # (N, K) experts chosen
    gates: Tensor  # (N, K) fp32 weights of their outputs


class Router(nn.Module):
    """Scores the experts, chooses K of them by score + bias, and weighs them by score alone.

    `e_score_correction_bias` is a buffer, not a parameter: it steers the choice, never the output, and has no gradient.
    """

    def __init__(self, config):
        super().__init__()
        self.n_experts, self.topk = config.n_routed_experts, config.num_experts_per_tok
        self.groups, self.topk_groups = config.n_group, config.topk_group
        self.normalise, self.factor = config.norm_topk_prob, config.routed_scaling_factor
        self.sigmoid = config.scoring_func == "sigmoid"
        self.weight = nn.Parameter(torch.empty(self.n_experts, config.hidden_size))
        # fp32 in any model, as the load below: bf16 knows neither a step of γ nor a count beyond 256.
        self.register_buffer("e_score_correction_bias", torch.zeros(self.n_experts, dtype=torch.float32))

    def forward(self, x: Tensor) -> Routing:
        """Routes (N, hidden), in fp32 whatever the precision around it."""
        with torch.autocast(x.device.type, enabled=False):
            logits = F.linear(x.float(), self.weight.float())
        scores = logits.sigmoid() if self.sigmoid else logits.softmax(-1)
        index = self.choose(scores + self.e_score_correction_bias)
        gates = scores.gather(1, index)
        if self.normalise:
            gates = gates / (gates.sum(-1, keepdim=True) + 1e-20)
        return Routing(scores, index, gates * self.factor)

    def choose(self, scores: Tensor) -> Tensor:
        """The K best of (N, E) scores, (N, K), from the groups whose two best experts score highest (V3 §2.1.2)."""
        if self.groups > 1:
            grouped = scores.view(-1, self.groups, self.n_experts // self.groups)
            best = grouped.topk(2, dim=-1).values.sum(-1).topk(self.topk_groups, dim=-1).indices
            shut = torch.ones(grouped.shape[:2], dtype=torch.bool, device=scores.device).scatter_(1, best, False)
            scores = grouped.masked_fill(shut.unsqueeze(-1), -torch.inf).flatten(1)
        return scores.topk(self.topk, dim=-1, sorted=False).indices


class Experts(nn.Module):
    """E gated feed-forward networks as two stacks of matrices; every token reaches all its K experts (dropless).

    `product`, where it is set, does their matrix products, as FP8's do: `product(rows (R, in), stack (E, out, in), ends
    (E,)) -> (R, out)`, differentiable, an expert's rows reaching from the end of the one before to its own, each a
    multiple of `step`.
    """

    product: Callable[[Tensor, Tensor, Tensor], Tensor] | None = None
    step = STEP

    def __init__(self, config):
        super().__init__()
        experts, hidden, inner = config.n_routed_experts, config.hidden_size, config.moe_intermediate_size
        self.gate_up_proj = nn.Parameter(torch.empty(experts, 2 * inner, hidden))
        self.down_proj = nn.Parameter(torch.empty(experts, hidden, inner))

    def forward(self, x: Tensor, index: Tensor, gates: Tensor) -> Tensor:
        """(N, hidden) through the experts `index` (N, K), weighted by `gates` (N, K)."""
        if self.product is None:
            return _GroupedExperts.apply(x, self.gate_up_proj, self.down_proj, index, gates)
        token, home, ends = _line_up(index, len(self.down_proj), self.step)
        rows = x.new_zeros(len(token), x.shape[1]).index_copy(0, home, x.repeat_interleave(index.shape[1], 0))
        gate, up = self.product(rows, self.gate_up_proj, ends).chunk(2, dim=-1)
        out = self.product(F.silu(gate) * up, self.down_proj, ends).index_select(0, home).view(*index.shape, -1)
        return (out * gates.unsqueeze(-1).to(x.dtype)).sum(1)


def _line_up(index: Tensor, n_experts: int, step: int = STEP) -> tuple[Tensor, Tensor, Tensor]:
    """Places the (token, expert) pairs of (N, K) choices in rows sorted by expert, each expert's padded to whole steps.

    Padding keeps the shapes of the products few: a kernel library compiles one for each (1.5 ms a piece for bf16 on a
    CPU), and the counts of tokens never repeat.

    Returns:
        the token of each row (R,), 0 in the padding; the row of each pair (N * K,); where each expert's rows end (E,).
    """
    expert, order = index.flatten().sort(stable=True)
    last = torch.searchsorted(expert, torch.arange(n_experts, device=index.device), right=True)
    sizes = last.diff(prepend=last.new_zeros(1))
    padded = -(-sizes // step) * step
    ends = padded.cumsum(0)
    shift = (ends - padded) - (last - sizes)
    row = torch.arange(len(order), device=index.device) + shift[expert]
    if unseen(index.device):  # as many rows as there can be, those left over the last expert's
        rows = -(-(len(order) + n_experts * (step - 1)) // step) * step
        ends = torch.cat([ends[:-1], ends.new_full((1,), rows)])
    else:
        rows = int(ends[-1])
    token = torch.zeros(rows, dtype=torch.long, device=index.device)
    token[row] = order // index.shape[1]
    return token, torch.empty_like(order).scatter_(0, order, row), ends.to(torch.int32)


def grouped_product(a: Tensor, b: Tensor, ends: Tensor) -> Tensor:
    """`F.grouped_mm`: rows a (R, in) through stacks b (E, in, out), (R, out); or, of a (M, R) and b (R, N), the product
    of each group's columns and rows (E, M, N). `ends` (E,) is where groups end.
    """
    in_graph = torch.compiler.is_compiling() and a.dtype != torch.bfloat16  # the only one that a graph takes
    return _grouped_product(a, b, ends) if in_graph else F.grouped_mm(a, b, offs=ends)


@torch.library.custom_op("moonwhale::grouped_product", mutates_args=())
def _grouped_product(a: Tensor, b: Tensor, ends: Tensor) -> Tensor:
    return F.grouped_mm(a, b, offs=ends)


@_grouped_product.register_fake
def _(a, b, ends):
    return a.new_empty(*([len(ends)] if b.ndim == 2 else []), len(a), b.shape[-1])


class _GroupedExperts(torch.autograd.Function):
    """Lines the tokens up by expert, does two grouped products, and brings the rows home.

    The gradient is written out because autograd's would add rows up through indexing, and keep more of them.
    """

    @staticmethod
    def forward(ctx, x, gate_up_proj, down_proj, index, gates):
        token, home, ends = _line_up(index, len(down_proj))
        weight = gates.new_zeros(len(token)).scatter_(0, home, gates.flatten()).to(x.dtype).unsqueeze(1)  # 0: padding
        gate_up_proj, down_proj = gate_up_proj.to(x.dtype), down_proj.to(x.dtype)
        rows = x.index_select(0, token)
        inner = grouped_product(rows, gate_up_proj.transpose(1, 2), ends)
        gate, up = (half.contiguous() for half in inner.chunk(2, dim=-1))  # where all that follows is twice as fast
        activated = F.silu(gate)
        out = grouped_product((activated * up).mul_(weight), down_proj.transpose(1, 2), ends)
        ctx.save_for_backward(rows, gate_up_proj, down_proj, gate, up, activated, weight, token, home, ends)
        ctx.gates_dtype, ctx.shape = gates.dtype, index.shape
        return F.embedding_bag(home.view(index.shape), out, mode="sum")  # a token's rows, added up in one pass

    @staticmethod
    @once_differentiable
    def backward(ctx, d_out):
        rows, gate_up_proj, down_proj, gate, up, activated, weight, token, home, ends = ctx.saved_tensors
        product = activated * up
        d_rows = d_out.index_select(0, token)
        d_down = grouped_product(d_rows.T, product * weight, ends)
        d_product = grouped_product(d_rows, down_proj, ends)
        d_gates = (d_product * product).sum(-1, dtype=ctx.gates_dtype).index_select(0, home).view(ctx.shape)
        d_product = d_product.mul_(weight)
        d_inner = torch.cat([torch.ops.aten.silu_backward(d_product * up, gate), d_product * activated], dim=-1)
        d_gate_up = grouped_product(d_inner.T, rows, ends)
        d_x = F.embedding_bag(home.view(ctx.shape), grouped_product(d_inner, gate_up_proj, ends), mode="sum")
        return d_x, d_gate_up, d_down, None, d_gates


class DeepseekMoE(nn.Module):
    """Shared experts for every token and routed ones for those that choose them.

    `load` (E,) collects how many tokens chose each expert since the last optimizer step; `update_bias_` acts on it.
    """

    def __init__(self, config):
        super().__init__()
        self.experts = Experts(config)
        self.gate = Router(config)
        self.shared_experts = (
            MLP(config, config.moe_intermediate_size * config.n_shared_experts) if config.n_shared_experts else None
        )
        self.balance, self.alpha = config.balance_loss, config.aux_loss_alpha
        self.device_groups, self.bias_speed = config.n_device_groups, config.bias_update_speed
        self.register_buffer("load", torch.zeros(config.n_routed_experts, dtype=torch.float32), persistent=False)

    def forward(self, x: Tensor, valid: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(B, T, hidden) to the same; only tokens of `valid` (B, T) count in the statistics.

        Returns:
            the output, the weighted balance loss (0-d), and how many tokens chose each expert (E,).
        """
        flat = x.flatten(0, 1)
        routing = self.gate(flat)
        out = self.experts(flat, routing.index, routing.gates).view_as(x)
        if self.shared_experts is not None:
            out = out + self.shared_experts(x)
        return out, self.balance_loss(routing, valid), self.count(routing.index, valid.flatten()).sum(0)

    def count(self, index: Tensor, valid: Tensor) -> Tensor:
        """(N, E) ones where a token that counts chose an expert, from (N, K) choices."""
        chosen = torch.zeros(len(index), self.gate.n_experts, device=index.device)
        return chosen.scatter_(1, index, valid[:, None].to(chosen.dtype).expand_as(index))

    def balance_loss(self, routing: Routing, valid: Tensor) -> Tensor:
        """α Σ f_i P_i in fp32, f_i an expert's share of the choices (1 when even) and P_i its mean score.

        "sequence": DeepSeek-V3 eq. 17-20, a sequence at a time, scores normalised over experts and choices made without
        the bias. "expert": DeepSeekMoE eq. 12-14, over the whole batch. "device": eq. 15-17, over groups of experts.
        """
        if self.balance == "none" or self.alpha == 0:
            return routing.scores.new_zeros(())
        scores, index = routing.scores, routing.index
        if self.balance == "sequence":
            scores = scores / (scores.sum(-1, keepdim=True) + 1e-20)
            index = self.gate.choose(routing.scores)
            rows = valid.shape
        else:
            rows = (1, valid.numel())
        n_experts, topk = self.gate.n_experts, self.gate.topk
        weight = valid.reshape(*rows, 1).to(scores.dtype)
        tokens = weight.sum(1).clamp(min=1)  # (rows, 1)
        f = self.count(index, valid.flatten()).view(*rows, n_experts).sum(1) * n_experts / (topk * tokens)
        p = (scores.view(*rows, n_experts) * weight).sum(1) / tokens
        if self.balance == "device":
            f = f.unflatten(1, (self.device_groups, -1)).mean(-1)
            p = p.unflatten(1, (self.device_groups, -1)).sum(-1)
        return self.alpha * (f * p).sum(1).mean()

    @torch.no_grad()
    def update_bias_(self) -> None:
        """Auxiliary-loss-free balancing (V3 §2.1.2): raises the bias of experts chosen too little, lowers that of the
        others.
        """
        self.gate.e_score_correction_bias += self.bias_speed * torch.sign(self.load.mean() - self.load)
