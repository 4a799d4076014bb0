"""`MTPTrainer`: transformers' Trainer on the model's own loss, which is logged for each prediction depth."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, Subset
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

    The Trainer comes after it among the bases. Its batches have "input_ids" and "labels", and may have "position_ids"
    and "attention_mask". Data sets and collators are of any kind that Trainer takes.

    byte_lengths: (V,) bytes that each token stands for, to report evaluations in bits per byte.
    evaluate_all: evaluate the last, incomplete batch even if `dataloader_drop_last` leaves it out of training.

    Raises:
        ValueError: `compute_loss_func` is given.

    Example:

        MTPTrainer(model=model, args=MTPTrainingArguments("runs/demo", max_steps=100), train_dataset=rows).train()
    """

    passes_targets = True  # whether the model's forward takes `documents` and `targets`

    def __init__(self, *args, byte_lengths: Tensor | None = None, evaluate_all: bool = False, **kwargs):
        super().__init__(*args, **kwargs)
        if kwargs.get("compute_loss_func") is not None:
            raise ValueError(
                "compute_loss_func is not supported: the model's own loss has MTP and balancing; override compute_loss"
            )
        self.model_accepts_loss_kwargs = True  # the model divides by num_items_in_batch itself
        self.byte_lengths = byte_lengths
        self._evaluate_all = evaluate_all
        self._loss_sums = self._no_losses()
        self._n_bytes = self._no_bytes()
        self._step_targets: Tensor | None = None  # (1 + D,) targets of the whole step
        self._wants_logits = False
        self._eval_loaders: dict[int, DataLoader] = {}  # with persistent workers, by the id of their rows

    def _no_losses(self) -> "_LossSums":
        return _LossSums(1 + self.model.config.num_nextn_predict_layers, self.args.device)

    def _no_bytes(self) -> Tensor:
        return torch.zeros((), dtype=torch.long, device=self.args.device)

    # One optimizer step

    def _get_num_items_in_batch(self, batch_samples: list, device: torch.device) -> Tensor | None:
        """Counts the main head's targets in the whole step, and keeps all depths' counts: MTP modules have fewer.

        The documents and targets that this takes are added to the micro-batches, for the model's forward to use.
        """
        if any(batch.get("labels") is None for batch in batch_samples):
            return None
        n_modules = self.model.config.num_nextn_predict_layers
        total = torch.zeros(1 + n_modules, dtype=torch.long, device=device)
        for batch in batch_samples:
            documents, targets = _documents_and_targets(batch, device, n_modules)
            total += (targets != IGNORE_INDEX).sum((1, 2))
            if self.passes_targets:
                batch.update(documents=documents, targets=targets)
        average = self.args.average_tokens_across_devices
        self._step_targets = self.accelerator.reduce(total, "sum") if average else total
        return self._step_targets[0]

    def training_step(self, model, inputs, num_items_in_batch=None) -> Tensor:
        batch, self._context = inputs[self.model.main_input_name].shape[:2]
        self.speed.count(batch * self._context * self.args.world_size)
        return super().training_step(model, inputs, num_items_in_batch)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        if not (model.training or self._wants_logits):
            inputs = {**inputs, "logits_to_keep": 1}
        n_targets = None if num_items_in_batch is None else self._step_targets
        # Trainer's method, not TRL's, which would use the loss of the next token alone.
        loss, outputs = Trainer.compute_loss(self, model, inputs, True, n_targets)
        self._loss_sums.add(outputs)
        return (loss, outputs) if return_outputs else loss

    # Logging

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:  # a window of training steps, not an evaluation
            logs |= self._loss_sums.pop_logs(self.accelerator)
            logs |= self._hook_statistics.pop_logs() | self._speed_logs()
        super().log(logs, start_time)

    # Evaluation

    def get_eval_dataloader(self, eval_dataset=None) -> DataLoader:
        """This rank's share of the rows, each row on one rank. Training's random state is not used.

        Where predictions are wanted, or the rows are a stream, it is Trainer's, which repeats rows to fill a batch.
        """
        rows = self.eval_dataset if eval_dataset is None else eval_dataset
        rows = self.eval_dataset[rows] if isinstance(rows, str) else rows
        args = self.args
        casts_weights = args.bf16_full_eval or args.fp16_full_eval
        if rows is None or self.compute_metrics is not None or casts_weights or isinstance(rows, IterableDataset):
            return super().get_eval_dataloader(eval_dataset)
        if id(rows) in self._eval_loaders:
            return self._eval_loaders[id(rows)]
        collate = self._get_collator_with_removed_columns(self.data_collator, "Evaluation")
        share = _RowsOfRank(rows, range(args.process_index, len(rows), args.world_size))
        loader = DataLoader(
            share,
            args.eval_batch_size,
            collate_fn=collate,
            drop_last=args.dataloader_drop_last and not self._evaluate_all,
            persistent_workers=args.dataloader_persistent_workers,
            num_workers=args.dataloader_num_workers,
            pin_memory=args.dataloader_pin_memory and args.device.type == "cuda",
            prefetch_factor=args.dataloader_prefetch_factor,
            multiprocessing_context=args.dataloader_multiprocessing_context,
            in_order=args.dataloader_in_order,
            generator=torch.Generator(),
        )
        if args.dataloader_persistent_workers:
            self._eval_loaders[id(rows)] = loader
        return loader

    @torch.no_grad()
    def evaluation_loop(
        self, dataloader, description, prediction_loss_only=None, ignore_keys=None, metric_key_prefix="eval"
    ) -> EvalLoopOutput:
        """Computes the loss to be optimized, and the metrics of `compute_metrics`, as Trainer does.

        Adds the loss in nats per token and the accuracy of the main head and of each MTP module, and bits per byte of
        the main head. Modules that are not trained yet (λ = 0) are left out.
        """
        of_training, self._loss_sums = self._loss_sums, self._no_losses()
        self._n_bytes = self._no_bytes()
        try:
            if isinstance(getattr(dataloader, "dataset", None), _RowsOfRank):
                output = self._evaluate_share(dataloader, metric_key_prefix)
            else:
                output = super().evaluation_loop(
                    dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix
                )
            metrics = self._loss_sums.pop_logs(self.accelerator)
            if metrics and self._language_model.mtp_loss_weight == 0:
                metrics = {name: value for name, value in metrics.items() if "_mtp_" not in name}
        finally:
            self._loss_sums = of_training
        n_bytes = self.accelerator.reduce(self._n_bytes, "sum").item()
        if n_bytes and metrics:
            metrics["bits_per_byte"] = metrics["loss_main"] * metrics["targets"] / math.log(2) / n_bytes
        output.metrics.update({f"{metric_key_prefix}_{name}": value for name, value in metrics.items()})
        return output

    def _evaluate_share(self, dataloader: DataLoader, prefix: str) -> EvalLoopOutput:
        """Averages the loss over all ranks' rows. The ranks may have different numbers of batches, or none."""
        self.model.eval()
        self.callback_handler.eval_dataloader = dataloader
        loss_and_rows = torch.zeros(2, device=self.args.device)
        for inputs in map(self._prepare_inputs, dataloader):
            n_rows = len(inputs[self.model.main_input_name])
            loss_and_rows += torch.stack([self._evaluate_batch(inputs).float(), loss_and_rows.new_ones(())]) * n_rows
            self._count_bytes(inputs)
            self.control = self.callback_handler.on_prediction_step(self.args, self.state, self.control)
        loss, n_rows = self.accelerator.reduce(loss_and_rows, "sum").tolist()
        return EvalLoopOutput(None, None, {f"{prefix}_loss": loss / n_rows} if n_rows else {}, int(n_rows))

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        """Trainer's method. The predictions are the main head's logits."""
        self._count_bytes(inputs)
        self._wants_logits = not prediction_loss_only
        try:
            return super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)
        finally:
            self._wants_logits = False

    def _count_bytes(self, inputs: dict[str, Tensor]) -> None:
        if self.byte_lengths is not None and inputs.get("labels") is not None:
            _, targets = _documents_and_targets(inputs, self._n_bytes.device, 0)
            self._n_bytes += self.byte_lengths.to(targets.device)[targets[targets != IGNORE_INDEX]].sum()

    def _evaluate_batch(self, inputs: dict[str, Tensor]) -> Tensor:
        """Returns the loss of a batch, and adds its parts to the sums."""
        with self.accelerator.autocast():
            return self.compute_loss(self.model, inputs)


def _documents_and_targets(batch: dict[str, Tensor], device: torch.device, n_modules: int) -> tuple[Documents, Tensor]:
    """Returns the documents of a batch, and the targets (1 + n_modules, B, T) of its labels, on a device."""
    labels, *masks = (
        None if batch.get(name) is None else batch[name].to(device)
        for name in ("labels", "attention_mask", "position_ids")
    )
    documents = Documents.from_inputs(*labels.shape, device, *masks)
    return documents, prediction_targets(labels, documents, n_modules)


class _RowsOfRank(Subset):
    """The rows that one rank evaluates."""


class MTPTrainer(MTPTrainerMixin, Trainer):
    """Pretrains a `MoonwhaleForCausalLM` on packed rows, on one device or under DDP."""


class _LossSums:
    """Sums over micro-batches of the model's losses and accuracies, kept on the device until they are logged.

    per_depth: (3, 1 + D) sums of cross-entropy, right predictions and targets. balance: (2,) sum of the balance losses,
    and number of micro-batches.
    """

    def __init__(self, depths: int, device: torch.device):
        self.per_depth = torch.zeros(3, depths, device=device)
        self.balance = torch.zeros(2, device=device)

    @torch.no_grad()
    def add(self, out) -> None:
        """Adds the outputs of one micro-batch, a `MoonwhaleOutput` with losses."""
        n = out.targets.float()
        self.per_depth[:, : len(n)] += torch.stack([out.losses * n, out.accuracies * n, n])  # MTP modules may rest
        self.balance = self.balance + torch.stack([out.balance_loss, torch.ones_like(out.balance_loss)])

    def pop_logs(self, accelerator) -> dict[str, float]:
        """Returns the means over all ranks and the number of the main head's targets, and starts anew.

        Returns nothing if no rank added outputs, as with a `compute_loss` of one's own.
        """
        nll, correct, n = accelerator.reduce(self.per_depth, "sum")
        balance, n_batches = accelerator.reduce(self.balance, "sum")
        self.per_depth, self.balance = torch.zeros_like(self.per_depth), torch.zeros_like(self.balance)
        if not n_batches:
            return {}
        losses, accuracies = (nll / n.clamp(min=1)).tolist(), (correct / n.clamp(min=1)).tolist()
        logs = {"targets": n[0].item(), "loss_balance": (balance / n_batches).item()}
        for depth, (loss, accuracy) in enumerate(zip(losses, accuracies, strict=True)):
            name = f"mtp_{depth}" if depth else "main"
            if n[depth] or not depth:
                logs |= {f"loss_{name}": loss, f"accuracy_{name}": accuracy}
        return logs
