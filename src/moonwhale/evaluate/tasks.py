"""Measures how many problems of a task a model solves: with its greedy answer, and in at least one of k samples."""

import math
from collections.abc import Sequence
from itertools import chain

from tqdm import tqdm

from moonwhale.data.tasks import Problem, Task, is_well_formed
from moonwhale.errors import UserError
from moonwhale.infer.engine import Completion, Engine


def pass_at_k(n: int, c: int, k: int) -> float:
    """Returns the unbiased estimate of pass@k from n samples of which c are right.

    It is the probability that k samples, drawn without replacement from the n, hold at least one right one (Chen et
    al., arXiv 2107.03374, eq. 1).
    """
    return 1 - math.comb(n - c, k) / math.comb(n, k)


def generate_answers(
    engine: Engine, problems: Sequence[Problem], samples: int, temperature: float, max_new_tokens: int, seed: int
) -> tuple[list[Completion], list[list[Completion]]]:
    """Returns each problem's greedy answer, and its samples from the model's whole distribution at `temperature`.

    Raises:
        UserError: a question leaves no room for an answer in the model's context.
    """
    try:
        prompts = [engine.encode(problem.messages) for problem in problems]
    except UserError as error:
        raise UserError(f"`task`: {error}") from error
    n = len(prompts)
    repeated = [prompt for prompt in prompts for _ in range(samples)]
    options = {"temperature": temperature, "min_p": 0.0, "max_new_tokens": max_new_tokens, "seed": seed}
    answers = chain(
        engine.as_completed(prompts, temperature=0.0, max_new_tokens=max_new_tokens),
        engine.as_completed(repeated, **options),
    )
    done = list(tqdm(answers, desc="task", total=n * (1 + samples), unit=" answers", leave=False, disable=None))
    greedy, sampled = dict(done[:n]), dict(done[n:])
    return [greedy[i] for i in range(n)], [[sampled[i * samples + j] for j in range(samples)] for i in range(n)]


def score_answers(
    task: Task,
    problems: Sequence[Problem],
    greedy: Sequence[Completion],
    sampled: Sequence[Sequence[Completion]],
    ks: Sequence[int],
) -> dict:
    """Scores one greedy answer and n samples for each problem. n must be at least the largest of `ks`.

    Returns:
        problems, samples: number of problems, and of samples for each.
        greedy: share of problems that the greedy answer solves.
        pass_at: for each k, the probability that at least one of k samples solves a problem.
        well_formed: share of samples that are one thought followed by one answer.
        cut_off: share of samples that reached their longest length.
        over_limit: number of all answers that count as wrong because scoring them takes too long or too much memory.
        mean_tokens: mean length of a sample.

        `greedy` and each value of `pass_at` are a mean over problems and its standard error.
    """

    def is_right(problem: Problem, completion: Completion) -> bool:
        return task.accuracy(problem, completion.text) == 1

    n = len(sampled[0])
    num_right = [sum(is_right(p, c) for c in own) for p, own in zip(problems, sampled, strict=True)]
    greedy_right = [is_right(p, c) for p, c in zip(problems, greedy, strict=True)]
    all_samples = [completion for own in sampled for completion in own]
    return {
        "problems": len(problems),
        "samples": n,
        "greedy": _mean_and_error(greedy_right),
        "pass_at": {k: _mean_and_error([pass_at_k(n, c, k) for c in num_right]) for k in ks},
        "well_formed": sum(is_well_formed(c.text) for c in all_samples) / len(all_samples),
        "cut_off": sum(c.finish_reason == "length" for c in all_samples) / len(all_samples),
        "over_limit": sum(
            task.ran_out(p, c.text) for p, g, own in zip(problems, greedy, sampled, strict=True) for c in [g, *own]
        ),
        "mean_tokens": sum(len(c.token_ids) for c in all_samples) / len(all_samples),
    }


def _mean_and_error(values: Sequence[float]) -> tuple[float, float]:
    """Returns the mean of the values and its standard error, which is 0 for a single value."""
    n, mean = len(values), sum(values) / len(values)
    variance = sum((value - mean) ** 2 for value in values) / max(n - 1, 1)
    return mean, math.sqrt(variance / n)
