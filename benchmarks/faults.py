"""What do faults, hostile files and hostile clients do to moonwhale? Writes results/faults.json.

Part `files` opens checkpoint folders and files that were damaged on purpose, and `server` attacks a server while
another client's answer is streamed. `kills`, `owners`, `flips` and `disks` damage training runs; `fsync` times what
their checkpoints wait for. docs/reliability.md says what is promised. Each part's commit and machine are kept in
`environments`.
"""

import json
from importlib import import_module
from pathlib import Path

import common

RUNS = ("kills", "owners", "flips", "disks", "fsync")
PARTS = ("files", *RUNS, "server")


def main(argv: list[str] | None = None) -> None:
    parser = common.options(__doc__.splitlines()[0])
    parser.add_argument("--checkpoint", type=Path, default=common.ROOT / "runs" / "demo", help="model that is served")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS, help="parts to run; other figures stay")
    args = parser.parse_args(argv)
    path = args.results / "faults.json"
    result = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    for part in args.parts:
        environment = common.environment("fp32", allocator_tuned=False)  # before: the commit may change meanwhile
        run = import_module("faults_runs" if part in RUNS else f"faults_{part}").run
        result |= run(part) if part in RUNS else run(args.checkpoint) if part == "server" else run()
        result["environments"] = result.get("environments", {}) | {part: environment}
        common.write(args.results, "faults", result)


if __name__ == "__main__":
    main()
