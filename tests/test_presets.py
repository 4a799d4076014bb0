"""Every preset has its documented size, and each of its keys is a field of the configuration."""

import dataclasses
from typing import get_type_hints

import pytest
from transformers import PreTrainedConfig

from moonwhale.costs import model_size
from moonwhale.errors import UserError
from moonwhale.model.configuration_moonwhale import MoonwhaleConfig
from moonwhale.presets import FAST, PAPER, PRESETS, get_preset, model_fields
from moonwhale.train.config import TrainConfig, build_model_config


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_is_a_valid_run(name):
    config = TrainConfig.resolve({"preset": name})
    assert config.gradient_accumulation_steps() * config.batch_size * config.context == config.tokens_per_step
    model = build_model_config(config)
    assert model.max_position_embeddings == config.context
    assert any(model.is_moba_layer(i) for i in range(model.num_hidden_layers))
    assert model.moba_topk * model.moba_block_size < config.context, "MoBA would be full attention"


@pytest.mark.parametrize("name", PRESETS)
def test_presets_set_the_same_options(name):
    assert PRESETS[name].model.keys() == PRESETS["demo"].model.keys() <= get_type_hints(model_fields()).keys()
    # `moonwhale train --help` gives "the preset's" as the default of these options.
    assert PRESETS["demo"].train.keys() <= PRESETS[name].train.keys()
    assert PRESETS[name].train.keys() <= {field.name for field in dataclasses.fields(TrainConfig)}


def test_large_presets_follow_the_papers_and_small_ones_the_fast_recipe():
    for names, recipe in ((("seed_190m", "large"), PAPER), (("demo", "evening", "small"), FAST)):
        for preset in (PRESETS[name] for name in names):
            assert recipe.model.items() <= preset.model.items() and recipe.train.items() <= preset.train.items()
    defaults = {field.name: field.default for field in dataclasses.fields(TrainConfig)}
    assert PAPER.train.items() <= defaults.items()
    assert all(getattr(MoonwhaleConfig(), name) == value for name, value in PAPER.model.items())
    assert PAPER.train.keys() == FAST.train.keys() and PAPER.model.keys() == FAST.model.keys()


def test_seed_has_the_documented_figures():
    model = build_model_config(TrainConfig.resolve({"preset": "seed_190m"}))
    counts = model_size(model)
    assert counts.parameters_per_block == pytest.approx(9.45e6, rel=0.005)
    assert counts.active_parameters_per_block == pytest.approx(7.08e6, rel=0.005)
    assert counts.parameters == pytest.approx(190e6, rel=0.02)
    assert (model.num_hidden_layers, model.mtp_blocks, model.num_blocks) == (8, [2, 2], 12)
    assert model.first_k_dense_replace == 0
    assert (model.vocab_size, model.hidden_size, model.num_attention_heads) == (50_304, 768, 12)
    assert not model.tie_word_embeddings
    run = TrainConfig.resolve({"preset": "seed_190m"})
    assert (run.context, run.tokens_per_step) == (1024, 491_520)


@pytest.mark.parametrize(
    ("name", "low", "high"), [("demo", 5e6, 6e6), ("evening", 5e6, 6e6), ("small", 50e6, 65e6), ("large", 0.7e9, 1e9)]
)
def test_presets_have_the_documented_sizes(name, low, high):
    assert low <= model_size(build_model_config(TrainConfig.resolve({"preset": name}))).parameters <= high


def test_large_has_the_widths_that_mla_kernels_need():
    model = PRESETS["large"].model
    assert (model["kv_lora_rank"], model["qk_rope_head_dim"]) == (512, 64)


def test_the_error_for_an_unknown_preset_suggests_the_nearest():
    with pytest.raises(UserError, match=r"'seed_190' is none of demo, .*did you mean seed_190m\?"):
        get_preset("seed_190")


def test_model_fields_match_the_configuration():
    kinds = get_type_hints(model_fields())
    assert kinds["hidden_size"] is int
    assert kinds["q_lora_rank"] == int | None
    assert kinds["mtp_num_blocks"] == int | list[int]
    declared = {field.name: field.default for field in dataclasses.fields(model_fields())}
    configuration = {field.name: field.default for field in dataclasses.fields(MoonwhaleConfig)}
    inherited = {field.name for field in dataclasses.fields(PreTrainedConfig)}
    assert configuration.keys() - inherited == declared.keys() - inherited
    assert declared.items() <= configuration.items()
