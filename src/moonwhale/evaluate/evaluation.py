"""Carries out an evaluation. It finds everything that is asked for before it measures, so that mistakes show first."""

from itertools import islice
from pathlib import Path
from typing import Any

from moonwhale.checkpoint import open_checkpoint, read_config
from moonwhale.data.loading import load_source
from moonwhale.data.packing import choose_rows, pack_all, pack_split
from moonwhale.data.tasks import Problem, Task, load_task
from moonwhale.errors import UserError
from moonwhale.evaluate import tables
from moonwhale.evaluate.config import DEFAULT_PROBLEMS, EvalConfig
from moonwhale.evaluate.drafts import continue_text, score_drafts
from moonwhale.evaluate.harness import HarnessTasks
from moonwhale.evaluate.tasks import generate_answers, score_answers
from moonwhale.evaluate.text import score_text
from moonwhale.infer.decoder import require_latent_attention
from moonwhale.infer.engine import Engine
from moonwhale.precision import choose

LONGEST_ROW = 1 << 15  # tokens, if no context is given: attention takes time quadratic in it
NUM_EXAMPLES = 3  # greedy answers that the report shows


def evaluate(folder: str, config: EvalConfig) -> dict[str, dict[str, Any]]:
    """Measures what `config` asks for, and prints each result as soon as it is there.

    Returns the results, ready for JSON. Their keys are "text", "lm_eval", "drafts_text", "task" and "drafts_task".

    Raises:
        UserError: one line, for anything that the user can put right.
    """
    model_config = read_config(Path(folder))
    longest, num_mtp_modules = model_config.max_position_embeddings, model_config.num_nextn_predict_layers
    context = config.context or min(longest, LONGEST_ROW)
    if context > longest:
        raise UserError(f"`context`: {context} is longer than the model's context of {longest}: give at most that")
    if config.speculation and not num_mtp_modules:
        raise UserError(f"`speculation`: {folder} has no MTP modules, which would draft: leave it out")
    if config.task or config.speculation:
        require_latent_attention(model_config)
    precision = choose(config.device, config.precision)
    task, problems = _find_problems(config) if config.task else (None, [])
    source = load_source(config.data, config.data_split, config.data_columns) if config.data else None
    harness = HarnessTasks(config.lm_eval, config.include_path) if config.lm_eval else None

    print(f"{'checkpoint':<12}{folder}, on {precision.reason}", flush=True)
    results: dict[str, dict[str, Any]] = {}
    if source or harness:
        model, tokenizer = open_checkpoint(folder)
        model.to(precision.device)
        autocast = precision.dtype if precision.autocast else None
        if source:
            rows = pack_all(source, tokenizer, context) if config.whole else pack_split(source, tokenizer, context)[1]
            rows.context = min(context, max(rows.n_tokens, 2))  # a longer row would repeat the text
            scores = score_text(model, choose_rows(rows, config.rows), tokenizer, config.batch_size, autocast)
            results["text"] = scores | {"context": rows.context}
            tables.show_text(config.data, "whole" if config.whole else "held out", results["text"])
        if harness:
            results["lm_eval"] = harness.run(model, tokenizer, config.limit, config.batch_size, autocast)
            tables.show_harness(results["lm_eval"])
        del model

    if task or config.speculation:
        num_drafts = num_mtp_modules if config.speculation else None
        engine = Engine.load(folder, config.device, config.precision, draft=num_drafts)
        if config.speculation and source:
            results["drafts_text"] = score_drafts(continue_text(engine, rows))
            tables.show_drafts("text", results["drafts_text"])
        if task:
            results |= _measure_task(engine, task, problems, config)
    return results


def _find_problems(config: EvalConfig) -> tuple[Task, list[Problem]]:
    """Returns the task and its held-out problems. With `whole`, the problems that training sees follow."""
    task = load_task(config.task)
    wanted = config.problems or DEFAULT_PROBLEMS
    problems = list(islice(task.draw(config.seed, True), wanted))
    if config.whole:
        if len(problems) == wanted and not config.data:
            raise UserError(
                f"`whole`: it has no effect, since {config.task} has at least {wanted:,} held-out questions: "
                "leave it out"
            )
        problems += islice(task.draw(config.seed, False), wanted - len(problems))
    if len(problems) < (config.problems or 1):
        kind, fix = ("", "") if config.whole else ("held-out ", ", or take all questions by `whole`")
        raise UserError(
            f"`task`: {config.task} has {len(problems)} {kind}questions, not {config.problems or 1}: "
            f"lower `problems`{fix}"
        )
    return task, problems


def _measure_task(engine: Engine, task: Task, problems: list[Problem], config: EvalConfig) -> dict[str, dict]:
    greedy, sampled = generate_answers(
        engine, problems, config.samples, config.temperature, config.max_new_tokens, config.seed
    )
    examples = [
        {"question": p.question, "answer": p.answer, "completion": c.text, "score": task.accuracy(p, c.text)}
        for p, c in zip(problems[:NUM_EXAMPLES], greedy[:NUM_EXAMPLES], strict=True)
    ]
    scores = score_answers(task, problems, greedy, sampled, config.k)
    results = {"task": scores | {"examples": examples}}
    tables.show_task(config.task, config.temperature, results["task"])
    if config.speculation:
        results["drafts_task"] = score_drafts(greedy)
        tables.show_drafts("greedy answers", results["drafts_task"])
    return results
