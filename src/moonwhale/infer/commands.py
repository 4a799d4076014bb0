"""`moonwhale generate`, `chat`, `serve` and `xray`. Heavy imports wait until the arguments are known to be good."""

import argparse
import contextlib
import os
import socket
import sys
from collections.abc import Iterable
from pathlib import Path

from moonwhale.errors import UserError
from moonwhale.infer.sampling import SamplingOptions
from moonwhale.options import Parser

HELP = """/reset   begin a new conversation
/quit    leave (or Ctrl-D)
/help    this
Ctrl-C stops an answer."""


def main_generate(argv: list[str]) -> None:
    """Continues each prompt or, with --chat, answers them as the turns of one conversation."""
    parser = Parser(prog="moonwhale generate", description="Continue texts, or answer messages, with a trained model.")
    parser.add_argument("folder", metavar="FOLDER", help="checkpoint: what a run wrote with --out")
    parser.add_argument("prompts", metavar="PROMPT", nargs="*", help="text; without any, standard input is read")
    parser.add_argument("--chat", action="store_true", help="PROMPTs (or lines) are a user's turns in one conversation")
    _add_options(parser)
    args = parser.parse_intermixed_args(argv)
    options = _sampling(args)
    prompts = args.prompts or _standard_input(args.chat)
    engine = _load(args)
    if args.chat:
        from moonwhale.infer.conversation import Conversation

        conversation = Conversation(engine, **options)
        for prompt in prompts:
            print(f"you: {prompt}")
            _answer(conversation, prompt, args.verbose)
        return
    for i, prompt in enumerate(prompts):
        stream = engine.stream(prompt, **options)
        _print_pieces(stream, "\n" * (i > 0) + prompt)
        _report(engine, stream.completion(), args.verbose)


def main_chat(argv: list[str]) -> None:
    """Talks in the terminal."""
    parser = Parser(prog="moonwhale chat", description="Talk to a trained model.", epilog=HELP)
    parser.add_argument("folder", metavar="FOLDER", help="checkpoint: what a run wrote with --out")
    _add_options(parser)
    args = parser.parse_args(argv)
    options = _sampling(args)
    engine = _load(args)

    from moonwhale.infer.conversation import Conversation

    with contextlib.suppress(ImportError):  # which Windows lacks
        import readline  # noqa: F401 (gives input() a history)

    print("Ctrl-C stops an answer, Ctrl-D or /quit leaves, /help tells more.", file=sys.stderr)
    conversation = Conversation(engine, **options)
    while (text := _read_turn()) is not None:
        if text == "/quit":
            return
        if text == "/reset":
            conversation = Conversation(engine, **options)
        elif text == "/help":
            print(HELP, file=sys.stderr)
        elif text.startswith("/"):
            print(f"unknown command {text.split()[0]} (try /help)", file=sys.stderr)
        elif text:
            try:
                _answer(conversation, text, args.verbose)
            except KeyboardInterrupt:
                print()
            except UserError as error:
                print(f"moonwhale: {error}", file=sys.stderr)


def _add_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("sampling").add_argument
    default = SamplingOptions()
    add("--max-new-tokens", type=int, metavar="N", help=f"longest answer ({default.max_new_tokens})")
    add("--temperature", type=float, metavar="T", help=f"0 takes the likeliest token ({default.temperature})")
    add("--greedy", action="store_true", help="the same as --temperature 0")
    add("--top-k", type=int, metavar="K", help=f"choose among the K likeliest tokens, 0: all ({default.top_k})")
    add("--top-p", type=float, metavar="P", help=f"among the likeliest that together have this share ({default.top_p})")
    add("--min-p", type=float, metavar="P", help=f"among those P times as likely as the likeliest ({default.min_p})")
    add(
        "--repetition-penalty",
        type=float,
        metavar="X",
        help=f"above 1 avoids repeats ({default.repetition_penalty})",
    )
    add("--stop", action="append", metavar="TEXT", help="end the answer before this text; may be repeated")
    add("--seed", type=int, metavar="N", help="the same seed gives the same answer (random)")
    _add_machine(parser)
    parser.add_argument("--verbose", action="store_true", help="print tokens a second even where nobody watches")


def _add_machine(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("machine").add_argument
    add("--device", default="auto", metavar="D", help="auto, cpu, cuda, cuda:N or mps (%(default)s)")
    add("--precision", default="auto", metavar="P", help="of the weights: auto, fp32, bf16 or int8 (%(default)s)")
    add("--draft", default="auto", metavar="N", help="tokens that MTP modules guess ahead, 0 for none (%(default)s)")


def _sampling(args: argparse.Namespace) -> dict:
    """The sampling options given, found good."""
    values = {name: getattr(args, name) for name in SamplingOptions.__dataclass_fields__}
    given = {name: value for name, value in values.items() if value is not None}
    if args.greedy and given.get("temperature"):
        raise UserError(f"--greedy contradicts --temperature {args.temperature}: give one of them")
    options = given | ({"temperature": 0.0} if args.greedy else {})
    SamplingOptions(**options)
    return options


def _load(args: argparse.Namespace, **options):
    if args.draft != "auto" and not args.draft.isdecimal():
        raise UserError(f"--draft: {args.draft!r} is neither auto nor a number of tokens (0 switches it off)")

    from moonwhale.infer.engine import Engine

    draft = None if args.draft == "auto" else int(args.draft)
    return Engine.load(args.folder, args.device, args.precision, draft=draft, **options)


def _standard_input(lines: bool) -> list[str]:
    """What is piped in: one prompt, or one a line."""
    try:
        text = "" if sys.stdin.isatty() else sys.stdin.read()
    except UnicodeDecodeError as error:
        raise UserError("standard input is not UTF-8 text") from error
    prompts = [line for line in text.splitlines() if line.strip()] if lines else [text.removesuffix("\n")]
    if not any(prompts):
        raise UserError("there is no PROMPT: give one, or pipe a text in")
    return prompts


def _read_turn() -> str | None:
    """A line from the terminal, None at its end."""
    while True:
        try:
            return input("you: ").strip()
        except EOFError:
            print()
            return None
        except KeyboardInterrupt:
            print("\n(Ctrl-D or /quit leaves)", file=sys.stderr)


def _answer(conversation, text: str, verbose: bool) -> None:
    forgetful = conversation.forgetful
    with contextlib.closing(conversation.ask(text)) as pieces:
        _print_pieces(pieces, "moonwhale: ")
    if conversation.forgetful and not forgetful:
        context = conversation.engine.context
        print(f"(longer than the context of {context:,} tokens: the oldest turns are forgotten)", file=sys.stderr)
    _report(conversation.engine, conversation.last, verbose)


def _print_pieces(pieces: Iterable[str], before: str) -> None:
    for piece in pieces:
        print(before + piece, end="", flush=True)
        before = ""
    print(before, flush=True)


def _report(engine, completion, verbose: bool) -> None:
    """What the text does not show, for those who watch."""
    if completion.prompt_tokens + len(completion.token_ids) == engine.context and completion.finish_reason == "length":
        print(f"(ended because the model's context of {engine.context:,} tokens is full)", file=sys.stderr)
    if verbose or sys.stderr.isatty():
        drafts = ""
        if completion.acceptance:
            held = ", ".join(f"{share:.0%}" for share in completion.acceptance)
            drafts = f", {completion.tokens_per_forward:.2f} tokens a forward, guesses held: {held}"
        n, speed = len(completion.token_ids), completion.tokens_per_second
        print(f"({n} tokens, {speed:.0f} tokens/s{drafts})", file=sys.stderr)


def main_serve(argv: list[str]) -> None:
    """Serves a checkpoint until Ctrl-C or SIGTERM."""
    parser = Parser(
        prog="moonwhale serve",
        description="OpenAI's API (chat completions, completions, models) and a chat page, for one machine.",
    )
    parser.add_argument("folder", metavar="FOLDER", help="checkpoint: what a run wrote with --out")
    add = parser.add_argument_group("server").add_argument
    add("--host", default="127.0.0.1", metavar="H", help="address to listen at; 0.0.0.0 lets others in (%(default)s)")
    add("--port", type=int, default=8000, metavar="P", help="0 takes a free one (%(default)s)")
    add("--name", metavar="NAME", help="the model's name in the API (the folder's)")
    add("--api-key", metavar="KEY", help="ask for this key; or set MOONWHALE_API_KEY (none)")
    add = parser.add_argument_group("limits").add_argument
    add("--max-sequences", type=int, default=64, metavar="N", help="answers written at a time (%(default)s)")
    add("--max-queue", type=int, default=256, metavar="N", help="prompts that may wait, then 429 (%(default)s)")
    add("--max-body", type=int, default=1_000_000, metavar="BYTES", help="of a request (%(default)s)")
    add("--timeout", type=float, default=600, metavar="S", help="seconds an answer may take (%(default)s)")
    add("--cache-mb", type=int, metavar="MB", help="memory for the latent cache (half of what is free)")
    _add_machine(parser)
    args = parser.parse_args(argv)
    for name in ("max_sequences", "max_queue", "max_body", "timeout", "cache_mb"):
        value = getattr(args, name)
        if value is not None and value <= 0:
            raise UserError(f"--{name.replace('_', '-')}: {value} is impossible: give a number above 0")
    memory = None if args.cache_mb is None else 1_000_000 * args.cache_mb
    name = args.name or Path(args.folder).resolve().name
    key = args.api_key or os.environ.get("MOONWHALE_API_KEY")
    local = args.host in ("127.0.0.1", "localhost", "::1")
    with _listen(args.host, args.port) as listener:
        engine = _load(args, memory=memory, sequences=args.max_sequences)

        from moonwhale.infer.guard import Limits
        from moonwhale.infer.server import serve

        limits = Limits(body=args.max_body, queue=args.max_queue, answer=args.timeout)
        serve(engine, name, listener, limits, key, local, Path(args.folder))


def _listen(host: str, port: int) -> socket.socket:
    if not 0 <= port < 65536:
        raise UserError(f"--port: {port} is impossible: give a number from 0 to 65535")
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=2048)
    except OSError as error:
        why = (error.strerror or str(error)).partition(" (")[0]
        raise UserError(f"--port: cannot listen at {host}:{port}, {why}: choose another (0: a free one)") from error


def main_xray(argv: list[str]) -> None:
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

    from moonwhale.infer.checkpoint import open_checkpoint
    from moonwhale.infer.engine import Engine
    from moonwhale.xray import xray

    model, tokenizer = open_checkpoint(args.folder)
    engine = Engine(model, tokenizer)
    ids = engine.encode([{"role": "user", "content": args.prompt}] if args.chat else args.prompt)
    answer = engine.generate([ids], **vars(options))[0].token_ids if args.max_new_tokens > 0 else []
    out.write_text(xray(model, tokenizer, ids + answer, len(ids)), encoding="utf-8")
    print(f"wrote {out}: {len(ids)} tokens of prompt, {len(answer)} of answer; open it in a browser")
