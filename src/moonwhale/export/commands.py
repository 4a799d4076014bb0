"""The command `moonwhale export`, which writes a checkpoint in another format."""

import argparse
import sys
from importlib import import_module
from pathlib import Path

from moonwhale.errors import require_package
from moonwhale.options import Parser
from moonwhale.outputs import new_named_folder
from moonwhale.reports import add_json, reporting

# Each writer takes the source folder, an empty folder and the dtype of the weights, and returns the notes to print.
# Writers are named here and imported in `main`, since they need torch and transformers.
FORMATS = {
    "deepseek": ("moonwhale.export.deepseek:to_deepseek", "plain DeepSeek-V3, which transformers loads natively"),
    "gguf": ("moonwhale.export.gguf:to_gguf", "one GGUF file, model.gguf, for llama.cpp"),
    "code": ("moonwhale.export.remote_code:to_remote_code", "with the model's code in it, for trust_remote_code"),
    "moonwhale": ("moonwhale.export.deepseek:from_deepseek", "a moonwhale checkpoint, from a DeepSeek-V3 folder"),
}
DTYPES = ("fp32", "bf16")


def main(argv: list[str]) -> None:
    """Exports one checkpoint folder into a new folder."""
    parser = Parser(
        prog="moonwhale export",
        description="Write a checkpoint in another format.",
        examples=(
            "moonwhale export runs/plain --out runs/plain-deepseek",
            "moonwhale export runs/plain --to gguf --out runs/plain-gguf",
        ),
        epilog="formats: " + "; ".join(f"{name}: {summary}" for name, (_, summary) in FORMATS.items()),
    )
    parser.add_argument("folder", metavar="FOLDER", help="checkpoint to read")
    parser.add_argument("--to", choices=FORMATS, default="deepseek", help="format to write (%(default)s)")
    parser.add_argument("--out", required=True, metavar="FOLDER", help="a new or empty folder")
    parser.add_argument("--dtype", choices=DTYPES, default="fp32", help="dtype of the weights (%(default)s)")
    add_json(parser)
    args = parser.parse_args(argv)
    if args.to == "gguf":
        require_package("gguf", "gguf", "`to` gguf")
    with reporting(args.json) as show:
        with new_named_folder(args.out, "out") as unfinished:
            notes = export(args, unfinished)
        for note in notes:
            print(note, file=sys.stderr)
        result = {"out": args.out, "to": args.to, "dtype": args.dtype, "notes": notes}
        show(result, f"written    {args.out}, {FORMATS[args.to][1]}")


def export(args: argparse.Namespace, out: Path) -> list[str]:
    """Writes the checkpoint `args.folder` into the empty folder `out`, and returns the notes to print."""
    import torch

    from moonwhale.checkpoint import quiet_loading

    module, function = FORMATS[args.to][0].split(":")
    write = getattr(import_module(module), function)
    dtype = torch.bfloat16 if args.dtype == "bf16" else torch.float32
    with quiet_loading():
        return write(Path(args.folder), out, dtype)
