"""The weights of layers that peft may have wrapped in adapters."""

import torch
from torch import Tensor, nn


def is_adapted(module: nn.Module) -> bool:
    """Return whether a module is peft's wrapper of a layer, which adds an adapter to it."""
    return hasattr(module, "base_layer")


def effective_weight(layer: nn.Linear) -> Tensor:
    """Return the weight (out, in) of a linear layer without bias, with what an adapter such as LoRA adds to it.

    It is for code that multiplies by a layer's weight without calling the layer: `weight` of peft's wrapper is that of
    the layer inside, without the adapter.
    """
    if not is_adapted(layer):
        return layer.weight
    return layer(torch.eye(layer.in_features, dtype=layer.weight.dtype, device=layer.weight.device)).mT
