"""The model and its mechanisms. Importing this package registers the model with transformers' Auto classes.

A mechanism can be a part of any model: `DeepseekMoE`, `MultiheadLatentAttention` and its plain twin
`GroupedQueryAttention` are modules, `moba_attention` is a function, and `Documents` describes packed and padded rows to
them. `moonwhale.optim.attach_hooks` balances and clips those modules wherever they are.
"""

from .configuration_moonwhale import MoonwhaleConfig
from .documents import Documents
from .gqa import GroupedQueryAttention
from .mla import MultiheadLatentAttention
from .moba import moba_attention
from .modeling_moonwhale import MoonwhaleForCausalLM, MoonwhaleModel
from .moe import DeepseekMoE

__all__ = [
    "DeepseekMoE",
    "Documents",
    "GroupedQueryAttention",
    "MoonwhaleConfig",
    "MoonwhaleForCausalLM",
    "MoonwhaleModel",
    "MultiheadLatentAttention",
    "moba_attention",
]
