"""What torch.compile needs of a machine is named if it is missing."""

import pytest
import torch

from moonwhale.model import flex
from moonwhale.model.compiling import compile_unsupported_reason

GPU = torch.device("cuda", 0)


@pytest.mark.parametrize(
    ("capability", "has_triton", "compiler", "reason"),
    [
        ((9, 0), True, "gcc", ""),
        ((6, 1), True, "gcc", "compute capability 7.0"),
        ((9, 0), False, "gcc", "triton is not installed"),
        ((9, 0), True, None, "no C compiler"),
        ((9, 0), True, "cc", "no C compiler"),  # triton looks for gcc and clang alone
    ],
)
def test_what_a_gpu_needs_to_compile(capability, has_triton, compiler, reason, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr("moonwhale.model.compiling.has_triton_package", lambda: has_triton)
    monkeypatch.setattr("shutil.which", lambda name: name if name == compiler else None)
    monkeypatch.delenv("CC", raising=False)
    found = compile_unsupported_reason(GPU)
    assert reason in found if reason else not found
    # Attention on a GPU asks for triton alone, whose cache may hold what a C compiler has built
    assert flex.can_compile.__wrapped__(GPU) is (capability == (9, 0) and has_triton)


def test_a_missing_compiler_is_named(monkeypatch):
    monkeypatch.setattr("shutil.which", lambda name: None)
    assert "install g++" in compile_unsupported_reason(torch.device("cpu"))
