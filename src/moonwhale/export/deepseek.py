"""Exports a checkpoint in DeepSeek-V3's format, and imports one from it.

The format has MLA, the experts, and MTP modules of one block each, under the weight names that our checkpoints already
use. It has no MoBA: the exported model attends to every token. That is the same model as long as MoBA's chosen blocks
cover the context. The exported folder also holds our configuration, in `moonwhale.json`, so that importing it restores
MoBA's settings.
"""

import json
import math
import re
from dataclasses import fields
from pathlib import Path

import torch
from torch import Tensor
from transformers import DeepseekV3Config
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from moonwhale.checkpoint import load_model, load_tokenizer_of, open_checkpoint
from moonwhale.errors import UserError, one_line, shown
from moonwhale.files import read_json
from moonwhale.model import MoonwhaleConfig
from moonwhale.weights import read_headers, weight_files

MOONWHALE_JSON = "moonwhale.json"  # our configuration, in an exported folder


def to_deepseek(folder: Path, out: Path, dtype) -> list[str]:
    """Writes a `DeepseekV3ForCausalLM` and returns one line for each difference from our model.

    Raises:
        UserError: the format cannot hold the model.
    """
    model, tokenizer = open_checkpoint(folder, dtype)
    config = model.config
    config.use_cache = model.generation_config.use_cache = True
    require_latent_attention(folder, config)
    _require_representable(folder, config)
    require_no_extension(folder, config)
    notes = without_moba(config, config.num_blocks) + _read_differently(config)
    weights = {name: interleaved(name, weight, config) for name, weight in model.state_dict().items()}
    config.rope_interleave, n_blocks = True, config.num_hidden_layers
    modules = config.num_nextn_predict_layers
    if any(blocks > 1 for blocks in config.mtp_blocks):
        weights = {name: weight for name, weight in weights.items() if layer_of(name) < n_blocks}
        notes.append(
            f"warning: MTP is left out: the format has one block per module, and this model has {config.mtp_blocks}"
        )
        modules = 0
    if modules and config.first_k_dense_replace > n_blocks:
        notes.append("warning: transformers expects experts in MTP modules, so it can't draft with these dense ones")
    for layer in range(n_blocks, n_blocks + modules):  # in this format each module repeats the embedding and the head
        weights[f"model.layers.{layer}.embed_tokens.weight"] = weights["model.embed_tokens.weight"].clone()
        weights[f"model.layers.{layer}.shared_head.head.weight"] = model.lm_head.weight.detach().clone()

    with torch.device("meta"):  # a loaded model would save its experts in the layout of the file it came from
        new = type(model)(config)
    new.generation_config = model.generation_config
    new.save_pretrained(out, state_dict=weights, save_original_format=True)
    values = _deepseek_config(config, dtype, modules)
    (out / "config.json").write_text(json.dumps(values, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    tokenizer.save_pretrained(out)
    config.to_json_file(out / MOONWHALE_JSON, use_diff=False)
    return notes


def require_latent_attention(folder: Path, config: MoonwhaleConfig) -> None:
    """Raises UserError if the model's attention is not DeepSeek's."""
    if config.attention != "mla":
        raise UserError(f"{folder}: DeepSeek-V3 has no attention={config.attention}: export it with `to` code")


def _require_representable(folder: Path, config: MoonwhaleConfig) -> None:
    """Raises UserError if DeepSeek-V3's router and experts cannot compute what the model's do."""
    has_experts = config.first_k_dense_replace < config.num_blocks
    for fault, present in {
        f"router scores by sigmoid, not {config.scoring_func}": config.scoring_func != "sigmoid",
        "blocks have a shared expert (n_shared_experts is 0)": has_experts and not config.n_shared_experts,
        "router compares at least two experts (n_routed_experts is 1)": has_experts and config.n_routed_experts == 1,
    }.items():
        if present:
            raise UserError(f"{folder}: DeepSeek-V3's {fault}: export it with `to` code")


def _read_differently(config: MoonwhaleConfig) -> list[str]:
    """Returns a warning for each setting that transformers reads from the exported folder, and other readers do not."""
    warning, rope = "warning: read by transformers, but not by DeepSeek's own code: ", config.rope_parameters
    notes = []
    if config.norm_topk_prob and config.num_experts_per_tok == 1 and config.first_k_dense_replace < config.num_blocks:
        notes.append(f"{warning}norm_topk_prob with num_experts_per_tok=1")
    if not rope.get("truncate", True):
        notes.append(f"{warning}truncate=false in rope_parameters")
    if rope["rope_type"] == "llama3":
        notes.append(f"{warning}rope_type llama3")
    return notes


def _deepseek_config(config: MoonwhaleConfig, dtype, modules: int) -> dict:
    """The configuration of a DeepSeek-V3 with `modules` MTP modules, with all that its released config.json holds.

    Every value is written. DeepSeek's own class, for one, has softmax scores without a bias among its defaults.
    """
    shared = {f.name for f in fields(DeepseekV3Config)} & config.to_dict().keys()
    values = {name: getattr(config, name) for name in shared}
    values |= {"architectures": ["DeepseekV3ForCausalLM"], "dtype": dtype, "num_nextn_predict_layers": modules}
    written = DeepseekV3Config(**values).to_dict()
    return written | {
        "aux_loss_alpha": config.aux_loss_alpha,
        "ep_size": 1,
        "moe_layer_freq": 1,
        "rope_scaling": _rope_scaling(config),  # with rope_theta, how versions 4 of transformers name rope_parameters
        "rope_theta": config.rope_parameters["rope_theta"],
        "scoring_func": config.scoring_func,
        "seq_aux": config.balance_loss == "sequence",
        "topk_method": "noaux_tc",
        "torch_dtype": written["dtype"],
    }


def _rope_scaling(config: MoonwhaleConfig) -> dict | None:
    """RoPE's settings under their older names, with no default left to the reader; None without scaling.

    For YaRN, DeepSeek's code multiplies the rotated parts by m(mscale) / m(mscale_all_dim) with
    m(x) = 1 + 0.1 x ln factor. transformers does so only if both are given, so `mscale` is set such that they agree.
    """
    rope = {key: value for key, value in config.rope_parameters.items() if key != "rope_theta"}
    kind = rope["rope_type"]
    if kind == "default":
        return None
    rope["type"] = kind
    if kind == "yarn":
        rope["beta_fast"], rope["beta_slow"] = rope.get("beta_fast") or 32, rope.get("beta_slow") or 1
        all_dim, log = rope.get("mscale_all_dim") or 0.0, 0.1 * math.log(rope["factor"])
        as_given = rope.get("mscale") and all_dim and rope.get("attention_factor") is None
        if log and not as_given:
            rotated = ROPE_INIT_FUNCTIONS["yarn"](config, "cpu")[1]
            rope["attention_factor"] = rotated
            rope["mscale"] = (rotated * (1 + all_dim * log) - 1) / log
        rope["mscale_all_dim"] = all_dim
    return rope


def interleaved(name: str, weight: Tensor, config: MoonwhaleConfig) -> Tensor:
    """Reorders the rotary rows of a queries' or keys' projection so that pairs are adjacent, as DeepSeek rotates.

    The model computes the same: queries and keys are reordered alike. Other weights are returned as they are.
    """
    rope, layer = config.qk_rope_head_dim, name.rsplit(".", 2)[-2]
    if config.rope_interleave or layer not in ("q_proj", "q_b_proj", "kv_a_proj_with_mqa"):
        return weight
    heads = 1 if layer == "kv_a_proj_with_mqa" else config.num_attention_heads
    rows = weight.unflatten(0, (heads, -1))
    rotated = rows[:, -rope:].unflatten(1, (2, -1)).transpose(1, 2).flatten(1, 2)
    return torch.cat([rows[:, :-rope], rotated], dim=1).flatten(0, 1)


EXTENSIONS = {  # what DeepSeek-V3 has no place for, by the field that sets it
    "moba_key_conv": "convolution on keys",
    "embedding_conv": "convolution on embeddings",
    "latent_embedding_every": "embeddings on latents",
}


def require_no_extension(folder: Path, config: MoonwhaleConfig) -> None:
    """Raises a UserError if the model has an extension that DeepSeek-V3 lacks."""
    for field, extension in EXTENSIONS.items():
        if getattr(config, field):
            raise UserError(
                f"{folder}: DeepSeek-V3's format has no {extension} ({field} is set): "
                f"train with `model.{field}` 0, or export it with `to` code"
            )


def without_moba(config: MoonwhaleConfig, blocks: int) -> list[str]:
    """Returns a warning if full attention in the first `blocks` blocks changes the model, else an empty list."""
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
    path = folder / "config.json"
    values = read_json(path)
    if values.get("model_type") != "deepseek_v3":
        raise UserError(f"{path} is of a model of type {shown(values.get('model_type'))}, not 'deepseek_v3'")
    exported_by_us = (folder / MOONWHALE_JSON).exists()
    layers = [layer_of(name) for name in read_headers(weight_files(folder))]
    try:
        if exported_by_us:
            path = folder / MOONWHALE_JSON
            values = read_json(path)
        else:
            known = {f.name for f in fields(DeepseekV3Config)} | {"rope_theta", "rope_scaling"}
            deepseek = DeepseekV3Config(**{name: values[name] for name in known & values.keys()}).to_dict()
            values = {f.name: deepseek[f.name] for f in fields(MoonwhaleConfig) if f.name in deepseek}
        modules = max(max(layers, default=-1) + 1 - values["num_hidden_layers"], 0)
        blocks = range(values["num_hidden_layers"] + modules)
        full = [i for i in values.get("moba_full_attention_layers") or [] if i in blocks]
        new = {"num_nextn_predict_layers": modules, "mtp_num_blocks": 1, "moba_full_attention_layers": full}
        config = MoonwhaleConfig.from_dict(values | new)
    except UserError:
        raise
    except Exception as error:  # transformers' own checks of types raise many kinds
        raise UserError(f"{path}: {type(error).__name__}: {one_line(error)}") from error
    model = load_model(folder, config, dtype)
    model.save_pretrained(out)
    load_tokenizer_of(folder, model).save_pretrained(out)
    if exported_by_us:
        return []
    return [f"note: {folder} holds no {MOONWHALE_JSON}: MoBA is off; set moba_topk to use it"]


def layer_of(name: str) -> int:
    """The layer that a weight belongs to; -1 for the embedding, the head and the last norm."""
    layer = re.match(r"model\.layers\.(\d{1,9})\.", name)
    return int(layer[1]) if layer else -1
