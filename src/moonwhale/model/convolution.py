"""Causal depthwise convolutions: over embeddings (`embedding_conv`), and over MoBA's keys (`moba_key_conv`)."""

import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.cache_utils import Cache

from .documents import Documents


def depthwise_convolution(x: Tensor, weight: Tensor, positions: Tensor) -> Tensor:
    """Return Σ_k w_k ⊙ x_{t-k} of each token t, over the tokens t - k of its document.

    Args:
        x: (B, T, C).
        weight: (C, 1, width), the newest tap last, as `F.conv1d` has it.
        positions: (B, T) each token's position in its document. No padding may interrupt a document.
    """
    mixed = x * weight[:, 0, -1].to(x.dtype)
    for back in range(1, weight.shape[-1]):
        tap = F.pad(x, (0, 0, back, 0))[:, : x.shape[1]]
        inside = (positions >= back).unsqueeze(-1)
        mixed = mixed + torch.where(inside, tap, 0.0) * weight[:, 0, -1 - back].to(x.dtype)
    return mixed


class EmbeddingConvolution(nn.Module):
    """Adds to each embedding a convolution of it and those before it, with one weight for each channel and tap.

    So a token's first block sees its predecessor too, which a model learns late by attention alone. This is the first
    of the Canon layers (arXiv 2512.17351). nanochat's "smear" does the same with one gate a token. The weight starts at
    zero, which is no convolution at all.
    """

    def __init__(self, width: int, channels: int):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(channels, 1, width))

    def forward(self, embeds: Tensor, documents: Documents) -> Tensor:
        """Convolve embeddings (B, T, hidden). `documents` describes the last T tokens, or more before them.

        Raises:
            ValueError: padding interrupts a document.
        """
        documents.check_unbroken()
        return embeds + depthwise_convolution(embeds, self.weight, documents.positions[:, -embeds.shape[1] :])

    def continue_from(self, cache: Cache, layer_idx: int, embeds: Tensor, documents: Documents) -> Tensor:
        """Convolve the newest embeddings (B, Tq, hidden) after those in the cache, which keeps them as one more layer.

        Half of an embedding is stored as a key, half as a value. Every operation of a cache on its layers, such as
        reordering beams, then keeps them in step with the others.
        """
        if len(cache.layers) == layer_idx and cache.layer_class_to_replicate is None:
            cache.layers.append(copy.deepcopy(cache.layers[0]))  # still empty: the blocks come after the embedding
        halves = cache.update(*embeds.unsqueeze(1).chunk(2, dim=-1), layer_idx)
        new, width = embeds.shape[1], self.weight.shape[-1]
        n_tokens = documents.document_ids.shape[1]  # a static cache returns its unused end too
        known = torch.cat(halves, dim=-1).squeeze(1)[:, max(n_tokens - new - width + 1, 0) : n_tokens]
        return self(known, documents)[:, -new:]
