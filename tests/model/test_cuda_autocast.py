"""CUDA's autocast, emulated on a CPU. It returns fp32 from more operations than the CPU's, which keeps bf16 in them."""

import pytest
import torch
import torch.nn.functional as F
from test_host_sync import dense
from torch.overrides import TorchFunctionMode

from moonwhale import fp8
from moonwhale.model import documents, flex, routed
from moonwhale.model.block import Block

# From ATen/autocast_mode.h: these get inputs in fp32 …
IN_FP32 = {torch.rsqrt, torch.reciprocal, torch.exp, torch.log, torch.pow, torch.logsumexp, F.layer_norm, F.rms_norm}
IN_FP32 |= {torch.Tensor.rsqrt, torch.Tensor.reciprocal, torch.Tensor.exp, torch.Tensor.log, torch.Tensor.pow}
IN_FP32 |= {torch.Tensor.logsumexp, torch.Tensor.norm, F.nll_loss, F.mse_loss, F.softplus}
# … and these return fp32, if the caller names no dtype.
TO_FP32 = {torch.sum, torch.cumsum, torch.prod, torch.softmax, torch.log_softmax, torch.linalg.vector_norm}
TO_FP32 |= {torch.Tensor.sum, torch.Tensor.cumsum, torch.Tensor.prod, torch.Tensor.softmax, torch.Tensor.log_softmax}


class CudaAutocast(TorchFunctionMode):
    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if torch.is_autocast_enabled("cpu") and args and torch.is_tensor(args[0]) and args[0].dtype is torch.bfloat16:
            if function in IN_FP32:
                args = tuple(x.float() if torch.is_tensor(x) and x.is_floating_point() else x for x in args)
            elif function in TO_FP32 and kwargs.get("dtype") is None:
                kwargs["dtype"] = torch.float32
        return function(*args, **kwargs)


@pytest.mark.parametrize("precision", ["bf16", "fp8"])
@pytest.mark.parametrize("moba", [{}, {"moba_topk": 2, "moba_block_size": 8, "moba_key_conv": 3}], ids=["full", "moba"])
def test_the_residual_stream_stays_in_bf16(moba, precision, tiny_model, monkeypatch):
    for module in (documents, routed):
        monkeypatch.setattr(module, "needs_static_shapes", lambda device: True)
    monkeypatch.setattr(flex, "serves", lambda q, documents: True)
    monkeypatch.setattr(flex, "_compiled", lambda: flex._attention)
    monkeypatch.setattr(flex, "_flex", dense)
    monkeypatch.setattr(flex, "_has_flex", lambda q, v: True)
    monkeypatch.setattr(flex, "FLEX_TILE", 8)
    model, seen = tiny_model(num_nextn_predict_layers=1, **moba).train(), []
    if precision == "fp8":
        fp8.convert(model, "blockwise", emulate=True)
    for block in model.modules():
        if isinstance(block, Block):
            block.register_forward_hook(lambda module, inputs, out: seen.append(out[0].dtype))
    tokens = torch.randint(61, (2, 32))
    with CudaAutocast(), torch.autocast("cpu", torch.bfloat16):
        loss = model(input_ids=tokens, labels=tokens).loss
    loss.backward()
    assert set(seen) == {torch.bfloat16} and loss.isfinite()
