"""The commands `moonwhale info`, `moonwhale doctor` and `moonwhale xray`.

torch and transformers are imported only after the options are checked, so that `--help` is quick.
"""

from pathlib import Path

from moonwhale.errors import UserError
from moonwhale.files import expanded, require_writable
from moonwhale.infer.sampling_options import SamplingOptions
from moonwhale.options import Parser, above_zero, add_options, read_argv
from moonwhale.packaged import FOLDER_HELP, checkpoint_or_packaged
from moonwhale.presets import PRESETS
from moonwhale.reports import add_json, reporting
from moonwhale.train.config import ModelOverrides


def main_info(argv: list[str]) -> None:
    """Prints the parameters, FLOPs, cache and memory of a preset or a checkpoint."""
    parser = Parser(
        prog="moonwhale info",
        description="Parameters, FLOPs, cache and memory of a preset or a checkpoint.\n"
        "--model.FIELD VALUE overrides a field of the model's configuration: see `moonwhale train --help`.",
        examples=("moonwhale info seed_190m --context 4096", "moonwhale info runs/mine --json"),
        epilog="presets:\n" + "\n".join(f"  {name:<11}{preset.summary}" for name, preset in PRESETS.items()),
    )
    target = parser.add_argument("target", metavar="PRESET_OR_FOLDER", help="a preset's name or a checkpoint's folder")
    target.suggestions = PRESETS
    number = {"type": above_zero(int), "metavar": "N"}
    parser.add_argument("--context", **number, help="tokens per row (the longest that the model is made for)")
    parser.add_argument("--batch", **number, default=1, help="rows at once (1)")
    add_json(parser)
    add_options(parser, ModelOverrides, show=False)
    overrides, args = read_argv(parser, ModelOverrides, argv)

    from moonwhale.inspect.info import find_config, gather_figures, table

    with reporting(args.json) as show:
        config, run = find_config(args.target, overrides)
        figures = gather_figures(config, args.context or config.max_position_embeddings, args.batch, run)
        show(figures, table(args.target, figures))


def main_xray(argv: list[str]) -> None:
    """Writes an HTML page about a prompt and the model's answer to it."""
    args = _xray_parser().parse_args(argv)
    args.out = expanded(args.out)
    out = Path(args.out)
    if out.is_dir() or not out.parent.is_dir():
        raise UserError(f"`out`: {args.out} is no place for a file: give a path in a folder that exists")
    require_writable(out.parent, "out")
    if args.chat and args.prompt is None:
        raise UserError("`chat`: there is no `prompt` to answer: give one, or leave both out for an example")
    if args.max_new_tokens < 0:
        raise UserError(f"`max_new_tokens`: {args.max_new_tokens} is below 0: give the tokens of the answer, or 0")
    if args.temperature and not args.max_new_tokens:
        raise UserError("`temperature`: it has no effect with `max_new_tokens` 0: leave one of them out")
    if args.seed is not None and not args.temperature:
        raise UserError("`seed`: it has no effect with `temperature` 0: give a higher one, or leave it out")
    options = SamplingOptions(
        max_new_tokens=max(args.max_new_tokens, 1), temperature=args.temperature, seed=args.seed or 0
    )

    from moonwhale.checkpoint import open_checkpoint
    from moonwhale.infer.engine import Engine
    from moonwhale.inspect.example import example_conversation
    from moonwhale.inspect.xray import clip_threshold, xray

    with reporting(args.json) as show:
        folder = checkpoint_or_packaged(args.folder)
        model, tokenizer = open_checkpoint(folder)
        engine = Engine(model, tokenizer)
        if args.prompt is None:
            ids = example_conversation(engine, options.max_new_tokens)
        else:
            ids = engine.encode([{"role": "user", "content": args.prompt}] if args.chat else args.prompt)
        answer = engine.generate([ids], **vars(options))[0].token_ids if args.max_new_tokens > 0 else []
        out.write_text(xray(model, tokenizer, ids + answer, len(ids), clip_threshold(folder)), encoding="utf-8")
        result = {"out": args.out, "prompt_tokens": len(ids), "answer_tokens": len(answer)}
        show(result, f"wrote {out}: {len(ids)} tokens of prompt, {len(answer)} of answer; open it in a browser")


def _xray_parser() -> Parser:
    parser = Parser(
        prog="moonwhale xray",
        description="See what happens inside the model, in one HTML file.",
        examples=(
            'moonwhale xray runs/mine --chat --prompt "Hi!"',
            'moonwhale xray runs/mine --prompt "Once upon a time" --max-new-tokens 0 --out story.html',
        ),
    )
    add = parser.add_argument
    add("folder", metavar="FOLDER", nargs="?", help=FOLDER_HELP)
    prompt = "text to continue, or with --chat a message to answer (a conversation of several MoBA blocks)"
    add("--prompt", metavar="TEXT", help=prompt)
    add("--chat", action="store_true", help="treat the prompt as a chat message")
    add("--max-new-tokens", type=int, default=48, metavar="N", help="longest answer; 0 for none (%(default)s)")
    add("--temperature", type=float, default=0.0, metavar="T", help="0 takes the most likely token (%(default)s)")
    add("--seed", type=int, metavar="N", help="seed of the sampling (0)")
    add("--out", default="xray.html", metavar="FILE", help="file to write (%(default)s)")
    add_json(parser)
    return parser


def main_doctor(argv: list[str]) -> None:
    """Prints what this machine can do."""
    parser = Parser(
        prog="moonwhale doctor",
        description="Show what this machine can do, and why not more.",
        examples=("moonwhale doctor", "moonwhale doctor --json"),
    )
    add_json(parser)
    args = parser.parse_args(argv)

    from moonwhale.inspect.doctor import examine, table

    with reporting(args.json) as show:
        report = examine()
        show(report, table(report))
