"""`param_groups` sorts a wrapped module's weights as it does without the wrapper."""

import pytest
import torch
from peft import LoraConfig, get_peft_model

from moonwhale.optim import param_groups

MODULES = ["lm_head", "model.embed_tokens", "model.embed_conv", "model.layers.0.mlp.experts"]


def settings(model):
    """Return the settings of each weight's group, by the weight's name without wrappers."""
    names = {p: name.removeprefix("base_model.model.") for name, p in model.named_parameters()}
    return {
        names[p].replace("._orig_mod", "").replace(".modules_to_save.default", ""): group | {"params": None}
        for group in param_groups(model, lr=1.0, embedding_lr=20.0)
        for p in group["params"]
    }


@pytest.mark.parametrize("module", MODULES)
@pytest.mark.parametrize("wrap", ["torch.compile", "peft"])
def test_a_wrapped_module(wrap, module, tiny_model):
    model = tiny_model(embedding_conv=2)
    plain = settings(model)
    if wrap == "peft":
        model = get_peft_model(model, LoraConfig(target_modules=["o_proj"], modules_to_save=[module]))
    else:
        model.set_submodule(module, torch.compile(model.get_submodule(module), backend="eager"))
    found = {name: group for name, group in settings(model).items() if "lora_" not in name}
    assert any(name.startswith(module) for name in found)
    assert found == {name: plain[name] for name in found}


def test_adapters_of_an_embedding(tiny_model):
    model = tiny_model()
    embedding = settings(model)["model.embed_tokens.weight"]
    adapters = settings(get_peft_model(model, LoraConfig(target_modules=["embed_tokens"])))
    assert list(adapters.values()) == [embedding, embedding]
