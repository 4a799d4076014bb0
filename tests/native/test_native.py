"""Compares steps in C++ with the same steps in PyTorch, for the vectors of this machine and of lesser ones.

tests/infer/test_decoder.py compares both with the model.
"""

import copy
import ctypes
import math

import levels
import pytest
import torch

from moonwhale.infer.decoder import Decoder
from moonwhale.native import build
from moonwhale.native.packed_linear import PackedLinear
from moonwhale.native.structures import STRUCTURES
from relative_error import relative_error

SHAPES = {  # the latent and its rotary key are several whole SIMD vectors of 16 or 8, and a remainder
    "hidden_size": 48,
    "num_attention_heads": 5,
    "q_lora_rank": 40,
    "kv_lora_rank": 72,
    "qk_nope_head_dim": 20,
    "qk_rope_head_dim": 12,
    "v_head_dim": 24,
    "moe_intermediate_size": 40,
    "moba_block_size": 16,
    "moba_topk": 3,
    "max_position_embeddings": 512,
}
PROMPT = 300  # several pieces of full attention, many blocks of MoBA


MUTANTS = {  # expressions: file, right, wrong
    "the gate takes the worst blocks": ("attention.h", "gates[i] > gates[j]", "gates[i] < gates[j]"),
    "block means are never written": ("attention.h", "(position(t) + 1) % w.block_size", "true"),
    "a step takes full attention": ("attention.h", "topk && position(token) / w.block_size >= topk", "false"),
    "every token is rotated as if it were the first": ("attention.h", "p.cos + position * half", "p.cos"),
    "pieces are merged without their scales": ("attention.h", "std::exp(top[place + k] - largest)", "1"),
    "experts are chosen without the bias": (
        "experts.h",
        "scores[i] + w.bias[i] > scores[j] + w.bias[j]",
        "scores[i] > scores[j]",
    ),
    "the rest after whole vectors is lost": ("products.h", "sum(total[o][r]) + rest", "sum(total[o][r])"),
}


@pytest.fixture(params=levels.LEVELS)
def mutants(request, tmp_path_factory) -> ctypes.CDLL:
    return levels.library("step", MUTANTS, request.param, tmp_path_factory.getbasetemp())


@pytest.fixture(autouse=True)
def library(request, mutants, monkeypatch):
    """Each test runs at each level. At this machine's, it takes the steps that users run."""
    if request.node.callspec.params["mutants"] != "this machine":
        monkeypatch.setattr(build, "library", lambda name: mutants)


@pytest.fixture
def model(tiny_model):
    return tiny_model(**SHAPES, moba_full_attention_layers=[1])


def tokens(*shape, seed=0):
    return torch.randint(61, shape, generator=torch.Generator().manual_seed(seed))


def read(decoder, rows=1):
    """Return a cache with a prompt in each of `rows` slots."""
    cache = decoder.cache()
    cache.resize(rows, PROMPT + 16)
    for i in range(rows):
        decoder.run(tokens(1, PROMPT, seed=i), cache, decoder.place(cache, i, [0], PROMPT))
    return cache


def steps(decoder, cache, lengths=(1, 2, 3, 1)):
    """Return hidden states of steps of these lengths after the prompt, and the cache's tensors after them."""
    at, out = PROMPT, []
    for n in lengths:
        out.append(decoder.run(tokens(1, n, seed=at), cache, decoder.place(cache, 0, [at], n)))
        at += n
    return torch.cat(out, dim=1).float(), *(x.float() for x in (*cache.keys, cache.means[0]))


def in_pytorch(model, monkeypatch, **options):
    with monkeypatch.context() as patch:
        patch.setattr(build, "supports", lambda weight: False)
        return Decoder(model, **options)


def distances(some, others):
    return [relative_error(x, y) for x, y in zip(some, others, strict=True)]


@pytest.mark.parametrize("int8", [False, True], ids=["", "int8"])
@torch.inference_mode()
def test_native_steps_equal_pytorchs(model, monkeypatch, int8):
    compiled, naive = Decoder(model, int8=int8), in_pytorch(model, monkeypatch, int8=int8)
    assert max(distances(steps(compiled, read(compiled)), steps(naive, read(naive)))) < 1e-5


@pytest.mark.parametrize("int8", [False, True], ids=["bf16", "int8"])
@torch.inference_mode()
def test_low_precision_steps_are_closer_to_exact_than_pytorchs(model, monkeypatch, int8):
    """Exact steps use the same bf16 weights, with everything else in fp32."""
    model = model.to(torch.bfloat16)
    compiled, naive = Decoder(model, int8=int8), in_pytorch(model, monkeypatch, int8=int8)
    exact = in_pytorch(copy.deepcopy(model).float(), monkeypatch, int8=int8)
    prompt = read(naive)
    started = exact.cache()
    started.resize(1, prompt.length)
    for ours, theirs in zip((*started.keys, started.means[0]), (*prompt.keys, prompt.means[0]), strict=True):
        ours.copy_(theirs)
    want = steps(exact, started)
    far = distances(steps(naive, copy.deepcopy(prompt)), want)
    near = distances(steps(compiled, copy.deepcopy(prompt)), want)
    assert near[0] < 0.75 * far[0] < 0.02
    assert all(close <= away < math.inf for close, away in zip(near, far, strict=True))


@torch.inference_mode()
def test_a_token_is_bitwise_equal_in_any_batch(model):
    """The number of threads, other sequences and other tokens of the same sequence change nothing."""
    decoder = Decoder(model.to(torch.bfloat16))
    cache, threads = read(decoder, rows=5), torch.get_num_threads()
    new = torch.cat([tokens(1, 3, seed=10 + i) for i in range(5)])
    together = decoder.run(new, cache, decoder.place(cache, 0, [PROMPT] * 5, 3))
    head = decoder.head(together)
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            for i in range(5):
                alone = [
                    decoder.run(new[i : i + 1, k : k + 1], cache, decoder.place(cache, i, [PROMPT + k], 1))
                    for k in range(3)
                ]
                assert torch.equal(torch.cat(alone, dim=1)[0], together[i])
                assert torch.equal(decoder.head(together[i]), head[i])
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("size", [1, 7, 16, 33, 100])
@pytest.mark.parametrize("rows", range(1, 10))
def test_products_of_every_shape(size, rows):
    generator = torch.Generator().manual_seed(0)
    weight, bias = torch.randn(11, size, generator=generator), torch.randn(11, generator=generator)
    x = torch.randn(rows, size, generator=generator)
    torch.testing.assert_close(PackedLinear(weight, bias)(x), x @ weight.T + bias)


def test_structures_have_the_size_of_their_cpp_twins():
    ours = list(STRUCTURES.values())
    assert build.library("step").sizes()[: len(ours)] == [ctypes.sizeof(structure) for structure in ours]


@pytest.mark.parametrize("number", range(1, 1 + len(MUTANTS)), ids=MUTANTS)
@torch.inference_mode()
def test_mutants_are_caught(model, mutants, monkeypatch, number):
    for layer in model.model.layers[: model.config.num_hidden_layers]:
        layer.mlp.gate.e_score_correction_bias.copy_(torch.linspace(1, 0, model.config.n_routed_experts))
    naive = in_pytorch(model, monkeypatch)
    want = steps(naive, read(naive), [1] * 20)[0]
    monkeypatch.setattr(build, "library", lambda name: mutants)
    decoder = Decoder(model)
    assert (steps(decoder, read(decoder), [1] * 20)[0] - want).norm() < 1e-5 * want.norm()
    with levels.mutated(mutants, number):
        assert (steps(decoder, read(decoder), [1] * 20)[0] - want).norm() > 1e-3 * want.norm()


@pytest.mark.parametrize("topk", [PROMPT, 10**9])
@torch.inference_mode()
def test_more_chosen_blocks_than_there_are_is_full_attention(tiny_model, topk):
    out = []
    for k in (topk, 0):
        decoder = Decoder(tiny_model(**SHAPES | {"moba_topk": k}))
        cache = read(decoder)
        out.append(decoder.run(tokens(1, 1), cache, decoder.place(cache, 0, [PROMPT], 1)))
    assert torch.equal(*out)


@torch.inference_mode()
def test_a_step_outside_the_cache_is_refused(model):
    decoder = Decoder(model)
    cache = read(decoder)
    before = [keys.clone() for keys in cache.keys]
    for slot, start in ((1, PROMPT), (-1, PROMPT), (0, cache.length), (0, -1)):
        placement = decoder.place(cache, 0, [PROMPT], 1)
        structure = placement.for_native
        structure.first_slot = slot
        placement._start.fill_(start)
        with pytest.raises(IndexError, match="outside the cache"):
            decoder.run(tokens(1, 1), cache, placement)
    assert all(torch.equal(keys, old) for keys, old in zip(cache.keys, before, strict=True))


@pytest.mark.parametrize("size", [1, 5, 8, 2**40])
@torch.inference_mode()
def test_blocks_of_another_size_than_the_caches_are_refused(model, size):
    decoder = Decoder(model)
    cache = read(decoder)
    before = [means.clone() for means in cache.means if means is not None]
    decoder.main[0].native._block.attention.block_size = size  # more or fewer means than the cache has
    with pytest.raises(ValueError, match="contradict each other"):
        decoder.run(tokens(1, 1), cache, decoder.place(cache, 0, [PROMPT], 1))
    now = [means for means in cache.means if means is not None]
    assert all(torch.equal(means, old) for means, old in zip(now, before, strict=True))


@torch.inference_mode()
def test_a_step_without_memory_says_so(model):
    decoder = Decoder(model)
    cache = read(decoder)
    decoder.main[0].native._block.attention.heads = 2**40  # numbers that no machine can hold
    with pytest.raises(MemoryError, match="no memory"):
        decoder.run(tokens(1, 1), cache, decoder.place(cache, 0, [PROMPT], 1))
