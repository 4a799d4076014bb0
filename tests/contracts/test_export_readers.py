"""Programs that read our exports compute our model from them. Every export starts from what `moonwhale train` wrote."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor

from moonwhale.checkpoint import open_checkpoint
from moonwhale.cli import main as cli
from moonwhale.model import MoonwhaleForCausalLM

AREA = "Readers of our exports"
IDS = torch.randint(290, (2, 24), generator=torch.Generator().manual_seed(3))
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 16}
# What DeepSeek's own configuration class takes where config.json says nothing (configuration_deepseek.py)
DEEPSEEK_DEFAULTS = {
    "scoring_func": "softmax",
    "topk_method": "gready",
    "moe_layer_freq": 1,
    "norm_topk_prob": False,
    "n_group": 8,
    "topk_group": 3,
    "routed_scaling_factor": 1.0,
    "first_k_dense_replace": 0,
    "rope_theta": 10000.0,
    "rope_scaling": None,
    "rms_norm_eps": 1e-6,
    "attention_bias": False,
}
RELEASED = [
    "architectures",
    "attention_bias",
    "attention_dropout",
    "aux_loss_alpha",
    "bos_token_id",
    "eos_token_id",
    "ep_size",
    "first_k_dense_replace",
    "hidden_act",
    "hidden_size",
    "initializer_range",
    "intermediate_size",
    "kv_lora_rank",
    "max_position_embeddings",
    "model_type",
    "moe_intermediate_size",
    "moe_layer_freq",
    "n_group",
    "n_routed_experts",
    "n_shared_experts",
    "norm_topk_prob",
    "num_attention_heads",
    "num_experts_per_tok",
    "num_hidden_layers",
    "num_key_value_heads",
    "num_nextn_predict_layers",
    "q_lora_rank",
    "qk_nope_head_dim",
    "qk_rope_head_dim",
    "rms_norm_eps",
    "rope_scaling",
    "rope_theta",
    "routed_scaling_factor",
    "scoring_func",
    "seq_aux",
    "tie_word_embeddings",
    "topk_group",
    "topk_method",
    "torch_dtype",
    "use_cache",
    "v_head_dim",
    "vocab_size",
]
VARIANTS = {
    "plain": {},
    "groups": {"n_group": 2, "topk_group": 1, "routed_scaling_factor": 1.7, "norm_topk_prob": False},
    "dense first, plain queries": {"first_k_dense_replace": 1, "q_lora_rank": None, "attention_bias": True},
    "halves": {"rope_interleave": False, "attention_bias": True},
    "yarn": {"rope_parameters": YARN},
    "yarn, mscales": {"rope_parameters": YARN | {"mscale": 0.7, "mscale_all_dim": 1.0, "beta_fast": 16}},
    "yarn, one mscale": {"rope_parameters": YARN | {"mscale": 0.7}},
    "yarn, all dimensions": {"rope_parameters": YARN | {"mscale_all_dim": 1.0}},
    "yarn, own factor": {"rope_parameters": YARN | {"attention_factor": 1.3, "mscale": 0.5, "mscale_all_dim": 0.8}},
    "linear": {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}},
}


@pytest.fixture
def variant(trained_checkpoint, draw, tmp_path):
    """`variant(**overrides)` returns a trained checkpoint's folder with other settings and random weights."""

    def variant(**overrides):
        model, tokenizer = open_checkpoint(trained_checkpoint)
        if not overrides:
            return trained_checkpoint, model
        config = type(model.config).from_dict(model.config.to_dict() | {"moba_topk": 0} | overrides)
        model = draw(MoonwhaleForCausalLM(config).eval())
        model.save_pretrained(tmp_path / "ours")
        tokenizer.save_pretrained(tmp_path / "ours")
        return tmp_path / "ours", model

    return variant


def export(folder: Path, out: Path, *options: str) -> dict:
    """Exports a folder and returns the configuration that was written."""
    assert cli(["export", str(folder), "--out", str(out), *options]) == 0
    return json.loads((out / "config.json").read_text())


def our_logits(model) -> Tensor:
    with torch.no_grad():
        return model(IDS, use_cache=False).logits


def close(a: Tensor, b: Tensor) -> bool:
    return ((a - b).abs().max() / b.abs().max()).item() < 3e-5


class DeepSeek:
    """DeepSeek's published modeling code in its plainest form: full attention, one expert after the other."""

    def __init__(self, folder: Path):
        self.config = DEEPSEEK_DEFAULTS | json.loads((folder / "config.json").read_text())
        self.weights = load_file(folder / "model.safetensors")

    def __call__(self, ids: Tensor) -> Tensor:
        x = F.embedding(ids, self.weights["model.embed_tokens.weight"])
        for layer in range(self.config["num_hidden_layers"]):
            name, eps = f"model.layers.{layer}", self.config["rms_norm_eps"]
            x = x + self.attention(f"{name}.self_attn", self.norm(f"{name}.input_layernorm", x, eps))
            y, mlp = self.norm(f"{name}.post_attention_layernorm", x, eps), f"{name}.mlp"
            x = x + (self.mlp(mlp, y) if layer < self.config["first_k_dense_replace"] else self.moe(mlp, y))
        head = "model.embed_tokens" if self.config["tie_word_embeddings"] else "lm_head"
        return self.linear(head, self.norm("model.norm", x, self.config["rms_norm_eps"]))

    def linear(self, name: str, x: Tensor) -> Tensor:
        return F.linear(x, self.weights[f"{name}.weight"], self.weights.get(f"{name}.bias"))

    def norm(self, name: str, x: Tensor, eps: float = 1e-6) -> Tensor:
        return F.rms_norm(x, x.shape[-1:], self.weights[f"{name}.weight"], eps)

    def mlp(self, name: str, x: Tensor) -> Tensor:
        gate = F.silu(self.linear(f"{name}.gate_proj", x))
        return self.linear(f"{name}.down_proj", gate * self.linear(f"{name}.up_proj", x))

    def moe(self, name: str, x: Tensor) -> Tensor:
        c, tokens = self.config, x.flatten(0, 1)
        assert (c["scoring_func"], c["topk_method"]) == ("sigmoid", "noaux_tc"), "else another model"
        scores = F.linear(tokens, self.weights[f"{name}.gate.weight"]).sigmoid()
        choice = scores + self.weights[f"{name}.gate.e_score_correction_bias"]
        groups = choice.unflatten(1, (c["n_group"], -1))
        best = groups.topk(2, dim=-1).values.sum(-1).topk(c["topk_group"], dim=-1).indices
        outside = torch.ones_like(groups[..., 0], dtype=torch.bool).scatter(1, best, False)
        choice = groups.masked_fill(outside[..., None], -math.inf).flatten(1)
        chosen = choice.topk(c["num_experts_per_tok"], dim=-1).indices
        gates = scores.gather(1, chosen)
        if c["num_experts_per_tok"] > 1 and c["norm_topk_prob"]:
            gates = gates / (gates.sum(-1, keepdim=True) + 1e-20)
        out = self.mlp(f"{name}.shared_experts", tokens)
        for expert in range(c["n_routed_experts"]):
            gate = (gates * (chosen == expert)).sum(-1, keepdim=True) * c["routed_scaling_factor"]
            out = out + gate * self.mlp(f"{name}.experts.{expert}", tokens)
        return out.view_as(x)

    def attention(self, name: str, x: Tensor) -> Tensor:
        c = self.config
        heads, nope, rope = c["num_attention_heads"], c["qk_nope_head_dim"], c["qk_rope_head_dim"]
        if c["q_lora_rank"] is None:
            q = self.linear(f"{name}.q_proj", x)
        else:
            q = self.linear(f"{name}.q_b_proj", self.norm(f"{name}.q_a_layernorm", self.linear(f"{name}.q_a_proj", x)))
        q_nope, q_rope = q.unflatten(-1, (heads, -1)).transpose(1, 2).split([nope, rope], dim=-1)
        latent = self.linear(f"{name}.kv_a_proj_with_mqa", x)
        latent, k_rope = latent.split([c["kv_lora_rank"], rope], dim=-1)
        kv = self.linear(f"{name}.kv_b_proj", self.norm(f"{name}.kv_a_layernorm", latent))
        k_nope, v = kv.unflatten(-1, (heads, -1)).transpose(1, 2).split([nope, c["v_head_dim"]], dim=-1)
        scaling = c["rope_scaling"] or {}
        scale = (nope + rope) ** -0.5
        if scaling.get("mscale_all_dim"):
            scale *= self.mscale(scaling["factor"], scaling["mscale_all_dim"]) ** 2
        q = torch.cat([q_nope, self.rotated(q_rope)], dim=-1)
        k = torch.cat([k_nope, self.rotated(k_rope[:, None]).expand(-1, heads, -1, -1)], dim=-1)
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale)
        return self.linear(f"{name}.o_proj", out.transpose(1, 2).flatten(2))

    @staticmethod
    def mscale(factor: float, mscale: float) -> float:
        return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1 else 1.0

    def rotated(self, x: Tensor) -> Tensor:
        """Pairs of neighbours are rotated, always."""
        base, width, scaling = self.config["rope_theta"], x.shape[-1], self.config["rope_scaling"] or {}
        freqs, factor = 1.0 / base ** (torch.arange(0, width, 2) / width), 1.0
        match scaling.get("type"):
            case "linear":
                freqs = freqs / scaling["factor"]
            case "yarn":
                by, context = scaling["factor"], scaling.get("original_max_position_embeddings", 4096)

                def dim(rotations):
                    return width * math.log(context / (rotations * 2 * math.pi)) / (2 * math.log(base))

                low = max(math.floor(dim(scaling.get("beta_fast", 32))), 0)
                high = min(math.ceil(dim(scaling.get("beta_slow", 1))), width - 1)
                ramp = ((torch.arange(width // 2) - low) / (high - low or 0.001)).clamp(0, 1)
                freqs = freqs / by * ramp + freqs * (1 - ramp)
                factor = self.mscale(by, scaling.get("mscale", 1)) / self.mscale(by, scaling.get("mscale_all_dim", 0))
        angles = torch.arange(x.shape[-2])[:, None] * freqs
        pairs = torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous())
        return torch.view_as_real(pairs * torch.polar(torch.full_like(angles, factor), angles)).flatten(-2)


@pytest.mark.contract(AREA, "a reader of ours with the defaults of DeepSeek's configuration class")
@pytest.mark.parametrize("name", VARIANTS)
def test_deepseeks_own_code(name, variant, tmp_path):
    folder, model = variant(**VARIANTS[name])
    config = export(folder, tmp_path / "theirs")
    assert set(RELEASED) <= config.keys() and config["use_cache"] is True
    assert close(DeepSeek(tmp_path / "theirs")(IDS), our_logits(model))


@pytest.mark.contract(AREA, "transformers.DeepseekV3ForCausalLM")
@pytest.mark.parametrize("name", VARIANTS)
def test_transformers(name, variant, tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder, model = variant(**VARIANTS[name])
    export(folder, tmp_path / "theirs")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "theirs").eval()
    assert type(theirs).__name__ == "DeepseekV3ForCausalLM" and theirs.generation_config.use_cache is not False
    assert close(our_logits(theirs), our_logits(model))
    text = "The whale sings."
    assert (
        AutoTokenizer.from_pretrained(tmp_path / "theirs")(text)["input_ids"]
        == open_checkpoint(folder)[1](text)["input_ids"]
    )


OLDER = """
import sys
sys.path.insert(0, sys.argv[1])
import torch, transformers
from transformers import AutoModelForCausalLM
assert transformers.__version__.startswith("4."), transformers.__version__
model = AutoModelForCausalLM.from_pretrained(sys.argv[2]).eval()
with torch.no_grad():
    torch.save(model(torch.load(sys.argv[3]), use_cache=False).logits, sys.argv[4])
"""


@pytest.mark.contract(AREA, "transformers 4.57")
@pytest.mark.parametrize("name", VARIANTS)
def test_transformers_4(name, variant, tmp_path):
    """Version 4 reads `rope_theta` and `rope_scaling`, not `rope_parameters`."""
    older = os.environ.get("MOONWHALE_TRANSFORMERS_4")
    if not older:
        pytest.skip("MOONWHALE_TRANSFORMERS_4 names no folder with transformers 4")
    folder, model = variant(**VARIANTS[name])
    export(folder, tmp_path / "theirs")
    ids, result = tmp_path / "ids.pt", tmp_path / "logits.pt"
    torch.save(IDS, ids)
    command = [sys.executable, "-c", OLDER, *map(str, (older, tmp_path / "theirs", ids, result))]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert close(torch.load(result), our_logits(model))


@pytest.mark.contract(AREA, "transformers' trust_remote_code")
def test_the_code_reads_a_trained_checkpoint(trained_checkpoint, tmp_path):
    from transformers import AutoModelForCausalLM

    model, _ = open_checkpoint(trained_checkpoint)
    assert export(trained_checkpoint, tmp_path / "alone", "--to", "code").get("use_cache", True) is True
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "alone", trust_remote_code=True).eval()
    assert theirs.config.use_cache is True and torch.equal(our_logits(theirs), our_logits(model))


@pytest.mark.contract(AREA, "transformers.DeepseekV3ForCausalLM")
@pytest.mark.parametrize(
    ("overrides", "why"),
    [
        ({"n_shared_experts": 0}, "blocks have a shared expert (n_shared_experts is 0)"),
        ({"n_routed_experts": 1, "num_experts_per_tok": 1}, "compares at least two experts (n_routed_experts is 1)"),
        ({"scoring_func": "softmax"}, "scores by sigmoid, not softmax"),
    ],
)
def test_what_deepseek_v3_cannot_hold_is_refused(overrides, why, variant, tmp_path, capsys):
    folder, _ = variant(**overrides)
    capsys.readouterr()
    assert cli(["export", str(folder), "--out", str(tmp_path / "theirs")]) == 2
    said = capsys.readouterr().err
    assert why in said and len(said.splitlines()) == 1 and not (tmp_path / "theirs").exists()
