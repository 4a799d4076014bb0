"""A GGUF file of a model, as llama.cpp's `deepseek2` architecture wants it.

The names are those that llama.cpp's own converter gives DeepSeek-V3, so they come from the `gguf` package. llama.cpp
decodes with the latent absorbed, as we do: it reads W_UK and W_UV apart, and a key is the latent and the rotary key.
"""

import json
import math
import re
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from moonwhale.errors import UserError

try:
    import gguf
except ModuleNotFoundError as error:
    raise UserError('`to` gguf needs a package: pip install "moonwhale[gguf]"') from error

ARCH = gguf.MODEL_ARCH.DEEPSEEK2
DIGIT = r"\p{N}"
GPT2_WORDS = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
# llama.cpp's names for the ways of cutting text into words, by the expressions that cut, one after the other.
CUTS = {
    (DIGIT, GPT2_WORDS): "smollm",  # what `train_tokenizer` makes
    (GPT2_WORDS,): "gpt-2",
    (
        r"\p{N}{1,3}",
        "[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+",
        "[!\"#$%&'()*+,\\-./:;<=>?@\\[\\\\\\]^_`{|}~][A-Za-z]+|[^\r\n\\p{L}\\p{P}\\p{S}]?[\\p{L}\\p{M}]+"
        "| ?[\\p{P}\\p{S}]+[\r\n]*|\\s*[\r\n]+|\\s+(?!\\S)|\\s+",
    ): "deepseek-v3",
}


def write_gguf(path: Path, folder: Path, model, tokenizer, dtype: torch.dtype) -> None:
    """Writes the main model of `folder`, in fp32 without MTP and MoBA, as the file `path`; matrices as `dtype`.

    Raises:
        UserError: for a model or a tokenizer that llama.cpp cannot run.
    """
    config = model.config
    _require_runnable(folder, config)
    writer = gguf.GGUFWriter(path, gguf.MODEL_ARCH_NAMES[ARCH])
    writer.add_name(folder.resolve().name)
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_BF16 if dtype == torch.bfloat16 else gguf.LlamaFileType.ALL_F32)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    _add_dimensions(writer, config)
    _add_rope(writer, config)
    _add_vocabulary(writer, folder, tokenizer, config.vocab_size)
    for tensor_name, weight in _tensors(model):
        # As the converter has it: vectors and routers keep their precision, which costs next to nothing.
        if dtype == torch.bfloat16 and weight.ndim > 1 and "ffn_gate_inp" not in tensor_name:
            as_bytes = weight.to(dtype).contiguous().view(torch.uint8).numpy()  # numpy has no bf16
            writer.add_tensor(tensor_name, as_bytes, raw_dtype=gguf.GGMLQuantizationType.BF16)
        else:
            writer.add_tensor(tensor_name, weight.float().contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _require_runnable(folder: Path, config) -> None:
    """Raises UserError for what llama.cpp's `deepseek2` has no place for."""
    rope, blocks = config.rope_parameters, config.num_hidden_layers
    known_ropes = ("default",)
    if (rope.get("beta_fast") or 32, rope.get("beta_slow") or 1, rope.get("truncate", True)) == (32, 1, True):
        known_ropes += ("yarn",)
    # It takes models of these sizes for DeepSeek-V2-Lite and its kin.
    lite = blocks in (26, 27) or (blocks == 48 and config.vocab_size == 128_256)
    for fault, there in {
        "biases in attention (attention_bias)": config.attention_bias,
        "blocks without shared experts (n_shared_experts=0)": not config.n_shared_experts,
        f"compressed queries (q_lora_rank) in {blocks} blocks": config.q_lora_rank is not None and lite,
        f"RoPE like this one of type {rope['rope_type']}": rope["rope_type"] not in known_ropes,
        "YaRN by a factor of 1 or less": rope["rope_type"] == "yarn" and rope["factor"] <= 1,
    }.items():
        if there:
            raise UserError(f"{folder}: llama.cpp's deepseek2 has no {fault}: `to` code")


def _add_dimensions(writer, config) -> None:
    """Widths and counts. The keys are the cached ones: a single head, the latent and the rotary key in it."""
    writer.add_context_length(config.max_position_embeddings)
    writer.add_vocab_size(config.vocab_size)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)

    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(1)
    writer.add_q_lora_rank(config.q_lora_rank or 0)  # 0: one matrix from the hidden state to the queries
    writer.add_kv_lora_rank(config.kv_lora_rank)
    writer.add_key_length(config.kv_lora_rank + config.qk_rope_head_dim)
    writer.add_value_length(config.kv_lora_rank)
    writer.add_key_length_mla(config.qk_head_dim)
    writer.add_value_length_mla(config.v_head_dim)

    writer.add_leading_dense_block_count(min(config.first_k_dense_replace, config.num_hidden_layers))
    writer.add_expert_count(config.n_routed_experts)
    writer.add_expert_used_count(config.num_experts_per_tok)
    writer.add_expert_shared_count(config.n_shared_experts)
    writer.add_expert_feed_forward_length(config.moe_intermediate_size)
    writer.add_expert_weights_norm(config.norm_topk_prob)
    writer.add_expert_weights_scale(config.routed_scaling_factor)
    sigmoid = config.scoring_func == "sigmoid"
    writer.add_expert_gating_func(gguf.ExpertGatingFuncType.SIGMOID if sigmoid else gguf.ExpertGatingFuncType.SOFTMAX)
    if config.topk_group < config.n_group:  # all groups chosen is none left out, and llama.cpp stops at it
        writer.add_expert_group_count(config.n_group)
        writer.add_expert_group_used_count(config.topk_group)


def _add_rope(writer, config) -> None:
    """RoPE. llama.cpp derives YaRN's two factors in its own way, so they are given to come out as ours."""
    rope = config.rope_parameters
    writer.add_rope_dimension_count(config.qk_rope_head_dim)
    writer.add_rope_freq_base(rope["rope_theta"])
    if rope["rope_type"] != "yarn":
        return
    factor = rope["factor"]
    writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
    writer.add_rope_scaling_factor(factor)
    writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])
    # With f = 1 + 0.1 ln factor, llama.cpp multiplies the rotated by t = attn_factor · (1 if log_mul else f) and all
    # logits by (t · (1 + log_mul · ln factor))². Ours: `rotated`, and the square of `scaled`.
    rotated = ROPE_INIT_FUNCTIONS["yarn"](config, "cpu")[1]
    scaled = math.sqrt(config.attention_scale() * config.qk_head_dim**0.5)
    log_mul = (scaled / rotated - 1) / math.log(factor)
    writer.add_rope_scaling_yarn_log_mul(log_mul)
    writer.add_rope_scaling_attn_factors(rotated if log_mul else rotated / (1 + 0.1 * math.log(factor)))


def _add_vocabulary(writer, folder: Path, tokenizer, vocab_size: int) -> None:
    """Tokens, merges, control tokens and chat template. Raises UserError for a tokenizer that llama.cpp lacks."""
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(cut_name(folder, tokenizer))
    tokens = [f"[PAD{i}]" for i in range(vocab_size)]  # what the model knows and the tokenizer does not
    types = [gguf.TokenType.UNUSED] * vocab_size
    for token, id in tokenizer.get_vocab().items():
        tokens[id], types[id] = token, gguf.TokenType.NORMAL
    for id, token in tokenizer.added_tokens_decoder.items():
        types[id] = gguf.TokenType.CONTROL if token.special else gguf.TokenType.USER_DEFINED
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    merges = json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]
    writer.add_token_merges([" ".join(pair) for pair in merges])

    writer.add_bos_token_id(tokenizer.bos_token_id)
    writer.add_eos_token_id(tokenizer.eos_token_id)
    writer.add_pad_token_id(tokenizer.pad_token_id)
    writer.add_add_bos_token(True)  # a prompt starts the way documents start
    writer.add_add_eos_token(False)
    # `generation` marks what fine-tuning learns; the readers of this file do not know it.
    template = re.sub(r"({%-?\s*)generation(\s*-?%})", r"\1if true\2", tokenizer.get_chat_template())
    writer.add_chat_template(re.sub(r"({%-?\s*)endgeneration(\s*-?%})", r"\1endif\2", template))


def cut_name(folder: Path, tokenizer) -> str:
    """llama.cpp's name for how a tokenizer cuts text; a UserError if it has none, or does more than cutting."""
    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    normalizer, cutter = backend["normalizer"], backend["pre_tokenizer"]
    steps = cutter["pretokenizers"] if cutter["type"] == "Sequence" else [cutter]
    found = CUTS.get(tuple(cut for step in steps if (cut := _expression(step))))
    if found is None or (normalizer and normalizer.get("normalizers") != []) or backend["model"].get("ignore_merges"):
        raise UserError(
            f"{folder}: llama.cpp has no name for this tokenizer (it has for those trained here, for deepseek and gpt2)"
        )
    return found


def _expression(step: dict) -> str:
    """The regular expression that a step of the tokenizer cuts with; "" if it does not cut."""
    match step:
        case {"type": "Digits", "individual_digits": True}:
            return DIGIT
        case {"type": "ByteLevel", "add_prefix_space": False, "use_regex": bool(cuts)}:
            return GPT2_WORDS if cuts else ""
        case {"type": "Split", "behavior": "Isolated", "invert": False, "pattern": {"Regex": pattern}}:
            return pattern
    return str(step)


def _tensors(model) -> Iterator[tuple[str, Tensor]]:
    """llama.cpp's name and layout of each weight of the main model."""
    config = model.config
    names = gguf.get_tensor_name_map(ARCH, config.num_hidden_layers)
    for ours, weight in model.state_dict().items():
        if ours.startswith("model.layers.") and int(ours.split(".")[2]) >= config.num_hidden_layers:
            continue  # an MTP module
        if ours == "lm_head.weight" and config.tie_word_embeddings:
            continue  # llama.cpp takes the embedding where there is no head
        for theirs, part in _relaid(ours, weight, config):
            yield names.get_name(theirs, try_suffixes=(".weight", ".bias")), part


def _relaid(name: str, weight: Tensor, config) -> Iterator[tuple[str, Tensor]]:
    """A weight of ours as the converter names and cuts it."""
    heads, nope, rope = config.num_attention_heads, config.qk_nope_head_dim, config.qk_rope_head_dim
    if name.endswith("kv_b_proj.weight"):
        w_k, w_v = weight.unflatten(0, (heads, -1)).split([nope, config.v_head_dim], dim=1)
        yield name.replace("kv_b_proj", "k_b_proj"), w_k.transpose(1, 2)  # (heads, rank, nope)
        yield name.replace("kv_b_proj", "v_b_proj"), w_v  # (heads, v, rank)
    elif name.endswith("experts.gate_up_proj"):
        gate, up = weight.chunk(2, dim=1)
        yield name.replace("gate_up_proj", "gate_proj.weight"), gate
        yield name.replace("gate_up_proj", "up_proj.weight"), up
    elif name.endswith("experts.down_proj"):
        yield f"{name}.weight", weight
    elif name.endswith("e_score_correction_bias"):
        yield name.replace("_bias", ".bias"), weight
    elif name.endswith(("q_b_proj.weight", "q_proj.weight")):
        yield name, _interleaved(weight.unflatten(0, (heads, nope + rope)), rope, config).flatten(0, 1)
    elif name.endswith("kv_a_proj_with_mqa.weight"):
        yield name, _interleaved(weight.unsqueeze(0), rope, config).squeeze(0)
    else:
        yield name, weight


def _interleaved(weight: Tensor, rope: int, config) -> Tensor:
    """(heads, width, in) with the last `rope` rows in the order that llama.cpp rotates: neighbours are pairs."""
    if config.rope_interleave:
        return weight
    rotated = weight[:, -rope:].unflatten(1, (2, -1)).transpose(1, 2).flatten(1, 2)
    return torch.cat([weight[:, :-rope], rotated], dim=1)
