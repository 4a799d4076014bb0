"""The verbs `moonwhale data` and `moonwhale tokenizer`. Heavy imports wait until the arguments have been checked."""

import argparse

from moonwhale.data.source_options import SourceOptions
from moonwhale.options import Parser, add_options, read_argv

CACHE_HELP = "folder for what is built ($MOONWHALE_CACHE or ~/.cache/moonwhale)"


def main_data(argv: list[str]) -> None:
    """Builds the token shards of a source, or reuses them, and prints what they hold."""
    parser = Parser(prog="moonwhale data", description="Tokenize a source once, and show what a model will train on.")
    add_options(parser, SourceOptions)
    parser.add_argument("--cache", help=CACHE_HELP)
    parser.add_argument(
        "--tokenizer", default="train", help="deepseek, gpt2, a folder or a hub id; train: train a new one (train)"
    )
    parser.add_argument("--vocab-size", type=int, default=4096, help="size of a tokenizer trained here (4096)")
    parser.add_argument("--context", type=int, default=1024, help="tokens per row (1024)")
    parser.add_argument("--show", type=int, default=0, metavar="K", help="print K rows, spread over the training set")
    parser.add_argument("--verify", action="store_true", help="verify the checksum of every file, also of large ones")
    given, args = read_argv(parser, SourceOptions, argv)

    from moonwhale.data.packing import build_data

    built = build_data(
        SourceOptions(**given).load_source(),
        args.tokenizer,
        vocab_size=args.vocab_size,
        context=args.context,
        cache_dir=args.cache,
        verify=args.verify,
    )
    print(built.describe())
    rows = len(built.train)
    shown = min(args.show, rows)
    for row in (i * rows // shown for i in range(shown)):
        print(f"\n--- training row {row:,} of {rows:,} ---")
        print(built.tokenizer.decode(built.train[row]["input_ids"]))


def main_tokenizer(argv: list[str]) -> None:
    """Trains a tokenizer, or prints the tokens of a text."""
    parser = Parser(prog="moonwhale tokenizer", description="Train a tokenizer, or see how one splits a text.")
    verbs = parser.add_subparsers(dest="verb", required=True)
    train = verbs.add_parser("train", help="train byte-level BPE on a source")
    add_options(train, SourceOptions)
    train.add_argument("--cache", help=CACHE_HELP)
    train.add_argument("--vocab-size", type=int, default=4096, help="tokens, including control tokens (4096)")
    train.add_argument("--out", required=True, help="folder to write, which --tokenizer then takes")
    show = verbs.add_parser("show", help="print the tokens of a text")
    show.add_argument("tokenizer", help="deepseek, gpt2, a folder or a hub id")
    show.add_argument("text")
    given, args = read_argv(parser, SourceOptions, argv)
    if args.verb == "train":
        _train(SourceOptions(**given), args)
    else:
        _show(args)


def _train(options: SourceOptions, args: argparse.Namespace) -> None:
    from moonwhale.data.tokenizer import load_or_train_tokenizer
    from moonwhale.outputs import new_named_folder

    with new_named_folder(args.out, "out") as building:
        source = options.load_source()
        tokenizer = load_or_train_tokenizer(source, args.vocab_size, args.cache)
        tokenizer.save_pretrained(building)
    print(f"{args.out}: {len(tokenizer):,} tokens")


def _show(args: argparse.Namespace) -> None:
    from moonwhale.data.chat import encode_document
    from moonwhale.data.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(args.tokenizer)
    ids = encode_document(tokenizer, args.text)
    for id in ids.tolist():
        print(f"{id:>8}  {tokenizer.decode([id])!r}")
    print(f"{len(ids)} tokens for {len(args.text.encode())} bytes")
