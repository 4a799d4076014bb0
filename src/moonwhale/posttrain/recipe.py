"""The verb `moonwhale recipe`: runs several stages of training, one after the other, from a YAML file."""

import os
from pathlib import Path

from moonwhale import options
from moonwhale.errors import UserError, did_you_mean, shown
from moonwhale.posttrain import grpo, sample, sft
from moonwhale.reports import add_json, reporting
from moonwhale.train import pretrain, run_folder
from moonwhale.train.config import TrainConfig
from moonwhale.train.effects import require_effects
from moonwhale.train.run import check_reporters
from moonwhale.train.run_options import RunOptions
from moonwhale.yaml_files import read_yaml_file

# For each verb: the class that checks its options, and the function that runs it.
STAGES = {
    "train": (TrainConfig, pretrain.train),
    "sft": (sft.SFTOptions, sft.sft),
    "grpo": (grpo.GRPOOptions, grpo.grpo),
    "sample": (sample.SampleOptions, sample.sample),
}
EPILOG = """The file is a list of stages. Each is a verb with its options, which are named as in run.yaml:

- sft: {checkpoint: runs/demo, data: chitchat, out: runs/talks}
- grpo: {checkpoint: runs/talks, task: chain_sum, out: runs/counts}

A finished stage is skipped, and an interrupted one is resumed.

A recipe can run code: a reward such as mine:short imports mine.py from the working folder. Read a recipe from
elsewhere before you run it."""


def main(argv: list[str]) -> None:
    parser = options.Parser(
        prog="moonwhale recipe",
        description="Run the stages of a training recipe in order.",
        examples=("moonwhale recipe docs/r1.yaml", "moonwhale recipe docs/r1.yaml --json"),
        epilog=EPILOG,
    )
    parser.add_argument("file", metavar="YAML", help="file of the recipe")
    add_json(parser)
    args = parser.parse_args(argv)
    with reporting(args.json) as show:
        stages = recipe(args.file)
        show({"stages": [{"verb": verb, "out": config.out} for verb, config in stages]})


def recipe(path: str) -> list[tuple[str, object]]:
    """Checks all stages of a recipe, then runs them in order. Skips the finished ones. Returns them as `read` does.

    Raises:
        UserError: the file is not a recipe, the options of a stage are impossible, or it would write where another run
            has finished.
    """
    stages = read(path)
    for verb, config in stages:
        is_done(verb, config)  # finds another run's folder before the first stage takes hours
        if isinstance(config, RunOptions):
            check_reporters(config.report_to)
    for number, (verb, config) in enumerate(stages, start=1):
        print(f"\n--- stage {number} of {len(stages)}: {verb} into {config.out} ---", flush=True)
        if is_done(verb, config):
            print("already finished", flush=True)
        else:
            STAGES[verb][1](config)
    return stages


def read(path: str) -> list[tuple[str, object]]:
    """Returns each stage's verb and checked options. Files that an earlier stage writes need not exist yet.

    Raises:
        UserError: the file is not a recipe, the options of a stage are impossible, or two stages have the same `out`.
    """
    stages = read_yaml_file(path)
    if not isinstance(stages, list) or not stages:
        raise UserError(f"{path} is not a list of stages, such as `- sft: {{checkpoint: runs/demo, out: runs/talks}}`")
    checked = [_read_stage(stage, f"{path}, stage {number}") for number, stage in enumerate(stages, start=1)]
    writers: dict[str, int] = {}
    for number, (_, config) in enumerate(checked, start=1):
        first = writers.setdefault(os.path.abspath(config.out), number)
        if first != number:
            raise UserError(f"{path}, stage {number}: stage {first} writes into {config.out} too: name another `out`")
    return checked


def _read_stage(stage: object, where: str) -> tuple[str, object]:
    if not isinstance(stage, dict) or len(stage) != 1 or not isinstance(next(iter(stage.values())), dict):
        raise UserError(f"{where}: it must be one verb with its options")
    ((verb, given),) = stage.items()
    if verb not in STAGES:
        raise UserError(f"{where}: {shown(verb)} is none of {', '.join(STAGES)}{did_you_mean(str(verb)[:100], STAGES)}")
    if not given.get("out"):
        raise UserError(f"{where}: {verb} needs an `out`, where it writes")
    cls = STAGES[verb][0]
    given = options.check(cls, given, where)
    if verb == "sample":  # its output is a single file, written at the end
        return verb, cls(**given)
    given["resume"] = (Path(given["out"]).expanduser() / run_folder.RUN_FILE).exists()
    config = cls.resolve(given)
    if not config.resume:  # what has begun keeps its options
        require_effects(config.idle(), given)
    return verb, config


def is_done(verb: str, config) -> bool:
    """Whether a stage has written its last file.

    Raises:
        UserError: a run of another verb, or with other options, has finished in its folder.
    """
    if verb == "sample":
        written, record = Path(config.out), sample.record_of(config.out)
    else:
        written, record = Path(config.out) / "config.json", Path(config.out) / run_folder.RUN_FILE
    if not written.exists():
        return False
    _check_same_run(verb, config, record)
    return True


def _check_same_run(verb: str, config, record: Path) -> None:
    """Raises UserError if `record`, the options of what a stage has finished, are those of another run, or missing."""
    if not record.exists():
        what, where = ("answers", "file") if verb == "sample" else ("a model", "folder")
        raise UserError(
            f"`out`: {config.out} holds {what} of unknown origin, without {record.name}: name another {where}"
        )
    if verb == "sample":
        given = read_yaml_file(record)
        if not isinstance(given, dict):
            raise UserError(f"`out`: {record} holds no options of {config.out}: name another file")
        earlier = sample.SampleOptions(**options.check(sample.SampleOptions, given, str(record)))
    else:
        recorded = run_folder.verb_of(record)
        if recorded not in (None, verb):
            raise UserError(
                f"`out`: {config.out} holds a finished run of {recorded}, not of {verb}: name another folder"
            )
        earlier = config.resolve({}, str(record))
    before, now = map(run_folder.options_that_affect_training, (earlier, config))
    if name := run_folder.first_difference(now, before):
        raise UserError(
            f"`{name}`: {shown(now.get(name))} differs from the {shown(before.get(name))} that the finished run in "
            f"{config.out} had: give the same, or name another `out`"
        )
