"""The verbs `moonwhale data` and `moonwhale tokenizer`. Heavy imports wait until the arguments have been checked."""

import argparse

from moonwhale.data.source_options import SourceOptions
from moonwhale.options import Parser, add_options, read_argv, require
from moonwhale.reports import add_json, reporting

VOCAB_SIZE = 4096  # of a tokenizer that these verbs train
LONGEST_ROW = 1 << 24  # tokens: a row is filled up, however short the text is
CACHE_HELP = "folder for what is built ($MOONWHALE_CACHE or ~/.cache/moonwhale)"


def _data_parser() -> Parser:
    parser = Parser(
        prog="moonwhale data",
        description="Tokenize a source once, and show what a model will train on.",
        examples=(
            "moonwhale data --data my_texts/ --context 512 --show 3",
            "moonwhale data --data openorca --data-documents 1000",
        ),
    )
    add_options(parser, SourceOptions)
    parser.add_argument("--cache", help=CACHE_HELP)
    parser.add_argument(
        "--tokenizer", default="train", help="deepseek, gpt2, a folder or a hub id; train: train a new one (train)"
    )
    parser.add_argument("--vocab-size", type=int, help=f"size of a tokenizer trained here ({VOCAB_SIZE})")
    parser.add_argument("--context", type=int, default=1024, help="tokens per row (1024)")
    parser.add_argument(
        "--show", type=int, default=0, metavar="K", help="print K rows, spread over the training set (0)"
    )
    parser.add_argument("--verify", action="store_true", help="verify the checksum of every file, also of large ones")
    add_json(parser)
    return parser


def main_data(argv: list[str]) -> None:
    """Builds the token shards of a source, or reuses them, and prints what they hold."""
    given, args = read_argv(_data_parser(), SourceOptions, argv)
    require(args, "context", args.context <= LONGEST_ROW, f"give at most {LONGEST_ROW:,}")
    require(args, "show", args.show >= 0, "give a number of rows, or 0")
    fix = "only a tokenizer that is trained here takes a size: leave `vocab_size` or `tokenizer` out"
    require(args, "vocab_size", args.vocab_size is None or args.tokenizer == "train", fix)

    from moonwhale.data.packing import build_data

    with reporting(args.json) as show:
        built = build_data(
            SourceOptions(**given).load_source(),
            args.tokenizer,
            vocab_size=VOCAB_SIZE if args.vocab_size is None else args.vocab_size,
            context=args.context,
            cache_dir=args.cache,
            verify=args.verify,
        )
        rows = len(built.train)
        count = min(args.show, rows)
        texts = {}
        for i in (n * rows // count for n in range(count)):
            ids = built.train[i]["input_ids"][: built.train.n_tokens - i * args.context]  # without what fills the last
            texts[i] = built.tokenizer.decode(ids)
        shown = [f"\n--- training row {i:,} of {rows:,} ---\n{text}" for i, text in texts.items()]
        result = built.figures() | {"rows": [{"row": i, "text": text} for i, text in texts.items()]}
        show(result, "\n".join([built.describe(), *shown]))


def main_tokenizer(argv: list[str]) -> None:
    """Trains a tokenizer, or prints the tokens of a text."""
    parser = Parser(
        prog="moonwhale tokenizer",
        description="Train a tokenizer, or see how one splits a text.",
        examples=(
            "moonwhale tokenizer train --data my_texts/ --vocab-size 8192 --out tokenizers/mine",
            'moonwhale tokenizer show tokenizers/mine "How is this split?"',
        ),
    )
    verbs = parser.add_subparsers(dest="verb", required=True)
    train = verbs.add_parser("train", help="train byte-level BPE on a source")
    add_options(train, SourceOptions)
    train.add_argument("--cache", help=CACHE_HELP)
    size = f"tokens, including control tokens ({VOCAB_SIZE})"
    train.add_argument("--vocab-size", type=int, default=VOCAB_SIZE, help=size)
    train.add_argument("--out", required=True, help="folder to write, which --tokenizer then takes")
    show = verbs.add_parser("show", help="print the tokens of a text")
    show.add_argument("tokenizer", help="deepseek, gpt2, a folder or a hub id")
    show.add_argument("text")
    for verb in (train, show):
        add_json(verb)
    given, args = read_argv(parser, SourceOptions, argv)
    if args.verb == "train":
        _train(SourceOptions(**given), args)
    else:
        _show(args)


def _train(options: SourceOptions, args: argparse.Namespace) -> None:
    from moonwhale.data.tokenizer import load_or_train_tokenizer
    from moonwhale.outputs import new_named_folder

    with reporting(args.json) as show:
        with new_named_folder(args.out, "out") as building:
            source = options.load_source()
            tokenizer = load_or_train_tokenizer(source, args.vocab_size, args.cache)
            tokenizer.save_pretrained(building)
        show({"out": args.out, "vocabulary": len(tokenizer)}, f"{args.out}: {len(tokenizer):,} tokens")


def _show(args: argparse.Namespace) -> None:
    from moonwhale.data.chat import check_utf8, encode_document
    from moonwhale.data.tokenizer import load_tokenizer

    check_utf8(args.text)
    with reporting(args.json) as show:
        tokenizer = load_tokenizer(args.tokenizer)
        tokens = [{"id": id, "text": tokenizer.decode([id])} for id in encode_document(tokenizer, args.text).tolist()]
        size = len(args.text.encode())
        lines = [f"{token['id']:>8}  {token['text']!r}" for token in tokens]
        show({"tokens": tokens, "bytes": size}, "\n".join([*lines, f"{len(tokens)} tokens for {size} bytes"]))
