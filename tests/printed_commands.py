"""The commands that pages and `--help` print: how tests find them and run them at toy size.

CONTRIBUTING.md gives the rule.
"""

import dataclasses
import gzip
import io
import json
import random
import re
import shlex
import shutil
from pathlib import Path

import pytest
import yaml

from moonwhale import cli
from moonwhale.data.hub_sets import HUB_SETS
from moonwhale.evaluate.config import EvalConfig
from moonwhale.lab import config as compare_config
from moonwhale.options import parser_of, read_argv
from moonwhale.parallel.schedule_properties import SCHEDULES
from moonwhale.posttrain.recipe import STAGES
from moonwhale.train.config import build_model_config
from moonwhale.yaml_files import write_yaml
from test_docs import ROOT, fenced, read
from toy import TOY

CLASSES = {verb: cls for verb, (cls, _) in STAGES.items()} | {"eval": EvalConfig}

# --- what the documents print ----------------------------------------------------------------------------------------


@dataclasses.dataclass
class Command:
    """A printed command: the processes that it starts, the words after `moonwhale`, and if it is in a code block."""

    processes: int
    words: list[str]
    in_block: bool

    @property
    def is_whole(self) -> bool:
        """Whether it can run as it stands. `moonwhale VERB --help`, and `moonwhale chat` in a text, name things."""
        if "--help" in self.words:
            return False
        names = [word for word in self.words[1:] if not re.fullmatch(r"--[a-z][\w.-]*|train|show", word)]
        return (bool(names) or self.in_block) and not any(re.fullmatch("[A-Z_]+", word) for word in names)


def commands(text: str) -> list[Command]:
    """Returns every command in the code blocks of a page and in the code of its text, in order of appearance."""
    found = []
    for block, span in re.findall(r"^```\w*\n(.*?)^```$|(?<!`)`([^`]+)`(?!`)", text, re.DOTALL | re.MULTILINE):
        for line in block.replace("\\\n", " ").splitlines() or [" ".join(span.split())]:
            match = re.match(r"(torchrun .*-m )?(?:\S*/)?moonwhale ((?:[a-z]+|--\S+)(?: .*)?)$", line)
            if match:
                counts = dict(re.findall(r"--(nnodes|nproc-per-node) (\d+)", match[1] or ""))
                processes = int(counts.get("nnodes", 1)) * int(counts.get("nproc-per-node", 1))
                found.append(Command(processes, shlex.split(match[2], comments=True), bool(block)))
    return found


# --- the rule --------------------------------------------------------------------------------------------------------

COMPUTE = ["--device", "cpu", "--precision", "fp32"]
RUN = [*COMPUTE, "--batch-size", "1", "--steps", "1", "--warmup-steps", "0", "--eval-every", "0", "--save-every", "0"]
MODEL = [f"--model.{name}={','.join(map(str, v)) if isinstance(v, list) else v}" for name, v in TOY.items()]
ANSWER = ["--max-new-tokens", "2"]
ROWS = ["--context=128", "--tokens-per-step=128", "--eval-rows=2", "--data-documents=60", "--no-compile", *MODEL]
SHORT = ["--context=32", "--tokens-per-step=32"]
# Appended to each command of a verb: the last value of an option counts.
TOYS = {
    "train": [*RUN, *ROWS],
    "compare": [*COMPUTE, "--batch-size=1", "--steps=1", "--warmup-steps=0", "--turns=1", "--seeds=1", *ROWS, *SHORT],
    "sft": [*RUN, "--eval-rows=2", "--data-documents=60"],
    "grpo": [*RUN, *ANSWER, "--questions=4", "--group-size=2", "--questions-per-step=1", "--eval-questions=1"],
    "sample": [*COMPUTE, "--questions", "2"],
    "recipe": [],
    "generate": [*COMPUTE, *ANSWER],
    "chat": [*COMPUTE, *ANSWER],
    "serve": [*COMPUTE, "--port", "0"],
    "eval": COMPUTE,
    "xray": ANSWER,
    "data": ["--data-documents", "60"],
    "tokenizer": [],
    "export": [],
    "info": [],
    "plan": [],
    "doctor": [],
}
# Appended to `eval` for each of these that it is asked for. It refuses the others' options.
EVAL_TOYS = {
    "--data": ["--rows=2"],
    "--task": [*ANSWER, "--problems=1", "--samples=2", "--k=1,2"],
    "--lm-eval": ["--include-path=."],
}
# Names of what only a network brings, and files that stand in
STANDS_IN = {**{name: f"{name}.jsonl" for name in HUB_SETS}, "allenai/c4:en": "texts.jsonl"}
STANDS_IN |= {"chitchat": "openorca.jsonl", "gsm8k": "questions.jsonl", "hellaswag,arc_easy": "whales"}


def at_toy_size(words: list[str]) -> list[str]:
    """Returns a command with stand-ins for what only a network brings, and its verb's toy options."""
    names = "|".join(map(re.escape, STANDS_IN))
    words = [re.sub(rf"(?<![\w/.-])({names})(?![\w/.-])", lambda name: STANDS_IN[name[0]], word) for word in words]
    if words[0] == "compare":  # a second budget would be refused, and tuning takes many runs
        left_out = {"--seconds", "--tokens", "--tune"}
        words = [word for i, word in enumerate(words) if not {word, words[i - 1]} & left_out]
    toy = [] if words[1:2] == ["show"] else TOYS[words[0]]
    if words[0] == "eval":
        toy = toy + [option for asked, options in EVAL_TOYS.items() if asked in words for option in options]
    return words + (["--data-documents=60"] if words[:2] == ["tokenizer", "train"] else toy)


def provide(words: list[str], folder: Path, toy_run: Path) -> None:
    """Puts a toy run wherever a command reads a run that no earlier command has written."""
    for i, word in enumerate(words):
        reads = words[i - 1] != "--out" or "--resume" in words
        if reads and (found := re.match(r"runs/[\w-]+(?=$|/run\.yaml$)", word)) and not (folder / found[0]).exists():
            shutil.copytree(toy_run, folder / found[0])
    for name in (word for word in words if words[0] == "recipe" and word.endswith(".yaml")):
        stages = yaml.safe_load((ROOT / name).read_text(encoding="utf-8"))
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(json.dumps([_toy_stage(stage) for stage in stages]))
        provide([stage["checkpoint"] for (stage,) in map(dict.values, stages)], folder, toy_run)


def _toy_stage(stage: dict) -> dict:
    """Returns a recipe's stage with its verb's toy options."""
    ((verb, given),) = stage.items()
    toy, _ = read_argv(parser_of(cli._function(verb)), CLASSES[verb], [*TOYS[verb], *given.get("", [])])
    given.pop("epochs", None)  # the toy has steps in their place
    return {verb: given | toy}


def at_toy_processes(words: list[str]) -> tuple[list[str], int]:
    """Returns a command of torchrun at toy size, and the number of its processes: each way to share has two parts."""
    ways = {word for word in words if word.startswith("--parallel.")}
    words = ["2" if words[i - 1] in ways - {"--parallel.fsdp"} else word for i, word in enumerate(words)]
    toy = ["--model.num_hidden_layers=4", *SHORT, "--tokens-per-step=256"]  # eight micro-batches, for the pipelines
    return [*at_toy_size(words), *toy], 2 ** max(1, len(ways))


def resolve(words: list[str], processes: int) -> None:
    """Checks a command as it is printed: every option exists, has a possible value, and fits the others.

    Raises:
        UserError: one is wrong, or the processes cannot share the model or a step's micro-batches.
    """
    verb = words[0]
    if verb == "compare":
        compare_config.parse(words[1:])
    if verb not in CLASSES:
        return
    cls = CLASSES[verb]
    given, rest = read_argv(parser_of(cli._function(verb)), cls, words[1:])
    config = cls.resolve(given, rest.config) if hasattr(cls, "resolve") else cls(**given)
    if verb != "train":
        return
    from moonwhale.parallel.stages import partition

    model, parallel = build_model_config(config), config.parallelism
    config.gradient_accumulation_steps(1 if parallel.splits_model else processes)
    if parallel.splits_model:
        config.micro_batches_per_replica(parallel.replicas(processes))
        stages = SCHEDULES[parallel.effective_schedule].stages_per_rank * parallel.pp
        partition(model, stages, config.context)
        parallel.check_experts(model.n_routed_experts)
    if processes > 1:  # a later command may replay this run
        Path(config.out).mkdir(parents=True, exist_ok=True)
        write_yaml(Path(config.out) / "run.yaml", dataclasses.asdict(config), "written for the test")


# --- running ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """Returns a folder with every text, table and task that a command reads, and a trained toy run, `toy`."""
    folder, draw = tmp_path_factory.mktemp("inputs"), random.Random(0)

    def text() -> str:
        return " ".join(draw.choice(["whale", "moon", "sea", "sings", "swims", "rises"]) for _ in range(40))

    def table(name: str, row) -> None:
        (folder / name).write_text("".join(json.dumps(row()) + "\n" for _ in range(60)))

    def conversation() -> list[dict]:
        return [{"role": role, "content": text()} for role in ("user", "assistant")]

    (folder / "my_texts").mkdir()
    for i in range(60):
        (folder / "my_texts" / f"{i}.txt").write_text(text())
    (folder / "notes.txt").write_text(text())
    table("texts.jsonl", lambda: {"text": text()})
    table("questions.jsonl", lambda: {"question": text(), "answer": str(draw.randint(1, 9))})
    for name in HUB_SETS:
        table(f"{name}.jsonl", lambda: {"messages": conversation()})
    table("whales_data.jsonl", lambda: {"q": text(), "a": ["sings", "swims"], "right": 0})
    (example,) = fenced(read("docs/evaluation.md"), "yaml")
    (folder / "whales.yaml").write_text(example.replace("/path/to/whales", str(folder / "whales_data")))
    for name in ("variants", "ablations"):  # of docs/compare.md, and of the example in `moonwhale compare --help`
        (folder / f"{name}.yaml").write_text(*fenced(read("docs/compare.md"), "yaml"))
    (folder / "logs" / "a").mkdir(parents=True)
    with gzip.open(folder / "logs" / "a" / "b.jsonl.gz", "wt") as file:
        file.write((folder / "openorca.jsonl").read_text())
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MOONWHALE_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))
        train = ["train", "--data", str(folder / "my_texts"), "--out", str(folder / "toy"), *TOYS["train"]]
        plain = ["--model.embedding_conv", "0", "--model.latent_embedding_every", "0"]  # every format can hold it
        assert cli.main([*train, *plain]) == 0
    return folder


@pytest.fixture
def folder(inputs, tmp_path, tmp_path_factory, monkeypatch):
    """Returns the working folder of a page's commands. A server ends at once, and `sample` is given right answers."""
    for item in inputs.iterdir():
        (tmp_path / item.name).symlink_to(item)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MOONWHALE_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))
    monkeypatch.setattr("sys.stdin", io.StringIO("Hi!\n/quit\n" * 100))
    monkeypatch.setattr("moonwhale.serve.server.run_server", lambda *given: None)  # else it serves until it is stopped
    monkeypatch.setattr("gc.collect", lambda *generation: 0)  # half of a toy comparison's time
    answers = {"<think>a</think><answer>b</answer>", "<think>c</think><answer>d</answer>"}  # a toy has no right ones
    monkeypatch.setattr(
        "moonwhale.posttrain.sample.draw_right_answers", lambda config, task, problems: ([answers] * len(problems), 0)
    )
    return tmp_path


def status_of(words: list[str]) -> int:
    """Runs a command and returns its exit status. `--help` raises it."""
    try:
        return cli.main(words)
    except SystemExit as ended:
        return ended.code
