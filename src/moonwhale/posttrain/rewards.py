"""What GRPO rewards: right answers, DeepSeek-R1's form, its language, brevity, and functions of a user's own.

A reward takes what TRL gives (prompts, completions, completion_ids and the columns of the data) and returns a number
for each completion. Prompts and completions are lists of messages.
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

from moonwhale.data.tasks import Problem, Task, is_well_formed
from moonwhale.errors import UserError, did_you_mean, one_line

Reward = Callable[..., list[float]]
OURS = ("accuracy", "format", "language", "length")


def load_rewards(spec: Sequence[str], task: Task, problems: Sequence[Problem]) -> tuple[list[Reward], list[float]]:
    """The rewards that `--rewards NAME[=WEIGHT],…` names, and their weights (1 if not given).

    `accuracy` and `length` score completions of `problems`, of which the data's column `problem` has the index. A name
    with a colon is a `module:function`, of a module that can be imported from here.

    Raises:
        UserError: a name that is unknown, twice there or cannot be imported, a weight that is no number.
    """
    rewards, weights = [], []
    for entry in spec:
        name, _, weight = entry.partition("=")
        try:
            weights.append(float(weight or 1))
        except ValueError:
            raise UserError(f"`rewards`: the weight of {name} is {weight!r}, which is not a number") from None
        if not math.isfinite(weights[-1]):
            raise UserError(f"`rewards`: the weight of {name} is {weight!r}: give a finite number")
        if name in [reward.__name__ for reward in rewards]:
            raise UserError(f"`rewards`: {name} stands there twice: add up its weights")
        rewards.append(_checked(name, _find(name, task, problems)))
    if not rewards:
        raise UserError(f"`rewards`: give at least one of {', '.join(OURS)}, or module:function")
    return rewards, weights


def _find(name: str, task: Task, problems: Sequence[Problem]) -> Reward:
    def accuracy(completions, problem, **_) -> list[float]:
        """R1's accuracy reward: 1 for a right answer, 0 else."""
        return [task.accuracy(problems[i], text_of(c)) for i, c in zip(problem, completions, strict=True)]

    def length(completions, completion_ids, problem, **_) -> list[float]:
        right = accuracy(completions, problem)
        return length_rewards(right, [len(ids) for ids in completion_ids], problem)

    ours = {"accuracy": accuracy, "format": form, "language": language, "length": length}
    if ":" not in name:
        if name not in ours:
            near = did_you_mean(name, OURS)
            raise UserError(f"`rewards`: {name!r} is none of {', '.join(OURS)}{near}, nor a module:function")
        return ours[name]
    module, _, function = name.partition(":")
    if os.getcwd() not in sys.path:  # as `python -m` would have it
        sys.path.insert(0, os.getcwd())
    try:
        found = getattr(importlib.import_module(module), function)
    except Exception as error:  # whatever the module does when it is imported
        raise UserError(f"`rewards`: cannot import {name}: {one_line(error)}") from error
    if not callable(found) or inspect.iscoroutinefunction(found):
        raise UserError(f"`rewards`: {name} is no plain function")
    return found


def _checked(name: str, reward: Reward) -> Reward:
    """The reward, whose failures name it, the prompt and the completion."""

    def checked(prompts, completions, completion_ids, **columns) -> list[float]:
        given = {"prompts": prompts, "completions": completions, "completion_ids": completion_ids, **columns}
        try:
            values = reward(**given)
        except Exception as error:
            at = _culprit(reward, given, len(prompts))
            raise UserError(f"`rewards`: {name} raised {_kind(error)} {_on(prompts, completions, at)}") from error
        if not isinstance(values, list | tuple) or len(values) != len(prompts):
            raise UserError(f"`rewards`: {name} must return a list of {len(prompts)} numbers, one for each completion")
        for at, value in enumerate(values):
            # None says that the reward does not apply, which TRL knows.
            if value is not None and (not isinstance(value, int | float) or not math.isfinite(value)):
                raise UserError(f"`rewards`: {name} returned {value!r} {_on(prompts, completions, at)}")
        return list(values)

    checked.__name__ = name  # which TRL logs
    return checked


def _culprit(reward: Reward, given: dict, n: int) -> int | None:
    """The completion that makes a reward raise when it is scored alone; None if none does."""
    for i in range(n):
        alone = {k: [v[i]] if isinstance(v, list) and len(v) == n else v for k, v in given.items()}
        try:
            reward(**alone)
        except Exception:
            return i
    return None


def _kind(error: Exception) -> str:
    return f"{type(error).__name__} ({one_line(error)})"


def _on(prompts: list, completions: list, at: int | None) -> str:
    if at is None:
        return f"on a batch of {len(prompts)} completions, though on none of them alone"
    return f"on prompt {one_line(prompts[at][-1]['content'])!r}, completion {one_line(text_of(completions[at]))!r}"


def text_of(completion: list[dict]) -> str:
    return completion[0]["content"]


def form(completions, **_) -> list[float]:
    """R1's format reward: 1 for one thought and then one answer, with nothing around them."""
    return [float(is_well_formed(text_of(completion))) for completion in completions]


def language(prompts, completions, **_) -> list[float]:
    """R1's language-consistency reward (§2.3.2): the share of words in the prompt's language, told by their script.

    The script of most of the prompt's letters counts as its language; a completion without letters is consistent.
    """
    rewards = []
    for prompt, completion in zip(prompts, completions, strict=True):
        asked = [s for s in map(script_of, re.findall(r"\w+", prompt[-1]["content"])) if s]
        words = [s for s in map(script_of, re.findall(r"\w+", text_of(completion))) if s]
        target = max(set(asked), key=asked.count, default=None)
        rewards.append(sum(s == target for s in words) / len(words) if words and target else 1.0)
    return rewards


def script_of(word: str) -> str | None:
    """The script of a word's first letter, as Unicode names it (LATIN, CYRILLIC, CJK, …); None without letters."""
    for character in word:
        if character.isalpha():
            return unicodedata.name(character, "?").split()[0]
    return None


def length_rewards(right: Sequence[float], lengths: Sequence[int], groups: Sequence) -> list[float]:
    """Kimi k1.5's length reward (arXiv 2501.12599 §2.3.3): from 0.5 for the shortest of a group to −0.5 for the
    longest, and for a wrong answer never above 0.
    """
    members = defaultdict(list)
    for i, group in enumerate(groups):
        members[group].append(lengths[i])
    rewards = []
    for answer, length, group in zip(right, lengths, groups, strict=True):
        shortest, longest = min(members[group]), max(members[group])
        value = 0.5 - (length - shortest) / (longest - shortest) if longest > shortest else 0.0
        rewards.append(value if answer == 1 else min(0.0, value))
    return rewards
