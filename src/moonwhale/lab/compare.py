"""`moonwhale compare`: trains the variants of a model side by side, and reports how they differ."""

import dataclasses
import hashlib
import json
from pathlib import Path

import torch
from torch.utils.data import Subset

from moonwhale.errors import UserError, shown
from moonwhale.files import read_json, write_whole
from moonwhale.lab.config import Comparison
from moonwhale.lab.report import report, table
from moonwhale.lab.runs import Rows, Run
from moonwhale.lab.training import Training
from moonwhale.lab.tuning import tune
from moonwhale.outputs import owned
from moonwhale.precision import choose
from moonwhale.processes import print_on_rank_0, world_size
from moonwhale.train.config import build_model_config
from moonwhale.train.pretrain import contents, load_data
from moonwhale.train.run import prepare_process, silent_libraries
from moonwhale.train.run_folder import first_difference

LOCK, BASE_FILE = ".lock", "base.json"


def compare(asked: Comparison) -> dict:
    """Carries out a comparison, or goes on with it, and writes `comparison.json` and `comparison.html`.

    Returns:
        what comparison.json holds.

    Raises:
        UserError: one line, for anything the user can put right.
        KeyboardInterrupt: the user asked to stop; all runs have checkpoints.
    """
    if world_size() > 1:
        raise UserError("a comparison runs in one process: start it without torchrun")
    out = Path(asked.options.out)
    _check_folder(out)
    with owned(out / LOCK, out, "out"), silent_libraries():
        choice = choose(asked.config(asked.variants[0]).device, asked.config(asked.variants[0]).precision)
        prepare_process(choice.device)
        rows = load_rows(asked)
        asked = dataclasses.replace(asked, n_rows=len(rows.data.train))
        _check_base(asked, rows, out)
        print_on_rank_0(rows.data.describe())
        print_on_rank_0(f"device     {choice.reason}, {torch.get_num_threads()} threads")
        with Training(asked) as training:
            if asked.options.tune:
                asked = tune(asked, rows, training)
            runs = [[Run(asked, v, seed, rows) for v in asked.variants] for seed in range(asked.options.seeds)]
            training.finish([run for of_seed in runs for run in of_seed])
        result = report(asked, runs, out)
    print_on_rank_0(table(result))
    print_on_rank_0(f"page       {out / 'comparison.html'}; all figures: {out / 'comparison.json'}")
    return result


def load_rows(asked: Comparison) -> Rows:
    """Loads the data of the base. All variants read them.

    Raises:
        UserError: a variant's model is impossible, or the text fills too few rows.
    """
    config = asked.config(asked.variants[0])
    for variant in asked.variants:
        try:
            build_model_config(asked.config(variant))
        except UserError as error:
            raise UserError(f"variant {variant.name}: {error}") from error
    data = load_data(config, build_model_config(config).vocab_size, 1)
    for variant in asked.variants:
        if (size := asked.config(variant).batch_size) > len(data.train):
            raise UserError(
                f"variant {variant.name}: `batch_size`: {size} rows are computed at once, but the text fills only "
                f"{len(data.train)}: lower it, or give more `data`"
            )
    n = len(data.held_out)
    if n < 2:
        raise UserError(f"`data`: the held-out text fills only {n} row of `context` {config.context}: give more text")

    def spread(first: int, end: int) -> Subset:
        return Subset(data.held_out, torch.linspace(first, end - 1, min(config.eval_rows, end - first)).long().tolist())

    return Rows(data, spread(0, n // 2), spread(n // 2, n))


def _check_folder(out: Path) -> None:
    """Raises UserError if the folder holds anything but a comparison."""
    others = [path.name for path in out.iterdir() if path.name != LOCK] if out.is_dir() else []
    if others and BASE_FILE not in others:
        raise UserError(f"`out`: {out} holds files that are not a comparison's: name a new or an empty folder")


def _check_base(asked: Comparison, rows: Rows, out: Path) -> None:
    """Writes what all runs of the folder share, or checks that it is the same as before.

    Raises:
        UserError: the folder's comparison has another base, another budget or other data.
    """
    config = vars(asked.config(asked.variants[0]))
    now = {name: value for name, value in config.items() if name not in ("out", "model")}
    now |= {f"model.{name}": value for name, value in config["model"].items()}
    checksum = hashlib.sha256(contents(rows.data).encode()).hexdigest()
    now |= {"budget": str(asked.budget), "turns": asked.options.turns, "data's checksum": checksum}
    file = out / BASE_FILE
    if not file.exists():
        write_whole(file, json.dumps(now, indent=1) + "\n")
        return
    try:
        before = read_json(file)
    except UserError as error:
        raise UserError(f"`out`: {error}, or name another folder") from error
    if name := first_difference(now, before):
        raise UserError(
            f"`out`: {out} holds another comparison, whose base has {name} {shown(before.get(name))}, "
            f"not {shown(now.get(name))}: name another folder"
        )
