"""What attention remembers, in slots: a latent and a rotary key for each token, a mean of them for each full block."""

from functools import cached_property

import torch
from torch import Tensor

from moonwhale.model import MoonwhaleConfig


class LatentCache:
    """One slot a sequence, one entry a token and block of the model: `kv_lora_rank + qk_rope_head_dim` numbers.

    keys[i] (slots, length, rank + rope) holds the entries of the model's block i. values[i] is the same tensor, of
    which values are the first `rank` numbers, unless keys are convolved (`moba_key_conv`). means[i] (slots, blocks,
    rank + rope) fp32 holds the mean entry of every full block, where block i chooses by them (MoBA), else None.

    What a slot holds beyond its sequence's length has no meaning: whoever reads knows the length.
    """

    def __init__(self, config: MoonwhaleConfig, dtype: torch.dtype, device: torch.device | str = "cpu"):
        self.config, self.dtype, self.device = config, dtype, torch.device(device)
        self.slots = self.length = 0
        self.keys: list[Tensor] = []
        self.values: list[Tensor] = []
        self.means: list[Tensor | None] = []
        self.resize(0, 0)

    @cached_property
    def bytes_per_token(self) -> float:
        """Of one sequence, over all blocks of the model."""
        config, number = self.config, torch.empty((), dtype=self.dtype).element_size()
        width, total = config.kv_cache_numbers_per_token, 0.0
        for i in range(config.num_blocks):
            total += (width + (config.kv_lora_rank if config.moba_key_conv else 0)) * number
            total += width * 4 / config.moba_block_size if config.is_moba_layer(i) else 0
        return total

    @property
    def bytes(self) -> int:
        """What it takes now."""
        tensors = [*self.keys, *(t for t in (*self.values, *self.means) if t is not None)]
        return sum({id(t): t.nbytes for t in tensors}.values())

    def resize(self, slots: int, length: int) -> None:
        """Makes room for so many sequences of so many tokens (whole blocks), keeping of the old ones what fits."""
        config, old, kept = self.config, (self.keys, self.values, self.means), min(slots, self.slots)
        self.slots, self.length = slots, -(-length // config.moba_block_size) * config.moba_block_size
        shape, blocks = (slots, self.length), self.length // config.moba_block_size
        width, of = config.kv_cache_numbers_per_token, {"dtype": self.dtype, "device": self.device}
        layers, convolved = range(config.num_blocks), config.moba_key_conv > 0
        self.keys = [torch.zeros(*shape, width, **of) for _ in layers]
        self.values = [torch.zeros(*shape, config.kv_lora_rank, **of) if convolved else keys for keys in self.keys]
        self.means = [
            torch.zeros(slots, blocks, width, device=self.device) if config.is_moba_layer(i) else None for i in layers
        ]
        for tensors, before in zip((self.keys, self.values, self.means), old, strict=True):
            for new, was in zip(tensors, before, strict=False):
                if new is not None:
                    n = min(new.shape[1], was.shape[1])
                    new[:kept, :n] = was[:kept, :n]

    def move(self, source: int, target: int, length: int) -> None:
        """Copies the first `length` tokens of a slot over another one's."""
        for i, keys in enumerate(self.keys):
            keys[target, :length] = keys[source, :length]
            if self.values[i] is not keys:
                self.values[i][target, :length] = self.values[i][source, :length]
            if self.means[i] is not None:
                blocks = length // self.config.moba_block_size
                self.means[i][target, :blocks] = self.means[i][source, :blocks]

    def clear(self, slot: int) -> None:
        """Zeros where MTP modules write into a slot: they skip positions, whose entries must not be an earlier
        sequence's.
        """
        first = self.config.num_hidden_layers
        for tensor in (*self.keys[first:], *self.values[first:], *self.means[first:]):
            if tensor is not None:
                tensor[slot].zero_()
