"""`moonwhale xray`. Heavy imports wait until the arguments are known to be good."""

from pathlib import Path

from moonwhale.errors import UserError
from moonwhale.infer.sampling_options import SamplingOptions
from moonwhale.options import Parser


def main(argv: list[str]) -> None:
    """Writes the page about a prompt and the answer to it."""
    parser = Parser(prog="moonwhale xray", description="See what happened inside the model: one HTML file.")
    add = parser.add_argument
    add("folder", metavar="FOLDER", help="checkpoint: what a run wrote with --out")
    add("--prompt", required=True, metavar="TEXT", help="text to continue, or with --chat a message to answer")
    add("--chat", action="store_true", help="answer the prompt as a message")
    add("--max-new-tokens", type=int, default=48, metavar="N", help="longest answer, 0 for none (%(default)s)")
    add("--temperature", type=float, default=0.0, metavar="T", help="0 takes the likeliest token (%(default)s)")
    add("--seed", type=int, default=0, metavar="N", help="of the draws (%(default)s)")
    add("--out", default="xray.html", metavar="FILE", help="the page (%(default)s)")
    args = parser.parse_args(argv)
    out = Path(args.out)
    if out.is_dir() or not out.parent.is_dir():
        raise UserError(f"--out: {args.out} is no place for a file: give a path in a folder that exists")
    options = SamplingOptions(max_new_tokens=max(args.max_new_tokens, 1), temperature=args.temperature, seed=args.seed)

    from moonwhale.checkpoint import open_checkpoint
    from moonwhale.infer.engine import Engine
    from moonwhale.inspect.xray import xray

    model, tokenizer = open_checkpoint(args.folder)
    engine = Engine(model, tokenizer)
    ids = engine.encode([{"role": "user", "content": args.prompt}] if args.chat else args.prompt)
    answer = engine.generate([ids], **vars(options))[0].token_ids if args.max_new_tokens > 0 else []
    out.write_text(xray(model, tokenizer, ids + answer, len(ids)), encoding="utf-8")
    print(f"wrote {out}: {len(ids)} tokens of prompt, {len(answer)} of answer; open it in a browser")
