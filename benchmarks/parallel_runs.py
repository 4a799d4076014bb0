"""The parts of benchmarks/parallel.py that run `moonwhale train`, on CPUs.

Do several processes compute what one does? Does a run survive the death of a process? How much memory does a process
need, in a step and while it saves a checkpoint?
"""

import contextlib
import json
import math
import os
import random
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import psutil
import torch
from safetensors.torch import load_file

import parallel_rank
from common import TOY, environment
from forked_processes import ForkedProcess, finish, rank_variables
from moonwhale.checkpoint import log_history, newest_checkpoint
from moonwhale.model import MoonwhaleConfig
from moonwhale.native import build
from moonwhale.planning.cost_model import LayoutCosts, ParallelLayout
from moonwhale.presets import PAPER
from moonwhale.yaml_files import write_yaml

MODEL = (
    TOY
    | PAPER.model
    | {
        "num_hidden_layers": 8,  # at least one for each stage of the largest pipeline
        "aux_loss_alpha": 0.01,
        "bias_update_speed": 0.01,
    }
)
RUN = PAPER.train | {  # MTP from the first step
    "context": 32,
    "batch_size": 2,
    "tokens_per_step": 512,  # 8 micro-batches, the least for DualPipe on four ranks
    "lr": 1e-3,
    "warmup_steps": 1,
    "decay_fraction": 0.5,
    "qk_clip_tau": 2e-3,  # low enough to clip
    "grad_clip": 0.0,
    "eval_every": 0,
    "eval_rows": 4,
    "save_every": 0,
    "log_every": 1,
    "report_to": ["none"],
    "device": "cpu",
    "precision": "fp32",
    "model": MODEL,
}
# The number of processes, and the options `parallel.FIELD`
LAYOUTS = {
    "pp 2, dualpipev": (2, {"pp": 2, "schedule": "dualpipev"}),
    "pp 2, dualpipe": (2, {"pp": 2, "schedule": "dualpipe"}),
    "pp 4, dualpipev": (4, {"pp": 4, "schedule": "dualpipev"}),
    "pp 4, dualpipe": (4, {"pp": 4, "schedule": "dualpipe"}),
    "pp 2, 1f1b": (2, {"pp": 2, "schedule": "1f1b"}),
    "dp 2": (2, {}),
    "pp 2 x dp 2": (4, {"pp": 2, "schedule": "dualpipev"}),
    "ep 2": (2, {"ep": 2}),
    "ep 2 x dp 2": (4, {"ep": 2}),
    "pp 2 x ep 2": (4, {"pp": 2, "ep": 2, "schedule": "dualpipev"}),
    "fsdp 2": (2, {"fsdp": True}),
    "pp 2 x fsdp 2": (4, {"pp": 2, "fsdp": True, "schedule": "dualpipev"}),
}
SAVED_LAYOUTS = {
    "pp 4, dualpipev": LAYOUTS["pp 4, dualpipev"],
    "pp 2 x ep 2": LAYOUTS["pp 2 x ep 2"],
    "ep 4": (4, {"ep": 4}),
    "fsdp 4": (4, {"fsdp": True}),
}
KILLED = ("pp 2, dualpipev", "pp 2, dualpipe")
SIZE = {"context": 256, "tokens_per_step": 4096, "model": MODEL | {"hidden_size": 128, "moe_intermediate_size": 64}}
HELD = ("weights", "gradients", "optimizer", "activations")
LIMIT = 300  # seconds for a run, and again for each kill


class Run:
    """A run of `moonwhale train` with the options `run`, in a folder `out`.

    What parallel_rank.py measures in each process, and what it prints, is in the folder `seen` next to it.
    """

    def __init__(self, out: Path, run: dict):
        self.out, self.seen = out, Path(f"{out}-seen")
        self.seen.mkdir(parents=True)
        self.argv = ["--config", str(self.seen / "run.yaml"), "--out", str(out)]
        self.variables = {"OMP_NUM_THREADS": "1", "MOONWHALE_CACHE": str(out.parent / "cache")}
        write_yaml(self.seen / "run.yaml", run, "a benchmark's run")

    def together(self, processes: int) -> list[dict]:
        """Carry it out in forked processes instead of torchrun's, and return what each measured."""
        ranks = [
            ForkedProcess(
                self.seen / f"said{rank}.txt",
                self.variables | variables,
                parallel_rank.main,
                str(self.seen),
                self.argv,
            )
            for rank, variables in enumerate(rank_variables(processes))
        ]
        finish(ranks, LIMIT)
        return [torch.load(self.seen / f"{rank}.pt", weights_only=True) for rank in range(processes)]

    def history(self) -> list[dict]:
        """Return what was logged, without the times."""
        logs = log_history(newest_checkpoint(self.out))
        return [{k: v for k, v in log.items() if not re.search("second|runtime|mfu", k)} for log in logs]


class DisturbedRun:
    """A run under torchrun, some of whose processes are killed."""

    def __init__(self, run: Run, processes: int, restarts: int):
        self.run, self.deadline = run, time.monotonic() + LIMIT * (1 + restarts)
        launcher = [
            "torch.distributed.run",
            "--standalone",
            f"--nproc-per-node={processes}",
            f"--max-restarts={restarts}",
        ]
        script = str(Path(__file__).with_name("parallel_rank.py"))
        self.said = run.seen / "said.txt"
        with self.said.open("w") as file:
            self.process = subprocess.Popen(
                [sys.executable, "-m", *launcher, script, str(run.seen), *run.argv],
                env=os.environ | run.variables,
                stdout=file,
                stderr=subprocess.STDOUT,
            )

    def steps(self) -> list[int]:
        """Return the steps that were logged so far; those that a restart repeats are listed again."""
        return [int(number) for number in re.findall(r"^step +(\d+)  loss", self.said.read_text(), re.MULTILINE)]

    def kill(self, rank: int) -> None:
        for child in psutil.Process(self.process.pid).children(recursive=True):
            if child.environ().get("RANK") == str(rank):
                child.kill()
                return
        raise RuntimeError(f"there is no rank {rank}: {self.said.read_text()[-3000:]}")

    def is_over(self) -> bool:
        return self.process.poll() is not None or time.monotonic() > self.deadline

    def end(self) -> None:
        """Wait for the end, and stop what still runs then.

        Raises:
            RuntimeError: if it failed or took too long, with what it printed.
        """
        while not self.is_over():
            time.sleep(0.05)
        with contextlib.suppress(psutil.Error):
            launcher = psutil.Process(self.process.pid)
            for process in (*launcher.children(recursive=True), launcher):
                process.kill()
        if self.process.wait():
            raise RuntimeError(f"{self.process.returncode}: {self.said.read_text()[-3000:]}")


def write_text(folder: Path, steps: int) -> str:
    """Write documents of few words that fill more rows than the steps need: an epoch's last step may be short."""
    rows = 2 * steps * RUN["tokens_per_step"] // RUN["context"]
    draw, words = random.Random(0), ["the", "a", "whale", "moon", "sea", "sings", "swims", "rises", "over", "under"]
    folder.mkdir()
    for i in range(rows):
        (folder / f"{i:04}.txt").write_text(" ".join(draw.choice(words) for _ in range(draw.randint(30, 90))))
    return str(folder)


def assemble(seen: list[dict[str, torch.Tensor]], like: dict[str, torch.Tensor]) -> dict[str, list[torch.Tensor]]:
    """Return the gradients of all ranks, by name. Shards of a tensor's first dimension are in the ranks' order."""
    found = {}
    for name, expected in like.items():
        parts = [grads[name] for grads in seen if name in grads]
        if not parts:
            raise RuntimeError(f"no rank has a gradient of {name}")
        each = len(expected) // len(parts[0]) if expected.ndim else 1
        found[name] = [torch.cat(parts[i : i + each]) if each > 1 else parts[i] for i in range(0, len(parts), each)]
    return found


def largest(errors: Iterable[float]) -> float:
    """Return the largest error. A NaN counts as infinite: Python's `max` drops every NaN but a first one."""
    return max(math.inf if math.isnan(error) else error for error in errors)


def gradient_error(seen: list[dict[str, torch.Tensor]], expected: dict[str, torch.Tensor]) -> float:
    """Return the largest relative error of a parameter's gradient on any rank."""
    if unknown := set().union(*seen) - set(expected):
        raise RuntimeError(f"one process has no gradient of {', '.join(sorted(unknown))}")
    if zero := [name for name, grad in expected.items() if not grad.any()]:
        raise RuntimeError(f"nothing to compare: the gradient of {', '.join(zero)} is zero")
    errors = [
        float((grad - expected[name]).norm() / expected[name].norm().clamp(min=1e-12))
        for name, grads in assemble(seen, expected).items()
        for grad in grads
    ]
    return largest(errors)


def loss_error(history: list[dict], expected: list[dict]) -> float:
    """Return the largest relative error of a logged loss."""
    pairs = [(a, b) for a, b in zip(history, expected, strict=True) if "loss_main" in b]
    names = [name for name in pairs[0][1] if name == "loss" or name.startswith("loss_")]
    return largest(abs(a[name] - b[name]) / max(abs(b[name]), 1e-6) for a, b in pairs for name in names)


def equality(layouts: list[str], steps: int) -> dict:
    """Compare gradients of the first step and losses of `steps` steps with those of one process."""
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        data = write_text(Path(folder, "data"), steps)
        for tied in (False, True):
            run = RUN | {"data": data, "steps": steps, "model": MODEL | {"tie_word_embeddings": tied}}
            suffix = ", tied" * tied
            one = Run(Path(folder, f"one{suffix}"), run)
            (expected,) = one.together(1)
            for name in layouts:
                processes, parallel = LAYOUTS[name]
                several = Run(Path(folder, name + suffix), run | {"parallel": parallel})
                seen = several.together(processes)
                found[name + suffix] = {
                    "gradient_error": gradient_error([rank["grads"] for rank in seen], expected["grads"]),
                    "loss_error": loss_error(several.history(), one.history()),
                }
                print(f"{name + suffix:<24}{found[name + suffix]}", file=sys.stderr)
    return {
        "max_gradient_error": max(errors["gradient_error"] for errors in found.values()),
        "max_loss_error": max(errors["loss_error"] for errors in found.values()),
        "equality": {"layouts": found, "steps": steps, "environment": environment("fp32", False)},
    }


def memory(layouts: list[str]) -> dict:
    """Compare what each rank holds and sends in a step with the prediction of `moonwhale plan`."""
    found, errors = {}, []
    with tempfile.TemporaryDirectory() as folder:
        run = RUN | SIZE | {"data": write_text(Path(folder, "data"), 20), "steps": 1}
        for name in layouts:
            processes, parallel = LAYOUTS[name]
            several = Run(Path(folder, name), run | {"parallel": parallel})
            measured = [rank["bytes"] | rank["sent"] for rank in several.together(processes)]
            config = MoonwhaleConfig.from_pretrained(several.out)
            found[name] = {"measured": measured, "planned": planned(config, run, processes, parallel)}
            print(f"{name:<24}{found[name]}", file=sys.stderr)
            held = [[sum(rank[part] for part in HELD) for rank in ranks] for ranks in found[name].values()]
            errors += [theirs / ours - 1 for ours, theirs in zip(*held, strict=True)]
    about = {"layouts": found, "environment": environment("fp32", False)}
    return {"max_memory_error": round(max(map(abs, errors)), 3), "memory": about}


def planned(config: MoonwhaleConfig, run: dict, processes: int, parallel: dict) -> list[dict[str, int]]:
    """Return the prediction of `moonwhale plan` for every process."""
    pp, schedule = parallel.get("pp", 1), parallel.get("schedule", "1f1b")
    micro_batches = run["tokens_per_step"] // run["context"] // run["batch_size"] // (processes // pp)
    layout = ParallelLayout(pp, processes // pp, schedule, micro_batches, run["batch_size"])
    layout_costs, blocks = LayoutCosts(config, run["context"], activation_bytes=4), range(config.num_blocks)
    saved = layout_costs.sizes.saved_activations
    # A plan is for GPUs; this is a CPU.
    extra = [_saved_moba_probabilities(config, i, run["context"]) - _recomputed(config, i) for i in blocks]
    saved = tuple(map(sum, zip(saved, extra, strict=True)))
    layout_costs.sizes = replace(layout_costs.sizes, saved_activations=saved)
    costs = layout_costs.costs(layout)
    return [{name: round(getattr(cost, name)) for name in (*HELD, "pipeline", "reduce")} for cost in costs] * layout.dp


def _recomputed(config: MoonwhaleConfig, layer: int) -> int:
    """Values per token that the compiled kernels do not save: silu(gate) of each network that a token uses."""
    if not build.available("training"):
        return 0
    if layer < config.first_k_dense_replace:
        return config.intermediate_size
    return (config.n_shared_experts + config.num_experts_per_tok) * config.moe_intermediate_size


def _saved_moba_probabilities(config: MoonwhaleConfig, layer: int, context: int) -> int:
    """Extra values per token that MoBA saves for backward on the CPU path."""
    if not config.is_moba_layer(layer) or config.moba_topk * config.moba_block_size >= context:
        return 0
    return config.num_attention_heads * config.moba_topk * config.moba_block_size


def saving(layouts: list[str], width: int) -> dict:
    """Measure rank 0's peak memory while it saves, relative to its share of weights and optimizer state.

    Args:
        width: hidden size of the model, which decides how large the shares are.
    """
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        model = MODEL | {"hidden_size": width, "moe_intermediate_size": width, "n_routed_experts": 8}
        # The first checkpoint also loads libraries; the second one counts
        run = RUN | {"data": write_text(Path(folder, "data"), 2), "steps": 2, "save_every": 1, "model": model}
        for name in layouts:
            processes, parallel = SAVED_LAYOUTS[name]
            ranks = Run(Path(folder, name), run | {"parallel": parallel}).together(processes)
            found[name] = [rank["saving"] for rank in ranks]
            print(f"{name:<24}{found[name]}", file=sys.stderr)
    peaks = [1 + ranks[0]["extra"] / ranks[0]["share"] for ranks in found.values()]
    about = {"layouts": found, "width": width, "environment": environment("fp32", False)}
    return {"peak_rank0_over_share": round(max(peaks), 3), "saving": about}


def kills(runs: int, each: int, steps: int = 12) -> dict:
    """Kill a random rank at a random moment of `each` random steps of every run."""
    draw, survived, found = random.Random(0), 0, []
    with tempfile.TemporaryDirectory() as folder:
        run = RUN | {"data": write_text(Path(folder, "data"), steps), "steps": steps, "save_every": 2, "eval_every": 4}
        run |= {"tokens_per_step": 256, "model": MODEL | {"num_hidden_layers": 4}}  # suffices for two ranks
        undisturbed = {}
        for i in range(runs):
            name = KILLED[i % len(KILLED)]
            processes, parallel = LAYOUTS[name]
            if name not in undisturbed:
                undisturbed[name] = Run(Path(folder, name), run | {"parallel": parallel})
                undisturbed[name].together(processes)
            disturbed = DisturbedRun(Run(Path(folder, f"{name} {i}"), run | {"parallel": parallel}), processes, each)
            killed = kill_at(disturbed, sorted(draw.sample(range(1, steps), each)), processes, draw)
            disturbed.end()
            equal = same_end(disturbed.run, undisturbed[name])
            survived += equal * len(killed)
            found.append({"layout": name, "killed": killed, "equal": equal})
            print(found[-1], file=sys.stderr)
    about = {"made": runs * each, "steps": steps, "save_every": run["save_every"], "runs": found}
    return {"kills_survived": survived, "kills": about | {"environment": environment("fp32", False)}}


def kill_at(disturbed: DisturbedRun, moments: list[int], processes: int, draw: random.Random) -> list[dict]:
    """Kill a rank some time after each of these steps was logged. Return which rank, and after which step."""
    killed, known = [], 0
    for moment in moments:
        while not any(step >= moment for step in disturbed.steps()[known:]):
            if disturbed.is_over():
                disturbed.end()
                raise RuntimeError(f"it never reached step {moment}: {disturbed.said.read_text()[-3000:]}")
            time.sleep(0.02)
        time.sleep(draw.random())  # about as long as a step
        rank = draw.randrange(processes)
        disturbed.kill(rank)
        logged = disturbed.steps()
        killed.append({"rank": rank, "after_step": logged[-1]})
        known = len(logged)
    return killed


def same_end(run: Run, other: Run) -> bool:
    """Whether two runs end with the same weights and the same logs, bit for bit."""
    a, b = (load_file(each.out / "model.safetensors") for each in (run, other))
    return (
        a.keys() == b.keys()
        and all(torch.equal(value, b[name]) for name, value in a.items())
        and json.dumps(run.history()) == json.dumps(other.history())
    )
