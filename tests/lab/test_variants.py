"""Variants and budgets: what `moonwhale compare` makes of its arguments, and what it refuses in one line."""

import dataclasses

import pytest

from moonwhale.errors import UserError
from moonwhale.lab.config import Budget, parse


def asked(*argv: str):
    return parse(list(argv))


def changes(*argv: str) -> dict:
    return {variant.name: variant.changes for variant in asked(*argv).variants}


def test_each_value_but_the_bases_is_a_variant():
    assert changes("--vary", "model.moba_topk=1,2,4") == {  # the demo preset has 2
        "base": {},
        "moba_topk=1": {"model": {"moba_topk": 1}},
        "moba_topk=4": {"model": {"moba_topk": 4}},
    }


def test_vary_is_repeated_one_option_at_a_time():
    found = changes("--lr", "1e-3", "--vary", "lr=1e-3,2e-3", "--vary", "grad-clip=0", "--vary", "compile=true")
    assert found == {
        "base": {},
        "lr=0.002": {"lr": 2e-3},
        "grad_clip=0": {"grad_clip": 0.0},
        "compile=true": {"compile": True},
    }


def test_null_and_lists_are_values():
    found = changes(
        "--vary", "model.q_lora_rank=null", "--vary", "model.moba_full_attention_layers=[1],[0,1,2,3],[1,3]"
    )
    assert found == {
        "base": {},
        "q_lora_rank=null": {"model": {"q_lora_rank": None}},
        "moba_full_attention_layers=[1]": {"model": {"moba_full_attention_layers": [1]}},
        "moba_full_attention_layers=[0,1,2,3]": {"model": {"moba_full_attention_layers": [0, 1, 2, 3]}},
    }


def test_a_model_default_is_the_bases_own_value():
    assert list(changes("--vary", "model.attention_bias=true,false")) == ["base", "attention_bias=true"]


def test_a_file_names_variants(tmp_path):
    file = tmp_path / "variants.yaml"
    file.write_text(
        "plain:\nmore experts: {model.n_routed_experts: 16, lr: 4e-3}\nfewer: {model: {n_routed_experts: 4}}\n"
    )
    assert changes("--variants", str(file)) == {
        "plain": {},
        "more experts": {"model": {"n_routed_experts": 16}, "lr": 4e-3},
        "fewer": {"model": {"n_routed_experts": 4}},
    }


@pytest.mark.parametrize(
    ("argv", "line"),
    [
        ([], "there is nothing to compare: give `vary` or `variants`"),
        (["--vary", "lr"], "`vary`: 'lr' is not of the form OPTION=VALUE,VALUE"),
        (["--vary", "lr="], "`vary`: 'lr=' is not of the form"),
        (["--vary", "lr=6e-3"], "`vary`: lr=0.006 is the base's own value: give another"),
        (["--vary", "lr=1e-3,0.001"], "`vary`: lr=0.001 is there twice"),
        (["--vary", "lr=1e-3", "--vary", "lr=1e-3"], "`vary`: lr=0.001 is there twice"),
        (["--vary", "lr=-1"], "variant lr=-1: `lr`: -1.0 is impossible"),
        (["--vary", "lr=fast"], "`vary`: lr: 'fast' is not a number"),
        (["--vary", "model.moba_topk=1,,2"], "`vary`: model.moba_topk: '' is not a whole number"),
        (["--vary", "schedule=wsp"], "`vary`: schedule: 'wsp' is none of wsd, cosine"),
        (["--vary", "model.moba_tpk=1"], "no option 'model.moba_tpk' (did you mean model.moba_topk?)"),
        (["--vary", "model.moba_full_attention_layers=1,3"], "are no lists: write each in brackets"),
        (["--vary", "data=python"], "data cannot be varied: all variants read the same rows"),
        (["--vary", "model.vocab_size=300"], "model.vocab_size cannot be varied"),
        (["--vary", "seed=1,2"], "seed cannot be varied: each variant has the same seeds: give `seeds`"),
        (["--vary", "steps=10"], "steps cannot be varied"),
        (["--vary", "preset=small"], "preset cannot be varied"),
        (["--vary", "out=x"], "out cannot be varied: a comparison sets it itself"),
        (["--vary", "parallel.pp=2"], "parallel.pp cannot be varied"),
        (["--vary", "tokens_per_step=5000"], "variant tokens_per_step=5000: `tokens_per_step`: 5000 is no multiple"),
        (["--vary", "lr=1", "--seeds", "0"], "`seeds`: 0 is impossible: it must be at least 1"),
        (["--vary", "lr=1", "--seconds", "0"], "`seconds`: 0.0 is impossible"),
        (["--vary", "lr=1", "--tokens", "4095"], "`tokens`: 4,095 are less than the 4,096 of a step: give more"),
        (["--vary", "lr=1", "--tokens", "409600", "--warmup-steps", "31"], "`steps` 100 less 70 of decay leave 30"),
        (["--vary", "lr=1", "--seconds", "9", "--tokens", "9999"], "`seconds` and `tokens` are two budgets"),
        (["--vary", "lr=1", "--seconds", "9", "--steps", "9"], "`seconds` and `steps` are two budgets"),
        (["--vary", "lr=1", "--turns", "0"], "`turns`: 0 is impossible"),
        (["--vary", "lr=1", "--tune", "momentum"], "`tune`: 'momentum' is none of lr"),
        (["--vary", "lr=3e-3", "--tune", "lr"], "variants base and lr=0.003 have the same options but for `lr`, which"),
        (["--vary", "lr=1", "--variants", "x"], "give `vary` or `variants`, not both"),
        (["--vary", "lr=1", "--save-every", "3"], "unknown option --save-every"),
        (
            ["--optimizer", "adamw", "--vary", "momentum=0.9"],
            "variant momentum=0.9: `momentum`: it has no effect with `optimizer` adamw",
        ),
        (
            ["--optimizer", "adamw", "--momentum", "0.9", "--vary", "lr=1"],
            "`momentum`: it has no effect with `optimizer` adamw: leave it out",
        ),
        (
            ["--vary", "model.intermediate_size=512"],
            "variant intermediate_size=512: `model.intermediate_size`: it has no effect with `model.first_k_",
        ),
        (["--variants", "nowhere.yaml"], "`variants`: cannot read nowhere.yaml"),
        (["--vary", "lr=" + ",".join(map(str, range(1, 60)))], "60 variants are too many"),
    ],
    ids=lambda value: " ".join(value)[:60] if isinstance(value, list) else "",
)
def test_bad_arguments_are_one_line(argv, line):
    with pytest.raises(UserError) as error:
        parse(argv)
    assert line in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("- a\n- b\n", "does not map each name to 'option: value' lines"),
        ("3\n", "does not map each name"),
        ("", "does not map each name"),
        ("a: {lr: 1e-3}\nb: 5\n", "does not map each name"),
        ("a:\nb: {lr: x}\n", "'b': lr: 'x' is not a number"),
        ("a:\nb: {lrr: 1}\n", "'b': unknown key 'lrr' (did you mean lr?)"),
        ("a:\nb: {model.moba: 1}\n", "'b': unknown key 'model.moba'"),
        ("a:\nb: {data: python}\n", "data cannot be varied"),
        ("a:\na: {lr: 1}\n", "a occurs twice"),
        ("a:\nb: {}\n", "variants a and b have the same options"),
        ("a:\nb: {lr: 6e-3}\n", "variants a and b have the same options"),
        ("a:\n", "variant a is alone: add another to compare it with"),
        ('a:\n"b\\e[1m": {lr: 1}\n', "is no name"),
        (f"a:\n{'b' * 61}: {{lr: 1}}\n", "is no name"),
        ("a: [", "is not YAML"),
    ],
)
def test_bad_files_are_one_line(text, line, tmp_path):
    file = tmp_path / "variants.yaml"
    file.write_text(text)
    with pytest.raises(UserError) as error:
        parse(["--variants", str(file)])
    assert line in str(error.value) and "\n" not in str(error.value)


def test_the_budget_is_seconds_tokens_or_steps():
    vary = ("--vary", "tokens_per_step=8192")
    assert asked(*vary).budget == Budget("steps", 450)  # the preset's
    assert asked(*vary, "--steps", "40").budget == Budget("steps", 40)
    assert asked(*vary, "--seconds", "2.5").budget == Budget("seconds", 2.5)
    by_tokens = asked(*vary, "--tokens", "400000")
    assert [by_tokens.config(variant).steps for variant in by_tokens.variants] == [97, 48]


def test_a_warm_up_has_the_room_that_a_budget_of_tokens_leaves(tmp_path):
    file = tmp_path / "variants.yaml"
    file.write_text("a:\nb: {warmup_steps: 200}\n")
    tokens = ("--tokens", "50000000")
    by_option = asked(*tokens, "--vary", "lr=1e-3,4e-3", "--warmup-steps", "200")
    for comparison in (by_option, asked(*tokens, "--variants", str(file))):
        config = comparison.config(comparison.variants[1])
        assert (config.warmup_steps, config.steps) == (200, 12_207)


def test_an_option_for_all_has_an_effect_in_one_variant_at_least():
    assert list(changes("--momentum", "0.9", "--vary", "optimizer=adamw")) == ["base", "optimizer=adamw"]
    assert list(changes("--model.kv_lora_rank", "32", "--vary", "model.attention=gqa")) == ["base", "attention=gqa"]


def test_seeds_follow_the_first():
    comparison = asked("--vary", "lr=1e-3", "--seed", "5", "--seeds", "2")
    assert [comparison.config(comparison.variants[1], seed).seed for seed in range(2)] == [5, 6]


def test_a_run_file_is_a_base(tmp_path):
    """A run.yaml holds all options of a run, its folder and the steps between checkpoints included."""
    from moonwhale.train.config import TrainConfig
    from moonwhale.train.run_folder import write_run_file

    run = TrainConfig.resolve({"lr": 3e-3, "save_every": 7, "out": "x"})
    write_run_file(run, tmp_path / "run.yaml")
    comparison = asked("--config", str(tmp_path / "run.yaml"), "--vary", "lr=1e-3,3e-3")
    assert [variant.name for variant in comparison.variants] == ["base", "lr=0.001"]
    config = comparison.config(comparison.variants[0])
    assert (config.lr, config.save_every, dataclasses.asdict(config)["model"]) == (3e-3, 0, run.model)
