"""The fields of a model's configuration: each one's name, type, default and meaning.

`MoonwhaleConfig` inherits them, and the command line makes its `--model.FIELD` options from them. The command line
reads this file alone, so it imports nothing heavy.
"""

from dataclasses import dataclass, field


def described(default, help: str):
    """A dataclass field with a default and one line of help."""
    return field(default=default, metadata={"help": help})


@dataclass(kw_only=True)
class ConfigFields:
    """Every field that moonwhale declares. DeepSeek-V3's names are kept where it has the field."""

    vocab_size: int = described(4096, "size of the vocabulary")
    hidden_size: int = described(256, "width of the residual stream")
    intermediate_size: int = described(704, "width of the dense blocks' networks, if first_k_dense_replace > 0")
    num_hidden_layers: int = described(4, "blocks of the main model")
    max_position_embeddings: int = described(1024, "longest context, in tokens")
    rms_norm_eps: float = described(
        1e-6, "ε of every RMSNorm but those of MLA's latents, which have 1e-6 as in DeepSeek-V3"
    )
    hidden_act: str = described("silu", "activation of the gated networks; silu only")
    initializer_range: float = described(0.02, "standard deviation of the initial weights")
    embedding_initializer_range: float | None = described(None, "that of the embedding; null: initializer_range")
    embedding_conv: int = described(0, "width of the causal convolution on embeddings (arXiv 2512.17351); 0 = off")
    zero_init_residual: bool = described(True, "start at zero the weights that write into the residual stream")
    tie_word_embeddings: bool = described(False, "use the embedding's weight as the output head's")
    use_cache: bool = described(True, "keep a cache in transformers' generate")
    pad_token_id: int | None = described(None, "id of the padding token; in training, the tokenizer's")
    bos_token_id: int | None = described(0, "id of a document's first token; in training, the tokenizer's")
    eos_token_id: int | list[int] | None = described(
        1, "id of a document's last token, or several; in training, the tokenizer's"
    )

    # Multi-head latent attention, or its plain twin
    attention: str = described(
        "mla", "mla, or gqa: Llama's attention with heads of the same widths; multi-head if no two heads share a key"
    )
    num_attention_heads: int = described(4, "attention heads")
    num_key_value_heads: int | None = described(
        None, "key and value heads: num_attention_heads, or in gqa a divisor of it"
    )
    q_lora_rank: int | None = described(128, "width of the queries' latent; null for uncompressed queries")
    kv_lora_rank: int = described(64, "width of the keys' and values' latent, which is cached")
    qk_nope_head_dim: int = described(64, "width of a head's queries and keys without position")
    qk_rope_head_dim: int = described(32, "width of a head's rotary queries and keys")
    v_head_dim: int = described(64, "width of a head's values")
    latent_embedding_every: int = described(
        0, "add an embedding of the token to the latents of every n-th main block (value embeddings); 0 = off"
    )
    attention_bias: bool = described(False, "add biases to the down-projections and the output projection")
    attention_dropout: float = described(0.0, "dropout of attention weights; 0 only")
    rope_interleave: bool = described(True, "rotate neighbouring pairs, as DeepSeek-V3 does, not halves")
    rope_parameters: dict | None = described(None, "rope_type, rope_theta and the like, as transformers has them")

    # Mixture of block attention
    moba_block_size: int = described(128, "keys of a MoBA block")
    moba_topk: int = described(0, "blocks a query attends to, its own included; 0 switches MoBA off")
    moba_full_attention_layers: list[int] | None = described(None, "indices of blocks that keep full attention")
    moba_key_conv: int = described(0, "width of the causal convolution on keys (arXiv 2511.11571); 0 = off")

    # DeepSeekMoE
    n_routed_experts: int = described(8, "routed experts of a block")
    n_shared_experts: int = described(1, "shared experts of a block, which every token uses")
    num_experts_per_tok: int = described(2, "routed experts that a token uses")
    moe_intermediate_size: int = described(128, "width of an expert")
    first_k_dense_replace: int = described(0, "first blocks that are dense instead of MoE")
    n_group: int = described(1, "groups of experts for group-limited routing")
    topk_group: int = described(1, "groups from which a token's experts are chosen")
    norm_topk_prob: bool = described(True, "scale the chosen experts' weights to sum to 1")
    routed_scaling_factor: float = described(1.0, "factor on the routed experts' weights")
    scoring_func: str = described("sigmoid", "the router's scores: sigmoid or softmax")
    bias_update_speed: float = described(0.001, "γ of the auxiliary-loss-free balancing; 0 = off")
    balance_loss: str = described("sequence", "balance loss: sequence, expert, device or none")
    aux_loss_alpha: float = described(1e-4, "α, the weight of the balance loss")
    n_device_groups: int = described(1, "groups of experts that the device-level balance loss compares")

    # Multi-token prediction
    num_nextn_predict_layers: int = described(0, "MTP modules, each predicting one token further")
    mtp_num_blocks: int | list[int] = described(1, "blocks of each MTP module: one number, or one for each module")
    mtp_loss_weight: float = described(0.3, "λ, the weight of the MTP loss")
