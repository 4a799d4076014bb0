"""Parts of a training step on a CPU in C++ (`step/training.cpp`). The model and MuonClip call them after `use_kernels`.

They are for tensors on a CPU, numbers being fp32 or bf16: `model/kernels.py` and `optim/elementwise.py` ask
`can_compute` and its like. Each function raises ValueError if shapes contradict each other.
"""

import ctypes
import sys

import torch
from torch import Tensor, nn

from moonwhale.model import kernels
from moonwhale.model.routed import ExpertRows
from moonwhale.native import build
from moonwhale.native.structures import DTYPE_CODES, RouterStruct, RoutesStruct, address
from moonwhale.optim import elementwise

CACHED_MATRIX = 2**16  # numbers of a matrix that a core orthogonalises by itself; larger ones all cores do together


def use_kernels(device: torch.device) -> bool:
    """Let this process train with compiled functions if `device` is a CPU and they can be compiled. Return whether."""
    if device.type == "cpu" and build.available("training"):
        kernels.compiled = elementwise.compiled = sys.modules[__name__]
    return kernels.compiled is not None


def can_compute(*tensors: Tensor) -> bool:
    """Return whether these functions can compute with these tensors: in one dtype, fp32 or bf16, on a CPU.

    A graph that is being traced, and subclasses of tensors, take PyTorch's operations.
    """
    dtype = tensors[0].dtype
    return (dtype is torch.bfloat16 or dtype is torch.float32) and _can_read(dtype, *tensors)


def _can_read(dtype: torch.dtype, *tensors: Tensor) -> bool:
    if torch.compiler.is_compiling() or torch.jit.is_tracing():
        return False
    return all(type(x) in (Tensor, nn.Parameter) and x.is_cpu and x.dtype is dtype and x.numel() for x in tensors)


def norm(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Return RMSNorm of x (…, size), and 1 / rms(x) in fp32 (…, 1)."""
    rows, weight = _rows(x), _floats(weight)
    out, inverse = torch.empty(x.shape, dtype=x.dtype), torch.empty(*x.shape[:-1], 1)
    _require(weight.shape == x.shape[-1:])
    _run("run_norm", out, inverse, rows, rows.stride(0), weight, *rows.shape, eps, *_how(x))
    return out, inverse


def norm_backward(d_out: Tensor, x: Tensor, weight: Tensor, inverse: Tensor) -> tuple[Tensor, Tensor]:
    """Return the gradients of x and, in fp32, of the weight."""
    rows, d_rows, weight = _rows(x), _rows(d_out), _floats(weight)
    d_x, d_weight = torch.empty(x.shape, dtype=x.dtype), torch.empty(x.shape[-1])
    _require(d_out.shape == x.shape and weight.shape == x.shape[-1:] and inverse.numel() == len(rows))
    steps = d_rows, d_rows.stride(0), rows, rows.stride(0)
    _run("run_norm_backward", d_x, d_weight, *steps, _floats(inverse), weight, *rows.shape, *_how(x))
    return d_x, d_weight


def score(logits: Tensor, labels: Tensor, need_grad: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Compute what `_score_piece` in model/loss.py does, for contiguous logits (n, V), and labels (n,).

    Returns:
        Σ exp(logit - max) of each row (n, 1), its cross-entropy (n,), and whether no logit is larger than the label's.

    Raises:
        IndexError: a label is no token of the vocabulary.
    """
    _require(logits.is_contiguous() and labels.shape == logits.shape[:1])
    total, nll = torch.empty(len(labels), 1), torch.empty(len(labels))
    correct, labels = torch.empty(len(labels), dtype=torch.bool), labels.long().contiguous()
    _run("run_score", logits, labels, total, nll, correct, *logits.shape, need_grad, *_how(logits))
    return total, nll, correct


def gate(gate: Tensor, up: Tensor, row_weight: Tensor | None = None) -> Tensor:
    """Return silu(gate) * up * row_weight, (…, inner). `row_weight` (rows,) is one for each row, all 1 if None."""
    gates, ups, step = _pair(gate, up)
    row_weight = None if row_weight is None else _floats(row_weight)
    _require(row_weight is None or row_weight.shape == (len(gates),))
    product = torch.empty(gate.shape, dtype=gate.dtype)
    _run("run_gate", product, gates, ups, step, row_weight, *gates.shape, *_how(gate))
    return product


def gate_backward(
    d_product: Tensor, gate: Tensor, up: Tensor, row_weight: Tensor | None = None
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Compute the gradients of `gate`.

    Returns:
        the gradients of gate and of up side by side (…, 2 * inner); with row weights, their gradient in fp32 (rows,)
        and the product again.
    """
    gates, ups, step = _pair(gate, up)
    d_product, (n_rows, inner) = d_product.contiguous(), gates.shape
    d_inner, d_weight, product = torch.empty(*gate.shape[:-1], 2 * inner, dtype=gate.dtype), None, None
    if row_weight is not None:
        row_weight, d_weight, product = _floats(row_weight), torch.empty(n_rows), torch.empty_like(d_product)
        _require(row_weight.shape == (n_rows,))
    _require(d_product.shape == gate.shape)
    d_halves = d_inner, d_inner[..., inner:], 2 * inner
    _run(
        "run_gate_backward",
        *(*d_halves, d_weight, product, d_product, gates, ups, step, row_weight, n_rows, inner, *_how(gate)),
    )
    return d_inner, d_weight, product


def softmax_(
    scores: Tensor, causal: bool, ids: tuple[Tensor, Tensor] | None, log_sum: Tensor | None = None
) -> tuple[Tensor, Tensor] | None:
    """Turn contiguous scores (heads, queries, keys), which are exponents of 2, into probabilities.

    Args:
        causal: the last query sees all keys, each earlier one a key less.
        ids: the documents of queries (heads, queries) and keys (heads, keys): a query sees keys of its own.
        log_sum: the logarithm (base 2) of the sum of powers (heads, queries), if it is known.

    Returns:
        the largest score of each query (heads, queries, 1), and the sum of powers relative to it; None with `log_sum`.
    """
    heads, queries, keys = scores.shape
    of_queries, of_keys = (None, None) if ids is None else (x.to(torch.int32).contiguous() for x in ids)
    log_sum = None if log_sum is None else _floats(log_sum)
    _require(scores.is_contiguous() and (log_sum is None or log_sum.shape == (heads, queries)))
    _require(ids is None or (of_queries.shape == (heads, queries) and of_keys.shape == (heads, keys)))
    peak, total = (torch.empty(heads, queries, 1), torch.empty(heads, queries, 1)) if log_sum is None else (None, None)
    _run("run_softmax", scores, peak, total, log_sum, of_queries, of_keys, causal, *scores.shape, *_how(scores))
    return None if peak is None else (peak, total)


def score_gradient_(d_probs: Tensor, probs: Tensor, out_dot: Tensor, scale: float) -> Tensor:
    """Turn d_probs (…, keys), the gradient of probs, into that of scores: probs * (d_probs - out_dot) * scale."""
    out_dot = _floats(out_dot)
    _require(d_probs.shape == probs.shape and d_probs.is_contiguous() and probs.is_contiguous())
    _require(out_dot.numel() * d_probs.shape[-1] == d_probs.numel())
    rows = out_dot.numel(), d_probs.shape[-1]
    _run("run_score_gradient", d_probs, probs, out_dot, scale, *rows, *_how(d_probs))
    return d_probs


def rotate(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool, backward: bool = False) -> Tensor:
    """Compute what `rotate` in model/rope.py does for x (B, heads, T, D), or its gradient from that of its result."""
    rows, _, length, width = x.shape
    if x.stride(-1) != 1:
        x = x.contiguous()
    cos, sin = (table.expand(rows, 1, length, width // 2).contiguous() for table in (cos, sin))
    _require(cos.dtype is sin.dtype is x.dtype and width % 2 == 0)
    steps, out = (ctypes.c_int64 * 3)(*x.stride()[:3]), torch.empty(x.shape, dtype=x.dtype)
    _run("run_rotate", out, x, cos, sin, steps, *x.shape, interleaved, backward, *_how(x))
    return out


def route(
    x: Tensor, weight: Tensor, bias: Tensor, topk: int, sigmoid: bool, normalise: bool, factor: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute what Router in model/moe.py does without groups, for x (N, hidden): scores, index and gates, in fp32."""
    x, experts = _rows(x), len(weight)
    _require(weight.shape[1:] == x.shape[1:] and bias.shape == (experts,))
    sizes = RouterStruct(*x.shape, experts, topk, sigmoid, normalise, factor)
    scores, gates = torch.empty(len(x), experts), torch.empty(len(x), topk)
    index = torch.empty(len(x), topk, dtype=torch.long)
    inputs = x, x.stride(0), _floats(weight), _floats(bias), ctypes.byref(sizes)
    _run("run_route", scores, index, gates, *inputs, *_how(x))
    return scores, index, gates


def route_backward(
    d_scores: Tensor | None,
    d_gates: Tensor,
    x: Tensor,
    weight: Tensor,
    scores: Tensor,
    index: Tensor,
    sigmoid: bool,
    normalise: bool,
    factor: float,
) -> tuple[Tensor, Tensor]:
    """Return the gradients of x and, in fp32, of the weight. A `d_scores` of None is zero."""
    x, (experts, topk) = _rows(x), (len(weight), index.shape[1])
    _require(weight.shape[1:] == x.shape[1:] and scores.shape == (len(x), experts))
    _require(index.shape == d_gates.shape == (len(x), topk) and index.is_contiguous() and index.dtype is torch.long)
    _require(d_scores is None or d_scores.shape == scores.shape)
    d_scores = None if d_scores is None else _floats(d_scores)
    sizes = RouterStruct(*x.shape, experts, topk, sigmoid, normalise, factor)
    d_x, d_weight = torch.empty(x.shape, dtype=x.dtype), torch.empty(weight.shape)
    inputs = d_scores, _floats(d_gates), _floats(scores), index, x, x.stride(0), _floats(weight), ctypes.byref(sizes)
    _run("run_route_backward", d_x, d_weight, *inputs, *_how(x))
    return d_x, d_weight


def balance(scores: Tensor, valid: Tensor, topk: int) -> tuple[Tensor, Tensor]:
    """Return f and P (B, E) of the balance loss of each sequence, from scores (B * T, E) and `valid` (B, T)."""
    sizes = *valid.shape, scores.shape[1]
    _require(len(scores) == valid.numel())
    f, p = torch.empty(len(valid), sizes[-1]), torch.empty(len(valid), sizes[-1])
    _run("run_balance", f, p, _floats(scores), valid.bool().contiguous(), *sizes, topk, torch.get_num_threads())
    return f, p


def balance_backward(d_p: Tensor, scores: Tensor, valid: Tensor) -> Tensor:
    """Return the gradient of scores for that of P."""
    sizes = *valid.shape, scores.shape[1]
    _require(len(scores) == valid.numel() and d_p.shape == (len(valid), sizes[-1]))
    d_scores = torch.empty(scores.shape)
    inputs = _floats(d_p), _floats(scores), valid.bool().contiguous()
    _run("run_balance_backward", d_scores, *inputs, *sizes, torch.get_num_threads())
    return d_scores


def can_line_up(group: Tensor) -> bool:
    """Return whether `line_up` can compute with `group`."""
    return _can_read(torch.long, group)


def line_up(group: Tensor, n_groups: int, multiple: int, row_multiple: int) -> tuple[Tensor, Tensor, Tensor]:
    """Compute what `line_up` in model/groups.py does without static shapes, for `group` (N,)."""
    item_of_row = group.new_empty(len(group) + n_groups * (multiple - 1) + row_multiple - 1)
    row_of_item, ends = torch.empty_like(group, memory_format=torch.contiguous_format), group.new_empty(n_groups)
    sizes = len(group), n_groups, multiple, row_multiple
    _run("run_line_up", item_of_row, len(item_of_row), row_of_item, ends, group.contiguous(), *sizes)
    n_rows = -(-int(ends[-1]) // row_multiple) * row_multiple
    return item_of_row[:n_rows], row_of_item, ends


def nesterov_(momentum: Tensor, gradient: Tensor, decay: float) -> Tensor:
    """Turn a contiguous fp32 momentum M into decay * M + gradient. Return the Nesterov update gradient + decay * M."""
    _require(momentum.is_contiguous() and gradient.shape == momentum.shape)
    _require(momentum.dtype is torch.float32 and gradient.dtype is torch.float32)
    update = torch.empty_like(momentum)
    _run("run_nesterov", momentum, update, gradient.contiguous(), decay, momentum.numel(), torch.get_num_threads())
    return update


def descend_(weight: Tensor, direction: Tensor, kept: float, scale: float) -> Tensor:
    """Turn a contiguous fp32 weight into kept * weight + scale * direction. The direction is fp32 or bf16."""
    _require(weight.is_contiguous() and direction.shape == weight.shape and weight.dtype is torch.float32)
    _run("run_descend", weight, direction.contiguous(), kept, scale, weight.numel(), *_how(direction))
    return weight


def has_units() -> bool:
    """Return whether this processor has matrix units (AMX) or dot products (AVX-512) for bf16.

    `routed` and `newton_schulz` need them.
    """
    return bool(build.library("training").has_units())


def can_route(x: Tensor, gate_up: Tensor, down: Tensor) -> bool:
    """Return whether `routed` can send x through these experts: x in bf16, and sizes that are multiples of 32."""
    sizes_fit = not any(size % 32 for size in down.shape[1:])
    return sizes_fit and can_compute(x) and x.dtype is torch.bfloat16 and can_compute(gate_up, down) and has_units()


def routed(x: Tensor, gate_up: Tensor, down: Tensor, rows: ExpertRows) -> tuple[Tensor, Tensor]:
    """Send x (N, hidden) through its experts `gate_up` (E, 2 * inner, hidden) and `down` (E, hidden, inner).

    Returns:
        the sum of each token's weighted outputs (N, hidden), and what to keep for the gradient (R, 2 * inner).
    """
    routes, kept = _routes(x, gate_up, down, rows)
    out, inner = torch.empty_like(kept[0]), x.new_empty(len(rows.token), gate_up.shape[1])
    _run("run_routed", out, inner, *kept[:3], ctypes.byref(routes), torch.get_num_threads())
    return out, inner


def routed_backward(
    d_out: Tensor, x: Tensor, gate_up: Tensor, down: Tensor, rows: ExpertRows, inner: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of x, and in fp32 of `gate_up`, `down` and `rows.weight`. `inner` is from `routed`."""
    routes, kept = _routes(x, gate_up, down, rows)
    _require(d_out.shape == x.shape and d_out.dtype is x.dtype)
    _require(inner.shape == (len(rows.token), gate_up.shape[1]) and inner.is_contiguous() and inner.dtype is x.dtype)
    gradients = torch.empty_like(kept[0]), *(torch.empty(like.shape) for like in (gate_up, down, rows.weight))
    inputs = d_out.contiguous(), kept[0], inner, *kept[1:3]
    _run("run_routed_backward", *gradients, *inputs, ctypes.byref(routes), torch.get_num_threads())
    return gradients


def _routes(x: Tensor, gate_up: Tensor, down: Tensor, rows: ExpertRows) -> tuple[ctypes.Structure, list[Tensor]]:
    """Return the structure that C++ reads, and contiguous tensors x, gate_up and down, and those it points to."""
    experts, hidden, inner = down.shape
    _require(x.shape[1:] == (hidden,) and gate_up.shape == (experts, 2 * inner, hidden))
    _require(rows.row.ndim == 2 and len(rows.row) == len(x) and len(rows.ends) == experts)
    _require(rows.weight.shape == rows.token.shape == (len(rows.token),))
    _require(all(tensor.dtype is torch.bfloat16 for tensor in (x, gate_up, down)))
    kept = [x.contiguous(), gate_up.contiguous(), down.contiguous(), rows.token.long().contiguous()]
    kept += [rows.row.long().contiguous(), rows.ends.to(torch.int32).contiguous(), _floats(rows.weight)]
    sizes = *rows.row.shape, experts, len(rows.token), hidden, inner
    return RoutesStruct(*sizes, *map(address, kept[3:])), kept


def can_orthogonalise(matrices: Tensor) -> bool:
    """Return whether `newton_schulz` can compute with `matrices` (n, A, B), and each fits a core's caches."""
    if not can_compute(matrices) or matrices.dtype is not torch.float32:
        return False
    rows, columns = (-(-size // 32) * 32 for size in matrices.shape[1:])  # as it is computed
    return rows * columns <= CACHED_MATRIX and has_units()


def newton_schulz(matrices: Tensor, steps: int) -> Tensor:
    """Compute what `newton_schulz` in optim/muonclip.py does in bf16, for fp32 matrices (n, A, B)."""
    _require(matrices.ndim == 3 and matrices.dtype is torch.float32 and matrices.numel() > 0)
    out = torch.empty(matrices.shape, dtype=torch.bfloat16)
    _run("run_newton_schulz", out, matrices.contiguous(), *matrices.shape, steps, torch.get_num_threads())
    return out


def _rows(x: Tensor) -> Tensor:
    """Return x as a table of rows whose numbers are adjacent. The rows may be apart."""
    rows = x.flatten(0, -2) if x.ndim > 1 else x.unsqueeze(0)
    return rows if rows.stride(1) == 1 else rows.contiguous()


def _pair(gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor, int]:
    """Return two tensors of one shape as tables, and the numbers from a row to the next in both."""
    _require(gate.shape == up.shape)
    gates, ups = _rows(gate), _rows(up)
    if gates.stride(0) != ups.stride(0):
        gates, ups = gates.contiguous(), ups.contiguous()
    return gates, ups, gates.stride(0)


def _floats(x: Tensor) -> Tensor:
    return x.detach().float().contiguous()


def _how(x: Tensor) -> tuple[int, int]:
    return DTYPE_CODES[x.dtype], torch.get_num_threads()


def _require(fits: bool) -> None:
    if not fits:
        raise ValueError("the tensors of a compiled training step do not fit each other")


def _run(name: str, *arguments) -> None:
    values = (address(value) if value is None or isinstance(value, Tensor) else value for value in arguments)
    match getattr(build.library("training"), name)(*values):
        case 1:
            raise MemoryError("no memory for a compiled training step")
        case 2:
            raise IndexError("a label is no token of the vocabulary")
        case 3:
            _require(False)
