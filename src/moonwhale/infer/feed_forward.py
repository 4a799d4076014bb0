"""The feed-forward half of a decoder block: a dense network, or routed and shared experts."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from moonwhale.model.moe import MLP, DeepseekMoE
from moonwhale.model.thresholds import MAX_TOKENS_FOR_ALL_EXPERTS
from moonwhale.native.packed_linear import PackedLinear

Pack = Callable[..., PackedLinear]  # makes a product of a weight (out, in) and perhaps a bias


class GatedNetwork:
    """A gated feed-forward network of two products. The first computes gate and value together."""

    def __init__(self, up: PackedLinear, down: PackedLinear):
        self.up, self.down = up, down

    @classmethod
    def of(cls, network: MLP, pack: Pack) -> "GatedNetwork":
        up = torch.cat([network.gate_proj.weight, network.up_proj.weight])  # (2 * inner, hidden)
        return cls(pack(up), pack(network.down_proj.weight))

    def __call__(self, x: Tensor) -> Tensor:
        gate, value = self.up(x).chunk(2, dim=-1)
        return self.down(F.silu(gate) * value)

    def native_fields(self) -> dict:
        """The values of `FeedForwardFields` in native/step/structures.h."""
        return {"networks": [(self.up, self.down)]}


class ExpertLayer:
    """Routed experts, each for the tokens that chose it, and the shared experts as one network for all tokens.

    On a GPU a few tokens run through all experts. The weights are read anyway, and choosing would need a device sync.
    """

    def __init__(self, moe: DeepseekMoE, pack: Pack):
        self.gate, self.n_experts = moe.gate, moe.gate.n_experts
        self.shared = None if moe.shared_experts is None else GatedNetwork.of(moe.shared_experts, pack)
        self.stacks = moe.experts if moe.gate.weight.device.type != "cpu" else None
        if not self.stacks:
            weights = zip(moe.experts.gate_up_proj, moe.experts.down_proj, strict=True)
            self.networks = [GatedNetwork(pack(up), pack(down)) for up, down in weights]

    def __call__(self, x: Tensor) -> Tensor:
        rows = x.flatten(0, -2)  # (N, hidden)
        _, index, gates = self.gate(rows)  # (N, K)
        if not self.stacks:
            out = self._chosen_experts(rows, index, gates)
        elif len(rows) <= MAX_TOKENS_FOR_ALL_EXPERTS:
            out = self._all_experts(rows, index, gates)
        else:
            out = self.stacks(rows, index, gates)
        if self.shared:
            out = out + self.shared(rows)
        return out.view_as(x)

    def _chosen_experts(self, rows: Tensor, index: Tensor, gates: Tensor) -> Tensor:
        """Sort rows (N, hidden) by expert, run each expert on its own, and add the results up."""
        expert, order = index.flatten().sort()  # (N * K)
        token, weight = order // index.shape[1], gates.flatten()[order].to(rows.dtype).unsqueeze(1)
        pieces = rows[token].split(torch.bincount(expert, minlength=self.n_experts).tolist())
        done = torch.cat([run(piece) for run, piece in zip(self.networks, pieces, strict=True) if len(piece)])
        return torch.zeros_like(rows).index_add_(0, token, done * weight)

    def _all_experts(self, rows: Tensor, index: Tensor, gates: Tensor) -> Tensor:
        """Run all experts as one wide network, in which experts that were not chosen have weight 0."""
        weight = gates.new_zeros(len(rows), self.n_experts).scatter_(1, index, gates)  # (N, E)
        inner = F.linear(rows, self.stacks.gate_up_proj.flatten(0, 1)).unflatten(1, (self.n_experts, -1))
        gate, value = inner.chunk(2, dim=-1)
        activated = F.silu(gate) * value * weight.unsqueeze(2).to(rows.dtype)  # (N, E, inner)
        return (activated.transpose(0, 1) @ self.stacks.down_proj.transpose(1, 2)).sum(0)

    def native_fields(self) -> dict:
        """The values of `FeedForwardFields` in native/step/structures.h."""
        networks = [*self.networks, self.shared] if self.shared else self.networks
        return {
            "experts": self.n_experts,
            "chosen": self.gate.topk,
            "groups": self.gate.groups,
            "chosen_groups": self.gate.topk_groups,
            "sigmoid": self.gate.sigmoid,
            "normalise": self.gate.normalise,
            "shared": self.shared is not None,
            "factor": self.gate.factor,
            "router": PackedLinear(self.gate.weight.float()),
            "bias": self.gate.e_score_correction_bias,
            "networks": [(network.up, network.down) for network in networks],
        }
