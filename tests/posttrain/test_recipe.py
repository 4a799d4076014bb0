"""Tests recipes and rejection sampling. Recipes are checked before they start, run in order, and can be resumed."""

import json
from dataclasses import asdict
from pathlib import Path

import pytest
import yaml

from moonwhale.data.tasks import is_well_formed
from moonwhale.errors import UserError
from moonwhale.infer import engine
from moonwhale.posttrain import recipe as recipes
from moonwhale.posttrain.recipe import read, recipe
from moonwhale.posttrain.sample import SampleOptions, record_of, sample
from moonwhale.posttrain.sft import SFTOptions
from moonwhale.train import run_folder


@pytest.fixture
def folder(small_checkpoint, tmp_path, monkeypatch):
    """Returns a working folder with a task and a base model, `base`."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MOONWHALE_CACHE", str(tmp_path / "cache"))
    rows = [{"question": f"{i}+{i}", "answer": str(2 * i)} for i in range(60)]
    Path("task.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    Path("base").symlink_to(small_checkpoint)
    return tmp_path


@pytest.fixture
def mostly_right_engine(monkeypatch):
    """Makes an engine that gives three right answers out of four, two of them with the same text."""

    class MostlyRight(engine.Engine):
        def as_completed(self, prompts, **options):
            for i, completion in super().as_completed(prompts, **options):
                asked = self.tokenizer.decode(prompts[i], skip_special_tokens=True)
                total = sum(map(int, asked.split("+")))
                text = [f"<think>a</think><answer>{total}</answer>"] * 2
                text += [f"<think>b</think><answer>{total}</answer>", f"<think>c</think><answer>{total + 1}</answer>"]
                object.__setattr__(completion, "text", text[i % 4])
                yield i, completion

    monkeypatch.setattr(engine, "Engine", MostlyRight)


SMALL = {"report_to": ["none"], "device": "cpu", "precision": "fp32", "eval_every": 0, "save_every": 0}


def write(stages) -> str:
    Path("recipe.yaml").write_text(yaml.safe_dump(stages))
    return "recipe.yaml"


def test_right_answers_are_kept_once(folder, mostly_right_engine, capsys):
    config = SampleOptions(
        checkpoint="base", task="task.jsonl", questions=10, samples=4, out="new/answers.jsonl", max_new_tokens=2,
        device="cpu", precision="fp32",
    )  # fmt: skip
    sample(config)
    rows = [json.loads(line)["messages"] for line in Path("new/answers.jsonl").read_text().splitlines()]
    assert len(rows) == 20
    for question, answer in rows:
        a, _ = map(int, question["content"].split("+"))
        assert is_well_formed(answer["content"]) and f"<answer>{2 * a}</answer>" in answer["content"]
    assert "kept 20 of 40 answers, to 10 of 10 questions" in capsys.readouterr().out
    with pytest.raises(UserError, match="already exists: name a new file"):
        sample(config)


SAMPLE = {"checkpoint": "base", "task": "task.jsonl", "out": "answers.jsonl"}


@pytest.mark.parametrize(
    ("now", "complaint"),
    [
        ({}, None),
        ({"device": "cpu", "out": "./answers.jsonl"}, None),
        ({"questions": 4000}, "`questions`: 4000 differs from the 1000 that the finished run in answers.jsonl had"),
        ({"checkpoint": "other"}, "`checkpoint`: 'other' differs from the 'base'"),
    ],
)
def test_answers_are_reused_only_for_the_same_options(folder, monkeypatch, now, complaint):
    forbid_running(monkeypatch)
    Path("answers.jsonl").touch()
    with pytest.raises(UserError, match=r"answers of unknown origin, without answers.jsonl.yaml: name another file"):
        recipe(write([{"sample": SAMPLE}]))
    record_of("answers.jsonl").touch()
    with pytest.raises(UserError, match=r"answers.jsonl.yaml holds no options of answers.jsonl: name another file"):
        recipe(write([{"sample": SAMPLE}]))
    record_of("answers.jsonl").write_text(yaml.safe_dump(asdict(SampleOptions(**SAMPLE))))
    if complaint is None:
        recipe(write([{"sample": SAMPLE | now}]))
        return
    with pytest.raises(UserError) as error:
        recipe(write([{"sample": SAMPLE | now}]))
    assert complaint in str(error.value)


def test_a_model_without_right_answers_is_one_line(folder):
    with pytest.raises(UserError, match="base answered none of 3 questions correctly"):
        sample(
            SampleOptions(
                checkpoint="base", task="task.jsonl", questions=3, out="a.jsonl", max_new_tokens=4, device="cpu"
            )
        )
    assert not Path("a.jsonl").exists()


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"checkpoint": None}, "CHECKPOINT: name the folder"),
        ({"out": None}, "`out`: None is not a .jsonl file"),
        ({"out": "x.txt"}, "`out`: 'x.txt' is not a .jsonl file"),
        ({"samples": 0}, "`samples`: 0 is impossible"),
        ({"temperature": -1.0}, "`temperature`: -1.0 is impossible"),
        ({"temperature": 0.0}, "`temperature`: 0 draws the greedy answer again and again"),
    ],
)
def test_impossible_options_are_one_line(changes, complaint):
    with pytest.raises(UserError) as error:
        SampleOptions(**{"checkpoint": "base", "out": "x.jsonl"} | changes)
    assert complaint in str(error.value)


@pytest.mark.slow
def test_r1s_pipeline_runs_and_resumes(folder, mostly_right_engine, capsys, monkeypatch):
    sft = SMALL | {"context": 48, "steps": 3, "batch_size": 2}
    grpo = SMALL | {"task": "task.jsonl", "questions": 20, "group_size": 2, "questions_per_step": 2, "batch_size": 4}
    grpo |= {
        "steps": 2,
        "max_new_tokens": 8,
        "eval_questions": 2,
        "show": 0,
        "rewards": ["accuracy", "format", "language"],
    }
    sampled = {"task": "task.jsonl", "questions": 12, "max_new_tokens": 2, "device": "cpu", "precision": "fp32"}
    path = write(
        [
            {"sft": sft | {"checkpoint": "base", "data": "task:task.jsonl", "out": "r1/cold"}},
            {"grpo": grpo | {"checkpoint": "r1/cold", "out": "r1/reasoner"}},
            {"sample": sampled | {"checkpoint": "r1/reasoner", "out": "r1/answers.jsonl"}},
            {"sft": sft | {"checkpoint": "base", "data": "r1/answers.jsonl", "out": "r1/assistant"}},
            {"grpo": grpo | {"checkpoint": "r1/assistant", "out": "r1/final"}},
        ]
    )
    recipe(path)
    said = capsys.readouterr().out
    assert [said.count(f"--- stage {i} of 5: ") for i in range(1, 6)] == [1] * 5
    assert "kept 24 of 48 answers" in said
    assert Path("r1/final/model.safetensors").exists()

    Path("r1/final/config.json").unlink()  # interrupted before its end
    recipe(path)
    said = capsys.readouterr().out
    assert said.count("already finished") == 4 and Path("r1/final/config.json").exists()


STAGE = {"checkpoint": "base", "data": "task:chain_sum", "steps": 3, "out": "done"}


@pytest.fixture
def finished(folder):
    """Makes `done` the folder of a finished run of sft."""
    run_folder.create(SFTOptions.resolve(dict(STAGE)))
    Path("done/config.json").write_text("{}")


def forbid_running(monkeypatch):
    monkeypatch.setattr(recipes, "STAGES", {verb: (cls, pytest.fail) for verb, (cls, _) in recipes.STAGES.items()})


@pytest.mark.parametrize("free", [{}, {"save_every": 7, "out": "./done"}])
def test_a_finished_stage_is_skipped(finished, monkeypatch, capsys, free):
    forbid_running(monkeypatch)
    recipe(write([{"sft": STAGE | free}]))
    assert capsys.readouterr().out.count("already finished") == 1


@pytest.mark.parametrize(
    ("stage", "complaint"),
    [
        ({"sft": STAGE | {"steps": 4}}, "`steps`: 4 differs from the 3 that the finished run in done had"),
        ({"sft": STAGE | {"data": "chitchat"}}, "`data`: 'chitchat' differs from the 'task:chain_sum'"),
        ({"train": {"data": "python", "out": "done"}}, "`out`: done holds a finished run of sft, not of train"),
        ({"grpo": {"checkpoint": "base", "out": "done"}}, "`out`: done holds a finished run of sft, not of grpo"),
    ],
)
def test_another_run_is_not_taken_for_a_finished_stage(finished, monkeypatch, stage, complaint):
    forbid_running(monkeypatch)
    with pytest.raises(UserError) as error:
        recipe(write([{"sft": STAGE | {"out": "new"}}, stage]))
    assert complaint in str(error.value) and "\n" not in str(error.value)


def test_a_model_of_unknown_origin_is_no_finished_stage(finished, monkeypatch):
    forbid_running(monkeypatch)
    Path("done/run.yaml").unlink()
    with pytest.raises(
        UserError, match=r"`out`: done holds a model of unknown origin, without run.yaml: name another folder"
    ):
        recipe(write([{"sft": STAGE}]))


@pytest.mark.parametrize("out", ["done", "./done", "x/../done"])
def test_two_stages_with_one_folder_are_refused(finished, monkeypatch, out):
    forbid_running(monkeypatch)
    with pytest.raises(UserError, match=r"recipe.yaml, stage 2: stage 1 writes into .*done too: name another `out`"):
        recipe(write([{"sft": STAGE}, {"sft": STAGE | {"out": out}}]))


def test_the_recipe_in_docs_is_valid():
    stages = read(str(Path(__file__).parents[2] / "docs" / "r1.yaml"))
    assert [verb for verb, _ in stages] == ["sft", "grpo", "sample", "sft", "grpo"]
    assert stages[1][1].rewards == ["accuracy", "format", "language"]


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("- sft: {out: a, checkpoint: base, stepz: 3}", "stage 1: unknown key 'stepz' (did you mean steps?)"),
        ("- gpro: {out: b}", "stage 1: 'gpro' is none of train, sft, grpo, sample (did you mean grpo?)"),
        ("- sft: {checkpoint: base}", "stage 1: sft needs an `out`"),
        ("- sft: {out: a, checkpoint: base, steps: many}", "stage 1: steps: 'many' is not a whole number"),
        ("- sft: {out: a, checkpoint: base, lr: 0}", "`lr`: 0.0 is impossible"),
        ("- sft: {out: a, checkpoint: base, steps: 3, epochs: 2}", "`epochs`: it has no effect with `steps` 3"),
        ("- {sft: {}, grpo: {}}", "stage 1: it must be one verb with its options"),
        ("sft: {}", "is not a list of stages"),
        ("- [", "is not YAML"),
    ],
)  # fmt: skip
def test_a_broken_recipe_is_one_line_before_anything_runs(folder, monkeypatch, text, complaint):
    Path("recipe.yaml").write_text(text)
    forbid_running(monkeypatch)
    with pytest.raises(UserError) as error:
        recipe("recipe.yaml")
    assert complaint in str(error.value)


def test_a_missing_recipe_is_one_line(folder):
    with pytest.raises(UserError, match=r"cannot read none.yaml: No such file"):
        recipe("none.yaml")
