"""The verb `moonwhale sample`: collects a model's own right answers, to fine-tune on them.

This is the rejection sampling of DeepSeek-R1 (arXiv 2501.12948 §2.3.3).
"""

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from moonwhale import options
from moonwhale.data.tasks import TASK_HELP, Problem, Task, is_well_formed, load_task
from moonwhale.errors import UserError
from moonwhale.files import expanded, write_whole
from moonwhale.infer.commands import PRECISIONS
from moonwhale.infer.sampling_options import SamplingOptions, require_answers_that_fit
from moonwhale.options import DEVICES, option, require_at_least_one
from moonwhale.outputs import new_file
from moonwhale.reports import add_json, reporting
from moonwhale.yaml_files import to_yaml


@dataclass
class SampleOptions:
    """The options of rejection sampling.

    Raises:
        UserError: an option is impossible. The message names the option, its value and the fix.
    """

    checkpoint: str | None = option(None, "folder of the model that answers", group="positional")
    task: str = option("chain_sum", TASK_HELP, group="task")
    questions: int = option(1000, "training questions to ask", group="task")
    out: str | None = option(None, "new .jsonl file for the conversations", group="answers")
    samples: int = option(4, "answers drawn for each question", group="answers")
    temperature: float = option(1.0, "sampling temperature", group="answers")
    max_new_tokens: int = option(256, "maximum length of an answer", group="answers")
    seed: int = option(0, "seed of the questions and the answers", group="answers")
    device: str = option("auto", "cpu, cuda or mps; auto takes the fastest", group="device", suggestions=DEVICES)
    precision: str = option(
        "auto", "precision of the weights: auto, fp32, bf16 or int8", group="device", suggestions=PRECISIONS
    )

    def __post_init__(self):
        if self.checkpoint is None:
            raise UserError("CHECKPOINT: name the folder of the model that answers")
        self.checkpoint, self.out = expanded(self.checkpoint), expanded(self.out)
        if self.out is None or not self.out.endswith(".jsonl"):
            raise UserError(f"`out`: {self.out!r} is not a .jsonl file: name one for the conversations")
        require_at_least_one(self, "questions", "samples")
        require_answers_that_fit("questions", self.questions, self.samples)
        SamplingOptions(temperature=self.temperature, max_new_tokens=self.max_new_tokens, seed=self.seed)
        if not self.temperature and self.samples > 1:
            raise UserError(
                "`temperature`: 0 draws the greedy answer again and again: give a number above 0, or `samples` 1"
            )


def main(argv: list[str]) -> None:
    parser = options.Parser(
        prog="moonwhale sample",
        description="Let a model answer questions several times, and keep its right and well-formed answers.",
        examples=(
            "moonwhale sample runs/counts --task chain_sum --out runs/answers.jsonl",
            "moonwhale sample runs/thinks --task gsm8k --samples 16 --out runs/gsm8k.jsonl",
        ),
    )
    options.add_options(parser, SampleOptions)
    add_json(parser)
    given, arguments = options.read_argv(parser, SampleOptions, argv)
    with reporting(arguments.json) as show:
        show(sample(SampleOptions(**given)))


def sample(config: SampleOptions) -> dict:
    """Draws answers and writes the right ones to `config.out`, one line {"messages": […]} for each distinct answer.

    `record_of` names the file that gets the options.

    Returns:
        the file, and the numbers of answers drawn and kept, of those that count as wrong because scoring them takes too
        long or too much memory, and of questions asked and solved.

    Raises:
        UserError: no answer was right, or as `load_task` and `Engine.load` do.
    """
    with new_file(Path(config.out), "out"):
        return _sample(config)


def _sample(config: SampleOptions) -> dict:
    task = load_task(config.task)
    problems = task.problems(config.questions, config.seed)
    kept, n_over = draw_right_answers(config, task, problems)
    n_kept, n_drawn = sum(map(len, kept)), config.samples * len(problems)
    if not n_kept:
        raise UserError(
            f"`task`: {config.checkpoint} answered none of {len(problems)} questions correctly: train it more"
        )
    conversations = [
        [*problem.messages, {"role": "assistant", "content": answer}]
        for problem, answers in zip(problems, kept, strict=True)
        for answer in sorted(answers)
    ]
    write_whole(record_of(config.out), to_yaml(asdict(config), "The options of `moonwhale sample`"))
    lines = [json.dumps({"messages": messages}, ensure_ascii=False) + "\n" for messages in conversations]
    write_whole(config.out, "".join(lines))
    solved = sum(map(bool, kept))
    print(f"kept {n_kept:,} of {n_drawn:,} answers, to {solved:,} of {len(problems):,} questions: {config.out}")
    if n_over:
        print(f"{n_over:,} answers count as wrong: scoring them takes too long or too much memory")
    counts = {"drawn": n_drawn, "kept": n_kept, "over_limit": n_over, "questions": len(problems), "solved": solved}
    return {"out": config.out, **counts}


def record_of(out: str) -> Path:
    """Returns the path of the options that a file of answers was drawn with."""
    return Path(f"{out}.yaml")


def draw_right_answers(config: SampleOptions, task: Task, problems: list[Problem]) -> tuple[list[set[str]], int]:
    """Draws `config.samples` answers to each problem.

    Returns:
        each problem's set of right, well-formed answers, and the number of answers that exceeded a limit of scoring.
    """
    from tqdm import tqdm

    from moonwhale.infer.engine import Engine

    engine = Engine.load(config.checkpoint, config.device, config.precision)
    prompts = [engine.encode(problem.messages) for problem in problems for _ in range(config.samples)]
    sampling = {"temperature": config.temperature, "min_p": 0.0, "max_new_tokens": config.max_new_tokens}
    kept: list[set[str]] = [set() for _ in problems]
    n_over = 0
    with tqdm(total=len(prompts), desc="answers", leave=False, disable=None) as bar:
        for i, completion in engine.as_completed(prompts, **sampling, seed=config.seed):
            bar.update()
            at = i // config.samples
            if is_well_formed(completion.text) and task.accuracy(problems[at], completion.text) == 1:
                kept[at].add(completion.text)
            n_over += task.ran_out(problems[at], completion.text)
    return kept, n_over
