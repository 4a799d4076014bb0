"""`MTPTrainer`: transformers' Trainer with the whole model's loss, accounted for each depth of prediction."""

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
from moonwhale.train.muonclip_trainer import MuonClipArguments, MuonClipTraining


@dataclass
class MTPTrainingArguments(MuonClipArguments, TrainingArguments):
    """TrainingArguments and what MuonClip and MTP add to them."""


class MTPTraining(MuonClipTraining):
    """To be inherited before a Trainer of rows {"input_ids", "position_ids", "labels"}: the loss is the model's own.

    byte_lengths: (V,) bytes each token stands for, for evaluation in bits per byte.
    """

    passes_targets = True  # to the model's forward, which is a `MoonwhaleForCausalLM`'s

    def __init__(self, *args, byte_lengths: Tensor | None = None, **kwargs):
        super().__init__(*args, **kwargs)
        self.model_accepts_loss_kwargs = True  # the model divides by num_items_in_batch itself
        self.byte_lengths = byte_lengths
        self._parts = _LossParts()

    # One optimizer step

    def _get_num_items_in_batch(self, batch_samples: list, device: torch.device) -> Tensor | None:
        """Count the targets of the whole step for each depth, (1 + D,): an MTP module has fewer than the main head.

        The micro-batches get what was computed for it, so that the model's forward does not compute it again.
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
        # Trainer's, past TRL's: theirs would take the next token's loss alone.
        loss, outputs = Trainer.compute_loss(self, model, inputs, True, num_items_in_batch)
        self._parts.add(outputs)
        if self._clock is not None:
            self._tokens += inputs["labels"].numel() * self.args.world_size
        return (loss, outputs) if return_outputs else loss

    # Logging

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:  # a window of training steps, not an evaluation
            logs |= self._parts.drain(self.accelerator) | self._watch.drain() | self._speed()
        super().log(logs, start_time)

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
                n_bytes += self.byte_lengths.to(targets.device)[targets[targets != IGNORE_INDEX]].sum()
        metrics = parts.drain(self.accelerator)
        n_bytes = self.accelerator.reduce(n_bytes, "sum").item()
        if n_bytes:
            metrics["bits_per_byte"] = metrics["loss_main"] * metrics["targets"] / math.log(2) / n_bytes
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in metrics.items()}
        return EvalLoopOutput(None, None, metrics, len(dataloader.dataset) * self.args.world_size)

    def _evaluate_batch(self, inputs: dict[str, Tensor]):
        with self.accelerator.autocast():
            return self.model(**inputs, logits_to_keep=1)


class MTPTrainer(MTPTraining, Trainer):
    """Pretrains a `MoonwhaleForCausalLM` on packed rows, on one device or under DDP."""


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
