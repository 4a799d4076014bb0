"""The oracles on another device than the CPU: set MOONWHALE_TEST_DEVICE, for example to cuda.

Tensors that a test here creates are then on this device, and so are its models. The package's own tensors are where the
package puts them, so a tensor that it forgets on the CPU fails as it would for a user.
"""

import os
import sys
from pathlib import Path

import pytest
import torch
from torch.overrides import TorchFunctionMode

DEVICE = os.environ.get("MOONWHALE_TEST_DEVICE", "cpu")
FOLDER = str(Path(__file__).parent)
CONSTRUCTORS = {torch.arange, torch.empty, torch.eye, torch.full, torch.linspace, torch.ones, torch.rand, torch.randint}
CONSTRUCTORS |= {torch.randn, torch.randperm, torch.tensor, torch.zeros}


class _TestsOnDevice(TorchFunctionMode):
    """Moves what the tests create to the device. The random numbers are the CPU's, so both devices get the same."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        by_a_test = function in CONSTRUCTORS and sys._getframe(1).f_code.co_filename.startswith(FOLDER)
        if not by_a_test or (kwargs or {}).get("device") is not None:
            return out
        return out.detach().to(DEVICE).requires_grad_(out.requires_grad)


if DEVICE != "cpu":  # from now on, since modules have tensors as constants
    _TestsOnDevice().__enter__()


@pytest.fixture(scope="session")
def draw(draw):
    return lambda model, seed=0: draw(model, seed).to(DEVICE)


@pytest.fixture(scope="session")
def tiny_model(tiny_model):
    return lambda seed=0, **overrides: tiny_model(seed, **overrides).to(DEVICE)


@pytest.fixture
def starts_as_nothing(tiny_config):
    """`starts_as_nothing(ids, **extension)` returns a new model with the gradients of one batch.

    It asserts that the loss equals that of the model without the extension.
    """
    from moonwhale.model import MoonwhaleForCausalLM

    def starts_as_nothing(ids, **extension):
        model = MoonwhaleForCausalLM(tiny_config(**extension, zero_init_residual=False))
        plain = MoonwhaleForCausalLM(tiny_config(zero_init_residual=False))
        plain.load_state_dict(model.state_dict(), strict=False)
        loss = model(ids, labels=ids).loss
        assert torch.equal(loss, plain(ids, labels=ids).loss)
        loss.backward()
        return model

    return starts_as_nothing


@pytest.fixture
def learns_like_the_embedding():
    """`learns_like_the_embedding(model, weight)` asserts that the optimizer treats the weight as the embedding's."""
    from moonwhale.optim import param_groups

    def learns_like_the_embedding(model, weight):
        groups = param_groups(model, lr=1.0, embedding_lr=20.0)
        (group,) = [g for g in groups if any(p is weight for p in g["params"])]
        assert (group["muon"], group["lr"], group["weight_decay"]) == (False, 20.0, 0.0)
        assert any(p is model.model.embed_tokens.weight for p in group["params"])

    return learns_like_the_embedding


def pytest_collection_modifyitems(items):
    """Skips tests of the CPU's own code paths on another device."""
    for item in items:
        if DEVICE != "cpu" and item.get_closest_marker("cpu_only") and str(item.path).startswith(FOLDER):
            item.add_marker(pytest.mark.skip(reason=f"tests the CPU's code path or files, not {DEVICE}"))
