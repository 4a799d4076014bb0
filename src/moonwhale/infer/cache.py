"""`LatentCache`: what the attention keeps of earlier tokens. Each token leaves a latent and a rotary key."""

from functools import cached_property

import torch
from torch import Tensor

from moonwhale.model import MoonwhaleConfig


class LatentCache:
    """One slot for each sequence, and in each block one entry (kv_lora_rank + qk_rope_head_dim) for each token.

    keys[i] (slots, length, rank + rope) holds the entries of block i of the model.
    values[i] is the same tensor, whose first `rank` numbers are the values. With convolved keys (`moba_key_conv`) it is
        a tensor (slots, length, rank) of its own.
    means[i] (slots, blocks, rank + rope) fp32 holds the mean entry of each full MoBA block, or is None without MoBA.
    tokens (slots, length) int64 holds the tokens' ids if the model convolves embeddings, or is None.

    Entries beyond a sequence's length are undefined. The reader has to know the length.
    """

    def __init__(
        self,
        config: MoonwhaleConfig,
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
        depth: int | None = None,
    ):
        """`depth` is the number of MTP modules that run, from the first. None has room for all of them."""
        self.config, self.dtype, self.device = config, dtype, torch.device(device)
        self.layers = range(config.num_hidden_layers + sum(config.mtp_blocks[:depth]))
        self.slots = self.length = 0
        self.keys: list[Tensor] = []
        self.values: list[Tensor] = []
        self.means: list[Tensor | None] = []
        self.tokens: Tensor | None = None
        self.resize(0, 0)

    @cached_property
    def bytes_per_token(self) -> float:
        """Bytes for each token of one sequence, over all blocks that run."""
        config, number = self.config, torch.empty((), dtype=self.dtype).element_size()
        width, total = config.kv_cache_numbers_per_token, 8.0 if config.embedding_conv else 0.0
        for i in self.layers:
            total += (width + (config.kv_lora_rank if config.moba_key_conv else 0)) * number
            total += width * 4 / config.moba_block_size if config.is_moba_layer(i) else 0
        return total

    @property
    def bytes(self) -> int:
        """Bytes that are allocated now."""
        tensors = [t for t in (*self.keys, *self.values, *self.means, self.tokens) if t is not None]
        return sum({id(t): t.nbytes for t in tensors}.values())

    def of_layer(self, layer: int) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return keys, values and means of one block of the model."""
        return self.keys[layer], self.values[layer], self.means[layer]

    def resize(self, slots: int, length: int) -> None:
        """Allocate `slots` sequences of `length` tokens, rounded up to whole blocks. Keep entries that still fit.

        If an allocation fails, the cache stays as it was.
        """
        config, kept = self.config, min(slots, self.slots)
        blocks = -(-length // config.moba_block_size)
        length = blocks * config.moba_block_size
        width, layers = config.kv_cache_numbers_per_token, self.layers

        def zeros(*shape: int, dtype: torch.dtype = self.dtype) -> Tensor:
            return torch.zeros(*shape, dtype=dtype, device=self.device)

        keys = [zeros(slots, length, width) for _ in layers]
        values = [zeros(slots, length, config.kv_lora_rank) for _ in layers] if config.moba_key_conv else keys.copy()
        means = [zeros(slots, blocks, width, dtype=torch.float32) if config.is_moba_layer(i) else None for i in layers]
        tokens = zeros(slots, length, dtype=torch.int64) if config.embedding_conv else None
        new_lists, old_lists = (keys, values, means, [tokens]), (self.keys, self.values, self.means, [self.tokens])
        for new_tensors, old_tensors in zip(new_lists, old_lists, strict=True):
            for new, before in zip(new_tensors, old_tensors, strict=False):
                if new is not None and before is not None:
                    n = min(new.shape[1], before.shape[1])
                    new[:kept, :n] = before[:kept, :n]
        self.slots, self.length, self.keys, self.values, self.means = slots, length, keys, values, means
        self.tokens = tokens

    def move(self, source: int, target: int, length: int) -> None:
        """Copy the first `length` tokens of slot `source` to slot `target`."""
        if self.tokens is not None:
            self.tokens[target, :length] = self.tokens[source, :length]
        for i, keys in enumerate(self.keys):
            keys[target, :length] = keys[source, :length]
            if self.values[i] is not keys:
                self.values[i][target, :length] = self.values[i][source, :length]
            if self.means[i] is not None:
                blocks = length // self.config.moba_block_size
                self.means[i][target, :blocks] = self.means[i][source, :blocks]
        self.clear(target, length)

    def clear(self, slot: int, length: int = 0) -> None:
        """Zero a slot's entries of the MTP modules after the first `length` tokens. Modules skip positions, which must
        not show an earlier sequence.
        """
        first = self.config.num_hidden_layers
        for tensor in (*self.keys[first:], *self.values[first:]):
            tensor[slot, length:].zero_()
        for means in self.means[first:]:
            if means is not None:
                means[slot, length // self.config.moba_block_size :].zero_()
