"""QK-Clip (Kimi K2, arXiv 2507.20534 §2.1) and the router-bias update (V3 §2.1.2) after every optimizer step.

Both are hooks of the optimizer, so that every training loop has them: this project's trainers, TRL's, and your own.
"""

import math
import warnings

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from moonwhale.errors import UserError


class StepHooks:
    """Applies QK-Clip and the router-bias update after each optimizer step, in any training loop (see `attach_hooks`).

    `last` holds the statistics of the latest step, as tensors on the model's device so that no host sync is needed:
    `max_logits` (layers, heads), −inf without a batch; `clipped_heads` (), the number of clipped heads; and `loads`
    (layers, experts), tokens over all micro-batches and ranks. Layers with fewer heads or experts are padded with
    −inf or 0. An entry is missing if the model has no such modules.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, model: nn.Module, qk_clip_tau: float | None, group=None):
        if qk_clip_tau is not None and not qk_clip_tau > 0:
            raise UserError(f"qk_clip_tau: {qk_clip_tau} is out of range (give a number above 0, or None for no clip)")
        self.qk_clip_tau, self.group = qk_clip_tau, group
        # Classes are asked: a compiled module, or peft's wrapper of one, hands on the methods of the module inside it.
        self.attentions = [module for module in model.modules() if hasattr(type(module), "clip_qk_")]
        self.moes = [module for module in model.modules() if hasattr(type(module), "update_bias_")]
        self.last: dict[str, Tensor] = {}
        self._is_first_step = True
        self._handle = _unwrapped(optimizer).register_step_post_hook(self)

    @torch.no_grad()
    def __call__(self, optimizer: torch.optim.Optimizer, args: tuple, kwargs: dict) -> None:
        if self.attentions:
            logits = [attention.max_logit for attention in self.attentions]
            _all_reduce(logits, "MAX", self.group)
            self.last["max_logits"] = pad_sequence(logits, batch_first=True, padding_value=-math.inf)
            if self.qk_clip_tau is not None:
                clipped = [attention.clip_qk_(self.qk_clip_tau) for attention in self.attentions]
                self.last["clipped_heads"] = torch.stack(clipped).sum()
        if self.moes:
            loads = [moe.load for moe in self.moes]
            _all_reduce(loads, "SUM", self.group)
            self.last["loads"] = pad_sequence(loads, batch_first=True)
            for moe in self.moes:
                moe.update_bias_()
        if self._is_first_step and self.last:
            self._is_first_step = False
            self._warn_if_nothing_was_collected()
        self.reset()

    def _warn_if_nothing_was_collected(self) -> None:
        logits, loads = self.last.get("max_logits"), self.last.get("loads")
        if any(statistics.device.type != "cpu" for statistics in self.last.values()):
            return  # to look would be a host sync
        if not ((logits is not None and (logits > -math.inf).any()) or (loads is not None and (loads > 0).any())):
            warnings.warn(
                "attach_hooks: no batch was counted before the first step, so nothing is clipped or balanced: give the "
                "model labels, or call it with collect_statistics=True",
                stacklevel=2,
            )

    @torch.no_grad()
    def reset(self) -> None:
        """Drop the statistics since the last step. Call this if you skip a step, for instance because of a NaN loss."""
        for attention in self.attentions:
            attention.max_logit.fill_(-math.inf)
        for moe in self.moes:
            moe.load.zero_()

    def remove(self) -> None:
        self._handle.remove()


def attach_hooks(
    optimizer: torch.optim.Optimizer, model: nn.Module, qk_clip_tau: float | None = 100.0, group=None
) -> StepHooks:
    """End every step of `optimizer`, of any class, with QK-Clip and the router-bias update of `model`.

    The hooks find modules by their methods:

    - An attention has `clip_qk_(tau)`, which rescales the heads above tau and returns their number as a tensor. Its
      fp32 buffer `max_logit` (heads,) is the largest causal pre-softmax logit since the last step, scale included, or
      −inf.
    - An MoE has `update_bias_()`. Its fp32 buffer `load` (experts,) counts each expert's tokens since the last step.

    The modules' forward fills these buffers, or that of a whole model (see `collect_statistics`). On a CPU the first
    step warns if no batch was counted. After each step the buffers are reduced over the ranks of `group`, which hold
    replicas of `model` (None: all ranks do), then used, then reset. Under DDP, accumulate in `no_sync` or with
    `broadcast_buffers=False`; otherwise rank 0's buffers overwrite the others'.

    With `qk_clip_tau=None` logits are only recorded. The model's modules leave frozen weights as they are, so LoRA's
    base model stays the same.

    `optimizer` may be wrapped by `accelerator.prepare`. If your loop skips a step, call `reset` of the result.

    Raises:
        TypeError: the optimizer has no step hooks.
        UserError: tau is not positive.
    """
    return StepHooks(optimizer, model, qk_clip_tau, group)


def _unwrapped(optimizer) -> torch.optim.Optimizer:
    """Return the torch optimizer inside a wrapper such as accelerate's, which is an `Optimizer` without hooks."""
    inner = optimizer
    while not hasattr(inner, "_optimizer_step_post_hooks"):
        if not (isinstance(inner, torch.optim.Optimizer) and hasattr(inner, "optimizer")):
            raise TypeError(
                f"attach_hooks: {type(optimizer).__name__} has no step hooks (give a torch.optim.Optimizer)"
            )
        inner = inner.optimizer
    return inner


def _all_reduce(tensors: list[Tensor], op: str, group) -> None:
    """Reduce tensors in place over the ranks of `group`, in one collective."""
    if not (dist.is_available() and dist.is_initialized()):
        return
    flat = torch.cat(tensors)
    dist.all_reduce(flat, getattr(dist.ReduceOp, op), group=group)
    for tensor, reduced in zip(tensors, flat.split([len(t) for t in tensors]), strict=True):
        tensor.copy_(reduced)
