"""MuonClip and the step hooks that complete it, for any training loop."""

from moonwhale.optim.muonclip import MuonClip, param_groups
from moonwhale.optim.step_hooks import StepHooks, attach_hooks

__all__ = ["MuonClip", "StepHooks", "attach_hooks", "param_groups"]
