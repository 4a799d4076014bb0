"""Tasks whose answers can be checked by rule: questions, demonstrations of how to answer them, and their scores.

An answer has DeepSeek-R1's form (arXiv 2501.12948 §2.2): `<think>…</think>`, then `<answer>…</answer>`.
"""

import contextlib
import hashlib
import importlib.util
import itertools
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from moonwhale.data.source import Document, Source, digest
from moonwhale.errors import UserError, did_you_mean, one_line

HELD_OUT = 0.1  # of a task's questions, by the hash of their text
DEMONSTRATIONS = 10_000  # of a task used as a source of data, if not told otherwise
QUESTIONS = 1_000_000  # that reasoning-gym is asked for; it makes each when it is read
TRIES = 1000  # questions drawn in vain before a task counts as exhausted
WELL_FORMED = re.compile(r"\s*<think>(.*?)</think>\s*<answer>(.*?)</answer>\s*", re.DOTALL)
# What the command lines say of --task.
TASK_HELP = "one of reasoning-gym's, as chain_sum:max_terms=3; gsm8k; or a .jsonl of questions and answers"
TAGS = ("<think>", "</think>", "<answer>", "</answer>")


@dataclass(frozen=True)
class Problem:
    """A question, its answer, and `entry`, what the task's scorer and demonstrator need beside them."""

    question: str
    answer: str
    entry: dict

    @property
    def messages(self) -> list[dict]:
        """What the model answers."""
        return [{"role": "user", "content": self.question}]


@dataclass(frozen=True)
class Task:
    """`draw(seed, held_out)` yields problems of one side; `score(problem, answer)` is 1 for right and 0 for wrong;
    `steps(problem)` is the reasoning of a solution, "" where the task knows none.
    """

    name: str
    draw: Callable[[int, bool], Iterator[Problem]]
    score: Callable[[Problem, str], float]
    steps: Callable[[Problem], str]

    def problems(self, n: int, seed: int = 0, held_out: bool = False) -> list[Problem]:
        """`n` problems, always the same for a seed. No question is ever both in training and held out.

        Raises:
            UserError: the task has not as many questions.
        """
        found = list(itertools.islice(self.draw(seed, held_out), n))
        if len(found) < n:
            side = "held-out" if held_out else "training"
            raise UserError(f"`task`: {self.name} has {len(found)} {side} questions, not {n}: ask for fewer")
        return found

    def demonstrate(self, problem: Problem) -> str:
        """A well-formed right answer, for a cold start. A UserError for a task that has a scorer but no answers."""
        if not problem.answer:
            raise UserError(f"`data`: {self.name} has no right answers to show: take another task")
        return f"<think>{self.steps(problem)}</think>\n<answer>{problem.answer}</answer>"

    def accuracy(self, problem: Problem, completion: str) -> float:
        """The score of what stands between a completion's last answer marks; 0 without them."""
        answer = answer_of(completion)
        return 0.0 if answer is None else self.score(problem, answer)


def is_held_out(question: str) -> bool:
    """Whether a question belongs to evaluation: a matter of its text alone, whatever the seed."""
    return int.from_bytes(hashlib.sha256(question.encode()).digest()[:8]) < HELD_OUT * 2**64


def answer_of(completion: str) -> str | None:
    """What stands between the last `<answer>` and `</answer>`; None if nothing does."""
    found = re.findall(r"<answer>(.*?)</answer>", completion, re.DOTALL)
    return found[-1].strip() if found else None


def is_well_formed(completion: str) -> bool:
    """Whether a completion is one thought and then one answer, and nothing else."""
    return bool(WELL_FORMED.fullmatch(completion)) and all(completion.count(tag) == 1 for tag in TAGS)


def load_task(spec: str) -> Task:
    """The task that `--task SPEC` names: one of reasoning-gym's with its settings, as `chain_sum:max_terms=3`; `gsm8k`
    from the hub; or a JSONL file of {"question", "answer"}.

    Answers of the last two are compared as mathematics (math-verify). Raises UserError for what cannot be found, read
    or imported.
    """
    name, *settings = spec.split(":")
    if name.endswith(".jsonl") or "/" in name:
        return _file(Path(spec))
    if name != "gsm8k":
        return _reasoning_gym(spec, name, settings)
    if settings:
        raise UserError(f"`task`: gsm8k has no settings, such as {settings[0]}")
    return Task(spec, _gsm8k, _same_mathematics, lambda problem: problem.entry["steps"])


def demonstrations(spec: str, limit: int | None = None) -> Source:
    """What `--data task:SPEC` names: conversations of a training question and its well-formed right answer."""
    name, n = spec.removeprefix("task:"), limit or DEMONSTRATIONS
    task = load_task(name)

    def read() -> Iterator[Document]:
        for problem in itertools.islice(task.draw(0, False), n):
            yield [*problem.messages, {"role": "assistant", "content": task.demonstrate(problem)}]

    path = Path(name)
    stamp = path.stat().st_mtime_ns if path.is_file() else None
    return Source(spec, digest(spec, n, stamp), read, n)


def _reasoning_gym(spec: str, name: str, settings: list[str]) -> Task:
    gym = _require("reasoning_gym", "reasoning-gym")
    from reasoning_gym.factory import DATASETS

    if name not in DATASETS:
        raise UserError(
            f"`task`: {name!r} is no task of reasoning-gym{did_you_mean(name, [*DATASETS, 'gsm8k'])}, nor gsm8k or a "
            ".jsonl file"
        )
    options = {}
    for setting in settings:
        key, equals, value = setting.partition("=")
        if not equals or key not in DATASETS[name][1].__dataclass_fields__ or key in ("seed", "size"):
            known = [field for field in DATASETS[name][1].__dataclass_fields__ if field not in ("seed", "size")]
            raise UserError(f"`task`: {spec}: {setting!r} is no setting of {name}: it has {', '.join(known)}")
        with contextlib.suppress(ValueError):
            value = json.loads(value)
        options[key] = value

    def build(seed: int):
        # A question's own seed is the data set's plus its index: seeds side by side would share almost all of them.
        return gym.create_dataset(name, seed=seed * 1_000_003 % 2**31, size=QUESTIONS, **options)

    def draw(seed: int, held_out: bool) -> Iterator[Problem]:
        questions, in_vain = build(seed), 0
        for i in range(len(questions)):
            entry = questions[i]
            in_vain += 1
            if is_held_out(entry["question"]) == held_out:
                in_vain = 0
                yield Problem(entry["question"], entry["answer"] or "", entry)  # some have only a scorer
            elif in_vain == TRIES:
                return

    try:
        scorer = build(0)
    except Exception as error:  # each task checks its settings in its own way
        raise UserError(f"`task`: {spec}: {one_line(error) or 'impossible settings'}") from error

    def score(problem: Problem, answer: str) -> float:
        try:  # the gym pays a little for answers that merely contain the right one
            return float(scorer.score_answer(answer, problem.entry) == 1)
        except Exception:  # some of its scorers cannot read what is not of the expected form
            return 0.0

    return Task(spec, draw, score, _running)


def _running(problem: Problem) -> str:
    """The running results of a sum, "4 - 1 = 3; 3 + 7 = 10"; "" for other tasks."""
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


def _gsm8k(seed: int, held_out: bool) -> Iterator[Problem]:
    import datasets

    from moonwhale.data.hub import why_not

    try:
        rows = datasets.load_dataset("openai/gsm8k", "main", split="test" if held_out else "train")
    except Exception as error:  # offline, moved, no space: each is another class
        raise UserError(why_not("gsm8k", "openai/gsm8k", None, error, "task")) from error
    for row in rows.shuffle(seed=seed):
        steps, _, answer = row["answer"].rpartition("####")
        steps = re.sub(r"<<.*?>>", "", steps).strip()  # its calculator's notes
        yield Problem(row["question"], answer.strip().replace(",", ""), {"steps": steps})


def _file(path: Path) -> Task:
    try:
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except OSError as error:
        raise UserError(f"`task`: cannot read {path}: {error.strerror}") from error
    except ValueError as error:
        raise UserError(f"`task`: {path} is not JSON, one object a line: {one_line(error)}") from error
    for number, row in enumerate(rows, start=1):
        texts = [row.get(name) for name in ("question", "answer")] if isinstance(row, dict) else [None]
        if not all(isinstance(text, str) and text.strip() for text in texts):
            raise UserError(f'`task`: {path}, object {number}: it needs "question" and "answer", both text')
    problems = [Problem(row["question"], row["answer"], row) for row in rows]

    def draw(seed: int, held_out: bool) -> Iterator[Problem]:
        def place(problem: Problem) -> bytes:
            return hashlib.sha256(f"{seed} {problem.question}".encode()).digest()

        return iter(sorted((p for p in problems if is_held_out(p.question) == held_out), key=place))

    return Task(str(path), draw, _same_mathematics, lambda problem: str(problem.entry.get("steps", "")))


def _same_mathematics(problem: Problem, answer: str) -> float:
    math_verify = _require("math_verify", "math-verify")
    # Its time-outs are signals, which work in the main thread only.
    gold, given = (math_verify.parse(text, parsing_timeout=None) for text in (problem.answer, answer))
    return float(math_verify.verify(gold, given, timeout_seconds=None))


def _require(module: str, package: str):
    if importlib.util.find_spec(module) is None:
        raise UserError(f'`task` needs the package {package}: pip install "moonwhale[rl]"')
    return importlib.import_module(module)
