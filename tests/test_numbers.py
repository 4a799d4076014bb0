"""Numbers on the command line: each odd one is refused in one line before anything is written, or works."""

import typing
from functools import cache

import pytest

from moonwhale import cli, options
from moonwhale.errors import UserError
from moonwhale.posttrain.grpo import GRPOOptions
from moonwhale.posttrain.sft import SFTOptions
from moonwhale.train.config import TrainConfig

NEVER = ["nan", "-nan", "inf", "-inf", "1e400", "-1e400", "1e300", "9" * 30, "9" * 5000, "x", "0x1p3", "٣x"]
PERHAPS = ["0", "-1", "", "1.5", "1e-400", "-0", "1_000", "1,5", " 7 ", "1000000000000000"]


def numbers(cls):
    for entry in options.options_of(cls):
        if {int, float} & (set(typing.get_args(entry.kind)) or {entry.kind}):
            yield entry


@cache
def parser_of(cls):
    parser = options.Parser(prog="moonwhale")
    options.add_options(parser, cls)
    return parser


def read(cls, entry, text):
    given, _ = options.read_argv(parser_of(cls), cls, [f"{entry.flag}={text}"])
    return cls.resolve(given | ({} if cls is TrainConfig else {"checkpoint": "folder"}))


@pytest.mark.parametrize("cls", [TrainConfig, SFTOptions, GRPOOptions])
def test_no_odd_number_gets_through(cls):
    for entry in numbers(cls):
        for text in NEVER + PERHAPS:
            try:
                read(cls, entry, text)
                assert text in PERHAPS, f"{entry.flag}={text} is taken"
            except UserError as error:
                lines, first = str(error).splitlines(), str(error)[:60]
                assert len(lines) == 1 and len(lines[0]) < 400 and "`" in first, f"{entry.flag}={text[:20]}: {error}"


@pytest.mark.parametrize(
    ("cls", "name", "text"),
    [
        (TrainConfig, "data_documents", "0"),
        (TrainConfig, "seed", "4294967296"),
        (TrainConfig, "parallel.timeout", "100000000000"),
        (SFTOptions, "lora_rank", "1000000"),
        (SFTOptions, "epochs", "0"),
        (GRPOOptions, "questions", "100000000000"),
        (GRPOOptions, "group_size", "1"),
        (GRPOOptions, "group_size", "100000000003"),
        (GRPOOptions, "temperature", "0"),
    ],
)
def test_numbers_that_would_fail_late(cls, name, text):
    [entry] = [entry for entry in numbers(cls) if entry.name == name]
    with pytest.raises(UserError, match=r": .+"):
        read(cls, entry, text)


@pytest.mark.parametrize("verb", ["train", "sft", "grpo"])
def test_nothing_is_written(verb, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for option, text in (
        ("lr", "1e400"),
        ("steps", "9" * 30),
        ("batch-size", "-1"),
        ("seed", "x"),
        ("momentum", "nan"),
    ):
        folder = [] if verb == "train" else ["folder"]
        assert cli.main([verb, *folder, "--out", "run", f"--{option}={text}"]) == 2
        [line] = capsys.readouterr().err.splitlines()
        assert f"--{option}" in line
    assert list(tmp_path.iterdir()) == []


def test_serve_refuses_before_it_opens_anything(tmp_path, capsys):
    for option in ("port", "max-sequences", "max-queue", "max-body", "timeout", "cache-mb"):
        for text in ("-1", "nan", "x", "", "inf", "9" * 5000):
            assert cli.main(["serve", str(tmp_path / "none"), f"--{option}={text}"]) == 2
            [line] = capsys.readouterr().err.splitlines()
            assert f"--{option}" in line
    for text in ("-1", "nan", "1.5", "", "²"):
        assert cli.main(["serve", str(tmp_path / "none"), "--port=0", f"--draft={text}"]) == 2
        assert "--draft" in capsys.readouterr().err
