"""The costs of a configuration by arithmetic: parameters, FLOPs, cache and memory. No model is built.

`config` is a MoonwhaleConfig throughout. A token's *active* parameters are all but those of the routed experts that the
router did not choose for it.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class ModelSize:
    """Parameter counts of a model, and the bytes that a token adds to the cache of the main model's blocks."""

    parameters: int
    active_parameters: int
    parameters_per_block: int  # of the last main block
    active_parameters_per_block: int
    embedding: int
    head: int  # 0 if tied to the embedding
    mtp: int  # the MTP modules, their blocks included
    matrices: int  # trained by Muon: every matrix except embedding and head
    kv_cache_bytes_per_token: int  # bf16
    mha_cache_bytes_per_token: int  # multi-head attention with the same heads and head widths, bf16


def model_size(config) -> ModelSize:
    """Counts the parameters and the cache bytes of a configuration."""
    vocabulary, embedding = config.vocab_size * config.hidden_size, _embedding(config)
    head = 0 if config.tie_word_embeddings else vocabulary
    main_blocks = range(config.num_hidden_layers)
    blocks = range(config.num_blocks)
    last = main_blocks[-1]
    modules = config.num_nextn_predict_layers
    mtp_inputs = modules * (_eh_proj(config) + _mtp_norms(config))
    parameters = embedding + head + config.hidden_size + mtp_inputs + sum(_block(config, i) for i in blocks)
    heads, width = config.num_attention_heads, config.qk_head_dim + config.v_head_dim
    return ModelSize(
        parameters=parameters,
        active_parameters=parameters - sum(_inactive_experts(config, i) for i in blocks),
        parameters_per_block=_block(config, last),
        active_parameters_per_block=_block(config, last) - _inactive_experts(config, last),
        embedding=embedding,
        head=head,
        mtp=mtp_inputs + sum(_block(config, i) for i in blocks[len(main_blocks) :]),
        matrices=modules * _eh_proj(config) + sum(_matrices(config, i) for i in blocks),
        kv_cache_bytes_per_token=2 * len(main_blocks) * config.kv_cache_numbers_per_token,
        mha_cache_bytes_per_token=2 * len(main_blocks) * heads * width,
    )


def flops_per_token(config, context: int, training: bool = True, mtp: bool = True) -> float:
    """Returns the floating-point operations per token, averaged over a row of `context` tokens.

    forward = 2 N + Σ_blocks 2 H [(d_nope + d_rope + d_v) keys + (d_nope + d_rope) means]

    N counts the active matrix parameters: attention's projections, the router, shared and chosen experts (or the dense
    feed-forward network) and the head. `keys` is the mean number of keys a token attends to: (context + 1) / 2 in full
    attention, fewer with MoBA. MoBA's gate also compares each query with `means` earlier block means. Keys and values
    are expanded, as in training and prefill. Norms, softmax, RoPE and convolutions are not counted.

    With `training`, the MTP modules are counted as well (eh_proj, blocks, and the head once more for each), and the
    backward pass adds twice the forward FLOPs. `mtp` is False in steps in which the modules rest.
    """
    parts = forward_flops(config, context)
    modules = config.num_nextn_predict_layers if training and mtp else 0
    blocks = parts.blocks if modules else parts.blocks[: config.num_hidden_layers]
    flops = parts.outside_blocks(modules) + sum(blocks)
    return 3 * flops if training else flops


@dataclass(frozen=True)
class ForwardFlops:
    """Forward FLOPs per token of each part of a model (see `flops_per_token`). The embedding lookup costs none."""

    blocks: tuple[float, ...]  # the main model's, then the MTP modules'
    head: float  # for one prediction depth
    eh_proj: float  # of one MTP module

    def outside_blocks(self, modules: int) -> float:
        """Returns the FLOPs of the head for each prediction depth and of eh_proj, with this number of MTP modules."""
        return (1 + modules) * self.head + modules * self.eh_proj


def forward_flops(config, context: int) -> ForwardFlops:
    """Splits the forward pass of `flops_per_token` into the parts of the model."""
    blocks = []
    for layer in range(config.num_blocks):
        keys, means = _attended(config, layer, context)
        attention = config.num_attention_heads * (config.qk_head_dim * (keys + means) + config.v_head_dim * keys)
        blocks.append(2.0 * (_matrices(config, layer, active=True) + attention))
    head = 2.0 * config.vocab_size * config.hidden_size
    return ForwardFlops(tuple(blocks), head, 2.0 * _eh_proj(config))


@dataclass(frozen=True)
class PartSizes:
    """Parameter counts of each part of a model, and the activations that are saved for backward."""

    blocks: tuple[int, ...]  # the main model's, then the MTP modules'
    routed_experts: tuple[int, ...]  # included in `blocks`; 0 for a dense block
    matrices: tuple[int, ...]  # included in `blocks`; trained by Muon
    saved_activations: tuple[int, ...]  # values per token that each block saves for backward, roughly
    saved_outside_blocks: int  # values per token that are saved for backward elsewhere, roughly
    embedding: int
    eh_proj: int  # of one MTP module
    mtp_norms: int  # of one MTP module, outside its blocks


def part_sizes(config) -> PartSizes:
    """Splits the parameters of `model_size` into the parts of the model."""
    blocks = range(config.num_blocks)
    routed = config.n_routed_experts * _expert(config)
    return PartSizes(
        blocks=tuple(_block(config, i) for i in blocks),
        routed_experts=tuple(0 if _is_dense(config, i) else routed for i in blocks),
        matrices=tuple(_matrices(config, i) for i in blocks),
        saved_activations=tuple(_saved_activations(config, i) for i in blocks),
        saved_outside_blocks=_saved_outside_blocks(config),
        embedding=_embedding(config),
        eh_proj=_eh_proj(config),
        mtp_norms=_mtp_norms(config),
    )


def one_device_training_bytes(
    config, tokens: int, bytes_per_activation: int = 4, recompute: bool = False
) -> dict[str, int]:
    """Returns the approximate memory of a training step of `tokens` tokens on one device.

    Weights, gradients and optimizer state are fp32. The optimizer keeps the momentum of Muon's matrices and two moments
    of AdamW's parameters. With `recompute` (gradient checkpointing), the blocks save their inputs, and one block at a
    time everything else.

    `train/memory.py` compares these bytes with a device's free memory, and `planning/cost_model.py` has the memory of
    each rank of a parallel layout.
    """
    size = model_size(config)
    blocks = [_saved_activations(config, i) for i in range(config.num_blocks)]
    saved = sum(blocks)
    if recompute:
        saved = min(saved, config.num_blocks * config.hidden_size + max(blocks))
    saved += _saved_outside_blocks(config)
    head_gradient = 4 * size.embedding  # the chunked loss computes it in the forward pass
    return {
        "weights": 4 * size.parameters,
        "gradients": 4 * size.parameters,
        "optimizer": 8 * size.parameters - 4 * size.matrices,
        "activations": bytes_per_activation * tokens * saved + head_gradient,
    }


def dense_twin(config) -> dict[str, int]:
    """Returns the fields that replace every MoE by a dense network of the same active FLOPs, MTP's blocks included.

    The router's FLOPs count too. The width is a multiple of 8, which is as near as 4 columns.
    """
    networks = (config.n_shared_experts + config.num_experts_per_tok) * _expert(config)
    router = config.hidden_size * config.n_routed_experts
    width = (networks + router) / (3 * config.hidden_size)
    return {"first_k_dense_replace": config.num_blocks, "intermediate_size": max(8, 8 * round(width / 8))}


def inference_bytes(config, tokens: int) -> dict[str, int]:
    """Returns the memory of generation in bf16 with `tokens` tokens in the cache."""
    size = model_size(config)
    return {"weights": 2 * size.parameters, "cache": tokens * size.kv_cache_bytes_per_token}


def _embedding(config) -> int:
    """Parameters of the embedding and its convolution."""
    return (config.vocab_size + config.embedding_conv) * config.hidden_size


def _is_dense(config, layer: int) -> bool:
    return layer < config.first_k_dense_replace


def _attention(config) -> int:
    """Matrix parameters of MLA or GQA."""
    heads, hidden, rank = config.num_attention_heads, config.hidden_size, config.kv_lora_rank
    queries, q_rank = heads * config.qk_head_dim, config.q_lora_rank
    kv = hidden * config.kv_cache_numbers_per_token  # MLA's down-projection, or GQA's keys and values
    out = heads * config.v_head_dim * hidden
    if config.attention == "gqa":
        return hidden * queries + kv + out
    q = hidden * queries if q_rank is None else q_rank * (hidden + queries)
    kv_up = rank * heads * (config.qk_nope_head_dim + config.v_head_dim)
    return q + kv + kv_up + out


def _latents(config) -> tuple[int, int]:
    """Widths of MLA's latents of queries and of keys and values; 0 for one that does not exist."""
    return (config.q_lora_rank or 0, config.kv_lora_rank) if config.attention == "mla" else (0, 0)


def _expert(config) -> int:
    """Parameters of one expert."""
    return 3 * config.hidden_size * config.moe_intermediate_size


def _matrices(config, layer: int, active: bool = False) -> int:
    """Matrix parameters of a block: all of them, or only the active ones."""
    if _is_dense(config, layer):
        return _attention(config) + 3 * config.hidden_size * config.intermediate_size
    router = config.hidden_size * config.n_routed_experts
    routed = config.num_experts_per_tok if active else config.n_routed_experts
    return _attention(config) + router + (config.n_shared_experts + routed) * _expert(config)


def _block(config, layer: int) -> int:
    """Parameters of a block: its matrices, norms, biases, key convolution and latent embedding."""
    hidden, (q_rank, rank) = config.hidden_size, _latents(config)
    norms = 2 * hidden + rank + q_rank
    queries = q_rank if config.attention == "mla" else config.num_attention_heads * config.qk_head_dim
    biases = queries + config.kv_cache_numbers_per_token + hidden if config.attention_bias else 0
    table = config.vocab_size if config.has_latent_embedding(layer) else 0
    return _matrices(config, layer) + norms + biases + rank * (config.moba_key_conv + table)


def _inactive_experts(config, layer: int) -> int:
    """Parameters of the routed experts that a token does not use."""
    return _matrices(config, layer) - _matrices(config, layer, active=True)


def _eh_proj(config) -> int:
    """Parameters of the projection from an MTP module's two inputs to one."""
    return 2 * config.hidden_size**2


def _mtp_norms(config) -> int:
    """Parameters of an MTP module's enorm, hnorm and the norm before the shared head."""
    return 3 * config.hidden_size


def _attended(config, layer: int, context: int) -> tuple[float, float]:
    """Mean number of keys that a token attends to, and of block means that its query is compared with."""
    size, topk = config.moba_block_size, config.moba_topk
    if not config.is_moba_layer(layer) or topk * size >= context:
        return (context + 1) / 2, 0.0
    blocks, rest = divmod(context, size)  # full blocks, and the tokens of one more
    chosen = min(blocks, topk - 1)  # at most; the first blocks have fewer before them
    before = chosen * (chosen - 1) // 2 + (blocks - chosen) * chosen  # Σ min(block, topk - 1) over the full blocks
    earlier_keys = size * size * before + rest * size * chosen
    own_keys = blocks * (size * (size + 1) // 2) + rest * (rest + 1) // 2
    means = size * (blocks * (blocks - 1) // 2) + rest * blocks if topk > 1 else 0
    return (earlier_keys + own_keys) / context, means / context


def _saved_activations(config, layer: int) -> int:
    """Values per token that a block saves for backward, roughly.

    They are the input and output of each norm, attention's queries, keys and values and twice its output, and what the
    feed-forward networks save of their activations. MoBA's second pass over the chosen blocks, the probabilities that
    it saves on a CPU, and padding rows are not counted.
    """
    hidden, heads = config.hidden_size, config.num_attention_heads
    norms = 2 * (2 * hidden + sum(_latents(config)))
    attention = heads * (2 * config.qk_head_dim + 3 * config.v_head_dim)
    if _is_dense(config, layer):
        return norms + attention + 5 * config.intermediate_size
    inner, chosen = config.moe_intermediate_size, config.num_experts_per_tok
    return norms + attention + 3 * chosen * inner + 5 * config.n_shared_experts * inner


def _saved_outside_blocks(config) -> int:
    """Values per token that a model saves for backward outside its blocks, roughly."""
    return 4 * config.hidden_size * (1 + 4 * config.num_nextn_predict_layers)
