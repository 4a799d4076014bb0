"""What a configuration costs, by arithmetic alone: parameters, FLOPs, cache and memory. Nothing is built.

`config` is a MoonwhaleConfig throughout. A number is *active* if a token goes through it: all of them but the routed
experts it does not choose.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Counts:
    """Numbers of parameters, and bytes a token leaves in the cache of the main model's blocks."""

    parameters: int
    active_parameters: int
    parameters_per_block: int  # of the last main block
    active_parameters_per_block: int
    embedding: int
    head: int  # 0 when tied to the embedding
    mtp: int  # the MTP modules, their blocks included
    matrices: int  # what Muon trains: every matrix but embedding and head
    kv_cache_bytes_per_token: int  # bf16
    mha_cache_bytes_per_token: int  # of plain attention with the same heads and head widths, bf16


def count(config) -> Counts:
    """Counts a configuration's parameters and cache."""
    vocabulary = config.vocab_size * config.hidden_size
    head = 0 if config.tie_word_embeddings else vocabulary
    main = range(config.num_hidden_layers)
    blocks = range(config.num_blocks)
    modules = config.num_nextn_predict_layers
    # of a module: eh_proj, enorm, hnorm and the norm before the shared head
    joins = modules * (_join(config) + 3 * config.hidden_size)
    total = vocabulary + head + config.hidden_size + joins + sum(_block(config, i) for i in blocks)
    heads, width = config.num_attention_heads, config.qk_head_dim + config.v_head_dim
    return Counts(
        parameters=total,
        active_parameters=total - sum(_idle(config, i) for i in blocks),
        parameters_per_block=_block(config, main[-1]),
        active_parameters_per_block=_block(config, main[-1]) - _idle(config, main[-1]),
        embedding=vocabulary,
        head=head,
        mtp=joins + sum(_block(config, i) for i in blocks[len(main) :]),
        matrices=modules * _join(config) + sum(_matrices(config, i) for i in blocks),
        kv_cache_bytes_per_token=2 * len(main) * config.kv_cache_numbers_per_token,
        mha_cache_bytes_per_token=2 * len(main) * heads * width,
    )


def flops_per_token(config, context: int, training: bool = True) -> float:
    """Floating-point operations a token costs, the mean over a row of `context` tokens.

    forward = 2 N + Σ_blocks 2 H [(d_nope + d_rope + d_v) keys + (d_nope + d_rope) means]

    N is the matrix parameters it goes through: MLA's projections, the router, shared and chosen experts (or the dense
    feed-forward network) and the head. `keys` is the mean number of keys it attends to: (context + 1) / 2, less in
    MoBA's blocks, where its gate compares the query with `means` earlier block means. Keys and values are expanded, as
    in training and prefill. Norms, softmax and RoPE are left out.

    With `training`, the MTP modules (their projection, blocks, and the head again) count too, and the backward pass
    twice as much as the forward.
    """
    parts = part_flops(config, context)
    modules = config.num_nextn_predict_layers if training else 0
    blocks = parts.blocks if training else parts.blocks[: config.num_hidden_layers]
    flops = (1 + modules) * parts.head + modules * parts.join + sum(blocks)
    return 3 * flops if training else flops


@dataclass(frozen=True)
class PartFlops:
    """Forward operations a token costs in each part of a model (see `flops_per_token`); an embedding costs none."""

    blocks: tuple[float, ...]  # the main model's, then the MTP modules'
    head: float  # once for each depth
    join: float  # an MTP module's projection of two inputs to one


def part_flops(config, context: int) -> PartFlops:
    """Splits `flops_per_token`'s forward pass over the parts of the model."""
    blocks = []
    for i in range(config.num_blocks):
        keys, means = _attended(config, i, context)
        products = config.qk_head_dim * (keys + means) + config.v_head_dim * keys
        blocks.append(2.0 * (_matrices(config, i, active=True) + config.num_attention_heads * products))
    return PartFlops(tuple(blocks), 2.0 * config.vocab_size * config.hidden_size, 2.0 * _join(config))


@dataclass(frozen=True)
class PartSizes:
    """Parameters of each part of a model, and what it leaves for the backward pass."""

    blocks: tuple[int, ...]  # the main model's, then the MTP modules'
    experts: tuple[int, ...]  # of these, the routed experts'
    matrices: tuple[int, ...]  # of these, what Muon trains
    saved: tuple[int, ...]  # numbers that a token leaves, roughly, for each block's backward pass
    embedding: int
    join: int  # an MTP module's projection of two inputs to one, and its norms
    join_matrices: int


def part_sizes(config) -> PartSizes:
    """Splits `count`'s parameters over the parts of the model."""
    blocks = range(config.num_blocks)
    routed = config.n_routed_experts * _expert(config)
    return PartSizes(
        blocks=tuple(_block(config, i) for i in blocks),
        experts=tuple(0 if _is_dense(config, i) else routed for i in blocks),
        matrices=tuple(_matrices(config, i) for i in blocks),
        saved=tuple(_saved(config, i) for i in blocks),
        embedding=config.vocab_size * config.hidden_size,
        join=_join(config) + 3 * config.hidden_size,
        join_matrices=_join(config),
    )


def training_bytes(config, tokens: int, number_bytes: int = 4) -> dict[str, int]:
    """Memory of a training step on one device, roughly: fp32 weights, gradients and optimizer state (momentum for
    Muon's matrices, two moments for AdamW's), and what the backward pass needs of `tokens` tokens in `number_bytes`
    each, without activation checkpointing.
    """
    counts = count(config)
    saved = sum(_saved(config, i) for i in range(config.num_blocks))
    saved += 4 * config.hidden_size * (1 + 4 * config.num_nextn_predict_layers)  # around the blocks
    head_gradient = 4 * counts.embedding  # the chunked loss makes it in the forward pass
    return {
        "weights": 4 * counts.parameters,
        "gradients": 4 * counts.parameters,
        "optimizer": 8 * counts.parameters - 4 * counts.matrices,
        "activations": number_bytes * tokens * saved + head_gradient,
    }


def inference_bytes(config, tokens: int) -> dict[str, int]:
    """Memory of generation with `tokens` tokens in the cache, all in bf16."""
    counts = count(config)
    return {"weights": 2 * counts.parameters, "cache": tokens * counts.kv_cache_bytes_per_token}


def _is_dense(config, layer: int) -> bool:
    return layer < config.first_k_dense_replace


def _attention(config) -> int:
    """Matrix parameters of MLA."""
    heads, hidden, rank = config.num_attention_heads, config.hidden_size, config.kv_lora_rank
    queries, q_rank = heads * config.qk_head_dim, config.q_lora_rank
    q = hidden * queries if q_rank is None else q_rank * (hidden + queries)
    kv = hidden * config.kv_cache_numbers_per_token + rank * heads * (config.qk_nope_head_dim + config.v_head_dim)
    return q + kv + heads * config.v_head_dim * hidden


def _expert(config) -> int:
    return 3 * config.hidden_size * config.moe_intermediate_size


def _matrices(config, layer: int, active: bool = False) -> int:
    """Matrix parameters of a block, all or those that a token goes through."""
    if _is_dense(config, layer):
        return _attention(config) + 3 * config.hidden_size * config.intermediate_size
    experts = config.n_shared_experts + (config.num_experts_per_tok if active else config.n_routed_experts)
    return _attention(config) + config.hidden_size * config.n_routed_experts + experts * _expert(config)


def _block(config, layer: int) -> int:
    """Parameters of a block: its matrices, norms, biases and key convolution."""
    hidden, rank, q_rank = config.hidden_size, config.kv_lora_rank, config.q_lora_rank or 0
    norms = 2 * hidden + rank + q_rank
    biases = q_rank + config.kv_cache_numbers_per_token + hidden if config.attention_bias else 0
    return _matrices(config, layer) + norms + biases + rank * config.moba_key_conv


def _idle(config, layer: int) -> int:
    """Parameters of the experts that a token does not choose."""
    return _matrices(config, layer) - _matrices(config, layer, active=True)


def _join(config) -> int:
    """An MTP module's eh_proj."""
    return 2 * config.hidden_size**2


def _attended(config, layer: int, context: int) -> tuple[float, float]:
    """Keys that a token attends to and block means that it is compared with, the mean over a row."""
    size, topk, keys, means = config.moba_block_size, config.moba_topk, 0, 0
    if not config.is_moba_layer(layer) or topk * size >= context:
        return (context + 1) / 2, 0.0
    for block, start in enumerate(range(0, context, size)):
        queries = min(size, context - start)
        keys += queries * size * min(block, topk - 1) + queries * (queries + 1) // 2
        means += queries * block if topk > 1 else 0
    return keys / context, means / context


def _saved(config, layer: int) -> int:
    """Numbers a token leaves for a block's backward pass, roughly: each norm's input and output, the queries, keys and
    values of attention and its output twice, what enters and leaves the feed-forward networks, and each chosen expert's
    own copy of what it reads. MoBA's second look at chosen blocks, `kept_probabilities` and rows that only pad are left
    out.
    """
    hidden, heads = config.hidden_size, config.num_attention_heads
    norms = 2 * (2 * hidden + config.kv_lora_rank + (config.q_lora_rank or 0))
    attention = heads * (2 * config.qk_head_dim + 3 * config.v_head_dim)
    if _is_dense(config, layer):
        return norms + attention + 5 * config.intermediate_size
    inner, chosen = config.moe_intermediate_size, config.num_experts_per_tok
    return norms + attention + chosen * (hidden + 3 * inner) + 5 * config.n_shared_experts * inner


def kept_probabilities(config, layer: int, context: int) -> int:
    """Numbers a token leaves besides in a block that chooses (MoBA), where it is no GPU's kernel that does."""
    if not config.is_moba_layer(layer) or config.moba_topk * config.moba_block_size >= context:
        return 0
    return config.num_attention_heads * config.moba_topk * config.moba_block_size
