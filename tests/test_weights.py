"""Weight files are compared with config.json before a model is built, and only plain safetensors files are read."""

import json
import os
import pickle
import shutil
import tracemalloc

import pytest
import torch
from safetensors.torch import load_file, save_file

from moonwhale.checkpoint import open_checkpoint
from moonwhale.errors import UserError
from moonwhale.model import MoonwhaleForCausalLM

NORM = "model.norm.weight"


@pytest.fixture
def folder(small_checkpoint, tmp_path):
    return shutil.copytree(small_checkpoint, tmp_path / "run")


def refused(folder, message):
    with pytest.raises(UserError) as caught:
        open_checkpoint(folder)
    line = str(caught.value)
    assert message in line and "\n" not in line and len(line) < 700, line


def configure(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit(folder, **changes):
    tensors = load_file(folder / "model.safetensors")
    save_file(tensors | changes, folder / "model.safetensors", {"format": "pt"})


def shard(folder, name):
    """Replace the weights by an index that names one file."""
    weight_map = dict.fromkeys(load_file(folder / "model.safetensors"), name)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    os.replace(folder / "model.safetensors", folder / "part.safetensors")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"transformers_weights": 1.5}, "leave out transformers_weights"),
        ({"num_labels": 10**9}, "num_labels=1000000000"),
        ({"vocab_size": 10**9}, "×32, not 1000000000×32"),
        ({"num_hidden_layers": 500}, "it describes 501 blocks, and the files hold 3"),
        ({"num_hidden_layers": 9_999}, "give a whole number, at most 512"),
        ({"n_routed_experts": 2**20}, "experts"),
        ({"n_routed_experts": 2**20, "hidden_size": 2**20, "intermediate_size": 2**20}, "not"),
        ({"num_nextn_predict_layers": 500}, "it describes 502 blocks, and the files hold 3"),
        ({"mtp_num_blocks": 500}, "it describes 502 blocks, and the files hold 3"),
        ({"num_nextn_predict_layers": 500, "mtp_num_blocks": 500}, "the model would have 250,002 blocks, and at most"),
        ({"max_position_embeddings": 2**31 - 1}, "max_position_embeddings=2,147,483,647 needs a table of"),
    ],
)
def test_sizes_are_compared_before_a_model_is_built(folder, changes, message):
    configure(folder, **changes)
    tracemalloc.start()
    try:
        refused(folder, message)
        assert tracemalloc.get_traced_memory()[1] < 1 << 27
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("number", [1, 10**4])
def test_blocks_are_counted_by_their_names(folder, number):
    """Empty tensors take no space in a file, so their number says little."""
    (folder / "model.safetensors").unlink()
    save_file({f"a{i}": torch.zeros(0) for i in range(number)}, folder / "model.safetensors", {"format": "pt"})
    configure(folder, num_hidden_layers=500)
    refused(folder, "it describes 501 blocks, and the files hold 0")


@pytest.mark.parametrize(
    "value", ["flash_attention_2", "paged|sdpa", "sdpa", "flex_attention", "who/kernels", "", 5, {}]
)
@pytest.mark.parametrize("name", ["attn_implementation", "_attn_implementation", "experts_implementation"])
def test_other_implementations_are_refused(folder, name, value):
    configure(folder, **{name: value})
    refused(folder, f"config.json: {name}={value!r} is impossible: the model has its own attention and experts")


@pytest.mark.parametrize("value", [{"a": 1}, {}, ["x"], 5])
@pytest.mark.parametrize(
    "name",
    ["text_config", "decoder", "is_encoder_decoder", "layer_types", "sliding_window", "output_hidden_states"],
)
def test_fields_of_other_models_are_refused(folder, name, value):
    configure(folder, **{name: value})
    refused(folder, f"config.json: {name}={value!r} is impossible")


def test_whatever_transformers_raises_is_one_line(folder, monkeypatch):
    def fail(*args, **kwargs):
        raise AttributeError("no\n`vocab_size` in a field of tomorrow")

    monkeypatch.setattr(MoonwhaleForCausalLM, "from_pretrained", fail)
    message = (
        "config.json describes a model that cannot be built (AttributeError: no 'vocab_size' in a field of tomorrow)"
    )
    refused(folder, message)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (torch.ones(32, dtype=torch.float64), f"{NORM} holds F64 numbers, not"),
        (torch.ones(32, dtype=torch.int8), f"{NORM} holds I8 numbers, not"),
        (torch.ones(32, dtype=torch.bool), f"{NORM} holds BOOL numbers, not"),
        (torch.ones(()), f"{NORM} is a single number, not 32"),
        (torch.ones(0), f"{NORM} is 0, not 32"),
        (torch.full((32,), torch.nan), f"{NORM} holds values that are NaN or infinite"),
        (torch.ones(32).index_fill(0, torch.tensor([7]), -torch.inf), "NaN or infinite"),
        (torch.full((32,), torch.inf, dtype=torch.bfloat16), "NaN or infinite"),
    ],
)
def test_a_tensor_that_does_not_fit_is_named(folder, value, message):
    edit(folder, **{NORM: value})
    refused(folder, message)


def test_an_unknown_tensor_is_named_without_its_control_characters(folder):
    edit(folder, **{"\x1b[2Jmore": torch.ones(2)})
    refused(folder, "\\x1b[2Jmore is unknown")


def test_an_index_of_plain_files_in_the_folder_opens(folder):
    shard(folder, "part.safetensors")
    open_checkpoint(folder)


@pytest.mark.parametrize(
    "name",
    ["../part.safetensors", "/dev/zero", "sub/part.safetensors", "part.bin", "..", "", "zero.safetensors"],
)
def test_an_index_names_safetensors_in_its_own_folder_only(folder, name):
    shard(folder, name)
    shutil.copy(folder / "part.safetensors", folder.parent)
    (folder / "part.bin").write_bytes(pickle.dumps({}))
    (folder / "zero.safetensors").symlink_to("/dev/zero")
    refused(folder, "no safetensors file in its folder" if name != "zero.safetensors" else "no plain file")


@pytest.mark.parametrize(
    "content", ["{}", '{"weight_map": []}', '{"weight_map": {"a": 1}}', '{"weight_map": {}}', "[]"]
)
def test_an_index_of_another_kind_is_refused(folder, content):
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(content)
    refused(folder, "model.safetensors.index.json")


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "generation_config.json", "tokenizer.json"])
@pytest.mark.parametrize("kind", ["pipe", "device", "folder", "broken link"])
def test_what_is_no_plain_file_is_never_opened(folder, name, kind):
    path = folder / name
    path.unlink()
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    else:
        path.symlink_to("/dev/zero" if kind == "device" else "nowhere")
    refused(folder, str(folder))


@pytest.mark.parametrize(
    ("length", "header"),
    [
        (2**63, b"{}"),
        (10**9, b"{}"),
        (0, b""),
        (None, b"[" * 100_000),
        (None, json.dumps({NORM: {"dtype": "F32", "shape": [2**62, 2**62], "data_offsets": [0, 128]}}).encode()),
        (None, json.dumps({NORM: {"dtype": "F32", "shape": [32], "data_offsets": [0, -1]}}).encode()),
        (None, json.dumps({NORM: {"dtype": "str", "shape": [32], "data_offsets": [0, 128]}}).encode()),
        (
            None,
            json.dumps({n: {"dtype": "F32", "shape": [32], "data_offsets": [0, 128]} for n in ("a", NORM)}).encode(),
        ),
    ],
)
def test_damaged_headers_are_refused(folder, length, header):
    length = len(header) if length is None else length
    (folder / "model.safetensors").write_bytes(length.to_bytes(8, "little") + header + bytes(128))
    refused(folder, "damaged or cut short")
