"""Scores answers to reasoning-gym's questions, in a worker process with limits of time and memory.

Some of the gym's scorers pass the answer to `eval` or to sympy's parser, which calls `eval`. What a model wrote must
not run, so the worker process replaces both by parsers that only build values. See worker_process.py for the limits.
"""

import ast
import functools
import json
import pickle
import sys

from moonwhale.data.worker_process import WorkerProcess

TIME_LIMIT = 10.0  # seconds for one answer; the first one waits for its data set to be built, which takes up to 2
QUESTIONS = 1_000_000  # the size asked of the gym, which makes each question only when it is read
# Its scorer evaluates the question's expression, which the gym itself wrote, and not the answer.
EVALUATES_QUESTIONS = "reasoning_gym.arithmetic.bitwise_arithmetic"

_worker = WorkerProcess("moonwhale.data.gym_answers", TIME_LIMIT)


def score_answer(name: str, options: dict, entry: dict, given: str) -> float | None:
    """Returns the gym's score of an answer to the question `entry` of the data set `name`, from 0 to 1.

    Returns None if a limit was exceeded.
    """
    # JSON would change tuples and keys. The worker process only reads pickles, and only ours: it writes JSON.
    return _worker.ask([name, json.dumps(options), pickle.dumps(entry).hex(), given])


def prepare() -> None:
    """Imports the gym in the worker process, and replaces whatever evaluates text there."""
    import reasoning_gym  # noqa: F401

    from moonwhale.data.expressions import replace_parser

    replace_parser("reasoning_gym")
    for name, module in list(sys.modules.items()):
        if name.partition(".")[0] == "reasoning_gym" and name != EVALUATES_QUESTIONS:
            module.eval, module.exec = ast.literal_eval, None


def answer(request: list) -> float:
    """Scores one answer in the worker process. An answer on which a scorer fails is wrong."""
    name, options, entry, given = request
    try:
        return float(_dataset(name, options).score_answer(given, pickle.loads(bytes.fromhex(entry))))
    except Exception:  # some scorers fail on answers of an unexpected form, and MemoryError is one of them
        return 0.0


@functools.lru_cache(maxsize=1)
def _dataset(name: str, options: str):
    import reasoning_gym

    return reasoning_gym.create_dataset(name, seed=0, size=QUESTIONS, **json.loads(options))
