"""What faults do to runs: kills at random moments, two owners of one folder, flipped bits, full disks.

`benchmarks/faults.py` calls `run`. Each function carries out its trials, prints one line for each that failed, and
returns counts. A trial of a run fails unless the run, resumed, ends with the same model and the same optimizer state as
an undisturbed run, bit for bit.
"""

import json
import os
import random
import re
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
import yaml
from safetensors.torch import load_file

import forked_processes
from common import TOY
from forked_processes import ForkedProcess, rank_variables
from moonwhale import cli
from moonwhale.checkpoint import list_checkpoints, newest_checkpoint, step_of
from moonwhale.manifest import MANIFEST, find_damage
from moonwhale.outputs import sync

COMMON = {
    "batch_size": 2, "warmup_steps": 1, "eval_every": 0, "save_every": 2, "log_every": 1, "report_to": ["none"],
    "device": "cpu", "precision": "fp32",
}  # fmt: skip
STEPS = 8
SECONDS = 300  # after which a process counts as hanging
OUT_OF_SPACE = re.compile(r"exit statuses \[2\]: moonwhale: error: .*no space left.*", re.IGNORECASE)


def run(part: str) -> dict[str, float]:
    """Carries out the trials of one part: `kills`, `owners`, `flips`, `disks` or `fsync`."""
    forked_processes.PRELOADED += ["moonwhale.posttrain.grpo_trainer", "moonwhale.posttrain.sft_trainer", "peft"]
    with tempfile.TemporaryDirectory() as folder:
        if part == "fsync":
            return {"fsync_seconds": round(time_sync(Path(folder)), 2)}
        runs = prepare(Path(folder), only_train=part != "kills")
        if part == "kills":
            return count_lost(runs, 100)
        count, trials = {
            "owners": (count_wrong_owners, 50),
            "flips": (count_undetected, 10_000),
            "disks": (count_wrong_disks, 20),
        }[part]
        return count(runs["train"], trials)


# Runs


@dataclass
class Trial:
    """A verb with options at toy size, and what an undisturbed run of it gives.

    ends: the folders that it writes a model into, relative to its own; the last is written at its end.
    """

    name: str
    verb: str
    options: dict
    folder: Path
    processes: int = 1
    ends: tuple[str, ...] = (".",)

    def start(self, out: Path, label: str = "said", resume: bool = False) -> list[ForkedProcess]:
        """Starts the processes of a run into the folder `out`, as torchrun would."""
        options = json.loads(json.dumps(self.options).replace("OUT", str(out)))
        file = self.folder / f"{self.name}-{out.name}.yaml"
        file.write_text(yaml.safe_dump(options))
        if self.verb == "recipe":
            argv = ["recipe", str(file)]
        else:
            argv = [self.verb, "--config", str(file), "--out", str(out), *(["--resume"] if resume else [])]
        # The cache is in the folder of all trials, where the undisturbed run has filled it.
        variables = {"MOONWHALE_CACHE": str(self.folder / "cache"), "COLUMNS": "200"}
        return [
            ForkedProcess(self.folder / f"{out.name}-{label}{rank}.out", own | variables, cli.main, argv)
            for rank, own in enumerate(rank_variables(self.processes))
        ]

    @cached_property
    def whole(self) -> tuple[Path, float]:
        """The folder of an undisturbed run, and how many seconds it takes. The first one fills the cache."""
        for attempt in ("warm", "whole"):
            out, started = self.folder / f"{self.name}-{attempt}", time.monotonic()
            if said := wait_for(self.start(out)):
                raise RuntimeError(f"{self.name} fails undisturbed: {said}")
        return out, time.monotonic() - started

    def difference(self, out: Path) -> str:
        """How what is in `out` differs from the undisturbed run, or "" if it does not."""
        for end in self.ends:
            ours, theirs = (folder / end for folder in (out, self.whole[0]))
            if not (ours / "config.json").is_file():
                return f"{end} holds no model"
            pairs = [(load_file(f / "model.safetensors") for f in (ours, theirs))]
            last = [newest_checkpoint(folder) for folder in (ours, theirs)]
            if not last[0] or step_of(last[0]) != step_of(last[1]):
                return f"{end} lacks its last checkpoint"
            pairs.append(states(torch.load(c / "optimizer.pt", weights_only=True)["state"]) for c in last)
            for a, b in pairs:
                if a.keys() != b.keys() or not all(torch.equal(a[name], b[name]) for name in b):
                    return f"{end} holds other values"
        return ""


def states(state: dict) -> dict[str, torch.Tensor]:
    return {f"{i}.{key}": torch.as_tensor(value) for i, entry in state.items() for key, value in entry.items()}


def wait_for(processes: list[ForkedProcess]) -> str:
    """Waits for the end of all processes. Returns "" if all succeeded, else the last line that one of them wrote.

    What is on one line of a traceback is not the one line that was promised, so all of a traceback is returned.
    """
    end = time.monotonic() + SECONDS
    for process in processes:
        process.process.join(max(0, end - time.monotonic()))
    codes = [process.process.exitcode for process in processes]
    for process in processes:
        process.kill()
    if not any(code != 0 for code in codes):
        return ""
    errors = [process.err.read_text().strip() for process in processes]
    said = next((error for error in errors if error), "")
    return f"exit statuses {codes}: " + (said if "Traceback" in said else said.rpartition("\n")[2])


def prepare(folder: Path, only_train: bool = False) -> dict[str, Trial]:
    """Writes data and a base model, and describes the runs. Nothing but the base model is trained yet."""
    draw = random.Random(0)
    words = ["the", "whale", "moon", "sea", "sings", "swims", "rises", "deep", "over", "under"]
    (folder / "text").mkdir()
    for i in range(40):
        text = " ".join(draw.choice(words) for _ in range(draw.randint(5, 60)))
        (folder / "text" / f"{i}.txt").write_text(text)
    chats = [[{"role": "user", "content": f"moon {i}?"}, {"role": "assistant", "content": "whale " * (1 + i % 5)}]
             for i in range(80)]  # fmt: skip
    (folder / "chats.jsonl").write_text("".join(json.dumps({"messages": chat}) + "\n" for chat in chats))
    tasks = [{"question": f"{i}+{i}", "answer": str(2 * i)} for i in range(80)]
    (folder / "task.jsonl").write_text("".join(json.dumps(task) + "\n" for task in tasks))

    train = COMMON | {"data": str(folder / "text"), "context": 32, "tokens_per_step": 128, "steps": STEPS,
                      "eval_rows": 4, "model": TOY}  # fmt: skip
    runs = {"train": Trial("train", "train", train, folder)}
    if only_train:
        return runs
    runs["train on 2"] = Trial("train2", "train", train, folder, processes=2)
    base = str(folder / "base")
    if said := wait_for(Trial("base", "train", train | {"steps": 2}, folder).start(Path(base))):
        raise RuntimeError(said)
    sft = COMMON | {"data": str(folder / "chats.jsonl"), "context": 32, "steps": STEPS}
    grpo = COMMON | {"task": str(folder / "task.jsonl"), "questions": 20, "group_size": 2, "questions_per_step": 4,
                     "batch_size": 4, "steps": 4, "max_new_tokens": 6, "eval_questions": 2,
                     "show_answers": 0}  # fmt: skip
    recipe = [
        {"train": train | {"steps": 4, "out": "OUT/base"}},
        {"sft": sft | {"steps": 4, "checkpoint": "OUT/base", "out": "OUT/talks"}},
        {"grpo": grpo | {"steps": 2, "checkpoint": "OUT/talks", "out": "OUT/counts"}},
    ]
    of_base = {"checkpoint": base}
    runs |= {
        "sft": Trial("sft", "sft", sft | of_base, folder),
        "sft on 2": Trial("sft2", "sft", sft | of_base, folder, processes=2),
        "lora": Trial("lora", "sft", sft | of_base | {"lora_rank": 2}, folder),
        "grpo": Trial("grpo", "grpo", grpo | of_base, folder),
        "grpo on 2": Trial("grpo2", "grpo", grpo | of_base, folder, processes=2),
        "recipe": Trial("recipe", "recipe", recipe, folder, ends=("base", "talks", "counts")),
    }
    return runs


# Kills


def count_lost(runs: dict[str, Trial], trials: int, seed: int = 0) -> dict[str, int]:
    """Kills each run in turn at random moments, one to three times, then resumes it until it ends."""
    draw, lost = random.Random(seed), 0
    for i in range(trials):
        name, trial = list(runs.items())[i % len(runs)]
        out = trial.folder / f"{trial.name}-kill{i}"
        lost += _failed(f"kill {i} of {name}", _kill_and_resume(trial, out, draw), out)
    return {"kills": trials, "kills_lost": lost}


def _failed(what: str, fault: str, out: Path) -> bool:
    """Says whether a trial failed. A failed one is printed and keeps its folder `out`; another one's is removed."""
    if fault:
        print(f"{what}: {fault}", flush=True)
    else:
        shutil.rmtree(out)
    return bool(fault)


def _kill_and_resume(trial: Trial, out: Path, draw: random.Random) -> str:
    _, seconds = trial.whole
    for attempt in range(draw.choice([1, 1, 2, 3])):
        resume = attempt > 0
        processes = trial.start(out, f"killed{attempt}", resume)
        processes[0].process.join(draw.uniform(0, 1.1 * seconds))
        before = {path for end in trial.ends for path in list_checkpoints(out / end)}
        draw.shuffle(processes)
        for process in processes:  # torchrun kills the others a moment after the first died
            process.kill()
            time.sleep(draw.uniform(0, 0.05))
        for path in before:
            if path.exists() and (damage := find_damage(path)):
                return f"{path.name} is damaged: {damage}"
    return wait_for(trial.start(out, "resumed", resume=True)) or trial.difference(out)


# Two owners


def count_wrong_owners(trial: Trial, trials: int, seed: int = 1) -> dict[str, int]:
    """Starts a run twice in the same folder. One of them must end as if it were alone, and the other say why not."""
    draw, wrong = random.Random(seed), 0
    for i in range(trials):
        out = trial.folder / f"owners{i}"
        first = trial.start(out, "first")
        time.sleep(draw.choice([0, draw.uniform(0, trial.whole[1])]))
        second = trial.start(out, "second", resume=draw.random() < 0.5)
        ends = [wait_for(first), wait_for(second)]
        refused = [end for end in ends if end]
        if refused and not any(said in refused[0] for said in ("is in use by process", "already holds a run")):
            fault = refused[0]
        else:
            fault = "both failed: " + "; ".join(ends) if len(refused) == 2 else trial.difference(out)
        wrong += _failed(f"owners {i}", fault, out)
    return {"owners": trials, "owners_wrong": wrong}


# Flipped bits


def count_undetected(trial: Trial, bits: int, seed: int = 2) -> dict[str, int]:
    """Flips bits of a checkpoint's manifest, and a tenth as many of its other files.

    A flip is undetected if the checkpoint still counts as whole, unless the manifest says the same in other bytes.
    """
    draw, undetected = random.Random(seed), 0
    folder = shutil.copytree(newest_checkpoint(trial.whole[0]), trial.folder / "flips")
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != MANIFEST)
    for i in range(bits + bits // 10):
        path = folder / MANIFEST if i < bits else draw.choice(files)
        good = path.read_bytes()
        data, bit = bytearray(good), draw.randrange(8 * len(good))
        data[bit // 8] ^= 1 << bit % 8
        path.write_bytes(data)
        try:
            found = find_damage(folder) or (i < bits and json.loads(data) == json.loads(good))
        except Exception as error:
            found = None
            print(f"bit {bit} of {path.name}: {error!r}", flush=True)
        if not found:
            undetected += 1
            print(f"bit {bit} of {path.name} was not noticed", flush=True)
        path.write_bytes(good)
    shutil.rmtree(folder)
    return {"flips": bits + bits // 10, "flips_undetected": undetected}


# Full disks


def count_wrong_disks(trial: Trial, trials: int, seed: int = 3) -> dict[str, int]:
    """Runs on disks that are too small, of which one line must tell, then resumes with more space.

    The disks are tmpfs. Where none can be mounted, there are no trials.
    """
    draw, wrong = random.Random(seed), 0
    needed = sum(path.stat().st_size for path in trial.whole[0].rglob("*") if path.is_file())
    disk = trial.folder / "disk"
    disk.mkdir()
    for i in range(trials):
        kib = int(draw.uniform(0.05, 1.1) * needed) // 1024
        if subprocess.run(
            ["mount", "-t", "tmpfs", "-o", f"size={kib}k", "tmpfs", disk], capture_output=True
        ).returncode:
            return {"disks": i, "disks_wrong": wrong}
        try:
            out = disk / f"disk{i}"
            full = wait_for(trial.start(out, "full"))
            subprocess.run(["mount", "-o", f"remount,size={4 * needed // 1024}k", disk], check=True)
            fault = "" if not full or OUT_OF_SPACE.fullmatch(full) else full
            fault = fault or wait_for(trial.start(out, "resumed", resume=True)) or trial.difference(out)
        finally:
            subprocess.run(["umount", disk], check=True)
        if fault:
            wrong += 1
            print(f"a disk of {kib} KiB: {fault}", flush=True)
    return {"disks": trials, "disks_wrong": wrong}


# What fsync costs


def time_sync(folder: Path, megabytes: int = 256) -> float:
    """Returns the seconds that `sync` takes for a folder with that much new data."""
    written = folder / "sync"
    written.mkdir()
    for i in range(4):
        (written / str(i)).write_bytes(os.urandom(megabytes << 18))
    started = time.monotonic()
    sync(written)
    return time.monotonic() - started


if __name__ == "__main__":
    print(json.dumps(run(sys.argv[1])))
