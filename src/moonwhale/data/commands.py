"""`moonwhale data` and `moonwhale tokenizer`. Heavy imports wait until the arguments are known to be good."""

import argparse
from pathlib import Path

from moonwhale.data.hub_sets import DATA_HELP
from moonwhale.errors import UserError
from moonwhale.options import Parser


def main_data(argv: list[str]) -> None:
    """Builds a source's shards, or reuses them, and shows what is in them."""
    parser = Parser(prog="moonwhale data", description="Tokenise a source once and look at what will be trained on.")
    _add_source(parser)
    parser.add_argument("--tokenizer", default="train", help="deepseek, gpt2, a folder or a hub id (train: a new one)")
    parser.add_argument("--vocab-size", type=int, default=4096, help="of a tokenizer trained here (4096)")
    parser.add_argument("--context", type=int, default=1024, help="tokens of a row (1024)")
    parser.add_argument("--show", type=int, default=0, metavar="K", help="rows to print, spread over the training set")
    parser.add_argument("--verify", action="store_true", help="compare every file with its checksum, large ones too")
    args = parser.parse_args(argv)

    from moonwhale.data.packing import build_data

    bundle = build_data(
        data=args.data,
        split=args.data_split,
        columns=args.data_columns,
        tokenizer=args.tokenizer,
        vocab_size=args.vocab_size,
        context=args.context,
        cache_dir=args.cache,
        verify=args.verify,
        limit=args.data_documents,
    )
    print(bundle.describe())
    rows = len(bundle.train)
    shown = min(args.show, rows)
    for row in (i * rows // shown for i in range(shown)):
        print(f"\n--- training row {row:,} of {rows:,} ---")
        print(bundle.tokenizer.decode(bundle.train[row]["input_ids"]))


def main_tokenizer(argv: list[str]) -> None:
    """Trains a tokenizer, or shows how one cuts a text."""
    parser = Parser(prog="moonwhale tokenizer", description="Train a tokenizer, or see how one cuts a text.")
    verbs = parser.add_subparsers(dest="verb", required=True)
    train = verbs.add_parser("train", help="train byte-level BPE on a source")
    _add_source(train)
    train.add_argument("--vocab-size", type=int, default=4096, help="control tokens included (4096)")
    train.add_argument("--out", required=True, help="folder to write, to be given as --tokenizer later")
    show = verbs.add_parser("show", help="print a text's tokens")
    show.add_argument("tokenizer", help="deepseek, gpt2, a folder or a hub id")
    show.add_argument("text")
    args = parser.parse_args(argv)
    _train(args) if args.verb == "train" else _show(args)


def _add_source(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--data", default="chitchat", help=f"{DATA_HELP} (chitchat)")
    parser.add_argument("--data-split", help="split of a hub set (train)")
    parser.add_argument(
        "--data-columns",
        type=lambda names: names.split(","),
        metavar="A,B",
        help="text columns, or the column of messages (the usual names)",
    )
    parser.add_argument(
        "--data-documents",
        type=int,
        metavar="N",
        help="documents to read, from the beginning; a hub set is then streamed (all, downloaded)",
    )
    parser.add_argument("--cache", help="where built things are kept ($MOONWHALE_CACHE or ~/.cache/moonwhale)")


def _train(args: argparse.Namespace) -> None:
    out = Path(args.out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"--out: {out} already exists and is not an empty folder")

    from moonwhale.data.loading import load_source
    from moonwhale.data.tokenizer import trained_tokenizer
    from moonwhale.files import new_folder

    source = load_source(args.data, args.data_split, args.data_columns, args.data_documents)
    tokenizer = trained_tokenizer(source, args.vocab_size, args.cache)
    with new_folder(out) as building:
        tokenizer.save_pretrained(building)
    print(f"{out}: {len(tokenizer):,} tokens")


def _show(args: argparse.Namespace) -> None:
    from moonwhale.data.chat import encode_document
    from moonwhale.data.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(args.tokenizer)
    ids = encode_document(tokenizer, args.text)
    for id in ids.tolist():
        print(f"{id:>8}  {tokenizer.decode([id])!r}")
    print(f"{len(ids)} tokens for {len(args.text.encode())} bytes")
