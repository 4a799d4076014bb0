"""The verb `moonwhale serve`. It imports torch and FastAPI only after it has checked the arguments."""

import os
import re
import socket
import sys
from argparse import Namespace
from pathlib import Path

from moonwhale.errors import UserError, shown
from moonwhale.infer.commands import add_machine_options, load_engine
from moonwhale.options import Parser, require
from moonwhale.packaged import FOLDER_HELP, checkpoint_or_packaged
from moonwhale.serve.limits import LOOPBACK, Limits
from moonwhale.serve.names import host_name, origin

LOCAL = ("127.0.0.1", "localhost", "::1")  # addresses that only this machine reaches


def main(argv: list[str]) -> None:
    """Serves a checkpoint until Ctrl-C or SIGTERM."""
    args = _parser().parse_args(argv)
    for name in ("max_sequences", "max_queue", "max_body", "timeout", "cache_mb"):
        value = getattr(args, name)
        require(args, name, value is None or value > 0, "give a number above 0")
    require(args, "port", 0 <= args.port < 65536, "give a number from 0 to 65535")
    args.folder = checkpoint_or_packaged(args.folder)
    name = args.name or Path(args.folder).resolve().name
    if not name.isprintable() or not name.strip():
        raise UserError(f"`name`: {shown(name)} cannot be sent to clients: give one of printable characters, in UTF-8")
    api_key = os.environ.get("MOONWHALE_API_KEY") if args.api_key is None else args.api_key
    if api_key is not None and not re.fullmatch("[!-~]+", api_key):  # one that is empty would let everyone in
        raise UserError("`api_key`: give at least one character, only printable ASCII ones without spaces")
    cache_bytes = None if args.cache_mb is None else 1_000_000 * args.cache_mb
    hosts = _hosts(args)
    origins = [origin(given) for given in args.cors_origin]
    if args.host not in LOCAL and not api_key:
        print(f"warning: whoever reaches {args.host} can use this server: give it an --api-key", file=sys.stderr)
    with _listen(args.host, args.port) as listener:
        engine = load_engine(args, memory=cache_bytes, sequences=args.max_sequences)

        from moonwhale.serve.server import run_server

        bodies = max(Limits.bodies, args.max_body)
        limits = Limits(body=args.max_body, bodies=bodies, queue=args.max_queue, answer=args.timeout)
        run_server(engine, name, Path(args.folder), listener, limits, api_key, hosts, origins, args.restart)


def _parser() -> Parser:
    parser = Parser(
        prog="moonwhale serve",
        description="OpenAI's API (chat completions, completions, models) and a chat page, for one machine.",
        examples=("moonwhale serve runs/talks", "moonwhale serve runs/talks --port 8080 --api-key my-key"),
    )
    parser.add_argument("folder", metavar="FOLDER", nargs="?", help=FOLDER_HELP)
    add = parser.add_argument_group("server").add_argument
    add("--host", default="127.0.0.1", metavar="H", help="address to listen at; 0.0.0.0 lets others in (%(default)s)")
    add("--port", type=int, default=8000, metavar="P", help="port; 0 takes a free one (%(default)s)")
    add("--name", metavar="NAME", help="name of the model in the API (the folder's)")
    add("--api-key", metavar="KEY", help="key that clients must send; or set MOONWHALE_API_KEY (none)")
    help = "another host name to answer to, such as a proxy's; repeatable (localhost's, or any with --host)"
    add("--allowed-host", action="append", default=[], metavar="NAME", help=help)
    help = "origin whose web pages may call the server (CORS), or '*'; repeatable (none)"
    add("--cors-origin", action="append", default=[], metavar="URL", help=help)
    help = "restart the model's thread if it fails, instead of ending with an error status"
    add("--restart", action="store_true", help=help)
    add = parser.add_argument_group("limits").add_argument
    add("--max-sequences", type=int, default=64, metavar="N", help="answers generated at a time (%(default)s)")
    help = "prompts that may wait; one more gets 429 (%(default)s)"
    add("--max-queue", type=int, default=Limits.queue, metavar="N", help=help)
    add("--max-body", type=int, default=Limits.body, metavar="BYTES", help="largest request (%(default)s)")
    add(
        "--timeout",
        type=float,
        default=Limits.answer,
        metavar="S",
        help="seconds that an answer may take (%(default)s)",
    )
    add("--cache-mb", type=int, metavar="MB", help="memory for the latent cache (half of the free memory)")
    add_machine_options(parser)
    return parser


def _hosts(args: Namespace) -> set[str] | None:
    """Returns the host names to answer to, or None for any name."""
    names = {host_name(given) for given in args.allowed_host}
    return LOOPBACK | names if args.host in LOCAL or names else None


def _listen(host: str, port: int) -> socket.socket:
    """Returns a socket that is bound before the model loads, so that a taken port is an error at once."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=2048)
    except (TypeError, ValueError) as error:  # of the codec for host names, or of a null character
        raise UserError(f"`host`: {shown(host)} is no address: give one, such as 127.0.0.1") from error
    except OSError as error:
        reason = (error.strerror or str(error)).partition(" (")[0]
        raise UserError(f"`port`: cannot listen at {host}:{port}, {reason}: choose another (0: a free one)") from error
