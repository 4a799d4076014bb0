"""`moonwhale sample`: a model's own right answers, to fine-tune on (R1's rejection sampling, §2.3.3)."""

import json
from dataclasses import dataclass
from pathlib import Path

from moonwhale import options
from moonwhale.data.tasks import TASK_HELP
from moonwhale.errors import UserError
from moonwhale.infer.sampling_options import SamplingOptions
from moonwhale.options import option, require

AT_LEAST_ONE = ("questions", "samples")


@dataclass
class SampleOptions:
    """Every option of rejection sampling.

    Raises:
        UserError: one line naming the option, its value and the fix.
    """

    checkpoint: str | None = option(None, "folder of the model that answers", group="positional")
    task: str = option("chain_sum", TASK_HELP, group="task")
    questions: int = option(1000, "training questions to ask", group="task")
    out: str | None = option(None, "new file for the conversations, .jsonl", group="answers")
    samples: int = option(4, "answers drawn to each", group="answers")
    temperature: float = option(1.0, "of the draws", group="answers")
    max_new_tokens: int = option(256, "longest answer", group="answers")
    seed: int = option(0, "of the questions and the draws", group="answers")
    device: str = option("auto", "cpu, cuda, mps, or the best there is", group="device")
    precision: str = option("auto", "of the weights: auto, fp32, bf16 or int8", group="device")

    def __post_init__(self):
        if self.checkpoint is None:
            raise UserError("CHECKPOINT: name the folder of the model that answers")
        if self.out is None or not self.out.endswith(".jsonl"):
            raise UserError(f"`out`: {self.out!r} is no .jsonl file: name one for the conversations")
        for name in AT_LEAST_ONE:
            require(self, name, getattr(self, name) >= 1, "it must be at least 1")
        SamplingOptions(temperature=self.temperature, max_new_tokens=self.max_new_tokens, seed=self.seed)


def main(argv: list[str]) -> None:
    parser = options.Parser(
        prog="moonwhale sample",
        description="Let a model answer questions several times, and keep its right and well-formed answers.",
    )
    options.add_options(parser, SampleOptions)
    given, _ = options.read_argv(parser, SampleOptions, argv)
    sample(SampleOptions(**given))


def sample(config: SampleOptions) -> None:
    """Writes {"messages": […]}, a line for each right, well-formed answer that is no copy of another, to `config.out`.

    Raises:
        UserError: one line, for anything the user can put right; no answer was right.
    """
    if Path(config.out).exists():
        raise UserError(f"`out`: {config.out} is there already: name a new file")

    from tqdm import tqdm

    from moonwhale.data.tasks import is_well_formed, load_task
    from moonwhale.infer.engine import Engine

    task = load_task(config.task)
    problems = task.problems(config.questions, config.seed)
    engine = Engine.load(config.checkpoint, config.device, config.precision)
    prompts = [engine.encode(problem.messages) for problem in problems for _ in range(config.samples)]
    drawn = {"temperature": config.temperature, "min_p": 0.0, "max_new_tokens": config.max_new_tokens}
    kept: list[set[str]] = [set() for _ in problems]
    with tqdm(total=len(prompts), desc="answers", leave=False, disable=None) as bar:
        for i, completion in engine.as_completed(prompts, **drawn, seed=config.seed):
            problem = problems[i // config.samples]
            bar.update()
            if is_well_formed(completion.text) and task.accuracy(problem, completion.text) == 1:
                kept[i // config.samples].add(completion.text)
    n = sum(map(len, kept))
    if not n:
        raise UserError(
            f"`task`: {config.checkpoint} answered none of {len(problems)} questions rightly: train it more"
        )
    out = Path(config.out)
    out.parent.mkdir(parents=True, exist_ok=True)
    conversations = [
        [*problem.messages, {"role": "assistant", "content": answer}]
        for problem, answers in zip(problems, kept, strict=True)
        for answer in sorted(answers)
    ]
    lines = [json.dumps({"messages": messages}, ensure_ascii=False) + "\n" for messages in conversations]
    options.write_whole(out, "".join(lines))
    solved = sum(map(bool, kept))
    print(f"kept {n:,} of {len(prompts):,} answers, to {solved:,} of {len(problems):,} questions: {out}")
