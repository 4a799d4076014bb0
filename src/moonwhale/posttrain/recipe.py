"""`moonwhale recipe`: several stages of training, one after the other, from a YAML file."""

from pathlib import Path

import yaml

from moonwhale import options
from moonwhale.errors import UserError, did_you_mean, one_line
from moonwhale.posttrain import grpo, sample, sft
from moonwhale.train import pretrain, run_folder
from moonwhale.train.config import TrainConfig, resolve

# Of each stage: what checks its options, and what carries it out.
STAGES = {
    "train": (TrainConfig, pretrain.train),
    "sft": (sft.SFTOptions, sft.sft),
    "grpo": (grpo.GRPOOptions, grpo.grpo),
    "sample": (sample.SampleOptions, sample.sample),
}
EPILOG = """The file is a list of stages, each a verb and its options, by the names of the command line:

- sft: {checkpoint: runs/demo, data: chitchat, out: runs/talks}
- grpo: {checkpoint: runs/talks, task: chain_sum, out: runs/counts}

A stage that has ended is left as it is, one that was interrupted goes on."""


def main(argv: list[str]) -> None:
    parser = options.Parser(
        prog="moonwhale recipe", description="Carry out the stages of a training recipe.", epilog=EPILOG
    )
    parser.add_argument("file", metavar="YAML", help="the recipe")
    recipe(parser.parse_args(argv).file)


def recipe(path: str) -> None:
    """Checks all stages of a recipe, then carries them out in their order.

    Raises:
        UserError: the file is no recipe, or a stage of it cannot be.
    """
    stages = read(path)
    for number, (verb, config) in enumerate(stages, start=1):
        print(f"\n--- stage {number} of {len(stages)}: {verb} into {config.out} ---", flush=True)
        if is_done(verb, config):
            print("done already", flush=True)
        else:
            STAGES[verb][1](config)


def read(path: str) -> list[tuple[str, object]]:
    """The stages of a recipe, their options found good. What an earlier stage will write need not be there yet."""
    try:
        stages = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not YAML: {one_line(error)}") from error
    if not isinstance(stages, list) or not stages:
        raise UserError(f"{path} is no list of stages, such as `- sft: {{checkpoint: runs/demo, out: runs/talks}}`")
    found = []
    for number, stage in enumerate(stages, start=1):
        where = f"{path}, stage {number}"
        if not isinstance(stage, dict) or len(stage) != 1 or not isinstance(next(iter(stage.values())), dict):
            raise UserError(f"{where}: it must be one verb with its options")
        ((verb, given),) = stage.items()
        if verb not in STAGES:
            near = did_you_mean(str(verb), STAGES)
            raise UserError(f"{where}: {verb!r} is none of {', '.join(STAGES)}{near}")
        if not given.get("out"):
            raise UserError(f"{where}: {verb} needs an `out`, where it writes")
        cls = STAGES[verb][0]
        given = options.check(cls, given, where)
        if verb != "sample":
            given["resume"] = (Path(given["out"]) / run_folder.RUN_FILE).exists()
        found.append((verb, resolve(given) if verb == "train" else cls(**given)))
    return found


def is_done(verb: str, config) -> bool:
    """Whether a stage has written what it writes last."""
    return Path(config.out).exists() if verb == "sample" else (Path(config.out) / "config.json").exists()
