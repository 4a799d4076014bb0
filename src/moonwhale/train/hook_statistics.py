"""What the optimizer's step hooks measure, collected for the log."""

import torch
from torch import Tensor


class HookStatistics:
    """What the step hooks recorded since the last log line, kept on the device.

    max_logit: the largest attention logit. n_clipped: how many heads QK-clip scaled down, summed over the steps.
    loads: (MoE layers, experts) tokens of each expert in the latest step.
    """

    def __init__(self, first_moe_layer: int):
        self.first_moe_layer = first_moe_layer
        self.max_logit = self.n_clipped = self.loads = None

    def add(self, last: dict[str, Tensor]) -> None:
        """Adds the values of one step (see `StepHooks.last`)."""
        if "max_logits" in last:
            max_logit = last["max_logits"].max()
            n_clipped = last.get("clipped_heads", torch.zeros_like(max_logit))
            self.max_logit = max_logit if self.max_logit is None else torch.maximum(self.max_logit, max_logit)
            self.n_clipped = n_clipped if self.n_clipped is None else self.n_clipped + n_clipped
        self.loads = last.get("loads")

    def pop_logs(self) -> dict[str, float]:
        """Returns the values to log, and starts anew. The imbalance of a layer is its largest load over the mean."""
        logs = {}
        if self.max_logit is not None:
            logs = {"max_attention_logit": self.max_logit.item(), "clipped_heads": self.n_clipped.item()}
        if self.loads is not None:
            imbalance = (self.loads.amax(1) / self.loads.mean(1).clamp(min=1e-9)).tolist()  # MTP modules may rest
            logs["expert_imbalance"] = max(imbalance)
            logs |= {f"expert_imbalance_{i}": value for i, value in enumerate(imbalance, self.first_moe_layer)}
        self.max_logit = self.n_clipped = self.loads = None
        return logs
