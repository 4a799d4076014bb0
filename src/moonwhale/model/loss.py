"""Cross-entropy of a linear head without the [rows, vocabulary] logits: a chunk at a time, gradients included."""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

IGNORE = -100
CHUNK = 1024  # rows of logits held at once


def linear_cross_entropy(
    hidden: Tensor, weight: Tensor, labels: Tensor, row_weight: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """`sum_i row_weight_i * CE(hidden_i @ weight.T, labels_i)` over the rows whose label is not -100.

    hidden (N, H), weight (V, H), labels (N,), row_weight (N,) fp32. The gradient is computed along with the value,
    while a chunk's logits are at hand, so they are made once and never kept.

    Returns:
        the weighted sum (0-d, differentiable); each row's cross-entropy in nats (N,), 0 where ignored; whether the
        label was the most likely token (N,).
    """
    if not torch.is_grad_enabled():
        hidden, weight = hidden.detach(), weight.detach()
    return _LinearCrossEntropy.apply(hidden, weight, labels, row_weight)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, labels, row_weight):
        rows = (labels != IGNORE).nonzero().squeeze(1)
        head = weight.to(hidden.dtype)
        need_hidden, need_weight = ctx.needs_input_grad[:2]
        nll = torch.zeros(len(labels), dtype=torch.float32, device=hidden.device)
        correct = torch.zeros(len(labels), dtype=torch.bool, device=hidden.device)
        d_hidden = torch.zeros_like(hidden) if need_hidden else None
        d_weight = torch.zeros_like(weight, dtype=torch.float32) if need_weight else None
        for part in rows.split(CHUNK):
            h, target = hidden[part], labels[part].unsqueeze(1)
            logits = (h @ head.T).float()
            top, best = logits.max(-1, keepdim=True)
            correct[part] = (best == target).squeeze(1)
            at_target = logits.gather(1, target)
            probs = logits.sub_(top).exp_()
            total = probs.sum(-1, keepdim=True)
            nll[part] = (total.log() + top - at_target).squeeze(1)
            if need_hidden or need_weight:
                # d CE / d logits = softmax - one-hot
                scale = row_weight[part].unsqueeze(1)
                probs.mul_(scale / total).scatter_add_(1, target, -scale)
                d_logits = probs.to(hidden.dtype)
                if need_hidden:
                    d_hidden[part] = d_logits @ head
                if need_weight:
                    d_weight += d_logits.T @ h
        ctx.save_for_backward(d_hidden, d_weight)
        ctx.weight_dtype = weight.dtype
        ctx.mark_non_differentiable(nll, correct)
        return (nll * row_weight).sum(), nll, correct

    @staticmethod
    @once_differentiable
    def backward(ctx, d_loss, *_):
        d_hidden, d_weight = ctx.saved_tensors
        return (
            None if d_hidden is None else d_hidden * d_loss.to(d_hidden.dtype),
            None if d_weight is None else (d_weight * d_loss).to(ctx.weight_dtype),
            None,
            None,
        )
