"""Runs tests/contracts and writes the table of docs/compatibility.md: `python docs/update_compatibility.py`.

With `--from FILE` it takes the results that `pytest tests/contracts --contracts-json FILE` wrote.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "compatibility.md"
BEGIN, END = "<!-- table: written by docs/update_compatibility.py -->", "<!-- end of the table -->"
AREAS = (
    "transformers' model tests",
    "Trainer's options",
    "Generation",
    "OpenAI clients and endpoints",
    "File formats",
    "Readers of our exports",
)


def run_contracts() -> list[dict]:
    """Runs the tests. Returns a dictionary for each contract: area, outsider, passed, failed, skipped."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "contracts.json")
        command = [
            "pytest",
            "tests/contracts",
            "--contracts-json",
            str(path),
            "--numprocesses",
            "2",
            "--dist",
            "loadfile",
        ]
        finished = subprocess.run([sys.executable, "-m", *command], cwd=ROOT)
        if finished.returncode:
            sys.exit(f"tests/contracts: pytest ended with status {finished.returncode}; the page stays as it was")
        return json.loads(path.read_text())


def table(rows: list[dict]) -> str:
    """Returns the table and, below it, the reasons."""
    lines = ["| area | whose tests, client or reader | passed | failed | skipped |", "|---|---|---|---|---|"]
    notes: list[str] = []
    for row in sorted(rows, key=lambda row: (AREAS.index(row["area"]), row["outsider"])):
        cells = [row["area"], row["outsider"], f"{row['passed']:,}"]
        for kind in ("failed", "skipped"):
            reasons = row[kind]
            numbers = {note_number(notes, reason) for reason in reasons}
            cells.append(f"{sum(reasons.values()):,}{references(numbers)}")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([*lines, "", *(f"- [{i}] {note}" for i, note in enumerate(notes, start=1))])


def note_number(notes: list[str], reason: str) -> int:
    """Returns the number of a reason, which is added to `notes` if it is new."""
    reason = " ".join(reason.split())
    if reason not in notes:
        notes.append(reason)
    return notes.index(reason) + 1


def references(numbers: set[int]) -> str:
    """Returns references to notes, with runs of three or more numbers as `[3] to [29]`."""
    runs: list[list[int]] = []
    for n in sorted(numbers):
        if runs and n == runs[-1][-1] + 1:
            runs[-1].append(n)
        else:
            runs.append([n])
    return "".join(f" [{r[0]}] to [{r[-1]}]" if len(r) > 2 else "".join(f" [{n}]" for n in r) for r in runs)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--from", dest="results", metavar="FILE", help="results of `pytest --contracts-json FILE`")
    path = parser.parse_args().results
    rows = json.loads(Path(path).read_text()) if path else run_contracts()
    text = PAGE.read_text(encoding="utf-8")
    before, rest = text.split(BEGIN)
    after = rest.split(END)[1]
    PAGE.write_text(f"{before}{BEGIN}\n\n{table(rows)}\n\n{END}{after}", encoding="utf-8")


if __name__ == "__main__":
    main()
