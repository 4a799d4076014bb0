"""FP8 training as a conversion of the model: DeepSeek-V3's tiles (§3.3), or torchao's scales for a tensor or its rows.

    convert(model, "blockwise")                  # on a GPU that has it, before the optimizer and the trainer are made
    convert(model, "blockwise", emulate=True)    # the same numbers anywhere, slowly

Linear layers and experts compute in FP8, forward and backward. Embedding, head, router, norms and what lies between
queries, keys and values stay as they are, and so do the weights: fp32, under the same names.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moonwhale.errors import UserError
from moonwhale.model.moe import grouped_product

TILE = 128
LARGEST = torch.finfo(torch.float8_e4m3fn).max  # 448
# What kernels want a weight's (out, in) to be multiples of. Blockwise, `out` is filled up with rows of zeros, since
# DeepSeek's own kv_a_proj_with_mqa has 576.
MULTIPLES = {"tensorwise": (16, 16), "rowwise": (16, 16), "blockwise": (1, TILE)}


def convert(model: nn.Module, recipe: str, emulate: bool = False) -> list[str]:
    """Makes the model's linear layers, but the head, compute in FP8, in place; of `blockwise` its experts, too.

    `tensorwise` and `rowwise` are `torchao.float8`'s recipes, one scale for a tensor or for a row; `blockwise` is
    DeepSeek-V3's. Without `emulate` they run on tensor cores, which want widths to be multiples of 16, or 128.

    Returns:
        the names of the modules converted.

    Raises:
        UserError: a module that the recipe's kernels can't cut into tiles, or no torchao where it is needed.
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
        for linear in linears.values():
            linear.__class__, linear.product = BlockwiseLinear, product
        for module in experts.values():
            module.product, module.row_multiple = product, TILE  # so that no tile holds the tokens of two experts
    else:
        _convert_by_torchao(model, set(linears), recipe, emulate)
    return [*linears, *experts]


def _check_widths(modules: dict[str, nn.Module], recipe: str) -> None:
    of, wrong = MULTIPLES[recipe], []
    for name, module in modules.items():
        for weight in module.parameters(recurse=False):
            widths = weight.shape[-2:]
            if weight.ndim > 1 and any(width % m for width, m in zip(widths, of, strict=True)):
                nearest = [max(1, (width + m // 2) // m) * m for width, m in zip(widths, of, strict=True)]
                wrong.append(
                    f"{name} is {widths[0]} x {widths[1]}, where the nearest that fits is {nearest[0]} x {nearest[1]}"
                )
    if wrong:
        others = f"; {len(wrong) - 1} more matrices do not fit" if wrong[1:] else ""
        raise UserError(
            f"`precision`: fp8-{recipe} multiplies by {of[1]} features at once, and {wrong[0]}{others} (change the "
            "`model.FIELD` behind it, or give `precision` bf16)"
        )


def _convert_by_torchao(model: nn.Module, names: set[str], recipe: str, emulate: bool) -> None:
    try:
        from torchao.float8 import Float8LinearConfig, convert_to_float8_training
    except ImportError as error:
        raise UserError(f"fp8-{recipe} needs torchao (pip install 'moonwhale[fp8]')") from error
    config = Float8LinearConfig.from_recipe_name(recipe)
    object.__setattr__(config, "emulate", emulate)
    convert_to_float8_training(model, module_filter_fn=lambda _, name: name in names, config=config)


class BlockwiseLinear(nn.Linear):
    """A linear layer whose three products, forward and backward, are done by `product` in FP8."""

    def forward(self, x: Tensor) -> Tensor:
        """(…, in) to (…, out), in the dtype that `nn.Linear` would give."""
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        out = self.product(x.flatten(0, -2), self.weight).unflatten(0, x.shape[:-1])
        return out if self.bias is None else out + self.bias.to(out.dtype)


def quantise(x: Tensor, rows: int, columns: int) -> Tensor:
    """(…, M, N) rounded to E4M3 and back, in fp32, every tile of `rows` x `columns` by a scale of its own.

    The scale takes a tile's largest magnitude to 448, the largest that E4M3 has, and is an fp32 number, not a power of
    two. At the edges tiles are smaller.
    """
    height, width = x.shape[-2:]
    rows, columns = min(rows, height), min(columns, width)
    whole = F.pad(x.float(), (0, -width % columns, 0, -height % rows))
    tiles = whole.unflatten(-1, (-1, columns)).unflatten(-3, (-1, rows))  # (…, M / rows, rows, N / columns, columns)
    largest = tiles.abs().amax((-3, -1), keepdim=True).clamp(min=1e-12)
    scale = (LARGEST / largest.double()).float()
    tiles = (tiles * scale).to(torch.float8_e4m3fn).float() * scale.reciprocal()
    return tiles.flatten(-4, -3).flatten(-2)[..., :height, :width]


def emulated_product(x: Tensor, weight: Tensor, ends: Tensor | None = None) -> Tensor:
    """`x @ weight.T` of (N, in) and (out, in) as DeepSeek-V3 multiplies in FP8; it runs anywhere.

    With `ends` (E,), int32, that of E groups of rows, each with its own of the weights (E, out, in).
    """
    return _EmulatedProduct.apply(x, weight, ends).to(x.dtype)  # in there, it costs torch 2.11's graphs the gradient


class _EmulatedProduct(torch.autograd.Function):
    """A scale holds for 128 summands of one product, so that it can be taken out of their sum (V3 fig. 7).

    Forward and input gradient sum over features: activations and their gradients have 1 x 128 tiles. The weight
    gradient sums over tokens: there the same two have 128 x 1 tiles.
    """

    @staticmethod
    def forward(ctx, x, weight, ends):
        w = quantise(weight, TILE, TILE)
        ctx.save_for_backward(x, w, ends)
        return _multiply(quantise(x, 1, TILE), w.mT, ends)

    @staticmethod
    def backward(ctx, d_out):
        x, w, ends = ctx.saved_tensors
        d_x = _multiply(quantise(d_out, 1, TILE), w, ends).to(x.dtype)
        d_weight = _multiply(quantise(d_out, TILE, 1).mT, quantise(x, TILE, 1), ends)
        return d_x, d_weight, None


def _multiply(a: Tensor, b: Tensor, ends: Tensor | None) -> Tensor:
    """In fp32, also under autocast: FP8's few bits multiply without loss there, and add up as in tensor cores' fp32."""
    with torch.autocast(a.device.type, enabled=False):
        return a @ b if ends is None else grouped_product(a, b, ends)


def _kernels_product(x: Tensor, weight: Tensor, ends: Tensor | None = None) -> Tensor:
    """`emulated_product` by torchao's kernels for Hopper, which take bf16 and give bf16."""
    from torchao.prototype.blockwise_fp8_training.linear import fp8_blockwise_mm
    from torchao.prototype.moe_training.blockwise_fp8.grouped_mm import _to_fp8_blockwise_then_scaled_grouped_mm

    x, weight, dtype = x.bfloat16(), weight.bfloat16(), x.dtype
    if ends is not None:
        out = _to_fp8_blockwise_then_scaled_grouped_mm(x, weight.mT, ends, pad_token_groups_for_grouped_mm=False)
        return out.to(dtype)
    # Zeros, since the weight gradient wants whole tiles of tokens, and the input gradient of outputs.
    whole, whole_weight = (F.pad(a, (0, 0, 0, -len(a) % TILE)) for a in (x, weight))
    return fp8_blockwise_mm.apply(whole, whole_weight, TILE)[: len(x), : len(weight)].to(dtype)
