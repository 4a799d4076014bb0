"""The commands that talk to a model take the repository's one if they are given none."""

import builtins
import io
import shutil
from pathlib import Path

import pytest

from moonwhale import packaged
from moonwhale.errors import UserError
from moonwhale.infer.commands import main_chat, main_generate
from moonwhale.inspect.commands import main_xray
from moonwhale.serve import commands as serve_commands
from moonwhale.serve import server

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
    with pytest.raises(UserError, match="moonish"):  # one word is a folder, not a prompt
        main_generate(["moonish", "sang", *FAST])
    assert capsys.readouterr().err == ""


def test_without_it_the_error_says_what_to_do(elsewhere, tmp_path):
    with pytest.raises(UserError, match=r"give a checkpoint's folder; train one .* run this in a clone"):
        main_chat([])
    (tmp_path / "site-packages").mkdir()
    (tmp_path / "site-packages" / "pyproject.toml").touch()  # a clone without the model
    for main, arguments in ((main_chat, []), (main_generate, ["The moon"]), (main_xray, ["--prompt", "moon"])):
        with pytest.raises(UserError, match="give a checkpoint's folder; make demo trains one"):
            main(arguments)
