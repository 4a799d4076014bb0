"""Carries out an evaluation. It finds everything that is asked for before it measures, so that mistakes show first."""

import dataclasses
from dataclasses import dataclass, field
from itertools import chain, islice
from pathlib import Path

import torch
from torch.utils.data import Dataset

from moonwhale.checkpoint import open_checkpoint, read_config
from moonwhale.data.loading import load_source
from moonwhale.data.packing import PackedDataset, pack_all, pack_split
from moonwhale.data.source import Source
from moonwhale.data.tasks import Problem, Task, load_task
from moonwhale.errors import UserError
from moonwhale.evaluate import tables
from moonwhale.evaluate.config import DEFAULT_PROBLEMS, EvalConfig
from moonwhale.evaluate.drafts import DraftScore, continue_text
from moonwhale.evaluate.harness import HarnessTasks
from moonwhale.evaluate.tasks import generate_answers, score_answers
from moonwhale.evaluate.text import choose_rows, score_text
from moonwhale.infer.engine import Engine
from moonwhale.precision import ComputeSettings, choose

NUM_EXAMPLES = 3  # greedy answers that the report shows


@dataclass
class Inputs:
    """Everything that an evaluation needs, found and checked. What is not asked for is None or empty."""

    context: int  # tokens per row
    num_mtp_modules: int
    precision: ComputeSettings
    source: Source | None = None
    task: Task | None = None
    problems: list[Problem] = field(default_factory=list)
    harness: HarnessTasks | None = None


def evaluate(folder: str, config: EvalConfig) -> dict[str, dict]:
    """Measures what `config` asks for, and prints each result as soon as it is there.

    Returns the results, ready for JSON. Their keys are "text", "lm_eval", "drafts_text", "task" and "drafts_task".

    Raises:
        UserError: one line, for anything that the user can put right.
    """
    inputs = _find_inputs(folder, config)
    print(f"{'checkpoint':<12}{folder}, on {inputs.precision.reason}", flush=True)
    results: dict[str, dict] = {}
    rows = None

    if inputs.source or inputs.harness:
        model, tokenizer = open_checkpoint(folder)
        model.to(inputs.precision.device)
        if inputs.source:
            rows = _pack(inputs.source, tokenizer, inputs.context, config.whole)
            results["text"] = _measure_text(model, tokenizer, rows, inputs, config)
        if inputs.harness:
            results["lm_eval"] = _measure_harness(model, tokenizer, inputs, config)
        del model

    if inputs.task or config.speculation:
        num_drafts = inputs.num_mtp_modules if config.speculation else None
        engine = Engine.load(folder, config.device, config.precision, draft=num_drafts)
        if config.speculation and rows is not None:
            results["drafts_text"] = _measure_drafts("text", continue_text(engine, rows))
        if inputs.task:
            results |= _measure_task(engine, inputs, config)
    return results


def _find_inputs(folder: str, config: EvalConfig) -> Inputs:
    model_config = read_config(Path(folder))
    context = config.context or model_config.max_position_embeddings
    if context > model_config.max_position_embeddings:
        raise UserError(
            f"`context`: {context} is longer than the model's context of {model_config.max_position_embeddings}: "
            "give at most that"
        )
    if config.speculation and not model_config.num_nextn_predict_layers:
        raise UserError(f"`speculation`: {folder} has no MTP modules, which would draft: leave it out")
    inputs = Inputs(context, model_config.num_nextn_predict_layers, choose(config.device, config.precision))
    if config.task:
        inputs.task, inputs.problems = _find_problems(config)
    if config.data:
        inputs.source = load_source(config.data, config.data_split, config.data_columns)
    if config.lm_eval:
        inputs.harness = HarnessTasks(config.lm_eval, config.include_path)
    return inputs


def _find_problems(config: EvalConfig) -> tuple[Task, list[Problem]]:
    """Returns the task and its held-out problems. With `whole`, the problems that training sees follow."""
    task = load_task(config.task)
    questions = task.draw(config.seed, True)
    if config.whole:
        questions = chain(questions, task.draw(config.seed, False))
    problems = list(islice(questions, config.problems or DEFAULT_PROBLEMS))
    if len(problems) < (config.problems or 1):
        kind, fix = ("", "") if config.whole else ("held-out ", ", or take all questions by `whole`")
        raise UserError(
            f"`task`: {config.task} has {len(problems)} {kind}questions, not {config.problems or 1}: "
            f"lower `problems`{fix}"
        )
    task.accuracy(problems[0], task.demonstrate(problems[0]))  # shows now if scoring lacks a package
    return task, problems


def _pack(source: Source, tokenizer, context: int, whole: bool) -> PackedDataset:
    """Packs the whole text into rows, or only the part that training holds out."""
    if whole:
        return pack_all(source, tokenizer, context)
    _, held_out = pack_split(source, tokenizer, context)
    return held_out


def _measure_text(model, tokenizer, rows: Dataset, inputs: Inputs, config: EvalConfig) -> dict:
    chosen = choose_rows(rows, config.rows)
    score = score_text(model, chosen, tokenizer, config.batch_size, _autocast(inputs.precision))
    results = score.results() | {"context": inputs.context}
    tables.show_text(config.data, "whole" if config.whole else "held out", results)
    return results


def _measure_harness(model, tokenizer, inputs: Inputs, config: EvalConfig) -> dict:
    results = inputs.harness.run(model, tokenizer, config.limit, config.batch_size, _autocast(inputs.precision))
    tables.show_harness(results)
    return results


def _measure_task(engine: Engine, inputs: Inputs, config: EvalConfig) -> dict[str, dict]:
    task, problems = inputs.task, inputs.problems
    greedy, sampled = generate_answers(
        engine, problems, config.samples, config.temperature, config.max_new_tokens, config.seed
    )
    examples = [
        {"question": p.question, "answer": p.answer, "completion": c.text, "score": task.accuracy(p, c.text)}
        for p, c in zip(problems[:NUM_EXAMPLES], greedy[:NUM_EXAMPLES], strict=True)
    ]
    score = score_answers(task, problems, greedy, sampled, config.k)
    results = {"task": dataclasses.asdict(score) | {"examples": examples}}
    tables.show_task(config.task, config.temperature, results["task"])
    if config.speculation:
        results["drafts_task"] = _measure_drafts("greedy answers", greedy)
    return results


def _measure_drafts(what: str, completions: list) -> dict:
    results = dataclasses.asdict(DraftScore.of(completions))
    tables.show_drafts(what, results)
    return results


def _autocast(precision: ComputeSettings) -> torch.dtype | None:
    return precision.dtype if precision.autocast else None
