"""Cross-entropy of a linear head without the [rows, vocabulary] logits: a chunk at a time, gradients included."""

import math

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .documents import unseen

IGNORE = -100
LOG2 = math.log(2)
CHUNK = 1024  # rows of logits held at once
STEP = 32  # rows are a multiple of it where there are as many: a product over 1,022 takes 1.4 times one over 1,024
FEW = 1 << 20  # logits whose fp32 intermediates are held at once: they stay in a CPU's cache
WORDS = 8192  # rows of the head whose gradient is made at once


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
        ignored = labels == IGNORE
        if unseen(labels.device):
            rows, at_once = torch.arange(len(labels), device=labels.device), CHUNK
        else:
            n_targets = len(labels) - int(ignored.sum())
            rows = ignored.int().argsort(stable=True)[: -(-n_targets // STEP) * STEP]  # targets, a few ignored ones
            at_once = max(1, FEW // len(weight))
        row_weight, labels = row_weight.masked_fill(ignored, 0.0), labels.clamp(min=0)
        head = weight.to(hidden.dtype)
        wide = torch.promote_types(hidden.dtype, torch.float32)
        need_hidden, need_weight = ctx.needs_input_grad[:2]
        nll = torch.zeros(len(labels), dtype=wide, device=hidden.device)
        correct = torch.zeros(len(labels), dtype=torch.bool, device=hidden.device)
        d_hidden = torch.zeros_like(hidden) if need_hidden else None
        d_weight = torch.empty_like(weight, dtype=wide) if need_weight else None
        buffer = hidden.new_empty(min(CHUNK, len(rows)), len(weight))
        for i, part in enumerate(rows.split(CHUNK)):
            h = hidden[part]
            logits, totals = torch.mm(h, head.T, out=buffer[: len(part)]), []
            for few, row in zip(logits.split(at_once), part.split(at_once), strict=True):
                target = labels[row].unsqueeze(1)
                powers = few.to(wide, copy=True)  # first of all: bf16 is slow to compute in, slower still beside fp32
                peak, at_target = powers.amax(-1, keepdim=True), powers.gather(1, target)
                powers.sub_(peak).mul_(1 / LOG2).exp2_()  # e's, by the faster exponential
                total = powers.sum(-1, keepdim=True)
                nll[row] = (total.log() + peak - at_target).squeeze(1)
                correct[row] = (at_target == peak).squeeze(1)
                if need_hidden or need_weight:  # total * d CE / d logits = powers - total * one-hot, in their place
                    few.copy_(powers.scatter_add_(1, target, -total))
                    totals.append(total)
            scale = row_weight[part].unsqueeze(1) / torch.cat(totals) if totals else None
            if need_hidden:
                d_hidden[part] = (logits @ head * scale).to(hidden.dtype)
            if need_weight:
                scaled = (h * scale).to(h.dtype)
                for words, d_words in zip(logits.T.split(WORDS), d_weight.split(WORDS), strict=True):
                    d_words.copy_(words @ scaled) if i == 0 else d_words.add_(words @ scaled)
        ctx.save_for_backward(d_hidden, d_weight)
        ctx.weight_dtype = weight.dtype
        nll, correct = nll.masked_fill_(ignored, 0.0), correct & ~ignored
        ctx.mark_non_differentiable(nll, correct)
        return (nll * row_weight).sum(), nll, correct

    @staticmethod
    @once_differentiable
    def backward(ctx, d_loss, *_):
        d_hidden, d_weight = ctx.saved_tensors
        return (
            None if d_hidden is None else d_hidden * d_loss.to(d_hidden.dtype),
            None if d_weight is None else d_weight.mul_(d_loss).to(ctx.weight_dtype),  # in place: used once
            None,
            None,
        )
