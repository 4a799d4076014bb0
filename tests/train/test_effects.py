"""An option that the user gives has an effect, or is refused in one line. A default or a preset's value never is."""

import shlex

import pytest

from moonwhale.errors import UserError
from moonwhale.presets import PRESETS
from moonwhale.train.config import parse
from moonwhale.train.run_folder import write_run_file
from moonwhale.yaml_files import write_yaml


@pytest.mark.parametrize(
    ("given", "option", "because"),
    [
        ("--optimizer adamw --momentum 0.9", "momentum", "`optimizer` adamw"),
        ("--schedule cosine --decay-fraction 0.5", "decay_fraction", "`schedule` cosine"),
        ("--decay-fraction 0 --min-lr-ratio 0.1", "min_lr_ratio", "`decay_fraction` 0"),
        ("--decay-fraction 0 --mtp-loss-weight-final 0.1", "mtp_loss_weight_final", "`decay_fraction` 0"),
        ("--sample-every 0 --sample-prompt moon", "sample_prompt", "`sample_every` 0"),
        ("--preset seed_190m --sample-prompt moon", "sample_prompt", "`sample_every` 0"),
        ("--parallel.fsdp true --sample-prompt moon", "sample_prompt", "a model that is split"),
        ("--parallel.schedule 1f1b", "parallel.schedule", "`parallel.pp` 1"),
        ("--model.num_nextn_predict_layers 0 --mtp-start 0.5", "mtp_start", "`model.num_nextn_predict_layers` 0"),
        ("--model.num_nextn_predict_layers 0 --model.mtp_loss_weight 0.1", "model.mtp_loss_weight", "`model.num_"),
        ("--model.attention gqa --model.kv_lora_rank 32", "model.kv_lora_rank", "`model.attention` gqa"),
        ("--model.moba_topk 0 --model.moba_block_size 32", "model.moba_block_size", "`model.moba_topk` 0"),
        ("--model.first_k_dense_replace 5 --model.n_routed_experts 4", "model.n_routed_experts", "`model.first_k_"),
        ("--model.intermediate_size 512", "model.intermediate_size", "`model.first_k_dense_replace` 0"),
        ("--model.balance_loss none --model.aux_loss_alpha 0.1", "model.aux_loss_alpha", "`model.balance_loss` none"),
        ("--model.aux_loss_alpha 0 --model.balance_loss expert", "model.balance_loss", "`model.aux_loss_alpha` 0"),
        ("--model.n_device_groups 2", "model.n_device_groups", "`model.balance_loss` sequence"),
    ],
)
def test_an_option_without_effect_is_refused(given, option, because):
    with pytest.raises(UserError) as caught:
        parse(shlex.split(given))
    assert str(caught.value).startswith(f"`{option}`: it has no effect with {because}")
    assert str(caught.value).endswith(": leave it out, or change that")


@pytest.mark.parametrize(
    "given",
    [
        "--momentum 0.9",
        "--optimizer adamw --momentum 0",
        "--schedule cosine --decay-fraction 0.3 --mtp-loss-weight-final 0.05",  # in the last 30 %
        "--preset seed_190m --schedule cosine --decay-fraction 0.3",  # the preset has a final weight
        "--schedule cosine --min-lr-ratio 0.1",
        "--sample-prompt moon",
        "--batch-size 1 --parallel.pp 2 --parallel.schedule 1f1b",
        "--model.first_k_dense_replace 5 --model.intermediate_size 288",
        "--model.first_k_dense_replace 4 --model.n_routed_experts 4",  # of the MTP module
        "--model.balance_loss none --model.aux_loss_alpha 0",
    ],
)
def test_an_option_with_an_effect_is_taken(given):
    parse(shlex.split(given))


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize(
    "given",
    [
        "",
        "--optimizer adamw",
        "--schedule cosine",
        "--decay-fraction 0",
        "--sample-every 0",
        "--model.attention gqa",
        "--model.moba_topk 0",
        "--model.num_nextn_predict_layers 0",
        "--model.first_k_dense_replace 99",
        "--model.balance_loss none",
    ],
)
def test_what_a_preset_decides_is_not_refused(preset, given):
    parse(["--preset", preset, *shlex.split(given)])


def test_a_runs_record_holds_what_nobody_chose(tmp_path):
    record = str(tmp_path / "run.yaml")
    write_run_file(parse(["--momentum", "0.9", "--decay-fraction", "0.5"]), record)
    again = parse(["--config", record, "--optimizer", "adamw", "--schedule", "cosine"])
    assert (again.momentum, again.decay_fraction) == (0.9, 0.5)
    with pytest.raises(UserError, match=r"^`momentum`: it has no effect with `optimizer` adamw"):
        parse(["--config", record, "--optimizer", "adamw", "--momentum", "0.8"])


def test_a_file_of_ones_own_is_chosen(tmp_path):
    file = str(tmp_path / "mine.yaml")
    write_yaml(file, {"optimizer": "adamw", "momentum": 0.9, "model": {"moba_topk": 0}}, "mine")
    with pytest.raises(UserError, match=r"^`momentum`: it has no effect with `optimizer` adamw"):
        parse(["--config", file])
    assert parse(["--config", file, "--optimizer", "muon"]).momentum == 0.9
    write_yaml(others := str(tmp_path / "others.yaml"), {"model": {"moba_topk": 3, "moba_block_size": 32}}, "mine")
    assert parse(["--config", others, "--model.moba_topk", "0"]).model["moba_block_size"] == 32  # overridden
    with pytest.raises(UserError, match=r"^`model.moba_block_size`: it has no effect with `model.moba_topk` 0"):
        parse(["--config", file, "--optimizer", "muon", "--model.moba_block_size", "32"])
