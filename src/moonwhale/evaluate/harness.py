"""Runs EleutherAI's lm-eval on a moonwhale: multiple choice, and whatever else lm-eval measures.

lm-eval sees a transformers model and its tokenizer. It is an optional dependency, because it brings many packages:
`pip install "moonwhale[eval]"`.
"""

import copy
import logging
import math
from pathlib import Path

import torch
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from moonwhale.data.hub_access import hub_access
from moonwhale.errors import UserError, did_you_mean, one_line, require_package
from moonwhale.model import MoonwhaleForCausalLM

HFLM_LOGGER = "lm_eval.models.huggingface"

log = logging.getLogger(__name__)


class HarnessTasks:
    """The tasks, groups and tags of lm-eval with the given names, loaded with their data.

    folder: a folder with the user's own tasks, as YAML files.

    Raises:
        UserError: lm-eval is not installed, the folder is missing, or a task is unknown or cannot be loaded.
    """

    def __init__(self, names: list[str], folder: str | None = None):
        if folder is not None and not Path(folder).is_dir():
            raise UserError(f"`include_path`: {folder} is no folder: give one that holds lm-eval's tasks (YAML files)")
        self.names = names
        self.manager = _task_manager(names, folder)
        self.tasks: list = []
        try:
            with hub_access():
                for name in names:
                    loaded = self.manager.load(name)
                    self.tasks += [loaded["groups"][name]] if name in loaded["groups"] else loaded["tasks"].values()
                self.manager.load(self.tasks)  # raises if two names mean the same task
        except Exception as error:  # no network, a missing data set, a mistake in a file: all of different classes
            raise UserError(_failure(names, error)) from error

    def run(
        self,
        model: MoonwhaleForCausalLM,
        tokenizer: PreTrainedTokenizerFast,
        limit: int | None = None,
        batch_size: int = 8,
        autocast: torch.dtype | None = None,
    ) -> dict[str, dict[str, float]]:
        """Returns lm-eval's figures for each task and group: "acc", "acc stderr" and so on, and "examples", a count.

        limit: number of examples of each task; None takes all.
        autocast: dtype of matrix products; None takes the weights' dtype.

        Raises:
            UserError: lm-eval refuses a task, for example one that runs code that the model has written.
        """
        from lm_eval import simple_evaluate

        from moonwhale.evaluate.harness_model import HarnessModel

        context = model.config.max_position_embeddings
        logger, truncations = logging.getLogger(HFLM_LOGGER), _TruncationCounter()
        logger.addFilter(truncations)
        try:
            harness = HarnessModel(
                pretrained=model,
                tokenizer=_with_bos(tokenizer),
                batch_size=batch_size,
                mixed_precision_dtype=autocast,
                softmax_dtype=torch.float32,
                max_length=context,
            )
            found = simple_evaluate(
                harness, tasks=self.tasks, task_manager=self.manager, limit=limit, log_samples=False
            )
        except ValueError as error:
            raise UserError(_failure(self.names, error)) from error
        finally:
            logger.removeFilter(truncations)
        if truncations.count:
            log.warning(
                "`lm_eval`: %d prompts or more lost their beginnings, to fit a context of %d",
                truncations.count,
                context,
            )
        examples = {name: {"examples": n["effective"]} for name, n in found["n-samples"].items()}
        return {name: _figures(values) | examples.get(name, {}) for name, values in found["results"].items()}


class _TruncationCounter(logging.Filter):
    """Drops lm-eval's warnings, and counts those about prompts that it cut to the model's context."""

    count = 0

    def filter(self, record: logging.LogRecord) -> bool:
        self.count += "truncat" in record.getMessage().lower()
        return record.levelno >= logging.ERROR


def _task_manager(names: list[str], folder: str | None):
    """Returns a TaskManager that knows all of `names`."""
    require_package("lm_eval", "eval", "`lm_eval`")
    from lm_eval.tasks import TaskManager

    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    logging.getLogger(HFLM_LOGGER).setLevel(logging.WARNING)  # for _TruncationCounter
    if folder is not None:
        # lm-eval takes seconds to read its own thousands of tasks. Skip them if the folder has all that is asked for.
        own = TaskManager(include_path=folder, include_defaults=False)
        if set(names) <= set(own.all_subtasks):
            return own
    manager = TaskManager(include_path=folder)
    for name in names:
        if name not in manager.all_tasks:
            hint = did_you_mean(name, manager.all_tasks) or "; `lm-eval ls tasks` lists all tasks"
            raise UserError(f"`lm_eval`: there is no task {name!r}{hint}")
    return manager


def _failure(names: list[str], error: Exception) -> str:
    return f"`lm_eval` {','.join(names)}: {type(error).__name__}: {one_line(error)}"


def _with_bos(tokenizer: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    """Returns a copy that begins every text with bos, as documents begin in training. Not every tokenizer does so."""
    tokenizer = copy.deepcopy(tokenizer)
    bos = tokenizer.bos_token
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"{bos} $A", pair=f"{bos} $A $B", special_tokens=[(bos, tokenizer.bos_token_id)]
    )
    return tokenizer


def _figures(values: dict) -> dict[str, float]:
    """Returns the finite numbers of a task's results. lm-eval names them "acc,none" and "acc_stderr,none"."""
    return {
        key.removesuffix(",none").replace("_stderr", " stderr"): value
        for key, value in values.items()
        if "," in key and isinstance(value, int | float) and math.isfinite(value)
    }
