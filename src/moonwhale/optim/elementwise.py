"""The element-wise parts of Muon's step, and its iteration for small matrices: in C++ if a run has set `compiled`.

An optimizer works without the model and without a compiler, so nothing is imported here:
`moonwhale.native.training.use_kernels` sets `compiled`. In C++ each element-wise part is one pass over memory, in
PyTorch two or three.
"""

from types import ModuleType

import torch
from torch import Tensor

compiled: ModuleType | None = None  # moonwhale.native.training


def nesterov(momenta: list[Tensor], grads: list[Tensor], decay: float) -> list[Tensor]:
    """Set each momentum M to decay * M + G, and return Nesterov's updates G + decay * M."""
    if _compiled_for(momenta, [*momenta, *grads]):
        return [compiled.nesterov_(m, g, decay) for m, g in zip(momenta, grads, strict=True)]
    torch._foreach_mul_(momenta, decay)
    torch._foreach_add_(momenta, grads)
    return torch._foreach_add(grads, momenta, alpha=decay)


def descend(params: list[Tensor], directions: list[Tensor], kept: float, scales: list[float]) -> None:
    """Set each parameter to kept * p + scale * direction. Directions may have another dtype."""
    if _compiled_for(params, directions):
        for p, direction, scale in zip(params, directions, scales, strict=True):
            compiled.descend_(p, direction, kept, scale)
    else:
        torch._foreach_mul_(params, kept)
        for p, direction, scale in zip(params, directions, scales, strict=True):
            p.add_(direction, alpha=scale)


def small_newton_schulz(matrices: Tensor, steps: int) -> Tensor | None:
    """Return what `newton_schulz` makes of matrices (n, A, B) in bf16, or None if it is not compiled for them."""
    if compiled is None or not compiled.can_orthogonalise(matrices):
        return None
    return compiled.newton_schulz(matrices, steps)


def _compiled_for(written: list[Tensor], read: list[Tensor]) -> bool:
    """Return whether the compiled functions can write the former, which have to be fp32, and read the latter."""
    if compiled is None or not compiled.can_compute(*written) or not compiled.can_compute(*read):
        return False
    return all(x.dtype is torch.float32 and x.is_contiguous() for x in written)
