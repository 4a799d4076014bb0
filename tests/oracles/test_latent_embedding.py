"""Embeddings added to latents, against transformers' DeepSeek-V3 with the same rows added after its latents' norm."""

import pytest
import torch
import torch.nn.functional as F
from transformers import DeepseekV3ForCausalLM, DynamicCache, StaticCache

from moonwhale.model import MoonwhaleForCausalLM
from moonwhale.model.mla import MultiheadLatentAttention

from .test_deepseek_v3 import batch, distance, their_config

EVERY, LAYERS = 2, [1]  # every second of two blocks
IDS, _, LABELS = batch()


@pytest.fixture
def pair(tiny_model):
    """Our model with latent embeddings and transformers' model, whose norm of latents adds the same rows to them."""
    ours = tiny_model(latent_embedding_every=EVERY, aux_loss_alpha=0.0)
    theirs = DeepseekV3ForCausalLM(their_config(ours.config)).eval().to(ours.device)
    weights = ours.state_dict()
    tables = {i: weights.pop(f"model.layers.{i}.self_attn.latent_embedding.weight").clone() for i in LAYERS}
    theirs.load_state_dict(weights, strict=True)
    for i, table in tables.items():
        table.requires_grad_()
        norm = theirs.model.layers[i].self_attn.kv_a_layernorm
        norm.register_forward_hook(lambda module, args, out, table=table: out + F.embedding(theirs.ids, table))
    theirs.ids, theirs.tables = IDS.to(ours.device), tables
    return ours, theirs


def assert_same(ours, theirs):
    for model in (ours, theirs):
        model.zero_grad()
    assert distance(ours(IDS).logits, theirs(theirs.ids).logits) < 3e-5
    ours(IDS, labels=LABELS).loss.backward()
    theirs(theirs.ids, labels=LABELS).loss.backward()
    for i, table in theirs.tables.items():
        assert distance(ours.model.layers[i].self_attn.latent_embedding.weight.grad, table.grad) < 3e-5
        table.grad = None


def test_logits_and_gradients_are_those_of_transformers(pair):
    assert_same(*pair)


def test_a_new_embedding_is_none_and_learns(starts_as_nothing):
    model = starts_as_nothing(IDS, latent_embedding_every=EVERY)
    rows = model.model.layers[1].self_attn.latent_embedding.weight.grad.abs().amax(1)
    assert rows[IDS.unique()].min() > 0


def test_it_learns_as_fast_as_the_embedding(tiny_model, learns_like_the_embedding):
    model = tiny_model(latent_embedding_every=EVERY)
    learns_like_the_embedding(model, model.model.layers[1].self_attn.latent_embedding.weight)


def test_asking_for_the_embedding_replaces_no_table(tiny_model):
    model = tiny_model(latent_embedding_every=EVERY)
    before = dict(model.named_parameters())
    model.resize_token_embeddings()  # which returns the embedding
    assert all(parameter is before[name] for name, parameter in model.named_parameters())


@pytest.mark.parametrize("moba", [{}, {"moba_topk": 2, "moba_block_size": 4, "moba_key_conv": 2}], ids=["", "moba"])
@pytest.mark.parametrize("make", [DynamicCache, StaticCache], ids=["dynamic", "static"])
def test_cached_steps_equal_the_whole(make, moba, tiny_model):
    model = tiny_model(latent_embedding_every=1, **moba)
    cache = StaticCache(config=model.config, max_cache_len=32) if make is StaticCache else DynamicCache()
    with torch.no_grad():
        whole = model(IDS, use_cache=False).logits
        steps = [
            model(piece, past_key_values=cache, use_cache=True).logits for piece in IDS.split([9, 1, 1, 5, 1, 5], dim=1)
        ]
    assert torch.allclose(torch.cat(steps, 1), whole, atol=1e-5)


def test_embeddings_as_prompts_are_refused(tiny_model):
    model = tiny_model(latent_embedding_every=EVERY)
    with pytest.raises(ValueError, match="give input_ids: latent_embedding_every looks tokens up"):
        model(inputs_embeds=model.model.embed_tokens(IDS))


def test_mtp_modules_have_none(tiny_config):
    model = MoonwhaleForCausalLM(tiny_config(latent_embedding_every=1, num_nextn_predict_layers=2))
    assert [layer.self_attn.latent_embedding is not None for layer in model.model.layers] == [True, True, False, False]


def test_the_plain_twin_has_no_latents(tiny_config):
    model = MoonwhaleForCausalLM(tiny_config(attention="gqa", latent_embedding_every=1))
    assert not any("latent" in name for name, _ in model.named_parameters())


# --- mutants ---------------------------------------------------------------------------------------------------------


def test_mutant_added_before_the_norm(pair, monkeypatch):
    right = MultiheadLatentAttention._project

    def before_the_norm(self, x, rotation, input_ids):
        if (table := self.latent_embedding) is None:
            return right(self, x, rotation, input_ids)
        hook = self.kv_a_layernorm.register_forward_pre_hook(lambda module, args: (args[0] + table(input_ids),))
        self.latent_embedding = None
        try:
            return right(self, x, rotation, input_ids)
        finally:
            self.latent_embedding = table
            hook.remove()

    monkeypatch.setattr(MultiheadLatentAttention, "_project", before_the_norm)
    with pytest.raises(AssertionError):
        assert_same(*pair)


def test_mutant_of_the_token_before(pair, monkeypatch):
    right = MultiheadLatentAttention._project
    monkeypatch.setattr(
        MultiheadLatentAttention, "_project", lambda self, x, rotation, ids: right(self, x, rotation, ids.roll(1, 1))
    )
    with pytest.raises(AssertionError):
        assert_same(*pair)
