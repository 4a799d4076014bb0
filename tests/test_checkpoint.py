"""A folder that is not a checkpoint, is damaged, or mixes files of two models gives a one-line error."""

import json
import logging
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from moonwhale.checkpoint import open_checkpoint
from moonwhale.cli import main
from moonwhale.data.tokenizer import train_tokenizer
from moonwhale.errors import UserError
from moonwhale.model import MoonwhaleConfig, MoonwhaleForCausalLM


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    folder = tmp_path_factory.mktemp("good")
    tokenizer = train_tokenizer(["The whale sang to the moon."] * 4, 290)
    tokenizer.save_pretrained(folder)
    config = MoonwhaleConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        q_lora_rank=8,
        kv_lora_rank=8,
        qk_nope_head_dim=4,
        qk_rope_head_dim=4,
        v_head_dim=4,
        n_routed_experts=2,
        moe_intermediate_size=8,
        num_nextn_predict_layers=1,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    MoonwhaleForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture
def folder(good, tmp_path):
    return shutil.copytree(good, tmp_path / "run")


def refused(folder, *messages):
    with pytest.raises(UserError) as caught:
        open_checkpoint(folder)
    line = str(caught.value)
    assert "\n" not in line and len(line) < 500
    assert all(message in line for message in (str(folder), *messages)), line
    return line


def edit_json(path, **changes):
    values = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in values.items() if value is not None}))


def edit_weights(folder, change):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_good_checkpoint_opens(good, dtype):
    model, tokenizer = open_checkpoint(good, dtype)
    assert not model.training and model.lm_head.weight.dtype is dtype
    assert model.model.layers[0].mlp.gate.e_score_correction_bias.dtype is torch.float32
    assert model.config.vocab_size == len(tokenizer)
    saved = load_file(good / "model.safetensors")
    assert all(torch.equal(tensor, saved[name].to(tensor.dtype)) for name, tensor in model.state_dict().items())


def test_a_folder_without_a_checkpoint_is_refused(tmp_path):
    refused(tmp_path / "nowhere", "is no folder")
    (tmp_path / "file").write_text("")
    refused(tmp_path / "file", "is a file")
    refused(tmp_path, "not a checkpoint", "no config.json")


def test_a_run_in_progress_names_its_newest_checkpoint(good, folder):
    for step in (9, 20, 100):
        shutil.copytree(good, folder / f"checkpoint-{step}")
    (folder / "checkpoint-100" / "config.json").unlink()  # makes it incomplete
    (folder / "model.safetensors").unlink()
    refused(folder, "no weights", f"newest checkpoint is {folder / 'checkpoint-20'} (give that)")
    (folder / "config.json").unlink()
    refused(folder, f"newest checkpoint is {folder / 'checkpoint-20'} (give that)")
    open_checkpoint(folder / "checkpoint-20")


def test_a_checkpoint_without_weights_is_refused(folder):
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(b"pickled")
    assert "newest" not in refused(folder, "no weights")


@pytest.mark.parametrize("name", ["config.json", "generation_config.json"])
@pytest.mark.parametrize("content", [b'{"model_type": "moonwh', b"\xff\xfe\x00", b"", b"[]"])
def test_unreadable_json_is_refused(folder, name, content):
    (folder / name).write_bytes(content)
    refused(folder, f"cannot read {folder / name}")


@pytest.mark.parametrize("name", ["config.json", "generation_config.json"])
def test_json_that_is_too_deep_to_copy_is_refused(folder, name):
    text = (folder / name).read_text().replace('"_from_model_config": true,', "")  # it drops unknown fields
    (folder / name).write_text(text.replace("{", f'{{"deep": {"[" * 600}{"]" * 600},', 1))
    refused(folder, name, "a value is impossible (RecursionError: ")


def test_a_type_that_transformers_does_not_check_is_refused(folder):
    edit_json(folder / "generation_config.json", watermarking_config=3)
    refused(folder, "generation_config.json", "a value is impossible (AttributeError: ")


def test_save_pretrained_takes_transformers_positional_arguments(folder, tmp_path):
    """The second one is `is_main_process`: the other ranks of a training loop write nothing."""
    model, _ = open_checkpoint(folder)
    model.save_pretrained(tmp_path / "not", False)
    assert not list((tmp_path / "not").glob("*.safetensors"))


def test_published_sampling_defaults_are_saved_again(folder, tmp_path):
    """They have no `do_sample`. A Trainer sets the tokenizer's padding token before its first checkpoint."""
    edit_json(folder / "generation_config.json", temperature=0.6)
    model, _ = open_checkpoint(folder)
    model.generation_config.pad_token_id = 2
    model.save_pretrained(tmp_path / "again")
    saved = json.loads((tmp_path / "again" / "generation_config.json").read_text())
    assert saved["temperature"] == 0.6 and saved["pad_token_id"] == 2


def test_another_model_type_is_refused(folder):
    edit_json(folder / "config.json", model_type="llama")
    refused(folder, "of type 'llama', not 'moonwhale'")
    edit_json(folder / "config.json", model_type=None)
    refused(folder, "of type None")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"moba_block_size": 0}, "moba_block_size=0"),
        ({"hidden_size": "wide"}, "hidden_size: 'wide' is not a whole number"),
        ({"rope_parameters": {"rope_type": "spiral"}}, "rope_parameters={'rope_type': 'spiral'"),
    ],
    ids=str,
)
def test_an_impossible_configuration_is_refused(folder, changes, message):
    edit_json(folder / "config.json", **changes)
    refused(folder, "config.json", message)


@pytest.mark.parametrize("keep", [0.0, 0.001, 0.5, 0.999])
def test_truncated_weights_are_refused(folder, keep):
    weights = folder / "model.safetensors"
    content = weights.read_bytes()
    weights.write_bytes(content[: int(keep * len(content))])
    refused(folder, "damaged or cut short")


def test_damaged_weights_are_refused(folder):
    weights = folder / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[:40] = b"\xff" * 40
    weights.write_bytes(content)
    refused(folder, "damaged or cut short")


def test_a_missing_shard_is_refused(folder):
    (folder / "model.safetensors").unlink()
    names = ["lm_head.weight"]
    index = {"metadata": {}, "weight_map": dict.fromkeys(names, "model-00001-of-00001.safetensors")}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    refused(folder, "names model-00001-of-00001.safetensors, which is missing")


def test_weights_that_do_not_fit_the_configuration_are_refused(folder, good, capfd, caplog, monkeypatch):
    library = logging.getLogger("transformers")
    monkeypatch.setattr(library, "handlers", [*library.handlers, caplog.handler])
    weights, norm = good / "model.safetensors", "model.norm.weight"
    edit_weights(folder, lambda tensors: tensors.pop(norm))
    refused(folder, "do not fit", f"{norm} is missing;")
    shutil.copy(weights, folder)
    edit_weights(folder, lambda tensors: tensors.update(more=torch.ones(2)))
    refused(folder, "do not fit", "more is unknown;")
    shutil.copy(weights, folder)
    edit_weights(folder, lambda tensors: tensors.update({norm: torch.ones(3), "more": torch.ones(2)}))
    refused(folder, "more is unknown (and 1 more)")
    shutil.copy(weights, folder)
    edit_json(folder / "config.json", vocab_size=999)
    refused(folder, "weight is ", "×16, not 999×16 (and 1 more)")
    assert not caplog.records and capfd.readouterr() == ("", ""), "no table of transformers' beside our line"


def test_a_missing_or_damaged_tokenizer_is_refused(folder):
    (folder / "tokenizer.json").write_text("{")
    assert "--tokenizer" not in refused(folder, "cannot read")
    (folder / "tokenizer.json").unlink()
    refused(folder, "no tokenizer.json")


def test_a_tokenizer_with_another_vocabulary_is_refused(folder):
    train_tokenizer(["The whale sang to the moon, and the sea sang back."] * 4, 288).save_pretrained(folder)
    refused(folder, "another vocabulary, with ids up to 287")


def test_a_tokenizer_with_another_end_token_is_refused(folder):
    edit_json(folder / "config.json", eos_token_id=[7, 8])
    refused(folder, "another vocabulary, with 1 as its end token")


@pytest.mark.parametrize("verb", ["generate", "chat"])
def test_the_command_line_prints_the_error_and_exits_with_2(verb, tmp_path, capsys, monkeypatch):
    monkeypatch.delenv("MOONWHALE_DEBUG", raising=False)
    arguments = ["hi"] if verb == "generate" else []
    assert main([verb, str(tmp_path), *arguments]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith(f"moonwhale: error: {tmp_path} is not a checkpoint") and err.count("\n") == 1
