"""Exports a checkpoint as one GGUF file, for llama.cpp's `deepseek2` architecture.

The names of metadata and tensors are those that llama.cpp's converter gives DeepSeek-V3; they come from the `gguf`
package. llama.cpp decodes with absorbed projections, as we do: it stores W_UK and W_UV as separate tensors, and a
cached key is the latent followed by the rotary key.
"""

import json
import math
import re
from collections.abc import Iterator
from pathlib import Path

import gguf
import torch
from torch import Tensor
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from moonwhale.checkpoint import open_checkpoint
from moonwhale.errors import UserError
from moonwhale.export.deepseek import (
    interleaved,
    layer_of,
    require_latent_attention,
    require_no_extension,
    without_moba,
)

ARCH = gguf.MODEL_ARCH.DEEPSEEK2
DIGIT = r"\p{N}"
GPT2_WORDS = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
# llama.cpp's name for each way of splitting text into words, by the regular expressions that are applied in order.
PRE_TOKENIZERS = {
    (DIGIT, GPT2_WORDS): "smollm",  # what `train_tokenizer` writes
    (GPT2_WORDS,): "gpt-2",
    (
        r"\p{N}{1,3}",
        "[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+",
        "[!\"#$%&'()*+,\\-./:;<=>?@\\[\\\\\\]^_`{|}~][A-Za-z]+|[^\r\n\\p{L}\\p{P}\\p{S}]?[\\p{L}\\p{M}]+"
        "| ?[\\p{P}\\p{S}]+[\r\n]*|\\s*[\r\n]+|\\s+(?!\\S)|\\s+",
    ): "deepseek-v3",
}


def to_gguf(folder: Path, out: Path, dtype: torch.dtype) -> list[str]:
    """Writes `out/model.gguf` and returns one line for each difference from our model.

    Raises:
        UserError: llama.cpp cannot run the model or its tokenizer.
    """
    model, tokenizer = open_checkpoint(folder)  # in fp32, since vectors and routers stay fp32 in the file
    config = model.config
    require_latent_attention(folder, config)
    require_no_extension(folder, config)
    notes = without_moba(config, config.num_hidden_layers)
    if config.num_nextn_predict_layers:
        notes.append("warning: MTP is left out: the file holds the main model only")
    if config.rms_norm_eps != 1e-6:
        notes.append(
            f"warning: llama.cpp normalizes latents with rms_norm_eps={config.rms_norm_eps}, this model with 1e-06"
        )
    known = model.generation_config.eos_token_id
    others = set(known if isinstance(known, list) else [known]) - {None, tokenizer.eos_token_id}
    if others:
        ids = ", ".join(map(str, sorted(others)))
        notes.append(f"warning: end tokens {ids} are left out: the file has one, {tokenizer.eos_token_id}")

    _require_runnable(folder, config)
    writer = gguf.GGUFWriter(out / "model.gguf", gguf.MODEL_ARCH_NAMES[ARCH])
    writer.add_name(folder.resolve().name)
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_BF16 if dtype == torch.bfloat16 else gguf.LlamaFileType.ALL_F32)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    _add_dimensions(writer, config)
    _add_rope(writer, config)
    _add_vocabulary(writer, folder, tokenizer, config.vocab_size)
    for tensor_name, weight in _tensors(model):
        # As in llama.cpp's converter, vectors and routers stay fp32, at almost no cost.
        if dtype == torch.bfloat16 and weight.ndim > 1 and "ffn_gate_inp" not in tensor_name:
            as_bytes = weight.to(dtype).contiguous().view(torch.uint8).numpy()  # numpy has no bf16
            writer.add_tensor(tensor_name, as_bytes, raw_dtype=gguf.GGMLQuantizationType.BF16)
        else:
            writer.add_tensor(tensor_name, weight.float().contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return notes


def _require_runnable(folder: Path, config) -> None:
    """Raises UserError if the model has something that llama.cpp's `deepseek2` cannot represent."""
    rope, blocks = config.rope_parameters, config.num_hidden_layers
    known_ropes = ("default",)
    if (rope.get("beta_fast") or 32, rope.get("beta_slow") or 1, rope.get("truncate", True)) == (32, 1, True):
        known_ropes += ("yarn",)
    # llama.cpp assumes that models of these sizes are DeepSeek-V2-Lite or derived from it.
    lite = blocks in (26, 27) or (blocks == 48 and config.vocab_size == 128_256)
    for feature, present in {
        "biases in attention (attention_bias)": config.attention_bias,
        "blocks without shared experts (n_shared_experts=0)": not config.n_shared_experts,
        f"compressed queries (q_lora_rank) in {blocks} blocks": config.q_lora_rank is not None and lite,
        f"RoPE of type {rope['rope_type']} with these settings": rope["rope_type"] not in known_ropes,
        "YaRN by a factor of 1 or less": rope["rope_type"] == "yarn" and rope["factor"] <= 1,
    }.items():
        if present:
            raise UserError(f"{folder}: llama.cpp's deepseek2 has no {feature}: export it with `to` code")


def _add_dimensions(writer, config) -> None:
    """Writes the model's sizes. Keys are the cached ones: one head, which holds the latent and the rotary key."""
    writer.add_context_length(config.max_position_embeddings)
    writer.add_vocab_size(config.vocab_size)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)

    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(1)
    writer.add_q_lora_rank(config.q_lora_rank or 0)  # 0: queries are not compressed
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
    if config.topk_group < config.n_group:  # llama.cpp rejects a choice of all groups, which drops none
        writer.add_expert_group_count(config.n_group)
        writer.add_expert_group_used_count(config.topk_group)


def _add_rope(writer, config) -> None:
    """Writes RoPE's settings. llama.cpp derives YaRN's two factors differently; these values make them equal ours."""
    rope = config.rope_parameters
    writer.add_rope_dimension_count(config.qk_rope_head_dim)
    writer.add_rope_freq_base(rope["rope_theta"])
    if rope["rope_type"] != "yarn":
        return
    factor = rope["factor"]
    writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
    writer.add_rope_scaling_factor(factor)
    writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])
    # With f = 1 + 0.1 ln factor, llama.cpp multiplies the rotated parts by t = attn_factor · (1 if log_mul else f), and
    # all logits by (t · (1 + log_mul · ln factor))². In our model these factors are `rotated` and `scaled`².
    rotated = ROPE_INIT_FUNCTIONS["yarn"](config, "cpu")[1]
    scaled = math.sqrt(config.attention_scale() * config.qk_head_dim**0.5)
    log_mul = (scaled / rotated - 1) / math.log(factor)
    writer.add_rope_scaling_yarn_log_mul(log_mul)
    writer.add_rope_scaling_attn_factors(rotated if log_mul else rotated / (1 + 0.1 * math.log(factor)))


def _add_vocabulary(writer, folder: Path, tokenizer, vocab_size: int) -> None:
    """Writes tokens, merges, control tokens and the chat template.

    Raises:
        UserError: llama.cpp does not know the tokenizer.
    """
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre_tokenizer_name(folder, tokenizer))
    tokens = [f"[PAD{i}]" for i in range(vocab_size)]  # the model's vocabulary may be larger than the tokenizer's
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
    writer.add_add_bos_token(True)  # in training, documents start with it too
    writer.add_add_eos_token(False)
    # The `generation` blocks mark what fine-tuning trains on; llama.cpp's template engine does not know them.
    template = re.sub(r"({%-?\s*)generation(\s*-?%})", r"\1if true\2", tokenizer.get_chat_template())
    writer.add_chat_template(re.sub(r"({%-?\s*)endgeneration(\s*-?%})", r"\1endif\2", template))


def pre_tokenizer_name(folder: Path, tokenizer) -> str:
    """Returns llama.cpp's name for the way a tokenizer splits text into words.

    Raises:
        UserError: llama.cpp has no name for it, or the tokenizer also normalizes text or ignores merges.
    """
    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    normalizer, pre_tokenizer = backend["normalizer"], backend["pre_tokenizer"]
    steps = pre_tokenizer["pretokenizers"] if pre_tokenizer["type"] == "Sequence" else [pre_tokenizer]
    expressions = tuple(expression for step in steps if (expression := _expression(step)))
    name = PRE_TOKENIZERS.get(expressions)
    normalizes = normalizer and normalizer.get("normalizers") != []
    if name is None or normalizes or backend["model"].get("ignore_merges"):
        raise UserError(
            f"{folder}: llama.cpp has no name for this tokenizer (it has one for tokenizers trained by moonwhale, "
            "for deepseek and for gpt2)"
        )
    return name


def _expression(step: dict) -> str:
    """Returns the regular expression by which a pre-tokenizer step splits text, or "" if it does not split."""
    match step:
        case {"type": "Digits", "individual_digits": True}:
            return DIGIT
        case {"type": "ByteLevel", "add_prefix_space": False, "use_regex": bool(splits)}:
            return GPT2_WORDS if splits else ""
        case {"type": "Split", "behavior": "Isolated", "invert": False, "pattern": {"Regex": pattern}}:
            return pattern
    return str(step)


def _tensors(model) -> Iterator[tuple[str, Tensor]]:
    """Yields each weight of the main model with llama.cpp's name and layout."""
    config = model.config
    names = gguf.get_tensor_name_map(ARCH, config.num_hidden_layers)
    for ours, weight in model.state_dict().items():
        if layer_of(ours) >= config.num_hidden_layers:
            continue  # an MTP module
        if ours == "lm_head.weight" and config.tie_word_embeddings:
            continue  # llama.cpp uses the embedding if the file has no head
        for converter_name, tensor in _converted(ours, weight, config):
            yield names.get_name(converter_name, try_suffixes=(".weight", ".bias")), tensor


def _converted(name: str, weight: Tensor, config) -> Iterator[tuple[str, Tensor]]:
    """Yields one of our weights with the names and shapes that llama.cpp's converter expects."""
    heads, nope = config.num_attention_heads, config.qk_nope_head_dim
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
    else:
        yield name, interleaved(name, weight, config)
