"""The feed-forward half of a block at inference: a dense network, or experts."""

import torch
import torch.nn.functional as F
from torch import Tensor

from moonwhale.model.moe import MLP, DeepseekMoE
from moonwhale.native.packed_linear import Linear

FEW = 256  # tokens up to which reading all experts takes a GPU longer than computing them


class Network:
    """A gated feed-forward network of its two products, the first of which gives gate and value side by side."""

    def __init__(self, up: Linear, down: Linear):
        self.up, self.down = up, down

    @classmethod
    def of(cls, network: MLP, prepare) -> "Network":
        """`prepare` makes a product of a weight, here and below."""
        up = torch.cat([network.gate_proj.weight, network.up_proj.weight])
        return cls(prepare(up), prepare(network.down_proj.weight))

    def __call__(self, x: Tensor) -> Tensor:
        gate, x = self.up(x).chunk(2, dim=-1)
        return self.down(F.silu(gate) * x)


class Experts:
    """Each chosen expert for its own tokens, and the shared ones, as one network, for all.

    On a GPU few tokens go through all experts: their matrices are read anyway, and nobody waits to hear which.
    """

    def __init__(self, moe: DeepseekMoE, prepare):
        self.gate, self.n_experts = moe.gate, moe.gate.n_experts
        self.shared = None if moe.shared_experts is None else Network.of(moe.shared_experts, prepare)
        self.stacks = moe.experts if moe.gate.weight.device.type != "cpu" else None
        if not self.stacks:
            weights = zip(moe.experts.gate_up_proj, moe.experts.down_proj, strict=True)
            self.networks = [Network(prepare(up), prepare(down)) for up, down in weights]

    def __call__(self, x: Tensor) -> Tensor:
        rows = x.flatten(0, -2)
        _, index, gates = self.gate(rows)
        if not self.stacks:
            out = self._own_tokens(rows, index, gates)
        elif len(rows) <= FEW:
            out = self._all_tokens(rows, index, gates)
        else:
            out = self.stacks(rows, index, gates)
        if self.shared:
            out = out + self.shared(rows)
        return out.view_as(x)

    def _own_tokens(self, rows: Tensor, index: Tensor, gates: Tensor) -> Tensor:
        chosen, order = index.flatten().sort()
        token, weight = order // index.shape[1], gates.flatten()[order].to(rows.dtype).unsqueeze(1)
        pieces = rows[token].split(torch.bincount(chosen, minlength=self.n_experts).tolist())
        done = torch.cat([run(piece) for run, piece in zip(self.networks, pieces, strict=True) if len(piece)])
        return torch.zeros_like(rows).index_add_(0, token, done * weight)

    def _all_tokens(self, rows: Tensor, index: Tensor, gates: Tensor) -> Tensor:
        """As a network of all experts side by side, in which what was not chosen weighs nothing."""
        weight = gates.new_zeros(len(rows), self.n_experts).scatter_(1, index, gates)
        inner = F.linear(rows, self.stacks.gate_up_proj.flatten(0, 1)).unflatten(1, (self.n_experts, -1))
        gate, up = inner.chunk(2, dim=-1)
        activated = F.silu(gate) * up * weight.unsqueeze(2).to(rows.dtype)
        return (activated.transpose(0, 1) @ self.stacks.down_proj.transpose(1, 2)).sum(0)
