"""Our model and transformers' DeepseekV3ForCausalLM exchange weights and agree: logits, gradients, cache and text."""

import dataclasses
import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

from moonwhale.model import MoonwhaleConfig, MoonwhaleForCausalLM, core, mla
from moonwhale.model.mla import MultiheadLatentAttention
from moonwhale.model.moe import Router, Routing

# Relative to the largest value compared. fp32 rounding explains 3e-6; bf16 has 8 bits, and its errors add up.
TOLERANCES = {"fp32": 3e-5, "bf16": 0.12}
TOLERANCE = TOLERANCES["fp32"]
ALL_EXPERTS = {"num_experts_per_tok": 6}  # so that bf16's rounding changes no choice
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 16}

VARIANTS = {
    "plain": {},
    "uncompressed queries": {"q_lora_rank": None},
    "dense first": {"num_hidden_layers": 3, "first_k_dense_replace": 2},
    "groups": {"n_routed_experts": 8, "n_group": 4, "topk_group": 2},
    "halves": {"rope_interleave": False},
    "yarn": {"rope_parameters": YARN | {"mscale": 1.0, "mscale_all_dim": 0.7}},
    "yarn without mscale": {"rope_parameters": YARN, "rope_interleave": False},
    "tied": {"tie_word_embeddings": True},
    "biases": {"attention_bias": True},
    "epsilon of the block's norms alone": {"rms_norm_eps": 0.1},
    "gates as they are": {"norm_topk_prob": False},
    "scaled gates": {"routed_scaling_factor": 2.5, "num_experts_per_tok": 4, "n_shared_experts": 2},
    "moba over everything": {"moba_topk": 8, "moba_block_size": 4},
}


@pytest.fixture
def pair(tiny_model, draw):
    """`pair(**overrides)` returns our model and transformers', with the same weights."""

    def pair(seed=0, **overrides):
        ours = tiny_model(seed=seed, aux_loss_alpha=0.0, **overrides)
        theirs = DeepseekV3ForCausalLM(their_config(ours.config)).eval().to(ours.device)
        theirs.load_state_dict(ours.state_dict(), strict=True)
        return ours, theirs

    return pair


def their_config(config: MoonwhaleConfig) -> DeepseekV3Config:
    names = {f.name for f in dataclasses.fields(DeepseekV3Config)}
    return DeepseekV3Config(**{k: v for k, v in config.to_dict().items() if k in names})


def batch(padding: str | None = None):
    """Returns ids (3, 22), mask and labels; first tokens have no label. Padded rows have 22, 17 and 9 tokens."""
    ids = torch.randint(61, (3, 22), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    for row, tokens in enumerate((22, 17, 9)):
        if padding == "left":
            mask[row, : 22 - tokens] = 0
        elif padding == "right":
            mask[row, tokens:] = 0
    return ids, mask, ids.masked_fill(mask.cumsum(1) * mask <= 1, -100)


def distance(ours, theirs) -> float:
    return ((ours - theirs).abs().max() / theirs.abs().max()).item()


def assert_same_logits(ours, theirs, padding=None, dtype="fp32"):
    """Compares our model in this precision with theirs in fp32."""
    ids, mask, _ = batch(padding)
    logits = []
    for model in (ours, theirs):
        in_bf16 = model is ours and dtype == "bf16"
        with torch.no_grad(), torch.autocast(ids.device.type, torch.bfloat16, enabled=in_bf16):
            logits.append(model(ids, attention_mask=mask, use_cache=False).logits[mask.bool()])
    assert distance(*logits) < TOLERANCES[dtype]


def assert_same_gradients(ours, theirs, padding=None, dtype="fp32"):
    ids, mask, labels = batch(padding)
    losses = []
    for model in (ours, theirs):
        model.train()
        with torch.autocast(ids.device.type, torch.bfloat16, enabled=model is ours and dtype == "bf16"):
            losses.append(model(ids, attention_mask=mask, labels=labels, use_cache=False).loss)
        losses[-1].backward()
    assert distance(*losses) < TOLERANCES[dtype]
    gradients = dict(theirs.named_parameters())
    for name, p in ours.named_parameters():
        assert distance(p.grad, gradients[name].grad) < TOLERANCES[dtype], name


def assert_same_decoding(ours, theirs):
    """A prefill of 9 tokens and single steps agree between both caches, with rows padded on the left."""
    ids, mask, _ = batch("left")
    caches = {ours: None, theirs: None}
    for stop in (16, *range(17, 23)):
        start = 0 if stop == 16 else stop - 1
        logits = []
        for model in caches:
            with torch.no_grad():
                position_ids = (mask.cumsum(1) - 1).clamp(min=0)[:, start:stop]
                out = model(
                    ids[:, start:stop],
                    attention_mask=mask[:, :stop],
                    position_ids=position_ids,
                    past_key_values=caches[model],
                    use_cache=True,
                )
            caches[model] = out.past_key_values
            logits.append(out.logits[mask[:, start:stop].bool()])
        assert distance(*logits) < TOLERANCE, f"tokens {start} to {stop}"
    for layer in caches[ours].layers:
        numbers = layer.keys.shape[1] * layer.keys.shape[-1] + layer.values.shape[1] * layer.values.shape[-1]
        assert numbers == ours.config.kv_cache_numbers_per_token


@pytest.mark.parametrize("overrides", VARIANTS.values(), ids=VARIANTS)
class TestSameModel:
    def test_weights_convert_both_ways(self, overrides, pair, draw):
        ours, theirs = pair(**overrides)
        assert_same_logits(ours, theirs)
        draw(theirs, seed=5)
        with pytest.raises(AssertionError):
            assert_same_logits(ours, theirs)
        ours.load_state_dict(theirs.state_dict(), strict=True)
        assert_same_logits(ours, theirs)

    @pytest.mark.parametrize("padding", [None, "left", "right"])
    def test_logits_and_gradients(self, padding, overrides, pair):
        ours, theirs = pair(**overrides)
        assert_same_logits(ours, theirs, padding)
        assert_same_gradients(ours, theirs, padding)

    def test_bf16(self, overrides, pair):
        if "n_group" in overrides or overrides.get("rms_norm_eps") == 0.1:
            pytest.skip("bf16 rounding changes the chosen groups, or is enlarged by tiny activations")
        ours, theirs = pair(**overrides | ALL_EXPERTS)
        assert_same_logits(ours, theirs, dtype="bf16")
        assert_same_gradients(ours, theirs, dtype="bf16")

    def test_cached_decoding_and_greedy_text(self, overrides, pair):
        ours, theirs = pair(**overrides)
        assert_same_decoding(ours, theirs)
        ids, mask, _ = batch("left")
        texts = [m.generate(ids, attention_mask=mask, do_sample=False, max_new_tokens=10) for m in (ours, theirs)]
        assert torch.equal(*texts) and texts[0].shape == (3, 32)


@pytest.mark.cpu_only
def test_files_load_both_ways(pair, draw, tmp_path):
    ours, theirs = pair(q_lora_rank=None, first_k_dense_replace=1)
    ours.save_pretrained(tmp_path / "ours")
    loaded, report = DeepseekV3ForCausalLM.from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not any(report.values())
    assert_same_logits(ours, loaded)

    draw(theirs, seed=5).save_pretrained(tmp_path / "theirs")  # one tensor per expert, as in DeepSeek's own files
    assert "model.layers.1.mlp.experts.0.up_proj.weight" in load_file(tmp_path / "theirs" / "model.safetensors")
    loaded, report = MoonwhaleForCausalLM.from_pretrained(
        tmp_path / "theirs", output_loading_info=True, num_nextn_predict_layers=0
    )
    assert not any(report.values())
    assert_same_logits(loaded, theirs)

    loaded.save_pretrained(tmp_path / "again")  # stacked experts, as the Trainer reads them
    assert json.loads((tmp_path / "again" / "config.json").read_text())["model_type"] == "moonwhale"
    assert load_file(tmp_path / "again" / "model.safetensors").keys() == loaded.state_dict().keys()
    loaded.save_pretrained(tmp_path / "export", save_original_format=True)
    exported, original = (load_file(tmp_path / name / "model.safetensors") for name in ("export", "theirs"))
    assert exported.keys() == original.keys()
    assert all(torch.equal(exported[name], original[name]) for name in original)


@pytest.mark.cpu_only
def test_their_loader_ignores_our_mtp_modules(tiny_model, tmp_path):
    ours = tiny_model(num_nextn_predict_layers=2, mtp_num_blocks=[2, 1])
    ours.save_pretrained(tmp_path)
    theirs, report = DeepseekV3ForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not report["missing_keys"] and not report["mismatched_keys"]
    assert all(name.startswith(("model.layers.2.", "model.layers.3.")) for name in report["unexpected_keys"])
    assert theirs.config.num_mtp_layers == 2
    assert_same_logits(ours, theirs)


# --- mutants: each is a bug found in some implementation --------------------------------------------------------------


def caught(check, *args):
    with pytest.raises(AssertionError):
        check(*args)


def caught_in_both(pair, **overrides):
    caught(assert_same_logits, *pair(**overrides))
    caught(assert_same_logits, *pair(**overrides | ALL_EXPERTS), None, "bf16")


@pytest.mark.parametrize("scale", [lambda c: c.qk_head_dim * -0.5, lambda c: c.qk_nope_head_dim**-0.5])
def test_mutant_softmax_scale(scale, pair, monkeypatch):
    monkeypatch.setattr(MoonwhaleConfig, "attention_scale", scale)
    caught_in_both(pair)


def test_mutant_mscale_once(pair, monkeypatch):
    right = MoonwhaleConfig.attention_scale
    monkeypatch.setattr(MoonwhaleConfig, "attention_scale", lambda c: (right(c) * c.qk_head_dim**-0.5) ** 0.5)
    assert_same_logits(*pair())
    caught_in_both(pair, **VARIANTS["yarn"])


@pytest.mark.parametrize("interleaved", [True, False])
def test_mutant_rope_interleaving(interleaved, pair, monkeypatch):
    right = mla.rotate
    monkeypatch.setattr(mla, "rotate", lambda x, table, interleaved: right(x, table, not interleaved))
    caught_in_both(pair, rope_interleave=interleaved)


def test_mutant_rotary_key_of_each_head(pair, monkeypatch):
    right = MultiheadLatentAttention._expanded

    def per_head(self, q, latent, k_rope, layout):
        return right(self, q, latent, torch.cat([k_rope.roll(h, 2) for h in range(self.heads)], dim=1), layout)

    monkeypatch.setattr(MultiheadLatentAttention, "_expanded", per_head)
    caught_in_both(pair)


def test_mutant_bias_in_the_gates(pair, monkeypatch):
    right = Router.forward

    def biased(self, x):
        scores, index, _ = right(self, x)
        gates = (scores + self.e_score_correction_bias).gather(1, index)
        return Routing(scores, index, gates / gates.sum(-1, keepdim=True))

    monkeypatch.setattr(Router, "forward", biased)
    caught_in_both(pair)


def test_mutant_shut_groups_score_zero(pair, monkeypatch):
    def choose(self, scores):
        grouped = scores.view(len(scores), self.groups, -1)
        best = grouped.topk(2, dim=-1).values.sum(-1).topk(self.topk_groups, dim=-1).indices
        opened = torch.zeros(grouped.shape[:2], dtype=torch.bool, device=scores.device).scatter_(1, best, True)
        return grouped.masked_fill(~opened[..., None], 0.0).flatten(1).topk(self.topk, dim=-1).indices

    models = pair(**VARIANTS["groups"])
    for model in models:
        for name, bias in model.named_buffers():
            if name.endswith("e_score_correction_bias"):
                bias -= 2.0  # every expert that may be chosen scores below zero
    assert_same_logits(*models)
    monkeypatch.setattr(Router, "choose", choose)
    caught(assert_same_logits, *models)


def test_mutant_prefill_that_is_not_causal(pair, monkeypatch):
    right = core.attend
    monkeypatch.setattr(core, "attend", lambda *args, causal, **kwargs: right(*args, causal=False, **kwargs))
    caught(assert_same_decoding, *pair())


def test_mutant_absorbed_values_of_another_head(pair, monkeypatch):
    right = MultiheadLatentAttention._split_up

    def split_up(self):
        w_k, w_v = right(self)
        return w_k, w_v.roll(1, 0)

    monkeypatch.setattr(MultiheadLatentAttention, "_split_up", split_up)
    caught(assert_same_decoding, *pair())
