"""Every mechanism's plain twin is what it says, costs what costs.py says, and is refused where it cannot go."""

import json
from dataclasses import asdict

import pytest
import torch
from torch import nn

from moonwhale.cli import main
from moonwhale.costs import dense_twin, flops_per_token, forward_flops, model_size, part_sizes
from moonwhale.errors import UserError
from moonwhale.export.deepseek import to_deepseek
from moonwhale.infer.engine import Engine
from moonwhale.inspect.xray import xray
from moonwhale.model import MoonwhaleConfig, MoonwhaleForCausalLM
from moonwhale.model.gqa import GroupedQueryAttention
from moonwhale.model.moe import MLP, DeepseekMoE
from moonwhale.optim import MuonClip, param_groups
from moonwhale.presets import PRESETS
from moonwhale.train.mtp_trainer import MTPTrainer, MTPTrainingArguments
from toy import TOY

GQA = {"attention": "gqa", "num_key_value_heads": 1}
CHAIN = {"num_nextn_predict_layers": 2, "mtp_num_blocks": [2, 1]}


def build(**overrides) -> MoonwhaleForCausalLM:
    torch.manual_seed(0)
    return MoonwhaleForCausalLM(MoonwhaleConfig(**TOY | overrides))


# --- costs ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "overrides",
    [GQA, {"attention": "gqa"}, GQA | {"attention_bias": True} | CHAIN, GQA | {"first_k_dense_replace": 1}],
    ids=str,
)
def test_costs_count_grouped_queries(overrides):
    model = build(**overrides)
    config, size = model.config, model_size(model.config)
    assert size.parameters == sum(p.numel() for p in model.parameters())
    assert part_sizes(config).blocks[0] == sum(p.numel() for p in model.model.layers[0].parameters())
    muon = [p for group in param_groups(model) if group["muon"] for p in group["params"]]
    assert size.matrices == sum(p.numel() for p in muon)
    cache = model.eval()(torch.zeros(1, 5, dtype=torch.long), use_cache=True).past_key_values
    numbers = sum(layer.keys.numel() + layer.values.numel() for layer in cache.layers)
    assert size.kv_cache_bytes_per_token == 2 * numbers / 5
    if config.num_key_value_heads == config.num_attention_heads:
        assert size.kv_cache_bytes_per_token == size.mha_cache_bytes_per_token


def test_attention_flops_of_multi_head_attention():
    """By hand: four projections, and products with 17/2 keys of 16 and values of 8 on average."""
    mha, mla = (MoonwhaleConfig(**TOY | {"attention": kind, "moba_topk": 0}) for kind in ("gqa", "mla"))
    (block, *_), (latent, *_) = (forward_flops(config, 16).blocks for config in (mha, mla))
    assert block - latent == 2 * (2 * 32 * 32 + 2 * 32 * 16) - 2 * (16 * (32 + 32) + 32 * 24 + 16 * 32 + 16 * 32)
    assert block - 2 * 2 * 8.5 * (16 + 8) == 2 * (2 * 32 * 32 + 2 * 32 * 16 + 32 * 4 + 3 * 3 * 32 * 16)


@pytest.mark.parametrize("preset", PRESETS)
def test_the_dense_twin_has_as_many_active_flops(preset):
    config = MoonwhaleConfig(**PRESETS[preset].model)
    dense = MoonwhaleConfig(**PRESETS[preset].model | dense_twin(config))
    ratio = flops_per_token(dense, 512) / flops_per_token(config, 512)
    assert 0.995 < ratio < 1.005
    assert model_size(dense).parameters == model_size(dense).active_parameters


def test_the_dense_twin_has_no_experts_in_mtp_modules_either():
    model = build(**CHAIN, **dense_twin(MoonwhaleConfig(**TOY | CHAIN)))
    assert not any(isinstance(module, DeepseekMoE) for module in model.modules())
    assert sum(isinstance(module, MLP) for module in model.modules()) == 5


def test_info_prints_the_fields_of_the_dense_twin(capsys):
    assert main(["info", "demo"]) == 0
    line = next(line for line in capsys.readouterr().out.splitlines() if "as many, dense" in line)
    assert main(["info", "demo", "--json", *line.split(maxsplit=3)[-1].split()]) == 0
    assert asdict(model_size(MoonwhaleConfig())).keys() <= json.loads(capsys.readouterr().out).keys()


# --- configuration ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("overrides", "why"),
    [
        ({"attention": "mha"}, "attention='mha' is impossible: choose one of mla, gqa"),
        ({"attention": "gqa", "num_key_value_heads": 3}, "num_key_value_heads=3 .* must divide num_attention_heads=2"),
        ({"num_key_value_heads": 1}, "latent attention has as many key heads as query heads"),
        ({"attention": "gqa", "moba_key_conv": 3}, "the convolution is on the latents of attention=mla"),
        ({"attention": "gqa", "qk_nope_head_dim": 7}, "qk_rope_head_dim=8 .* even, together with qk_nope_head_dim"),
    ],
)
def test_what_does_not_fit_is_refused(overrides, why):
    with pytest.raises(ValueError, match=why):
        MoonwhaleConfig(**TOY | overrides)


def test_a_saved_configuration_takes_another_attention():
    """The widths that follow from other fields are not kept from the file."""
    saved = MoonwhaleConfig(**TOY).to_dict()
    again = MoonwhaleConfig.from_dict(saved | GQA | {"qk_nope_head_dim": 4})
    assert (again.head_dim, again.qk_head_dim) == (12, 12)
    assert MoonwhaleConfig.from_dict(saved | {"qk_rope_head_dim": 4}).head_dim == 4


# --- initialisation and optimizer -------------------------------------------------------------------------------------


def residual_weights(model):
    """Yields the weights that write into the residual stream."""
    for name, p in model.named_parameters():
        if name.endswith(("o_proj.weight", "down_proj.weight", "experts.down_proj")):
            yield name, p


@pytest.mark.parametrize("overrides", [{}, GQA | {"first_k_dense_replace": 1}], ids=str)
def test_plain_initialisation_is_normal_everywhere(overrides):
    zero, normal = (build(zero_init_residual=zero, **overrides) for zero in (True, False))
    assert len(list(residual_weights(zero))) == 3 + 3 + 3 - overrides.get("first_k_dense_replace", 0)
    assert all((p == 0).all() for _, p in residual_weights(zero))
    drawn = [p for name, p in normal.named_parameters() if "norm" not in name]
    for p in drawn:
        assert abs(p.std().item() / 0.02 - 1) < 0.2 and abs(p.mean().item()) < 0.004


def test_adamw_for_all_is_torchs_adamw():
    """Two steps over every weight agree with torch.optim.AdamW, with the same weights decayed."""
    ours, theirs = build(), build()
    groups = param_groups(ours, lr=1e-2, weight_decay=0.1, muon=False)
    assert not any(group["muon"] for group in groups)
    optimizer = MuonClip(groups)
    names = {p: name for name, p in ours.named_parameters()}
    parameters = dict(theirs.named_parameters())
    same = [
        {"params": [parameters[names[p]] for p in g["params"]], "lr": 1e-2, "weight_decay": g["weight_decay"]}
        for g in groups
    ]
    assert sum(len(group["params"]) for group in same) == len(parameters)
    oracle = torch.optim.AdamW(same, betas=(0.9, 0.95), eps=1e-8, fused=True)
    ids = torch.arange(64).view(2, 32)
    for _ in range(2):
        for model, stepper in ((ours, optimizer), (theirs, oracle)):
            model(ids, labels=ids).loss.backward()
            stepper.step()
            stepper.zero_grad()
    for name, p in ours.named_parameters():
        assert torch.equal(p, parameters[name]), name


class Rows(torch.utils.data.Dataset):
    def __len__(self):
        return 4

    def __getitem__(self, i):
        ids = torch.arange(i, i + 24)
        return {"input_ids": ids, "labels": ids}


@pytest.mark.parametrize("tau", [0.0, 1e-3])
@pytest.mark.parametrize("muon", [True, False])
def test_optimizer_and_clip_are_chosen_apart(muon, tau, tmp_path):
    settings = {"max_steps": 1, "report_to": [], "save_strategy": "no", "use_cpu": True, "disable_tqdm": True}
    args = MTPTrainingArguments(str(tmp_path), muon=muon, qk_clip_tau=tau, **settings)
    trainer = MTPTrainer(model=build(), args=args, train_dataset=Rows())
    trainer.train()
    states = {key for state in trainer.optimizer.state.values() for key in state}
    assert ("momentum_buffer" in states) == muon and "exp_avg" in states
    last = trainer._hooks.last
    assert (last.get("clipped_heads", torch.zeros(())) > 0) == (tau > 0) and last["max_logits"].isfinite().all()


# --- a run, and where a plain twin cannot go --------------------------------------------------------------------------


@pytest.fixture(scope="module")
def plain_run(text_folder, tmp_path_factory):
    """The folder of a run with every plain twin at once, after two steps."""
    folder = tmp_path_factory.mktemp("plain") / "run"
    model = TOY | GQA | {"moba_topk": 0, "zero_init_residual": "false", "moba_full_attention_layers": ""}
    model |= dense_twin(MoonwhaleConfig(**TOY))
    unused = {"q_lora_rank", "kv_lora_rank", "moba_block_size", "n_routed_experts", "num_experts_per_tok"}
    unused |= {"moe_intermediate_size"}
    fields = [f"--model.{name}={value}" for name, value in model.items() if name not in unused]
    options = (
        "--context 32 --batch-size 2 --tokens-per-step 128 --steps 2 --warmup-steps 1 --eval-every 0 --eval-rows 4"
    )
    options += " --save-every 0 --report-to none --device cpu --precision fp32 --optimizer adamw --qk-clip-tau 0"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MOONWHALE_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))
        assert main(["train", "--data", str(text_folder), "--out", str(folder), *options.split(), *fields]) == 0
    return folder


def test_a_run_of_plain_twins_is_trained_and_evaluated(plain_run, text_folder, capsys):
    model = MoonwhaleForCausalLM.from_pretrained(plain_run)
    assert isinstance(model.model.layers[-1].self_attn, GroupedQueryAttention)
    assert sum(isinstance(module, nn.Linear) for module in model.model.layers[0].modules()) == 7
    assert main(["eval", str(plain_run), "--data", str(text_folder), "--device", "cpu", "--rows", "2"]) == 0
    assert "bits per byte" in capsys.readouterr().out
    assert main(["info", str(plain_run)]) == 0


@pytest.mark.parametrize(
    "verb",
    [
        ["generate", "RUN", "x"],
        ["xray", "RUN", "--prompt", "x", "--out", "OUT.html"],
        ["eval", "RUN", "--task", "arithmetic"],
        ["grpo", "RUN", "--task", "basic_arithmetic", "--out", "OUT"],
        ["export", "RUN", "--out", "OUT"],
        ["export", "RUN", "--to", "gguf", "--out", "OUT"],
    ],
    ids=" ".join,
)
def test_rooms_without_grouped_queries_refuse_in_one_line(verb, plain_run, tmp_path, capsys):
    places = {"RUN": str(plain_run), "OUT": str(tmp_path / "out"), "OUT.html": str(tmp_path / "out.html")}
    assert main([places.get(word, word) for word in verb]) == 2
    *_, line = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("moonwhale: ") and "attention=gqa" in line
    assert not list(tmp_path.iterdir())


def test_the_python_classes_refuse_as_well(small_tokenizer):
    model = build(**GQA, vocab_size=len(small_tokenizer))
    for use in (Engine, lambda *given: xray(*given, [1, 2], 2)):
        with pytest.raises(UserError, match="attention=gqa"):
            use(model, small_tokenizer)


def test_transformers_generate_takes_the_place_of_the_engine(plain_run):
    model = MoonwhaleForCausalLM.from_pretrained(plain_run)
    assert model.generate(torch.tensor([[2, 3]]), max_new_tokens=3, do_sample=False).shape[1] <= 5


def test_code_export_carries_the_twin(plain_run, tmp_path):
    with pytest.raises(UserError, match="DeepSeek-V3 has no attention=gqa"):
        to_deepseek(plain_run, tmp_path, torch.float32)
    assert main(["export", str(plain_run), "--to", "code", "--out", str(tmp_path / "code")]) == 0
    assert {"core.py", "gqa.py"} <= {path.name for path in (tmp_path / "code").iterdir()}
