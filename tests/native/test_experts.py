"""Compares the compiled router, balance loss, lined-up rows, routed experts and Muon's iteration with PyTorch's."""

import ctypes
import functools
import itertools

import levels
import pytest
import torch
from native_twins import assert_equal_to_rounding, assert_threads_change_no_bit, in_pytorch, normal
from torch import nn

from moonwhale.model import kernels
from moonwhale.model.groups import line_up
from moonwhale.model.moe import DeepseekMoE, Router, Routing
from moonwhale.model.routed import ExpertRows, RoutedExperts
from moonwhale.native import build, training
from moonwhale.optim import elementwise
from moonwhale.optim.muonclip import newton_schulz

MUTANTS = {
    "the choice ignores the bias": ("routing.h", "scores[e] + (bias ? bias[e] : 0)", "scores[e]"),
    "an expert is chosen twice": ("routing.h", "std::find(index, index + k, e) != index + k", "false"),
    "gates of no size": ("routing.h", "s.factor / (total + 1e-20f)", "s.factor"),
    "the gates' sum has no gradient": ("routing.h", "along / (total + 1e-20f)", "0.0f"),
    "the sigmoid's derivative": ("routing.h", "(s.sigmoid ? 1 - scores[e] : 1)", "1.0f"),
    "the softmax's derivative": ("routing.h", "d_logits[e] - mean", "d_logits[e]"),
    "tokens that are not valid count": ("routing.h", "!valid[t]", "false"),
    "shares of choices are not relative": ("routing.h", "float(experts)", "1.0f"),
    "the scores' sum has no gradient": ("routing.h", "d[e] - along", "d[e]"),
    "groups are not padded": ("routing.h", "(size + multiple - 1) / multiple * multiple", "size"),
    "items of no group": ("routing.h", "group[i] == groups", "false"),
    "the first expert of a token only": (
        "routed.h",
        "routes.row[t * routes.chosen + k]",
        "routes.row[t * routes.chosen]",
    ),
    "the rows are the first tokens": ("routed.h", "routes.token[block + r]", "((block + r) % routes.tokens)"),
    "one slice of the weights": (
        "routed.h",
        "tiled_rows(packed.d_inner + at * both, n).below(slice * SQUARE)",
        "tiled_rows(packed.d_inner + at * both, n)",
    ),
    "down's gradient lies on its side": ("routed.h", "square[i * SQUARE + h]", "square[h * SQUARE + i]"),
    "a polynomial of the wrong matrix": ("newton_schulz.h", "load(own.gram_sums + i) * c", "load(own.gram + i) * c"),
    "a matrix is not kept": ("newton_schulz.h", "load(own.x + i) * a", "load(own.x + i)"),
    "rows of another layout": ("newton_schulz.h", "tiled_rows(own.left, rows)", "plain_rows(own.x, columns)"),
    "the first columns only": ("matrix_units.h", "b + column * n", "b"),
    "the first rows only": ("matrix_units.h", "a.below(row)", "a"),
}
DTYPES = [torch.float32, torch.bfloat16]
EXPERTS, TOPK, HIDDEN = 6, 2, 24


@pytest.fixture(params=levels.LEVELS | levels.WITHOUT_AMX)
def library(request, tmp_path_factory, monkeypatch) -> ctypes.CDLL:
    """Each test with this fixture runs at each level. At this machine's, it takes the steps that users run."""
    return levels.training_library(MUTANTS, request.param, tmp_path_factory.getbasetemp() / "experts", monkeypatch)


def require_units():
    if not build.library("training").has_units():
        pytest.skip("this processor has no matrix units or dot products for bf16")


def route(x, weight, bias, d_scores, d_gates, config):
    """Return scores, the gate of each expert or 0, and the gradients of x and of the weight. Without `d_scores` or
    `d_gates` nothing depends on these."""
    router = Router(config)
    router.weight, x = nn.Parameter(weight), x.detach().requires_grad_()
    router.e_score_correction_bias.copy_(bias)
    scores, index, gates = router(x)
    by_expert = torch.zeros_like(scores).scatter(1, index, gates)
    outputs = [(out, d) for out, d in ((scores, d_scores), (by_expert, d_gates)) if d is not None]
    torch.autograd.backward(*zip(*outputs, strict=True))
    return scores.detach(), by_expert.detach(), x.grad, router.weight.grad


def router_config(tiny_config, **overrides):
    sizes = {"hidden_size": HIDDEN, "n_routed_experts": EXPERTS, "num_experts_per_tok": TOPK}
    return tiny_config(**sizes, routed_scaling_factor=2.5, **overrides)


def router_inputs(n_tokens, dtype):
    """Return x, weight and bias, and gradients of the scores and of each expert's gate."""
    x, weight, bias = normal(n_tokens, HIDDEN, dtype=dtype), normal(EXPERTS, HIDDEN, seed=1), normal(EXPERTS, seed=2)
    return x, weight, bias, normal(n_tokens, EXPERTS, seed=3), normal(n_tokens, EXPERTS, seed=4)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scoring", ["sigmoid", "softmax"])
@pytest.mark.parametrize("normalise", [True, False])
def test_router(library, tiny_config, dtype, scoring, normalise):
    config = router_config(tiny_config, scoring_func=scoring, norm_topk_prob=normalise)
    run = functools.partial(route, config=config)
    for n_tokens in (1, 5, 131):
        x, weight, bias, d_scores, d_gates = router_inputs(n_tokens, dtype)
        assert_equal_to_rounding(run, x, weight, bias, d_scores, d_gates)
        assert_equal_to_rounding(functools.partial(run, d_gates=None), x, weight, bias, d_scores)
        without_scores = functools.partial(route, d_scores=None, config=config)
        assert_equal_to_rounding(lambda *i, run=without_scores: run(*i[:3], d_gates=i[3]), x, weight, bias, d_gates)


def test_groups_of_experts_are_left_to_pytorch(library, tiny_config, monkeypatch):
    monkeypatch.setattr(training, "route", None)
    router = Router(router_config(tiny_config, n_group=3, topk_group=2))
    router.reset_parameters()
    assert router(normal(4, HIDDEN)).index.shape == (4, TOPK)


def balance(scores, valid, config):
    moe, scores = DeepseekMoE(config), scores.detach().requires_grad_()
    index = scores.topk(TOPK).indices
    loss = moe.balance_loss(Routing(scores, index, scores.gather(1, index)), valid)
    loss.backward()
    return loss.detach(), scores.grad


def balance_inputs():
    valid = torch.rand(3, 17, generator=torch.Generator().manual_seed(0)) < 0.7
    valid[1] = False
    return normal(valid.numel(), EXPERTS).sigmoid(), valid


def test_balance_of_sequences(library, tiny_config):
    config = router_config(tiny_config, balance_loss="sequence", aux_loss_alpha=0.3)
    scores, valid = balance_inputs()
    for mask in (valid, valid.T.contiguous().T, valid.long()):
        assert_equal_to_rounding(functools.partial(balance, config=config), scores, mask)


def lined_up(group, n_groups=5, multiple=4, row_multiple=1):
    return line_up(group, n_groups, multiple, static_shapes=False, row_multiple=row_multiple)


def test_rows_by_group(library):
    for seed, (n, row_multiple) in enumerate(itertools.product((1, 9, 200), (1, 12))):
        group = torch.randint(6, (n,), generator=torch.Generator().manual_seed(seed))  # 5: no row
        assert kernels.compiled_for_groups(group)
        mine = lined_up(group, row_multiple=row_multiple)
        theirs = in_pytorch(functools.partial(lined_up, row_multiple=row_multiple), group)
        assert all(map(torch.equal, mine, theirs))
    with pytest.raises(ValueError, match="do not fit"):
        lined_up(torch.tensor([0, 6]))
    with pytest.raises(ValueError, match="do not fit"):
        lined_up(torch.tensor([-1, 0]))


def experts(x, gate_up, down, gates, d_out, index):
    """Return the output, and the gradients of x, both weights and the gates."""
    inputs = [tensor.detach().requires_grad_() for tensor in (x, gate_up, down, gates)]
    out = RoutedExperts.apply(*inputs[:3], index, inputs[3])
    out.backward(d_out)
    return out.detach(), *(tensor.grad for tensor in inputs)


def experts_inputs(n_tokens=150, n_experts=5, chosen=2, hidden=96, inner=64):
    """Return `experts`' tensors and `index`. The last expert but one gets no token if there are more than two."""
    x, d_out = (normal(n_tokens, hidden, dtype=torch.bfloat16, seed=seed) for seed in (0, 1))
    gate_up = normal(n_experts, 2 * inner, hidden, seed=2, scale=hidden**-0.5)
    down = normal(n_experts, hidden, inner, seed=3, scale=inner**-0.5)
    affinities = normal(n_tokens, n_experts, seed=4)
    if n_experts > 2:
        affinities[:, -2] = -torch.inf
    return (x, gate_up, down, normal(n_tokens, chosen, seed=5), d_out), affinities.topk(chosen).indices


SIZES = [{}, {"n_tokens": 1, "chosen": 1}, {"n_experts": 1, "chosen": 1, "hidden": 32, "inner": 32}, {"inner": 160}]


@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_experts(library, sizes):
    require_units()
    inputs, index = experts_inputs(**sizes)
    run = functools.partial(experts, index=index)
    assert kernels.compiled_for_experts(inputs[0], *(weight.bfloat16() for weight in inputs[1:3]))
    assert_equal_to_rounding(run, *inputs)
    # not less exact than PyTorch's own products of bf16
    exact, mine, compiled = in_pytorch(run, *inputs), run(*inputs), kernels.compiled
    kernels.compiled = None
    theirs = run(*inputs)
    kernels.compiled = compiled
    for some, other, right in zip(mine, theirs, exact, strict=True):
        assert some.numel() < 100 or (some.float() - right).norm() <= 1.1 * (other.float() - right).norm() + 1e-6


def assert_orthogonalised(shape):
    """The compiled iteration is as exact as PyTorch's in bf16, whose error is about 2 %, and keeps zero."""
    matrices = normal(*shape) * torch.linspace(0.05, 1, shape[2])
    matrices[0] = 0
    assert elementwise.compiled.can_orthogonalise(matrices)
    mine, exact = newton_schulz(matrices, torch.bfloat16), newton_schulz(matrices.double(), torch.float64)
    assert mine.dtype is torch.bfloat16 and not mine[0].any()
    assert (mine - exact).norm() <= 2e-2 * exact.norm()


@pytest.mark.parametrize("size", [(1, 1), (8, 96), (96, 8), (64, 32), (45, 70), (70, 45), (33, 33), (160, 96)], ids=str)
def test_newton_schulz(library, size):
    require_units()
    assert_orthogonalised((3, *size))


def test_large_matrices_are_left_to_pytorch(library, monkeypatch):
    require_units()
    monkeypatch.setattr(training, "newton_schulz", None)
    assert newton_schulz(normal(1, 257, 512), torch.bfloat16).dtype is torch.bfloat16
    assert newton_schulz(normal(1, 20, 30), torch.float32).dtype is torch.float32


def test_threads_change_no_bit(library, tiny_config):
    config = router_config(tiny_config, balance_loss="sequence", aux_loss_alpha=0.3)
    runs = [
        lambda: route(*router_inputs(131, torch.bfloat16), config=config),
        lambda: balance(*balance_inputs(), config=config),
    ]
    if build.library("training").has_units():
        inputs, index = experts_inputs()
        runs.append(lambda: experts(*inputs, index))
        runs.append(lambda: [training.newton_schulz(normal(5, 40, 70), 5)])
    assert_threads_change_no_bit(*runs)


@pytest.mark.parametrize("number", range(1, 1 + len(MUTANTS)), ids=MUTANTS)
def test_mutants_are_caught(library, tiny_config, monkeypatch, number):
    monkeypatch.setattr(build, "library", lambda name: library)
    if list(MUTANTS.values())[number - 1][0] != "routing.h":
        require_units()

    def check():
        for scoring in ("sigmoid", "softmax"):
            config = router_config(tiny_config, scoring_func=scoring, balance_loss="sequence", aux_loss_alpha=0.3)
            assert_equal_to_rounding(functools.partial(route, config=config), *router_inputs(131, torch.float32))
        assert_equal_to_rounding(functools.partial(balance, config=config), *balance_inputs())
        group = torch.arange(100) * 7 % 6
        assert all(map(torch.equal, lined_up(group), in_pytorch(lined_up, group)))
        inputs, index = experts_inputs()
        assert_equal_to_rounding(functools.partial(experts, index=index), *inputs)
        if training.has_units():
            assert_orthogonalised((2, 32, 64))
            assert_orthogonalised((2, 64, 32))

    check()
    with levels.mutated(library, number), pytest.raises(AssertionError):
        check()


def test_what_the_units_cannot_compute_is_left_to_pytorch(library, monkeypatch):
    monkeypatch.setattr(training, "routed", None)
    for sizes in ({"hidden": 48}, {"inner": 16}):
        inputs, index = experts_inputs(**sizes)
        assert_equal_to_rounding(functools.partial(experts, index=index), *inputs)
    inputs, index = experts_inputs()
    assert_equal_to_rounding(functools.partial(experts, index=index), *(x.float() for x in inputs))
    monkeypatch.setattr(training, "has_units", lambda: False)
    assert_equal_to_rounding(functools.partial(experts, index=index), *inputs)


def test_a_model_in_bf16_uses_them(tiny_model, monkeypatch):
    """A step's loss and gradients are those of fp32, up to twice the error that PyTorch makes in bf16."""
    if not training.use_kernels(torch.device("cpu")):
        pytest.skip(build.unavailable_reason("training"))
    model = tiny_model(moe_intermediate_size=32).train()
    for name, bias in model.named_buffers():
        if "e_score_correction_bias" in name:
            bias[:TOPK] = 9  # every token chooses the same experts, so that rounding changes no choice
    tokens = torch.randint(61, (3, 24), generator=torch.Generator().manual_seed(0))
    calls = []
    for name in ("route", "route_backward", "balance", "balance_backward", "line_up", "routed", "routed_backward"):
        function = getattr(training, name)
        monkeypatch.setattr(training, name, lambda *a, f=function, n=name: calls.append(n) or f(*a))

    def step(in_bf16=True):
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=in_bf16):
            loss = model(tokens, labels=tokens).loss
        loss.backward()
        return loss.detach(), *(p.grad for p in model.parameters() if p.grad is not None)

    mine = step()
    assert set(calls) == {"route", "route_backward", "balance", "balance_backward", "line_up"} | (
        {"routed", "routed_backward"} if training.has_units() else set()
    )
    kernels.compiled = None
    for some, other, exact in zip(mine, step(), step(in_bf16=False), strict=True):
        assert (some - exact).norm() <= 2 * (other - exact).norm() + 1e-4 * exact.norm()


def test_tensors_that_do_not_fit_are_refused():
    if not training.use_kernels(torch.device("cpu")):
        pytest.skip(build.unavailable_reason("training"))
    x, weight, bias, d_scores, _ = router_inputs(5, torch.float32)
    how = True, True, 1.0
    scores, index, gates = training.route(x, weight, bias, TOPK, *how)
    valid = torch.ones(1, 5, dtype=torch.bool)
    calls = [
        lambda: training.route(x[:, 1:], weight, bias, TOPK, *how),
        lambda: training.route(x, weight, bias[1:], TOPK, *how),
        lambda: training.route(x, weight, bias, EXPERTS + 1, *how),
        lambda: training.route_backward(d_scores[1:], gates, x, weight, scores, index, *how),
        lambda: training.route_backward(d_scores, gates[:, 1:], x, weight, scores, index, *how),
        lambda: training.route_backward(d_scores, gates, x, weight, scores, index + EXPERTS, *how),
        lambda: training.route_backward(d_scores, gates, x, weight, scores[1:], index, *how),
        lambda: training.balance(scores[1:], valid, TOPK),
        lambda: training.balance(scores, valid, EXPERTS + 1),
        lambda: training.balance_backward(scores, scores, valid),
    ]
    if training.has_units():
        (x, gate_up, down, _, d_out), _ = experts_inputs(n_tokens=3, n_experts=1, chosen=1)
        gate_up, down = gate_up.bfloat16(), down.bfloat16()
        token, row = torch.arange(64).clamp(max=2), torch.arange(3)[:, None]
        rows = ExpertRows(token, row, torch.tensor([64], dtype=torch.int32), torch.ones(64))
        _, inner = training.routed(x, gate_up, down, rows)
        wrong = [
            rows._replace(token=token + 1),
            rows._replace(token=token - 1),
            rows._replace(row=row + 62),
            rows._replace(ends=rows.ends - 1),
            rows._replace(ends=rows.ends + 64),
            rows._replace(weight=torch.ones(63)),
        ]
        calls += [lambda w=w: training.routed(x, gate_up, down, w) for w in wrong]
        calls += [
            lambda: training.routed(x[:, 32:], gate_up, down, rows),
            lambda: training.routed(x, gate_up[:, 1:], down, rows),
            lambda: training.routed(x.float(), gate_up, down, rows),
            lambda: training.routed_backward(d_out[1:], x, gate_up, down, rows, inner),
            lambda: training.routed_backward(d_out, x, gate_up, down, rows, inner[1:]),
            lambda: training.newton_schulz(x, 5),
            lambda: training.newton_schulz(x[None], 5),
            lambda: training.newton_schulz(x[None].float(), -1),
        ]
    for call in calls:
        with pytest.raises(ValueError, match="do not fit each other"):
            call()
