"""A model on several ranks computes what it computes on one: loss, every gradient, statistics and optimizer steps."""

import copy
import itertools
from collections.abc import Callable

import pytest
import torch
from torch.distributed.pipelining.schedules import (
    BACKWARD_INPUT,
    BACKWARD_WEIGHT,
    FORWARD,
    FULL_BACKWARD,
    RECV_B,
    RECV_F,
    SEND_B,
    SEND_F,
)

import pipeline_ranks
from conftest import TINY
from forked import ForkedProcess, finish
from moonwhale.costs import flops_per_token, forward_flops
from moonwhale.errors import UserError
from moonwhale.parallel.expert_parallel import AllToAll
from moonwhale.parallel.overlap import Overlap
from moonwhale.parallel.schedule_properties import SCHEDULES, stage_ranks
from moonwhale.parallel.schedules import DualPipeVOrder, dualpipe_order, splits_backward, stages_of_rank, with_messages
from moonwhale.parallel.stages import StageSpec, partition, prune_
from relative_error import relative_error

MODEL = {
    "num_hidden_layers": 5,
    "vocab_size": 53,
    "moba_block_size": 4,
    "moba_topk": 2,
    "moba_full_attention_layers": [1],
    "latent_embedding_every": 3,
    "num_nextn_predict_layers": 2,
    "mtp_num_blocks": [1, 2],
    "aux_loss_alpha": 0.05,
    "bias_update_speed": 0.02,
    "first_k_dense_replace": 1,
}


@pytest.fixture(scope="session")
def launch(tmp_path_factory):
    """`launch(cases, n_ranks)` runs all cases in `n_ranks` processes. It returns each rank's results by case name."""

    def launch(cases: dict, n_ranks: int) -> list[dict]:
        folder = tmp_path_factory.mktemp("ranks")
        torch.save(cases, folder / "cases.pt")
        ranks = range(n_ranks)
        finish([ForkedProcess(folder / f"{r}.out", {}, pipeline_ranks.main, r, n_ranks, folder) for r in ranks], 480)
        return [torch.load(folder / f"rank{rank}.pt", weights_only=True) for rank in ranks]

    return launch


@pytest.fixture(scope="session")
def case(tiny_config, draw):
    """`case(schedule, ...)` returns a model's configuration and weights, and the parallel layout to run it with."""

    def case(schedule, n_ranks=2, pp=None, ep=1, fsdp=False, steps=1, whole=False, mutant="", shut=0, **overrides):
        """`shut` is the number of experts, counted from the last, that the router must never choose."""
        from moonwhale.model import MoonwhaleForCausalLM

        config = TINY | MODEL | overrides
        weights = draw(MoonwhaleForCausalLM(tiny_config(**config))).state_dict()
        for name, value in weights.items():
            if shut and name.endswith("e_score_correction_bias"):
                value[-shut:] -= 100
        pp = pp or n_ranks
        # One or two more per pipeline than the schedule's minimum.
        micro_batches = n_ranks // pp * (2 * pp + (2 if SCHEDULES[schedule].bidirectional else 1))
        return {
            "config": config,
            "weights": weights,
            "schedule": schedule,
            "pp": pp,
            "ep": ep,
            "fsdp": fsdp,
            "steps": steps,
            "whole": whole,
            "mutant": mutant,
            "micro_batches": micro_batches,
            "rows": 2 * micro_batches,
            "length": 14,
        }

    return case


def largest_error(seen: list[list[dict]], expected: list[dict]) -> dict[str, float]:
    """Return the largest relative error over all ranks and steps for losses, grads, seen (statistics) and state."""
    errors = {}
    for ranks, one in zip(zip(*seen, strict=True), expected, strict=True):
        losses = {number: parts for rank in ranks for number, parts in rank["losses"].items()}
        assert losses.keys() == one["losses"].keys()
        a, b = (torch.tensor([seen[i] for i in sorted(seen)]) for seen in (losses, one["losses"]))
        apart = [relative_error(x, y, 1e-3) for x, y in zip(a.flatten(), b.flatten(), strict=True)]
        errors["losses"] = max(errors.get("losses", 0.0), *apart)
        for kind in ("grads", "seen", "state"):
            assert set().union(*(rank[kind] for rank in ranks)) == set(one[kind])
            for rank in ranks:
                for name, value in rank[kind].items():
                    expected = one[kind][name][slice(*rank["experts"].get(name, (None,)))]
                    errors[kind] = max(errors.get(kind, 0.0), relative_error(value, expected))
        assert sum(rank["clipped"] for rank in ranks) == one["clipped"]
    return errors


DEEP = {"num_hidden_layers": 8, "mtp_num_blocks": 1, "num_nextn_predict_layers": 1}  # for 8 stages
TIED = {"tie_word_embeddings": True, "embedding_conv": 2}
RESTING = {"mtp_loss_weight": 0.0}
CASES = {
    "dualpipev": {"schedule": "dualpipev"},
    "dualpipev, tied and convolved": {"schedule": "dualpipev", **TIED},
    "dualpipev, no MTP": {"schedule": "dualpipev", "num_nextn_predict_layers": 0, "mtp_num_blocks": 1},
    "dualpipev, whole backward": {"schedule": "dualpipev", "whole": True},
    "dualpipe": {"schedule": "dualpipe"},
    "dualpipe, tied and convolved": {"schedule": "dualpipe", **TIED},
    "zerobubble": {"schedule": "zerobubble"},
    "1f1b": {"schedule": "1f1b"},
    "1f1b, tied and convolved": {"schedule": "1f1b", **TIED},
    "1f1b, MTP rests": {"schedule": "1f1b", **RESTING},
    "fsdp": {"schedule": "1f1b", "pp": 1, "fsdp": True},
    "fsdp, tied and convolved": {"schedule": "1f1b", "pp": 1, "fsdp": True, **TIED},
    "fsdp of mirrored ranks": {"schedule": "dualpipe", "fsdp": True},
    "fsdp, six steps": {"schedule": "1f1b", "pp": 1, "fsdp": True, "steps": 6},
    "dualpipev, six steps": {"schedule": "dualpipev", "steps": 6},
    "dualpipe, six steps": {"schedule": "dualpipe", "steps": 6},
    "1f1b, six steps": {"schedule": "1f1b", "steps": 6, "tie_word_embeddings": True},
}
EXPERT_PARALLEL = {  # one stage on every rank; the experts are sharded
    "ep 2": {"schedule": "1f1b", "pp": 1, "ep": 2},
    "ep 2, tied and convolved": {"schedule": "1f1b", "pp": 1, "ep": 2, **TIED},
    "ep 2, a rank without tokens": {"schedule": "1f1b", "pp": 1, "ep": 2, "shut": 3},
    "ep 2, six steps": {"schedule": "1f1b", "pp": 1, "ep": 2, "steps": 6},
}
EXPERT_PARALLEL_ON_FOUR = {
    "ep 2, twice": {"schedule": "1f1b", "pp": 1, "ep": 2},
    "ep 2, twice, tied and convolved": {"schedule": "1f1b", "pp": 1, "ep": 2, **TIED},
    "dualpipev, ep 2": {"schedule": "dualpipev", "pp": 2, "ep": 2},
    "dualpipev, ep 2, tied and convolved": {"schedule": "dualpipev", "pp": 2, "ep": 2, **TIED},
    "dualpipe, ep 2": {"schedule": "dualpipe", "pp": 2, "ep": 2, "shut": 3},
    "zerobubble, ep 2": {"schedule": "zerobubble", "pp": 2, "ep": 2},
}
MUTANTS = {
    **(
        {"balance": {"schedule": "dualpipev", "mutant": "balance"}} if splits_backward() else {}
    ),  # older torch raises an error for this mutant
    "embedding": {"schedule": "1f1b", "mutant": "embedding"},
    "mean": {"schedule": "1f1b", "pp": 1, "fsdp": True, "mutant": "mean"},
}
LAYERS = {  # one expert layer without the rest of the model
    f"{precision}, {shut} experts shut": {"config": TINY, "precision": precision, "shut": shut}
    for precision in ("fp32", "bf16", "fp8")
    for shut in (0, 3)
}
WRONG_RETURN = {"ep 2, home": {"schedule": "1f1b", "pp": 1, "ep": 2, "mutant": "home"}}
MUTANTS_ON_FOUR = {"experts": {"schedule": "1f1b", "pp": 1, "ep": 2, "mutant": "experts"}}
ON_FOUR = {
    "dualpipev": {"schedule": "dualpipev", **DEEP},
    "dualpipev, tied and convolved": {"schedule": "dualpipev", **TIED, **DEEP},
    "dualpipe": {"schedule": "dualpipe", **DEEP},
    "dualpipe, tied and convolved": {"schedule": "dualpipe", **TIED, **DEEP},
    "1f1b, tied and convolved": {"schedule": "1f1b", **TIED, **DEEP},
    "two pipelines": {"schedule": "dualpipev", "pp": 2},
    "two pipelines, fsdp": {"schedule": "dualpipev", "pp": 2, "fsdp": True},
    "two pipelines, fsdp, tied and convolved": {"schedule": "1f1b", "pp": 2, "fsdp": True, **TIED},
    "two pipelines, fsdp, MTP rests": {"schedule": "1f1b", "pp": 2, "fsdp": True, **RESTING},
}


class Run:
    """The cases, each rank's results, and the results of one process, which are computed on demand."""

    def __init__(self, cases: dict, seen: list[dict]):
        self.cases, self.seen, self._one_process = cases, seen, {}

    def one_process(self, name: str) -> list[dict]:
        if name not in self._one_process:
            self._one_process[name] = pipeline_ranks.one_process(self.cases[name])
        return self._one_process[name]

    def errors(self, name: str) -> dict[str, float]:
        return largest_error([rank[name] for rank in self.seen], self.one_process(name))


@pytest.fixture(scope="module")
def two_ranks(launch, case):
    cases = {name: case(**options) for name, options in (CASES | EXPERT_PARALLEL | MUTANTS | WRONG_RETURN).items()}
    return Run(cases, launch(LAYERS | cases, 2))  # mutants last: they patch classes in place


@pytest.fixture(scope="module")
def four_ranks(launch, case):
    cases = {
        name: case(n_ranks=4, **options)
        for name, options in (ON_FOUR | EXPERT_PARALLEL_ON_FOUR | MUTANTS_ON_FOUR).items()
    }
    return Run(cases, launch(cases, 4))


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in CASES | EXPERT_PARALLEL if "steps" not in name])
def test_two_ranks_compute_what_one_process_computes(two_ranks, name):
    assert max(two_ranks.errors(name).values()) < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in CASES | EXPERT_PARALLEL if "steps" in name])
def test_six_steps_on_two_ranks_stay_close_to_one_process(two_ranks, name):
    errors = two_ranks.errors(name)
    assert max(errors["losses"], errors["state"], errors["seen"]) < 1e-5
    assert errors["grads"] < 1e-4  # rounding errors accumulate over six steps
    steps = two_ranks.one_process(name)
    assert all(step["clipped"] for step in steps), "QK-clip has work to do"
    biases = [name for name in steps[0]["state"] if name.endswith("e_score_correction_bias")]
    assert all((steps[-1]["state"][b] - steps[0]["state"][b]).abs().max() > 0.05 for b in biases)


@pytest.mark.slow
@pytest.mark.parametrize("name", ON_FOUR | EXPERT_PARALLEL_ON_FOUR)
def test_four_ranks_compute_what_one_process_computes(four_ranks, name):
    assert max(four_ranks.errors(name).values()) < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in CASES if "fsdp" in name])
def test_fsdp_shards_weights_and_momenta(two_ranks, name):
    whole = two_ranks.one_process(name)[0]["held"]
    ranks = [rank[name][0]["held"] for rank in two_ranks.seen]
    assert [sum(held) for held in zip(*ranks, strict=True)] == whole
    assert all(0.4 < held / all_of_it < 0.6 for rank in ranks for held, all_of_it in zip(rank, whole, strict=True))


@pytest.mark.parametrize("kind", ["losses", "grads", "seen", "state"])
def test_a_nan_on_one_rank_is_detected(kind, case):
    """Equal infinities are no error: the largest logits of resting MTP modules are -inf."""
    expected = pipeline_ranks.one_process(case("1f1b", **RESTING))
    other = copy.deepcopy(expected)
    other[0]["clipped"] = 0.0  # all heads were clipped on the first rank
    assert set(largest_error([expected, other], expected).values()) == {0.0}
    name, value = next(iter(other[0][kind].items()))
    spoiled = torch.as_tensor(value)
    spoiled[(0,) * spoiled.ndim] = torch.nan
    other[0][kind][name] = spoiled.tolist() if kind == "losses" else spoiled
    assert largest_error([expected, other], expected)[kind] == torch.inf


@pytest.mark.slow
@pytest.mark.parametrize("name", MUTANTS)
def test_a_wrong_gradient_is_detected(two_ranks, name):
    errors = two_ranks.errors(name)
    assert errors["losses"] < 1e-5 < 1e-4 < errors["grads"]


@pytest.mark.slow
def test_expert_rows_returned_to_the_wrong_tokens_are_detected(two_ranks):
    errors = two_ranks.errors("ep 2, home")
    assert min(errors["losses"], errors["grads"]) > 1e-3


@pytest.mark.slow
def test_expert_gradients_not_summed_over_replicas_are_detected(four_ranks):
    errors = four_ranks.errors("experts")
    assert errors["losses"] < 1e-5 < 1e-2 < errors["grads"]


@pytest.mark.slow
@pytest.mark.parametrize("name", LAYERS)
def test_sharded_experts_match_in_every_precision(two_ranks, name):
    """Sharded experts compute what one process computes, even on a rank whose experts receive no token.

    An expert's rows are ordered by sending rank, so FP8 forms the same tiles of tokens as one process.
    """
    seen = two_ranks.seen
    rows = [rank[name]["rows"] for rank in seen]
    assert sum(rows) == 50 * TINY["num_experts_per_tok"] and (rows[1] == 0) == ("3 experts" in name)
    for rank in seen:
        assert max(rank[name]["errors"]) < (1e-2 if "bf16" in name else 1e-6)


@pytest.mark.slow
def test_passes_overlap_only_in_schedules_with_pairs(two_ranks, four_ranks):
    """Expert parallelism overlaps a forward and a backward pass only in schedules that pair them."""
    for name in ("dualpipev, ep 2", "dualpipe, ep 2"):
        assert all(rank[name][0]["pairs"] > 2 for rank in four_ranks.seen)
    for run, name in ((four_ranks, "zerobubble, ep 2"), (two_ranks, "dualpipev"), (two_ranks, "ep 2")):
        assert all(rank[name][0]["pairs"] == 0 for rank in run.seen)


def test_a_pair_of_passes_takes_turns():
    """Each pass resumes when the other sends rows, in an order that thread timing cannot change.

    `take_turns` returns after both passes have ended.
    """
    exchange, said = AllToAll(None), []
    overlap = Overlap(exchange)

    def speak(who: str, times: int):
        for i in range(times):
            said.append(f"{who}{i}")
            exchange.while_waiting()
        said.append(f"{who} ends")

    for _ in range(50):
        said.clear()
        overlap.take_turns(lambda: speak("a", 3), lambda: speak("b", 1))
        assert said == ["a0", "b0", "a1", "b ends", "a2", "a ends"]
    said.clear()
    overlap.take_turns(lambda: speak("a", 0), lambda: speak("b", 2))
    assert said == ["a ends", "b0", "b1", "b ends"]
    exchange.while_waiting()  # outside a pair it returns at once


@pytest.mark.parametrize("first", [True, False])
def test_an_error_in_one_pass_stops_the_other(first):
    exchange, went_on = AllToAll(None), []

    def fail():
        exchange.while_waiting()
        raise ValueError("no")

    def go_on():
        for _ in range(3):
            exchange.while_waiting()
            went_on.append(1)

    with pytest.raises(ValueError, match="no"):
        Overlap(exchange).take_turns(*((fail, go_on) if first else (go_on, fail)))
    assert len(went_on) < 3


# Splitting a model into stages


def costs(config, parts, context: int) -> list[float]:
    flops = forward_flops(config, context)
    modules, n = config.num_nextn_predict_layers, config.num_hidden_layers
    tail = sum(flops.blocks[n:]) + (1 + modules) * flops.head + modules * flops.eh_proj
    return [sum(flops.blocks[part.start : part.stop]) + part.is_last * tail for part in parts]


@pytest.mark.parametrize("n_stages", [1, 2, 3, 4, 6])
@pytest.mark.parametrize("modules", [0, 2])
def test_partition_balances_stages_as_well_as_whole_blocks_allow(tiny_config, n_stages, modules):
    more = {"num_nextn_predict_layers": modules, "first_k_dense_replace": 2, "moba_topk": 2, "moba_block_size": 4}
    config = tiny_config(num_hidden_layers=6, **more)
    parts = partition(config, n_stages, 32)
    assert [part.start for part in parts] == [0] + [part.stop for part in parts[:-1]] and parts[-1].stop == 6
    assert sum(costs(config, parts, 32)) == pytest.approx(flops_per_token(config, 32) / 3)
    assert all(part.stop > part.start for part in parts[:-1])
    others = []
    for inner in itertools.combinations_with_replacement(range(1, 7), n_stages - 1):
        if len(set(inner)) == len(inner):
            ends = (0, *inner, 6)
            others.append([StageSpec(i, n_stages, ends[i], ends[i + 1]) for i in range(n_stages)])
    squares = [sum(c * c for c in costs(config, other, 32)) for other in others]
    assert sum(c * c for c in costs(config, parts, 32)) == pytest.approx(min(squares))


def test_a_stage_with_a_large_head_gets_fewer_blocks(tiny_config):
    config = tiny_config(num_hidden_layers=8, vocab_size=2000, num_nextn_predict_layers=1)
    parts = partition(config, 2, 16)
    assert parts[0].stop > 4 and parts[1].stop - parts[1].start < 4


@pytest.mark.parametrize(("tied", "modules"), [(False, 0), (True, 0), (False, 1)])
def test_the_ranks_together_hold_the_whole_model(tiny_model, tiny_config, tied, modules):
    overrides = {"num_hidden_layers": 4, "tie_word_embeddings": tied, "num_nextn_predict_layers": modules}
    whole = tiny_model(**overrides).state_dict()
    for schedule in SCHEDULES:
        parts = partition(tiny_config(**overrides), 2 * SCHEDULES[schedule].stages_per_rank, 16)
        merged, holders = {}, []
        for rank in range(2):
            model = tiny_model(**overrides)
            prune_(model, stages_of_rank(parts, schedule, 2, rank))
            merged |= (state := model.state_dict())
            holders.append("model.embed_tokens.weight" in state)
        assert merged.keys() == whole.keys()
        assert all(torch.equal(merged[name], whole[name]) for name in whole)
        assert holders == [True, schedule == "dualpipe" or (schedule == "1f1b" and bool(tied or modules))]


def test_more_stages_than_blocks_is_an_error(tiny_config):
    with pytest.raises(UserError, match=r"^`model.num_hidden_layers`: 2 blocks can't be cut into 4 stages: give at"):
        partition(tiny_config(), 4, 16)


def test_torch_splits_a_backward_pass_from_2_12_on():
    assert not splits_backward("2.11.0+cu128") and splits_backward("2.12.0") and splits_backward("2.13.0+cpu")


# Idle time of the ranks


def simulated(order: dict[int, list], before: Callable[[int, bool], int | None], scale: int) -> int:
    """Return the time that an order of actions takes, in units of an F.

    F, I and W take `scale` units each, and B takes twice that. Messages take no time. An overlapped pair sends its
    results when both passes are done. `before(stage, forward)` returns the stage whose result a pass needs, or None.
    """
    names = {FORWARD: "F", FULL_BACKWARD: "B", BACKWARD_INPUT: "I", BACKWARD_WEIGHT: "W"}
    clock, done = dict.fromkeys(order, 0), {}
    todo = {rank: [action for action in actions if action] for rank, actions in order.items()}
    while any(todo.values()):
        progress = False
        for rank, actions in todo.items():
            parts = (actions[0].sub_actions or (actions[0],)) if actions else ()
            now, ready, finished = clock[rank], bool(parts), []
            for part in parts:
                kind = names[part.computation_type]
                needs = None if kind == "W" else before(part.stage_index, kind == "F")
                key = (needs, kind == "F", part.microbatch_index)
                if needs is not None and key not in done:
                    ready = False
                    break
                now = max(now, done.get(key, 0)) + scale * (1 + (kind == "B"))
                if kind != "W":
                    finished.append((part.stage_index, kind == "F", part.microbatch_index))
            if ready:
                actions.pop(0)
                clock[rank] = now
                done |= dict.fromkeys(finished, now)
                progress = True
        assert progress, "each rank waits for another"
    return max(clock.values())


@pytest.mark.parametrize("ranks", [2, 4, 8])
@pytest.mark.parametrize("more", [0, 2, 8])
def test_the_bubble_is_that_of_the_paper(ranks, more):
    """DualPipe and DualPipeV have the bubble of DeepSeek-V3, table 2.

    Overlapped passes are taken to need as much time as the same passes in sequence.
    """
    micro_batches = 2 * ranks + more
    v = DualPipeVOrder(ranks, micro_batches)
    order = {rank: v.actions(rank) for rank in range(ranks)}

    def on_v(stage: int, forward: bool) -> int | None:
        return stage - 1 if forward and stage else stage + 1 if not forward and stage < 2 * ranks - 1 else None

    f, b, w = 1, 2, 1
    assert simulated(order, on_v, 1) - 6 * micro_batches == (ranks - 1) * (f + b + b - 3 * w)

    def mirrored(stage: int, forward: bool) -> int | None:
        end = 0 if forward else ranks - 1
        return None if stage % ranks == end else stage + (-1 if forward else 1)

    f, b, w = 2, 4, 2
    order = dualpipe_order(ranks, micro_batches // 2)
    assert simulated(order, mirrored, 2) - 6 * micro_batches == (ranks / 2 - 1) * (f + b + b - 3 * w)


def test_messages_are_received_in_the_order_of_sending():
    """Each rank receives messages in the order in which the other rank sends them, since messages carry no tag."""
    ranks = 4
    listed, place = with_messages(dualpipe_order(ranks, 5)), stage_ranks("dualpipe", ranks)
    for sender, receiver in itertools.permutations(range(ranks), 2):
        sent, received = [], []
        for action in listed[sender]:
            if action.computation_type in (SEND_F, SEND_B):
                after = action.stage_index + (1 if action.computation_type == SEND_F else -1)
                if place[after] == receiver:
                    sent.append((after, action.microbatch_index))
        for action in listed[receiver]:
            if action.computation_type in (RECV_F, RECV_B):
                came = action.stage_index - (1 if action.computation_type == RECV_F else -1)
                if place[came] == sender:
                    received.append((action.stage_index, action.microbatch_index))
        assert sent == received and (not sent or abs(sender - receiver) == 1)
