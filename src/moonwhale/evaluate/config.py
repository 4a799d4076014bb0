"""The options of `moonwhale eval`. Imports nothing heavy, since the command line needs it."""

from dataclasses import dataclass, fields
from pathlib import Path

from moonwhale.data.hub_sets import DATA_HELP
from moonwhale.data.source_options import COLUMNS_HELP, SPLIT_HELP
from moonwhale.data.tasks import TASK_HELP
from moonwhale.errors import UserError
from moonwhale.files import expanded
from moonwhale.infer.sampling_options import SamplingOptions, require_answers_that_fit
from moonwhale.options import option, require

AT_LEAST_ONE = ("rows", "batch_size", "problems", "samples", "limit")
DEFAULT_PROBLEMS = 100  # or as many as the task has
DEFAULT_K = (1, 4, 16)
ASKS_FOR = {"text": "data", "task": "task", "lm-eval": "lm_eval"}  # the option that each group needs


@dataclass
class EvalConfig:
    """The options of an evaluation.

    Raises:
        UserError: one line that names the option, its value and the fix.
    """

    data: str | None = option(None, DATA_HELP, group="text")
    data_split: str | None = option(None, SPLIT_HELP, group="text")
    data_columns: list[str] | None = option(None, COLUMNS_HELP, group="text")
    context: int | None = option(None, "tokens per row (the model's context, at most 32,768)", group="text")
    rows: int | None = option(None, "number of rows to read, spread over the text (all)", group="text")

    task: str | None = option(None, TASK_HELP, group="task")
    problems: int | None = option(
        None, f"problems to solve ({DEFAULT_PROBLEMS}, or all if there are fewer)", group="task"
    )
    samples: int = option(4, "answers sampled for each problem, in addition to the greedy one", group="task")
    k: list[int] | None = option(None, "values of k for pass@k (1,4,16, up to --samples)", group="task")
    temperature: float = option(1.0, "temperature of the samples; 1 is the model's own distribution", group="task")
    max_new_tokens: int = option(256, "longest answer, in tokens", group="task")
    seed: int = option(0, "seed of the choice of problems and of the samples", group="task")

    lm_eval: list[str] | None = option(None, "tasks or groups of lm-eval, as A,B", group="lm-eval")
    include_path: str | None = option(
        None, "folder with your own tasks, as YAML files, which can run code", group="lm-eval"
    )
    limit: int | None = option(None, "examples of each task (all)", group="lm-eval")

    whole: bool = option(
        False, "use all of --data and all questions of --task, also those that training sees", group="general"
    )
    speculation: bool = option(
        False, "also measure how often MTP drafts are accepted, on --data and --task", group="general"
    )
    batch_size: int = option(8, "rows of --data or --lm-eval computed at once", group="general")
    device: str = option("auto", "cpu, cuda, mps, or auto for the best there is", group="general")
    precision: str = option("auto", "precision of matrix products", group="general", choices=("auto", "fp32", "bf16"))
    out: str | None = option(None, "new JSON file for the results and these settings", group="general")

    def __post_init__(self):
        if not (self.data or self.task or self.lm_eval):
            raise UserError("there is nothing to evaluate: give `data`, `task` or `lm_eval`, or several of them")
        for field in fields(self):
            name, needed = field.name, ASKS_FOR.get(field.metadata["group"], field.name)
            if name != needed and not getattr(self, needed) and getattr(self, name) != field.default:
                raise UserError(f"`{name}`: it has no effect without `{needed}`: give both, or leave it out")
        for name in ("whole", "speculation"):
            if getattr(self, name) and not (self.data or self.task):
                raise UserError(f"`{name}`: it has no effect without text or questions: give `data` or `task`")
        if self.batch_size != type(self).batch_size and not (self.data or self.lm_eval):
            raise UserError("`batch_size`: it has no effect without `data` or `lm_eval`: give one, or leave it out")
        for name in AT_LEAST_ONE:
            value = getattr(self, name)
            require(self, name, value is None or value >= 1, "it must be at least 1")
        if self.task:
            self.k = self.k or [k for k in DEFAULT_K if k <= self.samples]
            self._check_answers()
        self.out = expanded(self.out)
        if self.out and (Path(self.out).exists() or not Path(self.out).parent.is_dir()):
            raise UserError(f"`out`: {self.out} is no new file in a folder that exists: name one")

    def _check_answers(self) -> None:
        require_answers_that_fit("problems", self.problems or DEFAULT_PROBLEMS, self.samples + 1)
        SamplingOptions(temperature=self.temperature, max_new_tokens=self.max_new_tokens, seed=self.seed)
        if not self.temperature:
            raise UserError("`temperature`: 0 draws the greedy answer again and again: give a number above 0")
        if not all(1 <= k <= self.samples for k in self.k):
            raise UserError(
                f"`k`: {','.join(map(str, self.k))} does not fit `samples` {self.samples}: give numbers from 1 to "
                f"{self.samples}, or raise `samples`"
            )
