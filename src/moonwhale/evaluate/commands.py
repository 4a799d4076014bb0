"""`moonwhale eval`. Everything asked for is found first and measured then, so that a mistake costs no measurement."""

import dataclasses
import json
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path

from moonwhale import __version__, options
from moonwhale.data.hub_sets import DATA_HELP
from moonwhale.data.tasks import TASK_HELP
from moonwhale.errors import UserError
from moonwhale.infer.sampling_options import SamplingOptions
from moonwhale.options import option, require

AT_LEAST_ONE = ("rows", "batch_size", "problems", "samples", "limit")
PROBLEMS = 100  # of a task, if it has as many
SHOWN = 3  # greedy answers


@dataclass
class EvalConfig:
    """Every option of an evaluation.

    Raises:
        UserError: one line naming the option, its value and the fix.
    """

    data: str | None = option(None, DATA_HELP, group="text")
    data_split: str | None = option(None, "split of a hub set (train)", group="text")
    data_columns: list[str] | None = option(None, "columns of a hub set to read, as A,B", group="text")
    context: int | None = option(None, "tokens of a row (the model's)", group="text")
    rows: int | None = option(None, "rows to read, spread over all there are (all)", group="text")

    task: str | None = option(None, TASK_HELP, group="task")
    problems: int | None = option(None, f"problems to solve ({PROBLEMS}, or as many as there are)", group="task")
    samples: int = option(4, "answers drawn for each problem, beside the greedy one", group="task")
    k: list[int] | None = option(None, "of pass@k (those of 1,4,16 that --samples allow)", group="task")
    temperature: float = option(1.0, "of the samples; 1 is the model's own distribution", group="task")
    max_new_tokens: int = option(256, "longest answer", group="task")
    seed: int = option(0, "of the problems and the samples", group="task")

    lm_eval: list[str] | None = option(None, "tasks or groups of lm-eval, as A,B", group="lm-eval")
    include_path: str | None = option(None, "folder with tasks of your own, as YAML files", group="lm-eval")
    limit: int | None = option(None, "examples of each task (all)", group="lm-eval")

    whole: bool = option(
        False, "all of --data and all questions of --task, not only what training leaves out", group="general"
    )
    speculation: bool = option(False, "also how often MTP drafts hold, on --data and --task", group="general")
    batch_size: int = option(8, "rows at once", group="general")
    device: str = option("auto", "cpu, cuda, mps, or the best there is", group="general")
    precision: str = option("auto", "of the matrix products", group="general", choices=("auto", "fp32", "bf16"))
    json: str | None = option(None, "new file for the results and these settings", group="general")

    def __post_init__(self):
        if not (self.data or self.task or self.lm_eval):
            raise UserError("there is nothing to evaluate: give --data, --task or --lm-eval, or several of them")
        for name in AT_LEAST_ONE:
            value = getattr(self, name)
            require(self, name, value is None or value >= 1, "it must be at least 1")
        SamplingOptions(temperature=self.temperature, max_new_tokens=self.max_new_tokens, seed=self.seed)
        if not self.temperature:
            raise UserError("--temperature: 0 draws the greedy answer again and again: give a number above 0")
        self.k = self.k or [k for k in (1, 4, 16) if k <= self.samples]
        if not all(1 <= k <= self.samples for k in self.k):
            raise UserError(
                f"--k: {','.join(map(str, self.k))} does not fit --samples {self.samples}: give numbers from 1 to "
                f"{self.samples}, or more --samples"
            )
        if self.speculation and not (self.data or self.task):
            raise UserError("--speculation: drafts are measured on text or on answers: give --data or --task")
        if self.json and (Path(self.json).exists() or not Path(self.json).parent.is_dir()):
            raise UserError(f"--json: {self.json} is no new file in a folder that exists: name one")


def main(argv: list[str]) -> None:
    parser = options.Parser(prog="moonwhale eval", description="Measure what a trained model can do.")
    parser.add_argument("folder", metavar="CHECKPOINT", help="what a run wrote with --out")
    options.add_options(parser, EvalConfig)
    given, rest = options.read_argv(parser, EvalConfig, argv)
    config = EvalConfig(**given)
    results = evaluate(rest.folder, config)
    if config.json:
        settings = dataclasses.asdict(config)
        report = {"checkpoint": rest.folder, "moonwhale": __version__, "settings": settings, "results": results}
        options.write_whole(config.json, json.dumps(report, indent=1, ensure_ascii=False) + "\n")


def evaluate(folder: str, config: EvalConfig) -> dict[str, dict]:
    """Measures what `config` asks for, prints each result when it is there, and returns all of them, ready for JSON.

    Raises:
        UserError: one line, for anything the user can put right.
    """
    from moonwhale.checkpoint import open_checkpoint, read_config
    from moonwhale.data.loading import load_source
    from moonwhale.data.packing import pack_all, pack_split
    from moonwhale.evaluate import tables
    from moonwhale.evaluate.drafts import DraftScore, continue_text
    from moonwhale.evaluate.harness import HarnessTasks
    from moonwhale.evaluate.text import choose_rows, score_text
    from moonwhale.infer.engine import Engine
    from moonwhale.precision import choose

    model_config = read_config(Path(folder))
    context = config.context or model_config.max_position_embeddings
    if context > model_config.max_position_embeddings:
        raise UserError(
            f"--context: {context} is longer than the model's context of {model_config.max_position_embeddings}: "
            "give at most that"
        )
    if config.speculation and not model_config.num_nextn_predict_layers:
        raise UserError(f"--speculation: {folder} has no MTP modules, which could draft: leave it out")
    choice = choose(config.device, config.precision)
    task, problems = _problems(config) if config.task else (None, [])
    source = load_source(config.data, config.data_split, config.data_columns) if config.data else None
    harness = HarnessTasks(config.lm_eval, config.include_path) if config.lm_eval else None

    results: dict[str, dict] = {}
    print(f"{'checkpoint':<12}{folder}, on {choice.reason}", flush=True)
    if source or harness:
        model, tokenizer = open_checkpoint(folder)
        model.to(choice.device)
        how = {"batch_size": config.batch_size, "autocast": choice.dtype if choice.autocast else None}
        if source:
            pack = pack_all if config.whole else lambda *what: pack_split(*what)[1]
            text = pack(source, tokenizer, context)
            score = score_text(model, choose_rows(text, config.rows), tokenizer, **how)
            results["text"] = score.results() | {"context": context}
            tables.show_text(config.data, "whole" if config.whole else "held out", results["text"])
        if harness:
            results["lm_eval"] = harness.run(model, tokenizer, config.limit, **how)
            tables.show_harness(results["lm_eval"])
        del model
    if task or config.speculation:
        draft = model_config.num_nextn_predict_layers if config.speculation else None
        engine = Engine.load(folder, config.device, config.precision, draft=draft)
        if config.speculation and source:
            results["drafts_text"] = dataclasses.asdict(DraftScore.of(continue_text(engine, text)))
            tables.show_drafts("text", results["drafts_text"])
        if task:
            results |= _measure_answers(engine, task, problems, config)
    return results


def _measure_answers(engine, task, problems: list, config: EvalConfig) -> dict[str, dict]:
    from moonwhale.evaluate import tables
    from moonwhale.evaluate.drafts import DraftScore
    from moonwhale.evaluate.tasks import answer, score_answers

    greedy, sampled = answer(engine, problems, config.samples, config.temperature, config.max_new_tokens, config.seed)
    examples = [
        {"question": p.question, "answer": p.answer, "completion": c.text, "score": task.accuracy(p, c.text)}
        for p, c in zip(problems[:SHOWN], greedy[:SHOWN], strict=True)
    ]
    score = score_answers(task, problems, greedy, sampled, config.k)
    results = {"task": dataclasses.asdict(score) | {"examples": examples}}
    tables.show_answers(config.task, config.temperature, results["task"])
    if config.speculation:
        results["drafts_task"] = dataclasses.asdict(DraftScore.of(greedy))
        tables.show_drafts("greedy answers", results["drafts_task"])
    return results


def _problems(config: EvalConfig):
    """The task, and problems of it that training leaves out; with --whole, of those first, then of the others."""
    from moonwhale.data.tasks import load_task

    task = load_task(config.task)
    questions = task.draw(config.seed, True)
    if config.whole:
        questions = chain(questions, task.draw(config.seed, False))
    problems = list(islice(questions, config.problems or PROBLEMS))
    if len(problems) < (config.problems or 1):
        which = "" if config.whole else "held-out "
        raise UserError(
            f"--task: {config.task} has {len(problems)} {which}questions, not {config.problems or 1}: "
            "lower --problems" + ("" if config.whole else ", or take all questions by --whole")
        )
    task.accuracy(problems[0], task.demonstrate(problems[0]))  # a package that scoring lacks is missed now, not later
    return task, problems
