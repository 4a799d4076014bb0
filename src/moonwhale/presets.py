"""Named model sizes. A preset sets model fields and run options; a YAML file and the command line override both."""

import runpy
from dataclasses import dataclass
from pathlib import Path

from moonwhale.errors import UserError, did_you_mean


@dataclass(frozen=True)
class Preset:
    """One named size. A field that it does not set keeps its default."""

    summary: str
    model: dict  # fields of MoonwhaleConfig
    train: dict  # fields of TrainConfig


@dataclass(frozen=True)
class Recipe:
    """Options that presets of several sizes share. Both recipes set the same ones."""

    model: dict
    train: dict


# As in the papers: one learning rate and one initial size for all weights, and MTP from the first step.
PAPER = Recipe(
    model={
        "embedding_initializer_range": None,
        "embedding_conv": 0,
        "latent_embedding_every": 0,
        "mtp_loss_weight": 0.3,
    },
    train={"embedding_lr": 1.0, "mtp_start": 0.0},
)
# The best that short runs found (docs/training_recipe.md): a large embedding with a large learning rate and a
# convolution; another embedding on the latents of every second block; and MTP at the end, since it takes a third of a
# small model's step, with a weight that leaves the main model alone.
FAST = Recipe(
    model={
        "embedding_initializer_range": 0.8,
        "embedding_conv": 3,
        "latent_embedding_every": 2,
        "mtp_loss_weight": 0.1,
    },
    train={"embedding_lr": 10.0, "mtp_start": 0.7},
)
# The shape of the smallest models, on two CPU cores
TINY = {
    "hidden_size": 256,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "q_lora_rank": 128,
    "kv_lora_rank": 64,
    "qk_nope_head_dim": 32,
    "qk_rope_head_dim": 16,
    "v_head_dim": 32,
    "moba_block_size": 64,
    "moba_topk": 2,
    "moba_full_attention_layers": [1, 3],  # every other block; fewer were not tried
    "n_routed_experts": 8,  # 16 are worse after the same time: each expert sees too few tokens
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 96,
    "bias_update_speed": 0.01,  # in so short a run, V3's 0.001 would never balance the experts
    "num_nextn_predict_layers": 1,  # as in V3; a second one takes a quarter of the time and costs 3 %
    "mtp_num_blocks": 1,
}

PRESETS = {
    "demo": Preset(
        summary="a CPU and some minutes, with every mechanism",
        model=FAST.model | TINY | {"vocab_size": 2048},
        train=FAST.train
        | {
            "context": 512,
            "batch_size": 8,
            "tokens_per_step": 4096,
            "steps": 450,
            "lr": 6e-3,  # quality.py found 1.2e-2 better, on speeches with half the context and twice the vocabulary
            "warmup_steps": 10,
            "decay_fraction": 0.7,  # warming the momentum up from 0.85 made no difference
            "log_every": 25,
            "sample_every": 100,
            "eval_every": 75,
            "save_every": 75,
        },
    ),
    "evening": Preset(
        summary="a CPU and an hour: the demo's model on six passes over the built-in text",
        model=FAST.model | TINY | {"vocab_size": 2560},  # in bf16 it has 11.5 MB
        train=FAST.train
        | {
            "context": 512,
            "batch_size": 8,
            "tokens_per_step": 4096,
            "steps": 5_000,
            "lr": 6e-3,
            "warmup_steps": 50,
            "decay_fraction": 0.9,
            "log_every": 50,
            "sample_every": 500,
            "eval_every": 500,
            "save_every": 500,
        },
    ),
    "small": Preset(
        summary="one small GPU",
        model=FAST.model
        | {
            "vocab_size": 16384,
            "hidden_size": 512,
            "num_hidden_layers": 6,
            "num_attention_heads": 8,
            "q_lora_rank": 256,
            "kv_lora_rank": 128,
            "qk_nope_head_dim": 64,
            "qk_rope_head_dim": 32,
            "v_head_dim": 64,
            "moba_block_size": 64,
            "moba_topk": 3,
            "moba_full_attention_layers": [5],
            "n_routed_experts": 12,
            "num_experts_per_tok": 4,
            "moe_intermediate_size": 192,
            "bias_update_speed": 0.001,
            "num_nextn_predict_layers": 2,
            "mtp_num_blocks": 1,
        },
        train=FAST.train
        | {
            "context": 512,
            "batch_size": 16,
            "tokens_per_step": 65_536,
            "steps": 8_000,
            "lr": 2e-3,
            "warmup_steps": 200,
            "decay_fraction": 0.2,
            "log_every": 10,
            "sample_every": 200,
            "eval_every": 100,
            "save_every": 100,
        },
    ),
    "seed_190m": Preset(
        summary="one data-center GPU: 12 MoE blocks, 4 of them in two MTP modules",
        model=PAPER.model
        | {
            "vocab_size": 50_304,
            "hidden_size": 768,
            "num_hidden_layers": 8,
            "num_attention_heads": 12,
            "q_lora_rank": 384,
            "kv_lora_rank": 192,
            "qk_nope_head_dim": 64,
            "qk_rope_head_dim": 32,
            "v_head_dim": 64,
            "moba_block_size": 128,
            "moba_topk": 3,
            "moba_full_attention_layers": [7],
            "n_routed_experts": 12,
            "num_experts_per_tok": 8,
            "moe_intermediate_size": 256,
            "bias_update_speed": 0.001,
            "num_nextn_predict_layers": 2,
            "mtp_num_blocks": 2,
        },
        train=PAPER.train
        | {
            "context": 1024,
            "batch_size": 16,
            "tokens_per_step": 491_520,
            "steps": 10_000,
            "lr": 1.5e-3,
            "warmup_steps": 200,
            "decay_fraction": 0.2,
            "log_every": 10,
            "sample_every": 0,
            "eval_every": 250,
            "save_every": 250,
            "mtp_loss_weight_final": 0.1,
        },
    ),
    "large": Preset(
        summary="the widths of fast MLA decoding kernels: latent 512, rotary 64; 900 M parameters",
        model=PAPER.model
        | {
            "vocab_size": 50_304,
            "hidden_size": 1280,
            "num_hidden_layers": 12,
            "num_attention_heads": 10,
            "q_lora_rank": 768,
            "kv_lora_rank": 512,
            "qk_nope_head_dim": 128,
            "qk_rope_head_dim": 64,
            "v_head_dim": 128,
            "moba_block_size": 128,
            "moba_topk": 8,
            "moba_full_attention_layers": [11],
            "n_routed_experts": 32,
            "num_experts_per_tok": 6,
            "moe_intermediate_size": 384,
            "bias_update_speed": 0.001,
            "num_nextn_predict_layers": 2,
            "mtp_num_blocks": 1,
        },
        train=PAPER.train
        | {
            "context": 4096,
            "batch_size": 4,
            "tokens_per_step": 1_048_576,
            "steps": 20_000,
            "lr": 8e-4,
            "warmup_steps": 500,
            "decay_fraction": 0.2,
            "log_every": 10,
            "sample_every": 0,
            "eval_every": 500,
            "save_every": 500,
            "mtp_loss_weight_final": 0.1,
        },
    ),
}


def get_preset(name: str) -> Preset:
    """Return the preset of that name, or raise a UserError that lists the presets."""
    if name not in PRESETS:
        raise UserError(f"`preset`: {name!r} is none of {', '.join(PRESETS)}{did_you_mean(name, PRESETS)}")
    return PRESETS[name]


def is_record(values: dict, preset: Preset) -> bool:
    """Whether the options of a file leave a preset nothing to decide but its recipe, as a run's run.yaml does.

    If such a file lacks an option of the recipe, or `sample_every`, it is older, and its run had the default.
    """
    options = values.keys() >= preset.train.keys() - PAPER.train.keys() - {"sample_every"}
    return options and values.get("model", {}).keys() >= preset.model.keys() - PAPER.model.keys()


def model_fields() -> type:
    """Return the dataclass of a model's configuration fields, with their types, defaults and help.

    Its file runs on its own: importing `moonwhale.model` registers the model with transformers, which takes seconds.
    """
    return runpy.run_path(str(Path(__file__).with_name("model") / "config_fields.py"))["ConfigFields"]
