"""The compiled functions for training on a CPU, if a run has set them. Without them the model computes in PyTorch.

This package works by itself, so it does not import them: `moonwhale.native.training.use_kernels` sets `compiled`.
"""

from types import ModuleType

from torch import Tensor

compiled: ModuleType | None = None  # moonwhale.native.training


def compiled_for(*tensors: Tensor) -> ModuleType | None:
    """Return the compiled functions if they can compute with these tensors (see `can_compute` there)."""
    return compiled if compiled is not None and compiled.can_compute(*tensors) else None
