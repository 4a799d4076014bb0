"""Routing and its balance in compiled functions (native/step/routing.h), with their gradients. Router and
DeepseekMoE.balance_loss in moe.py say what they compute."""

import torch
from torch.autograd.function import once_differentiable

from .kernels import compiled_for


class Route(torch.autograd.Function):
    """Returns scores (N, E), index (N, K) and gates (N, K) for tokens x (N, hidden)."""

    @staticmethod
    def forward(ctx, x, weight, bias, topk, sigmoid, normalise, factor):
        ctx.how, ctx.compiled = (sigmoid, normalise, factor), compiled_for(x)  # Router has asked whether it can
        scores, index, gates = ctx.compiled.route(x, weight, bias, topk, *ctx.how)
        ctx.save_for_backward(x, weight, scores, index)
        ctx.mark_non_differentiable(index)
        ctx.set_materialize_grads(False)
        return scores, index, gates

    @staticmethod
    @once_differentiable
    def backward(ctx, d_scores, _, d_gates):
        x, weight, scores, index = ctx.saved_tensors
        if d_gates is None:
            d_gates = scores.new_zeros(index.shape)
        d_x, d_weight = ctx.compiled.route_backward(d_scores, d_gates, x, weight, scores, index, *ctx.how)
        return d_x, d_weight, None, None, None, None, None


class SequenceBalance(torch.autograd.Function):
    """Returns f and P of DeepSeek-V3's eq. 18 and 20 for each sequence and expert (B, E), from scores (B * T, E) and
    `valid` (B, T).
    """

    @staticmethod
    def forward(ctx, scores, valid, topk):
        ctx.compiled = compiled_for(scores)
        f, p = ctx.compiled.balance(scores, valid, topk)
        ctx.save_for_backward(scores, valid)
        ctx.mark_non_differentiable(f)
        ctx.set_materialize_grads(False)
        return f, p

    @staticmethod
    @once_differentiable
    def backward(ctx, _, d_p):
        scores, valid = ctx.saved_tensors
        return None if d_p is None else ctx.compiled.balance_backward(d_p, scores, valid), None, None
