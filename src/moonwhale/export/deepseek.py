"""Exports a checkpoint in DeepSeek-V3's format, and imports one from it.

The format has MLA, the experts, and MTP modules of one block each, under the weight names that our checkpoints already
use. It has no MoBA: the exported model attends to every token. That is the same model as long as MoBA's chosen blocks
cover the context. The exported folder also holds our configuration, in `moonwhale.json`, so that importing it restores
MoBA's settings.
"""

from dataclasses import fields
from pathlib import Path

import torch
from safetensors import safe_open
from transformers import DeepseekV3Config

from moonwhale.checkpoint import load_model, load_tokenizer_of, open_checkpoint, read_json
from moonwhale.errors import UserError
from moonwhale.model import MoonwhaleConfig

MOONWHALE_JSON = "moonwhale.json"  # our configuration, in an exported folder


def to_deepseek(folder: Path, out: Path, dtype) -> list[str]:
    """Writes a `DeepseekV3ForCausalLM` and returns one line for each difference from our model.

    Raises:
        UserError: the format cannot hold the model.
    """
    model, tokenizer = open_checkpoint(folder, dtype)
    config = model.config
    notes = without_moba(folder, config, config.num_blocks)
    if config.scoring_func != "sigmoid":
        raise UserError(
            f"{folder}: DeepSeek-V3's router scores by sigmoid, not {config.scoring_func}: export it with `to` code"
        )
    weights, n_blocks = model.state_dict(), config.num_hidden_layers
    modules = config.num_nextn_predict_layers
    if any(blocks > 1 for blocks in config.mtp_blocks):
        weights = {name: weight for name, weight in weights.items() if layer_of(name) < n_blocks}
        notes.append(
            f"warning: MTP is left out: the format has one block per module, and this model has {config.mtp_blocks}"
        )
        modules = 0
    for layer in range(n_blocks, n_blocks + modules):  # in this format each module repeats the embedding and the head
        weights[f"model.layers.{layer}.embed_tokens.weight"] = weights["model.embed_tokens.weight"].clone()
        weights[f"model.layers.{layer}.shared_head.head.weight"] = model.lm_head.weight.detach().clone()

    with torch.device("meta"):  # a loaded model would save its experts in the layout of the file it came from
        new = type(model)(config)
    new.save_pretrained(out, state_dict=weights, save_original_format=True)
    _deepseek_config(config, dtype, modules).save_pretrained(out)
    tokenizer.save_pretrained(out)
    config.to_json_file(out / MOONWHALE_JSON, use_diff=False)
    return notes


def _deepseek_config(config: MoonwhaleConfig, dtype, modules: int) -> DeepseekV3Config:
    """The fields that both configurations have, for a DeepSeek-V3 with `modules` MTP modules."""
    shared = {f.name for f in fields(DeepseekV3Config)} & config.to_dict().keys()
    values = {name: getattr(config, name) for name in shared}
    values |= {"architectures": ["DeepseekV3ForCausalLM"], "dtype": dtype, "num_nextn_predict_layers": modules}
    return DeepseekV3Config(**values)


def without_moba(folder: Path, config: MoonwhaleConfig, blocks: int) -> list[str]:
    """Returns a warning if full attention in the first `blocks` blocks changes the model, else an empty list.

    Raises:
        UserError: the model has a convolution on keys, which full attention lacks at any length.
    """
    if config.moba_key_conv:
        raise UserError(
            f"{folder}: DeepSeek-V3's format has no convolution on keys (moba_key_conv is set): "
            "export it with `to` code"
        )
    covered = config.moba_topk * config.moba_block_size
    if covered >= config.max_position_embeddings or not any(map(config.is_moba_layer, range(blocks))):
        return []
    return [
        f"warning: MoBA is left out: from token {covered + 1:,} on this model attends to chosen blocks, "
        "and the exported one to every token"
    ]


def from_deepseek(folder: Path, out: Path, dtype) -> list[str]:
    """Writes a moonwhale checkpoint of a DeepSeek-V3 folder.

    MoBA is set as in the folder's `moonwhale.json`. Without that file MoBA is off, which the returned note says.

    Raises:
        UserError: the folder holds no DeepSeek-V3, or its files are damaged or do not fit together.
    """
    values = read_json(folder / "config.json")
    if values.get("model_type") != "deepseek_v3":
        raise UserError(f"{folder}/config.json is of a model of type {values.get('model_type')!r}, not 'deepseek_v3'")
    exported_by_us = (folder / MOONWHALE_JSON).exists()
    if exported_by_us:
        values = read_json(folder / MOONWHALE_JSON)
    else:
        deepseek = DeepseekV3Config.from_pretrained(folder).to_dict()
        values = {f.name: deepseek[f.name] for f in fields(MoonwhaleConfig) if f.name in deepseek}

    modules = _mtp_modules(folder, values["num_hidden_layers"])
    blocks = range(values["num_hidden_layers"] + modules)
    values["moba_full_attention_layers"] = [i for i in values.get("moba_full_attention_layers") or [] if i in blocks]
    config = MoonwhaleConfig.from_dict(values | {"num_nextn_predict_layers": modules, "mtp_num_blocks": 1})
    model = load_model(folder, config, dtype)
    model.save_pretrained(out)
    load_tokenizer_of(folder, model).save_pretrained(out)
    if exported_by_us:
        return []
    return [f"note: {folder} holds no {MOONWHALE_JSON}: MoBA is off; set moba_topk to use it"]


def _mtp_modules(folder: Path, n_layers: int) -> int:
    """Counts the MTP modules in the weight files of a folder."""
    layers = {-1}
    for path in folder.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            layers |= set(map(layer_of, file.keys()))
    return max(max(layers) + 1 - n_layers, 0)


def layer_of(name: str) -> int:
    """The layer that a weight belongs to; -1 for the embedding, the head and the last norm."""
    return int(name.split(".")[2]) if name.startswith("model.layers.") else -1
