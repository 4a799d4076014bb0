"""The rewards of GRPO: right answers, DeepSeek-R1's form, the prompt's language, brevity, and functions of the user.

A reward is a function that TRL calls with keyword arguments. It returns a number for each completion, or None where it
does not apply. The arguments are lists with an entry for each completion:

- `prompts`: the messages that were answered;
- `completions`: the answer, as a list of one message;
- `completion_ids`: the answer's token ids;
- every column of the data: `answer`, the right answer, and `problem`, the index of the problem.

A user's own reward is such a function in a module of the working folder. With this in `mine.py`,
`--rewards accuracy,mine:short=0.1` adds it with a weight of 0.1:

    def short(completions, **_):
        return [1 / (1 + len(completion[0]["content"])) for completion in completions]

To add a built-in reward, write the function here and add it to BUILTIN_REWARDS. It also gets `task`, and `problems`, of
which `problem` is the index.
"""

import importlib
import inspect
import math
import os
import re
import sys
import unicodedata
from collections import defaultdict
from collections.abc import Callable, Sequence
from functools import partial

from moonwhale.data.tasks import Problem, Task, is_well_formed
from moonwhale.errors import UserError, did_you_mean, one_line

Reward = Callable[..., list[float]]


# ---- the built-in rewards


def accuracy(completions, problem, *, task: Task, problems: Sequence[Problem], log_metric=None, **_) -> list[float]:
    """DeepSeek-R1's accuracy reward: 1 for a right answer, otherwise 0.

    Logs as `over_limit` the share of answers that got 0 because scoring them takes too long or too much memory.
    """
    answered = [(problems[i], text_of(c)) for i, c in zip(problem, completions, strict=True)]
    scores = [task.accuracy(*pair) for pair in answered]
    if log_metric:
        log_metric("over_limit", sum(task.ran_out(*pair) for pair in answered) / len(answered))
    return scores


def well_formed(completions, **_) -> list[float]:
    """DeepSeek-R1's format reward: 1 for one thought followed by one answer, with nothing around them."""
    return [float(is_well_formed(text_of(completion))) for completion in completions]


def language(prompts, completions, **_) -> list[float]:
    """DeepSeek-R1's language-consistency reward (§2.3.2): the share of words in the prompt's language.

    The script of a word stands for its language; the prompt's language is the most frequent script in it. A completion
    without letters is consistent.
    """
    rewards = []
    for prompt, completion in zip(prompts, completions, strict=True):
        asked = [s for s in map(script_of, re.findall(r"\w+", prompt[-1]["content"])) if s]
        words = [s for s in map(script_of, re.findall(r"\w+", text_of(completion))) if s]
        target = max(dict.fromkeys(asked), key=asked.count, default=None)  # the first of equally frequent ones
        rewards.append(sum(s == target for s in words) / len(words) if words and target else 1.0)
    return rewards


def length(completions, completion_ids, problem, **columns) -> list[float]:
    """Kimi k1.5's length reward among the answers to the same problem (see `length_rewards`)."""
    right = accuracy(completions, problem, **columns)
    return length_rewards(right, [len(ids) for ids in completion_ids], problem)


BUILTIN_REWARDS: dict[str, Reward] = {
    "accuracy": accuracy,
    "format": well_formed,
    "language": language,
    "length": length,
}


def length_rewards(right: Sequence[float], lengths: Sequence[int], groups: Sequence) -> list[float]:
    """Computes Kimi k1.5's length reward (arXiv 2501.12599 §2.3.3).

    It falls linearly from 0.5 for the shortest answer of a group to -0.5 for the longest. A wrong answer gets 0 at
    most.
    """
    members = defaultdict(list)
    for group, length in zip(groups, lengths, strict=True):
        members[group].append(length)
    rewards = []
    for is_right, length, group in zip(right, lengths, groups, strict=True):
        shortest, longest = min(members[group]), max(members[group])
        value = 0.5 - (length - shortest) / (longest - shortest) if longest > shortest else 0.0
        rewards.append(value if is_right == 1 else min(0.0, value))
    return rewards


def script_of(word: str) -> str | None:
    """Returns the script of a word's first letter as Unicode names it (LATIN, CYRILLIC, CJK), None without letters."""
    for character in word:
        if character.isalpha():
            return unicodedata.name(character, "?").split()[0]
    return None


def text_of(completion: list[dict]) -> str:
    """Returns the text of a completion, which is a list of one message."""
    return completion[0]["content"]


# ---- from --rewards to functions


def load_rewards(spec: Sequence[str], task: Task, problems: Sequence[Problem]) -> tuple[list[Reward], list[float]]:
    """Returns the rewards that `--rewards NAME[=WEIGHT],…` names, and their weights, 1 by default.

    A name is one of BUILTIN_REWARDS, or `module:function` with a module that can be imported from the working folder.
    An exception in a reward becomes a UserError that names the reward, the prompt and the completion.

    Raises:
        UserError: a name is unknown, is given twice or cannot be imported; a weight is not a finite number.
    """
    rewards, weights = [], []
    for entry in spec:
        name, _, weight = entry.partition("=")
        if name in [reward.__name__ for reward in rewards]:
            raise UserError(f"`rewards`: {name} is given twice: add up its weights")
        weights.append(_parse_weight(name, weight or "1"))
        if ":" in name:
            reward = _import_reward(name)
        elif name in BUILTIN_REWARDS:
            reward = partial(BUILTIN_REWARDS[name], task=task, problems=problems)
        else:
            near = did_you_mean(name, BUILTIN_REWARDS)
            raise UserError(f"`rewards`: {name!r} is none of {', '.join(BUILTIN_REWARDS)}{near}, nor a module:function")
        rewards.append(_with_checks(name, reward))
    if not rewards:
        raise UserError(f"`rewards`: give at least one of {', '.join(BUILTIN_REWARDS)}, or module:function")
    return rewards, weights


def _parse_weight(name: str, text: str) -> float:
    try:
        weight = float(text)
    except ValueError:
        weight = math.nan
    if not math.isfinite(weight):
        raise UserError(f"`rewards`: the weight of {name} is {text!r}: give a finite number")
    return weight


def _import_reward(name: str) -> Reward:
    module, _, function = name.partition(":")
    if os.getcwd() not in sys.path:  # `python -m` adds the working folder too
        sys.path.insert(0, os.getcwd())
    try:
        reward = getattr(importlib.import_module(module), function)
    except Exception as error:  # importing runs the user's code
        raise UserError(f"`rewards`: cannot import {name}: {one_line(error)}") from error
    if not callable(reward) or inspect.iscoroutinefunction(reward):
        raise UserError(f"`rewards`: {name} is not a plain function")
    return reward


def _with_checks(name: str, reward: Reward) -> Reward:
    """Wraps a reward so that it raises UserError if it fails or returns something else than numbers."""

    def checked(prompts, completions, completion_ids, **columns) -> list[float]:
        given = {"prompts": prompts, "completions": completions, "completion_ids": completion_ids, **columns}
        try:
            values = reward(**given)
        except Exception as error:
            at = _find_failing(reward, given, len(prompts))
            raised = f"{type(error).__name__} ({one_line(error)})"
            raise UserError(f"`rewards`: {name} raised {raised} {_describe(prompts, completions, at)}") from error
        if hasattr(values, "tolist"):  # an array of NumPy or a tensor
            values = values.tolist()
        if not isinstance(values, list | tuple) or len(values) != len(prompts):
            raise UserError(f"`rewards`: {name} must return a list of {len(prompts)} numbers, one for each completion")
        numbers = [_number(value) for value in values]
        for at, number in enumerate(numbers):
            # TRL leaves out a reward that is None for a completion.
            if number is not None and not math.isfinite(number):
                raise UserError(f"`rewards`: {name} returned {values[at]!r} {_describe(prompts, completions, at)}")
        return numbers

    checked.__name__ = name  # TRL logs the reward under this name
    return checked


def _number(value) -> float | None:
    """Returns a reward as a float: numbers of Python, NumPy and torch. None stays None, anything else becomes NaN."""
    if value is None:
        return None
    try:
        return math.nan if isinstance(value, str | bytes) else float(value)
    except (TypeError, ValueError, OverflowError, RuntimeError):
        return math.nan


def _find_failing(reward: Reward, given: dict, n: int) -> int | None:
    """Returns the index of the first completion on which a reward raises when it is scored alone, or None."""
    for i in range(n):
        alone = {k: [v[i]] if isinstance(v, list) and len(v) == n else v for k, v in given.items()}
        try:
            reward(**alone)
        except Exception:
            return i
    return None


def _describe(prompts: list, completions: list, at: int | None) -> str:
    """Describes the prompt and completion with index `at`, for a message."""
    if at is None:
        return f"on a batch of {len(prompts)} completions, though on none of them alone"
    return f"on prompt {one_line(prompts[at][-1]['content'])!r}, completion {one_line(text_of(completions[at]))!r}"
