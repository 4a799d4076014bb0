"""The weights of layers that peft may have wrapped in adapters."""

import torch
from torch import Tensor, nn


def effective_weight(layer: nn.Linear) -> Tensor:
    """Return the weight (out, in) of a linear layer without bias, with what an adapter such as LoRA adds to it.

    Whoever multiplies by a layer's weight without calling the layer needs this: peft's wrapper has the weight of the
    layer inside it, without the adapter.
    """
    if not hasattr(layer, "base_layer"):
        return layer.weight
    return layer(torch.eye(layer.in_features, dtype=layer.weight.dtype, device=layer.weight.device)).mT
