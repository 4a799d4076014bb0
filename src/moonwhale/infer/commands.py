"""`moonwhale generate` and `chat`. Heavy imports wait until the arguments are known to be good."""

import argparse
import contextlib
import sys
from collections.abc import Iterable

from moonwhale.errors import UserError, with_option_names
from moonwhale.infer.sampling_options import SamplingOptions
from moonwhale.options import Parser

DEVICES = ("auto", "cpu", "cuda", "mps")
PRECISIONS = ("auto", "fp32", "bf16", "int8")

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
    engine = load_engine(args)
    if args.chat:
        from moonwhale.infer.chat_session import ChatSession

        conversation = ChatSession(engine, **options)
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
    engine = load_engine(args)

    from moonwhale.infer.chat_session import ChatSession

    with contextlib.suppress(ImportError):  # which Windows lacks
        import readline  # noqa: F401 (gives input() a history)

    print("Ctrl-C stops an answer, Ctrl-D or /quit leaves, /help tells more.", file=sys.stderr)
    conversation = ChatSession(engine, **options)
    while (text := _read_turn()) is not None:
        if text == "/quit":
            return
        if text == "/reset":
            conversation = ChatSession(engine, **options)
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
                print(f"moonwhale: {with_option_names(str(error))}", file=sys.stderr)


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
    add_machine_options(parser)
    parser.add_argument("--verbose", action="store_true", help="print tokens a second even where nobody watches")


def add_machine_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("machine").add_argument
    add(
        "--device", default="auto", metavar="D", help="auto, cpu, cuda, cuda:N or mps (%(default)s)"
    ).suggestions = DEVICES
    add(
        "--precision", default="auto", metavar="P", help="of the weights: auto, fp32, bf16 or int8 (%(default)s)"
    ).suggestions = PRECISIONS
    add("--draft", default="auto", metavar="N", help="tokens that MTP modules guess ahead, 0 for none (%(default)s)")


def _sampling(args: argparse.Namespace) -> dict:
    """The sampling options given, found good."""
    values = {name: getattr(args, name) for name in SamplingOptions.__dataclass_fields__}
    given = {name: value for name, value in values.items() if value is not None}
    if args.greedy and given.get("temperature"):
        raise UserError(f"`greedy` contradicts `temperature` {args.temperature}: give one of them")
    options = given | ({"temperature": 0.0} if args.greedy else {})
    SamplingOptions(**options)
    return options


def load_engine(args: argparse.Namespace, **options):
    if args.draft != "auto" and not args.draft.isdecimal():
        raise UserError(f"`draft`: {args.draft!r} is neither auto nor a number of tokens (0 switches it off)")

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
