"""Opens checkpoint folders, data and settings that were damaged on purpose, each in a process with limits.

Every trial changes a good folder by one seeded mutator of hostile_folders.py, or writes one file of hostile_files.py,
and runs one verb on it. The verb must end within the limits of time and memory, with success or with one line of error.
Python files and pickles in the folder would write a canary if anything executed them.
"""

import contextlib
import io
import json
import os
import random
import resource
import shutil
import signal
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from forked_processes import ForkedProcess
from hostile_data import (
    columnar,
    globs,
    many_columns,
    many_fields,
    many_values,
    nested_messages,
    saved_set,
    task,
    weightless,
)
from hostile_files import PATHS, bomb, bomb_of_aliases, damage_run, data, name_paths, yaml
from hostile_folders import CANARY, CHATTING, FOLDERS, Folder

SECONDS, BYTES = 10, 2 << 30  # of processor time, which other processes on the machine do not prolong; of memory
PATIENCE = 90  # seconds on the clock
TRIALS = 320
MODEL = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 8,
    "n_routed_experts": 4,
    "moe_intermediate_size": 16,
    "num_nextn_predict_layers": 1,
    "max_position_embeddings": 96,
}
VERBS = {
    "info": ["info", "{folder}"],
    "generate": ["generate", "{folder}", "the whale aaaaaaaaaaaaaaaaaaaaaaaaaaaaaab", "--max-new-tokens", "2"],
    "chat": ["generate", "{folder}", "hello", "--chat", "--max-new-tokens", "2"],
    "eval": ["eval", "{folder}", "--data", "{texts}", "--rows", "2", "--context", "32", "--device", "cpu"],
    "deepseek": ["export", "{folder}", "--to", "deepseek", "--out", "{out}"],
    "gguf": ["export", "{folder}", "--to", "gguf", "--out", "{out}"],
    "code": ["export", "{folder}", "--to", "code", "--out", "{out}"],
    "moonwhale": ["export", "{folder}", "--to", "moonwhale", "--out", "{out}"],
    "xray": ["xray", "{folder}", "--prompt", "hello", "--chat", "--max-new-tokens", "2", "--out", "{out}"],
    "serve": ["serve", "{folder}", "--port", "0"],
    "sft": ["sft", "{folder}", "--data", "{chats}", "--out", "{out}", "--steps", "1", "--device", "cpu"],
    "tokenizer": ["tokenizer", "show", "{folder}", "hello"],
}
RESUME = ["train", "--resume", "--out", "{run}"]


CONFIG = ["train", "--config", "{file}", "--out", "{out}"]
RECIPE = ["recipe", "{file}"]
DATA = ["data", "--data", "{file}", "--vocab-size", "300", "--context", "32"]
DATA_SET = ["data", "--data", "{folder}", "--vocab-size", "300", "--context", "32"]
TASK = ["sample", "{good}", "--task", "{folder}", "--questions", "1", "--samples", "1", "--out", "{out}.jsonl"]
NAMED = """info {path}
generate {path} hi
xray {path} --prompt hi
xray {good} --prompt hi --out {path}
eval {path} --data file
eval {good} --data {path}
eval {good} --data file --context 16 --rows 1 --out {path}
data --data {path}
data --data file --tokenizer {path}
recipe {path}
serve {path}
train --config {path}
train --data file --out {path}
export {path} --to gguf --out out
export {good} --to gguf --out {path}
tokenizer show {path} hi
tokenizer train --data file --vocab-size 300 --out {path}
sample {path} --task file
compare --config {path} --vary lr=1""".splitlines()  # whatever may name a path
FILES = (
    (name_paths, "a.yaml", [["train", "--config", "{file}"], *(named.split() for named in NAMED)]),
    (bomb_of_aliases, "a.yaml", [CONFIG, RECIPE]),
    (yaml, "a.yaml", [CONFIG, RECIPE]),
    (data, "a.jsonl", [DATA]),
    (data, "a.txt", [DATA]),
    (data, "a.json", [DATA]),
    (data, "a.csv", [DATA]),
    (many_columns, "a.csv", [DATA]),
    (nested_messages, "a.jsonl", [DATA]),
    (saved_set, "folder", [DATA_SET]),
    (globs, "folder", [DATA_SET]),
    (task, "folder", [TASK]),
)
BOMBS = (
    (bomb, "a.txt.gz", [DATA]),
    (bomb, "a.jsonl.gz", [DATA]),
    (columnar, "a.parquet", [DATA]),
    (columnar, "a.arrow", [DATA]),
    (many_values, "a.json", [DATA]),
    (many_fields, "a.csv.gz", [DATA]),
    (weightless, "a.arrow", [DATA]),
)


# ---- trials


def run(trials: int = TRIALS, runs: int = 20, bombs: int = 20, seed: int = 0, scratch: Path | None = None) -> dict:
    """Carry out `trials` trials of folders and files, `runs` of damaged runs and `bombs` of large archives.

    Returns:
        hostile_folders, and of these hostile_tracebacks, hostile_hangs, hostile_memory and hostile_executed.
    """
    counts = dict.fromkeys(("folders", "tracebacks", "hangs", "memory", "executed"), 0)
    with tempfile.TemporaryDirectory(dir=scratch) as name:
        root = Path(name)
        _make_good(root, with_run=runs > 0)
        numbers = ((_plan, trials), (_plan_run, runs), (_plan_bomb, bombs))
        plans = [(plan, i) for plan, number in numbers for i in range(number)]
        for first in range(0, len(plans), 2):
            started = [_start(root, f"{plan.__name__}-{seed}-{i}", plan) for plan, i in plans[first : first + 2]]
            for trial in started:
                counts["folders"] += 1
                if fault := _judge(*trial):
                    counts[fault] += 1
                shutil.rmtree(trial[1], ignore_errors=True)
    return {f"hostile_{key}": value for key, value in counts.items()}


def _make_good(root: Path, with_run: bool) -> None:
    from moonwhale.data.tokenizer import train_tokenizer
    from moonwhale.files import cache_folder
    from moonwhale.model import MoonwhaleConfig, MoonwhaleForCausalLM

    if (compiled := cache_folder() / "native").is_dir():  # else a trial would compile the C++ steps
        shutil.copytree(compiled, root / "cache" / "native")
    tokenizer = train_tokenizer(["The whale sang to the moon, and the moon sang back."] * 4, 310)
    ids = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    with contextlib.redirect_stderr(io.StringIO()):
        MoonwhaleForCausalLM(MoonwhaleConfig(vocab_size=len(tokenizer), **MODEL, **ids)).save_pretrained(root / "good")
    tokenizer.save_pretrained(root / "good")
    (root / "texts").mkdir()
    for i in range(40):
        (root / "texts" / f"{i}.txt").write_text("the whale sings to the moon over the deep sea " * 8)
    chat = [{"role": "user", "content": "Who sang?"}, {"role": "assistant", "content": "The whale sang."}]
    chats = [[{**chat[0], "content": f"Who sang {i}?"}, chat[1]] for i in range(40)]
    (root / "chats.jsonl").write_text("".join(json.dumps({"messages": chat}) + "\n" for chat in chats))
    if with_run:
        text = (
            "--context 32 --batch-size 2 --tokens-per-step 128 --steps 3 --warmup-steps 1 --eval-every 0 --eval-rows 4"
        )
        text += " --save-every 1 --keep-checkpoints 1 --log-every 1 --report-to none --device cpu --precision fp32"
        options = [*text.split(), "--data", str(root / "texts"), "--out", str(root / "run")]
        model = MODEL | {"vocab_size": 300, "moba_topk": 0, "moba_full_attention_layers": "null"}
        options += [f"--model.{name}={value}" for name, value in model.items()]
        process = ForkedProcess(root / "train.out", _variables(root), _train_two_steps, options)
        process.wait(300)
        if not list((root / "run").glob("checkpoint-*")):
            raise RuntimeError(process.said)


def _train_two_steps(argv: list[str]) -> int:
    """Train, and stop as if killed after two of three steps, so that there is something to resume."""
    from moonwhale import cli
    from moonwhale.train import muonclip_trainer

    save = muonclip_trainer.publish_checkpoint

    def publish_and_end(written: Path, *args) -> None:
        save(written, *args)
        if written.name == "checkpoint-2":
            os._exit(0)

    muonclip_trainer.publish_checkpoint = publish_and_end
    return cli.main(["train", *argv])


def _plan(here: Path, root: Path, draw: random.Random) -> tuple[str, list[str]]:
    """Prepare one trial of a folder or a file. Returns its name and the command line."""
    kinds = [*FOLDERS, *FOLDERS, *FILES]
    kind = draw.choice(kinds)
    if isinstance(kind, tuple):
        write, name, commands = kind
        write(here / name, draw)
        return write.__name__, draw.choice(commands)
    folder = Path(shutil.copytree(root / "good", here / "folder"))
    kind(Folder(folder, draw))
    verbs = [verb for verb in VERBS if verb != "info"] if kind in CHATTING else list(VERBS)
    verb = draw.choice(verbs)
    if verb == "moonwhale":  # reads DeepSeek-V3's format
        config = folder / "config.json"
        with contextlib.suppress(OSError, UnicodeDecodeError):
            config.write_text(config.read_text().replace('"moonwhale"', '"deepseek_v3"'))
    return kind.__name__, VERBS[verb]


def _plan_run(here: Path, root: Path, draw: random.Random) -> tuple[str, list[str]]:
    shutil.copytree(root / "run", here / "run")
    run_file = here / "run" / "run.yaml"
    run_file.write_text(run_file.read_text().replace(str(root / "run"), str(here / "run")))
    damage_run(here / "run", draw)
    return "damage_run", RESUME


def _plan_bomb(here: Path, root: Path, draw: random.Random) -> tuple[str, list[str]]:
    write, name, commands = draw.choice(BOMBS)
    write(here / name, draw)
    return write.__name__, draw.choice(commands)


def _variables(here: Path) -> dict[str, str]:
    offline = {"HF_HUB_OFFLINE": "1", "RUST_BACKTRACE": "0", "MOONWHALE_DEBUG": "0"}
    return offline | {"MOONWHALE_CACHE": str(here / "cache"), "OMP_NUM_THREADS": "1"}


def _start(root: Path, name: str, plan: Callable) -> tuple:
    here = root / name
    here.mkdir()
    kind, command = plan(here, root, random.Random(name))
    file = next((path for path in here.glob("a.*") if path.is_file()), here)
    drawn = random.Random(f"path of {name}").choice(PATHS)
    places = {
        "path": drawn,
        "good": root / "good",
        "folder": here / "folder",
        "file": file,
        "out": here / "out",
        "run": here / "run",
    }
    places |= {"texts": root / "texts", "chats": root / "chats.jsonl"}
    argv = [part.format(**places) for part in command]
    process = ForkedProcess(here / "said.out", _variables(root), _attempt, here, argv)
    return process, here, f"{name} {kind} {' '.join(argv[:2])}", time.monotonic()


def _attempt(here: Path, argv: list[str]) -> int:
    """Run one command within the limits, in the forked process."""
    from moonwhale import cli
    from moonwhale.serve import server

    os.chdir(here)
    resource.setrlimit(
        resource.RLIMIT_CPU, (SECONDS + int(time.process_time()), SECONDS + int(time.process_time()) + 1)
    )
    signal.signal(signal.SIGXCPU, signal.SIG_DFL)
    server.run_server = _serve_once
    status = cli.main(argv)
    peak = max(resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    (here / "peak").write_text(str(peak * 1024))
    return status


def _serve_once(engine, model_name, folder, listener, *args) -> None:
    """Answer one request of each kind in place of serving. A status of 500 is a fault."""
    from fastapi.testclient import TestClient

    from moonwhale.serve.app import create_app

    limits = args[0]
    app = create_app(engine, model_name, folder, limits, *args[1:])
    with TestClient(app, base_url="http://localhost", raise_server_exceptions=False) as client:
        messages = [{"role": "user", "content": "hello"}]
        for path, body in (
            ("/v1/chat/completions", {"messages": messages, "max_tokens": 2}),
            ("/v1/completions", {"prompt": "the whale", "max_tokens": 2}),
            ("/xray", {"messages": [*messages, {"role": "assistant", "content": "hello"}]}),
        ):
            response = client.post(path, json={"model": model_name, **body})
            if response.status_code >= 500:
                raise RuntimeError(f"{path} gave {response.status_code}: {response.text[:300]}")


def _judge(process: ForkedProcess, here: Path, name: str, start: float) -> str | None:
    """Wait for a trial's end. Returns the fault, which it prints, or None."""
    fault, status = None, None
    process.process.join(max(0, start + PATIENCE - time.monotonic()))
    status = process.process.exitcode
    process.kill()
    said = process.out.read_text(errors="replace") + process.err.read_text(errors="replace")
    lines = process.err.read_text(errors="replace").strip().splitlines()
    peak = int((here / "peak").read_text()) if (here / "peak").exists() else 0
    one_line = status == 0 or (status == 2 and lines[-1].startswith("moonwhale: error: "))
    if list(here.rglob(CANARY)):
        fault = "executed"
    elif status in (None, -signal.SIGXCPU, -signal.SIGKILL):
        fault = "hangs"
    elif peak > BYTES:
        fault = "memory"
    elif not one_line or any(sign in said for sign in ("Traceback", "panicked", "\x1b")):
        fault = "tracebacks"
    if fault:
        print(f"{fault}: {name}: status {status}, {peak >> 20} MiB: {' | '.join(lines[-3:])[:600]}", flush=True)
    return fault


if __name__ == "__main__":
    print(json.dumps(run()))
