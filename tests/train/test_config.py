"""Run options: the source of each value, its allowed range, and replaying a run from its options."""

import dataclasses
import re

import pytest
import yaml

from moonwhale.errors import UserError
from moonwhale.presets import PRESETS
from moonwhale.train.config import TrainConfig, build_model_config, fit_to_tokenizer, parse
from moonwhale.train.run_folder import write_run_file


@pytest.fixture
def yaml_file(tmp_path):
    def make(text: str) -> str:
        (tmp_path / "run.yaml").write_text(text)
        return str(tmp_path / "run.yaml")

    return make


def test_later_sources_override_earlier_ones(yaml_file):
    path = yaml_file("warmup_steps: 7\nsteps: 90\nmodel: {hidden_size: 96, v_head_dim: 16}")
    config = parse(["--preset", "small", "--config", path, "--steps", "80", "--model.hidden_size", "128"])
    assert config.seed == TrainConfig().seed  # the default
    assert config.lr == PRESETS["small"].train["lr"]  # the preset over the default
    assert config.warmup_steps == 7  # YAML over the preset
    assert config.steps == 80  # the command line over YAML
    assert config.model["n_routed_experts"] == PRESETS["small"].model["n_routed_experts"]
    assert config.model["v_head_dim"] == 16
    assert config.model["hidden_size"] == 128
    assert PRESETS["small"].model["hidden_size"] == 512, "the preset itself must not change"


def test_yaml_may_name_the_preset(yaml_file):
    config = parse(["--config", yaml_file("preset: small")])
    assert config.context == PRESETS["small"].train["context"]
    assert config.out == "runs/small"


def test_a_file_resolved_from_one_preset_refuses_another(yaml_file):
    with pytest.raises(UserError, match=r"'seed_190m' contradicts .*'small'"):
        parse(["--preset", "seed_190m", "--config", yaml_file("preset: small")])


@pytest.mark.parametrize(
    ("argv", "field", "value"),
    [
        (["--lr", "1e-3"], "lr", 1e-3),
        (["--lr=2"], "lr", 2.0),
        (["--batch_size", "4"], "batch_size", 4),
        (["--compile"], "compile", True),
        (["--compile", "--no-compile"], "compile", False),
        (["--data", "12"], "data", "12"),
        (["--data", "no"], "data", "no"),
        (["--data-columns", "title,text"], "data_columns", ["title", "text"]),
        (["--report-to", "none"], "report_to", ["none"]),
        (["--tokenizer", "null"], "tokenizer", None),
        (["--mtp-loss-weight-final", "0.1"], "mtp_loss_weight_final", 0.1),
    ],
)
def test_values_are_typed(argv, field, value):
    found = getattr(parse(argv), field)
    assert found == value and type(found) is type(value)


@pytest.mark.parametrize(
    ("text", "field", "value"),
    [
        ("128", "hidden_size", 128),
        ("1e-5", "rms_norm_eps", 1e-5),
        ("1", "rms_norm_eps", 1.0),
        ("null", "q_lora_rank", None),
        ("true", "tie_word_embeddings", True),
        ("2", "mtp_num_blocks", 2),
        ("2,1", "mtp_num_blocks", [2, 1]),
        ("[2, 1]", "mtp_num_blocks", [2, 1]),
        ("0", "moba_full_attention_layers", [0]),
        ("softmax", "scoring_func", "softmax"),
        ("{rope_type: yarn, factor: 4}", "rope_parameters", {"rope_type": "yarn", "factor": 4}),
    ],
)
def test_model_fields_are_typed(text, field, value):
    for argv in ([f"--model.{field}", text], [f"--model.{field}={text}"], [f"--model.{field.replace('_', '-')}", text]):
        found = parse(argv).model[field]
        assert found == value and type(found) is type(value)


BAD = [
    (["--stepz", "3"], r"unknown option --stepz \(did you mean --steps\?\)"),
    (["--step", "3"], "unknown option --step"),  # no abbreviations
    (["3"], "unexpected argument 3"),
    (["--steps"], "`steps`: expected one argument"),
    (["--steps", "many"], "`steps`: 'many' is not a whole number"),
    (["--steps", "2.5"], "`steps`: '2.5' is not a whole number"),
    (["--steps", "true"], "`steps`: 'true' is not a whole number"),
    (["--steps", "0"], "`steps`: 0 is impossible: it must be at least 1"),
    (["--lr", "fast"], "`lr`: 'fast' is not a number"),
    (["--lr", "nan"], "`lr`: 'nan' is not a number"),
    (["--lr", "0"], "`lr`: 0.0 is impossible: it must be above 0"),
    (["--weight-decay", "-1"], "`weight_decay`: -1.0 is impossible"),
    (["--momentum", "1"], "`momentum`: 1.0 is impossible"),
    (["--decay-fraction", "1.5"], "`decay_fraction`: 1.5 is impossible"),
    (
        ["--steps", "10", "--warmup-steps", "9", "--decay-fraction", "0.2"],
        "`steps` 10 less 2 of decay leave 8 for warm-up",
    ),
    (["--schedule", "cosin"], r"`schedule`: 'cosin' is none of wsd, cosine \(did you mean cosine\?\)"),
    (["--preset", "dem"], r"`preset`: 'dem' is none of demo, .*did you mean demo"),
    (["--model.hiden_size", "3"], r"unknown option --model.hiden_size \(did you mean --model.hidden_size\?\)"),
    (["--model.hidden_size", "wide"], "`model.hidden_size`: 'wide' is not a whole number"),
    (["--model.hidden_size", "2.5"], "`model.hidden_size`: '2.5' is not a whole number"),
    (["--model.q_lora_rank", "no"], "`model.q_lora_rank`: 'no' is not a whole number or null"),
    (["--model.mtp_num_blocks", "1,x"], "'1,x' is not a whole number or a list of whole numbers"),
    (["--model.rope_parameters", "{a: "], "'{a: ' is not a mapping or null"),
    (["--model.hidden_size"], "`model.hidden_size`: expected one argument"),
    (["--model.hidden_size", "--steps", "3"], "`model.hidden_size`: expected one argument"),
    (
        ["--batch-size", "3", "--context", "256"],
        "4096 is no multiple of `batch_size` 3 x `context` 256 = 768 tokens: give 3840 or 4608",
    ),
    (
        ["--tokens-per-step", "100", "--context", "256", "--batch-size", "8"],
        "100 is no multiple of .* = 2048 tokens: give 2048$",
    ),
    (["--config", "no_such.yaml"], "`config`: cannot read no_such.yaml: No such file"),
]


@pytest.mark.parametrize(("argv", "message"), BAD, ids=[" ".join(argv) for argv, _ in BAD])
def test_bad_options_are_one_line(argv, message):
    with pytest.raises(UserError, match=message) as caught:
        parse(argv)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("stepz: 3", r"run.yaml: unknown key 'stepz' \(did you mean steps\?\)"),
        ("steps: many", "run.yaml: steps: 'many' is not a whole number"),
        ("steps: '3'", "run.yaml: steps: '3' is not a whole number"),
        ("compile: 1", "run.yaml: compile: 1 is not true or false"),
        ("report_to: [1]", "run.yaml: report_to: .* is not a list of words"),
        (
            "model: {hiden_size: 3}",
            r"run.yaml: unknown key 'model.hiden_size' \(did you mean model.hidden_size\?\)",
        ),
        ("model: 3", "run.yaml: model: 3 is not a mapping"),
        ("schedule: linear", "run.yaml: schedule: 'linear' is none of wsd, cosine"),
        ("steps: 3: 4", "run.yaml, line 1 is not YAML"),
        ("", "holds no 'option: value' lines"),
        ("- steps", "holds no 'option: value' lines"),
    ],
)
def test_bad_yaml_is_one_line(yaml_file, text, message):
    with pytest.raises(UserError, match=message) as caught:
        parse(["--config", yaml_file(text)])
    assert "\n" not in str(caught.value)


def test_a_binary_file_is_refused_as_yaml(tmp_path):
    (tmp_path / "run.yaml").write_bytes(b"\xff\xfe\x00\x80")
    with pytest.raises(UserError, match="it is not UTF-8 text"):
        parse(["--config", str(tmp_path / "run.yaml")])


@pytest.mark.parametrize("name", PRESETS)
def test_a_run_is_replayed_from_its_run_file(name, tmp_path):
    argv = ["--lr", "1e-5", "--model.q_lora_rank", "null", "--data-columns", "a,b", "--no-compile", "--data", "null"]
    config = parse(["--preset", name, *argv])
    write_run_file(config, tmp_path / "run.yaml")
    assert parse(["--config", str(tmp_path / "run.yaml")]) == config
    assert [path.name for path in tmp_path.iterdir()] == ["run.yaml"]


def test_a_run_file_does_not_depend_on_the_preset(tmp_path):
    write_run_file(parse([]), tmp_path / "run.yaml")
    written = yaml.safe_load((tmp_path / "run.yaml").read_text())
    assert written.keys() == {field.name for field in dataclasses.fields(TrainConfig)} - {"resume"}
    assert written["model"] == PRESETS["demo"].model


def test_a_run_file_from_before_the_recipes_trains_as_it_did(tmp_path):
    config = parse(["--preset", "demo", "--steps", "30"])
    assert (config.embedding_lr, config.mtp_start, config.model["embedding_initializer_range"]) == (10.0, 0.7, 0.8)
    write_run_file(config, tmp_path / "run.yaml")
    values = yaml.safe_load((tmp_path / "run.yaml").read_text())
    del values["embedding_lr"], values["mtp_start"], values["model"]["embedding_initializer_range"]
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(values))
    old = parse(["--config", str(tmp_path / "run.yaml")])
    assert (old.embedding_lr, old.mtp_start, old.steps) == (1.0, 0.0, 30)
    assert "embedding_initializer_range" not in old.model and old.model["vocab_size"] == 2048
    (tmp_path / "run.yaml").write_text("preset: demo\nlr: 0.01\n")  # no record: the preset decides the rest
    assert parse(["--config", str(tmp_path / "run.yaml")]).embedding_lr == 10.0


def test_resume_is_not_written_to_the_run_file(tmp_path):
    write_run_file(parse(["--resume"]), tmp_path / "run.yaml")
    assert parse(["--config", str(tmp_path / "run.yaml")]).resume is False


@pytest.mark.parametrize(
    ("argv", "warmup"),
    [
        ([], 200),
        (["--steps", "2000"], 200),
        (["--steps", "500"], 50),
        (["--steps", "3"], 1),
        (["--steps", "1", "--decay-fraction", "1"], 0),
        (["--steps", "100", "--decay-fraction", "0.95"], 5),
        (["--steps", "100", "--decay-fraction", "0.95", "--schedule", "cosine", "--mtp-loss-weight-final", "0.1"], 10),
        (["--steps", "500", "--warmup-steps", "200"], 200),
    ],
)
def test_a_preset_warms_up_for_at_most_a_tenth_of_the_steps(argv, warmup):
    assert parse(["--preset", "small", *argv]).warmup_steps == warmup


def test_gradient_accumulation_counts_all_devices():
    config = parse(["--tokens-per-step", "8192", "--context", "256", "--batch-size", "8"])
    assert (config.gradient_accumulation_steps(), config.gradient_accumulation_steps(replicas=2)) == (4, 2)
    with pytest.raises(UserError, match="x 3 devices = 6144 tokens: give 6144 or 12288"):
        config.gradient_accumulation_steps(replicas=3)


def test_help_lists_every_option_and_field(capsys):
    with pytest.raises(SystemExit) as left:
        parse(["--help"])
    assert left.value.code == 0
    text = capsys.readouterr().out
    for field in dataclasses.fields(TrainConfig):
        assert field.name == "model" or re.search(rf"--{field.name.rstrip('_').replace('_', '-')}\b", text)
    assert "moba_block_size" in text and "hidden_size" in text
    assert f"optimizer steps ({PRESETS['demo'].train['steps']})" in " ".join(text.split())


def test_model_config():
    config = parse(["--model.moba_topk", "0", "--context", "256", "--model.eos_token_id", "7"])
    model = build_model_config(config)
    fit_to_tokenizer(model, config, vocab_size=2000, bos_token_id=5, eos_token_id=6)
    assert (model.moba_topk, model.bos_token_id, model.eos_token_id, model.hidden_size) == (0, 5, 7, 256)
    assert model.max_position_embeddings == 256  # the context, unless it is set


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--model.moba_block_size", "0"], "^`model.moba_block_size`=0 is impossible"),
        (["--model.num_experts_per_tok", "99"], "^`model.num_experts_per_tok`=99 is impossible"),
        (["--model.qk_rope_head_dim", "33"], "^`model.qk_rope_head_dim`=33 is impossible"),
        (["--model.tie_word_embeddings", "true"], "^`model.embedding_initializer_range`: 0.8 is for .*: give null$"),
        (
            ["--model.tie_word_embeddings", "true", "--model.embedding_initializer_range", "null"],
            "^`embedding_lr`: 10 is for .*: give 1$",
        ),
        (["--model.vocab_size", "300"], "^`model.vocab_size`: 300 is smaller than the tokenizer's 301: .* 320$"),
        (
            ["--model.max_position_embeddings", "99", "--context", "256"],
            "`context`: 256 is longer than `model.max_position_embeddings` 99",
        ),
    ],
)
def test_impossible_models_name_the_option(argv, message):
    with pytest.raises(UserError, match=message) as caught:
        config = parse(argv)
        fit_to_tokenizer(build_model_config(config), config, vocab_size=301, pad_token_id=300)
    assert "\n" not in str(caught.value)
