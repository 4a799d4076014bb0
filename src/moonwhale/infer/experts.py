"""The feed-forward half of a block at inference: a dense network, or experts in the form that suits them."""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from moonwhale.model.moe import MLP, DeepseekMoE, Router

Product = Callable[[Tensor], Tensor]


def mlp(network: MLP, prepare) -> Product:
    """`prepare` makes a product of a weight, here and below."""
    up = prepare(torch.cat([network.gate_proj.weight, network.up_proj.weight]))
    return _gated(up, prepare(network.down_proj.weight))


def _gated(up: Product, down: Product) -> Product:
    """A gated network of its two products, the first of which gives gate and value side by side."""

    def run(x: Tensor) -> Tensor:
        gate, x = up(x).chunk(2, dim=-1)
        return down(F.silu(gate) * x)

    return run


def experts(moe: DeepseekMoE, prepare) -> Product:
    """The experts in the form that suits their number and the device."""
    if moe.experts.down_proj.device.type != "cpu":
        return _grouped(moe, prepare)
    return (_all_at_once if moe.gate.n_experts <= 2 * moe.gate.topk else _one_by_one)(moe, prepare)


def _route_one(gate: Router) -> Callable[[Tensor], dict[int, float]] | None:
    """The router for a single token on a CPU, in plain numbers: a dozen of them are soon sorted, while `Router.forward`
    takes fourteen operations. It gives each chosen expert's gate; None for group-limited routing.
    """
    if gate.groups > 1 or gate.weight.device.type != "cpu":
        return None
    weight, bias = gate.weight.float(), gate.e_score_correction_bias.tolist()

    def run(x: Tensor) -> dict[int, float]:
        logits = F.linear(x.flatten().float(), weight).tolist()
        if gate.sigmoid:
            scores = [1 / (1 + math.exp(-min(max(logit, -80.0), 80.0))) for logit in logits]
        else:
            top = max(logits)
            powers = [math.exp(logit - top) for logit in logits]
            scores = [power / sum(powers) for power in powers]
        chosen = sorted(range(len(scores)), key=lambda e: -scores[e] - bias[e])[: gate.topk]
        total = sum(scores[e] for e in chosen) + 1e-20 if gate.normalise else 1.0
        return {e: scores[e] / total * gate.factor for e in chosen}

    return run


def _all_at_once(moe: DeepseekMoE, prepare) -> Product:
    """Every expert for every token, those not chosen at a gate of 0: where a token takes half of them or more, one
    large product beats many small ones. Shared experts are further ones at a gate of 1.
    """
    gate, up = moe.experts.gate_up_proj.chunk(2, dim=1)  # (E, inner, hidden) each
    inner, down = gate.shape[1], moe.experts.down_proj.transpose(1, 2).flatten(0, 1)  # (E * inner, hidden)
    parts = [gate.flatten(0, 1)], [up.flatten(0, 1)], [down]
    shared = 0
    if moe.shared_experts is not None:
        network = moe.shared_experts
        shared = len(network.gate_proj.weight) // inner
        weights = network.gate_proj.weight, network.up_proj.weight, network.down_proj.weight.T
        for part, weight in zip(parts, weights, strict=True):
            part.append(weight)
    gate_up, down = prepare(torch.cat([*parts[0], *parts[1]])), prepare(torch.cat(parts[2]).T.contiguous())
    router, route_one, n_experts = moe.gate, _route_one(moe.gate), moe.gate.n_experts

    def gates(x: Tensor) -> Tensor:
        """(N, E + shared) for N rows."""
        if len(x) == 1 and route_one:
            chosen = route_one(x)
            return torch.tensor([[chosen.get(e, 0.0) for e in range(n_experts)] + [1.0] * shared], dtype=x.dtype)
        routing = router(x)
        weight = x.new_zeros(len(x), n_experts + shared)
        weight[:, n_experts:] = 1.0
        return weight.scatter_(1, routing.index, routing.gates.to(x.dtype))

    def run(x: Tensor) -> Tensor:
        gate, up = gate_up(x).chunk(2, dim=-1)
        activated = (F.silu(gate) * up).unflatten(-1, (-1, inner))
        return down((activated * gates(x.flatten(0, -2)).view(*x.shape[:-1], -1, 1)).flatten(-2))

    return run


def _one_by_one(moe: DeepseekMoE, prepare) -> Product:
    """Each chosen expert for its own tokens."""
    weights = zip(moe.experts.gate_up_proj, moe.experts.down_proj, strict=True)
    networks = [_gated(prepare(up), prepare(down)) for up, down in weights]
    shared = None if moe.shared_experts is None else mlp(moe.shared_experts, prepare)
    router, route_one = moe.gate, _route_one(moe.gate)

    def run(x: Tensor) -> Tensor:
        rows = x.flatten(0, -2)
        out = torch.zeros_like(rows) if shared is None else shared(rows)
        if len(rows) == 1 and route_one:
            for e, gate in route_one(rows).items():
                out = out.add(networks[e](rows), alpha=gate)
            return out.view_as(x)
        index, gates = router(rows)[1:]
        chosen, order = index.flatten().sort()
        token, weight = order // index.shape[1], gates.flatten()[order].to(x.dtype).unsqueeze(1)
        pieces = rows[token].split(torch.bincount(chosen, minlength=len(networks)).tolist())
        done = torch.cat([run_one(piece) for run_one, piece in zip(networks, pieces, strict=True) if len(piece)])
        return out.index_add_(0, token, done * weight).view_as(x)

    return run


def _grouped(moe: DeepseekMoE, prepare) -> Product:
    """The model's own grouped products, which suit a GPU."""
    shared = None if moe.shared_experts is None else mlp(moe.shared_experts, prepare)

    def run(x: Tensor) -> Tensor:
        rows = x.flatten(0, -2)
        routing = moe.gate(rows)
        out = moe.experts(rows, routing.index, routing.gates)
        return (out if shared is None else out + shared(rows)).view_as(x)

    return run
