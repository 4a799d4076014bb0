"""Exported folders: transformers computes from them what we compute, in a process without our code."""

import json
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from moonwhale.checkpoint import open_checkpoint
from moonwhale.cli import main as cli
from moonwhale.data.tokenizer import train_tokenizer
from moonwhale.export.deepseek import MOONWHALE_JSON

IDS = torch.randint(61, (2, 24), generator=torch.Generator().manual_seed(3))
LOAD = """
import sys, torch
from transformers import AutoModelForCausalLM, AutoTokenizer
folder, ids, result, *options = sys.argv[1:]
if "mtp" in options:  # transformers knows the layer of DeepSeek's own size only, 61
    from transformers import DeepseekV3ForCausalLM

    DeepseekV3ForCausalLM._keys_to_ignore_on_load_unexpected = [r"model\\.layers\\.2.*"]
kwargs = {"trust_remote_code": True} if "code" in options else {}
model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True, dtype="auto", **kwargs)
AutoTokenizer.from_pretrained(folder)
assert not info["missing_keys"] and not info["mismatched_keys"], info
assert not any(name == "moonwhale" or name.startswith("moonwhale.") for name in sys.modules)
ids, found = torch.load(ids), {}
with torch.no_grad():
    found["logits"] = model.eval()(ids, use_cache=False).logits
greedy = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
greedy["attention_mask"] = torch.ones_like(ids[:1])
found["greedy"] = model.generate(ids[:1], **greedy)
if "mtp" in options:
    found["drafted"] = model.generate(ids[:1], use_mtp=True, **greedy)
torch.save(found, result)
"""


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(["The whale sang to the moon, and the moon sang back."] * 4, 300)


@pytest.fixture
def checkpoint(drawn_checkpoint, tokenizer):
    """`checkpoint(**overrides)` returns the folder of a randomly initialized model, and the model."""
    return partial(drawn_checkpoint, tokenizer)


def loaded_elsewhere(folder: Path, *options: str) -> dict:
    """Returns what transformers computes from a folder, in a process that never imports moonwhale."""
    ids, result = folder.parent / "ids.pt", folder.parent / "result.pt"
    torch.save(IDS, ids)
    command = [sys.executable, "-c", LOAD, *map(str, (folder, ids, result)), *options]
    done = subprocess.run(command, capture_output=True, text=True, cwd=folder.parent)
    assert done.returncode == 0, done.stderr
    return torch.load(result)


def close(a, b) -> bool:
    return ((a - b).abs().max() / b.abs().max()).item() < 3e-5


def run(capsys, *argv) -> str:
    """Returns the standard error of an export that must succeed."""
    capsys.readouterr()
    assert cli(["export", *map(str, argv)]) == 0
    return capsys.readouterr().err


@pytest.mark.slow
def test_deepseek_and_back(checkpoint, tmp_path, capsys):
    """MoBA covers the whole context and the MTP module has one block, so nothing is lost and no warning is printed."""
    folder, model = checkpoint(moba_topk=4, moba_block_size=16, num_nextn_predict_layers=1)
    theirs, back = tmp_path / "theirs", tmp_path / "back"
    assert run(capsys, folder, "--out", theirs) == ""
    config = json.loads((theirs / "config.json").read_text())
    assert config["architectures"] == ["DeepseekV3ForCausalLM"] and config["model_type"] == "deepseek_v3"
    names = load_file(theirs / "model.safetensors").keys()
    assert {"model.layers.2.shared_head.head.weight", "model.layers.1.mlp.experts.0.gate_proj.weight"} <= names

    found = loaded_elsewhere(theirs, "mtp")
    with torch.no_grad():
        assert close(found["logits"], model(IDS, use_cache=False).logits)
    assert torch.equal(found["drafted"], found["greedy"]), "drafting with our MTP module changes no token"

    assert run(capsys, theirs, "--to", "moonwhale", "--out", back) == ""
    again, _ = open_checkpoint(back)
    assert again.config.to_dict() | {"_name_or_path": ""} == model.config.to_dict() | {"_name_or_path": ""}
    assert all(torch.equal(w, again.state_dict()[name]) for name, w in model.state_dict().items())


@pytest.mark.slow
def test_code_travels_along(checkpoint, tmp_path, capsys):
    folder, model = checkpoint(moba_topk=2, moba_block_size=4, moba_key_conv=3, num_nextn_predict_layers=1)
    run(capsys, folder, "--to", "code", "--out", tmp_path / "alone")
    found = loaded_elsewhere(tmp_path / "alone", "code")
    with torch.no_grad():
        assert close(found["logits"], model(IDS, use_cache=False).logits)


def test_what_the_format_cannot_hold_is_reported(checkpoint, tmp_path, capsys):
    folder, model = checkpoint(
        moba_topk=2, moba_block_size=4, moba_full_attention_layers=[3], num_nextn_predict_layers=1, mtp_num_blocks=[2]
    )
    said = run(capsys, folder, "--out", tmp_path / "theirs")
    assert "from token 9 on" in said and "one block per module" in said and len(said.splitlines()) == 2
    assert json.loads((tmp_path / "theirs" / "config.json").read_text())["num_nextn_predict_layers"] == 0
    from transformers import DeepseekV3ForCausalLM

    theirs = DeepseekV3ForCausalLM.from_pretrained(tmp_path / "theirs").eval()
    with torch.no_grad():
        ours, exported = (m(IDS, use_cache=False).logits for m in (model, theirs))
    assert close(exported[:, :8], ours[:, :8]) and not close(exported[:, 8:], ours[:, 8:]), "as the warning says"

    run(capsys, tmp_path / "theirs", "--to", "moonwhale", "--out", tmp_path / "back")
    again, _ = open_checkpoint(tmp_path / "back")
    assert again.config.num_nextn_predict_layers == 0 and again.config.moba_topk == 2
    with torch.no_grad():
        assert torch.equal(again(IDS).logits, model(IDS).logits)


def test_a_dense_mtp_module_is_reported(checkpoint, tmp_path, capsys):
    """transformers gives every MTP module experts, so it cannot load a dense one."""
    folder, _ = checkpoint(moba_topk=0, first_k_dense_replace=3, num_nextn_predict_layers=1)
    said = run(capsys, folder, "--out", tmp_path / "theirs")
    assert "expects experts in MTP modules" in said and len(said.splitlines()) == 1


def test_a_foreign_folder(checkpoint, tmp_path, capsys):
    """If our configuration file is missing, MTP modules are found in the weights and MoBA is off."""
    folder, model = checkpoint(moba_topk=2, moba_block_size=4, num_nextn_predict_layers=2)
    run(capsys, folder, "--out", tmp_path / "theirs")
    (tmp_path / "theirs" / MOONWHALE_JSON).unlink()
    assert "MoBA is off" in run(capsys, tmp_path / "theirs", "--to", "moonwhale", "--out", tmp_path / "back")
    again, _ = open_checkpoint(tmp_path / "back")
    assert again.config.num_nextn_predict_layers == 2 and again.config.moba_topk == 0
    assert all(torch.equal(w, again.state_dict()[name]) for name, w in model.state_dict().items())


def test_end_tokens_and_sampling_defaults_travel_along(checkpoint, tmp_path, capsys):
    folder, model = checkpoint()
    eos = [model.config.eos_token_id, 7]
    values = {"eos_token_id": eos, "temperature": 0.6}  # as published, without `do_sample`
    (folder / "generation_config.json").write_text(json.dumps(values))
    run(capsys, folder, "--out", tmp_path / "theirs")
    run(capsys, tmp_path / "theirs", "--to", "moonwhale", "--out", tmp_path / "back")
    run(capsys, folder, "--to", "code", "--out", tmp_path / "code")
    for name in ("theirs", "back", "code"):
        found = json.loads((tmp_path / name / "generation_config.json").read_text())
        assert found | values == found and found.get("use_cache", True) is True


def test_bf16_keeps_the_router_bias(checkpoint, tmp_path, capsys):
    folder, model = checkpoint()
    run(capsys, folder, "--out", tmp_path / "theirs", "--dtype", "bf16")
    weights = load_file(tmp_path / "theirs" / "model.safetensors")
    bias = weights.pop("model.layers.0.mlp.gate.e_score_correction_bias")
    assert torch.equal(bias, model.model.layers[0].mlp.gate.e_score_correction_bias)
    assert weights["lm_head.weight"].dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("overrides", "options", "why"),
    [
        ({"moba_key_conv": 3}, [], "moba_key_conv"),
        ({"embedding_conv": 2}, [], "embedding_conv"),
        ({"latent_embedding_every": 2}, [], "latent_embedding_every"),
        ({"scoring_func": "softmax"}, [], "sigmoid, not softmax"),
        ({}, ["--to", "moonwhale"], "model of type 'moonwhale', not 'deepseek_v3'"),
        ({}, ["--to", "onnx"], "deepseek"),
    ],
)
def test_refused_in_one_line(overrides, options, why, checkpoint, tmp_path, capsys):
    folder, _ = checkpoint(**overrides)
    out = tmp_path / "out"
    assert cli(["export", str(folder), "--out", str(out), *options]) == 2
    said = capsys.readouterr().err
    assert why in said and len(said.splitlines()) == 1
    assert sorted(p.name for p in tmp_path.iterdir()) == ["ours"], "nothing is left behind"


def test_nothing_is_overwritten(checkpoint, tmp_path, capsys):
    folder, _ = checkpoint()
    before = {p.name: p.read_bytes() for p in folder.iterdir()}
    assert cli(["export", str(folder), "--out", str(folder)]) == 2
    assert "nothing is overwritten" in capsys.readouterr().err
    assert before == {p.name: p.read_bytes() for p in folder.iterdir()}
    assert cli(["export", str(tmp_path / "nowhere"), "--out", str(tmp_path / "out")]) == 2
    assert "is no folder" in capsys.readouterr().err


def test_a_folder_that_is_filled_during_the_export_is_kept(checkpoint, tmp_path, capsys, monkeypatch):
    """The check at the start may be outdated at the end, after minutes of writing."""
    folder, _ = checkpoint()
    out = tmp_path / "out"

    def write(folder, unfinished, dtype):
        out.mkdir()
        (out / "notes.txt").write_text("other work")
        return []

    monkeypatch.setattr("moonwhale.export.deepseek.to_deepseek", write)
    assert cli(["export", str(folder), "--out", str(out)]) == 2
    assert "Directory not empty" in capsys.readouterr().err
    assert [path.name for path in out.iterdir()] == ["notes.txt"]
