"""FP8 products match loops in fp64 and torchao's references, and `fp8.convert` converts the right modules."""

import ast
import bisect
import copy
import importlib.util
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from moonwhale import fp8, precision
from moonwhale.errors import UserError
from moonwhale.model import MoonwhaleConfig, MoonwhaleForCausalLM
from moonwhale.model.moe import Experts
from moonwhale.optim.muonclip import MuonClip, param_groups
from moonwhale.optim.step_hooks import attach_hooks
from moonwhale.presets import get_preset
from moonwhale.train.pretrain import train

# All non-negative E4M3 values: normal numbers (1 + m / 8) * 2^(e - 7) for e = 1..15, where the largest code is NaN,
# and subnormal numbers m * 2^-9.
NORMAL = {(1 + m / 8) * 2.0 ** (e - 7) for e in range(1, 16) for m in range(8)} - {480.0}
E4M3 = sorted(NORMAL | {m / 512 for m in range(8)})
SHAPES = [(1, 128), (128, 1), (128, 128)]


def random_values(*shape, seed=0, spread=6):
    """Return random numbers of very different magnitudes."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator) * torch.exp2(spread * torch.randn(shape, generator=generator))


def nearest(y: float) -> float:
    """Round to the nearest E4M3 value. A tie goes to the even mantissa, which has an even index in E4M3."""
    above = min(bisect.bisect_left(E4M3, abs(y)), len(E4M3) - 1)
    best = min((max(above - 1, 0), above), key=lambda i: (abs(E4M3[i] - abs(y)), i % 2))
    return E4M3[best] if y > 0 else -E4M3[best]


def reference_tiles(x, rows, columns):
    """Quantise x (M, N) by tiles. Return the E4M3 values and the scale of each element, both (M, N) in fp64."""
    q, scales = torch.empty_like(x, dtype=torch.float64), torch.empty_like(x, dtype=torch.float64)
    for i in range(0, x.shape[0], rows):
        for j in range(0, x.shape[1], columns):
            tile = x[i : i + rows, j : j + columns].double()
            scale = tile.abs().max().item() / 448
            q[i : i + rows, j : j + columns] = (tile / scale).apply_(nearest)
            scales[i : i + rows, j : j + columns] = scale
    return q, scales


def close(ours, reference):
    """Compare up to fp32 rounding, which occasionally sends a number near a tie to the other E4M3 neighbour."""
    return (ours.double() - reference).norm() <= 2e-4 * reference.norm()


@pytest.mark.parametrize(("rows", "columns"), SHAPES)
def test_tiles_are_rounded_to_the_nearest_e4m3_value(rows, columns):
    x = random_values(150, 200)  # edge tiles have 22 rows and 72 columns
    q, scales = reference_tiles(x, rows, columns)
    ours = fp8.quantise(x, rows, columns)
    assert ours.dtype is torch.float32
    torch.testing.assert_close(ours.double(), q * scales, rtol=1e-6, atol=0)


def test_the_table_of_e4m3_values_matches_torch():
    codes = torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn)
    assert codes.float().tolist() == E4M3 and fp8.E4M3_MAX == 448


def test_the_maximum_of_a_tile_is_exact_and_nothing_overflows():
    x = random_values(64, 1024, spread=20)
    ours = fp8.quantise(x, 1, 128)
    largest = x.view(64, 8, 128).abs().amax(-1)
    torch.testing.assert_close(ours.view(64, 8, 128).abs().amax(-1), largest, rtol=1e-6, atol=0)
    assert not fp8.quantise(torch.zeros(3, 130), 1, 128).any()
    broken = torch.ones(2, 256)
    broken[0, 5], broken[1, 200] = torch.inf, torch.nan
    assert fp8.quantise(broken, 1, 128).isfinite().view(2, 2, 128).all(-1).tolist() == [[False, True], [True, False]]


def reference(x, weight, d_out):
    """Return the output, input gradient and weight gradient as DeepSeek-V3 §3.3 defines them.

    Each sum of 128 products of E4M3 values is multiplied by its scales and then accumulated.
    """

    def product(a, b):  # (M, K) @ (N, K).T; each operand is (values, scales)
        (qa, sa), (qb, sb) = a, b
        total = 0
        for k in range(0, qa.shape[1], 128):
            part = qa[:, k : k + 128] @ qb[:, k : k + 128].T
            total = total + part * sa[:, k, None] * sb[None, :, k]
        return total

    def transposed(pair):
        return tuple(t.T for t in pair)

    w = reference_tiles(weight, 128, 128)
    return (
        product(reference_tiles(x, 1, 128), w),
        product(reference_tiles(d_out, 1, 128), transposed(w)),
        product(transposed(reference_tiles(d_out, 128, 1)), transposed(reference_tiles(x, 128, 1))),
    )


def differentiated(product, x, weight, d_out, ends=None):
    x, weight = x.clone().requires_grad_(), weight.clone().requires_grad_()
    out = product(x, weight, ends)
    return out.detach(), *torch.autograd.grad(out, (x, weight), d_out)


@pytest.fixture(scope="module")
def operands():
    """x (N, in), weight (out, in) and d_out (N, out), where each size is one whole tile and part of another."""
    return (
        random_values(150, 140, seed=1, spread=2),
        random_values(136, 140, seed=2, spread=2),
        random_values(150, 136, seed=3, spread=2),
    )


@pytest.fixture(scope="module")
def expected(operands):
    return reference(*operands)


def test_the_three_products_match_deepseek_v3(operands, expected):
    for ours, theirs in zip(differentiated(fp8.emulated_product, *operands), expected, strict=True):
        assert close(ours, theirs)


@pytest.mark.parametrize(
    ("mutant", "wrong"),
    [
        (lambda rows, columns: (1, 128) if (rows, columns) == (128, 1) else (rows, columns), [2]),
        (lambda rows, columns: (10_000, 10_000), [0, 1, 2]),
        (lambda rows, columns: (rows, columns) if 1 in (rows, columns) else (1, 128), [0, 1]),
    ],
    ids=["weight gradient by tiles along features", "one scale for a tensor", "weights by 1 x 128"],
)
def test_wrong_tile_shapes_are_detected(operands, expected, monkeypatch, mutant, wrong):
    quantise = fp8.quantise
    monkeypatch.setattr(fp8, "quantise", lambda x, rows, columns: quantise(x, *mutant(rows, columns)))
    found = zip(differentiated(fp8.emulated_product, *operands), expected, strict=True)
    assert [i for i, (ours, theirs) in enumerate(found) if not close(ours, theirs)] == wrong


def test_each_group_of_rows_uses_its_own_weight():
    ends = torch.tensor([128, 128, 384], dtype=torch.int32)
    x, weight, d_out = (
        random_values(384, 132, seed=1, spread=2),
        random_values(3, 40, 132, seed=2, spread=2),
        random_values(384, 40, spread=2),
    )
    out, d_x, d_weight = differentiated(fp8.emulated_product, x, weight, d_out, ends)
    assert not d_weight[1].any(), "an expert without tokens"
    for expert, rows in ((0, slice(0, 128)), (2, slice(128, 384))):
        theirs = reference(x[rows], weight[expert], d_out[rows])
        for ours, other in zip((out[rows], d_x[rows], d_weight[expert]), theirs, strict=True):
            assert close(ours, other)


def test_an_outlier_affects_only_its_own_tile():
    """A channel 2^16 times as large as the rest costs precision only within its own tile.

    The errors are those of a product whose weights are zero at that channel, relative to the exact product.
    """
    x, weight = random_values(64, 1024, seed=1, spread=0), random_values(32, 1024, seed=2, spread=0)
    x[:, 5] *= 2**16
    weight[:, 5] = 0
    exact = x @ weight.T
    errors = [
        ((q @ weight.T - exact).norm() / exact.norm()).item()
        for q in (fp8.quantise(x, 1, 128), fp8.quantise(x, *x.shape))
    ]
    assert errors[0] < 0.1 < 0.2 < errors[1]


def test_autocast_changes_the_output_dtype_but_not_the_products():
    torch.manual_seed(0)
    plain = torch.nn.Linear(130, 50)
    model = torch.nn.ModuleDict({"a": copy.deepcopy(plain)})
    fp8.convert(model, "blockwise", emulate=True)
    linear = model["a"]
    x = torch.randn(3, 7, 130)
    with torch.autocast("cpu", torch.bfloat16):
        out, expected = linear(x), plain(x)
        out.float().square().sum().backward()
    assert out.dtype is expected.dtype is torch.bfloat16 and out.shape == expected.shape
    assert linear.weight.grad.dtype is torch.float32
    exact = linear(x.bfloat16().float()) - linear.bias
    assert torch.equal(exact.bfloat16() + linear.bias.bfloat16(), out)
    torch.testing.assert_close(out, expected, rtol=0.1, atol=0.1)


# --- torchao ---------------------------------------------------------------------------------------------------------


def test_tiles_match_torchao():
    """Tiles equal torchao's reference implementations bit for bit.

    The references are parsed out of torchao's kernels.py, since importing that file needs triton.
    """
    pytest.importorskip("torchao")
    folder = importlib.util.find_spec("torchao.prototype.blockwise_fp8_training").submodule_search_locations[0]
    tree = ast.parse(Path(folder, "kernels.py").read_text(encoding="utf-8"))
    tree.body = [node for node in tree.body if getattr(node, "name", "").startswith("torch_blockwise_")]
    known = {"torch": torch, "Tuple": tuple, "EPS": 1e-12, "e4m3_dtype": torch.float8_e4m3fn}
    known["FP8_E4M3_DTYPES"] = {torch.float8_e4m3fn}
    exec(compile(tree, "kernels.py", "exec"), known)
    x = random_values(256, 384)

    q, scale = known["torch_blockwise_scale_act_quant_lhs"](x)
    ours = fp8.quantise(x, 1, 128).view(256, 3, 128)
    assert torch.equal(q.float().view(256, 3, 128) * scale.unsqueeze(-1), ours)
    q, scale = known["torch_blockwise_scale_act_quant_rhs"](x)
    assert torch.equal(q.float() * scale.repeat_interleave(128, 0), fp8.quantise(x, 128, 1))
    q, scale = known["torch_blockwise_scale_weight_quant"](x)
    scale = scale.repeat_interleave(128, 0).repeat_interleave(128, 1)
    assert torch.equal(q.float() * scale, fp8.quantise(x, 128, 128))


@pytest.mark.parametrize("recipe", ["tensorwise", "rowwise"])
def test_torchao_recipes_convert_the_linears_and_learn(model, recipe):
    pytest.importorskip("torchao")
    converted = copy.deepcopy(model)
    names = fp8.convert(converted, recipe, emulate=True)
    assert names == LINEARS
    kinds = {name for name, m in converted.named_modules() if type(m).__name__ == "Float8Linear"}
    assert kinds == set(LINEARS)
    assert converted.state_dict().keys() == model.state_dict().keys()
    assert losses(converted, 6)[-1] < 0.9 * losses(model, 1)[0]


@pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability()[0] != 9, reason="needs a Hopper GPU"
)
@pytest.mark.parametrize("ends", [None, [128, 128, 384]])
def test_the_kernels_on_a_hopper_gpu_match_the_emulation(ends):
    pytest.importorskip("torchao")
    ends = None if ends is None else torch.tensor(ends, dtype=torch.int32, device="cuda")
    shape = (256, 512) if ends is None else (3, 256, 512)
    x, weight, d_out = (random_values(*s, spread=1).bfloat16().cuda() for s in ((384, 512), shape, (384, 256)))
    theirs = differentiated(fp8._kernels_product, x, weight, d_out, ends)
    for a, b in zip(theirs, differentiated(fp8.emulated_product, x, weight, d_out, ends), strict=True):
        assert (a.float() - b.float()).norm() < 0.01 * b.float().norm()


# --- the conversion --------------------------------------------------------------------------------------------------

ATTENTION = ["q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj"]
GATED = ["gate_proj", "up_proj", "down_proj"]
LINEARS = [
    *(f"model.layers.0.self_attn.{name}" for name in ATTENTION),
    *(f"model.layers.0.mlp.{name}" for name in GATED),
    *(f"model.layers.1.self_attn.{name}" for name in ATTENTION),
    *(f"model.layers.1.mlp.shared_experts.{name}" for name in GATED),
    *(f"model.layers.2.self_attn.{name}" for name in ATTENTION),
    *(f"model.layers.2.mlp.shared_experts.{name}" for name in GATED),
    "model.layers.2.eh_proj",
]
EXPERTS = ["model.layers.1.mlp.experts", "model.layers.2.mlp.experts"]


@pytest.fixture(scope="module")
def model():
    """A dense block, a block with experts, and an MTP module. Widths differ, and none is a multiple of 128."""
    torch.manual_seed(0)
    config = MoonwhaleConfig(
        vocab_size=61,
        hidden_size=144,
        intermediate_size=160,
        num_hidden_layers=2,
        first_k_dense_replace=1,
        num_attention_heads=2,
        q_lora_rank=80,
        kv_lora_rank=48,
        qk_nope_head_dim=16,
        qk_rope_head_dim=16,
        v_head_dim=16,
        n_routed_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=64,
        num_nextn_predict_layers=1,
        max_position_embeddings=64,
        eos_token_id=None,
    )
    return MoonwhaleForCausalLM(config).train()


TOKENS = (torch.arange(32) * torch.tensor([[1], [3], [5], [7]])) % 61


def losses(model, steps):
    """Return the losses of MuonClip's first steps on the same four rows, which the model memorises."""
    model = copy.deepcopy(model)
    optimizer = MuonClip(param_groups(model, lr=1e-2))
    attach_hooks(optimizer, model)
    seen = []
    for _ in range(steps):
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(TOKENS, labels=TOKENS).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        seen.append(loss.item())
    return seen


@pytest.fixture
def blockwise(model):
    converted = copy.deepcopy(model)
    assert fp8.convert(converted, "blockwise", emulate=True) == LINEARS + EXPERTS
    return converted


def test_exactly_the_linears_and_the_experts_are_converted(model, blockwise, monkeypatch):
    before = dict(model.named_modules())
    changed = {name: m for name, m in blockwise.named_modules() if type(m) is not type(before[name])}
    assert list(changed) == LINEARS and {type(m) for m in changed.values()} == {fp8.BlockwiseLinear}
    assert {name for name, m in blockwise.named_modules() if getattr(m, "product", None)} == {*LINEARS, *EXPERTS}

    # Every converted weight must pass through the FP8 product: each linear's once, and each expert layer's two stacks.
    seen = []
    product = fp8._EmulatedProduct.apply
    monkeypatch.setattr(fp8._EmulatedProduct, "apply", lambda x, w, ends: seen.append(w) or product(x, w, ends))
    blockwise(TOKENS, labels=TOKENS)
    names = {id(p): name for name, p in blockwise.named_parameters()}
    expected = [f"{name}.weight" for name in LINEARS]
    expected += [f"{name}.{stack}" for name in EXPERTS for stack in ("gate_up_proj", "down_proj")]
    assert sorted(names[id(w)] for w in seen) == sorted(expected)


def test_a_converted_head_is_detected(model):
    renamed = copy.deepcopy(model)
    renamed.register_module("output", renamed._modules.pop("lm_head"))
    assert fp8.convert(renamed, "blockwise", emulate=True) != LINEARS + EXPERTS


def test_a_checkpoint_holds_no_trace_of_fp8(model, blockwise, tmp_path):
    blockwise.save_pretrained(tmp_path)
    plain = MoonwhaleForCausalLM.from_pretrained(tmp_path)
    assert not any(isinstance(m, fp8.BlockwiseLinear) for m in plain.modules())
    for name, weight in model.state_dict().items():
        assert torch.equal(plain.state_dict()[name], weight), name
    assert plain.state_dict().keys() == blockwise.state_dict().keys()
    blockwise.load_state_dict(model.state_dict())


def test_fp8_learns_as_bf16_does_with_weights_in_fp32(model, blockwise):
    plain, converted = losses(model, 7), losses(blockwise, 7)  # enough steps to memorise the batch
    assert converted[-1] < 0.7 * converted[0]
    assert converted == pytest.approx(plain, rel=0.02) and converted != plain
    assert {p.dtype for p in blockwise.parameters()} == {torch.float32}


def test_every_parameter_has_a_gradient(blockwise):
    with torch.no_grad():  # output projections are initialised to zero, which would block gradients
        for p in blockwise.parameters():
            p += 0.02 * torch.randn_like(p)
    blockwise(TOKENS, labels=TOKENS).loss.backward()
    assert not [name for name, p in blockwise.named_parameters() if p.grad is None or not p.grad.any()]


def test_experts_with_another_product_compute_the_same():
    """With an exact `product`, experts compute what the default path with its hand-written gradient computes."""
    torch.manual_seed(0)
    config = MoonwhaleConfig(hidden_size=24, moe_intermediate_size=16, n_routed_experts=5)
    experts = Experts(config)
    for p in experts.parameters():
        torch.nn.init.normal_(p)
    x, gates = torch.randn(70, 24), torch.rand(70, 2)
    index = torch.randint(4, (70, 2))  # no token chooses the last expert

    def run():
        inputs = [t.clone().requires_grad_() for t in (x, gates)]
        out = experts(inputs[0], index, inputs[1])
        return out, *torch.autograd.grad(out.square().sum(), [*inputs, *experts.parameters()])

    default_path, sizes = run(), []

    def product(rows, stack, ends):
        sizes.append(ends.diff(prepend=ends.new_zeros(1)))
        parts = rows.tensor_split(ends[:-1].tolist())
        return torch.cat([part @ weight.T for part, weight in zip(parts, stack, strict=True)])

    experts.product, experts.row_multiple = product, 128
    for plain, ours in zip(run(), default_path, strict=True):
        torch.testing.assert_close(plain, ours, rtol=1e-3, atol=1e-3)
    assert all((size % 128 == 0).all() for size in sizes), "a tile of 128 rows holds one expert's only"


def test_widths_that_do_not_fit_the_kernels_are_refused(model):
    with pytest.raises(UserError) as error:
        fp8.convert(copy.deepcopy(model), "blockwise")
    message = str(error.value)
    assert message.startswith("`precision`: fp8-blockwise multiplies by 128 features at once, and ")
    assert "model.layers.0.self_attn.q_a_proj is 80 x 144, where the nearest that fits is 80 x 128" in message
    assert "more matrices" in message and "`precision` bf16" in message and "\n" not in message

    linears = torch.nn.ModuleDict({"fits": torch.nn.Linear(128, 72), "not": torch.nn.Linear(576, 256)})
    with pytest.raises(UserError, match="and not is 256 x 576, where the nearest that fits is 256 x 640 "):
        fp8.convert(linears, "blockwise")
    with pytest.raises(UserError, match="and odd is 20 x 24, where the nearest that fits is 16 x 32 "):
        fp8.convert(torch.nn.ModuleDict({"odd": torch.nn.Linear(24, 20)}), "rowwise")


@pytest.mark.parametrize("preset", ["seed_190m", "large"])
def test_the_large_preset_fits_the_tiles_and_seed_does_not(preset):
    """The `large` preset fits, and `seed_190m` does not.

    `large` has DeepSeek-V3's latent of 512, so the 576 outputs of kv_a_proj_with_mqa must be accepted too, although
    576 is not a multiple of 128.
    """
    with torch.device("meta"):
        model = MoonwhaleForCausalLM(MoonwhaleConfig(**get_preset(preset).model))
    if preset == "large":
        assert "model.layers.0.self_attn.kv_a_proj_with_mqa" in fp8.convert(model, "blockwise")
    else:
        with pytest.raises(UserError, match="kv_b_proj is 1536 x 192, where the nearest that fits is 1536 x 256"):
            fp8.convert(model, "blockwise")


def test_an_fp8_run_without_the_hardware_is_refused(tiny_run):
    with pytest.raises(UserError, match=r"`precision`: no fp8-blockwise on cpu.*\(give `precision` bf16\)"):
        train(tiny_run(precision="fp8-blockwise"))


@pytest.mark.slow
def test_an_fp8_run_trains_and_saves_a_plain_checkpoint(tiny_run, monkeypatch, tmp_path):
    converted, convert = [], fp8.convert
    monkeypatch.setattr(precision, "precision_unsupported_reason", lambda device, name: "")
    monkeypatch.setattr(fp8, "convert", lambda m, recipe: converted.append((recipe, convert(m, recipe, emulate=True))))
    train(tiny_run(precision="fp8-blockwise"))
    ((recipe, names),) = converted
    assert recipe == "blockwise" and "model.layers.0.mlp.experts" in names
    assert MoonwhaleForCausalLM.from_pretrained(tmp_path / "run").config.num_hidden_layers == 2


def test_an_emulated_product_is_close_to_the_exact_one():
    x, weight = torch.randn(200, 300), torch.randn(100, 300)
    exact = F.linear(x, weight)
    assert (fp8.emulated_product(x, weight) - exact).norm() < 0.05 * exact.norm()
