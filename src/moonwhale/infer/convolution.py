"""The causal depthwise convolutions of model/convolution.py for new tokens, whose predecessors are in the cache."""

from collections.abc import Callable

import torch
from torch import Tensor

from moonwhale.infer.placement import Placement


def convolution(read: Callable[[Tensor], Tensor], weights: Tensor, placement: Placement) -> Tensor:
    """Return Σ_k w_k ⊙ x_{t-k} (B, Q, C) of each new token t, as `depthwise_convolution` in model/convolution.py does.

    `read(entries)` returns x (B * Q, C) of the tokens at these indices among the entries of all slots. `weights` are
    (taps, C), the newest tap last.
    """
    mixed = 0.0
    for back in range(len(weights)):
        tap = read((placement.entry_index - back).clamp(min=0)).unflatten(0, placement.positions.shape)
        inside = (placement.positions >= back).unsqueeze(-1)
        mixed = mixed + torch.where(inside, tap, 0.0) * weights[-1 - back].to(tap.dtype)
    return mixed
