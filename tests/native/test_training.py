"""Compares the compiled parts of a training step with their twins in PyTorch, for the vectors of several machines."""

import ctypes
import functools
import itertools

import levels
import pytest
import torch
from native_twins import assert_equal_to_rounding, assert_threads_change_no_bit, in_pytorch, normal
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from moonwhale.model import kernels
from moonwhale.model.attention import attend
from moonwhale.model.gated import gated, gated_rows, gated_rows_backward
from moonwhale.model.loss import linear_cross_entropy
from moonwhale.model.moe import MLP
from moonwhale.model.norm import RMSNorm
from moonwhale.model.rope import rotate
from moonwhale.native import build, training
from moonwhale.optim import elementwise
from moonwhale.optim.muonclip import MuonClip, param_groups
from moonwhale.train.pretrain import train

MUTANTS = {
    "rms without eps": ("training.h", "sum(square) / columns + eps", "sum(square) / columns"),
    "the norm's gradient ignores the rms": ("training.h", "sum(along) / columns", "0.0f"),
    "chunks of rows overlap": ("training.h", "rows * (chunk + 1) / chunks", "rows"),
    "exp of a wrong remainder": ("training.h", "whole * 2.12194440e-4f", "whole * 0.0f"),
    "lanes after the last logit count": ("training.h", "fill_after(exponential, part, 0)", "exponential"),
    "no gradient at the label": ("training.h", "exponential - total[r]", "exponential"),
    "the gate's derivative": ("training.h", "x * (1.0f - share)", "x"),
    "row weights are ignored": ("training.h", "d *= scale", "d *= 1.0f"),
    "a query sees the next token": (
        "training.h",
        "keys - queries + row % queries + 1",
        "std::min(keys, row % queries + 2)",
    ),
    "documents see each other": ("training.h", "ids == of_queries[row]", "ids == ids"),
    "powers are not relative to the largest": ("training.h", "load(own + k) - peak[r]", "load(own + k) - 20.0f"),
    "the scores' gradient": ("training.h", "get(at, part) - out_dot[r]", "get(at, part)"),
    "it turns backwards": ("rotation.h", "a * c - b * s", "a * c"),
    "the gradient does not turn": ("rotation.h", "backward ? -1 : 1", "1"),
    "no Nesterov momentum": ("training.h", "g + m * decay", "m"),
    "the momentum does not decay": ("training.h", "get(momentum + i, part) * decay", "get(momentum + i, part)"),
    "no weight decay": ("training.h", "get(weight + i, part) * kept", "get(weight + i, part)"),
    "the last of a piece": ("training.h", "std::min(PIECE, n - start)", "std::min(PIECE - 1, n - start)"),
}
DTYPES = [torch.float32, torch.bfloat16]
SHAPES = [(1, 1), (1, 16), (3, 5), (64, 32), (67, 48), (130, 33)]


@pytest.fixture(params=levels.LEVELS)
def library(request, tmp_path_factory, monkeypatch) -> ctypes.CDLL:
    """Each test with this fixture runs at each level. At this machine's, it takes the steps that users run."""
    return levels.training_library(MUTANTS, request.param, tmp_path_factory.getbasetemp(), monkeypatch)


def norm(x, weight, d_out):
    """Return RMSNorm of x, and the gradients of x and of the weight."""
    module = RMSNorm(len(weight), eps=0.1)
    module.weight, x = nn.Parameter(weight), x.detach().requires_grad_()
    out = module(x)
    out.backward(d_out)
    return out.detach(), x.grad, module.weight.grad


def cross_entropy(hidden, head, labels):
    """Return the weighted loss, each row's, whether it was correct, and the gradients."""
    hidden, head = hidden.detach().requires_grad_(), head.detach().requires_grad_()
    loss, nll, correct = linear_cross_entropy(hidden, head, labels, torch.linspace(0.5, 1, len(labels)))
    loss.backward()
    return loss.detach(), nll, correct, hidden.grad, head.grad


def gate(x, up, d_product):
    x, up = x.detach().requires_grad_(), up.detach().requires_grad_()
    product = gated(x, up)
    product.backward(d_product)
    return product.detach(), x.grad, up.grad


def gate_rows(inner, weight, d_product):
    product, kept = gated_rows(inner, weight)
    return product, *gated_rows_backward(d_product.clone(), weight, kept)


def rotated(x, cos, sin, d_out, interleaved=False):
    x = x.detach().requires_grad_()
    out = rotate(x, (cos, sin), interleaved)
    out.backward(d_out)
    return out.detach(), x.grad


def attention(q, k, v, d_out, ids=None, causal=True):
    """Return the output, the largest logits, and the gradients of q, k and v."""
    q, k, v = (x.detach().requires_grad_() for x in (q, k, v))
    out, largest = attend(q, k, v, 0.3, causal, ids)
    out.backward(d_out)
    return out.detach(), largest, q.grad, k.grad, v.grad


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("weight_dtype", DTYPES)
def test_norm(library, dtype, weight_dtype):
    for seed, (rows, size) in enumerate(SHAPES):
        x, d_out = normal(rows, size, dtype=dtype, seed=seed), normal(rows, size, dtype=dtype, seed=seed + 50)
        assert_equal_to_rounding(norm, x, normal(size, dtype=weight_dtype, seed=9), d_out)


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_that_are_apart_and_numbers_that_are(library, dtype):
    wide = normal(6, 7, 40, dtype=dtype)
    views = (
        wide[..., 5:25],
        wide.transpose(0, 1)[..., :20],
        wide[:, :3, ::2],
        normal(20, 9, dtype=dtype).T,
        normal(20, dtype=dtype),
        normal(20, dtype=dtype).expand(5, 20),
        normal(3, 1, dtype=dtype).expand(3, 20),
    )
    weight = normal(20)
    for x in views:
        for d_out in (normal(*x.shape, 2, dtype=dtype)[..., 1], torch.ones((), dtype=dtype).expand_as(x)):
            assert_equal_to_rounding(norm, x, weight, d_out)
            assert_equal_to_rounding(gate, x, x.flip(0), d_out)
            assert_equal_to_rounding(gate, x, x, d_out)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocabulary", [2, 16, 45, 200])
def test_cross_entropy(library, dtype, vocabulary):
    labels = torch.arange(50) * 7 % vocabulary
    labels[::3] = -100
    for scale in (0.3, 1.0):
        head = normal(vocabulary, 12, dtype=dtype, seed=1, scale=scale)
        assert_equal_to_rounding(cross_entropy, normal(50, 12, dtype=dtype), head, labels)


@pytest.mark.parametrize("dtype", DTYPES)
def test_logits_of_every_size(library, dtype):
    """Σ exp, cross-entropy and gradient equal those in fp64, the label being anywhere, also with the largest logit."""
    for vocabulary, spread in itertools.product((1, 8, 37, 64), (0.0, 1.0, 80.0, 3e4)):
        logits = normal(2 * vocabulary, vocabulary, dtype=dtype, scale=spread)
        labels = torch.arange(2 * vocabulary) % vocabulary
        exact = logits.double()
        powers = (exact - exact.amax(1, keepdim=True)).exp()
        want = powers.sum(1, keepdim=True)
        d_logits = powers.scatter_add(1, labels[:, None], -want)
        total, nll, correct = training.score(logits, labels, True)
        torch.testing.assert_close(total.double(), want, rtol=1e-6, atol=0)
        want = nn.functional.cross_entropy(exact, labels, reduction="none")
        torch.testing.assert_close(nll.double(), want, rtol=1e-6, atol=2e-6)
        assert torch.equal(correct, exact.gather(1, labels[:, None])[:, 0] == exact.amax(1))
        near = 2**-8 if dtype is torch.bfloat16 else 2e-6
        torch.testing.assert_close(logits.double(), d_logits, rtol=near, atol=1e-6)


def test_exponentials_are_exact_to_two_units(library):
    x = torch.cat([torch.linspace(-87, 0, 4000), torch.linspace(-1e-3, 0, 96)])
    logits = torch.stack([torch.zeros_like(x), x], dim=1)
    total, _, _ = training.score(logits, torch.zeros(len(x), dtype=torch.long), True)
    exact = x.double().exp()
    assert ((logits[:, 1].double() - exact).abs() <= 2 * 2.0**-24 * 2 * exact).all()
    torch.testing.assert_close(total[:, 0].double(), 1 + exact, rtol=1e-7, atol=0)


@pytest.mark.parametrize("dtype", DTYPES)
def test_gates(library, dtype):
    for seed, (rows, size) in enumerate(SHAPES):
        x, up = (normal(rows, size, dtype=dtype, seed=seed + i, scale=3.0) for i in range(2))
        d_product, weight = normal(rows, size, dtype=dtype, seed=9), normal(rows, seed=8)
        weight[0] = 0
        assert_equal_to_rounding(gate, x, up, d_product)
        assert_equal_to_rounding(gate_rows, torch.cat([x, up], 1), weight, d_product)
    far = torch.tensor([-1e30, -200.0, -88.0, 0.0, 88.0, 200.0, 1e30], dtype=dtype)
    assert_equal_to_rounding(gate, far, torch.ones_like(far), torch.ones_like(far))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("interleaved", [True, False])
def test_rotation(library, dtype, interleaved):
    wide = normal(2, 5, 3, 14, dtype=dtype).transpose(1, 2)  # (B, heads, T, width), as projections leave it
    run = functools.partial(rotated, interleaved=interleaved)
    for x in (
        wide,
        wide[..., 4:],
        wide[:, :1, :, :2],
        wide[:, :, ::2, 1:7],
        wide.expand(2, -1, -1, -1),
        wide[..., ::7],
    ):
        for rows in (1, 2):
            cos, sin = (normal(rows, 1, x.shape[2], x.shape[3] // 2, dtype=dtype, seed=seed) for seed in (1, 2))
            assert_equal_to_rounding(run, x, cos, sin, normal(*x.shape, 2, dtype=dtype, seed=3)[..., 0])


@pytest.mark.parametrize("length", [1, 3, 5])
def test_rotation_of_another_layout_is_left_to_pytorch(library, length):
    """Decoding has heads after tokens: x (B, T, heads, width), tables (B, T, 1, width / 2)."""
    cos, sin = (normal(2, length, 1, 4, seed=seed) for seed in (1, 2))
    for heads in (1, 3):
        x, d_out = (normal(2, length, heads, 8, seed=seed) for seed in (0, 3))
        assert_equal_to_rounding(rotated, x, cos, sin, d_out)


def attention_inputs(length, dtype=torch.float32):
    shapes = [(2, 3, length, width) for width in (10, 10, 7, 7)]
    return [normal(*shape, dtype=dtype, seed=i) for i, shape in enumerate(shapes)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("length", [5, 16, 45, 150])  # the last has two tiles of queries
def test_attention(library, dtype, length):
    inputs = attention_inputs(length, dtype)
    ids = torch.stack([torch.arange(length) // 20, (torch.arange(length) - 7) // 9])
    ids[1, -3:] = -1
    for causal, of_tokens in itertools.product((True, False), (None, ids)):
        assert_equal_to_rounding(functools.partial(attention, ids=of_tokens, causal=causal), *inputs)


def test_scores_of_thousands(library):
    """The same powers, up to the rounding of such scores, and no infinity."""
    q, k, v, d_out = attention_inputs(150)
    inputs = 30 * q, 30 * k, v, d_out
    for some, exact in zip(attention(*inputs), in_pytorch(attention, *inputs), strict=True):
        assert some.isfinite().all() and (some - exact).norm() < 1e-3 * exact.norm()


def muon(momenta, grads, directions):
    """Return Nesterov's updates, the momenta, and weights after a step."""
    momenta, weights = [m.clone() for m in momenta], [m + 1 for m in momenta]
    updates = elementwise.nesterov(momenta, grads, 0.9)
    elementwise.descend(weights, directions, 0.97, [-0.1 * i for i in range(1, 1 + len(weights))])
    return *updates, *momenta, *weights


def assert_muon_is_equal_to_rounding(dtype):
    shapes = [(1, 1), (3, 5), (2, 3, 7), (41, 100), (3, 64, 64)]  # the last two: more than a piece, and exactly three
    momenta, grads, directions = ([normal(*shape, seed=seed) for shape in shapes] for seed in range(3))
    directions = [direction.to(dtype) for direction in directions]
    some = muon(momenta, grads, directions)
    compiled, elementwise.compiled = elementwise.compiled, None
    exact = muon(momenta, grads, directions)
    elementwise.compiled = compiled
    for mine, theirs in zip(some, exact, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES)
def test_muon(library, dtype):
    assert_muon_is_equal_to_rounding(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_nan_and_infinity_are_kept(library, dtype):
    for bad in (torch.nan, torch.inf):
        x = normal(4, 19, dtype=dtype)
        x[1, 17] = x[2, 3] = bad
        broken = x.isfinite().logical_not().any(1)
        assert torch.equal(norm(x, torch.ones(19), torch.ones_like(x))[1].isfinite().logical_not().any(1), broken)
        total, nll, correct = training.score(x.clone(), torch.tensor([0, 17, 0, 1]), True)
        assert torch.equal(nll.isfinite(), ~broken) and torch.equal(total[:, 0].isfinite(), ~broken)
        assert not correct[broken].any()
        assert not gate(x, x, torch.ones_like(x))[0].isfinite()[broken].all(1).any()


@pytest.mark.parametrize("dtype", DTYPES)
def test_threads_change_no_bit(library, dtype):
    x, labels = normal(131, 50, dtype=dtype), torch.arange(131) % 50
    assert_threads_change_no_bit(
        lambda: norm(x, normal(50), x),
        lambda: training.score(x.clone(), labels, True),
        lambda: gate_rows(x, normal(131), x[:, :25].contiguous()),
        lambda: attention(*attention_inputs(150, dtype)),
    )


@pytest.mark.parametrize("number", range(1, 1 + len(MUTANTS)), ids=MUTANTS)
def test_mutants_are_caught(library, monkeypatch, number):
    monkeypatch.setattr(build, "library", lambda name: library)
    x, labels, ids = normal(131, 45, scale=0.5), torch.arange(131) % 45, torch.arange(90).view(2, 45) // 20

    def check():
        assert_equal_to_rounding(norm, x, normal(45), normal(131, 45, seed=1))
        assert_equal_to_rounding(gate, x, normal(131, 45, seed=2), normal(131, 45, seed=1))
        assert_equal_to_rounding(gate_rows, torch.cat([x, x], 1), normal(131, seed=2), normal(131, 45, seed=1))
        assert_equal_to_rounding(cross_entropy, x, normal(45, 45, seed=1, scale=2.0), labels)
        assert_equal_to_rounding(functools.partial(attention, ids=ids), *attention_inputs(45))
        assert_equal_to_rounding(attention, *(60 * x for x in attention_inputs(45)))
        assert_muon_is_equal_to_rounding(torch.bfloat16)
        angles = normal(1, 1, 5, 4)
        assert_equal_to_rounding(rotated, normal(2, 3, 5, 8), angles.cos(), angles.sin(), normal(2, 3, 5, 8, seed=1))

    check()
    with levels.mutated(library, number), pytest.raises(AssertionError):
        check()


def use_kernels():
    if not training.use_kernels(torch.device("cpu")):
        pytest.skip(build.unavailable_reason("training"))


def test_tensors_that_do_not_fit_are_refused():
    use_kernels()
    x = normal(4, 8)
    for call in (
        lambda: training.norm(x, torch.ones(7), 1e-6),
        lambda: training.norm_backward(x[:3], x, torch.ones(8), torch.ones(4, 1)),
        lambda: training.norm_backward(x, x, torch.ones(8), torch.ones(3, 1)),
        lambda: training.score(x[:, ::2], torch.zeros(4), True),
        lambda: training.score(x, torch.zeros(5), True),
        lambda: training.gate(x, x[:, :7]),
        lambda: training.gate(x, x, torch.ones(5)),
        lambda: training.gate_backward(x[:, :7], x, x),
        lambda: training.softmax_(x[None, :, ::2], False, None),
        lambda: training.softmax_(x.T[None].contiguous(), True, None),  # more queries than keys
        lambda: training.softmax_(x[None], False, (torch.zeros(1, 4), torch.zeros(1, 7))),
        lambda: training.softmax_(x[None], False, None, torch.zeros(1, 5)),
        lambda: training.score_gradient_(x, x, torch.zeros(5), 1.0),
        lambda: training.rotate(normal(1, 1, 4, 7), normal(1, 1, 4, 3), normal(1, 1, 4, 3), True),
        lambda: training.rotate(normal(1, 1, 4, 6), normal(1, 1, 4, 3), normal(1, 1, 4, 3).bfloat16(), True),
        lambda: training.nesterov_(x, x[:, :7], 0.9),
        lambda: training.nesterov_(x.T, x.T, 0.9),
        lambda: training.nesterov_(x.bfloat16(), x.bfloat16(), 0.9),
        lambda: training.nesterov_(x, x.bfloat16(), 0.9),
        lambda: training.descend_(x.bfloat16(), x, 1.0, 1.0),
        lambda: training.descend_(x, x[:3], 1.0, 1.0),
        lambda: training.descend_(x[:, :7], x[:, :7], 1.0, 1.0),
    ):
        with pytest.raises(ValueError, match="do not fit each other"):
            call()
    for label in (-1, 8, 2**40):
        before = x.clone()
        with pytest.raises(IndexError, match="no token of the vocabulary"):
            training.score(x, torch.tensor([0, 1, 2, label]), True)
        assert torch.equal(x, before)


def test_what_the_kernels_cannot_compute_is_left_to_pytorch():
    use_kernels()
    x = normal(4, 8)
    assert kernels.compiled_for(x, nn.Parameter(x)) is training
    others = [x.double(), x.half(), x.long(), x.to("meta"), x[:0], x.as_subclass(type("Own", (torch.Tensor,), {}))]
    with FakeTensorMode() as mode:
        others.append(mode.from_tensor(x))
    for other in others:
        assert kernels.compiled_for(other) is None
    assert kernels.compiled_for(x, x.bfloat16()) is None
    module = RMSNorm(8)
    traced = torch.jit.trace(module, x)
    torch.testing.assert_close(traced(x + 1), module(x + 1))
    assert torch.autograd.gradcheck(module.double(), x.double().requires_grad_())


def test_what_muon_does_in_pytorch():
    """Numbers that are apart, another dtype, another type of tensor, and no numbers at all."""
    use_kernels()
    x = normal(4, 8)
    own = x.as_subclass(type("Own", (torch.Tensor,), {}))
    for other in (x.T, x[:, ::2], x.double(), x.to("meta"), x[:0], own):
        update = elementwise.nesterov([other.clone(memory_format=torch.preserve_format)], [other], 0.5)[0]
        assert type(update) is type(other) and update.shape == other.shape and update.dtype is other.dtype
        if not other.is_meta:
            torch.testing.assert_close(update, 1.75 * other)


def test_kernels_are_for_a_cpu(monkeypatch):
    assert not training.use_kernels(torch.device("cuda")) and not training.use_kernels(torch.device("mps"))
    monkeypatch.setattr(build, "available", lambda name: False)
    assert not training.use_kernels(torch.device("cpu")) and kernels.compiled is None


def test_compiled_graphs_do_not_call_the_kernels(tiny_config, monkeypatch):
    use_kernels()
    module = nn.Sequential(RMSNorm(32), MLP(tiny_config(), 16))
    x = normal(5, 32)
    eager = module(x)
    for name in ("norm", "norm_backward", "gate", "gate_backward"):
        monkeypatch.setattr(training, name, None)
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
    out = compiled(x)
    torch.testing.assert_close(out, eager)
    out.sum().backward()


def test_a_model_trains_the_same_with_and_without(tiny_model):
    tokens = torch.randint(61, (3, 24), generator=torch.Generator().manual_seed(0))

    def run():
        model = tiny_model(num_nextn_predict_layers=1, moba_block_size=8, moba_topk=2).train()
        # In bf16 Newton-Schulz would turn a gradient's last bit into a hundredth of the step
        optimizer = MuonClip(param_groups(model, lr=0.01), newton_schulz_dtype=torch.float32)
        losses, norms = [], []
        for _ in range(4):
            loss = model(tokens, labels=tokens).loss
            loss.backward()
            losses.append(loss.detach())
            norms += [p.grad.norm() for p in model.parameters()]
            optimizer.step()
            optimizer.zero_grad()
        return torch.stack(losses), torch.stack(norms[: len(norms) // 4])

    plain = run()
    use_kernels()
    once, again = run(), run()
    assert all(map(torch.equal, once, again))
    torch.testing.assert_close(once[0], plain[0], rtol=1e-4, atol=0)
    torch.testing.assert_close(once[1], plain[1], rtol=1e-5, atol=1e-6)


def test_a_run_uses_the_kernels(tiny_run):
    if reason := build.unavailable_reason("training"):
        pytest.skip(reason)
    assert kernels.compiled is None and elementwise.compiled is None
    train(tiny_run(steps=1, warmup_steps=0))
    assert kernels.compiled is training and elementwise.compiled is training
