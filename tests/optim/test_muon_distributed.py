"""DistributedMuonClip equals MuonClip bit for bit, for replicas of the weights and for shards of them.

Each rank orthogonalises its share of the matrices.
"""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from conftest import TINY
from forked import ForkedProcess, finish
from moonwhale.model import MoonwhaleConfig, MoonwhaleForCausalLM
from moonwhale.optim import muonclip
from moonwhale.optim.muon_distributed import DistributedMuonClip, equal_shares, newton_schulz_cost
from moonwhale.optim.muonclip import MuonClip, param_groups
from moonwhale.parallel.fsdp import full_tensor

STEPS, RANKS = 3, 2
CASES = {"fp32": torch.float32, "bf16": torch.bfloat16, "parts": torch.float32, "parts, bf16": torch.bfloat16}
MUTANTS = ("silent", "rows")


def descend(make_optimizer, dtype: torch.dtype, distribute=lambda tensor: tensor) -> dict:
    """Take a few steps on random gradients. Return weights, state, and the cost of each orthogonalised matrix."""
    torch.manual_seed(0)
    model = MoonwhaleForCausalLM(MoonwhaleConfig(**TINY, num_nextn_predict_layers=1))
    groups = param_groups(model, lr=0.02)
    for group in groups:
        group["params"] = [nn.Parameter(distribute(torch.randn_like(p))) for p in group["params"]]
    params = [p for group in groups for p in group["params"]]
    optimizer = make_optimizer(groups, newton_schulz_dtype=dtype)
    iterate, done = muonclip.newton_schulz, []
    muonclip.newton_schulz = lambda stack, *args: (
        done.extend(newton_schulz_cost(m.shape) for m in stack) or iterate(stack, *args)
    )
    for step in range(STEPS):
        generator = torch.Generator().manual_seed(step)
        for p in params:
            p.grad = distribute(torch.randn(p.shape, generator=generator))
        optimizer.step()
    muonclip.newton_schulz = iterate
    states = [{name: full_tensor(value) for name, value in optimizer.state[p].items()} for p in params]
    return {"weights": [full_tensor(p.detach()) for p in params], "states": states, "done": done}


def orthogonalise_own_rows(optimizer, updates, split, dtype) -> list[DTensor]:
    """A mutant of `_orthogonalise_shards`: each rank orthogonalises its own rows instead of whole matrices."""
    directions = MuonClip._orthogonalise(optimizer, [update.to_local() for update in updates], split, dtype)
    return [
        DTensor.from_local(direction, u.device_mesh, u.placements, shape=u.shape, stride=u.stride())
        for direction, u in zip(directions, updates, strict=True)
    ]


def main(rank: int, folder: Path) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=RANKS)
    mesh = init_device_mesh("cpu", (RANKS,))

    def shared(dtype: torch.dtype, parts: bool) -> dict:
        def distribute(tensor):
            return distribute_tensor(tensor, mesh, [Shard(0)]) if parts else tensor

        return descend(
            lambda *args, **how: DistributedMuonClip(*args, group=dist.group.WORLD, **how), dtype, distribute
        )

    seen = {name: shared(dtype, "parts" in name) for name, dtype in CASES.items()}
    DistributedMuonClip._orthogonalise_shards = orthogonalise_own_rows
    seen["rows"] = shared(torch.float32, True)
    broadcast = dist.broadcast
    dist.broadcast = lambda part, group, group_src, **how: broadcast(  # a mutant: zeros replace what other ranks send
        part if group_src == rank else torch.zeros_like(part), group=group, group_src=group_src, **how
    )
    seen["silent"] = shared(torch.float32, False)
    torch.save(seen, folder / f"{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory) -> list[dict]:
    folder = tmp_path_factory.mktemp("muon")
    finish([ForkedProcess(folder / f"{rank}.out", {}, main, rank, folder) for rank in range(RANKS)], 120)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(RANKS)]


def differences(seen: dict, one: dict, parts: bool) -> list[str]:
    """Return the names of weights and states whose bits differ.

    With `parts` (sharded weights), AdamW's last bit may differ. A CPU rounds the last elements of a tensor differently
    if they do not fill a vector register, and a shard ends at other elements than the whole tensor.
    """

    def same(a, b, adamw: bool) -> bool:
        return torch.allclose(a, b, rtol=1e-6, atol=0) if adamw and parts else torch.equal(a, b)

    found = []
    for i, (ours, theirs) in enumerate(zip(seen["states"], one["states"], strict=True)):
        pairs = {name: (ours[name], theirs[name]) for name in theirs}
        pairs["weight"] = seen["weights"][i], one["weights"][i]
        adamw = "exp_avg" in theirs
        found += [f"{i} {name}: {(a - b).abs().max()}" for name, (a, b) in pairs.items() if not same(a, b, adamw)]
    return found


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_weights_and_momenta_equal_one_process_bit_for_bit(ranks, name):
    one = descend(MuonClip, CASES[name])
    assert [differences(rank[name], one, "parts" in name) for rank in ranks] == [[], []]
    assert sorted(done for rank in ranks for done in rank[name]["done"]) == sorted(one["done"])
    shares = [sum(rank[name]["done"]) for rank in ranks]
    largest = max(one["done"])
    # Each end of a share may be off by one matrix, in each of the two groups.
    assert max(shares) - min(shares) < 2 * STEPS * 2 * largest
    assert max(shares) < 0.6 * sum(shares)


@pytest.mark.slow
@pytest.mark.parametrize("name", MUTANTS)
def test_a_wrong_exchange_is_detected(ranks, name):
    """Weights differ if ranks do not exchange their shares, or if they orthogonalise a shard as if it were a matrix."""
    one = descend(MuonClip, torch.float32)
    assert all(differences(rank[name], one, name == "rows") for rank in ranks)


@pytest.mark.parametrize("ranks", [1, 2, 3, 7, 64])
def test_shares_are_balanced_to_within_one_matrix(ranks):
    costs = [(7 * i) % 13 + 1 for i in range(40)]
    shares = equal_shares(costs, ranks)
    assert [i for share in shares for i in range(40)[share]] == list(range(40)) and len(shares) == ranks
    assert all(abs(sum(costs[share]) - sum(costs) / ranks) <= max(costs) for share in shares)


def test_a_process_alone_takes_parts_for_its_caches(monkeypatch):
    monkeypatch.setattr(muonclip, "CACHED_NUMBERS", 16)
    weights = [torch.ones(4, 4), torch.ones(4, 4)]
    assert len(list(DistributedMuonClip(weights)._parts(weights, weights))) > 1
