"""The compiled functions for training on a CPU, if a run has set them. Without them the model computes in PyTorch.

This package works by itself, so it does not import them: `moonwhale.native.training.use_kernels` sets `compiled`.
"""

from types import ModuleType

from torch import Tensor

compiled: ModuleType | None = None  # moonwhale.native.training


def compiled_for(*tensors: Tensor) -> ModuleType | None:
    """Return the compiled functions if they can compute with these tensors (see `can_compute` there)."""
    return compiled if compiled is not None and compiled.can_compute(*tensors) else None


def compiled_for_experts(x: Tensor, gate_up: Tensor, down: Tensor) -> ModuleType | None:
    """Return the compiled functions if they can send x through these routed experts (see `can_route` there)."""
    return compiled if compiled is not None and compiled.can_route(x, gate_up, down) else None


def compiled_for_groups(group: Tensor) -> ModuleType | None:
    """Return the compiled functions if they can line up items of these groups (see `can_line_up` there)."""
    return compiled if compiled is not None and compiled.can_line_up(group) else None
