"""`moonwhale generate` and `moonwhale chat`. Heavy imports come after the arguments have been checked."""

import argparse
import contextlib
import io
import json
import os
import re
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

from moonwhale.errors import UserError, shown, with_option_names
from moonwhale.files import expanded
from moonwhale.infer.sampling_options import SamplingOptions
from moonwhale.options import DEVICES, Parser
from moonwhale.packaged import FOLDER_HELP, checkpoint_or_packaged
from moonwhale.reports import add_json, reporting

PRECISIONS = ("auto", "fp32", "bf16", "int8")
IDLE_IF_GREEDY = {"top_k": 0, "top_p": 1.0, "min_p": 0.0, "seed": None}  # with the values that ask for nothing

HELP = """/retry      answer the last message again
/undo       take the last message and its answer back
/save FILE  append the turns that the model still sees to FILE, a line of JSON as `moonwhale sft` reads it
/reset      begin a new conversation
/quit       leave (or press Ctrl-D)
/help       show this help
Ctrl-C stops an answer."""


def main_generate(argv: list[str]) -> None:
    """Continue each prompt. With --chat, answer the prompts as the user's turns of one conversation."""
    args = _generate_parser().parse_intermixed_args(argv)
    options = _sampling_options(args)
    args.folder, prompts = _folder_and_prompts(args)
    with reporting(args.json) as show:
        engine = load_engine(args)
        answer = _continue_conversation if args.chat else _continue_texts
        answers = [
            {"prompt": prompt, "text": c.text, "tokens": len(c.token_ids), "finish_reason": c.finish_reason}
            for prompt, c in zip(prompts, answer(engine, prompts, options, args.verbose), strict=True)
        ]
        show({"answers": answers})


def _generate_parser() -> Parser:
    parser = Parser(
        prog="moonwhale generate",
        description="Continue texts, or answer messages, with a trained model.",
        examples=(
            'moonwhale generate runs/mine "Once upon a time" --temperature 0.8 --seed 1',
            'moonwhale generate runs/talks --chat "Hi!" "What do you like to do for fun?"',
        ),
    )
    _add_folder(parser)
    parser.add_argument(
        "prompts",
        metavar="PROMPT",
        nargs="*",
        help="text to continue; without one, standard input is read",
    )
    parser.add_argument(
        "--chat", action="store_true", help="treat PROMPTs (or lines) as the user's turns of one conversation"
    )
    _add_options(parser)
    add_json(parser)
    return parser


def _folder_and_prompts(args: argparse.Namespace) -> tuple[str | None, list[str]]:
    """Tell FOLDER from a first PROMPT. What is no folder is a prompt if it has spaces or punctuation ("Hi!"), or if it
    is the only text and looks like no path ("Hello").
    """
    folder, prompts = args.folder, args.prompts
    no_folder = folder is not None and not os.path.exists(folder)  # Path.exists raises OSError for long prompts
    if no_folder and re.search(r"[\s!?,;]", folder):
        return None, [folder, *prompts]
    prompts = prompts or _standard_input(args.chat)
    if not prompts and no_folder and not re.search(r"[./\\\0\ud800-\udfff]", folder):
        return None, [folder]
    if not prompts:
        raise UserError("there is no PROMPT: give one, or pipe a text in")
    return folder, prompts


def _continue_texts(engine, prompts: list[str], options: dict, verbose: bool) -> Iterator:
    """Print each prompt with its continuation, and yield the Completion."""
    for i, prompt in enumerate(prompts):
        stream = engine.stream(prompt, **options)
        _print_pieces(stream, "\n" * (i > 0) + prompt)
        _report(engine, stream.completion(), verbose)
        yield stream.completion()


def _continue_conversation(engine, prompts: list[str], options: dict, verbose: bool) -> Iterator:
    """Print the user's turns with their answers, and yield each answer's Completion."""
    from moonwhale.infer.chat_session import ChatSession

    session = ChatSession(engine, **options)
    for prompt in prompts:
        print(f"you: {prompt}")
        _answer(session, prompt, verbose)
        yield session.last


def main_chat(argv: list[str]) -> None:
    """Hold a conversation in the terminal."""
    parser = Parser(
        prog="moonwhale chat",
        description="Talk to a trained model.",
        examples=("moonwhale chat runs/talks", "moonwhale chat runs/talks --temperature 0.5 --seed 0"),
        epilog=HELP,
    )
    _add_folder(parser)
    _add_options(parser)
    args = parser.parse_args(argv)
    options = _sampling_options(args)
    engine = load_engine(args)

    from moonwhale.infer.chat_session import ChatSession

    with contextlib.suppress(ImportError):  # Windows has no readline
        import readline  # noqa: F401 (gives input() a history)

    print("Ctrl-C stops an answer, Ctrl-D or /quit leaves, /help lists the commands.", file=sys.stderr)
    with contextlib.suppress(AttributeError, io.UnsupportedOperation):  # not a plain file or terminal
        sys.stdin.reconfigure(errors="surrogateescape")  # the engine refuses what is not UTF-8, and the chat goes on
    session = ChatSession(engine, **options)
    while (text := _read_turn()) is not None:
        command, _, argument = text.partition(" ") if text.startswith("/") else ("", "", "")
        if command == "/quit":
            return
        if command == "/reset":
            session = ChatSession(engine, **options)
            continue
        try:
            if question := _run_command(session, command, argument.strip()) if command else text:
                _answer(session, question, args.verbose)
        except KeyboardInterrupt:
            print()
        except UserError as error:
            print(f"moonwhale: {with_option_names(str(error))}", file=sys.stderr)


def _run_command(session, command: str, argument: str) -> str | None:
    """Run a command of `moonwhale chat`. Return the message that has to be answered again, or else None."""
    if command == "/help":
        print(HELP, file=sys.stderr)
    elif command == "/save":
        _save(session.messages, argument)
    elif command not in ("/undo", "/retry"):
        raise UserError(f"unknown command {command} (try /help)")
    elif (question := session.undo()) is None:
        raise UserError("there is no turn yet")
    elif command == "/retry":
        return question
    else:
        print(f"(taken back: {question})", file=sys.stderr)
    return None


def _save(messages: list[dict], file: str) -> None:
    """Append a conversation to a JSON Lines file, without turns whose answer is blank: no training set may have any."""
    turns = [turn for turn in zip(messages[::2], messages[1::2], strict=True) if turn[1]["content"].strip()]
    if not file or not turns:
        raise UserError("there is no answer yet" if file else "/save needs the name of a file")
    try:
        with open(expanded(file), "a", encoding="utf-8") as lines:
            lines.write(json.dumps({"messages": [message for turn in turns for message in turn]}) + "\n")
    except OSError as error:
        raise UserError(f"cannot write {file}: {error.strerror}") from error
    print(f"({len(turns)} turns appended to {file})", file=sys.stderr)


def _add_folder(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", metavar="FOLDER", nargs="?", help=FOLDER_HELP)


def _add_options(parser: argparse.ArgumentParser) -> None:
    default = SamplingOptions()
    number = {"type": float, "metavar": "X"}
    add = parser.add_argument_group("sampling").add_argument
    add("--max-new-tokens", type=int, metavar="N", help=f"longest answer ({default.max_new_tokens})")
    add("--temperature", **number, help=f"0 takes the most likely token ({default.temperature})")
    add("--greedy", action="store_true", help="the same as --temperature 0")
    add("--top-k", type=int, metavar="N", help=f"sample among the N most likely tokens, 0 for all ({default.top_k})")
    add("--top-p", **number, help=f"sample among the most likely tokens that together reach X ({default.top_p})")
    add("--min-p", **number, help=f"sample among tokens at least X times as likely as the likeliest ({default.min_p})")
    add("--repetition-penalty", **number, help=f"above 1 avoids repetition ({default.repetition_penalty})")
    add("--stop", action="append", metavar="TEXT", help="end the answer before this text; may be repeated")
    add("--seed", type=int, metavar="N", help="the same seed gives the same answer (random)")
    add_machine_options(parser)
    parser.add_argument("--verbose", action="store_true", help="print tokens per second, also outside of a terminal")


def add_machine_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that `load_engine` reads."""
    add = parser.add_argument_group("machine").add_argument
    device = add("--device", default="auto", metavar="D", help="auto, cpu, cuda, cuda:N or mps (%(default)s)")
    device.suggestions = DEVICES
    precision_help = "precision of the weights: auto, fp32, bf16 or int8 (%(default)s)"
    precision = add("--precision", default="auto", metavar="P", help=precision_help)
    precision.suggestions = PRECISIONS
    add("--draft", default="auto", metavar="N", help="tokens that MTP modules draft ahead, 0 for none (%(default)s)")


def _sampling_options(args: argparse.Namespace) -> dict:
    """Return the sampling options that were given. Raises UserError if one is impossible or without effect."""
    values = {name: getattr(args, name) for name in SamplingOptions.__dataclass_fields__}
    given = {name: value for name, value in values.items() if value is not None}
    if args.greedy and given.get("temperature"):
        raise UserError(f"`greedy` contradicts `temperature` {args.temperature}: give one of them")
    options = given | ({"temperature": 0.0} if args.greedy else {})
    SamplingOptions(**options)
    if options.get("temperature") == 0:
        why = "`greedy`" if args.greedy else "`temperature` 0"
        for name, nothing in IDLE_IF_GREEDY.items():
            if given.get(name, nothing) != nothing:
                raise UserError(f"`{name}`: it has no effect with {why}: leave one of them out")
    return options


def load_engine(args: argparse.Namespace, **options):
    """Open the checkpoint with the machine options. `options` are further ones of the engine's constructor."""
    if args.draft != "auto" and not (args.draft.isdecimal() and len(args.draft) <= 15):
        raise UserError(f"`draft`: {shown(args.draft)} is neither auto nor a number of tokens (0 switches it off)")

    from moonwhale.checkpoint import read_config
    from moonwhale.infer.engine import Engine
    from moonwhale.precision import tune_allocator

    tune_allocator()
    draft = None if args.draft == "auto" else int(args.draft)
    folder = checkpoint_or_packaged(args.folder)
    if draft and draft > (modules := read_config(Path(folder)).num_nextn_predict_layers):
        raise UserError(f"`draft`: {draft} is impossible: {folder} has {modules} MTP modules: give at most that")
    return Engine.load(folder, args.device, args.precision, draft=draft, **options)


def _standard_input(lines: bool) -> list[str]:
    """Read standard input as one prompt, or as one prompt for each line. A terminal gives none."""
    try:
        text = "" if sys.stdin.isatty() else sys.stdin.read()
    except UnicodeDecodeError as error:
        raise UserError("standard input is not UTF-8 text") from error
    prompts = [line for line in text.splitlines() if line.strip()] if lines else [text.removesuffix("\n")]
    return [prompt for prompt in prompts if prompt]


def _read_turn() -> str | None:
    """Read a line from the terminal, or return None at its end."""
    while True:
        try:
            return input("you: ").strip()
        except EOFError:
            print()
            return None
        except KeyboardInterrupt:
            print("\n(Ctrl-D or /quit leaves)", file=sys.stderr)


def _answer(session, text: str, verbose: bool) -> None:
    """Print the answer to a turn, and say if earlier turns had to be dropped for the first time."""
    forgetful = session.forgetful
    with contextlib.closing(session.ask(text)) as pieces:
        _print_pieces(pieces, "moonwhale: ")
    if session.forgetful and not forgetful:
        context = session.engine.context
        message = f"the conversation exceeds the context of {context:,} tokens: its oldest turns are forgotten"
        print(f"({message})", file=sys.stderr)
    _report(session.engine, session.last, verbose)


def _print_pieces(pieces: Iterable[str], before: str) -> None:
    for piece in pieces:
        print(before + piece, end="", flush=True)
        before = ""
    print(before, flush=True)


def _report(engine, completion, verbose: bool) -> None:
    """Print on stderr if there is no text or the context is full and, in a terminal or if `verbose`, the speed."""
    if not completion.text:
        print("(the model ended the text at once)", file=sys.stderr)
    if completion.prompt_tokens + len(completion.token_ids) == engine.context and completion.finish_reason == "length":
        print(f"(ended because the model's context of {engine.context:,} tokens is full)", file=sys.stderr)
    if verbose or sys.stderr.isatty():
        drafts = ""
        if completion.acceptance:
            accepted = ", ".join(f"{share:.0%}" for share in completion.acceptance)
            drafts = f", {completion.tokens_per_forward:.2f} tokens per forward, drafts accepted: {accepted}"
        n, speed = len(completion.token_ids), completion.tokens_per_second
        print(f"({n} tokens, {speed:.0f} tokens/s{drafts})", file=sys.stderr)
