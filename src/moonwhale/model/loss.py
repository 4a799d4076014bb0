"""Cross-entropy of a linear head that never holds the [rows, vocabulary] logits: chunk by chunk, gradients included."""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .attention import LN2
from .documents import needs_static_shapes
from .kernels import compiled_for

IGNORE_INDEX = -100  # label of a position without a target, as in `F.cross_entropy`
ROWS_PER_CHUNK = 1024  # rows whose logits are held at once
ROW_MULTIPLE = 32  # a product over 1,022 rows takes 1.4 times as long as one over 1,024
LOGITS_PER_PIECE = 1 << 20  # logits whose fp32 intermediates are held at once, so that they stay in a CPU's cache
WORDS_PER_PIECE = 8192  # rows of the head whose gradient is computed at once


def linear_cross_entropy(
    hidden: Tensor, weight: Tensor, labels: Tensor, row_weight: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute `sum_i row_weight_i * CE(hidden_i @ weight.T, labels_i)` over the rows whose label is not -100.

    The gradient is computed in the forward pass, while a chunk's logits exist. They are computed once and never kept.

    Args:
        hidden: (N, H).
        weight: (V, H), the head.
        labels: (N,).
        row_weight: (N,) in fp32.

    Returns:
        the weighted sum (0-d, differentiable); each row's cross-entropy in nats (N,), 0 where ignored; whether the
        label was the most likely token (N,).
    """
    if not torch.is_grad_enabled():
        hidden, weight = hidden.detach(), weight.detach()
    return _LinearCrossEntropy.apply(hidden, weight, labels, row_weight)


def _rows_to_compute(ignored: Tensor, vocabulary: int) -> tuple[Tensor, int]:
    """Return the rows with a target, filled up with ignored ones to a multiple of ROW_MULTIPLE, and rows per piece."""
    if needs_static_shapes(ignored.device):  # all rows, since counting targets would read a value
        return torch.arange(len(ignored), device=ignored.device), ROWS_PER_CHUNK  # a GPU takes a whole chunk
    n_targets = len(ignored) - int(ignored.sum())
    n_rows = -(-n_targets // ROW_MULTIPLE) * ROW_MULTIPLE
    return ignored.int().argsort(stable=True)[:n_rows], max(1, LOGITS_PER_PIECE // vocabulary)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, labels, row_weight):
        ignored = labels == IGNORE_INDEX
        rows, rows_per_piece = _rows_to_compute(ignored, len(weight))
        row_weight, labels = row_weight.masked_fill(ignored, 0.0), labels.masked_fill(ignored, 0)
        head = weight.to(hidden.dtype)
        wide = torch.promote_types(hidden.dtype, torch.float32)
        need_hidden, need_weight = ctx.needs_input_grad[:2]
        nll = torch.zeros(len(labels), dtype=wide, device=hidden.device)
        correct = torch.zeros(len(labels), dtype=torch.bool, device=hidden.device)
        d_hidden = torch.zeros_like(hidden) if need_hidden else None
        d_weight = torch.empty_like(weight, dtype=wide) if need_weight else None
        buffer = hidden.new_empty(min(ROWS_PER_CHUNK, len(rows)), len(weight))
        for i, chunk in enumerate(rows.split(ROWS_PER_CHUNK)):
            h = hidden[chunk]
            logits = torch.mm(h, head.T, out=buffer[: len(chunk)])  # (rows, V)
            pieces = zip(logits.split(rows_per_piece), chunk.split(rows_per_piece), strict=True)
            totals = [
                _score_piece(piece, row, labels, nll, correct, need_hidden or need_weight) for piece, row in pieces
            ]
            if need_hidden or need_weight:  # `logits` now holds total * dCE / dlogits
                scale = row_weight[chunk].unsqueeze(1) / torch.cat(totals)
            if need_hidden:
                d_hidden[chunk] = (logits @ head * scale).to(hidden.dtype)
            if need_weight:
                scaled = (h * scale).to(h.dtype)
                for words, d_words in zip(
                    logits.T.split(WORDS_PER_PIECE), d_weight.split(WORDS_PER_PIECE), strict=True
                ):
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


def _score_piece(logits: Tensor, row: Tensor, labels: Tensor, nll: Tensor, correct: Tensor, need_grad: bool) -> Tensor:
    """Fill in `nll` and `correct` at the rows `row` (n,) from their logits (n, V).

    Returns:
        Σ exp(logit - max) of each row (n, 1). With `need_grad`, `logits` is overwritten with this sum times
        dCE / dlogits, which is powers - total * one-hot.
    """
    if compiled := compiled_for(logits):
        total, nll[row], correct[row] = compiled.score(logits, labels[row], need_grad)
        return total
    target = labels[row].unsqueeze(1)
    powers = logits.to(nll.dtype, copy=True)  # first of all: computing in bf16 is slow, and mixed with fp32 slower
    peak, at_target = powers.amax(-1, keepdim=True), powers.gather(1, target)
    powers.sub_(peak).mul_(1 / LN2).exp2_()  # powers of e, by the faster exponential
    total = powers.sum(-1, keepdim=True)
    nll[row] = (total.log() + peak - at_target).squeeze(1)
    correct[row] = (at_target == peak).squeeze(1)
    if need_grad:
        logits.copy_(powers.scatter_add_(1, target, -total))
    return total
