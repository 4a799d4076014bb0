"""What every trainer of ours adds to transformers': MuonClip, a stop at the first NaN, checkpoints that are whole."""

import math
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor
from transformers import TrainerCallback
from transformers.trainer import SCHEDULER_NAME

from moonwhale.checkpoint import explain_full_disk, newest_checkpoint, publish_checkpoint, unfinished_folder
from moonwhale.costs import flops_per_token
from moonwhale.errors import UserError
from moonwhale.model.documents import needs_static_shapes
from moonwhale.optim.muon_distributed import DistributedMuonClip
from moonwhale.optim.muonclip import param_groups
from moonwhale.optim.step_hooks import StepHooks, attach_hooks
from moonwhale.parallel.sharded_checkpoint import has_sharded_optimizer, load_optimizer
from moonwhale.precision import peak_flops


@dataclass
class MuonClipArguments:
    """What MuonClip and MTP add to any TrainingArguments, to be inherited before them."""

    muon_momentum: float = field(default=0.95, metadata={"help": "Momentum of Muon."})
    qk_clip_tau: float = field(
        default=100.0, metadata={"help": "Largest attention logit QK-clip allows a head; 0 = off."}
    )
    mtp_loss_weight_final: float | None = field(
        default=None, metadata={"help": "λ of the MTP loss once the learning rate decays; None keeps the model's."}
    )
    decay_steps: int = field(default=0, metadata={"help": "Last steps, in which mtp_loss_weight_final holds."})

    def __post_init__(self):
        super().__post_init__()
        self._n_gpu = min(self.n_gpu, 1)  # several GPUs are DDP's; Trainer would split batches over threads


class MuonClipTraining:
    """To be inherited before a Trainer whose arguments have `MuonClipArguments`.

    Raises:
        UserError: when the loss or the gradient is no longer finite, naming the step and the last good checkpoint: on a
            GPU where the next log line, evaluation or checkpoint would be; when a checkpoint finds no space.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self._hooks: StepHooks | None = None
        self._watch = _Watch(self.model.config.first_k_dense_replace)
        self._unchecked: dict[int, Tensor] = {}  # loss and gradient norm of each step that nobody has looked at yet
        self._clock: float | None = None  # when the current step began; None in the first one, which warms up
        self._tokens = self._seconds = 0.0
        self._writing_to: str | None = None
        self.add_callback(_StepCallback(self))

    def create_optimizer(self, model=None) -> torch.optim.Optimizer:
        """MuonClip over all trained parameters, with QK-clip and the router-bias update as its step hooks.

        Without them under LoRA, whose adapters would not fit a base that has moved.
        """
        if self.optimizer is None:
            args = self.args
            self.optimizer = self._optimizer_of(param_groups(self.model, args.learning_rate, args.weight_decay))
            if all(p.requires_grad for p in self.model.parameters()):
                self._hooks = attach_hooks(self.optimizer, self.model, args.qk_clip_tau or None, **self._alike)
        return self.optimizer

    def _optimizer_of(self, groups: list[dict]) -> DistributedMuonClip:
        args = self.args
        betas = (args.adam_beta1, args.adam_beta2)
        settings = {"momentum": args.muon_momentum, "betas": betas, "eps": args.adam_epsilon}
        return DistributedMuonClip(groups, **self._alike, **settings)

    @property
    def _alike(self) -> dict[str, dist.ProcessGroup | None]:
        """The processes that hold the weights that this one does."""
        return {"group": dist.group.WORLD if dist.is_initialized() else None}

    def _seen_by_hooks(self) -> dict[str, Tensor]:
        return self._hooks.last

    def _get_grad_norm(self, model, grad_norm=None):
        """The norm; the last moment before the weights change, hence where a NaN is caught, if that is no waiting."""
        norm = super()._get_grad_norm(model, grad_norm)
        self._unchecked[self.state.global_step + 1] = torch.stack([self._tr_loss, norm.to(self._tr_loss)])
        if not needs_static_shapes(self.args.device):
            self._stop_unless_finite()
        return norm

    def _stop_unless_finite(self) -> None:
        """Looks at the loss and the gradient of all steps since it last did."""
        steps, self._unchecked = self._unchecked, {}
        for step, values in steps.items():
            for what, value in zip(("loss", "gradient norm"), values.tolist(), strict=True):
                if not math.isfinite(value):
                    good = newest_checkpoint(self.args.output_dir)
                    raise UserError(
                        f"step {step}: the {what} is {value}; "
                        + (f"the last good checkpoint is {good}" if good else "no checkpoint was written yet")
                        + ": train into another `out` with a lower `lr` or `grad_clip`"
                    )

    def _maybe_log_save_evaluate(self, *args, **kwargs) -> None:
        # A checkpoint ends a log line's window, so that a resumed run has the same windows.
        self.control.should_log |= self.control.should_save
        if self.control.should_log or self.control.should_evaluate:  # and so look at what a GPU has done
            self._stop_unless_finite()
        if self._clock is not None:
            self._seconds += time.perf_counter() - self._clock
        super()._maybe_log_save_evaluate(*args, **kwargs)
        self._clock = time.perf_counter()  # evaluations and saves do not count

    def _speed(self) -> dict[str, float]:
        """Tokens per second since the last call and their share of the devices' peak."""
        if not self._seconds:
            return {}
        speed = self._tokens / self._seconds
        self._tokens = self._seconds = 0.0
        fp32 = not self.args.bf16 and torch.get_float32_matmul_precision() == "highest"
        dtype = torch.float32 if fp32 else torch.bfloat16
        peak = peak_flops(self.args.device, dtype) * self.args.world_size
        context = len(self.train_dataset[0]["labels"])
        return {"tokens_per_second": speed, "mfu": speed * flops_per_token(self.model.config, context) / peak}

    # Checkpoints

    def _save_checkpoint(self, model, trial) -> None:
        """Writes the checkpoint where nobody looks for one, and gives it its name when it is complete."""
        out = self.args.output_dir
        if self.args.should_save:
            aside = unfinished_folder(out)
        self.accelerator.wait_for_everyone()
        self._writing_to = f"{out}/.unfinished"
        try:
            super()._save_checkpoint(model, trial)
            self.accelerator.wait_for_everyone()
            if self.args.should_save:
                written = aside / f"checkpoint-{self.state.global_step}"
                (written / "training_args.bin").unlink()  # a pickle, which nothing reads
                publish_checkpoint(written, out, self.args.save_total_limit)
        except Exception as error:
            raise explain_full_disk(error, out) from error
        finally:
            self._writing_to = None
        self.accelerator.wait_for_everyone()

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """Transformers' method, and for a checkpoint whose optimizer state several ranks wrote, its counterpart."""
        if checkpoint is None or not has_sharded_optimizer(Path(checkpoint)):
            super()._load_optimizer_and_scheduler(checkpoint)
            return
        names = {parameter: name for name, parameter in self.model.named_parameters()}
        load_optimizer(Path(checkpoint), self.optimizer, names, self._optimizer_shards())
        self._load_scheduler(checkpoint)

    def _optimizer_shards(self) -> dict[str, Tensor]:
        """What this process holds of each parameter, by name."""
        return dict(self.model.named_parameters())

    def _load_scheduler(self, checkpoint: str) -> None:
        saved = torch.load(Path(checkpoint, SCHEDULER_NAME), weights_only=True)
        self.lr_scheduler.load_state_dict(saved)

    def _get_output_dir(self, trial) -> str:
        return self._writing_to or super()._get_output_dir(trial)


class _StepCallback(TrainerCallback):
    """What happens around a step that the Trainer has no method for."""

    def __init__(self, trainer: MuonClipTraining):
        self.trainer = trainer

    def on_train_begin(self, args, state, control, **kwargs):
        self.trainer._clock = None
        state.compute_steps(args, state.max_steps)  # a resumed run keeps to its own intervals, not the checkpoint's

    def on_step_begin(self, args, state, control, **kwargs):
        if args.mtp_loss_weight_final is not None:
            model = self.trainer.model
            decaying = state.global_step >= state.max_steps - args.decay_steps
            model.mtp_loss_weight = args.mtp_loss_weight_final if decaying else model.config.mtp_loss_weight

    def on_optimizer_step(self, args, state, control, **kwargs):
        if self.trainer._hooks is not None:
            self.trainer._watch.add(self.trainer._seen_by_hooks())


class _Watch:
    """The largest attention logit and the clipped heads since the last log line, and the latest step's expert loads."""

    def __init__(self, first_moe_layer: int):
        self.first_moe_layer = first_moe_layer
        self.largest = self.clipped = self.loads = None

    def add(self, last: dict[str, Tensor]) -> None:
        """Takes what the step hooks saw, still on the device (`StepHooks.last`)."""
        if "max_logits" in last:
            top = last["max_logits"].max()
            self.largest = top if self.largest is None else torch.maximum(self.largest, top)
            clipped = last.get("clipped_heads", torch.zeros_like(top))
            self.clipped = clipped if self.clipped is None else self.clipped + clipped
        self.loads = last.get("loads")

    def drain(self) -> dict[str, float]:
        logs = {}
        if self.largest is not None:
            logs = {"max_attention_logit": self.largest.item(), "clipped_heads": self.clipped.item()}
        if self.loads is not None:
            imbalance = (self.loads.amax(1) / self.loads.mean(1)).tolist()
            logs["expert_imbalance"] = max(imbalance)
            logs |= {f"expert_imbalance_{i}": value for i, value in enumerate(imbalance, self.first_moe_layer)}
        self.largest = self.clipped = self.loads = None
        return logs
