"""What all of moonwhale's trainers add to a transformers Trainer: MuonClip, a stop at a NaN, verified checkpoints."""

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers import TrainerCallback, TrainingArguments
from transformers.trainer import SCHEDULER_NAME, TRAINER_STATE_NAME
from transformers.training_args import OptimizerNames

from moonwhale.checkpoint import UNFINISHED, explain_full_disk, newest_checkpoint, publish_checkpoint, unfinished_folder
from moonwhale.costs import flops_per_token
from moonwhale.errors import NotFiniteError
from moonwhale.model.documents import needs_static_shapes
from moonwhale.optim.muon_distributed import DistributedMuonClip
from moonwhale.optim.muonclip import param_groups
from moonwhale.optim.step_hooks import StepHooks, attach_hooks
from moonwhale.parallel.sharded_checkpoint import has_sharded_optimizer, load_optimizer
from moonwhale.precision import multiplies_in_fp32, peak_flops
from moonwhale.train.hook_statistics import HookStatistics
from moonwhale.train.milestones import milestones
from moonwhale.train.resuming import check_weights, resuming_from
from moonwhale.train.speed import SpeedMeter

# Fields of TrainingArguments that these trainers cannot serve, with the reason and the remedy
REFUSED = {
    "fp16": "a step that overflows would end the run; use bf16=True",
    "label_smoothing_factor": "the model's own loss, with MTP and balancing, has none; leave it at 0",
    "use_liger_kernel": "Liger has no kernels for this model; leave it False",
    "liger_kernel_config": "Liger has no kernels for this model; leave it None",
    "deepspeed": "MuonClip needs whole weights; start several processes with torchrun, for DDP",
    "fsdp": "MuonClip needs whole weights; leave it None, or train with `parallel`",
    "fsdp_config": "MuonClip needs whole weights; leave it None, or train with `parallel`",
    "parallelism_config": "MuonClip needs whole weights; leave it None, or train with `parallel`",
    "push_to_hub": "checkpoints move into place after they are written; call model.push_to_hub after the training",
    "enable_jit_checkpoint": "it writes past the verified checkpoints; add the callback StopAtStepEnd instead",
}


@dataclass
class MuonClipArgumentsMixin:
    """The arguments that MuonClip and MTP add to a TrainingArguments class, which comes after it among the bases.

    The optimizer is MuonClip while `optim` has its default. Any other value chooses transformers' optimizer.

    Raises:
        ValueError: a field has a value that these trainers cannot serve.
    """

    refused: ClassVar[dict[str, str]] = REFUSED

    use_cache: bool = field(
        default=True, metadata={"help": "The saved configuration's use_cache; training never caches."}
    )
    muon: bool = field(default=True, metadata={"help": "Muon updates the matrices; False: AdamW, as all others."})
    embedding_lr: float = field(
        default=1.0, metadata={"help": "Learning rate of the embedding, relative to learning_rate."}
    )
    muon_momentum: float = field(default=0.95, metadata={"help": "Momentum of Muon."})
    qk_clip_tau: float = field(
        default=100.0,
        metadata={"help": "Largest attention logit: QK-clip scales a head down that exceeds it. 0 turns it off."},
    )
    mtp_loss_weight_final: float | None = field(
        default=None,
        metadata={"help": "Weight λ of the MTP loss during the last decay_steps. None keeps the model's weight."},
    )
    decay_steps: int = field(default=0, metadata={"help": "Number of last steps that use mtp_loss_weight_final."})
    mtp_start_step: int = field(default=0, metadata={"help": "Step before which the MTP modules are not trained."})
    last_shared_step: int = field(default=0, metadata={"help": "Last step that a longer run would share. 0: none."})
    keep_milestones: bool = field(
        default=False,
        metadata={
            "help": "In addition to the save_total_limit newest, keep the best checkpoint and that of last_shared_step."
        },
    )

    def __post_init__(self):
        for name, why in self.refused.items():
            value, default = getattr(self, name), self.__dataclass_fields__[name].default
            if value != default and (value or isinstance(value, float)):
                raise ValueError(f"{name}={value!r} is not supported: {why}")
        super().__post_init__()
        for name in ("optim_args", "optim_target_modules"):
            if getattr(self, name) and self.uses_muonclip:
                raise ValueError(f"{name}={getattr(self, name)!r} is not supported by MuonClip: choose another optim")
        # Several GPUs need DDP. With more than one GPU in a process, Trainer would split batches over threads.
        self._n_gpu = min(self.n_gpu, 1)

    @property
    def uses_muonclip(self) -> bool:
        return self.optim == OptimizerNames(TrainingArguments.optim)

    @property
    def group_settings(self) -> dict:
        """The arguments of `param_groups`."""
        rates = {"lr": self.learning_rate, "embedding_lr": self.embedding_lr}
        return rates | {"weight_decay": self.weight_decay, "muon": self.muon}


class MuonClipTrainerMixin:
    """Makes a Trainer class train a `MoonwhaleForCausalLM` with MuonClip. The Trainer comes after it among the bases.

    - The optimizer is MuonClip, with QK-clip and the router-bias update as step hooks.
    - Training stops when the loss or the gradient norm is no longer finite: at once on a CPU; on a GPU at the next log
      line, evaluation or checkpoint, since each look at a value is a host sync.
    - A checkpoint appears under its name when it is complete, with checksums of its files.

    `args` must be of a class with `MuonClipArgumentsMixin`.

    Example:

        @dataclass
        class MuonClipConfig(MuonClipArgumentsMixin, TrainingArguments):
            pass

        class MuonClipTrainer(MuonClipTrainerMixin, Trainer):
            pass

        args = MuonClipConfig("runs/demo", max_steps=100, qk_clip_tau=50.0)
        MuonClipTrainer(model=model, args=args, train_dataset=rows).train()

    Raises:
        TypeError: `args` is of another class.
        NotFiniteError: the loss or the gradient norm is not finite (names the step and the newest checkpoint).
        UserError: the disk is full.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        if not isinstance(self.args, MuonClipArgumentsMixin):
            given = type(self.args).__name__
            raise TypeError(f"args is a {given}, without MuonClip's settings: give MTPTrainingArguments or the like")
        self._hooks: StepHooks | None = None
        self._hook_statistics = HookStatistics(self.model.config.first_k_dense_replace)
        self._unchecked_steps: dict[int, Tensor] = {}  # step -> (loss, gradient norm), not yet checked to be finite
        self.speed = SpeedMeter()
        self._context = 0  # tokens in a row of the latest batch
        self._save_folder: str | None = None  # where a checkpoint is being written
        self._last_save = -1  # the step of the latest attempt to write a checkpoint
        self.add_callback(_MuonClipCallback(self))

    # Optimizer

    def create_optimizer(self, model=None) -> torch.optim.Optimizer:
        """Creates MuonClip over all trained parameters, unless the caller gave or chose another optimizer.

        Any of them has QK-clip and the router-bias update as its step hooks. They leave frozen weights as they are.
        """
        args = self.args
        if self.optimizer is None:
            self._hooks = None  # those of an earlier `train()`, if `model_init` has made a new model
            if self.optimizer_cls_and_kwargs is not None or not args.uses_muonclip:
                super().create_optimizer(model)
            else:
                groups = param_groups(self.model, **args.group_settings)
                self.optimizer = self._make_optimizer(groups)
        if self._hooks is None:
            self._hooks = attach_hooks(self.optimizer, self.model, args.qk_clip_tau or None, **self._replica_groups)
        return self.optimizer

    def _make_optimizer(self, groups: list[dict]) -> DistributedMuonClip:
        args = self.args
        betas = (args.adam_beta1, args.adam_beta2)
        settings = {"momentum": args.muon_momentum, "betas": betas, "eps": args.adam_epsilon}
        # Some schedules, such as polynomial decay, read the rate from the optimizer's defaults
        return DistributedMuonClip(groups, lr=args.learning_rate, **self._replica_groups, **settings)

    @property
    def _replica_groups(self) -> dict[str, dist.ProcessGroup | None]:
        """The process groups of the ranks that hold replicas of this rank's weights, as DistributedMuonClip's
        arguments.
        """
        return {"group": dist.group.WORLD if dist.is_initialized() else None}

    def _last_hook_values(self) -> dict[str, Tensor]:
        """What the step hooks recorded in the latest step (`StepHooks.last`), for the whole model."""
        return self._hooks.last

    def _steps_done_and_left(self) -> tuple[float, float]:
        """The position in the schedule, on which the MTP weight depends."""
        return self.state.global_step, self.state.max_steps - self.state.global_step

    # Finite losses

    def _get_grad_norm(self, model, grad_norm=None):
        """Returns the gradient norm, and records it with the loss. On a CPU both are checked here, before the update;
        on a GPU that would be a host sync.
        """
        norm = super()._get_grad_norm(model, grad_norm)
        self._unchecked_steps[self.state.global_step + 1] = torch.stack([self._tr_loss, norm.to(self._tr_loss)])
        if not needs_static_shapes(self.args.device):
            self._stop_unless_finite()
        return norm

    def _stop_unless_finite(self) -> None:
        """Checks the loss and the gradient norm of all steps since the last check.

        Raises:
            NotFiniteError: one of them is not finite.
        """
        steps, self._unchecked_steps = self._unchecked_steps, {}
        for step, values in steps.items():
            for name, value in zip(("loss", "gradient norm"), values.tolist(), strict=True):
                if not math.isfinite(value):
                    good = newest_checkpoint(self.args.output_dir)
                    raise NotFiniteError(
                        f"step {step}: the {name} is {value}; "
                        + (f"the last good checkpoint is {good}" if good else "no checkpoint was written yet")
                        + ": train into another `out` with a lower `lr` or `grad_clip`"
                    )

    # Log lines

    def _maybe_log_save_evaluate(self, *args, **kwargs) -> None:
        """Trainer's method at the end of a step. An evaluation that fails must not cost the checkpoint that is due."""
        # Log at each checkpoint, so that a resumed run averages over the same steps as an uninterrupted one.
        self.control.should_log |= self.control.should_save
        if self.control.should_log or self.control.should_evaluate:  # these sync with the GPU anyway
            self._stop_unless_finite()
        self.speed.stop()
        several_ranks = dist.is_initialized() and dist.get_world_size() > 1
        is_last = self.state.global_step >= self.state.max_steps
        if several_ranks and is_last and self.control.should_evaluate and self.control.should_save:
            # Only all ranks together can save, and the evaluation may fail on one of them.
            self._save_checkpoint(self.model, None)
        try:
            super()._maybe_log_save_evaluate(*args, **kwargs)
        except Exception:
            if self.control.should_save and self._last_save != self.state.global_step and not several_ranks:
                self._save_checkpoint(self.model, None)
            raise
        self.speed.start()

    def _speed_logs(self) -> dict[str, float]:
        """Returns the tokens per second since the last call, and the model FLOPs utilization (MFU) over all devices."""
        tokens_per_second = self.speed.pop()
        if tokens_per_second is None:
            return {}
        fp32 = not self.args.bf16 and multiplies_in_fp32(self.args.device)
        dtype = torch.float32 if fp32 else torch.bfloat16
        peak = peak_flops(self.args.device, dtype) * self.args.world_size
        config, context = self.model.config, self._context
        flops = flops_per_token(config, context, mtp=not self._language_model.skips_mtp)
        return {"tokens_per_second": tokens_per_second, "mfu": tokens_per_second * flops / peak}

    # Checkpoints

    def _save_checkpoint(self, model, trial) -> None:
        """Writes the checkpoint into an unfinished folder, then publishes it under its name."""
        out = super()._get_output_dir(trial)
        self._last_save = self.state.global_step
        if self.args.should_save:
            folder = unfinished_folder(out)
        self.accelerator.wait_for_everyone()
        self._save_folder = f"{out}/{UNFINISHED}"
        try:
            super()._save_checkpoint(model, trial)
            if self.state.best_global_step == self.state.global_step:  # Trainer has the unfinished folder's path
                self.state.best_model_checkpoint = f"{out}/checkpoint-{self.state.global_step}"
            self.accelerator.wait_for_everyone()
            if self.args.should_save:
                written = folder / f"checkpoint-{self.state.global_step}"
                (written / "training_args.bin").unlink()  # a pickle, which nothing reads
                if self.state.best_global_step == self.state.global_step:
                    self.state.save_to_json(str(written / TRAINER_STATE_NAME))  # with the path of the best one
                spared = milestones(self.state, self.args, out) if self.args.keep_milestones else ()
                publish_checkpoint(written, out, self.args.save_total_limit, self.state.best_model_checkpoint, spared)
        except Exception as error:
            if explained := explain_full_disk(error, out):
                raise explained from error
            raise
        finally:
            self._save_folder = None
        self.accelerator.wait_for_everyone()

    def _get_output_dir(self, trial) -> str:
        return self._save_folder or super()._get_output_dir(trial)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """Loads optimizer states that one process wrote, and also those that several wrote."""
        with resuming_from(checkpoint):
            if checkpoint is None or not has_sharded_optimizer(Path(checkpoint)):
                self._load_whole_optimizer(checkpoint)
                return
            names = {parameter: name for name, parameter in self.model.named_parameters()}
            load_optimizer(Path(checkpoint), self.optimizer, names, self._optimizer_shards())
            self._load_scheduler(checkpoint)

    def _load_whole_optimizer(self, checkpoint: str | None) -> None:
        """Loads the states of the optimizer and the scheduler that one process wrote; nothing if there are none."""
        super()._load_optimizer_and_scheduler(checkpoint)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model=None) -> None:
        with resuming_from(resume_from_checkpoint):
            check_weights(Path(resume_from_checkpoint), self.model.config)
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        with resuming_from(checkpoint):
            super()._load_rng_state(checkpoint)

    def _optimizer_shards(self) -> dict[str, Tensor]:
        """This rank's shard of each parameter, by name."""
        return dict(self.model.named_parameters())

    @property
    def _language_model(self) -> nn.Module:
        """The model inside an adapter, whose wrapper would keep `mtp_loss_weight` to itself."""
        return next(m for m in self.model.modules() if "mtp_loss_weight" in vars(m))

    def _load_scheduler(self, checkpoint: str) -> None:
        saved = torch.load(Path(checkpoint, SCHEDULER_NAME), weights_only=True)
        self.lr_scheduler.load_state_dict(saved)


class _MuonClipCallback(TrainerCallback):
    """The mixin's work at those moments of a step for which Trainer has a callback event but no method."""

    def __init__(self, trainer: MuonClipTrainerMixin):
        self.trainer = trainer

    def on_train_begin(self, args, state, control, **kwargs):
        self.trainer.speed.begin_run()
        state.compute_steps(args, state.max_steps)  # a resumed run takes its own intervals, not the checkpoint's

    def on_step_begin(self, args, state, control, **kwargs):
        if args.mtp_loss_weight_final is not None or args.mtp_start_step:
            model = self.trainer._language_model
            done, left = self.trainer._steps_done_and_left()
            weight = model.config.mtp_loss_weight
            if args.mtp_loss_weight_final is not None and left <= args.decay_steps:
                weight = args.mtp_loss_weight_final
            model.mtp_loss_weight = 0.0 if done < args.mtp_start_step else weight

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        model = self.trainer._language_model
        if model.skips_mtp:  # DDP gives the modules gradients of zero, with which weight decay would shrink them
            model.model.mtp_modules.zero_grad()

    def on_optimizer_step(self, args, state, control, **kwargs):
        if self.trainer.accelerator.optimizer_step_was_skipped:
            self.trainer._hooks.reset()
        else:
            self.trainer._hook_statistics.add(self.trainer._last_hook_values())
