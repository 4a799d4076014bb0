"""`MTPTrainer`: transformers' Trainer with MuonClip, per-depth loss accounting, honest checkpoints and an early stop on
NaN.
"""

import math
import os
import time
from dataclasses import dataclass, field

import torch
from torch import Tensor
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_utils import rotate_checkpoints

from moonwhale.counts import flops_per_token
from moonwhale.errors import UserError
from moonwhale.model.layout import Layout
from moonwhale.model.loss import IGNORE
from moonwhale.model.mtp import shifted_labels
from moonwhale.optim.muonclip import MuonClip, attach_hooks, param_groups
from moonwhale.precision import peak_flops
from moonwhale.train import checkpoints


@dataclass
class MTPTrainingArguments(TrainingArguments):
    """TrainingArguments and what MuonClip and MTP add to them."""

    muon_momentum: float = field(default=0.95, metadata={"help": "Momentum of Muon."})
    qk_clip_tau: float = field(
        default=100.0, metadata={"help": "Largest attention logit QK-clip allows a head; 0 = off."}
    )
    mtp_loss_weight_final: float | None = field(
        default=None, metadata={"help": "λ of the MTP loss once the learning rate decays; None keeps the model's."}
    )
    decay_steps: int = field(default=0, metadata={"help": "Last steps, in which mtp_loss_weight_final holds."})


class MTPTrainer(Trainer):
    """Pretrains a `MoonwhaleForCausalLM` on rows {"input_ids", "position_ids", "labels"}, on one device or under DDP.

    byte_lengths: (V,) bytes each token stands for, for evaluation in bits per byte.

    Raises:
        UserError: when the loss or the gradient is no longer finite, naming the step and the last good checkpoint.
    """

    def __init__(self, *args, byte_lengths: Tensor | None = None, **kwargs):
        super().__init__(*args, **kwargs)
        self.model_accepts_loss_kwargs = True  # the model divides by num_items_in_batch itself
        self.byte_lengths = byte_lengths
        self.hooks = None
        self._parts = _LossParts()
        self._attention = _AttentionWatch()
        self._tokens = self._seconds = 0.0
        self._clock = time.perf_counter()
        self.add_callback(_StepCallback(self))

    def create_optimizer(self, model=None) -> MuonClip:
        """MuonClip over all parameters, with QK-clip and the router-bias update as its step hooks."""
        if self.optimizer is None:
            args = self.args
            groups = param_groups(self.model, lr=args.learning_rate, weight_decay=args.weight_decay)
            betas = (args.adam_beta1, args.adam_beta2)
            self.optimizer = MuonClip(
                groups, lr=args.learning_rate, momentum=args.muon_momentum, betas=betas, eps=args.adam_epsilon
            )
            self.hooks = attach_hooks(self.optimizer, self.model, args.qk_clip_tau or None)
        return self.optimizer

    # One optimizer step

    def _get_num_items_in_batch(self, batch_samples: list, device: torch.device) -> Tensor | None:
        """Targets of the whole step for each depth, (1 + D,): an MTP module has fewer than the main head."""
        if not batch_samples:
            return None
        depths = range(1 + self.model.config.num_nextn_predict_layers)
        total = torch.zeros(len(depths), dtype=torch.long)
        for batch in batch_samples:
            labels = batch["labels"]
            layout = Layout.of(*labels.shape, labels.device, batch.get("attention_mask"), batch.get("position_ids"))
            total += torch.stack([(shifted_labels(labels, layout, d) != IGNORE).sum() for d in depths]).cpu()
        total = total.to(device)
        return self.accelerator.reduce(total, "sum") if self.args.world_size > 1 else total

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        loss, outputs = super().compute_loss(model, inputs, return_outputs=True, num_items_in_batch=num_items_in_batch)
        if model.training:
            self._parts.add(outputs)
            self._tokens += inputs["labels"].numel() * self.args.world_size
        return (loss, outputs) if return_outputs else loss

    def training_step(self, model, inputs, num_items_in_batch=None) -> Tensor:
        loss = super().training_step(model, inputs, num_items_in_batch)
        self._stop_unless_finite(loss, "loss")
        return loss

    def _get_grad_norm(self, model, grad_norm=None):
        norm = super()._get_grad_norm(model, grad_norm)
        self._stop_unless_finite(norm, "gradient norm")
        return norm

    def _stop_unless_finite(self, value, what: str) -> None:
        if not math.isfinite(float(value)):
            good = checkpoints.newest(self.args.output_dir)
            after = (
                f"the last good checkpoint is {good}: go on from it with --resume and"
                if good
                else "no checkpoint was written yet:"
            )
            raise UserError(
                f"step {self.state.global_step + 1}: the {what} is {float(value)}; {after} lower --lr or --grad-clip"
            )

    # Logging

    def _maybe_log_save_evaluate(self, *args, **kwargs) -> None:
        self._seconds += time.perf_counter() - self._clock  # training only: evaluations and saves do not count
        super()._maybe_log_save_evaluate(*args, **kwargs)
        self._clock = time.perf_counter()

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:
            logs |= self._parts.drain(self.accelerator)
            logs |= self._attention.drain(self.hooks)
            if self._seconds:
                speed = self._tokens / self._seconds
                context = self.train_dataset[0]["labels"].numel()
                peak = peak_flops(self.args.device, self._compute_dtype()) * self.args.world_size
                logs["tokens_per_second"] = speed
                logs["mfu"] = speed * flops_per_token(self.model.config, context) / peak
            self._tokens = self._seconds = 0.0
        super().log(logs, start_time)

    def _compute_dtype(self) -> torch.dtype:
        return torch.bfloat16 if self.args.bf16 else torch.float32

    # Evaluation

    @torch.no_grad()
    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix: str = "eval") -> dict[str, float]:
        """Mean cross-entropy of the main head in nats per token and bits per byte, and the MTP modules' losses and
        accuracies.
        """
        parts, n_bytes = _LossParts(), torch.zeros((), dtype=torch.float64, device=self.args.device)
        model = (
            self.accelerator.prepare_model(self.model, evaluation_mode=True)
            if self.model is self.model_wrapped
            else self.model_wrapped
        )
        model.eval()
        for inputs in self.get_eval_dataloader(eval_dataset):
            inputs = self._prepare_inputs(inputs)
            with self.accelerator.autocast():
                parts.add(model(**inputs, logits_to_keep=1))
            if self.byte_lengths is not None:
                targets = inputs["labels"][:, 1:]
                n_bytes += self.byte_lengths.to(targets.device)[targets[targets != IGNORE]].sum()
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in parts.drain(self.accelerator).items()}
        n_bytes = self.accelerator.reduce(n_bytes, "sum").item()
        if n_bytes:
            nats = metrics[f"{metric_key_prefix}_loss_main"] * metrics[f"{metric_key_prefix}_targets"]
            metrics[f"{metric_key_prefix}_bits_per_byte"] = nats / math.log(2) / n_bytes
        del metrics[f"{metric_key_prefix}_targets"]
        self.log(dict(metrics))
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    # Checkpoints

    def _save_checkpoint(self, model, trial) -> None:
        """Writes the checkpoint where nobody looks for one, and gives it its name when it is complete."""
        name = f"checkpoint-{self.state.global_step}"
        unfinished = checkpoints.unfinished(self.args.output_dir)
        self._output_dir_override = str(unfinished)
        try:
            super()._save_checkpoint(model, trial)
        except OSError as error:
            raise checkpoints.explain_disk(error, self.args.output_dir) from error
        finally:
            self._output_dir_override = None
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            checkpoints.publish(unfinished / name, os.path.join(self.args.output_dir, name))
            rotate_checkpoints(self.args.output_dir, save_total_limit=self.args.save_total_limit)
        self.accelerator.wait_for_everyone()

    _output_dir_override: str | None = None

    def _get_output_dir(self, trial) -> str:
        return self._output_dir_override or super()._get_output_dir(trial)


class _StepCallback(TrainerCallback):
    """What happens around a step that the Trainer has no method for."""

    def __init__(self, trainer: MTPTrainer):
        self.trainer = trainer

    def on_train_begin(self, args, state, control, **kwargs):
        self.trainer._clock = time.perf_counter()

    def on_step_begin(self, args, state, control, **kwargs):
        if args.mtp_loss_weight_final is not None:
            model = self.trainer.model
            decaying = state.global_step >= state.max_steps - args.decay_steps
            model.mtp_loss_weight = args.mtp_loss_weight_final if decaying else model.config.mtp_loss_weight

    def on_optimizer_step(self, args, state, control, **kwargs):
        self.trainer._attention.add(self.trainer.hooks)


class _LossParts:
    """Sums of loss parts over micro-batches, kept on the device until they are read."""

    def __init__(self):
        self.sums = None

    @torch.no_grad()
    def add(self, out) -> None:
        n = out.targets.double()
        sums = torch.stack([out.losses.double() * n, out.accuracies.double() * n, n])
        balance = torch.stack([out.balance_loss.double(), torch.ones_like(n[0])])
        self.sums = (sums, balance) if self.sums is None else (self.sums[0] + sums, self.sums[1] + balance)

    def drain(self, accelerator) -> dict[str, float]:
        """Means over all ranks since the last call, and the number of the main head's targets."""
        if self.sums is None:
            return {}
        (nll, correct, n), (balance, batches) = (
            accelerator.reduce(x.float() if x.device.type == "mps" else x, "sum") for x in self.sums
        )
        self.sums = None
        losses, accuracies = (nll / n.clamp(min=1)).tolist(), (correct / n.clamp(min=1)).tolist()
        logs = {"loss_main": losses[0], "accuracy_main": accuracies[0], "targets": n[0].item()}
        for depth in range(1, len(losses)):
            logs |= {f"loss_mtp_{depth}": losses[depth], f"accuracy_mtp_{depth}": accuracies[depth]}
        return logs | {"loss_balance": (balance / batches).item()}


class _AttentionWatch:
    """The largest attention logit and the clipped heads since the last log line."""

    def __init__(self):
        self.largest = self.clipped = None

    def add(self, hooks) -> None:
        if hooks is None or "max_logits" not in hooks.last:
            return
        top = hooks.last["max_logits"].max()
        clipped = hooks.last.get("clipped_heads", torch.zeros_like(top))
        self.largest = top if self.largest is None else torch.maximum(self.largest, top)
        self.clipped = clipped if self.clipped is None else self.clipped + clipped

    def drain(self, hooks) -> dict[str, float]:
        logs = {}
        if self.largest is not None:
            logs = {"max_attention_logit": self.largest.item(), "clipped_heads": self.clipped.item()}
            self.largest = self.clipped = None
        if hooks is not None and "loads" in hooks.last:
            loads = hooks.last["loads"]
            imbalance = (loads.max(1).values / loads.mean(1)).tolist()
            logs |= {f"expert_imbalance_{layer}": value for layer, value in enumerate(imbalance)}
            logs["expert_imbalance"] = max(imbalance)
        return logs
