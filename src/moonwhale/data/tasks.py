"""Tasks with answers that a rule can check: questions, right answers, demonstrations, and scores.

A completion has DeepSeek-R1's form (arXiv 2501.12948 §2.2): `<think>…</think>`, then `<answer>…</answer>`.
"""

import contextlib
import hashlib
import importlib.metadata
import importlib.util
import itertools
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from moonwhale.data import gym_answers
from moonwhale.data.answers import normalize, same_answer
from moonwhale.data.json_rows import json_lines
from moonwhale.data.row_formats import BadRow
from moonwhale.data.source import Document, Source, digest
from moonwhale.errors import UserError, did_you_mean, one_line, require_package
from moonwhale.files import parse_json

HELD_OUT_QUESTIONS = 0.1  # the share of a task's questions that are held out, by the hash of their text
DEMONSTRATIONS = 10_000  # the default size of `--data task:SPEC`
# The tasks of reasoning-gym that cannot be used, with what they do.
UNUSABLE = {
    "acre": "builds all its questions at once, which takes gigabytes",
    "game_of_life_halting": "scores every answer as right",
}
MOST_SEEDS = 2**31  # of a task of reasoning-gym; larger ones would repeat the questions of smaller ones
MAX_VAIN_DRAWS = 1000  # a task is exhausted after so many questions in a row from the wrong side of the split
MOST_OF_ANSWER = 1 << 14  # characters of a right answer in a file
TAGS = ("<think>", "</think>", "<answer>", "</answer>")
WELL_FORMED = re.compile(r"\s*<think>(.*?)</think>\s*<answer>(.*?)</answer>\s*", re.DOTALL)
# The help text of --task, in every verb that has it.
TASK_HELP = "a task of reasoning-gym, as chain_sum:max_terms=3; gsm8k; or a .jsonl file of questions and answers"


@dataclass(frozen=True)
class Problem:
    """A question with its right answer. `entry` holds what else the task's `score` and `steps` need."""

    question: str
    answer: str
    entry: dict

    @property
    def messages(self) -> list[dict]:
        """The prompt: the question as the user's message."""
        return [{"role": "user", "content": self.question}]


@dataclass(frozen=True)
class Task:
    """A source of problems with a rule to score answers.

    `draw(seed, held_out)` yields the problems of one side of the split. `score(problem, answer)` is 1 for a right
    answer, 0 for a wrong one, and None for one that exceeds the limits of time or memory. `steps(problem)` is the
    reasoning of a solution, or "" if the task knows none. `package` is the name and version of the package that makes
    the questions, or "" if they are read. `overran` keeps the questions and answers that exceeded the limits.
    """

    name: str
    draw: Callable[[int, bool], Iterator[Problem]]
    score: Callable[[Problem, str], float | None]
    steps: Callable[[Problem], str]
    package: str = ""
    overran: set[tuple[str, str]] = field(default_factory=set, compare=False)

    def problems(self, n: int, seed: int = 0, held_out: bool = False) -> list[Problem]:
        """Returns the first `n` problems of a seed. No question is ever both in training and held out.

        Raises:
            UserError: the task has fewer questions.
        """
        found = list(itertools.islice(self.draw(seed, held_out), n))
        if len(found) < n:
            side = "held-out" if held_out else "training"
            raise UserError(f"`task`: {self.name} has {len(found)} {side} questions, not {n}: ask for fewer")
        return found

    def demonstrate(self, problem: Problem) -> str:
        """Returns a well-formed right completion, for a cold start.

        Raises:
            UserError: the task can score answers, but knows no right one.
        """
        if not problem.answer:
            raise UserError(f"`data`: {self.name} has no right answers to show: choose another task")
        return f"<think>{self.steps(problem)}</think>\n<answer>{problem.answer}</answer>"

    def accuracy(self, problem: Problem, completion: str) -> float:
        """Scores the answer in a completion. Without an answer, or with one that exceeds the limits, it scores 0."""
        answer = extract_answer(completion)
        if answer is None or (problem.question, answer) in self.overran:
            return 0.0
        score = self.score(problem, answer)
        if score is None:
            self.overran.add((problem.question, answer))
        return score or 0.0

    def ran_out(self, problem: Problem, completion: str) -> bool:
        """Whether `accuracy` scored a completion 0 because its answer exceeded the limits of time or memory."""
        return (problem.question, extract_answer(completion)) in self.overran


def is_held_out(question: str) -> bool:
    """Whether a question belongs to evaluation. Its text alone decides, not the seed."""
    return int.from_bytes(hashlib.sha256(question.encode()).digest()[:8]) < HELD_OUT_QUESTIONS * 2**64


def extract_answer(completion: str) -> str | None:
    """Returns the text between the last `<answer>` and `</answer>`, or None without such a pair."""
    end = completion.rfind("</answer>") + len("</answer>")  # without it, each unclosed tag would be searched to the end
    found = re.findall(r"<answer>(.*?)</answer>", completion[:end], re.DOTALL)
    return found[-1].strip() if found else None


def is_well_formed(completion: str) -> bool:
    """Whether a completion is one thought followed by one answer, and nothing else."""
    return all(completion.count(tag) == 1 for tag in TAGS) and bool(WELL_FORMED.fullmatch(completion))


def load_task(spec: str) -> Task:
    """Returns the task that `--task SPEC` names.

    Args:
        spec: a task of reasoning-gym with its settings, as `chain_sum:max_terms=3`; `gsm8k`, from the hub; or a JSONL
            file of {"question", "answer"}. Answers of the last two are compared as text, then as mathematics.

    Raises:
        UserError: the task, its file or the package that it needs cannot be found or read.
    """
    name, *settings = spec.split(":")
    if name.endswith(".jsonl") or "/" in name:
        return _file_task(Path(spec))
    if name != "gsm8k":
        return _gym_task(spec, name, settings)
    if settings:
        raise UserError(f"`task`: gsm8k has no settings, such as {settings[0]}")
    require_package("math_verify", "rl", "`task`")
    return Task(spec, _draw_gsm8k, _same_answer, lambda problem: problem.entry["steps"])


def demonstration_source(spec: str, limit: int | None = None) -> Source:
    """Returns the source of `--data task:SPEC`: conversations of a training question and its demonstration."""
    name, n = spec.removeprefix("task:"), limit or DEMONSTRATIONS
    with _renamed("task", "data"):
        task = load_task(name)

    def read() -> Iterator[Document]:
        with _renamed("task", "data"):
            for problem in itertools.islice(task.draw(0, False), n):
                yield [*problem.messages, {"role": "assistant", "content": task.demonstrate(problem)}]

    path = Path(name)
    modified = path.stat().st_mtime_ns if path.is_file() else None
    return Source(spec, digest(spec, n, modified, task.package), read, n)


@contextlib.contextmanager
def _renamed(option: str, given: str):
    """Context in which errors that name `option` name the option `given` instead, by which the value was given."""
    try:
        yield
    except UserError as error:
        raise UserError(str(error).replace(f"`{option}`", f"`{given}`")) from error


# ---- tasks of reasoning-gym


def _gym_task(spec: str, name: str, settings: list[str]) -> Task:
    require_package("reasoning_gym", "rl", "`task`")
    import reasoning_gym as gym

    options = _gym_options(spec, name, settings)
    if name in UNUSABLE:
        raise UserError(f"`task`: {name} {UNUSABLE[name]}: choose another task")

    def build(seed: int):
        # Question i has the seed `seed + i`, so two adjacent seeds would share all questions but one.
        return gym.create_dataset(name, seed=seed * 1_000_003 % MOST_SEEDS, size=gym_answers.QUESTIONS, **options)

    def draw(seed: int, held_out: bool) -> Iterator[Problem]:
        if seed >= MOST_SEEDS:
            raise UserError(f"`seed`: {seed} is impossible: a task of reasoning-gym takes seeds below 2^31")
        questions, in_vain = build(seed), 0
        for i in range(len(questions)):
            entry = questions[i]
            in_vain += 1
            if is_held_out(entry["question"]) == held_out:
                in_vain = 0
                yield Problem(entry["question"], entry["answer"] or "", entry)  # some tasks have only a scorer
            elif in_vain == MAX_VAIN_DRAWS:
                return

    try:
        build(0)
    except Exception as error:  # each task checks its settings in its own way
        reason = one_line(error) or "impossible settings"
        raise UserError(f"`task`: {spec}: {reason}: change its settings, or choose another task") from error

    def score(problem: Problem, answer: str) -> float | None:
        value = gym_answers.score_answer(name, options, problem.entry, answer)
        # Only 1 is right: the gym also gives a little for answers that merely contain the right one.
        return None if value is None else float(value == 1)

    return Task(spec, draw, score, _running_sums, f"reasoning-gym {importlib.metadata.version('reasoning-gym')}")


def _gym_options(spec: str, name: str, settings: list[str]) -> dict:
    """Parses settings such as `max_terms=3`, and checks them against the task's fields."""
    from reasoning_gym.factory import DATASETS

    if name not in DATASETS:
        near = did_you_mean(name, [*DATASETS, "gsm8k"])
        raise UserError(f"`task`: {name!r} is no task of reasoning-gym{near}, nor gsm8k or a .jsonl file")
    known = [field for field in DATASETS[name][1].__dataclass_fields__ if field not in ("seed", "size")]
    options = {}
    for setting in settings:
        key, equals, value = setting.partition("=")
        if not equals or key not in known:
            raise UserError(f"`task`: {spec}: {setting!r} is no setting of {name}: it has {', '.join(known)}")
        with contextlib.suppress(ValueError, RecursionError):  # a value that is not JSON is text
            value = parse_json(value)
        options[key] = value
    return options


def _running_sums(problem: Problem) -> str:
    """Solves a sum term by term, "4 - 1 = 3; 3 + 7 = 10". Returns "" for other problems."""
    expression = problem.entry["metadata"].get("expression", "")
    if not re.fullmatch(r"\d+( [+-] \d+)+", expression):
        return ""
    first, *rest = expression.split()
    total, steps = int(first), []
    for sign, term in zip(rest[::2], rest[1::2], strict=True):
        after = total + int(term) if sign == "+" else total - int(term)
        steps.append(f"{total} {sign} {term} = {after}")
        total = after
    return "; ".join(steps)


# ---- GSM8K, and a user's own questions


def _draw_gsm8k(seed: int, held_out: bool) -> Iterator[Problem]:
    import datasets

    from moonwhale.data.hub import explain_load_failure

    try:
        rows = datasets.load_dataset("openai/gsm8k", "main", split="test" if held_out else "train")
    except Exception as error:  # offline, moved, no space: each has its own class
        raise UserError(explain_load_failure("gsm8k", "openai/gsm8k", None, error, "task")) from error
    for row in rows.shuffle(seed=seed):
        steps, _, answer = row["answer"].rpartition("####")
        steps = re.sub(r"<<.*?>>", "", steps).strip()  # drops the annotations for a calculator
        yield Problem(row["question"], answer.strip().replace(",", ""), {"steps": steps})


def _file_task(path: Path) -> Task:
    require_package("math_verify", "rl", "`task`")
    problems: list[Problem] = []
    with _renamed("data", "task"):
        for row in json_lines(path):
            if row is not None:
                problems.append(_read_problem(row, f"`task`: {path}, object {len(problems) + 1}"))

    def draw(seed: int, held_out: bool) -> Iterator[Problem]:
        def order(problem: Problem) -> bytes:
            return hashlib.sha256(f"{seed} {problem.question}".encode()).digest()

        return iter(sorted((p for p in problems if is_held_out(p.question) == held_out), key=order))

    return Task(str(path), draw, _same_answer, lambda problem: problem.entry["steps"])


def _read_problem(row: dict | BadRow, where: str) -> Problem:
    """Makes a problem of a row. Raises UserError, which begins with `where`, if the row is none."""
    if isinstance(row, BadRow):
        raise UserError(f"{where}: it is {row.reason} ({row.culprit}): write one object per line")
    question, answer, steps = map(row.get, ("question", "answer", "steps"))
    if not all(isinstance(text, str) and text.strip() for text in (question, answer)):
        raise UserError(f'{where}: it needs "question" and "answer", both text')
    if len(answer) > MOST_OF_ANSWER:
        raise UserError(f"{where}: its answer has more than {MOST_OF_ANSWER:,} characters: shorten it")
    steps = steps if isinstance(steps, str) else ""
    if any("\ud800" <= character <= "\udfff" for text in (question, answer, steps) for character in text):
        raise UserError(f"{where}: it is not UTF-8, or has half of a surrogate pair, which is no text: write the whole")
    if normalize(extract_answer(f"<answer>{answer}</answer>")) != normalize(answer):
        raise UserError(f"{where}: its answer holds the tags of an answer: remove them")
    return Problem(question, answer, {"steps": steps})


def _same_answer(problem: Problem, answer: str) -> float | None:
    """Scores 1 if both answers are the same text or the same mathematical expression, None if that exceeds a limit."""
    same = same_answer(problem.answer, answer)
    return None if same is None else float(same)
