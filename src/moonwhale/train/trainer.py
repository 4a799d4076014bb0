"""`MTPTrainer`: transformers' Trainer with MuonClip, per-depth loss accounting, honest checkpoints and an early stop on
NaN.
"""

import math
import time
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Subset
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_utils import EvalLoopOutput

from moonwhale.counts import flops_per_token
from moonwhale.errors import UserError
from moonwhale.model.layout import Layout
from moonwhale.model.loss import IGNORE
from moonwhale.model.mtp import shifted_labels
from moonwhale.optim.muonclip import MuonClip, StepHooks, attach_hooks, param_groups
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

    def __post_init__(self):
        super().__post_init__()
        self._n_gpu = min(self.n_gpu, 1)  # several GPUs are DDP's; Trainer would split batches over threads


class MTPTrainer(Trainer):
    """Pretrains a `MoonwhaleForCausalLM` on rows {"input_ids", "position_ids", "labels"}, on one device or under DDP.

    byte_lengths: (V,) bytes each token stands for, for evaluation in bits per byte.

    Raises:
        UserError: when the loss or the gradient is no longer finite, naming the step and the last good checkpoint;
            when a checkpoint finds no space.
    """

    def __init__(self, *args, byte_lengths: Tensor | None = None, **kwargs):
        super().__init__(*args, **kwargs)
        self.model_accepts_loss_kwargs = True  # the model divides by num_items_in_batch itself
        self.byte_lengths = byte_lengths
        self._hooks: StepHooks | None = None
        self._parts, self._watch = _LossParts(), _Watch(self.model.config.first_k_dense_replace)
        self._clock: float | None = None  # when the current step began; None in the first one, which warms up
        self._tokens = self._seconds = 0.0
        self._writing_to: str | None = None
        self.add_callback(_StepCallback(self))

    def create_optimizer(self, model=None) -> torch.optim.Optimizer:
        """MuonClip over all parameters, with QK-clip and the router-bias update as its step hooks."""
        if self.optimizer is None:
            args = self.args
            self.optimizer = self._optimizer_of(param_groups(self.model, args.learning_rate, args.weight_decay))
            self._hooks = attach_hooks(self.optimizer, self.model, args.qk_clip_tau or None)
        return self.optimizer

    def _optimizer_of(self, groups: list[dict]) -> MuonClip:
        args = self.args
        betas = (args.adam_beta1, args.adam_beta2)
        return MuonClip(groups, momentum=args.muon_momentum, betas=betas, eps=args.adam_epsilon)

    def _seen_by_hooks(self) -> dict[str, Tensor]:
        return self._hooks.last

    # One optimizer step

    def _get_num_items_in_batch(self, batch_samples: list, device: torch.device) -> Tensor | None:
        """Targets of the whole step for each depth, (1 + D,): an MTP module has fewer than the main head."""
        depths = range(1 + self.model.config.num_nextn_predict_layers)
        total = torch.zeros(len(depths), dtype=torch.long, device=device)
        for batch in batch_samples:
            labels = batch["labels"]
            layout = Layout.of(*labels.shape, labels.device, batch.get("attention_mask"), batch.get("position_ids"))
            total += torch.stack([(shifted_labels(labels, layout, d) != IGNORE).sum() for d in depths]).to(device)
        return self.accelerator.reduce(total, "sum")

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        loss, outputs = super().compute_loss(model, inputs, return_outputs=True, num_items_in_batch=num_items_in_batch)
        self._parts.add(outputs)
        if self._clock is not None:
            self._tokens += inputs["labels"].numel() * self.args.world_size
        return (loss, outputs) if return_outputs else loss

    def _get_grad_norm(self, model, grad_norm=None):
        """The norm; the last moment before the weights change, hence where a NaN is caught."""
        norm = super()._get_grad_norm(model, grad_norm)
        for what, value in (("loss", self._tr_loss), ("gradient norm", norm)):
            if not math.isfinite(value):
                good = checkpoints.newest(self.args.output_dir)
                raise UserError(
                    f"step {self.state.global_step + 1}: the {what} is {float(value)}; "
                    + (f"the last good checkpoint is {good}" if good else "no checkpoint was written yet")
                    + ": train into another --out with a lower --lr or --grad-clip"
                )
        return norm

    # Logging

    def _maybe_log_save_evaluate(self, *args, **kwargs) -> None:
        if self._clock is not None:
            self._seconds += time.perf_counter() - self._clock
        # A checkpoint ends a log line's window, so that a resumed run has the same windows.
        self.control.should_log |= self.control.should_save
        super()._maybe_log_save_evaluate(*args, **kwargs)
        self._clock = time.perf_counter()  # evaluations and saves do not count

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:  # a window of training steps, not an evaluation
            logs |= self._parts.drain(self.accelerator) | self._watch.drain() | self._speed()
        super().log(logs, start_time)

    def _speed(self) -> dict[str, float]:
        """Tokens per second since the last call and their share of the devices' peak."""
        if not self._seconds:
            return {}
        speed = self._tokens / self._seconds
        self._tokens = self._seconds = 0.0
        dtype = torch.bfloat16 if self.args.bf16 else torch.float32
        peak = peak_flops(self.args.device, dtype) * self.args.world_size
        context = self.train_dataset[0]["labels"].numel()
        return {"tokens_per_second": speed, "mfu": speed * flops_per_token(self.model.config, context) / peak}

    # Evaluation

    def get_eval_dataloader(self, eval_dataset=None) -> DataLoader:
        """This rank's share of the rows, none of them twice; training's random state stays as it is."""
        rows = self.eval_dataset if eval_dataset is None else eval_dataset
        share = Subset(rows, range(self.args.process_index, len(rows), self.args.world_size))
        return DataLoader(share, self.args.eval_batch_size, collate_fn=self.data_collator, generator=torch.Generator())

    @torch.no_grad()
    def evaluation_loop(
        self, dataloader, description, prediction_loss_only=None, ignore_keys=None, metric_key_prefix="eval"
    ) -> EvalLoopOutput:
        """Mean cross-entropy of the main head in nats per token and bits per byte, and the MTP modules' losses and
        accuracies.
        """
        parts, n_bytes = _LossParts(), torch.zeros((), dtype=torch.long, device=self.args.device)
        self.model.eval()
        for inputs in map(self._prepare_inputs, dataloader):
            parts.add(self._evaluate_batch(inputs))
            if self.byte_lengths is not None:
                targets = inputs["labels"][:, 1:]
                n_bytes += self.byte_lengths.to(targets.device)[targets[targets != IGNORE]].sum()
        metrics = parts.drain(self.accelerator)
        n_bytes = self.accelerator.reduce(n_bytes, "sum").item()
        if n_bytes:
            metrics["bits_per_byte"] = metrics["loss_main"] * metrics["targets"] / math.log(2) / n_bytes
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in metrics.items()}
        return EvalLoopOutput(None, None, metrics, len(dataloader.dataset) * self.args.world_size)

    def _evaluate_batch(self, inputs: dict[str, Tensor]):
        with self.accelerator.autocast():
            return self.model(**inputs, logits_to_keep=1)

    # Checkpoints

    def _save_checkpoint(self, model, trial) -> None:
        """Writes the checkpoint where nobody looks for one, and gives it its name when it is complete."""
        out = self.args.output_dir
        if self.args.should_save:
            aside = checkpoints.unfinished(out)
        self.accelerator.wait_for_everyone()
        self._writing_to = f"{out}/.unfinished"
        try:
            super()._save_checkpoint(model, trial)
            self.accelerator.wait_for_everyone()
            if self.args.should_save:
                written = aside / f"checkpoint-{self.state.global_step}"
                (written / "training_args.bin").unlink()  # a pickle, which nothing reads
                checkpoints.publish(written, out, self.args.save_total_limit)
        except Exception as error:
            raise checkpoints.explain_disk(error, out) from error
        finally:
            self._writing_to = None
        self.accelerator.wait_for_everyone()

    def _get_output_dir(self, trial) -> str:
        return self._writing_to or super()._get_output_dir(trial)


class _StepCallback(TrainerCallback):
    """What happens around a step that the Trainer has no method for."""

    def __init__(self, trainer: MTPTrainer):
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


class _LossParts:
    """Sums of loss parts over micro-batches, kept on the device until they are read."""

    def __init__(self):
        self.sums: tuple[Tensor, Tensor] | None = None

    @torch.no_grad()
    def add(self, out) -> None:
        n = out.targets.float()
        sums = torch.stack([out.losses * n, out.accuracies * n, n])
        balance = torch.stack([out.balance_loss, torch.ones_like(out.balance_loss)])
        self.sums = (sums, balance) if self.sums is None else (self.sums[0] + sums, self.sums[1] + balance)

    def drain(self, accelerator) -> dict[str, float]:
        """Means over all ranks since the last call, and the number of the main head's targets."""
        (nll, correct, n), (balance, batches) = (accelerator.reduce(x, "sum") for x in self.sums)
        self.sums = None
        losses, accuracies = (nll / n.clamp(min=1)).tolist(), (correct / n.clamp(min=1)).tolist()
        logs = {"targets": n[0].item(), "loss_balance": (balance / batches).item()}
        for depth, (loss, accuracy) in enumerate(zip(losses, accuracies, strict=True)):
            name = f"mtp_{depth}" if depth else "main"
            logs |= {f"loss_{name}": loss, f"accuracy_{name}": accuracy}
        return logs


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
