"""What the model returns: with and without its head."""

from dataclasses import dataclass

from torch import Tensor
from transformers.cache_utils import Cache
from transformers.utils import ModelOutput


@dataclass
class MoonwhaleModelOutput(ModelOutput):
    """Output of `MoonwhaleModel`."""

    last_hidden_state: Tensor | None = None  # (B, T, hidden) the main model's normed output
    past_key_values: Cache | None = None  # the cache, if one was used
    hidden_states: tuple[Tensor, ...] | None = None  # of those asked for: every block's input, the normed output
    attentions: tuple[Tensor, ...] | None = None  # if asked for, (B, heads, T, cached + T) of every main block
    mtp_hidden_states: tuple[Tensor, ...] | None = None  # (B, T, hidden) the normed output of each MTP module that ran
    balance_loss: Tensor | None = None  # 0-d sum over all blocks, weighted by α


@dataclass
class MoonwhaleOutput(ModelOutput):
    """Output of `MoonwhaleForCausalLM`. Everything about the loss needs labels.

    Depth 0 is the main head, depth k is MTP module k. D is 0 where the modules were not run.
    """

    loss: Tensor | None = None  # 0-d, to be differentiated: main + λ/D Σ MTP + balance
    logits: Tensor | None = None  # (B, T or logits_to_keep, V) of the main head. None in training mode with labels
    past_key_values: Cache | None = None  # the cache, if one was used
    hidden_states: tuple[Tensor, ...] | None = None  # of those asked for: every block's input, the normed output
    attentions: tuple[Tensor, ...] | None = None  # if asked for, (B, heads, T, cached + T) of every main block
    losses: Tensor | None = None  # (1 + D,) mean cross-entropy of each depth over this batch, in nats
    accuracies: Tensor | None = None  # (1 + D,) share of targets that were the most likely token
    targets: Tensor | None = None  # (1 + D,) number of targets
    balance_loss: Tensor | None = None  # 0-d sum over all blocks, weighted by α
