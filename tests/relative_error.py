"""The relative error in comparisons that a NaN must fail: Python's `max` drops every NaN but a first one."""

import torch
from torch import Tensor


def relative_error(found: Tensor, expected: Tensor, smallest: float = 1e-6) -> float:
    """Return the norm of the difference, relative to the norm of `expected` or to `smallest`, whichever is larger.

    Equal entries do not differ, nor do equal infinities. Any NaN makes the error infinite.
    """
    difference = torch.where(found == expected, 0.0, found - expected)
    scale = expected.masked_fill(expected.isinf(), 0.0).norm().clamp(min=smallest)
    return (difference.norm() / scale).nan_to_num(nan=torch.inf, posinf=torch.inf).item()
