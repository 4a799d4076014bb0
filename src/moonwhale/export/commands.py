"""The command `moonwhale export`, which writes a checkpoint in another format."""

import sys
from importlib import import_module
from pathlib import Path

from moonwhale.errors import UserError, require_package
from moonwhale.options import Parser

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
        epilog="formats: " + "; ".join(f"{name}: {summary}" for name, (_, summary) in FORMATS.items()),
    )
    parser.add_argument("folder", metavar="FOLDER", help="checkpoint to read")
    parser.add_argument("--to", choices=FORMATS, default="deepseek", help="format to write (%(default)s)")
    parser.add_argument("--out", required=True, metavar="FOLDER", help="a new or empty folder")
    parser.add_argument("--dtype", choices=DTYPES, default="fp32", help="dtype of the weights (%(default)s)")
    args = parser.parse_args(argv)
    out = Path(args.out)
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise UserError(f"`out`: {out} exists and is not an empty folder: name a new one; nothing is overwritten")

    if args.to == "gguf":
        require_package("gguf", "gguf", "`to` gguf")
    import torch

    from moonwhale.checkpoint import quiet_loading
    from moonwhale.files import new_folder

    writer, summary = FORMATS[args.to]
    module, function = writer.split(":")
    write = getattr(import_module(module), function)
    dtype = torch.bfloat16 if args.dtype == "bf16" else torch.float32
    with new_folder(out, replace=False) as unfinished, quiet_loading():
        notes = write(Path(args.folder), unfinished, dtype)
    for note in notes:
        print(note, file=sys.stderr)
    print(f"written    {out}, {summary}")
