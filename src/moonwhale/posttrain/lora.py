"""LoRA through peft: which modules get adapters, and how the adapters become part of a plain checkpoint."""

import shutil
import tempfile
import typing
from pathlib import Path

from transformers import PreTrainedTokenizerFast

from moonwhale.checkpoint import publish_model

if typing.TYPE_CHECKING:
    from peft import LoraConfig

# The matrices of every attention and dense network. Not kv_b_proj, whose weight attention also uses without calling the
# module: with an adapter, each step from the cache would compute it anew.
MODULES = ("q_a_proj", "q_b_proj", "q_proj", "k_proj", "v_proj", "kv_a_proj_with_mqa", "o_proj")
MODULES += ("gate_proj", "up_proj", "down_proj")


def lora_config(model, rank: int) -> "LoraConfig":
    """Returns peft's configuration of adapters on those of MODULES that the model has."""
    from peft import LoraConfig

    present = {name.rpartition(".")[2] for name, _ in model.named_modules()}
    return LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=[name for name in MODULES if name in present])


def merge_adapters(model, tokenizer: PreTrainedTokenizerFast, out: Path) -> None:
    """Adds the adapters to the weights, and writes the model as a plain checkpoint into `out`.

    `publish_model` copies config.json last: a merge that was interrupted leaves no folder that looks like a model.
    """
    for left in out.glob(".merged-*"):  # by a process that was killed
        shutil.rmtree(left, ignore_errors=True)
    merged = model.merge_and_unload()
    with tempfile.TemporaryDirectory(dir=out, prefix=".merged-") as folder:
        merged.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        publish_model(Path(folder), out)
