"""Multi-token prediction (V3 §2.2): a causal chain of modules, the k-th of which predicts the (k+1)-th next token."""

import torch
from torch import Tensor, nn

from .block import Block, Stats
from .documents import Documents
from .loss import IGNORE_INDEX
from .norm import RMSNorm


class MTPModule(Block):
    """Module k of the chain. It is itself its first block, as in DeepSeek's checkpoints, where it sits at
    `model.layers.{N + k - 1}`.

    Embedding and head are the main model's. `blocks` are those beyond the first, which the released format does not
    know.
    """

    def __init__(self, config, first_layer_idx: int, n_blocks: int):
        super().__init__(config, first_layer_idx)
        self.enorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.hnorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.eh_proj = nn.Linear(2 * config.hidden_size, config.hidden_size, bias=False)
        self.blocks = nn.ModuleList(Block(config, first_layer_idx + i) for i in range(1, n_blocks))
        self.shared_head = nn.ModuleDict({"norm": RMSNorm(config.hidden_size, config.rms_norm_eps)})

    def forward(
        self, hidden: Tensor, ahead: Tensor, table: tuple[Tensor, Tensor], documents: Documents, cache=None
    ) -> tuple[Tensor, tuple[Stats, ...]]:
        """One link of the chain (V3 eq. 21-23).

        hidden (B, T, hidden): the previous link's normed output at each position i. ahead (B, T, hidden): the embedding
        of token i + k. Positions stay those of i.

        Returns:
            the normed output (B, T, hidden), ready for the head and for the next link; the statistics of each block.
        """
        x = self.eh_proj(torch.cat([self.enorm(ahead), self.hnorm(hidden)], dim=-1))
        x, stats = super().forward(x, table, documents, cache)
        measured = [stats]
        for block in self.blocks:
            x, stats = block(x, table, documents, cache)
            measured.append(stats)
        return self.shared_head["norm"](x), tuple(measured)


def shifted_labels(labels: Tensor, documents: Documents, depth: int) -> Tensor:
    """Targets of depth d, (B, T): position i predicts label i + 1 + d. Depth 0 is the main model.

    The last positions have no target, padding has none, and none lies in another document.
    """
    targets = torch.full_like(labels, IGNORE_INDEX)
    targets[:, : -1 - depth] = labels[:, 1 + depth :]
    return targets.masked_fill(~documents.with_successor(1 + depth).valid, IGNORE_INDEX)
