"""All figures of a GPU, from one command on a bare CUDA machine without a package index.

    python benchmarks/gpu_all.py prepare [--target LIST]      on a machine with an index and this project installed
    python benchmarks/gpu_all.py run [--text FILE...]         on the GPU's machine, which needs Python and torch
    python benchmarks/gpu_all.py run --rehearse               at toy size, also without a GPU

`prepare` collects the wheels that the target lacks in benchmarks/wheels, at most 60 MB. LIST is the target's
`pip list --format=freeze`; without it the target is taken to have only torch. `run` installs those that are missing
into benchmarks/wheels/site, next to what is there, and then runs the parts in this order. Each part is a process with a
time limit. A part that fails or runs out of time does not stop the others. The last part gets the time that is left.

    part        at most   on an H200, estimated
    tests         150 s   the CUDA tests, oracles and mutants on the device, six at a time; most of it compiles
    speed         180 s   mfu, then transformers' DeepseekV3 and the dense GPT; about 10 s of steps, the rest compiles
    moba          110 s   8 k, 32 k, 128 k at two settings, then the largest logits' share; flash at 128 k takes 0.1 s
    decode         60 s   1 and 64 sequences, with and without graphs
    fp8            60 s   `large` in bf16 and FP8
    thresholds     80 s   six compilations of MoBA, and steps
    seed         rest     `seed_190m` on Python's standard library and the files of --text

Results are merged into gpu.json (see gpu.py) as soon as they are known; `failed` has the last line of each error.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

HERE = Path(__file__).parent
WHEELS = HERE / "wheels"
MEGABYTES = 60
# What the parts import. torch and all that it needs are the target's own.
ROOTS = (
    *("transformers", "accelerate", "tokenizers", "safetensors", "numpy", "pyyaml", "psutil", "tqdm", "filelock"),
    *("jinja2", "pytest", "pytest-xdist", "torchao"),
)
PROCESSES = 6  # that share the GPU in the part `tests`
TESTS = (
    "tests/test_cuda.py",
    "tests/infer/test_graphs.py",
    "tests/model/test_host_sync.py",
    "tests/test_fp8.py",
    "tests/oracles",
)


ON_DEVICE = {"MOONWHALE_TEST_DEVICE": "cuda"}  # read by tests/test_cuda.py and tests/oracles


class Part(NamedTuple):
    name: str
    seconds: float
    command: list[str]


def parts(rehearse: bool, results: Path, texts: list[str]) -> list[Part]:
    """Returns the parts in the order of their worth."""
    toy = ["--rehearse"] if rehearse else []
    gpu = [sys.executable, str(HERE / "gpu.py"), *toy, "--results", str(results), "--only"]
    tests = ["-x", "tests/test_cuda.py", "tests/oracles/test_deepseek_v3.py"]
    if not rehearse:
        tests = ["--maxfail=20", "-n", str(PROCESSES), *TESTS]
    pytest = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider"]
    patience = 4 if rehearse else 1  # a busy CPU
    return [
        Part("tests", 150 * patience, [*pytest, *tests]),
        Part("speed", 180 * patience, [*gpu, "mfu,peers"]),
        Part("moba", 110 * patience, [*gpu, "moba,max_logits"]),
        Part("decode", 60 * patience, [*gpu, "decode"]),
        Part("fp8", 60 * patience, [*gpu, "fp8"]),
        Part("thresholds", 80 * patience, [*gpu, "thresholds"]),
        Part("seed", 3600, [*gpu, "seed", "--text", *texts]),
    ]


def requirements() -> dict[str, dict]:
    """Returns the needs of ROOTS as installed here: for each distribution its version and what others ask of it."""
    from packaging.requirements import Requirement
    from packaging.utils import canonicalize_name

    here = {"python_version": "3.12", "python_full_version": "3.12.0", "sys_platform": "linux", "extra": ""}
    lines = (HERE.parent / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pinned = dict(line.split("==") for line in lines if "==" in line)
    found: dict[str, dict] = {}
    waiting = [Requirement(root) for root in ROOTS]
    waiting += [Requirement(line) for line in metadata.requires("moonwhale") or [] if "extra" not in line]
    waiting = [r for r in waiting if canonicalize_name(r.name) in ROOTS]
    while waiting:
        requirement = waiting.pop()
        name = canonicalize_name(requirement.name)
        if name == "torch" or (requirement.marker and not requirement.marker.evaluate(here)):
            continue
        if name not in found:
            try:
                distribution = metadata.distribution(name)
                version, others = distribution.version, distribution.requires or []
            except metadata.PackageNotFoundError:  # torchao, which needs a GPU and nothing else
                version, others = pinned[name], []
            found[name] = {"version": version, "specifiers": []}
            waiting += [Requirement(line) for line in others]
        if str(requirement.specifier):
            found[name]["specifiers"].append(str(requirement.specifier))
    return found


def missing(needs: dict[str, dict], have: dict[str, str]) -> list[str]:
    """Returns NAME==VERSION of each need that `have` lacks or has in another version than is asked for."""
    from pip._vendor.packaging.specifiers import SpecifierSet  # a bare machine has pip, perhaps not packaging

    def fits(name: str, need: dict) -> bool:
        return name in have and SpecifierSet(",".join(need["specifiers"])).contains(have[name], prereleases=True)

    return [f"{name}=={need['version']}" for name, need in needs.items() if not fits(name, need)]


def prepare(target: Path | None, python: str) -> int:
    """Downloads the missing wheels into WHEELS. Returns 1 if they are too large."""
    lines = target.read_text(encoding="utf-8").split() if target else []
    have = {name.lower().replace("_", "-"): version for name, _, version in (line.partition("==") for line in lines)}
    needs = requirements()
    wanted = missing(needs, have)
    WHEELS.mkdir(exist_ok=True)
    for old in WHEELS.glob("*.whl"):
        old.unlink()
    platforms = [f"--platform=manylinux{tag}_x86_64" for tag in ("_2_28", "_2_27", "_2_26", "_2_17", "2014", "1")]
    pip = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--only-binary=:all:", "-d", str(WHEELS)]
    if wanted:
        subprocess.run([*pip, "--python-version", python, "--implementation", "cp", *platforms, *wanted], check=True)
    (WHEELS / "needs.json").write_text(json.dumps(needs, indent=1), encoding="utf-8")
    size = sum(wheel.stat().st_size for wheel in WHEELS.glob("*.whl")) / 1e6
    print(f"{len(wanted)} wheels, {size:.1f} MB in {WHEELS}")
    if size > MEGABYTES:
        print(f"more than {MEGABYTES} MB: give --target the list of what the machine has", file=sys.stderr)
        return 1
    return 0


def install() -> Path | None:
    """Installs the wheels that are missing here into WHEELS/site, and returns that folder, or None without wheels."""
    file, site = WHEELS / "needs.json", WHEELS / "site"
    if not file.exists():
        return None
    have = {d.name.lower().replace("_", "-"): d.version for d in metadata.distributions(path=[str(site), *sys.path])}
    wanted = missing(json.loads(file.read_text(encoding="utf-8")), have)
    if wanted:
        pip = [sys.executable, "-m", "pip", "install", "-q", "--no-index", "--no-deps", "--no-compile", "--upgrade"]
        subprocess.run([*pip, "--find-links", str(WHEELS), "--target", str(site), *wanted], check=True)
    print(f"installed {len(wanted)} packages into {site}", flush=True)
    return site


def record_failure(results: Path, name: str, error: str | None) -> None:
    """Adds a part's error to gpu.json, or takes it out."""
    file = results / "gpu.json"
    found = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    failed = found.setdefault("failed", {})
    failed.pop(name, None)
    if error:
        failed[name] = error
    results.mkdir(parents=True, exist_ok=True)
    lines = [f"  {json.dumps(key)}: {json.dumps(value)}" for key, value in found.items()]
    file.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")


def run_part(part: Part, seconds: float, results: Path, environment: dict) -> str | None:
    """Runs a part for at most `seconds`, its output in results/NAME.log. Returns the last line of its error."""
    results.mkdir(parents=True, exist_ok=True)
    log = results / f"{part.name}.log"
    command = [*part.command, "--seconds", str(max(1.0, 0.8 * seconds - 15))] if part.name == "seed" else part.command
    with log.open("w", encoding="utf-8") as out:
        process = subprocess.Popen(
            command, stdout=out, stderr=subprocess.STDOUT, env=environment, cwd=HERE.parent, start_new_session=True
        )
        try:
            code = process.wait(seconds)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)  # with the compiler's processes
            process.wait()
            return f"out of time after {seconds:.0f} s"
    lines = [line for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    return None if code == 0 else (lines or [f"exit status {code}"])[-1][:300]


def figures(results: Path, before: dict) -> str:
    """Returns the plain figures in gpu.json that `before` lacks or has otherwise, as one line."""
    file = results / "gpu.json"
    found = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    new = {k: v for k, v in found.items() if isinstance(v, int | float) and before.get(k) != v}
    before.update(found)
    return " ".join(f"{name} {value}" for name, value in new.items() if name not in ("rows", "context"))


def run(chosen: list[Part], minutes: float, results: Path, site: Path | None, rehearse: bool) -> int:
    """Runs the parts and prints a line for each. Returns the number of parts that failed."""
    paths = [str(HERE.parent / "src"), *([str(site)] if site else []), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths))}
    environment |= {"MOONWHALE_TEST_DEVICE": "cpu", "OMP_NUM_THREADS": "1"} if rehearse else ON_DEVICE
    end, failures, known = time.monotonic() + 60 * minutes, 0, {}
    figures(results, known)
    for part in chosen:
        start = time.monotonic()
        limit = min(part.seconds, end - start)
        error = run_part(part, limit, results, environment) if limit > 0 else "no time was left"
        record_failure(results, part.name, error)
        failures += error is not None
        summary = f"FAILED: {error}" if error else "ok"
        print(f"{part.name}: {summary}; {figures(results, known)} ({time.monotonic() - start:.0f} s)", flush=True)
    return failures


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    preparing = commands.add_parser("prepare", help="collect the wheels that the target lacks")
    preparing.add_argument("--target", type=Path, metavar="LIST", help="the target's `pip list --format=freeze`")
    preparing.add_argument("--python", default="3.12", metavar="VERSION", help="the target's Python (3.12)")
    running = commands.add_parser("run", help="run the parts")
    running.add_argument("--minutes", type=float, default=12, help="time for all parts (12)")
    running.add_argument("--parts", metavar="A,B", help="only these parts")
    running.add_argument("--results", type=Path, default=HERE / "results", help="folder for gpu.json and the logs")
    running.add_argument("--text", nargs="*", default=[], metavar="FILE", help="more text for the part `seed`")
    running.add_argument("--rehearse", action="store_true", help="run at toy size, also without a GPU")
    arguments = parser.parse_args(argv)
    if arguments.command == "prepare":
        return prepare(arguments.target, arguments.python)
    texts = [str(Path(text).resolve()) for text in arguments.text]
    results = arguments.results.resolve()
    found = parts(arguments.rehearse, results, texts)
    names = arguments.parts.split(",") if arguments.parts else [part.name for part in found]
    if unknown := set(names) - {part.name for part in found}:
        parser.error(f"--parts: no part {min(unknown)!r} (give some of {','.join(part.name for part in found)})")
    chosen = [part for part in found if part.name in names]
    return 1 if run(chosen, arguments.minutes, results, install(), arguments.rehearse) else 0


if __name__ == "__main__":
    sys.exit(main())
