"""How many problems of a task a model solves: greedily, and at least once in k tries."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from tqdm import tqdm

from moonwhale.data.tasks import Problem, Task, is_well_formed
from moonwhale.errors import UserError
from moonwhale.infer.engine import Completion, Engine


@dataclass(frozen=True)
class AnswerScore:
    """Shares lie in [0, 1]; a pair is a mean over the problems and its standard error.

    greedy: problems solved by the likeliest tokens. pass_at: for each k, the chance to solve a problem in k samples.
    well_formed, cut_off: shares of samples that are one thought and one answer, and that were not finished.
    mean_tokens: of a sample.
    """

    problems: int
    samples: int
    greedy: tuple[float, float]
    pass_at: dict[int, tuple[float, float]]
    well_formed: float
    cut_off: float
    mean_tokens: float


def pass_at_k(n: int, c: int, k: int) -> float:
    """The chance that of k samples, drawn without replacement from n of which c are right, at least one is: the
    unbiased estimator of pass@k (Chen et al., arXiv 2107.03374, eq. 1).
    """
    return 1 - math.comb(n - c, k) / math.comb(n, k)


def answer(
    engine: Engine, problems: Sequence[Problem], samples: int, temperature: float, max_new_tokens: int, seed: int
) -> tuple[list[Completion], list[list[Completion]]]:
    """Each problem's greedy answer, and its samples, drawn from the model's whole distribution at that temperature.

    Raises:
        UserError: a question leaves no room for an answer in the model's context.
    """
    try:
        prompts = [engine.encode(problem.messages) for problem in problems]
    except UserError as error:
        raise UserError(f"`task`: {error}") from error
    greedy, sampled = {}, {}
    with tqdm(total=len(prompts) * (1 + samples), desc="task", unit=" answers", leave=False, disable=None) as bar:
        for i, completion in engine.as_completed(prompts, temperature=0.0, max_new_tokens=max_new_tokens):
            greedy[i] = completion
            bar.update()
        repeated = [prompt for prompt in prompts for _ in range(samples)]
        drawn = {"temperature": temperature, "min_p": 0.0, "max_new_tokens": max_new_tokens, "seed": seed}
        for i, completion in engine.as_completed(repeated, **drawn):
            sampled[i] = completion
            bar.update()
    numbers = range(len(prompts))
    return [greedy[i] for i in numbers], [[sampled[i * samples + j] for j in range(samples)] for i in numbers]


def score_answers(
    task: Task, problems: Sequence[Problem], greedy: Sequence[Completion], sampled: Sequence[Sequence[Completion]], ks
) -> AnswerScore:
    """What the answers are worth; of each problem one greedy one, and n samples, at least the largest of `ks`."""

    def right(problem: Problem, completion: Completion) -> bool:
        return task.accuracy(problem, completion.text) == 1

    n = len(sampled[0])
    solved = [sum(right(p, c) for c in own) for p, own in zip(problems, sampled, strict=True)]
    flat = [completion for own in sampled for completion in own]
    return AnswerScore(
        problems=len(problems),
        samples=n,
        greedy=_mean([right(p, c) for p, c in zip(problems, greedy, strict=True)]),
        pass_at={k: _mean([pass_at_k(n, c, k) for c in solved]) for k in ks},
        well_formed=sum(is_well_formed(c.text) for c in flat) / len(flat),
        cut_off=sum(c.finish_reason == "length" for c in flat) / len(flat),
        mean_tokens=sum(len(c.token_ids) for c in flat) / len(flat),
    )


def _mean(values: Sequence[float]) -> tuple[float, float]:
    """The mean of n values and its standard error, 0 of a single one."""
    n, mean = len(values), sum(values) / len(values)
    variance = sum((value - mean) ** 2 for value in values) / max(n - 1, 1)
    return mean, math.sqrt(variance / n)
