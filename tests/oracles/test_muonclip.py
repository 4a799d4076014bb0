"""MuonClip against torch.optim.Muon and torch.optim.AdamW, and the properties of QK-Clip and the bias update."""

import io
import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from moonwhale.errors import UserError
from moonwhale.optim import muonclip
from moonwhale.optim.muonclip import MuonClip, newton_schulz, param_groups
from moonwhale.optim.step_hooks import attach_hooks

LR, DECAY, MOMENTUM, STEPS = 0.02, 0.1, 0.95, 4
FP32 = torch.float32
CLOSE, FAR = 5e-5, 5e-2  # relative distance in fp32: what rounding explains, and what a wrong formula must exceed


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def gradients(*shape):
    return [normal(*shape, seed=seed) for seed in range(1, STEPS + 1)]


def train(make_optimizer, weight, grads):
    """Return how far the gradients move the weight."""
    p = nn.Parameter(weight.clone())
    optimizer = make_optimizer([p])
    for grad in grads:
        p.grad = grad.clone()
        optimizer.step()
    return p.detach() - weight


def our_muon(weight, grads, split=1, dtype=FP32, **settings):
    def make(params):
        group = {"params": params, "muon": True, "split": split}
        return MuonClip([group], LR, DECAY, MOMENTUM, newton_schulz_dtype=dtype, **settings)

    return train(make, weight, grads)


def torch_muon(weight, grads):
    def make(params):
        return torch.optim.Muon(params, LR, DECAY, MOMENTUM, adjust_lr_fn="match_rms_adamw")

    return train(make, weight, grads)


def muon_by_hand(weight, grads, scale=lambda longest: 0.2 * math.sqrt(longest), nesterov=True, coupled=False):
    """Computes Muon's formula step by step. Each plausible bug can be switched on."""
    w, m = weight.clone(), torch.zeros_like(weight)
    for g in grads:
        g = g + DECAY * w if coupled else g
        m = MOMENTUM * m + g
        o = newton_schulz((g + MOMENTUM * m if nesterov else m)[None], FP32)[0]
        w = w - LR * (scale(max(w.shape)) * o + (0 if coupled else DECAY) * w)
    return w - weight


def distance(ours, oracle):
    return ((ours - oracle).norm() / oracle.norm()).item()


@pytest.fixture
def oracle_in_fp32(monkeypatch):
    """Lets torch.optim.Muon iterate in fp32 instead of bf16, so that the comparison is a hundred times tighter."""
    monkeypatch.setattr(torch.Tensor, "bfloat16", torch.Tensor.clone)


SHAPES = [(24, 48), (48, 24), (32, 32)]


@pytest.mark.parametrize("shape", SHAPES)
def test_muon_equals_torchs(shape, oracle_in_fp32):
    weight, grads = normal(*shape), gradients(*shape)
    assert distance(our_muon(weight, grads), torch_muon(weight, grads)) < CLOSE


@pytest.mark.parametrize("shape", SHAPES)
def test_muon_equals_torchs_up_to_bf16_rounding(shape):
    weight, grads = normal(*shape), gradients(*shape)
    assert distance(our_muon(weight, grads, dtype=torch.bfloat16), torch_muon(weight, grads)) < 2e-2


@pytest.mark.parametrize(
    "mutant",
    [{"scale": lambda longest: math.sqrt(0.2 * longest)}, {"nesterov": False}, {"coupled": True}],
    ids=["sqrt(0.2 max)", "no Nesterov", "coupled weight decay"],
)
def test_the_oracle_catches_a_wrong_formula(mutant, oracle_in_fp32):
    weight, grads = normal(24, 48), gradients(24, 48)
    oracle = torch_muon(weight, grads)
    assert distance(muon_by_hand(weight, grads), oracle) < CLOSE
    assert distance(muon_by_hand(weight, grads, **mutant), oracle) > FAR


def slices(weight, grads, parts):
    """Applies torch's Muon to each of the equal matrices stacked or fused along dimension 0."""
    pieces = zip(weight.chunk(parts), *(grad.chunk(parts) for grad in grads), strict=True)
    return torch.cat([torch_muon(w.flatten(0, -2), [g.flatten(0, -2) for g in gs]).view_as(w) for w, *gs in pieces])


def test_each_expert_of_a_stack_is_a_matrix_of_its_own(oracle_in_fp32):
    weight, grads = normal(3, 16, 24), gradients(3, 16, 24)
    oracle = slices(weight, grads, 3)
    assert distance(our_muon(weight, grads), oracle) < CLOSE
    flattened = our_muon(weight.view(48, 24), [grad.view(48, 24) for grad in grads]).view_as(weight)
    assert distance(flattened, oracle) > FAR


def test_fused_gate_and_up_are_two_matrices(oracle_in_fp32):
    weight, grads = normal(3, 32, 24), gradients(3, 32, 24)
    rows = weight.view(96, 24), [grad.view(96, 24) for grad in grads]
    oracle = slices(*rows, 6).view_as(weight)
    assert distance(our_muon(weight, grads, split=2), oracle) < CLOSE
    assert distance(our_muon(weight, grads, split=1), oracle) > FAR


def test_one_batch_for_equal_shapes_changes_no_weight():
    weights, grads = [normal(2, 16, 24, seed=7), normal(16, 24, seed=8), normal(24, 16, seed=9)], []
    together = [nn.Parameter(weight.clone()) for weight in weights]
    for p in together:
        grads.append(normal(*p.shape, seed=p.ndim))
        p.grad = grads[-1].clone()
    MuonClip(together, LR, DECAY, newton_schulz_dtype=FP32).step()
    for p, weight, grad in zip(together, weights, grads, strict=True):
        assert distance(p.detach() - weight, our_muon(weight, [grad])) < CLOSE


def test_newton_schulz_brings_singular_values_to_one_and_keeps_zero():
    stack = torch.stack([normal(20, 40), 1e4 * normal(20, 40, seed=1), torch.zeros(20, 40)])
    *values, zero = torch.linalg.svdvals(newton_schulz(stack, FP32))
    assert all(v.min() > 0.6 and v.max() < 1.3 for v in values)
    assert (zero == 0).all()


def with_singular_values(values, width, n=6):
    """Returns n matrices (len(values), width) in fp64 with these singular values."""
    generator = torch.Generator().manual_seed(0)
    left, right = (
        torch.linalg.qr(torch.randn(n, size, len(values), generator=generator, dtype=torch.float64)).Q
        for size in (len(values), width)
    )
    return (left * values) @ right.mT


def singly(x):
    """Newton-Schulz by single iterations, as torch's Muon does it."""
    x = x / x.norm(dim=(-2, -1), keepdim=True)
    for _ in range(5):
        x = muonclip._iterate(x)
    return x


@pytest.mark.parametrize("shape", [(20, 40), (40, 20), (16, 80), (2, 3, 40, 9)])
def test_two_iterations_at_once_equal_two(shape):
    matrices = normal(*shape).double().view(-1, *shape[-2:])
    oracle = singly(matrices if shape[-2] <= shape[-1] else matrices.mT)
    oracle = oracle if shape[-2] <= shape[-1] else oracle.mT
    assert distance(newton_schulz(matrices, torch.float64), oracle) < 1e-12


@pytest.mark.parametrize("decades", [1, 2, 4])
def test_two_iterations_at_once_are_as_exact_in_bf16(decades):
    matrices = with_singular_values(torch.logspace(0, -decades, 96, dtype=torch.float64), 256)
    exact, rounded = singly(matrices), (matrices / matrices.norm(dim=(-2, -1), keepdim=True)).to(torch.bfloat16)
    single = distance(singly(rounded).double(), exact)
    ours = distance(newton_schulz(matrices.float(), torch.bfloat16).double(), exact)
    assert ours < 1.2 * single + 0.01
    if decades > 1:
        assert distance(five_at_once(rounded).double(), exact) > 5 * ours


def five_at_once(x):
    """All iterations on the Gram matrix: a mutant, since rounding errors grow from one to the next."""
    gram, product = x @ x.mT, torch.eye(x.shape[-2], dtype=x.dtype)
    for _ in range(5):
        factor = muonclip._polynomial(gram)
        factor.diagonal(dim1=-2, dim2=-1).add_(muonclip.NEWTON_SCHULZ[0])
        gram, product = factor @ gram @ factor, factor @ product
    return product @ x


def test_parts_for_the_caches_change_no_bit(monkeypatch):
    weights = [normal(5, 16, 24), normal(16, 24), normal(24, 16), normal(16, 24)]

    def stepped(numbers):
        monkeypatch.setattr(muonclip, "CACHED_NUMBERS", numbers)
        params = [nn.Parameter(weight.clone()) for weight in weights]
        optimizer = MuonClip(params, LR, DECAY, newton_schulz_dtype=FP32)
        for step in range(2):
            for p in params:
                p.grad = normal(*p.shape, seed=step + p.ndim)
            optimizer.step()
        return params + [optimizer.state[p]["momentum_buffer"] for p in params]

    whole = stepped(10**9)
    for numbers in (1, 2 * 16 * 24, 3 * 16 * 24):
        assert all(torch.equal(x, y) for x, y in zip(stepped(numbers), whole, strict=True))
    monkeypatch.setattr(muonclip, "CACHED_NUMBERS", 2 * 16 * 24)
    sizes = [sum(x.numel() for x in next(iter(part))) for part in muonclip._cut(weights, weights)]
    assert sum(sizes) == sum(weight.numel() for weight in weights) and len(sizes) > 3


@pytest.mark.parametrize("shape", [(7,), (5, 3), (4, 1, 3)])
def test_adamw_equals_torchs(shape):
    weight, grads = normal(*shape), gradients(*shape)
    settings = {"lr": LR, "weight_decay": DECAY, "betas": (0.9, 0.95), "eps": 1e-8}

    def torchs(cls, **how):
        return train(lambda params: cls(params, **settings, **how), weight, grads)

    ours = train(lambda params: MuonClip([{"params": params, "muon": False}], **settings), weight, grads)
    assert torch.equal(ours, torchs(torch.optim.AdamW, fused=True))
    assert torch.allclose(ours, torchs(torch.optim.AdamW, foreach=False), atol=1e-6)
    assert not torch.allclose(ours, torchs(torch.optim.Adam), atol=1e-4)  # coupled weight decay


# --- the optimizer as an optimizer -----------------------------------------------------------------------------------


class Tiny(nn.Module):
    """A module with every kind of parameter, named as in our models."""

    def __init__(self):
        super().__init__()
        self.embed_tokens = nn.Embedding(11, 8)
        self.key_conv = nn.Conv1d(8, 8, 3, groups=8, bias=False)
        self.proj = nn.Linear(8, 8)
        self.experts = nn.Module()
        self.experts.gate_up_proj = nn.Parameter(torch.zeros(2, 12, 8))
        self.experts.down_proj = nn.Parameter(torch.zeros(2, 8, 6))
        self.norm = nn.RMSNorm(8)
        self.lm_head = nn.Linear(8, 11, bias=False)
        for i, p in enumerate(self.parameters()):
            p.data = normal(*p.shape, seed=i)


def descend(model, optimizer, seeds):
    for seed in seeds:
        for i, p in enumerate(model.parameters()):
            p.grad = normal(*p.shape, seed=100 * seed + i)
        optimizer.step()


def build():
    model = Tiny()
    return model, MuonClip(param_groups(model, lr=LR))


def test_param_groups_sort_every_parameter_once():
    model = Tiny()
    model.norm.weight.requires_grad_(False)
    names = {p: name for name, p in model.named_parameters()}
    groups = param_groups(model, lr=LR, weight_decay=DECAY)
    found = [(g["muon"], g.get("split"), g["weight_decay"], sorted(names[p] for p in g["params"])) for g in groups]
    assert found == [
        (True, 1, DECAY, ["experts.down_proj", "proj.weight"]),
        (True, 2, DECAY, ["experts.gate_up_proj"]),
        (False, None, DECAY, ["key_conv.weight", "lm_head.weight"]),
        (False, None, 0.0, ["embed_tokens.weight", "proj.bias"]),
    ]
    assert all(g["lr"] == LR for g in groups)


def test_param_groups_of_a_tied_model_do_not_decay_the_embedding():
    model = Tiny()
    model.lm_head.weight = model.embed_tokens.weight
    groups = param_groups(model)
    holders = [g for g in groups if any(p is model.embed_tokens.weight for p in g["params"])]
    assert len(holders) == 1 and not holders[0]["muon"] and holders[0]["weight_decay"] == 0


def test_embeddings_have_a_rate_of_their_own():
    """Adam's first step moves each weight by its rate, whatever the gradient is."""
    model = Tiny()
    optimizer = MuonClip(param_groups(model, lr=LR, weight_decay=DECAY, embedding_lr=20.0))
    others = [p for g in optimizer.param_groups[:-1] for p in g["params"]]
    (embedding,) = optimizer.param_groups[-1]["params"]
    assert embedding is model.embed_tokens.weight and all(p is not embedding for p in others)
    assert len(others) + 1 == len(list(model.parameters()))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for p in model.parameters():
        p.grad = torch.randn_like(p)
    optimizer.step()
    for name, rate in (("embed_tokens.weight", 20 * LR), ("proj.bias", LR)):
        moved = (model.get_parameter(name) - before[name]).abs()
        torch.testing.assert_close(moved, torch.full_like(moved, rate), rtol=1e-4, atol=0)


def test_param_groups_know_transformers_names():
    from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

    config = DeepseekV3Config(
        vocab_size=32, hidden_size=16, intermediate_size=24, moe_intermediate_size=8, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=2, n_routed_experts=4, num_experts_per_tok=2, n_group=1,
        topk_group=1, q_lora_rank=8, kv_lora_rank=8, qk_nope_head_dim=4, qk_rope_head_dim=4, v_head_dim=4,
        first_k_dense_replace=1,
    )  # fmt: skip
    model = DeepseekV3ForCausalLM(config)
    names = {p: name for name, p in model.named_parameters()}
    muon, fused, head, plain = ([names[p] for p in g["params"]] for g in param_groups(model))
    assert fused == ["model.layers.1.mlp.experts.gate_up_proj"] and head == ["lm_head.weight"]
    assert "model.layers.1.mlp.gate.weight" in muon and "model.layers.1.mlp.experts.down_proj" in muon
    assert all(name == "model.embed_tokens.weight" or "norm" in name for name in plain)
    assert sorted(muon + fused + head + plain) == sorted(names.values())


def test_a_saved_state_continues_bit_for_bit():
    model, optimizer = build()
    descend(model, optimizer, range(3))
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
    descend(model, optimizer, range(3, 6))

    def resumed(load_optimizer):
        file.seek(0)
        saved = torch.load(file, weights_only=True)
        other, other_optimizer = build()
        other.load_state_dict(saved["model"])
        if load_optimizer:
            other_optimizer.load_state_dict(saved["optimizer"])
        descend(other, other_optimizer, range(3, 6))
        return [torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True)]

    assert all(resumed(load_optimizer=True))
    assert not any(resumed(load_optimizer=False))


def test_a_set_newton_schulz_dtype_survives_saving():
    file = io.BytesIO()
    torch.save(MuonClip([nn.Parameter(normal(4, 4))], newton_schulz_dtype=FP32).state_dict(), file)
    file.seek(0)
    optimizer = MuonClip([nn.Parameter(normal(4, 4))])
    optimizer.load_state_dict(torch.load(file, weights_only=True))
    assert optimizer.param_groups[0]["newton_schulz_dtype"] is FP32


def test_schedules_set_rate_and_momentum_in_the_groups():
    model, optimizer = build()
    before = [p.detach().clone() for p in model.parameters()]
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: float(step > 0))
    descend(model, optimizer, [0])  # rate 0
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), before, strict=True))
    schedule.step()
    descend(model, optimizer, [1])
    assert not any(torch.equal(a, b) for a, b in zip(model.parameters(), before, strict=True))

    weight, (grad, *_) = normal(8, 8), gradients(8, 8)
    p = nn.Parameter(weight.clone())
    optimizer = MuonClip([p])
    optimizer.param_groups[0]["momentum"] = 0.5
    for _ in range(2):
        p.grad = grad.clone()
        optimizer.step()
    assert torch.allclose(optimizer.state[p]["momentum_buffer"], 1.5 * grad)


def test_parameters_without_a_gradient_are_left_alone():
    model, optimizer = build()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    model.proj.weight.grad = normal(8, 8)
    model.proj.bias.grad = normal(8)
    model.experts.down_proj.grad = normal(2, 8, 6)
    model.experts.down_proj.grad[1] = 0  # an expert without tokens only decays
    optimizer.step()
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert moved == {"proj.weight", "proj.bias", "experts.down_proj"}
    decayed = before["experts.down_proj"][1] * (1 - LR * 0.1)
    assert torch.equal(model.experts.down_proj[1], decayed)
    assert len(optimizer.state) == 3


def test_a_closure_gives_the_loss():
    p = nn.Parameter(normal(4, 4))
    optimizer = MuonClip([p])

    def closure():
        loss = p.square().sum()
        loss.backward()
        return loss

    first = optimizer.step(closure).item()
    assert p.detach().square().sum().item() < first


@pytest.mark.parametrize(
    ("settings", "shape", "dtype", "message"),
    [
        ({"lr": -1.0}, (4, 4), FP32, "lr -1.0"),
        ({"lr": math.nan}, (4, 4), FP32, "lr nan"),
        ({"weight_decay": -0.1}, (4, 4), FP32, "weight_decay -0.1"),
        ({"momentum": 1.0}, (4, 4), FP32, "momentum 1.0"),
        ({"betas": (0.9, 1.5)}, (4, 4), FP32, "betas 1.5"),
        ({}, (4,), FP32, "not shape (4,)"),
        ({}, (4, 4), torch.bfloat16, "is torch.bfloat16"),
        ({}, (4, 4), torch.complex64, "is torch.complex64"),
    ],
)
def test_bad_settings_are_one_clear_line(settings, shape, dtype, message):
    with pytest.raises(UserError) as error:
        MuonClip([nn.Parameter(torch.zeros(shape, dtype=dtype))], **settings)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_a_split_that_does_not_divide_and_a_sparse_gradient_are_refused():
    p = nn.Parameter(normal(5, 4))
    with pytest.raises(UserError, match="split 2"):
        MuonClip([{"params": [p], "split": 2}])
    optimizer = MuonClip([p])
    p.grad = normal(5, 4).to_sparse()
    with pytest.raises(UserError, match="sparse"):
        optimizer.step()


@pytest.mark.cpu_only
def test_bf16_only_where_it_is_fast(monkeypatch):
    for fast, dtype in ((True, torch.bfloat16), (False, FP32)):
        monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda fast=fast: fast)
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
        assert newton_schulz(normal(2, 4, 6)).dtype is dtype


# --- QK-Clip and the router bias -------------------------------------------------------------------------------------

HEADS, NOPE, ROPE, V, RANK, WIDTH = 4, 6, 2, 5, 7, 12


class Attention(nn.Module):
    """MLA's projections and its rule for the clip, without RoPE (a rotation, which commutes with a scale)."""

    def __init__(self, one_gamma=False, whole_gamma=False):
        super().__init__()
        self.one_gamma, self.whole_gamma = one_gamma, whole_gamma
        self.q_b_proj = nn.Parameter(normal(HEADS * (NOPE + ROPE), WIDTH, seed=1))
        self.kv_a_proj_with_mqa = nn.Parameter(normal(RANK + ROPE, WIDTH, seed=2))
        self.kv_b_proj = nn.Parameter(normal(HEADS * (NOPE + V), RANK, seed=3))
        self.register_buffer("max_logit", torch.full((HEADS,), -math.inf))

    def forward(self, x):
        q = F.linear(x, self.q_b_proj).unflatten(-1, (HEADS, -1)).transpose(0, 1)
        latent, k_rope = F.linear(x, self.kv_a_proj_with_mqa).split([RANK, ROPE], -1)
        k_nope, v = F.linear(latent, self.kv_b_proj).unflatten(-1, (HEADS, -1)).transpose(0, 1).split([NOPE, V], -1)
        k = torch.cat([k_nope, k_rope.expand(HEADS, -1, -1)], -1)
        logits = q @ k.mT / math.sqrt(NOPE + ROPE)
        logits = logits.masked_fill(torch.ones(logits.shape[-2:]).triu(1).bool(), -math.inf)
        self.max_logit.copy_(torch.maximum(self.max_logit, logits.detach().amax((-1, -2))))
        return v

    def clip_qk_(self, tau):
        above = self.max_logit > tau
        gamma = torch.where(above, tau / self.max_logit, 1.0)[:, None, None]
        if self.one_gamma:
            gamma = gamma.amin().expand_as(gamma)
        root = gamma if self.whole_gamma else gamma.sqrt()
        q, kv = self.q_b_proj.unflatten(0, (HEADS, -1)), self.kv_b_proj.unflatten(0, (HEADS, -1))
        q[:, :NOPE] *= root
        q[:, NOPE:] *= gamma
        kv[:, :NOPE] *= root
        return above.sum()


class MoE(nn.Module):
    def __init__(self, sign=1):
        super().__init__()
        self.sign = sign
        self.register_buffer("bias", torch.zeros(3))
        self.register_buffer("load", torch.zeros(3))

    def update_bias_(self):
        self.bias += self.sign * 0.001 * (self.load.mean() - self.load).sign()


def hooked(*modules, tau=None, make_optimizer=lambda params: torch.optim.SGD(params, lr=0.0)):
    model = nn.ModuleList([*modules, nn.Linear(1, 1)])
    optimizer = make_optimizer(model.parameters())
    return optimizer, attach_hooks(optimizer, model, tau)


def clip(attention):
    """Takes one step with τ between the heads' largest logits.

    Returns the largest logits before, the values before, τ, the values after, and the largest logits after.
    """
    x = normal(9, WIDTH)
    with torch.no_grad():
        values = attention(x)
        before = attention.max_logit.clone()
        tau = before.sort().values[1:3].mean().item()  # two heads above, two below
        optimizer, hooks = hooked(attention, tau=tau)
        optimizer.step()
        assert hooks.last["clipped_heads"] == 2 and torch.equal(hooks.last["max_logits"], before[None])
        assert (attention.max_logit == -math.inf).all()
        return before, values, tau, attention(x), attention.max_logit.clone()


def clipped_exactly(attention):
    before, values, tau, new_values, after = clip(attention)
    above = before > tau
    return (
        torch.allclose(after[above], (tau / before * before)[above], rtol=1e-5)
        and torch.equal(after[~above], before[~above])
        and torch.equal(values, new_values)
    )


def test_a_clip_scales_the_largest_logit_by_gamma_and_nothing_else():
    attention = Attention()
    shared = attention.kv_a_proj_with_mqa.detach().clone()
    assert clipped_exactly(attention)
    assert torch.equal(attention.kv_a_proj_with_mqa, shared)


@pytest.mark.parametrize("mutant", [{"one_gamma": True}, {"whole_gamma": True}], ids=str)
def test_the_property_catches_a_wrong_clip(mutant):
    assert not clipped_exactly(Attention(**mutant))


@pytest.mark.parametrize("make_optimizer", [None, lambda params: torch.optim.SGD(params, lr=0.0)], ids=["ours", "SGD"])
def test_hooks_run_once_per_step_with_accumulation(make_optimizer):
    attention, moe = Attention(), MoE()
    make_optimizer = make_optimizer or (lambda params: MuonClip([{"params": params, "muon": False}], lr=0.0))
    optimizer, hooks = hooked(attention, moe, tau=None, make_optimizer=make_optimizer)
    first, second = normal(9, WIDTH, seed=4), normal(9, WIDTH, seed=5)
    with torch.no_grad():
        attention(first)
        seen = attention.max_logit.clone()
        attention(second)
    seen = torch.maximum(seen, attention.max_logit)
    for load in ([3.0, 1.0, 2.0], [2.0, 1.0, 0.0]):
        moe.load += torch.tensor(load)
    assert hooks.last == {} and (moe.bias == 0).all()

    optimizer.step()
    assert torch.equal(hooks.last["max_logits"], seen[None]) and "clipped_heads" not in hooks.last
    assert hooks.last["loads"].tolist() == [[5, 2, 2]]
    assert torch.equal(moe.bias, torch.tensor([-0.001, 0.001, 0.001]))
    assert (moe.load == 0).all() and (attention.max_logit == -math.inf).all()

    optimizer.step()  # no logits were recorded, so nothing is clipped
    assert torch.equal(moe.bias, torch.tensor([-0.001, 0.001, 0.001]))
    hooks.remove()
    moe.load += torch.tensor([1.0, 0.0, 0.0])
    optimizer.step()
    assert moe.load.sum() == 1


def test_an_empty_step_clips_nothing():
    attention = Attention()
    before = attention.q_b_proj.detach().clone()
    optimizer, hooks = hooked(attention, tau=1.0)
    optimizer.step()
    assert hooks.last["clipped_heads"] == 0 and torch.equal(attention.q_b_proj, before)


def balanced(moe):
    """Returns whether further bias updates balance the load of a router that follows its bias."""
    optimizer, hooks = hooked(moe)
    affinity = torch.tensor([0.51, 0.5, 0.49]) + 0.01 * normal(300, 3)
    spread = []
    for _ in range(30):
        moe.load += F.one_hot((affinity + moe.bias).argmax(-1), 3).sum(0)
        optimizer.step()
        spread.append((hooks.last["loads"].max() / hooks.last["loads"].mean()).item())
    return spread[-1] < 1.2 < spread[0]


def test_the_bias_update_balances_and_an_inverted_sign_does_not():
    assert balanced(MoE())
    assert not balanced(MoE(sign=-1))


def test_a_tau_that_is_not_positive_is_refused():
    for tau in (0, -1, math.nan):
        with pytest.raises(UserError, match="qk_clip_tau"):
            hooked(Attention(), tau=tau)
