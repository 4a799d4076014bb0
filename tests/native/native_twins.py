"""Compares compiled functions with their twins in PyTorch, and with themselves on other numbers of threads."""

import torch

from moonwhale.model import kernels


def normal(*shape, dtype=torch.float32, seed=0, scale=1.0):
    return (scale * torch.randn(shape, generator=torch.Generator().manual_seed(seed))).to(dtype)


def in_pytorch(run, *inputs):
    """Return what `run` computes without kernels, in fp32 whatever the inputs' dtype."""
    compiled, kernels.compiled = kernels.compiled, None
    try:
        return run(*(x.float() if x.is_floating_point() else x for x in inputs))
    finally:
        kernels.compiled = compiled


def assert_equal_to_rounding(run, *inputs):
    assert kernels.compiled_for(inputs[0])
    for some, exact in zip(run(*inputs), in_pytorch(run, *inputs), strict=True):
        near = 2e-2 if torch.bfloat16 in (some.dtype, inputs[0].dtype) else 2e-6
        if exact.dtype is torch.bool:
            assert torch.equal(some, exact)
        else:
            assert (some.float() - exact).norm() <= near * exact.norm() + 1e-7


def assert_threads_change_no_bit(*runs):
    threads = torch.get_num_threads()
    try:
        for run in runs:
            torch.set_num_threads(1)
            alone = run()
            for count in (2, 3, 5):
                torch.set_num_threads(count)
                assert all(map(torch.equal, run(), alone))
    finally:
        torch.set_num_threads(threads)
