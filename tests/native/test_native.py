"""Compares steps in C++ with the same steps in PyTorch. tests/infer/test_decoder.py compares both with the model."""

import copy
import ctypes
import platform
import shutil

import pytest
import torch

from moonwhale.errors import UserError
from moonwhale.infer.decoder import Decoder
from moonwhale.native import build
from moonwhale.native.packed_linear import PackedLinear
from moonwhale.native.structures import STRUCTURES

SHAPES = {  # widths are several whole SIMD vectors and a remainder
    "hidden_size": 48,
    "num_attention_heads": 5,
    "q_lora_rank": 40,
    "kv_lora_rank": 72,
    "qk_nope_head_dim": 20,
    "qk_rope_head_dim": 8,
    "v_head_dim": 24,
    "moe_intermediate_size": 40,
    "moba_block_size": 16,
    "moba_topk": 3,
    "max_position_embeddings": 512,
}
PROMPT = 300  # several pieces of full attention, many blocks of MoBA


@pytest.fixture(autouse=True)
def _compiler():
    if reason := build.unavailable_reason():
        pytest.skip(reason)


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
    return [((x - y).norm() / y.norm()).item() for x, y in zip(some, others, strict=True)]


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
    assert all(close <= away for close, away in zip(near, far, strict=True))


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
    assert build.library().sizes()[: len(ours)] == [ctypes.sizeof(structure) for structure in ours]


def test_without_a_compiler_steps_run_in_pytorch_with_a_message(model, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "which", lambda name: None)
        with pytest.raises(UserError, match="install g\\+\\+"):
            build.library.__wrapped__()
        patch.setattr(build, "library", build.library.__wrapped__)
        assert build.unavailable_reason.__wrapped__() == "no C++ compiler found (install g++)"
    assert in_pytorch(model, monkeypatch).main[0].native is None


def test_a_compiler_that_fails_says_why(tmp_path):
    (tmp_path / "step.cpp").write_text("int broken(")
    with pytest.raises(UserError, match=r"can't compile decoding steps: .*step\.cpp:1"):
        build.compile_steps("c++", tmp_path, tmp_path)


def compiled_from(sources, folder, monkeypatch, machine=None):
    """Let decoders use steps compiled from other sources or for another machine, with fewer optimizations."""
    flags = ["-O1" if flag == "-O3" else flag for flag in build.FLAGS if not machine or not flag.startswith("-m")]
    monkeypatch.setattr(build, "FLAGS", flags + (machine or []))
    build.compile_steps("c++", sources, folder)
    built = build.load(folder)
    monkeypatch.setattr(build, "library", lambda: built)


@pytest.mark.slow
@pytest.mark.skipif(platform.machine() != "x86_64", reason="these are x86-64's vectors")
@pytest.mark.parametrize("machine", [["-mavx2", "-mfma"], ["-march=x86-64"]], ids=["AVX2", "no intrinsics"])
@torch.inference_mode()
def test_vector_widths_of_other_machines(model, monkeypatch, tmp_path, machine):
    for dtype in (torch.float32, torch.bfloat16):
        model, tolerance = model.to(dtype), 1e-5 if dtype is torch.float32 else 1e-2
        here = Decoder(model, int8=dtype is torch.bfloat16)
        prompt = read(here)
        want = steps(here, copy.deepcopy(prompt))
        with monkeypatch.context() as patch:
            compiled_from(build.SOURCES, tmp_path, patch, machine)
            assert max(distances(steps(here, prompt), want)) < tolerance


MUTANTS = {
    "the gate takes the worst blocks": ("attention.h", "gates[i] > gates[j]", "gates[i] < gates[j]"),
    "block means are never written": ("attention.h", "if (cache.means) average(keys);", ""),
    "a step takes full attention": ("attention.h", "return topk && position", "return false && position"),
    "every token is rotated as if it were the first": ("attention.h", "p.cos + position * half", "p.cos + 0 * half"),
    "pieces are merged without their scales": ("attention.h", "std::exp(top[place + k] - largest)", "1"),
    "experts are chosen without the bias": (
        "experts.h",
        "scores[i] + w.bias[i] > scores[j] + w.bias[j]",
        "scores[i] > scores[j]",
    ),
    "the rest after whole vectors is lost": ("products.h", "sum(total[o][r]) + rest", "sum(total[o][r])"),
}


@pytest.mark.slow
@pytest.mark.parametrize(("file", "right", "wrong"), MUTANTS.values(), ids=MUTANTS)
@torch.inference_mode()
def test_mutants_are_caught(model, monkeypatch, tmp_path, file, right, wrong):
    for layer in model.model.layers[: model.config.num_hidden_layers]:
        layer.mlp.gate.e_score_correction_bias.copy_(torch.linspace(1, 0, model.config.n_routed_experts))
    naive = in_pytorch(model, monkeypatch)
    want = steps(naive, read(naive), [1] * 7)[0]
    sources = shutil.copytree(build.SOURCES, tmp_path / "step")
    source = (sources / file).read_text()
    assert source.count(right) == 1
    (sources / file).write_text(source.replace(right, wrong))
    compiled_from(sources, tmp_path, monkeypatch)
    decoder = Decoder(model)
    assert (steps(decoder, read(decoder), [1] * 7)[0] - want).norm() > 1e-3 * want.norm()


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


@torch.inference_mode()
def test_a_step_without_memory_says_so(model):
    decoder = Decoder(model)
    cache = read(decoder)
    decoder.main[0].native._block.hidden = 2**60  # numbers that no machine can hold
    with pytest.raises(MemoryError, match="no memory"):
        decoder.run(tokens(1, 1), cache, decoder.place(cache, 0, [PROMPT], 1))
