"""Hostile files of settings and of data, and runs that their author damaged. Each draws from a seeded generator."""

import gzip
import hashlib
import json
import os
import pickle
import random
from pathlib import Path

from hostile_folders import CANARY, ODD, WEIGHTS, Touch
from moonwhale.manifest import MANIFEST, write_manifest

PATHS = [
    "x" * 300,
    "/".join(["y" * 200] * 30),
    "a\0b",
    "loop/a",
    "file/a",
    "/proc/a",
    "/dev/null/a",
    "a\ud800b",
    "~nobody/a",
]
PATHS += ["x" * 300 + "*", "a\0*", "/dev/zero"]  # `name_paths` makes the loop and the file


def bomb_of_aliases(path: Path, draw: random.Random) -> None:
    lines = ["a0: &a0 [x, x]"] + [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 10)]
    path.write_text("\n".join([*lines, draw.choice(["steps: *a9", "model: *a9", "lr: 1"])]))


def yaml(path: Path, draw: random.Random) -> None:
    texts = [
        "steps: !!timestamp 2001-99-99",
        "steps: !!int x",
        "data: !!binary '*'",
        "? [a]: b",
        "&a [*a]",
        "steps: &a {<<: *a}",
    ]
    texts += [
        f"!!python/object/apply:os.system ['touch {CANARY}']",
        "model: " + "[" * 5000,
        "\x1b[2J: 5",
        "a: \x00",
        "",
    ]
    texts += [
        "steps: " + "9" * 5000,
        "steps: 1" + ":1" * 120_000,
        "lr: 0." + "1" * 250_000,
        '"\\e[2J": 5',
        "x" * 200_000 + ": 5",
        "steps: 5\nsteps: 6",
        "model: {hidden_size: [1]}",
    ]
    texts += [f"{draw.choice(['steps', 'lr', 'data', 'model', 'report_to'])}: {json.dumps(draw.choice(ODD[:-1]))}"]
    texts += ["data: " + "x" * 10**6, "- 1", "steps", "!!set {a}", "model: !!omap [1]", "%YAML 9.9\n---\na"]
    path.write_text(draw.choice(texts))


def name_paths(path: Path, draw: random.Random) -> None:
    """Name, in settings that would do otherwise, a path that no file system takes."""
    (path.parent / "loop").symlink_to("loop")
    (path.parent / "file").write_text("the whale sings to the moon " * 99)
    values = {"data": "file", "out": "out", "steps": 1} | {draw.choice(["data", "out", "tokenizer", "from"]): None}
    path.write_text(json.dumps({name: draw.choice(PATHS) if v is None else v for name, v in values.items()}))


def data(path: Path, draw: random.Random) -> None:
    long = b"a" * (1 << 26)
    rows = [
        b"[" * 10**5,
        b'{"text": ' + b"[" * 10**5,
        b'{"text": "\\ud800"}',
        b"\xff\xfe",
        b'{"text": "\x1b[2J',
        b"{}",
        b"",
    ]
    rows += [
        b'{"text": 5}',
        b'{"text": null}',
        b'{"messages": [{"role": "\x1b[2J", "content": 5}]}',
        b"\0" * 100,
        long[:300_000],
    ]
    path.write_bytes(b"\n".join(draw.choices(rows, k=draw.choice([1, 5, 30]))))


def bomb(path: Path, draw: random.Random) -> None:
    block = draw.choice([b"\0", b"a", b'{"text": "', b"[", b"a\n"]) * (1 << 20)
    with gzip.open(path, "wb", compresslevel=1) as file:
        for _ in range(2200):  # more than 2 GB
            file.write(block)


def damage_record(run: Path, draw: random.Random) -> None:
    """Put a pipe or bytes in the place of a run's data.txt or lock, or let a manifest name a large file very often."""
    checkpoint, path = max(run.glob("checkpoint-*")), run / draw.choice(["data.txt", ".lock", "manifest"])
    path.unlink(missing_ok=True)
    if path.name != "manifest":
        make = draw.choice([os.mkfifo, lambda path: path.write_bytes(b"\xff")])
        make(path)
        return
    (checkpoint / "large").touch()
    os.truncate(checkpoint / "large", 1 << 28)  # takes no space on the disk
    write_manifest(checkpoint)
    files = json.loads((checkpoint / MANIFEST).read_bytes())["files"]
    files |= {"./" * i + "large": files["large"] for i in range(2000)}
    total = hashlib.sha256(json.dumps(files, sort_keys=True).encode()).hexdigest()
    (checkpoint / MANIFEST).write_text(json.dumps({"files": files, "sha256": total}))


def damage_run(run: Path, draw: random.Random) -> None:
    """Change a file of the only checkpoint of a run, and its manifest with it, as its author could."""
    if draw.random() < 0.3:
        damage_record(run, draw)
        return
    checkpoint = max(run.glob("checkpoint-*"))
    name = draw.choice(
        ["trainer_state.json", "optimizer.pt", "scheduler.pt", "rng_state.pth", WEIGHTS, "config.json", "run.yaml"]
    )
    path = checkpoint / name if name != "run.yaml" else run / name
    if not path.exists():
        path = checkpoint / "trainer_state.json"
    kind, good = draw.choice(["pickle", "json", "cut", "bytes"]), path.read_bytes()
    if path.suffix == ".json" and kind == "json":
        values = json.loads(good)
        values[draw.choice(sorted(values))] = draw.choice(ODD[:-1])
        path.write_text(json.dumps(values))
    else:
        contents = {"pickle": pickle.dumps(Touch()), "cut": good[: len(good) // 2], "bytes": draw.randbytes(200)}
        path.write_bytes(contents.get(kind, b"{}"))
    if draw.random() < 0.7:
        (checkpoint / MANIFEST).unlink()
        write_manifest(checkpoint)
