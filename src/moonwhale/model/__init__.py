"""The model room. Importing it teaches `AutoConfig` and `AutoModelForCausalLM` what a moonwhale is."""

from .configuration_moonwhale import MoonwhaleConfig
from .modeling_moonwhale import MoonwhaleForCausalLM, MoonwhaleModel

__all__ = ["MoonwhaleConfig", "MoonwhaleForCausalLM", "MoonwhaleModel"]
