"""The verb `moonwhale eval`."""

import dataclasses
import json
from contextlib import nullcontext
from pathlib import Path

from moonwhale import __version__
from moonwhale.evaluate.config import EvalConfig
from moonwhale.options import Parser, add_options, read_argv, write_whole
from moonwhale.outputs import new_file


def main(argv: list[str]) -> None:
    """Evaluates a checkpoint, prints the results, and writes them to a JSON file if there is one."""
    parser = Parser(prog="moonwhale eval", description="Measure what a trained model can do.")
    parser.add_argument("folder", metavar="CHECKPOINT", help="what a run wrote with --out")
    add_options(parser, EvalConfig)
    options, args = read_argv(parser, EvalConfig, argv)
    config = EvalConfig(**options)

    from moonwhale.evaluate.evaluation import evaluate

    with new_file(Path(config.json), "json") if config.json else nullcontext():
        results = evaluate(args.folder, config)
        if config.json:
            settings = dataclasses.asdict(config)
            report = {"checkpoint": args.folder, "moonwhale": __version__, "settings": settings, "results": results}
            write_whole(config.json, json.dumps(report, indent=1, ensure_ascii=False) + "\n")
