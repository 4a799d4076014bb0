"""The verb `moonwhale eval`."""

import dataclasses
import json
from contextlib import nullcontext
from pathlib import Path

from moonwhale import __version__
from moonwhale.evaluate.config import EvalConfig
from moonwhale.files import write_whole
from moonwhale.options import Parser, add_options, read_argv
from moonwhale.outputs import new_file
from moonwhale.reports import add_json, finite, reporting


def main(argv: list[str]) -> None:
    """Evaluates a checkpoint, prints the results, and writes them to a JSON file if there is one."""
    parser = Parser(
        prog="moonwhale eval",
        description="Measure what a trained model can do.",
        examples=(
            "moonwhale eval runs/mine --data my_texts/ --speculation",
            "moonwhale eval runs/counts --task chain_sum --samples 16 --k 1,16 --out before.json",
        ),
    )
    parser.add_argument("folder", metavar="CHECKPOINT", help="what a run wrote with --out")
    add_options(parser, EvalConfig)
    add_json(parser)
    options, args = read_argv(parser, EvalConfig, argv)
    config = EvalConfig(**options)

    from moonwhale.evaluate.evaluation import evaluate

    with reporting(args.json) as show, new_file(Path(config.out), "out") if config.out else nullcontext():
        results = evaluate(args.folder, config)
        settings = dataclasses.asdict(config)
        report = {"checkpoint": args.folder, "moonwhale": __version__, "settings": settings, "results": results}
        if config.out:
            write_whole(config.out, json.dumps(finite(report), indent=1, ensure_ascii=False) + "\n")
        show(report)
