"""Rotary position embedding of MLA's decoupled queries and keys, or of GQA's whole ones. It has no state to save."""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from .kernels import compiled_for


def rotation_table(config, position_ids: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return cosines and sines, each (B, 1, T, head_dim / 2), at `position_ids` (B, T).

    Frequencies other than the default ones, such as YaRN's, come from transformers.
    """
    rope = config.rope_parameters
    if rope["rope_type"] == "default":
        exponents = torch.arange(0, config.head_dim, 2, device=position_ids.device) / config.head_dim
        frequencies, factor = 1.0 / rope["rope_theta"] ** exponents, 1.0
    else:
        frequencies, factor = ROPE_INIT_FUNCTIONS[rope["rope_type"]](config, position_ids.device)
    angles = position_ids[:, None, :, None].float() * frequencies  # (B, 1, T, head_dim / 2)
    return (angles.cos() * factor).to(dtype), (angles.sin() * factor).to(dtype)


def rotate(x: Tensor, rotation: tuple[Tensor, Tensor], interleaved: bool) -> Tensor:
    """Rotate the pairs in x (B, heads, T, D): neighbouring numbers if `interleaved`, else the two halves.

    The result has halves in both cases. Queries and keys share this order, so their products do not change.
    """
    cos, sin = rotation
    if cos.shape[1:3] == (1, x.shape[2]) and compiled_for(x, cos, sin):  # decoding has heads after tokens
        return _Rotate.apply(x, cos, sin, interleaved)
    a, b = (x[..., 0::2], x[..., 1::2]) if interleaved else x.chunk(2, dim=-1)  # (B, heads, T, D / 2)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)


class _Rotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, cos, sin, interleaved):
        ctx.save_for_backward(cos, sin)
        ctx.interleaved, ctx.compiled = interleaved, compiled_for(x, cos, sin)  # `rotate` has asked whether it can
        return ctx.compiled.rotate(x, cos, sin, interleaved)

    @staticmethod
    @once_differentiable
    def backward(ctx, d_out):
        cos, sin = ctx.saved_tensors
        return ctx.compiled.rotate(d_out, cos, sin, ctx.interleaved, backward=True), None, None, None
