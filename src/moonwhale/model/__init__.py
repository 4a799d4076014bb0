"""The model. Importing this package registers it with `AutoConfig`, `AutoModel` and `AutoModelForCausalLM`."""

from .configuration_moonwhale import MoonwhaleConfig
from .modeling_moonwhale import MoonwhaleForCausalLM, MoonwhaleModel

__all__ = ["MoonwhaleConfig", "MoonwhaleForCausalLM", "MoonwhaleModel"]
