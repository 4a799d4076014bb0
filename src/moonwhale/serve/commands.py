"""`moonwhale serve`. Heavy imports wait until the arguments are known to be good."""

import os
import socket
from pathlib import Path

from moonwhale.errors import UserError
from moonwhale.infer.commands import add_machine_options, load_engine
from moonwhale.options import Parser


def main(argv: list[str]) -> None:
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
    add_machine_options(parser)
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
        engine = load_engine(args, memory=memory, sequences=args.max_sequences)

        from moonwhale.serve.app import serve
        from moonwhale.serve.middleware import Limits

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
