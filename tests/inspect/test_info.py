"""Compares counts made from a configuration alone with models that are built from it."""

import json
from fractions import Fraction

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from moonwhale.costs import flops_per_token, model_size, one_device_training_bytes
from moonwhale.errors import UserError
from moonwhale.inspect.commands import main_info
from moonwhale.inspect.info import gather_figures
from moonwhale.model.configuration_moonwhale import MoonwhaleConfig
from moonwhale.model.modeling_moonwhale import MoonwhaleForCausalLM
from moonwhale.presets import PRESETS
from moonwhale.train.config import TrainConfig, build_model_config

SMALL = {
    "vocab_size": 96,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "q_lora_rank": 24,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4,
    "v_head_dim": 12,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
    "intermediate_size": 40,
    "num_nextn_predict_layers": 2,
}
VARIANTS = {
    "plain": {},
    "dense first block": {"first_k_dense_replace": 1},
    "all main blocks dense": {"first_k_dense_replace": 2},
    "uncompressed queries": {"q_lora_rank": None},
    "biases": {"attention_bias": True},
    "biases, uncompressed queries": {"attention_bias": True, "q_lora_rank": None},
    "key convolution": {"moba_topk": 2, "moba_key_conv": 3},
    "embeddings on latents": {"latent_embedding_every": 1},
    "tied": {"tie_word_embeddings": True},
    "module sizes": {"mtp_num_blocks": [1, 3]},
    "no MTP": {"num_nextn_predict_layers": 0},
    "no shared expert": {"n_shared_experts": 0},
    "two shared experts": {"n_shared_experts": 2},
}


def on_meta(config) -> MoonwhaleForCausalLM:
    with torch.device("meta"):
        return MoonwhaleForCausalLM(config)


def numbers(module, chosen=lambda name, p: True) -> int:
    return sum(p.numel() for name, p in module.named_parameters() if chosen(name, p))


def check(config) -> None:
    model, counts = on_meta(config), model_size(config)
    idle = 1 - Fraction(config.num_experts_per_tok, config.n_routed_experts)
    block = model.model.layers[config.num_hidden_layers - 1]
    assert counts.parameters == numbers(model)
    assert counts.parameters_per_block == numbers(block)
    assert counts.parameters - counts.active_parameters == idle * numbers(model, lambda name, p: ".experts." in name)
    routed = numbers(block, lambda name, p: ".experts." in name)
    assert counts.parameters_per_block - counts.active_parameters_per_block == idle * routed
    assert counts.mtp == numbers(model.model.layers[config.num_hidden_layers :])
    convolution = model.model.embed_conv.weight.numel() if config.embedding_conv else 0
    assert counts.embedding == model.model.embed_tokens.weight.numel() + convolution
    assert counts.head == (0 if config.tie_word_embeddings else model.lm_head.weight.numel())
    ends = ("embed_tokens.weight", "embed_conv.weight", "lm_head.weight", "key_conv", "latent_embedding.weight")
    assert counts.matrices == numbers(model, lambda name, p: p.ndim > 1 and not name.endswith(ends))


@pytest.mark.parametrize("name", PRESETS)
def test_counts_of_presets_equal_the_models(name):
    check(build_model_config(TrainConfig.resolve({"preset": name})))


@pytest.mark.parametrize("variant", VARIANTS)
def test_counts_of_variants_equal_the_models(variant):
    check(MoonwhaleConfig(**SMALL | VARIANTS[variant]))


@pytest.mark.parametrize("variant", ["plain", "dense first block", "uncompressed queries", "module sizes", "no MTP"])
def test_flops_equal_torchs_count(variant):
    """The predicted FLOPs equal torch's count. Both leave out full attention, which torch counts by kernel."""
    config, length = MoonwhaleConfig(**SMALL | VARIANTS[variant]), 8
    model = MoonwhaleForCausalLM(config).eval()
    heads, width = config.num_attention_heads, config.qk_head_dim + config.v_head_dim
    ids = torch.zeros(1, length, dtype=torch.long)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(ids, use_cache=False)
    by_op = counter.get_flop_counts()["Global"]
    ran = sum(flops for op, flops in by_op.items() if "bmm" not in str(op) and "attention" not in str(op))
    attention = config.num_hidden_layers * 2 * heads * width * (length + 1) / 2
    predicted = flops_per_token(config, length, training=False) - attention
    experts = config.num_experts_per_tok * 6 * config.hidden_size * config.moe_intermediate_size
    experts *= config.num_hidden_layers - config.first_k_dense_replace
    if not any("grouped" in str(op) for op in by_op):  # torch does not count grouped matrix products
        predicted -= experts
    assert ran == predicted * length


def attended(context: int, block: int, topk: int) -> tuple[float, float]:
    """Returns the mean number of keys and of block means that a token reads, counted one token at a time."""
    keys = means = 0
    for t in range(context):
        own = t // block
        keys += t % block + 1 + min(own, topk - 1) * block
        means += own
    return keys / context, means / context


@pytest.mark.parametrize(("context", "block", "topk"), [(64, 8, 3), (61, 8, 3), (64, 16, 2), (7, 2, 2)])
def test_moba_saves_what_it_does_not_attend_to(context, block, topk):
    full = MoonwhaleConfig(**SMALL)
    moba = MoonwhaleConfig(**SMALL, moba_block_size=block, moba_topk=topk, moba_full_attention_layers=[1])
    keys, means = attended(context, block, topk)
    saved = (
        2
        * full.num_attention_heads
        * ((full.qk_head_dim + full.v_head_dim) * ((context + 1) / 2 - keys) - full.qk_head_dim * means)
    )
    for training, blocks, passes in ((False, 1, 1), (True, 3, 3)):
        less = flops_per_token(full, context, training) - flops_per_token(moba, context, training)
        assert less == pytest.approx(passes * blocks * saved)


def test_moba_that_covers_everything_costs_full_attention():
    moba = MoonwhaleConfig(**SMALL, moba_block_size=8, moba_topk=8)
    assert flops_per_token(moba, 64) == flops_per_token(MoonwhaleConfig(**SMALL), 64)


def test_cache_is_latent():
    counts = model_size(MoonwhaleConfig(**SMALL))
    assert counts.kv_cache_bytes_per_token == 2 * 2 * (16 + 4)
    assert counts.mha_cache_bytes_per_token == 2 * 2 * 2 * (8 + 4 + 12)


def test_activations_are_close_to_what_autograd_keeps():
    config, kept = build_model_config(TrainConfig.resolve({"preset": "demo"})), {}
    model = MoonwhaleForCausalLM(config).train()
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}

    def keep(x):
        storage = x.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = x, storage.nbytes()
        return x

    ids = torch.arange(256).view(1, 256)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        model(input_ids=ids, labels=ids)
    estimated = one_device_training_bytes(config, 256)["activations"]
    assert estimated == pytest.approx(sum(n for _, n in kept.values()), rel=0.2)


def test_json(capsys):
    main_info(["seed_190m", "--json"])
    figures = json.loads(capsys.readouterr().out)
    assert figures["parameters"] == 193_308_672
    assert figures["active_parameters_per_block"] == 7_113_792
    assert figures["kv_cache_bytes_per_token"] == 8 * (192 + 32) * 2
    assert {"active_parameters", "parameters_per_block", "training_bytes"} <= figures.keys()


@pytest.mark.parametrize("start", [0.0, 0.7, 1.0])
def test_training_counts_the_mtp_modules_only_when_they_are_trained(start):
    run = TrainConfig.resolve({"preset": "demo", "mtp_start": start})
    config = build_model_config(run)
    found = gather_figures(config, 64, 1, run)["training_flops"]
    without, whole = (flops_per_token(config, run.context, training) for training in (False, True))
    assert found == pytest.approx(run.steps * run.tokens_per_step * (start * 3 * without + (1 - start) * whole))


def test_table_and_overrides(capsys):
    main_info(["demo"])
    before = capsys.readouterr().out
    main_info(["demo", "--model.hidden_size", "128", "--context", "512", "--batch", "4"])
    after = capsys.readouterr().out
    assert "5.41 M, 3.20 M active" in before and "5.41 M" not in after
    assert "4 x 512 tokens" in after


@pytest.fixture
def checkpoint(tmp_path):
    MoonwhaleConfig(**SMALL, max_position_embeddings=48).save_pretrained(tmp_path)
    return tmp_path


def test_checkpoint(checkpoint, capsys):
    main_info([str(checkpoint), "--json"])
    figures = json.loads(capsys.readouterr().out)
    assert figures["parameters"] == model_size(MoonwhaleConfig(**SMALL)).parameters
    assert figures["context"] == 48
    assert "steps" not in figures
    with pytest.raises(UserError, match=r"^`model.intermediate_size`: it has no effect with"):
        main_info([str(checkpoint), "--model.intermediate_size", "512"])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "is not a checkpoint: it holds no config.json"),
        ('{"model_type": "moonwh', "cannot read .*config.json"),
        ("[]", "holds no JSON object"),
        ('{"model_type": "llama"}', "of type 'llama', not 'moonwhale'"),
        ('{"model_type": "moonwhale", "hidden_size": "x"}', "config.json: hidden_size: 'x' is not a whole number"),
        ('{"model_type": "moonwhale", "moba_block_size": 0}', "moba_block_size=0 is impossible"),
    ],
)
def test_a_folder_without_a_checkpoint_is_refused(tmp_path, content, message):
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    with pytest.raises(UserError, match=message) as caught:
        main_info([str(tmp_path)])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["sead_190m"], r"neither a preset .* nor a folder \(did you mean seed_190m\?\)"),
        (["demo", "--context", "0"], "`context`: 0 is impossible"),
        (["demo", "--context", "long"], "`context`: 'long' is not a whole number"),
        (["demo", "--model.moba_block_size", "0"], "`model.moba_block_size`=0 is impossible"),
        (["demo", "--model.intermediate_size", "512"], "`model.intermediate_size`: it has no effect with"),
        (["demo", "--contxt", "3"], r"unknown option --contxt \(did you mean --context\?\)"),
        ([], "required: PRESET_OR_FOLDER"),
    ],
)
def test_bad_arguments(argv, message):
    with pytest.raises(UserError, match=message):
        main_info(argv)
