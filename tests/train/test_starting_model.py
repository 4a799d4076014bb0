"""`moonwhale train --from CHECKPOINT` goes on from a model, with a new schedule, on any text."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from moonwhale.checkpoint import log_history, newest_checkpoint, open_checkpoint
from moonwhale.data.loading import load_source
from moonwhale.data.packing import pack_split
from moonwhale.errors import UserError
from moonwhale.train import pretrain
from moonwhale.train.config import parse


@pytest.fixture(scope="module")
def other_text(tmp_path_factory):
    """A folder of text that the model was not trained on, with letters that it never saw."""
    folder = tmp_path_factory.mktemp("other")
    for i in range(30):
        (folder / f"{i:02}.txt").write_text(f"Zwölf Boxkämpfer jagen Victor, Nummer {i}. " * 4)
    return folder


@pytest.fixture
def going_on(tiny_run, trained_checkpoint, other_text):
    """`going_on(**options)` returns the options of a run of three steps that goes on from the trained checkpoint."""

    def going_on(**changes):
        return tiny_run(**{"from_": str(trained_checkpoint), "data": str(other_text), "steps": 3} | changes)

    return going_on


def weights(folder) -> dict[str, torch.Tensor]:
    return load_file(Path(folder) / "model.safetensors")


def test_it_begins_with_the_models_weights_and_tokenizer(going_on, trained_checkpoint, capsys):
    config = going_on()
    run = pretrain.build(config)
    trainer = run.make_trainer(callbacks=[])
    before = weights(trained_checkpoint)
    assert all(torch.equal(value, before[name]) for name, value in trainer.model.state_dict().items())
    trainer.processing_class.save_pretrained(config.out)
    assert Path(config.out, "tokenizer.json").read_bytes() == (trained_checkpoint / "tokenizer.json").read_bytes()
    assert f"from       {trained_checkpoint}" in capsys.readouterr().out


def test_the_first_evaluation_is_the_checkpoints(going_on, trained_checkpoint, other_text):
    config = going_on(eval_rows=1000)
    pretrain.train(config)
    first = next(e for e in log_history(newest_checkpoint(config.out)) if "eval_loss_main" in e)
    assert first["step"] == 0
    model, tokenizer = open_checkpoint(trained_checkpoint)
    _, held_out = pack_split(load_source(str(other_text)), tokenizer, config.context)
    with torch.no_grad():
        outs = [model(**{name: value[None] for name, value in held_out[i].items()}) for i in range(len(held_out))]
    nll = sum(out.losses[0] * out.targets[0] for out in outs) / sum(out.targets[0] for out in outs)
    assert first["eval_loss_main"] == pytest.approx(nll.item(), rel=1e-6)


def test_checkpoints_of_a_run_and_of_the_hub(going_on, trained_checkpoint, tmp_path):
    """A checkpoint-N, and a folder with DeepSeek's names in bf16, without the files of a run."""
    model, tokenizer = open_checkpoint(trained_checkpoint, torch.bfloat16)
    model.save_pretrained(tmp_path / "hub", save_original_format=True)
    tokenizer.save_pretrained(tmp_path / "hub")
    expected = weights(trained_checkpoint)
    for folder in (trained_checkpoint / "checkpoint-2", tmp_path / "hub"):
        config = going_on(from_=str(folder), out=str(tmp_path / folder.name / "run"))
        model = pretrain.build(config).make_trainer(callbacks=[]).model
        assert {p.dtype for p in model.parameters()} == {torch.float32}
        for name, value in model.state_dict().items():
            torch.testing.assert_close(value, expected[name], rtol=2**-8, atol=0)


def test_it_is_replayed_and_resumed(going_on, trained_checkpoint, tmp_path, monkeypatch):
    """A relative path is recorded as an absolute one. A resumed run does not need the folder any more."""
    start = shutil.copytree(trained_checkpoint, tmp_path / "start")
    monkeypatch.chdir(tmp_path)
    config = going_on(from_="start", save_every=2, model={"moba_topk": 1, "hidden_size": 32})
    pretrain.train(config)
    monkeypatch.chdir("/")
    again = parse(["--config", f"{config.out}/run.yaml", "--out", str(tmp_path / "again")])
    assert again.from_ == str(start) and again.model == {"moba_topk": 1, "hidden_size": 32}
    pretrain.train(again)
    assert json.loads((tmp_path / "again/config.json").read_text())["moba_topk"] == 1
    expected = weights(config.out)
    assert all(torch.equal(value, expected[name]) for name, value in weights(again.out).items())
    shutil.rmtree(start)
    shutil.rmtree(tmp_path / "again/checkpoint-3")
    pretrain.train(parse(["--out", again.out, "--resume"]))
    assert all(torch.equal(value, expected[name]) for name, value in weights(again.out).items())
    assert [e["step"] for e in log_history(newest_checkpoint(again.out)) if "eval_loss_main" in e] == [0, 3]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"model": {"hidden_size": 64}},
            r"^`model.hidden_size`: 64 does not fit the weights in .*, which have 32: leave",
        ),
        ({"model": {"moba_topk": 1, "n_routed_experts": 8}}, r"^`model.n_routed_experts`: 8 does not fit"),
        ({"model": {"tie_word_embeddings": True}}, r"^`model.tie_word_embeddings`: True does not fit"),
        ({"model": {"num_nextn_predict_layers": 0}}, r"^`model.num_nextn_predict_layers`: 0 does not fit"),
        ({"model": {"num_experts_per_tok": 9}}, r"^`model.num_experts_per_tok`=9 is impossible"),
        ({"model": {"initializer_range": 0.5}}, r"^`model.initializer_range`: it acts on a new model alone"),
        ({"model": {"zero_init_residual": False}}, r"^`model.zero_init_residual`: it acts on a new model alone"),
        ({"model": {"intermediate_size": 64}}, r"^`model.intermediate_size`: it has no effect with `model.first_k"),
        ({"tokenizer": "gpt2"}, r"^`tokenizer`: gpt2 is impossible: a model goes on with its own"),
        ({"context": 64, "batch_size": 1}, r"^`context`: 64 is longer than `model.max_position_embeddings` 32"),
        ({"from_": "no_such"}, r"^`from_`: .*/no_such is no folder"),
        ({"from_": "."}, r"^`from_`: .* is not a checkpoint: it holds no config.json"),
    ],
)
def test_what_contradicts_the_checkpoint_is_refused(going_on, tmp_path, monkeypatch, changes, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=message) as caught:
        pretrain.train(going_on(**changes))
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_fields_that_leave_the_weights_alone_may_change(going_on):
    changes = {"moba_topk": 1, "mtp_loss_weight": 0.1, "bias_update_speed": 0.5, "max_position_embeddings": 64}
    model = pretrain.build(going_on(model=changes, context=64, batch_size=1)).make_trainer(callbacks=[]).model
    assert {name: getattr(model.config, name) for name in changes} == changes
    assert model.model.layers[0].mlp.bias_speed == 0.5 and model.mtp_loss_weight == 0.1


def test_adapters_are_no_model(going_on, tmp_path):
    (tmp_path / "lora").mkdir()
    (tmp_path / "lora" / "adapter_config.json").write_text("{}")
    with pytest.raises(UserError, match=r"^`from_`: .* holds LoRA adapters, which are no model: give the folder of"):
        pretrain.train(going_on(from_=str(tmp_path / "lora")))


def test_the_defaults_suit_the_model(trained_checkpoint, tmp_path):
    """The preset is the one that the model was trained with, and the context is one that it has."""
    config = parse(["--from", str(trained_checkpoint), "--tokens-per-step", "256"])
    assert (config.preset, config.context, config.model) == ("demo", 32, {})
    assert config.out == f"runs/{trained_checkpoint.name}-train"
    (tmp_path / "checkpoint-9").mkdir()
    (tmp_path / "run.yaml").write_text("preset: small")
    assert parse(["--from", str(tmp_path / "checkpoint-9")]).preset == "small"
    assert parse(["--from", str(tmp_path / "checkpoint-9"), "--preset", "demo"]).preset == "demo"
