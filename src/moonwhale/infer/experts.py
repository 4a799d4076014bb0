"""The feed-forward half of a block at inference: a dense network, or experts."""

import torch
import torch.nn.functional as F
from torch import Tensor

from moonwhale.infer.linear import Linear
from moonwhale.model.moe import MLP, DeepseekMoE


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
    """Each chosen expert for its own tokens, and the shared ones, as one network, for all."""

    def __init__(self, moe: DeepseekMoE, prepare):
        self.gate = moe.gate
        weights = zip(moe.experts.gate_up_proj, moe.experts.down_proj, strict=True)
        self.networks = [Network(prepare(up), prepare(down)) for up, down in weights]
        self.shared = None if moe.shared_experts is None else Network.of(moe.shared_experts, prepare)
        # On a GPU the model's own grouped products suit better.
        self.grouped = moe.experts if moe.gate.weight.device.type != "cpu" else None

    def __call__(self, x: Tensor) -> Tensor:
        rows = x.flatten(0, -2)
        _, index, gates = self.gate(rows)
        out = torch.zeros_like(rows) if self.shared is None else self.shared(rows)
        if self.grouped:
            return (out + self.grouped(rows, index, gates)).view_as(x)
        chosen, order = index.flatten().sort()
        token, weight = order // index.shape[1], gates.flatten()[order].to(x.dtype).unsqueeze(1)
        pieces = rows[token].split(torch.bincount(chosen, minlength=len(self.networks)).tolist())
        done = torch.cat([run(piece) for run, piece in zip(self.networks, pieces, strict=True) if len(piece)])
        return out.index_add_(0, token, done * weight).view_as(x)
