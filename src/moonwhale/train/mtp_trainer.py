"""`MTPTrainer`: transformers' Trainer on the model's own loss, which is logged for each prediction depth."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Subset
from transformers import Trainer, TrainingArguments
from transformers.trainer_utils import EvalLoopOutput

from moonwhale.model.documents import Documents
from moonwhale.model.loss import IGNORE_INDEX
from moonwhale.model.mtp import prediction_targets
from moonwhale.train.muonclip_trainer import MuonClipArgumentsMixin, MuonClipTrainerMixin


@dataclass
class MTPTrainingArguments(MuonClipArgumentsMixin, TrainingArguments):
    """transformers' TrainingArguments with those of MuonClip and MTP."""


class MTPTrainerMixin(MuonClipTrainerMixin):
    """Makes a Trainer class optimize the model's own loss, MTP and balance loss included, and log each of its parts.

    The Trainer comes after it among the bases. Its rows are {"input_ids", "position_ids", "labels"}.

    byte_lengths: (V,) bytes that each token stands for, to report evaluations in bits per byte.

    Example:

        MTPTrainer(model=model, args=MTPTrainingArguments("runs/demo", max_steps=100), train_dataset=rows).train()
    """

    passes_targets = True  # whether the model's forward takes `documents` and `targets`

    def __init__(self, *args, byte_lengths: Tensor | None = None, **kwargs):
        super().__init__(*args, **kwargs)
        self.model_accepts_loss_kwargs = True  # the model divides by num_items_in_batch itself
        self.byte_lengths = byte_lengths
        self._loss_sums = _LossSums()

    # One optimizer step

    def _get_num_items_in_batch(self, batch_samples: list, device: torch.device) -> Tensor | None:
        """Counts the targets of the whole step for each depth, (1 + D,): an MTP module has fewer than the main head.

        The documents and targets that this takes are added to the micro-batches, for the model's forward to use.
        """
        n_modules = self.model.config.num_nextn_predict_layers
        total = torch.zeros(1 + n_modules, dtype=torch.long, device=device)
        for batch in batch_samples:
            labels, *masks = (
                None if batch.get(name) is None else batch[name].to(device)
                for name in ("labels", "attention_mask", "position_ids")
            )
            documents = Documents.from_inputs(*labels.shape, device, *masks)
            targets = prediction_targets(labels, documents, n_modules)
            total += (targets != IGNORE_INDEX).sum((1, 2))
            if self.passes_targets:
                batch.update(documents=documents, targets=targets)
        return self.accelerator.reduce(total, "sum")

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        # Trainer's method, not TRL's, which would use the loss of the next token alone.
        loss, outputs = Trainer.compute_loss(self, model, inputs, True, num_items_in_batch)
        self._loss_sums.add(outputs)
        if self._step_start is not None:
            self._window_tokens += inputs["labels"].numel() * self.args.world_size
        return (loss, outputs) if return_outputs else loss

    # Logging

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:  # a window of training steps, not an evaluation
            logs |= self._loss_sums.pop_logs(self.accelerator)
            logs |= self._hook_statistics.pop_logs() | self._speed_logs()
        super().log(logs, start_time)

    # Evaluation

    def get_eval_dataloader(self, eval_dataset=None) -> DataLoader:
        """This rank's share of the rows, each row on one rank. Training's random state is not used."""
        rows = self.eval_dataset if eval_dataset is None else eval_dataset
        share = Subset(rows, range(self.args.process_index, len(rows), self.args.world_size))
        return DataLoader(share, self.args.eval_batch_size, collate_fn=self.data_collator, generator=torch.Generator())

    @torch.no_grad()
    def evaluation_loop(
        self, dataloader, description, prediction_loss_only=None, ignore_keys=None, metric_key_prefix="eval"
    ) -> EvalLoopOutput:
        """Computes the loss in nats per token and the accuracy of the main head and of each MTP module, and bits per
        byte of the main head.
        """
        sums, n_bytes = _LossSums(), torch.zeros((), dtype=torch.long, device=self.args.device)
        self.model.eval()
        for inputs in map(self._prepare_inputs, dataloader):
            sums.add(self._evaluate_batch(inputs))
            if self.byte_lengths is not None:
                targets = inputs["labels"][:, 1:]
                n_bytes += self.byte_lengths.to(targets.device)[targets[targets != IGNORE_INDEX]].sum()
        metrics = sums.pop_logs(self.accelerator)
        n_bytes = self.accelerator.reduce(n_bytes, "sum").item()
        if n_bytes:
            metrics["bits_per_byte"] = metrics["loss_main"] * metrics["targets"] / math.log(2) / n_bytes
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in metrics.items()}
        return EvalLoopOutput(None, None, metrics, len(dataloader.dataset) * self.args.world_size)

    def _evaluate_batch(self, inputs: dict[str, Tensor]):
        with self.accelerator.autocast():
            return self.model(**inputs, logits_to_keep=1)


class MTPTrainer(MTPTrainerMixin, Trainer):
    """Pretrains a `MoonwhaleForCausalLM` on packed rows, on one device or under DDP."""


class _LossSums:
    """Sums over micro-batches of the model's losses and accuracies, kept on the device until they are logged.

    per_depth: (3, 1 + D) sums of cross-entropy, right predictions and targets. balance: (2,) sum of the balance losses,
    and number of micro-batches.
    """

    def __init__(self):
        self.per_depth: Tensor | None = None
        self.balance: Tensor | None = None

    @torch.no_grad()
    def add(self, out) -> None:
        """Adds the outputs of one micro-batch, a `MoonwhaleOutput`."""
        n = out.targets.float()
        per_depth = torch.stack([out.losses * n, out.accuracies * n, n])
        balance = torch.stack([out.balance_loss, torch.ones_like(out.balance_loss)])
        if self.per_depth is None:
            self.per_depth, self.balance = per_depth, balance
        else:
            self.per_depth, self.balance = self.per_depth + per_depth, self.balance + balance

    def pop_logs(self, accelerator) -> dict[str, float]:
        """Returns the means over all ranks and the number of the main head's targets, and starts anew."""
        nll, correct, n = accelerator.reduce(self.per_depth, "sum")
        balance, n_batches = accelerator.reduce(self.balance, "sum")
        self.per_depth = self.balance = None
        losses, accuracies = (nll / n.clamp(min=1)).tolist(), (correct / n.clamp(min=1)).tolist()
        logs = {"targets": n[0].item(), "loss_balance": (balance / n_batches).item()}
        for depth, (loss, accuracy) in enumerate(zip(losses, accuracies, strict=True)):
            name = f"mtp_{depth}" if depth else "main"
            logs |= {f"loss_{name}": loss, f"accuracy_{name}": accuracy}
        return logs
