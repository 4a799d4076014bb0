"""MuonClip shared by ranks is MuonClip, bit for bit, and each rank orthogonalises its share of the matrices."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from conftest import TINY
from moonwhale.model import MoonwhaleConfig, MoonwhaleForCausalLM
from moonwhale.optim import muonclip
from moonwhale.optim.muonclip import MuonClip, param_groups
from moonwhale.pipeline.muon import SharedMuonClip, cost, equal_shares

STEPS, RANKS = 3, 2
CASES = {"fp32": torch.float32, "bf16": torch.bfloat16, "silent": torch.float32}  # the last one is a mutant


def descend(make_optimizer, dtype: torch.dtype) -> dict:
    """Some steps on drawn gradients: the weights and the optimizer's state afterwards, and what was orthogonalised."""
    torch.manual_seed(0)
    model = MoonwhaleForCausalLM(MoonwhaleConfig(**TINY, num_nextn_predict_layers=1))
    optimizer = make_optimizer(param_groups(model, lr=0.02), newton_schulz_dtype=dtype)
    iterate, done = muonclip.newton_schulz, []
    muonclip.newton_schulz = lambda stack, *args: done.extend(cost(m.shape) for m in stack) or iterate(stack, *args)
    for step in range(STEPS):
        generator = torch.Generator().manual_seed(step)
        for p in model.parameters():
            p.grad = torch.randn(p.shape, generator=generator)
        optimizer.step()
    muonclip.newton_schulz = iterate
    return {"weights": model.state_dict(), "state": optimizer.state_dict()["state"], "done": done}


def main(rank: int, folder: Path) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=RANKS)
    broadcast = dist.broadcast
    seen = {}
    for name, dtype in CASES.items():
        if name == "silent":  # each rank moves by its own share, and by nothing where others should have told it
            dist.broadcast = lambda part, group, group_src, **how: broadcast(
                part if group_src == rank else torch.empty_like(part), group=group, group_src=group_src, **how
            )
            torch.utils.deterministic.fill_uninitialized_memory = True
            torch.use_deterministic_algorithms(True)
        seen[name] = descend(lambda *args, **how: SharedMuonClip(*args, group=dist.group.WORLD, **how), dtype)
    torch.save(seen, folder / f"{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory) -> list[dict]:
    folder = tmp_path_factory.mktemp("muon")
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    command = [sys.executable, __file__]
    started = [subprocess.Popen([*command, str(rank), str(folder)], env=environment) for rank in range(RANKS)]
    try:
        assert [process.wait(120) for process in started] == [0] * RANKS
    finally:
        for process in started:
            process.kill()
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(RANKS)]


def is_ours(seen: dict, one: dict) -> bool:
    same = [torch.equal(seen["weights"][name], value) for name, value in one["weights"].items()]
    for i, state in one["state"].items():
        same += [torch.equal(seen["state"][i][name], value) for name, value in state.items()]
    return all(same) and seen["state"].keys() == one["state"].keys()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["fp32", "bf16"])
def test_weights_and_momenta_are_one_process_s_bit_for_bit(ranks, name):
    one = descend(MuonClip, CASES[name])
    assert all(is_ours(rank[name], one) for rank in ranks)
    assert sorted(done for rank in ranks for done in rank[name]["done"]) == sorted(one["done"])
    shares = [sum(rank[name]["done"]) for rank in ranks]
    largest = max(one["done"])
    assert max(shares) - min(shares) < 2 * STEPS * 2 * largest  # a matrix at each end of a share, in two groups
    assert max(shares) < 0.6 * sum(shares)


@pytest.mark.slow
def test_a_share_that_does_not_travel_is_seen(ranks):
    one = descend(MuonClip, CASES["silent"])
    assert not any(is_ours(rank["silent"], one) for rank in ranks)


@pytest.mark.parametrize("ranks", [1, 2, 3, 7, 64])
def test_shares_are_as_equal_as_matrices_allow(ranks):
    costs = [(7 * i) % 13 + 1 for i in range(40)]
    shares = equal_shares(costs, ranks)
    assert [i for share in shares for i in range(40)[share]] == list(range(40)) and len(shares) == ranks
    assert all(abs(sum(costs[share]) - sum(costs) / ranks) <= max(costs) for share in shares)


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
