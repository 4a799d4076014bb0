"""What a training step collects for the optimizer's step hooks, in buffers that stay fp32."""

import torch
from torch import Tensor, nn


class Statistics(nn.Module):
    """A module with such buffers. They stay fp32 when a model is cast, as by `.bfloat16()`: bf16 can represent neither
    a step of a router's bias by γ nor a count beyond 256.
    """

    def _apply(self, fn, recurse: bool = True):
        before = dict(self._buffers)
        super()._apply(fn, recurse)
        for name, buffer in before.items():
            if buffer is not None and self._buffers[name].dtype != buffer.dtype:
                self._buffers[name] = buffer.to(self._buffers[name].device)
        return self


def collects(collect_statistics: bool | None) -> bool:
    """Return whether a forward pass counts in the statistics: as its caller says, or else if gradients are enabled."""
    return torch.is_grad_enabled() if collect_statistics is None else collect_statistics


@torch.no_grad()
def keep_largest_(kept: Tensor, measured: Tensor) -> None:
    """Raise the logits in `kept` (heads,) to those `measured`.

    One that is NaN or infinite measures nothing: the batch's step is skipped or its run stopped.
    """
    kept.copy_(kept.maximum(measured.nan_to_num(nan=-torch.inf, posinf=-torch.inf, neginf=-torch.inf)))
