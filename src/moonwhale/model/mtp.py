"""Multi-token prediction (V3 §2.2): a causal chain of modules. Module k predicts the token k + 1 positions ahead."""

import torch
from torch import Tensor, nn

from .block import Block
from .documents import Documents
from .loss import IGNORE_INDEX
from .norm import RMSNorm


class MTPModule(Block):
    """Module k of the chain. It is a block itself, plus a projection in front of it and a norm after it.

    That makes its first block's weights sit at `model.layers.{N + k - 1}`, as in DeepSeek's checkpoints. `blocks` are
    the further ones, which the released format does not have. Embedding and head are the main model's.
    """

    def __init__(self, config, first_layer_idx: int, n_blocks: int):
        super().__init__(config, first_layer_idx)
        self.enorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.hnorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.eh_proj = nn.Linear(2 * config.hidden_size, config.hidden_size, bias=False)
        self.blocks = nn.ModuleList(Block(config, first_layer_idx + i) for i in range(1, n_blocks))
        self.shared_head = nn.ModuleDict({"norm": RMSNorm(config.hidden_size, config.rms_norm_eps)})

    def forward(
        self, hidden: Tensor, ahead: Tensor, rotation: tuple[Tensor, Tensor], documents: Documents, cache=None
    ) -> tuple[Tensor, ...]:
        """Apply one link of the chain (V3 eq. 21-23). Positions stay those of i.

        Args:
            hidden: (B, T, hidden), at each position i the normed output of the previous link.
            ahead: (B, T, hidden), at each position i the embedding of token i + k.

        Returns:
            the normed output (B, T, hidden) for the head and the next link, and the fields of each block's statistics.
        """
        x = torch.cat([self.enorm(ahead), self.hnorm(hidden)], dim=-1)  # (B, T, 2 * hidden)
        x, *measured = super().forward(self.eh_proj(x), rotation, documents, cache)  # (B, T, hidden)
        for block in self.blocks:
            x, *statistics = block(x, rotation, documents, cache)
            measured += statistics
        return self.shared_head["norm"](x), *measured


def shifted_labels(labels: Tensor, documents: Documents, depth: int) -> Tensor:
    """Return the targets of one depth, (B, T): position i predicts label i + 1 + depth. Depth 0 is the main model.

    Padding and the last 1 + depth positions of a document have no target.
    """
    targets = torch.full_like(labels, IGNORE_INDEX)
    targets[:, : -1 - depth] = labels[:, 1 + depth :]
    return targets.masked_fill(~documents.with_successor(1 + depth).valid, IGNORE_INDEX)


def prediction_targets(labels: Tensor, documents: Documents, n_modules: int, shifted: bool = False) -> Tensor:
    """Return the targets of the main model and of `n_modules` MTP modules, (1 + D, B, T), from `labels` (B, T).

    With `shifted`, label i is the main model's target at position i already, as transformers' `shift_labels` are.
    """
    if shifted:
        ahead = [shifted_labels(labels, documents, depth - 1) for depth in range(1, 1 + n_modules)]
        return torch.stack([labels, *ahead])
    return torch.stack([shifted_labels(labels, documents, depth) for depth in range(1 + n_modules)])
