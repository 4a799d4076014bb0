"""Does GRPO make a model better at what it is rewarded for? The demo model on sums, from an SFT warm start.

    make demo && python benchmarks/grpo.py runs/demo

The demonstrations of the warm start show two ways to answer, both in R1's form. Half of them add up step by step, the
others have an empty thought (`<think></think>`) followed by the sum. From there, each seed is trained by GRPO, and
pass@1 on held-out questions is measured before and after. Only the rewards tell which way is better. As a check against
reward hacking, one run is rewarded for the format alone, which both ways have. The benchmark also measures what
post-training does to the MTP modules: the share of their drafts that are accepted, before and after.
"""

import argparse
import contextlib
import io
import json
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import mean

import torch

import common
from moonwhale.checkpoint import log_history, newest_checkpoint
from moonwhale.data.loading import load_source
from moonwhale.data.sft_dataset import load_conversations
from moonwhale.data.tasks import Task, load_task
from moonwhale.evaluate.drafts import score_drafts
from moonwhale.evaluate.tasks import generate_answers, score_answers
from moonwhale.infer.engine import Engine
from moonwhale.posttrain.grpo import GRPOOptions, grpo
from moonwhale.posttrain.progress import rewards_of
from moonwhale.posttrain.sft import SFTOptions, sft
from moonwhale.precision import tune_allocator

TASK = (  # sums of eight one-digit numbers
    'basic_arithmetic:operators=["+"]:min_terms=8:max_terms=8:min_digits=1:max_digits=1:'
    "allow_parentheses=false:allow_negation=false"
)
MAX_ANSWER_TOKENS = 128
NO_THOUGHT = "<think></think>"  # how an answer without a thought begins
THOUGHT_EVERY = 2  # one demonstration in this many adds up step by step


@dataclass
class Sizes:
    """The sizes of the benchmark. Its test uses smaller ones."""

    seeds: int = 3
    demonstrations: int = 40_000
    sft_steps: int = 500
    sft_lr: float = 3e-3
    grpo_steps: int = 60
    grpo_lr: float = 1.5e-4
    control_steps: int = 40
    chat_steps: int = 100
    questions: int = 20_000
    batch: int = 64
    problems: int = 300
    samples: int = 4


def main(argv: list[str] | None = None) -> None:
    parser = common.options(__doc__.partition("\n")[0])
    parser.formatter_class = argparse.ArgumentDefaultsHelpFormatter
    parser.add_argument("checkpoint", help="folder of the demo model")
    parser.add_argument("--picture", type=Path, default=common.ROOT / "docs" / "grpo.svg", help="file for the plot")
    for name, value in vars(Sizes()).items():
        parser.add_argument("--" + name.replace("_", "-"), type=type(value), default=value)
    args = parser.parse_args(argv)
    sizes = Sizes(**{name: getattr(args, name) for name in vars(Sizes())})
    run(args.checkpoint, sizes, args.results, args.picture)


def run(checkpoint: str, sizes: Sizes, results: Path, picture: Path) -> None:
    tuned, task = tune_allocator(), load_task(TASK)
    with tempfile.TemporaryDirectory() as scratch:
        work = Path(scratch)
        write_demonstrations(task, work / "demonstrations.jsonl", sizes.demonstrations)
        chat = chat_drafts(checkpoint, work, sizes)
        before = warm_start(checkpoint, task, work, sizes)
        seeds = [one_seed(task, work, seed, sizes, before) for seed in range(sizes.seeds)]
        say(f"format alone, for {sizes.control_steps} steps")
        control = work / "control"
        quietly(grpo, grpo_options(work / "warm", control, 0, sizes, ["format"], sizes.control_steps))
        measured = measure(control, task, sizes)
    kept = [chat["after"] / max(chat["before"], 1e-9), *(seed["acceptance_kept"] for seed in seeds)]
    result = {
        "benchmark": "grpo",
        "task": TASK,
        "pass1_gain": round(min(seed["after"]["pass1"] - before["pass1"] for seed in seeds), 4),
        "greedy_gain": round(min(seed["after"]["greedy"] - before["greedy"] for seed in seeds), 4),
        "seeds": sizes.seeds,
        "mtp_acceptance_kept": round(min(kept), 4),
        "minutes": max(seed["minutes"] for seed in seeds),
        "before": before,
        "after": [seed["after"] for seed in seeds],
        "after_format_alone": measured,
        "chat": chat,
        "sizes": vars(sizes),
        "environment": common.environment("bf16 in training where the CPU has it, fp32 in the engine", tuned),
    }
    curves = {"curves": [seed["curve"] for seed in seeds]}
    common.write(results, "grpo", result, **curves)
    draw(result | curves, picture)


def write_demonstrations(task: Task, path: Path, n: int) -> None:
    """Writes right answers. One in THOUGHT_EVERY adds up step by step, the others have an empty thought."""
    with open(path, "w", encoding="utf-8") as file:
        for i, problem in enumerate(task.problems(n)):
            text = (
                f"{NO_THOUGHT}\n<answer>{problem.answer}</answer>" if i % THOUGHT_EVERY else task.demonstrate(problem)
            )
            file.write(json.dumps({"messages": [*problem.messages, {"role": "assistant", "content": text}]}) + "\n")


def warm_start(checkpoint: str, task: Task, work: Path, sizes: Sizes) -> dict:
    """Fine-tunes on the demonstrations, and measures the result."""
    say(f"warm start: {sizes.sft_steps} steps of fine-tuning")
    quietly(
        sft,
        SFTOptions(
            checkpoint=checkpoint,
            out=str(work / "warm"),
            data=str(work / "demonstrations.jsonl"),
            steps=sizes.sft_steps,
            lr=sizes.sft_lr,
            eval_every=0,
            save_every=0,
            eval_rows=8,
            report_to=["none"],
        ),
    )
    before = measure(work / "warm", task, sizes)
    say(f"warm start: {shown(before)}")
    return before


def one_seed(task: Task, work: Path, seed: int, sizes: Sizes, before: dict) -> dict:
    """Runs GRPO with one seed, and measures the result."""
    out, begin = work / f"grpo{seed}", time.perf_counter()
    quietly(grpo, grpo_options(work / "warm", out, seed, sizes, ["accuracy", "format"], sizes.grpo_steps))
    minutes = (time.perf_counter() - begin) / 60
    after = measure(out, task, sizes)
    say(f"seed {seed}: {shown(after)}, after {minutes:.1f} minutes of GRPO")
    log = [entry for entry in log_history(newest_checkpoint(out)) if "reward" in entry]
    return {
        "after": after,
        "acceptance_kept": after["acceptance"] / max(before["acceptance"], 1e-9),
        "minutes": round(minutes, 1),
        "curve": [[e["step"], rewards_of(e)["accuracy"], e["completions/mean_length"]] for e in log],
    }


def grpo_options(start: Path, out: Path, seed: int, sizes: Sizes, rewards: list[str], steps: int) -> GRPOOptions:
    return GRPOOptions(
        checkpoint=str(start),
        out=str(out),
        task=TASK,
        questions=sizes.questions,
        rewards=rewards,
        steps=steps,
        lr=sizes.grpo_lr,
        batch_size=sizes.batch,
        max_new_tokens=MAX_ANSWER_TOKENS,
        seed=seed,
        eval_every=0,
        eval_questions=8,
        save_every=0,
        log_every=5,
        show_answers=0,
        report_to=["none"],
    )


def measure(folder: Path, task: Task, sizes: Sizes) -> dict:
    """Measures a model on held-out questions.

    - pass@1 of samples at temperature 1, and of greedy answers;
    - the share of samples with a thought, and the share of right answers with and without one;
    - the share of MTP drafts that are accepted in the greedy answers.
    """
    engine = Engine.load(folder, "cpu", "fp32", draft=1, sequences=128)
    problems = task.problems(sizes.problems, seed=1000, held_out=True)
    greedy, sampled = generate_answers(engine, problems, sizes.samples, 1.0, MAX_ANSWER_TOKENS, seed=0)
    score = score_answers(task, problems, greedy, sampled, [1])
    right: dict[bool, list[float]] = {True: [], False: []}
    for problem, answers in zip(problems, sampled, strict=True):
        for each in answers:
            right[not each.text.startswith(NO_THOUGHT)].append(task.accuracy(problem, each.text))
    return {
        "pass1": round(score["pass_at"][1][0], 4),
        "greedy": round(score["greedy"][0], 4),
        "well_formed": round(score["well_formed"], 4),
        "thinks": round(len(right[True]) / (len(problems) * sizes.samples), 4),
        "right_with_thought": round(mean(right[True]), 4) if right[True] else None,
        "right_without": round(mean(right[False]), 4) if right[False] else None,
        "tokens": round(score["mean_tokens"], 1),
        "acceptance": round(score_drafts(greedy)["acceptance"][0], 4),
    }


def shown(measured: dict) -> str:
    return f"pass@1 {measured['pass1']:.3f}, greedy {measured['greedy']:.3f}, {measured['thinks']:.0%} with a thought"


def chat_drafts(checkpoint: str, work: Path, sizes: Sizes) -> dict:
    """Fine-tunes on chitchat. Measures the loss on the assistant's turns, and the share of drafts that are accepted in
    answers to held-out openings, before and after.
    """
    out = work / "chat"
    say(f"chitchat: {sizes.chat_steps} steps of fine-tuning")
    config = SFTOptions(
        checkpoint=checkpoint, out=str(out), steps=sizes.chat_steps, eval_every=0, save_every=0, report_to=["none"]
    )
    quietly(sft, config)
    log = [e["loss_main"] for e in log_history(newest_checkpoint(out)) if "loss_main" in e]
    return {
        "before": chat_acceptance(checkpoint),
        "after": chat_acceptance(out),
        "first_loss": round(log[0], 3),
        "last_loss": round(log[-1], 3),
    }


def chat_acceptance(folder: str | Path) -> float:
    """Returns the share of drafts accepted in greedy answers to the openings of held-out conversations."""
    engine = Engine.load(folder, "cpu", "fp32", draft=1, sequences=128)
    _, held_out = load_conversations(load_source("chitchat"), engine.tokenizer)
    openings = []
    for row in held_out:
        answered = next(i for i, label in enumerate(row["labels"]) if label >= 0)
        if answered < engine.context // 2:
            openings.append(row["input_ids"][:answered])
    return round(score_drafts(engine.generate(openings, temperature=0.0, max_new_tokens=64))["acceptance"][0], 4)


def quietly(verb, config) -> None:
    """Runs a verb without its output."""
    with contextlib.redirect_stdout(io.StringIO()):
        verb(config)


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def draw(result: dict, path: Path) -> None:
    """Plots the share of right answers and their length over the steps of GRPO, one line for each seed."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.4), layout="constrained")
    left, right = figure.subplots(1, 2)
    for seed, curve in enumerate(result["curves"]):
        steps, accuracy, length = zip(*curve, strict=True)
        left.plot(steps, accuracy, color=f"C{seed}", label=f"seed {seed}")
        right.plot(steps, length, color=f"C{seed}")
        held_out = [result["before"]["pass1"], result["after"][seed]["pass1"]]
        left.plot([0, steps[-1]], held_out, "o", color=f"C{seed}")
    format_alone = [result[when]["pass1"] for when in ("before", "after_format_alone")]
    ends = [0, result["sizes"]["control_steps"]]
    left.plot(ends, format_alone, "x:", color="gray", label="rewarded for the format alone, held out")
    left.set_ylabel("right answers (dots: held out)")
    left.set_ylim(0, 1)
    right.set_ylabel("tokens per answer")
    for axes in (left, right):
        axes.set_xlabel("GRPO step")
        axes.grid(alpha=0.3)
    left.legend(frameon=False, fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    with rc_context({"svg.hashsalt": "moonwhale"}):
        figure.savefig(path, metadata={"Date": None})


if __name__ == "__main__":
    torch.set_num_threads(min(2, torch.get_num_threads()))
    common.run_main(main)
