"""A dense language model with GPT-2's architecture, the baseline of the benchmarks. It uses no moonwhale code.

It has learned positions, LayerNorm without bias before each sublayer, multi-head attention with torch's fused kernel, a
GELU MLP, and an output head tied to the token embedding.
"""

import math

from torch import Tensor, nn
from torch.nn import functional as F


class _Block(nn.Module):
    def __init__(self, width: int, heads: int, inner: int):
        super().__init__()
        self.heads = heads
        self.attention_norm = nn.LayerNorm(width, bias=False)
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.attention_out = nn.Linear(width, width, bias=False)
        self.mlp_norm = nn.LayerNorm(width, bias=False)
        self.mlp_in = nn.Linear(width, inner, bias=False)
        self.mlp_out = nn.Linear(inner, width, bias=False)

    def forward(self, hidden: Tensor) -> Tensor:
        batch, length, width = hidden.shape
        qkv = self.qkv(self.attention_norm(hidden)).view(batch, length, 3, self.heads, width // self.heads)
        query, key, value = qkv.permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        hidden = hidden + self.attention_out(attended.transpose(1, 2).reshape(batch, length, width))
        return hidden + self.mlp_out(F.gelu(self.mlp_in(self.mlp_norm(hidden))))


class DenseLM(nn.Module):
    """A model of `layers` blocks with `heads` attention heads, an MLP of width `inner`, and `context` positions."""

    def __init__(self, vocab_size: int, layers: int, width: int, heads: int, inner: int, context: int):
        assert width % heads == 0, f"{heads} heads do not divide a width of {width}"
        super().__init__()
        self.tokens = nn.Embedding(vocab_size, width)
        self.positions = nn.Embedding(context, width)
        self.blocks = nn.ModuleList(_Block(width, heads, inner) for _ in range(layers))
        self.norm = nn.LayerNorm(width, bias=False)
        self._initialize(layers)

    def _initialize(self, layers: int) -> None:
        """Initializes as GPT-2: normal with σ 0.02, smaller for the 2 * `layers` outputs into the residual stream."""
        for name, parameter in self.named_parameters():
            if parameter.dim() == 2:
                into_residual = name.endswith(("attention_out.weight", "mlp_out.weight"))
                nn.init.normal_(parameter, std=0.02 / math.sqrt(2 * layers) if into_residual else 0.02)

    def forward(self, tokens: Tensor, labels: Tensor) -> Tensor:
        """Returns the mean loss in nats. Position i of `tokens` (B, T) predicts labels[:, i + 1] unless it is -100."""
        hidden = self.tokens(tokens) + self.positions.weight[: tokens.shape[1]]
        for block in self.blocks:
            hidden = block(hidden)
        logits = F.linear(self.norm(hidden[:, :-1]), self.tokens.weight)
        return F.cross_entropy(logits.flatten(0, 1).float(), labels[:, 1:].flatten())


def adamw_groups(model: nn.Module, weight_decay: float) -> list[dict]:
    """Splits the parameters into two groups for torch.optim.AdamW: matrices with weight decay, norms without."""
    parameters = list(model.parameters())
    return [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]


def cosine_decay(progress: float, warmup: float, floor: float) -> float:
    """Returns the share of the peak learning rate: linear warm-up, then a cosine decay to `floor`."""
    if progress < warmup:
        return progress / warmup
    return floor + (1 - floor) * (1 + math.cos(math.pi * (progress - warmup) / (1 - warmup))) / 2
