"""Each field of a configuration takes a value that works, or names itself and the value in one line."""

import math
import re
import time
import typing

import pytest
import torch

from moonwhale.model import MoonwhaleConfig, MoonwhaleForCausalLM
from moonwhale.model.config_fields import ConfigFields
from moonwhale.options import check

FIELDS = typing.get_type_hints(ConfigFields)
NUMBERS = [-1, 0, 1, 2, 3, 7, 64, 65, 10**9, 2**63, 10**400, 10**5000, -0.1, 0.5, 1.0, 1.5, 1e300]
OTHERS = [None, "x", "", "1e6", "5", "nan", math.nan, math.inf, -math.inf, True, False, b"x", 1j]
NESTED = [[], {}, (), (1,), [1], [0], [-1], [99], [1.5], ["x"], [None], [True], [[1]], {"a": 1}, {1: None}, {1}]
ODD = [*NUMBERS, *OTHERS, *NESTED]
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
LLAMA3 = YARN | {"rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0}


def usable(config) -> bool:
    """Returns whether a model of this configuration computes finite logits. A huge one is only built."""
    if config.vocab_size > 1000:
        with torch.device("meta"):
            return MoonwhaleForCausalLM(config) is not None
    torch.manual_seed(0)
    with torch.no_grad():
        model = MoonwhaleForCausalLM(config).eval()
        return bool(model(torch.arange(9)[None] % config.vocab_size, use_cache=False).logits.isfinite().all())


def refusal(build, **values) -> str | None:
    """Returns the line of the ValueError of `build(**values)`, or None. Any other exception fails the test."""
    try:
        build(**values)
    except ValueError as error:
        line = str(error)
        assert "\n" not in line and len(line) < 400, line
        return line
    return None


@pytest.mark.parametrize("field", FIELDS)
def test_every_field_is_usable_or_refused_at_once(field, tiny_config):
    taken = []
    for value in ODD:
        if (line := refusal(tiny_config, **{field: value})) is None:
            taken.append(tiny_config(**{field: value}))
        else:
            assert f"{field}=" in line and re.search(r"=.+ is impossible: \S", line), line
    for config in taken:
        assert usable(config), getattr(config, field)
        again = MoonwhaleConfig.from_dict(config.to_dict())
        assert again.to_dict() == config.to_dict()


@pytest.mark.parametrize(
    "rope", [{"rope_type": "default", "rope_theta": 1e4}, YARN, LLAMA3], ids=lambda r: r["rope_type"]
)
def test_every_setting_of_rope_is_usable_or_refused_at_once(rope, tiny_config):
    keys = {*YARN, *LLAMA3, "rope_theta", "attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim"}
    for key in sorted(keys | {"type", "truncate", "partial_rotary_factor", "full_attention", "factr"}):
        taken = []
        for value in ODD:
            given = rope | {key: value}
            if (line := refusal(tiny_config, rope_parameters=given)) is None:
                taken.append(tiny_config(rope_parameters=given))
            else:
                assert line.startswith("rope_parameters=") and " is impossible: " in line, line
        for config in taken:
            assert usable(config), config.rope_parameters
            assert MoonwhaleConfig.from_dict(config.to_dict()).rope_parameters == config.rope_parameters


@pytest.mark.parametrize(
    ("rope", "why"),
    [
        ({"rope_type": "yarn"}, "needs factor"),
        ({"rope_type": "yarn", "factor": None}, "needs factor"),
        ({"rope_type": "linear"}, "needs factor"),
        ({"rope_type": "llama3", "factor": 8.0}, "needs low_freq_factor"),
        ({"rope_type": "dynamic", "factor": 2.0}, "choose a rope_type"),
        ({"rope_theta": 0}, "rope_theta is a number; it lies between"),
        ({"rope_theta": -1e4}, "rope_theta is a number; it lies between"),
        ({"rope_theta": "many"}, "rope_theta is a number"),
        ({"factor": 4.0}, "rope_type default has no setting factor"),
        (YARN | {"betafast": 32}, "no setting betafast"),
        (YARN | {"beta_fast": 1, "beta_slow": 2}, "beta_fast (32 unless given) is at least beta_slow"),
        (YARN | {"type": "linear"}, "older name of rope_type"),
        (LLAMA3 | {"low_freq_factor": 4.0}, "low_freq_factor is below high_freq_factor"),
    ],
)
def test_ropes_that_cannot_work(rope, why, tiny_config):
    assert why in refusal(tiny_config, rope_parameters=rope)


def test_numbers_that_yaml_reads_as_text(tiny_config):
    """YAML 1.1 reads `1e6` as text. Fields are converted by the option parser, RoPE's settings by the configuration."""
    rope = {"rope_type": "yarn", "rope_theta": "1e6", "factor": "4e0", "original_max_position_embeddings": "16"}
    settings = tiny_config(rope_parameters=rope).rope_parameters
    assert settings == {**rope, "rope_theta": 1e6, "factor": 4.0, "original_max_position_embeddings": 16}
    assert type(settings["original_max_position_embeddings"]) is int
    assert rope["rope_theta"] == "1e6", "the caller's mapping is as it was"
    assert tiny_config(rope_theta="1e6").rope_parameters["rope_theta"] == 1e6
    assert tiny_config(rope_scaling=rope).rope_parameters == settings, "the older name of rope_parameters"
    assert "rope_scaling=3" in refusal(tiny_config, rope_scaling=3)
    assert check(ConfigFields, {"rms_norm_eps": "1e-5"}, "run.yaml") == {"rms_norm_eps": 1e-5}


@pytest.mark.parametrize("dtype", ["float", "x", "bf16", "", "nn", "float32", "bfloat16"])
def test_dtype_names_a_dtype_of_torch(dtype, tiny_config):
    line = refusal(tiny_config, dtype=dtype)
    assert (line is None) == isinstance(getattr(torch, dtype, None), torch.dtype)
    assert line is None or line.startswith(f"dtype={dtype!r} is impossible: ")


@pytest.mark.parametrize(
    "values",
    [
        {"n_group": 2, "topk_group": 3},
        {"n_group": 4},
        {"n_group": 6, "topk_group": 6},
        {"n_group": 3, "num_experts_per_tok": 3},
        {"num_experts_per_tok": 7},
        {"n_device_groups": 4},
        {"num_nextn_predict_layers": 2, "mtp_num_blocks": [1]},
        {"num_nextn_predict_layers": 2, "mtp_num_blocks": [1, 0]},
        {"num_nextn_predict_layers": 2, "mtp_num_blocks": [1, True]},
        {"moba_full_attention_layers": [2]},
        {"eos_token_id": [5, 61]},
        {"num_key_value_heads": 1},
        {"hidden_size": 36},
        {"num_hidden_layers": 10**9, "num_nextn_predict_layers": 10**9},
    ],
    ids=str,
)
def test_fields_that_do_not_fit_together(values, tiny_config):
    assert re.match(rf"({'|'.join(values)})=.* is impossible: ", refusal(tiny_config, **values))


def test_a_long_list_of_layers_takes_no_longer(tiny_config):
    started = time.process_time()
    config = tiny_config(num_nextn_predict_layers=500, moba_full_attention_layers=[1, 0] * 10**5)
    assert config.moba_full_attention_layers == [0, 1]
    assert time.process_time() - started < 1


def test_configurations_survive_files(tiny_config, tmp_path):
    config = tiny_config(
        rope_parameters=YARN | {"mscale": 1.0, "mscale_all_dim": 1.0},
        num_nextn_predict_layers=2,
        mtp_num_blocks=(1, 2),
        eos_token_id=(3, 4),
        moba_full_attention_layers=(4, 1),
    )
    config.save_pretrained(tmp_path)
    assert MoonwhaleConfig.from_pretrained(tmp_path).to_diff_dict() == config.to_diff_dict()
    config.to_json_file(tmp_path / "all.json", use_diff=False)
    assert MoonwhaleConfig.from_json_file(tmp_path / "all.json").to_diff_dict() == config.to_diff_dict()
