"""Multiple choice, and whatever else EleutherAI's lm-eval measures, on a model of ours.

lm-eval takes it for what it is, a transformers model with its tokenizer. It is an extra, since it brings much with it:
`pip install "moonwhale[eval]"`.
"""

import copy
import logging
import math
from pathlib import Path

import torch
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from moonwhale.errors import UserError, did_you_mean, one_line
from moonwhale.model import MoonwhaleForCausalLM

log = logging.getLogger(__name__)


class HarnessTasks:
    """lm-eval's tasks, groups and tags of these names, loaded with their data. `folder` holds some of one's own, as
    YAML files.

    Raises:
        UserError: lm-eval is not installed, there is no such folder, no task of such a name, or it cannot be loaded.
    """

    def __init__(self, names: list[str], folder: str | None = None):
        if folder is not None and not Path(folder).is_dir():
            raise UserError(f"`include_path`: {folder} is no folder: give one that holds lm-eval's tasks (YAML files)")
        self.names, self.manager = names, _manager(names, folder)
        self.tasks: list = []
        try:
            for name in names:
                loaded = self.manager.load(name)
                self.tasks += [loaded["groups"][name]] if name in loaded["groups"] else loaded["tasks"].values()
            self.manager.load(self.tasks)  # refuses one that is meant twice
        except Exception as error:  # no network, a data set that is gone, a mistake in a file: each is another class
            raise UserError(_failure(names, error)) from error

    def run(
        self,
        model: MoonwhaleForCausalLM,
        tokenizer: PreTrainedTokenizerFast,
        limit: int | None = None,
        batch_size: int = 8,
        autocast: torch.dtype | None = None,
    ) -> dict[str, dict[str, float]]:
        """lm-eval's figures of each task and group by name: "acc", "acc stderr" and so on, and the number of
        "examples".

        limit: of the examples of each task. autocast: dtype of the matrix products, None for that of the weights.

        Raises:
            UserError: lm-eval refuses the task, as one that runs code that the model wrote.
        """
        from lm_eval import simple_evaluate
        from lm_eval.models.huggingface import HFLM

        logger, cut = logging.getLogger(HFLM.__module__), _Cut()
        logger.addFilter(cut)
        try:
            harness = HFLM(
                pretrained=model,
                tokenizer=_with_bos(tokenizer),
                batch_size=batch_size,
                mixed_precision_dtype=autocast,
                softmax_dtype=torch.float32,
                max_length=model.config.max_position_embeddings,
            )
            found = simple_evaluate(
                harness, tasks=self.tasks, task_manager=self.manager, limit=limit, log_samples=False
            )
        except ValueError as error:
            raise UserError(_failure(self.names, error)) from error
        finally:
            logger.removeFilter(cut)
        if cut.times:
            context = model.config.max_position_embeddings
            log.warning(
                "`lm_eval`: %d prompts or more lost their beginnings, to fit a context of %d", cut.times, context
            )
        examples = {name: {"examples": n["effective"]} for name, n in found["n-samples"].items()}
        return {name: _figures(values) | examples.get(name, {}) for name, values in found["results"].items()}


class _Cut(logging.Filter):
    """Keeps lm-eval's warnings back, and counts those of prompts that were cut to the model's context."""

    times = 0

    def filter(self, record: logging.LogRecord) -> bool:
        self.times += "truncat" in record.getMessage().lower()
        return record.levelno >= logging.ERROR


def _manager(names: list[str], folder: str | None):
    """What knows all of `names`."""
    try:
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise UserError('`lm_eval` needs a package: pip install "moonwhale[eval]"') from error

    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    logging.getLogger("lm_eval.models.huggingface").setLevel(logging.WARNING)  # for `_Cut`
    if folder is not None:  # reading lm-eval's own thousands of files takes seconds, here for nothing
        own = TaskManager(include_path=folder, include_defaults=False)
        if set(names) <= set(own.all_subtasks):
            return own
    manager = TaskManager(include_path=folder)
    for name in names:
        if name not in manager.all_tasks:
            near = did_you_mean(name, manager.all_tasks) or "; `lm-eval ls tasks` lists what there is"
            raise UserError(f"`lm_eval`: there is no task {name!r}{near}")
    return manager


def _failure(names: list[str], error: Exception) -> str:
    return f"`lm_eval` {','.join(names)}: {type(error).__name__}: {one_line(error)}"


def _with_bos(tokenizer: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    """A copy that begins every text with bos, as documents do in training: not all tokenizers do so by themselves."""
    tokenizer = copy.deepcopy(tokenizer)
    bos = tokenizer.bos_token
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"{bos} $A", pair=f"{bos} $A $B", special_tokens=[(bos, tokenizer.bos_token_id)]
    )
    return tokenizer


def _figures(values: dict) -> dict[str, float]:
    """The finite numbers among a task's results, which lm-eval calls "acc,none" and "acc_stderr,none"."""
    return {
        key.removesuffix(",none").replace("_stderr", " stderr"): value
        for key, value in values.items()
        if "," in key and isinstance(value, int | float) and math.isfinite(value)
    }
