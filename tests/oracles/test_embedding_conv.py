"""The convolution on embeddings against `F.conv1d`, document by document, and over every cache of transformers."""

import pytest
import torch
import torch.nn.functional as F
from transformers import DynamicCache, StaticCache

from moonwhale.model import Documents, convolution
from moonwhale.model.convolution import EmbeddingConvolution

WIDTH = 3
IDS = torch.randint(61, (2, 14), generator=torch.Generator().manual_seed(0))
POSITIONS = torch.tensor([[*range(6), *range(8)], [*range(1), *range(13)]])  # two packed documents in each row


def convolved_by_torch(x, weight):
    """x (T, C) of one document plus its causal convolution."""
    return x + F.conv1d(F.pad(x.T, (weight.shape[-1] - 1, 0)), weight, groups=len(weight)).T


def assert_is_conv1d():
    torch.manual_seed(0)
    module, x = EmbeddingConvolution(WIDTH, 8), torch.randn(2, 14, 8, requires_grad=True)
    torch.nn.init.normal_(module.weight)
    documents = Documents.from_inputs(2, 14, "cpu", None, POSITIONS)
    out = module(x, documents)
    expected = [
        torch.cat([convolved_by_torch(document, module.weight) for document in row.split(lengths)])
        for row, lengths in zip(x, ([6, 8], [1, 13]), strict=True)
    ]
    assert torch.allclose(out, torch.stack(expected), atol=1e-6)
    seed = torch.randn_like(out)
    ours = torch.autograd.grad(out, (x, module.weight), seed)
    theirs = torch.autograd.grad(torch.stack(expected), (x, module.weight), seed)
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(ours, theirs, strict=True))


def test_it_is_conv1d_of_each_document():
    assert_is_conv1d()


def test_a_new_convolution_is_none_and_learns(starts_as_nothing):
    model = starts_as_nothing(IDS, embedding_conv=WIDTH)
    assert model.model.embed_conv.weight.grad.abs().min() > 0


def test_it_learns_as_fast_as_the_embedding(tiny_model, learns_like_the_embedding):
    model = tiny_model(embedding_conv=WIDTH)
    learns_like_the_embedding(model, model.model.embed_conv.weight)


# --- caches ----------------------------------------------------------------------------------------------------------

CACHES = {
    "made by the model": lambda config: None,
    "dynamic": lambda config: DynamicCache(),
    "dynamic, of the configuration": lambda config: DynamicCache(config=config),
    "static": lambda config: StaticCache(config=config, max_cache_len=32),
}
PADDED = torch.ones_like(IDS)
PADDED[1, :5] = 0


def assert_steps_equal_the_whole(model, cache, mask=None):
    with torch.no_grad():
        whole = model(IDS, attention_mask=mask, use_cache=False).logits
        at, pieces = 0, []
        for length in (7, 1, 1, 3, 2):
            piece = IDS[:, at : at + length]
            at += length
            out = model(
                piece, attention_mask=None if mask is None else mask[:, :at], past_key_values=cache, use_cache=True
            )
            cache = out.past_key_values
            pieces.append(out.logits)
    real = torch.ones_like(IDS).bool() if mask is None else mask.bool()
    assert torch.allclose(torch.cat(pieces, 1)[real], whole[real], atol=1e-5)
    assert cache.get_seq_length() == at


@pytest.mark.parametrize("mask", [None, PADDED], ids=["", "padded"])
@pytest.mark.parametrize("make", CACHES.values(), ids=CACHES)
def test_cached_steps_equal_the_whole(make, mask, tiny_model):
    model = tiny_model(embedding_conv=WIDTH)
    assert_steps_equal_the_whole(model, make(model.config), mask)


def test_a_cropped_and_reordered_cache_keeps_the_right_embeddings(tiny_model):
    model = tiny_model(embedding_conv=WIDTH)
    with torch.no_grad():
        cache = model(IDS, use_cache=True).past_key_values
        cache.crop(-5)
        cache.reorder_cache(torch.tensor([1, 0]))
        swapped = IDS.flip(0)
        step = model(swapped[:, 9:], past_key_values=cache).logits
        assert torch.allclose(step, model(swapped, use_cache=False).logits[:, 9:], atol=1e-5)


# --- mutants ---------------------------------------------------------------------------------------------------------


def test_mutant_ahead(monkeypatch):
    right = convolution.depthwise_convolution
    monkeypatch.setattr(convolution, "depthwise_convolution", lambda *args: right(*args).roll(-1, 1))
    with pytest.raises(AssertionError):
        assert_is_conv1d()


def test_mutant_across_documents(monkeypatch):
    right = convolution.depthwise_convolution
    monkeypatch.setattr(
        convolution, "depthwise_convolution", lambda x, w, p: right(x, w, torch.arange(p.shape[1]).expand_as(p))
    )
    with pytest.raises(AssertionError):
        assert_is_conv1d()


def test_mutant_forgets_what_is_cached(tiny_model, monkeypatch):
    model = tiny_model(embedding_conv=WIDTH)
    monkeypatch.setattr(
        EmbeddingConvolution, "continue_from", lambda self, cache, layer, embeds, documents: self(embeds, documents)
    )
    with pytest.raises(AssertionError):
        assert_steps_equal_the_whole(model, None)
