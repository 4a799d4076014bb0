"""The memory, messages and idle time that `moonwhale plan` predicts match real models, schedules and runs."""

import json
import shlex
from dataclasses import asdict
from pathlib import Path

import pytest
from torch.distributed.pipelining.schedules import BACKWARD_WEIGHT, FORWARD, FULL_BACKWARD

from moonwhale.costs import flops_per_token
from moonwhale.errors import UserError
from moonwhale.optim.muonclip import param_groups
from moonwhale.parallel.options import ParallelOptions
from moonwhale.parallel.schedule_properties import SCHEDULES
from moonwhale.parallel.schedules import DualPipeVOrder, dualpipe_order, stages_of_rank
from moonwhale.parallel.stages import partition, prune_
from moonwhale.planning import plan
from moonwhale.planning.cost_model import LayoutCosts, ParallelLayout, idle_over_busy, in_flight
from moonwhale.train.config import TrainConfig, build_model_config, parse
from printed_commands import resolve

ROOT = Path(__file__).parents[2]
MODEL = {"num_hidden_layers": 8, "num_nextn_predict_layers": 2, "mtp_num_blocks": [1, 2], "first_k_dense_replace": 1}


def max_held(actions: list) -> int:
    """Return the largest number of micro-batches that a rank holds at once, summed over its stages."""
    held, most = set(), 0
    for action in filter(None, actions):
        for part in action.sub_actions or (action,):
            key = part.stage_index, part.microbatch_index
            if part.computation_type == FORWARD:
                held.add(key)
            elif part.computation_type in (FULL_BACKWARD, BACKWARD_WEIGHT):
                held.discard(key)
            most = max(most, len(held))
    return most


@pytest.mark.parametrize("ranks", [2, 4, 8])
@pytest.mark.parametrize("more", [0, 6])
def test_micro_batches_in_flight_match_the_schedule(ranks, more):
    count = 2 * ranks + more
    v = DualPipeVOrder(ranks, count)
    both = dualpipe_order(ranks, count // 2)
    for rank in range(ranks):
        actions = v.actions(rank)
        assert sum(in_flight(ParallelLayout(ranks, 1, "dualpipev", count, 1), rank)) == max_held(actions)
        assert sum(in_flight(ParallelLayout(ranks, 1, "dualpipe", count, 1), rank)) == max_held(both[rank]) == ranks + 1


def test_idle_time_matches_the_measurement():
    result = json.loads((ROOT / "benchmarks" / "results" / "parallel.json").read_text())
    for schedule in plan.PLANNED_SCHEDULES:
        idle = idle_over_busy(ParallelLayout(result["ranks"], 1, schedule, result["micro_batches"], 1))
        assert idle / (1 + idle) == pytest.approx(result["schedules"][schedule]["share"], rel=0.1)
    assert idle_over_busy(ParallelLayout(1, 4, "1f1b", 8, 1)) == 0


def test_memory_matches_the_measurement(monkeypatch):
    """Weights and gradients match real runs exactly, optimizer state within 0.1 % and activations within 15 %."""
    from moonwhale.model import MoonwhaleConfig

    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    import parallel_runs

    monkeypatch.setattr(parallel_runs.build, "available", lambda name: True)  # as where the runs were measured
    result = json.loads((ROOT / "benchmarks" / "results" / "parallel.json").read_text())
    assert abs(result["max_memory_error"]) < 0.1
    run = parallel_runs.RUN | parallel_runs.SIZE
    for name, layout in result["memory"]["layouts"].items():
        plans = parallel_runs.planned(MoonwhaleConfig(**run["model"]), run, *parallel_runs.LAYOUTS[name])
        for measured, planned in zip(layout["measured"], plans, strict=True):
            assert measured["weights"] == planned["weights"] and measured["gradients"] == planned["gradients"]
            assert measured["optimizer"] == pytest.approx(planned["optimizer"], rel=1e-3)
            assert planned["activations"] == pytest.approx(measured["activations"], rel=0.15)
            if "pp" in name:
                assert measured["pipeline"] == pytest.approx(planned["pipeline"], rel=1e-3)
                assert measured["reduce"] == pytest.approx(planned["reduce"], rel=1e-3, abs=1000)


@pytest.mark.parametrize("schedule", plan.PLANNED_SCHEDULES)
@pytest.mark.parametrize("tied", [False, True])
def test_weights_and_state_match_the_pruned_model(tiny_config, schedule, tied):
    from moonwhale.model import MoonwhaleForCausalLM

    config = tiny_config(tie_word_embeddings=tied, **MODEL)
    costs = LayoutCosts(config, 16).costs(ParallelLayout(4, 1, schedule, 8, 1))
    parts = partition(config, 4 * SCHEDULES[schedule].stages_per_rank, 16)
    for rank, cost in enumerate(costs):
        model = MoonwhaleForCausalLM(config)
        prune_(model, stages_of_rank(parts, schedule, 4, rank))
        sizes = dict.fromkeys((True, False), 0)
        for group in param_groups(model, lr=1.0):
            sizes[group["muon"]] += sum(p.numel() for p in group["params"])
        assert cost.weights == cost.gradients == 4 * sum(sizes.values())
        assert cost.optimizer == 4 * sizes[True] + 8 * sizes[False]


@pytest.mark.parametrize("schedule", plan.PLANNED_SCHEDULES)
def test_the_ranks_flops_sum_to_those_of_the_model(tiny_config, schedule):
    config = tiny_config(**MODEL)
    costs = LayoutCosts(config, 16).costs(ParallelLayout(4, 3, schedule, 8, 2))
    assert sum(cost.flops for cost in costs) == pytest.approx(8 * 2 * 16 * flops_per_token(config, 16))


def test_bytes_sent_match_a_count_by_hand(tiny_config):
    config = tiny_config(num_hidden_layers=4, num_nextn_predict_layers=0, mtp_num_blocks=1)
    message = 2 * 16 * config.hidden_size * 2 + 4  # two rows of 16 tokens in bf16, and the balance loss
    layout_costs = LayoutCosts(config, 16)
    first, last = layout_costs.costs(ParallelLayout(2, 1, "1f1b", 4, 2))
    assert first.pipeline == last.pipeline == 4 * message and first.reduce == last.reduce == first.experts == 0
    first, last = layout_costs.costs(ParallelLayout(2, 1, "dualpipev", 4, 2))
    assert first.pipeline == 4 * 2 * message  # one stage forward, the other stage backward
    (whole,) = layout_costs.costs(ParallelLayout(1, 1, "1f1b", 4, 2))
    (copied,) = layout_costs.costs(ParallelLayout(1, 4, "1f1b", 4, 2))
    (shared,) = layout_costs.costs(ParallelLayout(1, 4, "1f1b", 4, 2, ep=2))
    assert copied.reduce == 2 * whole.weights * 3 / 4 and whole.reduce == whole.pipeline == 0
    experts = 4 * sum(layout_costs.sizes.routed_experts)  # bytes
    assert shared.weights == whole.weights - experts / 2
    assert shared.reduce == 2 * ((whole.weights - experts) * 3 / 4 + experts / 2 / 2)
    rows = 4 * 2 * 16 * config.num_experts_per_tok
    assert shared.experts == 4 * 4 * rows * config.hidden_size * 2 / 2  # 4 exchanges, 4 layers, half of the rows
    (cut_up,) = layout_costs.costs(ParallelLayout(1, 4, "1f1b", 4, 2, fsdp=True))
    assert cut_up.optimizer == whole.optimizer / 4 and cut_up.reduce == 3 * 4 * whole.weights * 3 / 4


@pytest.mark.parametrize("gpus", [1, 8, 12, 64])
def test_every_layout_would_start(gpus):
    run = TrainConfig.resolve({"preset": "seed_190m", "model": {"num_hidden_layers": 16}})
    config = build_model_config(run)
    layouts, layout_costs = list(plan.layouts(run, gpus, 16, config)), LayoutCosts(config, run.context)
    assert layouts and len(set(layouts)) == len(layouts)
    for layout in layouts:
        parallel = ParallelOptions(pp=layout.pp, schedule=layout.schedule)
        assert parallel.replicas(gpus) == layout.dp
        assert layout.micro_batches * layout.rows * layout.dp * run.context == run.tokens_per_step
        assert (
            parallel.micro_batches_per_replica(layout.micro_batches * layout.dp, layout.dp, 1, "")
            == layout.micro_batches
        )
        assert len(layout_costs.costs(layout)) == layout.pp


def test_the_command_ranks_layouts_and_prints_how_to_run_them(capsys):
    assert plan.main(["--gpus", "64", "--preset", "seed_190m", "--layouts", "3"]) == 0
    said = capsys.readouterr().out
    assert "seed_190m on 64 h100: 491,520 tokens a step in rows of 1024" in said
    assert said.count(" x ") == 11 and "torchrun --nnodes 8 --nproc-per-node 8 -m moonwhale train --preset seed" in said
    changes = ["--tokens-per-step", "983040", "--model.n_routed_experts", "16", "--layouts", "1"]
    assert plan.main(["--gpus", "16", "--preset", "seed_190m", *changes]) == 0
    command = capsys.readouterr().out.splitlines()[-1]
    words = shlex.split(command.partition(" moonwhale train ")[2])
    here = next((i for i, word in enumerate(words) if word.startswith("--parallel.")), len(words))
    run = parse(words[:here])
    assert run.tokens_per_step == 983040 and run.model["n_routed_experts"] == 16
    assert plan.main(["--gpus", "64", "--preset", "seed_190m", "--memory", "0.5", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["memory"] == 0.5 and not any(p["fits"] for p in result["layouts"])
    needs = [p["memory"]["memory"] for p in result["layouts"]]
    assert needs == sorted(needs)
    run, h100 = TrainConfig.resolve({"preset": "seed_190m"}), asdict(plan.GPUS["h100"])
    fits = plan.rank(run, 64, 16, h100 | {"utilization": 0.5})
    seconds = [p["seconds"] for p in fits]
    assert all(p["fits"] for p in fits) and seconds == sorted(seconds)
    slow = plan.rank(run, 64, 16, h100 | {"utilization": 0.25})
    assert slow[0]["seconds"] > seconds[0]


LINEAR = {"rope_type": "linear", "factor": 2.0}


@pytest.mark.parametrize(
    ("options", "model"),
    [
        ("--gpus 6 --tokens-per-step 6144", {}),  # 12 rows, no multiple of the preset's 8 rows per micro-batch
        ("--gpus 7 --tokens-per-step 7168", {}),  # advised below, as is the next
        ("--gpus 4", {}),
        ("--gpus 8 --batch-size 3 --tokens-per-step 12288", {}),
        ("--gpus 2 --model.q_lora_rank null", {"q_lora_rank": None}),
        (f"--gpus 2 --model.rope_parameters {shlex.quote(json.dumps(LINEAR))}", {"rope_parameters": LINEAR}),
    ],
)
def test_train_takes_the_printed_command(options, model, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    options = shlex.split(options)
    assert plan.main(options) == 0
    start, _, words = capsys.readouterr().out.splitlines()[-1].partition(" -m moonwhale train ")
    assert start.split() == ["torchrun", "--nproc-per-node", options[1]]
    resolve(["train", *shlex.split(words)], int(options[1]))
    assert model.items() <= parse(shlex.split(words)).model.items()


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "the following arguments are required: `gpus`"),
        (["--gpus", "0"], "`gpus`: 0 is impossible"),
        (["--gpus", "many"], "`gpus`: 'many' is not"),
        (
            ["--gpus", "7"],
            "`gpus`: 4,096 tokens a step are 8 rows of 512, which 7 GPUs can't share: give `gpus` 4 or "
            "`tokens_per_step` 7168",
        ),
        (["--gpus", "8", "--gpu", "h10"], "`gpu`: 'h10' is none of a100, h100, h200, b200"),
        (["--gpus", "8", "--memory", "-1"], "`memory`: -1 is impossible: it must be above 0"),
        (["--gpus", "8", "--utilization", "2"], "`utilization`: 2 is impossible"),
        (["--gpus", "8", "--preset", "seed"], "`preset`: 'seed' is none of"),
        (["--gpus", "8", "--flops", "fast"], "`flops`: 'fast' is not"),
        (["--gpus", "8", "--model.intermediate_size", "512"], "`model.intermediate_size`: it has no effect with"),
    ],
)
def test_bad_input_is_one_clear_line(argv, message):
    with pytest.raises(UserError) as caught:
        plan.main(argv)
    assert str(caught.value).startswith(message) and "\n" not in str(caught.value)
