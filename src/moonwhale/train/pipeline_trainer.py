"""`PipelineTrainer`: an `MTPTrainer` whose one device is a pipeline of ranks, or several copies of one.

The ordinary trainer's loop runs on every rank, over the same rows in the same order, and sees one process. What differs
is how a step's gradients come about, and that a rank has some of the model: whatever leaves the rank (logs, norms,
checkpoints) is put together first. So a checkpoint is the same folder as on one device.
"""

import shutil
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.nn.utils import clip_grads_with_norm_, get_total_norm
from transformers.trainer import SCHEDULER_NAME

from moonwhale.checkpoint import explain_full_disk
from moonwhale.errors import UserError
from moonwhale.model.loss import IGNORE_INDEX
from moonwhale.model.modeling_moonwhale import MoonwhaleForCausalLM, MoonwhaleOutput
from moonwhale.optim.muonclip import param_groups
from moonwhale.optim.step_hooks import attach_hooks
from moonwhale.parallel.expert_parallel import Exchange, expert_shards, own_experts, share_
from moonwhale.parallel.fsdp import gathered, part_of
from moonwhale.parallel.options import SCHEDULES
from moonwhale.parallel.pipeline import Pipeline
from moonwhale.parallel.process_groups import Ranks, run_on_all
from moonwhale.parallel.schedules import own_parts
from moonwhale.parallel.sharded_checkpoint import (
    OPTIMIZER,
    SETTINGS,
    has_sharded_optimizer,
    load_state,
    save_optimizer,
    save_weights,
)
from moonwhale.parallel.stages import Stage, cut, keep_
from moonwhale.train.mtp_trainer import MTPTrainer

EMBEDDING, WEIGHTS = "model.embed_tokens.weight", "model.safetensors"


class PipelineTrainer(MTPTrainer):
    """Takes the whole model, of which it keeps what this rank needs.

    micro_batches: of a step, on each copy of the pipeline. fsdp: ranks that hold the same stages keep parts of them.
    """

    passes_targets = False  # each stage finds the documents of its own micro-batch

    def __init__(
        self, *args, model: MoonwhaleForCausalLM, ranks: Ranks, schedule: str, micro_batches: int, fsdp=False, **kwargs
    ):
        self.ranks, self.fsdp = ranks, fsdp
        names = {parameter: name for name, parameter in model.named_parameters()}
        targs = kwargs["args"]
        self._groups = [  # of the whole model, by name: an optimizer's groups are the same on every rank
            group | {"params": [names[p] for p in group["params"]]}
            for group in param_groups(model, targs.learning_rate, targs.weight_decay)
        ]
        buffers = {name: b for name, b in model.named_buffers() if name in model.state_dict()}
        self._sizes = {name: t.shape for name, t in (dict(model.named_parameters()) | buffers).items()}
        self._attentions = [name for name, module in model.named_modules() if hasattr(module, "clip_qk_")]
        self._moes = [name for name, module in model.named_modules() if hasattr(module, "update_bias_")]
        if targs.activation_checkpointing:
            model.gradient_checkpointing_enable()
        pp = dist.get_world_size(ranks.pipeline)
        context = kwargs["train_dataset"][0]["labels"].numel()
        parts = cut(model.config, SCHEDULES[schedule].stages * pp, context)
        own = own_parts(parts, schedule, pp, ranks.stage)
        keep_(model, own)
        self.exchange = exchange = Exchange(ranks.sharing, ranks.same_experts) if ranks.sharing else None
        if exchange:
            share_(model, exchange)
        super().__init__(*args, model=model, **kwargs)
        shape = (targs.per_device_train_batch_size, context)
        stages = [Stage(model, part, torch.bfloat16 if targs.bf16 else None) for part in own]
        self.pipeline = Pipeline(
            stages, schedule, micro_batches, shape, targs.device, ranks.pipeline, ranks.same, exchange
        )
        self._held: list[dict] = []
        # What a norm over the whole model must not count twice
        self._copied = SCHEDULES[schedule].mirrored and ranks.stage >= pp // 2
        self._embedding_copied = not any(part.is_first for part in own)

    def is_world_process_zero(self) -> bool:
        return self.ranks.rank == 0

    def is_local_process_zero(self) -> bool:
        return self.is_world_process_zero()

    def create_optimizer(self, model=None) -> torch.optim.Optimizer:
        if self.optimizer is None:
            if self.fsdp:  # not before a checkpoint's weights are loaded
                self.pipeline.shard_()
            self.optimizer = self._make_optimizer(self._groups_of(self.model))
            self._hooks = attach_hooks(self.optimizer, self.model, self.args.qk_clip_tau or None, self.ranks.same)
        return self.optimizer

    @property
    def _replica_groups(self) -> dict[str, dist.ProcessGroup]:
        return {"group": self.ranks.same, "experts": self.ranks.same_experts}

    def _groups_of(self, model) -> list[dict]:
        own = dict(model.named_parameters())
        return [group | {"params": [own[n] for n in group["params"] if n in own]} for group in self._groups]

    def train(self, *args, **kwargs):
        """The Trainer's. A UserError in one line where another rank was lost."""
        try:
            return super().train(*args, **kwargs)
        except RuntimeError as error:
            if why := self.ranks.lost(error, self.state.global_step + 1):
                raise UserError(why) from error
            raise

    # One optimizer step

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        samples, targets = super().get_batch_samples(epoch_iterator, num_batches, device)
        self._expected = len(samples)
        return samples, targets

    def training_step(self, model, inputs, num_items_in_batch=None) -> Tensor:
        """Holds a micro-batch; at the step's last, runs the pipeline over all of them. Returns the loss so far."""
        model.train()
        self._held.append(self._prepare_inputs(inputs))
        if len(self._held) < self._expected:
            return torch.zeros((), device=self.args.device)
        held, self._held = self._held, []
        if self._step_start is not None:
            self._window_tokens += sum(inputs["labels"].numel() for inputs in held)
        for stage in self.pipeline.stages:
            stage.targets = num_items_in_batch
        mine, real = self._share_of(held)
        self.pipeline.step(mine)
        taken = [(i, out) for i, out in self.pipeline.take_outputs() if i < real]
        outputs = self._everyones(taken, len(held))
        for out in outputs:
            self._loss_sums.add(out)
        return torch.stack([out.loss for out in outputs]).sum()

    def _share_of(self, held: list[dict]) -> tuple[dict[str, Tensor], int]:
        """This copy's micro-batches of a step as one batch, and how many of them are real: the last step of an epoch
        has fewer, and the schedule is filled up with padding, which adds nothing to any sum.
        """
        wanted, copies = self.pipeline.micro_batches, self.ranks.copies
        if len(held) < wanted * copies:
            masked = [inputs | {"attention_mask": torch.ones_like(inputs["labels"])} for inputs in held]
            empty = {name: torch.zeros_like(value) for name, value in masked[0].items()}
            empty["labels"] = torch.full_like(empty["labels"], IGNORE_INDEX)
            held = masked + [empty] * (wanted * copies - len(held))
            real = len(masked[self.ranks.copy :: copies])
        else:
            real = wanted
        mine = held[self.ranks.copy :: copies]
        return {name: torch.cat([inputs[name] for inputs in mine]) for name in mine[0]}, real

    def _everyones(self, taken: list[tuple[int, MoonwhaleOutput]], count: int) -> list[MoonwhaleOutput]:
        """The parts of the loss of all `count` micro-batches on every rank, from those that last stages computed:
        number i of copy c of C is c + C · i of all.
        """
        depths = 1 + self.model.config.num_nextn_predict_layers
        table = torch.zeros(count, 2 + 3 * depths, device=self.args.device)
        for i, out in taken:
            row = torch.cat([out.loss[None], out.balance_loss[None], out.losses, out.accuracies, out.targets.float()])
            table[self.ranks.copy + i * self.ranks.copies] = row
        dist.all_reduce(table)
        loss, balance, *parts = table.T
        losses, accuracies, targets = torch.stack(parts).T.split(depths, dim=1)
        return [
            MoonwhaleOutput(loss=l, balance_loss=b, losses=ls, accuracies=a, targets=t)
            for l, b, ls, a, t in zip(loss, balance, losses, accuracies, targets, strict=True)
        ]

    def _clip_grad_norm(self, model) -> Tensor:
        norm = self._norm(model)
        clip_grads_with_norm_(model.parameters(), self.args.max_grad_norm, norm)
        return norm

    def _get_grad_norm(self, model, grad_norm=None):
        return super()._get_grad_norm(model, self._norm(model) if grad_norm is None else grad_norm)

    def _norm(self, model) -> Tensor:
        """The gradient's norm over the whole model, each parameter once."""
        experts = own_experts(model)
        grads = {
            name: p.grad
            for name, p in model.named_parameters()
            if p.grad is not None and not (self._embedding_copied and name == EMBEDDING)
        }
        square = gathered(get_total_norm([grad for name, grad in grads.items() if name not in experts])).square()
        if self.ranks.sharing:
            of_experts = get_total_norm([grad for name, grad in grads.items() if name in experts]).square()
            of_experts = of_experts.to(square.device)  # a stage may have none
            dist.all_reduce(of_experts, group=self.ranks.sharing)
            square += of_experts
        square *= not self._copied
        dist.all_reduce(square, group=self.ranks.pipeline)
        return square.sqrt()

    def _last_hook_values(self) -> dict[str, Tensor]:
        """What all ranks' hooks saw, in the order of the whole model."""
        config, last, device = self.model.config, self._hooks.last, self.args.device
        here = [name for name, _ in self.model.named_modules()]
        logits = torch.full((len(self._attentions), config.num_attention_heads), -torch.inf, device=device)
        loads = torch.zeros(len(self._moes), config.n_routed_experts, device=device)
        for table, names, key in ((logits, self._attentions, "max_logits"), (loads, self._moes, "loads")):
            rows = [i for i, name in enumerate(names) if name in here]
            if rows:
                table[rows] = last[key]
            dist.all_reduce(table, dist.ReduceOp.MAX, group=self.ranks.pipeline)
        clipped = torch.as_tensor(last.get("clipped_heads", 0), dtype=torch.float32, device=device) * (not self._copied)
        dist.all_reduce(clipped, group=self.ranks.pipeline)
        seen = {"max_logits": logits, "clipped_heads": clipped}
        return seen | ({"loads": loads} if self._moes else {})

    def _speed_logs(self) -> dict[str, float]:
        speed = super()._speed_logs()
        return speed | {"mfu": speed["mfu"] / dist.get_world_size()} if speed else {}

    # Evaluation

    def _evaluate_batch(self, inputs: dict[str, Tensor]) -> MoonwhaleOutput:
        """Every copy evaluates all rows; the first one's count."""
        self.pipeline.evaluate(inputs)
        taken = self.pipeline.take_outputs()
        return self._everyones([(0, out) for _, out in taken] if self.ranks.copy == 0 else [], 1)[0]

    # Checkpoints

    def _save_checkpoint(self, model, trial) -> None:
        """Every rank writes its shards of the weights and the optimizer state. Then rank 0 adds all other files and
        publishes the folder.
        """
        control, leader = self.ranks.control, self.ranks.rank == 0
        try:
            run_on_all(self._empty_shards_folder if leader else None, control)
            save_weights(self._shards_folder / WEIGHTS, self._sizes, self._own_weights(), control)
            save_optimizer(self._shards_folder, self.optimizer, self._own_states(), control)
            run_on_all(partial(super()._save_checkpoint, model, trial) if leader else None, control)
        except Exception as error:
            if leader:
                shutil.rmtree(self._shards_folder, ignore_errors=True)
            explained = explain_full_disk(error, self.args.output_dir)
            raise explained from (None if explained is error else error)

    @property
    def _shards_folder(self) -> Path:
        """Where all ranks write, before rank 0 begins the checkpoint's folder."""
        return Path(self.args.output_dir, ".shards")

    def _empty_shards_folder(self) -> None:
        shutil.rmtree(self._shards_folder, ignore_errors=True)  # what a killed run left
        self._shards_folder.mkdir(parents=True)

    def _own_weights(self) -> dict[str, Tensor]:
        """The weights that this rank writes: each is written once, by the first replica that holds it."""
        shards = self._as_shards(self.model.state_dict())
        if self.fsdp:
            return shards
        if self.ranks.copy >= self.ranks.ep:
            return {}
        return {n: shard for n, shard in shards.items() if self.ranks.copy == 0 or isinstance(shard, DTensor)}

    def _own_states(self) -> dict[str, Tensor]:
        """This rank's optimizer state by NAME.KEY."""
        states = {
            f"{name}.{key}": value
            for name, parameter in self.model.named_parameters()
            for key, value in self.optimizer.state.get(parameter, {}).items()
        }
        return self._as_shards(states)

    def _as_shards(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """The same tensors, those of shared experts as DTensors over the ranks that share them."""
        return tensors if self.exchange is None else tensors | expert_shards(self.model, tensors, self.exchange)

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        super()._save(output_dir, state_dict={})  # the configuration and the tokenizer; there are no weights to add
        (self._shards_folder / WEIGHTS).rename(Path(output_dir, WEIGHTS))

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        for name in (OPTIMIZER, SETTINGS):
            (self._shards_folder / name).rename(Path(output_dir, name))
        self._shards_folder.rmdir()
        torch.save(self.lr_scheduler.state_dict(), Path(output_dir, SCHEDULER_NAME))

    def _optimizer_shards(self) -> dict[str, Tensor]:
        return self._as_shards(dict(self.model.named_parameters()))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None or has_sharded_optimizer(Path(checkpoint)):
            super()._load_optimizer_and_scheduler(checkpoint)
        else:
            self._load_whole_optimizer(Path(checkpoint))
            self._load_scheduler(checkpoint)

    def _load_whole_optimizer(self, checkpoint: Path) -> None:
        """Takes this rank's part of the state that one process saved."""
        saved = torch.load(checkpoint / SETTINGS, map_location="cpu", mmap=True, weights_only=True)
        order = [name for group in self._groups for name in group["params"]]
        states = {name: saved["state"][i] for i, name in enumerate(order) if i in saved["state"]}
        for name, own in own_experts(self.model).items():
            states[name] = {key: value[own] for key, value in states.get(name, {}).items()}
        names = {parameter: name for name, parameter in self.model.named_parameters()}
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        state = {
            i: {key: part_of(value, p).clone() for key, value in states[names[p]].items()}
            for i, p in enumerate(parameters)
            if names[p] in states
        }
        load_state(self.optimizer, state, saved["param_groups"])
