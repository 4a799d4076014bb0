"""DeepSeekMoE (arXiv 2401.06066; V3 §2.1.2): many small routed experts, shared experts, and a balanced router."""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .compiled_routing import Route, SequenceBalance
from .configuration_moonwhale import MoonwhaleConfig
from .gated import gated
from .kernels import compiled_for
from .routed import EXPERT_ROW_MULTIPLE, RoutedExperts, line_up_by_expert
from .step_statistics import Statistics, collects


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
        if self.groups == 1 and compiled_for(x) and compiled_for(self.weight):
            how = self.topk, self.sigmoid, self.normalise, self.factor
            return Routing(*Route.apply(x, self.weight, self.e_score_correction_bias, *how))
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
            return RoutedExperts.apply(x, self.gate_up_proj, self.down_proj, index, gates)
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
        score. Scores are normalised over experts, so that even routing costs α and pulls at no score.

        "sequence" is DeepSeek-V3 eq. 17-20: each sequence by itself, choices made without the bias and, as in eq. 18,
        among all experts even if the router has groups. "expert" is DeepSeekMoE eq. 12-14, over the whole batch.
        "device" is its eq. 15-17, over groups of experts. Its scores are a softmax, which is normalised already.
        """
        if self.balance == "none" or self.alpha == 0:
            return routing.scores.new_zeros(())
        if self.balance == "sequence" and compiled_for(routing.scores):
            f, p = SequenceBalance.apply(routing.scores, valid, self.gate.topk)
            return self.alpha * (f * p).sum(1).mean()
        scores = routing.scores / (routing.scores.sum(-1, keepdim=True) + 1e-20)
        index, rows = routing.index, (1, valid.numel())
        if self.balance == "sequence":
            index, rows = routing.scores.topk(self.gate.topk, sorted=False).indices, valid.shape
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
