"""Exports a checkpoint together with the model's code, for transformers' `trust_remote_code`."""

import shutil
from pathlib import Path

from moonwhale import model as model_package
from moonwhale.checkpoint import open_checkpoint

AUTO_MAP = {
    "AutoConfig": "configuration_moonwhale.MoonwhaleConfig",
    "AutoModel": "modeling_moonwhale.MoonwhaleModel",
    "AutoModelForCausalLM": "modeling_moonwhale.MoonwhaleForCausalLM",
}


def to_remote_code(folder: Path, out: Path, dtype) -> list[str]:
    """Writes the model and the tokenizer of `folder`, and the source files of `moonwhale.model`, to `out`.

    Nothing is lost, so the returned list of notes is empty.
    """
    model, tokenizer = open_checkpoint(folder, dtype)
    model.config.auto_map, model.config.use_cache = AUTO_MAP, True
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    for path in Path(model_package.__file__).parent.glob("*.py"):
        if path.name != "__init__.py":
            shutil.copy(path, out)
    return []
