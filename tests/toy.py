"""The dimensions of a model that has every mechanism and trains in seconds."""

TOY = {
    "vocab_size": 300,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 8,
    "moba_block_size": 8,
    "moba_topk": 2,
    "moba_full_attention_layers": [1],
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "num_nextn_predict_layers": 1,
    "mtp_num_blocks": 1,
}
