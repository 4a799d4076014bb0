"""YAML from elsewhere, in a file or on the command line, is read as plain data or refused in one line."""

import time

import pytest

from moonwhale import options
from moonwhale.cli import main
from moonwhale.errors import UserError
from moonwhale.posttrain import recipe
from moonwhale.train.config import TrainConfig

BOMB = "a0: &a0 [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 10)
)
MERGES = "a0: &a0 {k: 1}\n" + "".join(f"a{i}: &a{i} {{<<: [{', '.join([f'*a{i - 1}'] * 9)}]}}\n" for i in range(1, 10))
HOSTILE = {
    "a bomb of aliases": BOMB,
    "a bomb as a value": f"{BOMB}steps: *a9\n",
    "a bomb of merges": f"{MERGES}model: *a9\n",
    "a list of itself": "&a [*a]",
    "a mapping of itself": "&a {model: *a}",
    "a merge of itself": "model: &a {<<: *a}",
    "a date": "steps: !!timestamp 2001-99-99",
    "a plain date": "steps: 2001-99-99",
    "a bad number": "steps: !!int x",
    "a bad float": "lr: !!float x",
    "a huge number": f"steps: {'9' * 5000}",
    "a number beyond floats": f"lr: {'9' * 400}",
    "a number of base 60": "steps: 1:99:" + "59:" * 300 + "59",
    "a very long number of base 60": "steps: 1" + ":1" * 130_000,
    "a very long number of base 60 as a key": "? 1" + ":1" * 130_000 + "\n: 5",
    "a very long float of base 60": "lr: 1" + ":1" * 130_000 + ".5",
    "a very long float": "lr: 0." + "1" * 250_000,
    "a very long number of base 16": "steps: 0x" + "f" * 250_000,
    "a long text as a number": "steps: !!int '" + "1" * 250_000 + "'",
    "bad bytes": "data: !!binary '*'",
    "a list as a key": "? [a]: b",
    "a mapping as a key": "{{a: 1}: b}",
    "a set": "model: !!set {a, b}",
    "pairs": "model: !!omap [1]",
    "no pairs": "model: !!pairs 5",
    "a python object": "!!python/object/apply:os.system ['touch canary']",
    "a python name": "steps: !!python/name:os.system",
    "an unknown tag": "steps: !mine 5",
    "a repeated key": "steps: 5\nsteps: 6",
    "deep nesting": "model: " + "[" * 3000 + "]" * 3000,
    "deep blocks": "\n".join(" " * i + "a:" for i in range(400)),
    "an unknown alias": "steps: *nowhere",
    "a control character": "steps: \x1b[2J",
    "a control character in a key": '"\\e[2J": 5',
    "a long key": "x" * 200_000 + ": 5",
    "too long": "data: " + "x" * 300_000,
    "two documents": "steps: 5\n---\nsteps: 6",
    "a list": "[1, 2]",
    "a text": "steps",
    "nothing": "",
    "a value": "~",
    "a nested option": "model: {hidden_size: {a: [1]}}",
    "an unclosed list": "steps: [1, 2",
    "a tab": "a:\n\t- b",
}


@pytest.mark.parametrize("text", HOSTILE.values(), ids=HOSTILE)
def test_hostile_yaml_is_refused_in_one_line(text, tmp_path, capsys, monkeypatch):
    monkeypatch.delenv("MOONWHALE_DEBUG", raising=False)
    path, start = tmp_path / "run.yaml", time.process_time()
    path.write_text(text)
    for arguments in (["train", "--config", str(path)], ["recipe", str(path)]):
        assert main(arguments) == 2
        out, err = capsys.readouterr()
        assert out == "" and err.startswith("moonwhale: error: ") and err.count("\n") == 1 and len(err) < 2500
        assert "\x1b" not in err
    assert time.process_time() - start < 5 and not (tmp_path / "canary").exists()


@pytest.mark.parametrize("content", [b"\xff\xfe\x00", b"steps: \x80", "steps: 5".encode("utf-16"), b"steps: 5\0"])
def test_bytes_that_are_no_text_are_refused(content, tmp_path):
    (tmp_path / "a.yaml").write_bytes(content)
    with pytest.raises(UserError, match=r"a\.yaml"):
        options.read_yaml(tmp_path / "a.yaml", TrainConfig)
    with pytest.raises(UserError, match=r"a\.yaml"):
        recipe.read(str(tmp_path / "a.yaml"))


@pytest.mark.parametrize(
    "value",
    ["2001-99-99", "!!int x", "!!binary '*'", "? [a]: b", "&a [*a]", "[" * 3000, "9" * 5000, "!!python/name:os.system"],
)
@pytest.mark.parametrize("option", ["--steps", "--lr", "--model.moba_full_attention_layers", "--model.rope_parameters"])
def test_hostile_values_on_the_command_line(option, value, capsys, monkeypatch):
    monkeypatch.delenv("MOONWHALE_DEBUG", raising=False)
    assert main(["train", f"{option}={value}"]) == 2
    err = capsys.readouterr().err
    assert err.startswith("moonwhale: error: ") and err.count("\n") == 1 and len(err) < 500


def test_aliases_and_merges_still_work(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(
        "- sft: &same {checkpoint: runs/a, out: runs/b, steps: 5}\n"
        "- sft: {<<: *same, out: runs/c}\n- sft: {<<: *same, out: runs/d, steps: 6}\n"
    )
    assert [(config.out, config.steps) for _, config in recipe.read(str(path))] == [
        ("runs/b", 5),
        ("runs/c", 5),
        ("runs/d", 6),
    ]
