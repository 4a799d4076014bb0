"""The runs of a comparison: their folders, their turns, and what is known of them when they have ended."""

import dataclasses
import hashlib
import json
import math
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.utils.data import Subset

from moonwhale.checkpoint import clear_unfinished, newest_checkpoint, open_checkpoint, publish_model
from moonwhale.costs import model_size
from moonwhale.data.packing import TrainingData
from moonwhale.errors import NotFiniteError
from moonwhale.evaluate.text import score_text
from moonwhale.files import write_whole
from moonwhale.lab.config import Budget, Comparison
from moonwhale.lab.peak_memory import PeakMemory
from moonwhale.lab.results import read_log, read_result, require_finite
from moonwhale.lab.turn_trainer import ENDLESS, TurnTrainer
from moonwhale.lab.variants import Variant
from moonwhale.precision import choose
from moonwhale.train.config import TrainConfig, build_model_config
from moonwhale.train.memory import out_of_memory_as_advice
from moonwhale.train.outlook import tokens_after
from moonwhale.train.pretrain import build_model, contents, trainer_arguments
from moonwhale.yaml_files import write_yaml

RESULT = "result.json"


@dataclass(frozen=True)
class Rows:
    """The rows that all runs share.

    data: tokenizer and training rows.
    tuning, reported: the two halves of the held-out rows. The first chooses learning rates, the second is reported.
    """

    data: TrainingData
    tuning: Subset
    reported: Subset


class Run:
    """One variant with one seed, in a folder whose name ends in a checksum of all that decides its result.

    A run that was asked for before is therefore found again, under whatever name its variant had then.
    """

    def __init__(self, asked: Comparison, variant: Variant, seed: int, rows: Rows):
        self.variant, self.rows, self.turns = variant, rows, asked.options.turns
        config = asked.config(variant, seed)
        steps = asked.budget.unit != "seconds"
        self.budget = Budget("steps", config.steps) if steps else asked.budget
        settings = dataclasses.asdict(config) | {"out": None, "budget": str(self.budget), "turns": self.turns}
        key = hashlib.sha256((json.dumps(settings, sort_keys=True) + contents(rows.data)).encode()).hexdigest()[:12]
        runs = Path(asked.options.out) / "runs"
        slug = re.sub(r"[^\w.=,-]+", "-", variant.name)
        self.folder = next(runs.glob(f"*-{key}"), runs / f"{slug}-seed{config.seed}-{key}")
        self.config: TrainConfig = dataclasses.replace(config, out=str(self.folder))
        self.position = 0.0  # in the budget's unit
        self._peaks: list[int] = []  # peak memory in bytes of each turn in this process
        self.result: dict | None = None
        self._look()

    def _look(self) -> None:
        """Finds out how far the run is."""
        if (self.folder / RESULT).exists():
            self.result, self.position = read_result(self.folder / RESULT), self.budget.amount
            return
        clear_unfinished(self.folder)
        if checkpoint := newest_checkpoint(self.folder):
            with self._ended_if_not_finite():
                last = read_log(checkpoint)[-1]
                self.position = last["seconds"] if self.budget.unit == "seconds" else last["step"]

    @property
    def name(self) -> str:
        return f"{self.variant.name}, seed {self.config.seed}"

    @property
    def peak(self) -> int | None:
        """The peak memory of training in bytes. Of several turns, the first is left out: it may load libraries."""
        return max(self._peaks[1:] or self._peaks, default=None)

    @property
    def share(self) -> float:
        """How much of its budget the run has used."""
        return self.position / self.budget.amount

    def take_turn(self, on_step: Callable[[float], None], callbacks: list) -> None:
        """Trains the run until its next turn ends, and writes its result after the last turn. A run that diverges has
        ended.

        on_step: called after each step with the run's position in its budget.

        Raises:
            UserError: the device is out of memory, or the disk is full.
        """
        with self._ended_if_not_finite():
            if self.position < self.budget.amount:
                self._train(on_step, callbacks)
            if self.position >= self.budget.amount:
                self._end(self._measured())

    @contextmanager
    def _ended_if_not_finite(self) -> Iterator[None]:
        """Context in which a loss, an evaluation or a weight that is not finite ends the run as diverged."""
        try:
            yield
        except NotFiniteError as error:
            self._end({"diverged": str(error).partition(";")[0]})

    def _train(self, on_step: Callable[[float], None], callbacks: list) -> None:
        import transformers

        config, checkpoint = self.config, newest_checkpoint(self.folder)
        choice = choose(config.device, config.precision)
        choice.apply()
        if config.compile:
            torch.compiler.reset()  # otherwise the compiler gives up after some models
        self.folder.mkdir(parents=True, exist_ok=True)
        how = f"A run of {self.budget}; the schedule follows the share that is spent"
        write_yaml(self.folder / "run.yaml", dataclasses.asdict(config), how)
        with PeakMemory(choice.device) as memory, out_of_memory_as_advice(config, choice.device):
            trainer = self._trainer(choice, checkpoint, on_step, callbacks)
            trainer.remove_callback(transformers.PrinterCallback)
            trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        self.position = trainer.position
        if memory.bytes:
            self._peaks.append(memory.bytes)

    def _trainer(self, choice, checkpoint: Path | None, on_step, callbacks: list) -> TurnTrainer:
        import transformers

        from moonwhale.data.tokenizer import byte_lengths

        config, data = self.config, self.rows.data
        arguments = trainer_arguments(config, choice, 1)
        arguments.eval_strategy = arguments.save_strategy = transformers.IntervalStrategy.NO  # the trainer decides
        if self.budget.unit == "seconds":
            arguments.max_steps = ENDLESS
        return TurnTrainer(
            model=build_model(config, build_model_config(config), data.tokenizer, choice),
            args=arguments,
            train_dataset=data.train,
            eval_dataset=self.rows.reported,
            processing_class=data.tokenizer,
            data_collator=transformers.default_data_collator,
            byte_lengths=torch.from_numpy(byte_lengths(data.tokenizer)),
            evaluate_all=True,
            callbacks=callbacks,
            budget=self.budget,
            turns=self.turns,
            seconds=read_log(checkpoint)[-1]["seconds"] if checkpoint else 0.0,
            schedule_steps=config.steps,
            on_step=on_step,
        )

    def _measured(self) -> dict:
        """Returns the figures of a run that has used its budget, from its last checkpoint."""
        checkpoint = newest_checkpoint(self.folder)
        history = read_log(checkpoint, ended=True)
        evaluations = [entry for entry in history if "eval_bits_per_byte" in entry]
        steps, seconds = history[-1]["step"], history[-1]["seconds"]
        tokens = self._tokens(steps)
        return {
            "bits_per_byte": evaluations[-1]["eval_bits_per_byte"],
            "tuning_bits_per_byte": require_finite(self._tuning_score(checkpoint, steps), steps),
            "steps": steps,
            "tokens": tokens,
            "seconds": seconds,
            "tokens_per_second": tokens / seconds,
            "peak_memory_bytes": self.peak,
            "curve": [
                {
                    "seconds": entry["seconds"],
                    "tokens": self._tokens(entry["step"]),
                    "bits_per_byte": entry["eval_bits_per_byte"],
                }
                for entry in evaluations
            ],
        }

    def _tokens(self, steps: int) -> int:
        return tokens_after(steps, self.config, len(self.rows.data.train))

    def _tuning_score(self, checkpoint: Path, step: int) -> float:
        choice = choose(self.config.device, self.config.precision)
        try:
            model, tokenizer = open_checkpoint(checkpoint)
        except NotFiniteError as error:
            raise NotFiniteError(f"step {step}: a weight is not finite") from error
        autocast = choice.dtype if choice.autocast else None
        model, rows = model.to(choice.device), self.rows.tuning
        score = score_text(model, rows, tokenizer, self.config.batch_size, autocast, progress=False)
        return score["bits_per_byte"]

    def _end(self, figures: dict) -> None:
        """Writes the result, and keeps the model without the optimizer's state."""
        if checkpoint := newest_checkpoint(self.folder):
            publish_model(checkpoint, self.folder)
        size = model_size(build_model_config(self.config))
        of_model = {
            "parameters": size.parameters,
            "active_parameters": size.active_parameters,
            "cache_bytes_per_token": size.kv_cache_bytes_per_token,
        }
        head = {"variant": self.variant.name, "seed": self.config.seed, "folder": str(self.folder)}
        result = head | figures | of_model | {"options": dataclasses.asdict(self.config)}
        write_whole(self.folder / RESULT, json.dumps(result, indent=1) + "\n")
        for folder in self.folder.glob("checkpoint-*"):
            shutil.rmtree(folder)
        self.result, self.position = result, self.budget.amount

    @property
    def tuning_score(self) -> float:
        """Bits per byte on the tuning rows, for choosing a learning rate; infinite if the run diverged."""
        return self.result.get("tuning_bits_per_byte", math.inf)
