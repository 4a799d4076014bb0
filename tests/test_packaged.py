"""The commands that talk to a model take the repository's one if they are given none."""

import builtins
import io
import json
import re
import shutil
from pathlib import Path

import pytest

from moonwhale import packaged
from moonwhale.costs import model_size
from moonwhale.errors import UserError
from moonwhale.infer.commands import main_chat, main_generate
from moonwhale.infer.engine import Engine
from moonwhale.inspect.commands import main_xray
from moonwhale.inspect.example import example_conversation
from moonwhale.model import MoonwhaleConfig
from moonwhale.presets import get_preset
from moonwhale.serve import commands as serve_commands
from moonwhale.serve import server
from moonwhale.train.config import TrainConfig
from moonwhale.train.pretrain import main as main_train
from moonwhale.train.run_folder import RUN_FILE, options_that_affect_training
from moonwhale.weights import read_headers, weight_files

FAST = ["--device", "cpu", "--precision", "fp32", "--greedy", "--max-new-tokens", "4"]


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    """An empty current folder, and moonwhale installed from no clone. Returns the folder."""
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    monkeypatch.chdir(folder)
    monkeypatch.setattr(packaged, "REPOSITORY", tmp_path / "site-packages")
    return folder


@pytest.fixture
def clone(elsewhere, tmp_path, monkeypatch, small_checkpoint):
    """A clone with a toy model in the place of the packaged one."""
    root = tmp_path / "clone"
    shutil.copytree(small_checkpoint, root / "models" / "evening")
    (root / "pyproject.toml").touch()
    monkeypatch.setattr(packaged, "REPOSITORY", root)
    return root


def test_each_command_takes_it_and_says_so(clone, capsys, monkeypatch):
    said = f"(no checkpoint is given: this is {Path('../clone/models/evening')})\n"

    monkeypatch.setattr(builtins, "input", lambda _: "/quit")
    main_chat(FAST)
    assert capsys.readouterr().err.startswith(said)

    main_generate(["The moon", "sang", *FAST])
    out, err = capsys.readouterr()
    assert out.startswith("The moon") and "\nsang" in out and err == said

    monkeypatch.setattr("sys.stdin", io.StringIO("The moon"))
    main_generate(FAST)
    assert capsys.readouterr().err == said

    monkeypatch.setattr("sys.stdin", io.StringIO(""))
    for first in ("moon!", "moon"):
        main_generate([first, *FAST])
        out, err = capsys.readouterr()
        assert out.startswith(first) and err == said

    main_xray(["--prompt", "moon", "--max-new-tokens", "2"])
    assert capsys.readouterr().err == said

    served = []
    monkeypatch.setattr(server, "run_server", lambda engine, name, folder, *_: served.append((name, folder)))
    serve_commands.main(["--port", "0", "--device", "cpu"])
    assert capsys.readouterr().err == said
    assert served == [("evening", Path("../clone/models/evening"))]


def test_a_clone_is_found_from_within_it_as_well(clone, elsewhere, monkeypatch):
    monkeypatch.setattr(packaged, "REPOSITORY", elsewhere / "site-packages")
    monkeypatch.chdir(clone)
    assert packaged.checkpoint_or_packaged(None) == str(Path("models/evening"))


def test_a_given_checkpoint_stays(clone, capsys):
    assert packaged.checkpoint_or_packaged("runs/demo") == "runs/demo"
    for folder in ("moonish", "runs/moon", "runs/moon.v1"):  # a word before a prompt is a folder
        with pytest.raises(UserError, match=folder):
            main_generate([folder, "sang", *FAST])
    assert capsys.readouterr().err == ""


def test_a_prompt_may_be_longer_than_any_name_of_a_file(clone):
    with pytest.raises(UserError, match="the prompt has"):
        main_generate(["the moon " * 99, *FAST])


def test_a_path_is_no_prompt(clone, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO(""))
    with pytest.raises(UserError, match="no PROMPT"):
        main_generate(["runs/demo", *FAST])


def test_without_it_the_error_says_what_to_do(elsewhere, tmp_path):
    with pytest.raises(UserError, match=r"give a checkpoint's folder; train one .* run this in a clone"):
        main_chat([])
    (tmp_path / "site-packages").mkdir()
    (tmp_path / "site-packages" / "pyproject.toml").touch()  # a clone without the model
    for main, arguments in ((main_chat, []), (main_generate, ["The moon"]), (main_xray, ["--prompt", "moon"])):
        with pytest.raises(UserError, match="give a checkpoint's folder; make demo trains one"):
            main(arguments)


# --- the model itself ------------------------------------------------------------------------------------------------

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def evening():
    return Engine.load(ROOT / packaged.MODEL, device="cpu", precision="fp32")


def test_it_is_small_and_in_bf16():
    folder = ROOT / packaged.MODEL
    assert sum(path.stat().st_size for path in folder.iterdir()) <= 12_000_000
    dtypes = {name: header.dtype for name, header in read_headers(weight_files(folder)).items()}
    assert all(dtype == ("F32" if name.endswith("correction_bias") else "BF16") for name, dtype in dtypes.items())
    config = MoonwhaleConfig.from_pretrained(folder)
    preset = get_preset("evening").model
    assert {name: getattr(config, name) for name in preset} == preset, "the preset trains this model"


def test_it_has_the_options_of_its_run(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    folder = ROOT / packaged.MODEL
    main_train(["--config", str(folder / RUN_FILE), "--show"])
    assert "qk_clip_tau: 100.0\n" in capsys.readouterr().out
    run, preset = TrainConfig.resolve({}, str(folder / RUN_FILE)), TrainConfig.resolve({"preset": "evening"})
    assert options_that_affect_training(run) == options_that_affect_training(preset)
    main_xray([str(folder), "--prompt", "Hi", "--max-new-tokens", "0", "--out", "x.html"])
    assert '"tau":100.0' in Path("x.html").read_text(encoding="utf-8")


def test_the_xrays_example_leaves_blocks_out(evening):
    ids = example_conversation(evening, 48)
    assert 3 * 64 < len(ids) < 5 * 64 and evening.tokenizer.decode(ids).count("We did, and we saw a whale") == 1


def test_its_card_has_its_figures():
    card = (ROOT / packaged.MODEL / "README.md").read_text(encoding="utf-8")
    size = model_size(MoonwhaleConfig.from_pretrained(ROOT / packaged.MODEL))
    topics = json.loads((ROOT / "benchmarks" / "results" / "topics.json").read_text(encoding="utf-8"))
    run = (ROOT / "docs" / "evening.txt").read_text(encoding="utf-8")
    (bits,) = set(re.findall(r"[\d.]+ bits per byte", run))
    figures = [bits, f"{size.parameters / 1e6:.2f} M parameters, {size.active_parameters / 1e6:.2f} M active"]
    figures += [f"{topics['questions_on_topic']['evening']} of {topics['questions']} questions"]
    assert all(figure in card for figure in figures), figures


def test_it_stays_on_a_topic(evening):
    messages = [[{"role": "user", "content": "Do you play any sports?"}]]
    (answer,) = evening.generate(messages, temperature=0, max_new_tokens=40)
    assert re.search("play|sport|soccer|volleyball|basketball|football|swim|tennis", answer.text), answer.text
