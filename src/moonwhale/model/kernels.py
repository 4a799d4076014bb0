"""The compiled functions for training on a CPU, if a run has set them. Without them the model computes in PyTorch.

This package works by itself, so it does not import them: `moonwhale.native.training.use_kernels` sets `compiled`.
"""

from types import ModuleType

import torch
from torch import Tensor, nn

compiled: ModuleType | None = None  # moonwhale.native.training


def compiled_for(*tensors: Tensor) -> ModuleType | None:
    """Return the compiled functions if they can compute with these tensors: in one dtype, fp32 or bf16, on a CPU.

    A graph that is being traced, and subclasses of tensors, take PyTorch's operations.
    """
    if torch.compiler.is_compiling() or torch.jit.is_tracing() or compiled is None:
        return None
    dtype = tensors[0].dtype
    if dtype is not torch.bfloat16 and dtype is not torch.float32:
        return None
    fit = all(type(x) in (Tensor, nn.Parameter) and x.is_cpu and x.dtype is dtype and x.numel() for x in tensors)
    return compiled if fit else None
