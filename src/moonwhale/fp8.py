"""FP8 training as a conversion of the model: DeepSeek-V3's tiles (§3.3), or torchao's scales per tensor or per row.

    convert(model, "blockwise")                  # on a GPU that supports it, before optimizer and trainer are made
    convert(model, "blockwise", emulate=True)    # the same numbers on any device, slowly

Linear layers and experts then compute in FP8, forward and backward. Embedding, head, router, norms and the attention
core stay in the model's precision. The weights stay in fp32 under the same names.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moonwhale.errors import UserError, require_package
from moonwhale.model.routed import grouped_product

TILE_SIZE = 128
E4M3_MAX = torch.finfo(torch.float8_e4m3fn).max  # 448
# The kernels need a weight's (out, in) to be multiples of these. The blockwise product pads `out` with zeros, since
# DeepSeek's own kv_a_proj_with_mqa has 576 outputs.
WIDTH_MULTIPLES = {"tensorwise": (16, 16), "rowwise": (16, 16), "blockwise": (1, TILE_SIZE)}


def convert(model: nn.Module, recipe: str, emulate: bool = False) -> list[str]:
    """Make a model's linear layers, except the head, compute in FP8; with `blockwise` its experts too.

    Linear layers are replaced in the model by layers that share their parameters.

    `tensorwise` and `rowwise` are recipes of `torchao.float8`, with one scale per tensor or per row. `blockwise` is
    DeepSeek-V3's. Without `emulate` they run on tensor cores, which need widths that are multiples of 16 or 128.

    Returns:
        the names of the converted modules.

    Raises:
        UserError: the recipe's kernels cannot cut a module into tiles, or torchao is missing.
    """
    linears = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and name.rpartition(".")[2] not in ("lm_head", "head")
    }
    experts = {name: m for name, m in model.named_modules() if recipe == "blockwise" and hasattr(m, "product")}
    if not emulate:
        _check_widths(linears | experts, recipe)
    if recipe == "blockwise":
        product = emulated_product if emulate else _kernels_product
        for name, linear in linears.items():
            model.set_submodule(name, BlockwiseLinear(linear, product))
        for module in experts.values():
            module.product, module.row_multiple = product, TILE_SIZE  # so that no tile holds rows of two experts
    else:
        _convert_by_torchao(model, set(linears), recipe, emulate)
    return [*linears, *experts]


def _check_widths(modules: dict[str, nn.Module], recipe: str) -> None:
    multiples, wrong = WIDTH_MULTIPLES[recipe], []
    for name, module in modules.items():
        for weight in module.parameters(recurse=False):
            widths = weight.shape[-2:]
            if weight.ndim > 1 and any(width % m for width, m in zip(widths, multiples, strict=True)):
                nearest = [max(1, (width + m // 2) // m) * m for width, m in zip(widths, multiples, strict=True)]
                wrong.append(
                    f"{name} is {widths[0]} x {widths[1]}, where the nearest that fits is {nearest[0]} x {nearest[1]}"
                )
    if wrong:
        others = f"; {len(wrong) - 1} more matrices do not fit" if wrong[1:] else ""
        raise UserError(
            f"`precision`: fp8-{recipe} multiplies by {multiples[1]} features at once, and {wrong[0]}{others} (change "
            "the `model.FIELD` that sets it, or give `precision` bf16)"
        )


def _convert_by_torchao(model: nn.Module, names: set[str], recipe: str, emulate: bool) -> None:
    require_package("torchao", "fp8", f"fp8-{recipe}")
    from torchao.float8 import Float8LinearConfig, convert_to_float8_training

    config = Float8LinearConfig.from_recipe_name(recipe)
    # The dataclass is frozen, and recipes take no such arguments. A weight's gradient sums over tokens, whose number
    # need not be a multiple of 16.
    object.__setattr__(config, "emulate", emulate)
    object.__setattr__(config, "pad_inner_dim", True)
    convert_to_float8_training(model, module_filter_fn=lambda _, name: name in names, config=config)


class BlockwiseLinear(nn.Linear):
    """A linear layer whose three products, forward and backward, are computed in FP8 by `product`.

    It takes over the parameters of `linear`, which are neither copied nor renamed.
    """

    def __init__(self, linear: nn.Linear, product: Callable[[Tensor, Tensor], Tensor]):
        super().__init__(linear.in_features, linear.out_features, bias=linear.bias is not None, device="meta")
        self.weight, self.bias, self.product = linear.weight, linear.bias, product
        self.train(linear.training)

    def forward(self, x: Tensor) -> Tensor:
        """Map (…, in) to (…, out), in the dtype that `nn.Linear` would return."""
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        out = self.product(x.flatten(0, -2), self.weight).unflatten(0, x.shape[:-1])
        return out if self.bias is None else out + self.bias.to(out.dtype)


def quantise(x: Tensor, rows: int, columns: int) -> Tensor:
    """Round x (…, M, N) to E4M3 and back to fp32, with one scale for every tile of `rows` x `columns`.

    The scale maps a tile's largest magnitude to 448, the largest number in E4M3. It is an fp32 number, not a power of
    two. Tiles at the edges are smaller.
    """
    height, width = x.shape[-2:]
    rows, columns = min(rows, height), min(columns, width)
    whole = F.pad(x.float(), (0, -width % columns, 0, -height % rows))
    tiles = whole.unflatten(-1, (-1, columns)).unflatten(-3, (-1, rows))  # (…, M / rows, rows, N / columns, columns)
    largest = tiles.abs().amax((-3, -1), keepdim=True).clamp(min=1e-12)
    exact = largest.cpu() if largest.device.type == "mps" else largest  # MPS has no fp64
    scale = (E4M3_MAX / exact.double()).float().to(x.device)
    tiles = (tiles * scale).to(torch.float8_e4m3fn).float() * scale.reciprocal()
    return tiles.flatten(-4, -3).flatten(-2)[..., :height, :width]


def emulated_product(x: Tensor, weight: Tensor, ends: Tensor | None = None) -> Tensor:
    """Compute x @ weight.T for x (N, in) and weight (out, in) as DeepSeek-V3 does in FP8, on any device.

    With `ends` (E,) int32, x holds E groups of rows, and each group has its own weight in (E, out, in).
    """
    return _EmulatedProduct.apply(x, weight, ends).to(x.dtype)  # inside the function torch 2.11 loses the gradient


class _EmulatedProduct(torch.autograd.Function):
    """Quantises the factors of each product so that a scale covers 128 summands and can leave their sum (V3 fig. 7).

    Forward and input gradient sum over features, so activations and output gradients have 1 x 128 tiles. The weight
    gradient sums over tokens, so there the same two have 128 x 1 tiles.
    """

    @staticmethod
    def forward(ctx, x, weight, ends):
        w = quantise(weight, TILE_SIZE, TILE_SIZE)
        ctx.save_for_backward(x, w, ends)
        return _multiply(quantise(x, 1, TILE_SIZE), w.mT, ends)

    @staticmethod
    def backward(ctx, d_out):
        x, w, ends = ctx.saved_tensors
        d_x = _multiply(quantise(d_out, 1, TILE_SIZE), w, ends).to(x.dtype)
        d_weight = _multiply(quantise(d_out, TILE_SIZE, 1).mT, quantise(x, TILE_SIZE, 1), ends)
        return d_x, d_weight, None


def _multiply(a: Tensor, b: Tensor, ends: Tensor | None) -> Tensor:
    """Multiply in fp32 even under autocast: products of FP8 numbers are exact there, and sums as in tensor cores."""
    with torch.autocast(a.device.type, enabled=False):
        return a @ b if ends is None else grouped_product(a, b, ends)


def _kernels_product(x: Tensor, weight: Tensor, ends: Tensor | None = None) -> Tensor:
    """Compute `emulated_product` by torchao's kernels for Hopper GPUs, which take and return bf16."""
    from torchao.prototype.blockwise_fp8_training.linear import fp8_blockwise_mm
    from torchao.prototype.moe_training.blockwise_fp8.grouped_mm import _to_fp8_blockwise_then_scaled_grouped_mm

    x, weight, dtype = x.bfloat16(), weight.bfloat16(), x.dtype
    if ends is not None:
        out = _to_fp8_blockwise_then_scaled_grouped_mm(x, weight.mT, ends, pad_token_groups_for_grouped_mm=False)
        return out.to(dtype)
    # Pad with zeros: the weight gradient needs whole tiles of tokens, and the input gradient whole tiles of outputs.
    padded, padded_weight = (F.pad(a, (0, 0, 0, -len(a) % TILE_SIZE)) for a in (x, weight))
    return fp8_blockwise_mm.apply(padded, padded_weight, TILE_SIZE)[: len(x), : len(weight)].to(dtype)
