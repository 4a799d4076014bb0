"""Draws docs/learning.svg, what the demo and `evening` learn over their runs: `python docs/draw_learning.py [RUN...]`.

With the folders of runs, the script first reads their logs into docs/learning.json, which keeps those of other presets.
"""

import json
import math
import sys
from pathlib import Path

DOCS = Path(__file__).parent
sys.path.insert(0, str(DOCS.parent / "benchmarks"))
COLOURS = {"demo": "#d97706", "evening": "#2563eb"}
ABOVE = {"demo": -16, "evening": 8}  # points from the last dot to its label, where no curve is


def curves(history: list[dict], tokens_per_step: int) -> dict[str, list[list[float]]]:
    """Returns the points (tokens, bits per byte) of the training and the held-out loss in a run's log.

    Both are divided by the bytes of a held-out token, since a log has no others.
    """
    held_out = [entry for entry in history if "eval_bits_per_byte" in entry]
    last = held_out[-1]
    bits_per_nat = last["eval_bits_per_byte"] / last["eval_loss_main"]
    train = [(entry["step"], entry["loss_main"] * bits_per_nat) for entry in history if "loss_main" in entry]
    return {
        "train": [[step * tokens_per_step, round(bits, 5)] for step, bits in train],
        "held_out": [[e["step"] * tokens_per_step, round(e["eval_bits_per_byte"], 5)] for e in held_out],
    }


def read(runs: list[str]) -> dict[str, dict]:
    """Returns the curves of runs, by the name of the preset."""
    from moonwhale.checkpoint import log_history, newest_checkpoint
    from moonwhale.yaml_files import read_yaml_file

    found = {}
    for run in runs:
        options = read_yaml_file(Path(run) / "run.yaml")
        found[options["preset"]] = curves(log_history(newest_checkpoint(run)), options["tokens_per_step"])
    return found


def draw(runs: dict[str, dict], path: Path) -> None:
    """Draws the bits per byte against the tokens, on a logarithmic axis, each run labelled with its last figure."""
    from common import picture

    with picture(path, figsize=(8, 3.6)) as (_, ax):
        for name, run in runs.items():
            ax.plot(*zip(*run["train"], strict=True), color=COLOURS[name], linewidth=1, alpha=0.5)
            ax.plot(*zip(*run["held_out"], strict=True), color=COLOURS[name], linewidth=1.6, marker="o", markersize=4)
            tokens, bits = run["held_out"][-1]
            label = {"textcoords": "offset points", "ha": "center", "color": COLOURS[name]}
            ax.annotate(f"{name}: {bits:.3f}", (tokens, bits), (0, ABOVE[name]), **label)
        last = math.log10(max(run["train"][-1][0] for run in runs.values()))
        ax.set(xscale="log", xlim=(9e4, 10 ** (last + 0.4)), ylim=(1.1, 2.6))
        ax.set(xlabel="tokens", ylabel="bits per byte (dots: held out)")
        ax.grid(alpha=0.25)


def main(argv: list[str]) -> None:
    file = DOCS / "learning.json"
    if argv:
        runs = json.loads(file.read_text(encoding="utf-8")) | read(argv)
        lines = [f"  {json.dumps(name)}: {json.dumps(run)}" for name, run in runs.items()]
        file.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")
    draw(json.loads(file.read_text(encoding="utf-8")), DOCS / "learning.svg")


if __name__ == "__main__":
    main(sys.argv[1:])
