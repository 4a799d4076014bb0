"""`PipelineTrainer`: an `MTPTrainer` whose "device" is one replica or several replicas of a pipeline of ranks.

The Trainer's loop runs on every rank, over the same rows in the same order, and takes the run for a single process. Two
things differ: how a step computes its gradients, and that a rank holds only some of the model. So losses, norms and
statistics are collected from all ranks before the Trainer sees them, and all ranks write each checkpoint together.
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
from moonwhale.model.modeling_moonwhale import MoonwhaleForCausalLM
from moonwhale.model.outputs import MoonwhaleOutput
from moonwhale.optim.muonclip import param_groups
from moonwhale.optim.step_hooks import attach_hooks
from moonwhale.parallel.expert_parallel import AllToAll, expert_shards, expert_slices, shard_experts_
from moonwhale.parallel.fsdp import full_tensor, shard_like
from moonwhale.parallel.pipeline import Pipeline
from moonwhale.parallel.process_groups import RankPlacement, run_on_all
from moonwhale.parallel.schedule_properties import SCHEDULES
from moonwhale.parallel.schedules import stages_of_rank
from moonwhale.parallel.sharded_checkpoint import (
    OPTIMIZER,
    SETTINGS,
    load_state,
    save_optimizer,
    save_weights,
)
from moonwhale.parallel.stages import Stage, partition, prune_
from moonwhale.train.mtp_trainer import MTPTrainer

EMBEDDING, WEIGHTS = "model.embed_tokens.weight", "model.safetensors"


class PipelineTrainer(MTPTrainer):
    """Trains a model of which each rank keeps only its stages.

    Args:
        model: the whole model, the same on every rank.
        micro_batches: of a step, on each replica of the pipeline.
        fsdp: shard each weight over the ranks that hold it.
    """

    passes_targets = False  # each stage finds the documents of its own micro-batch

    def __init__(
        self,
        *args,
        model: MoonwhaleForCausalLM,
        placement: RankPlacement,
        schedule: str,
        micro_batches: int,
        fsdp=False,
        **kwargs,
    ):
        self.placement, self.fsdp = placement, fsdp
        targs, context = kwargs["args"], kwargs["train_dataset"][0]["labels"].numel()
        if targs.load_best_model_at_end or not targs.uses_muonclip or kwargs.get("compute_metrics"):
            raise ValueError("a pipeline has no load_best_model_at_end, compute_metrics or optim of one's own")
        self._describe_whole(model, targs)
        if targs.activation_checkpointing:
            model.gradient_checkpointing_enable()
        pp = dist.get_world_size(placement.pp_group)
        specs = partition(model.config, SCHEDULES[schedule].stages_per_rank * pp, context)
        own = stages_of_rank(specs, schedule, pp, placement.pp_rank)
        prune_(model, own)
        all_to_all = None
        if placement.ep_group is not None:
            all_to_all = AllToAll(placement.ep_group, placement.expert_replicate_group)
            shard_experts_(model, all_to_all)
        super().__init__(*args, model=model, **kwargs)
        self.pipeline = Pipeline(
            [Stage(model, spec, torch.bfloat16 if targs.bf16 else None) for spec in own],
            schedule,
            micro_batches,
            (targs.per_device_train_batch_size, context),
            targs.device,
            placement.pp_group,
            placement.replicate_group,
            all_to_all,
        )
        self._micro_batches_of_step: list[dict] = []
        # Sums over the whole model must count each parameter once, and these two mark what other ranks count
        self._is_mirror = SCHEDULES[schedule].bidirectional and placement.pp_rank >= pp // 2
        self._embedding_is_copy = not any(spec.is_first for spec in own)

    def _describe_whole(self, model: MoonwhaleForCausalLM, targs) -> None:
        """Record what the whole model consists of, before this rank's share of it is all there is."""
        names = {parameter: name for name, parameter in model.named_parameters()}
        self._group_names = [  # the optimizer's groups with names for parameters, the same on every rank
            group | {"params": [names[p] for p in group["params"]]}
            for group in param_groups(model, **targs.group_settings)
        ]
        buffers = {name: buffer for name, buffer in model.named_buffers() if name in model.state_dict()}
        self._sizes = {name: tensor.shape for name, tensor in (dict(model.named_parameters()) | buffers).items()}
        self._attentions = [name for name, module in model.named_modules() if hasattr(type(module), "clip_qk_")]
        self._moes = [name for name, module in model.named_modules() if hasattr(type(module), "update_bias_")]

    def is_world_process_zero(self) -> bool:
        return self.placement.rank == 0

    def is_local_process_zero(self) -> bool:
        return self.is_world_process_zero()

    def create_optimizer(self, model=None) -> torch.optim.Optimizer:
        if self.optimizer is None:
            if self.fsdp:  # here, because a checkpoint's weights are loaded before this
                self.pipeline.fully_shard_()
            own = dict(self.model.named_parameters())
            groups = [g | {"params": [own[n] for n in g["params"] if n in own]} for g in self._group_names]
            self.optimizer = self._make_optimizer(groups)
            tau, replicas = self.args.qk_clip_tau or None, self.placement.replicate_group
            self._hooks = attach_hooks(self.optimizer, self.model, tau, replicas)
        return self.optimizer

    @property
    def _replica_groups(self) -> dict[str, dist.ProcessGroup]:
        return {"group": self.placement.replicate_group, "experts": self.placement.expert_replicate_group}

    def train(self, *args, **kwargs):
        """The Trainer's method. Raises a UserError of one line if another rank was lost."""
        try:
            return super().train(*args, **kwargs)
        except RuntimeError as error:
            if why := self.placement.explain_lost_rank(error, self.state.global_step + 1):
                raise UserError(why) from error
            raise

    # One optimizer step

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        samples, targets = super().get_batch_samples(epoch_iterator, num_batches, device)
        self._num_expected = len(samples)
        return samples, targets

    def training_step(self, model, inputs, num_items_in_batch=None) -> Tensor:
        """Keep a micro-batch, and at the step's last one run the pipeline on all of them.

        Returns:
            the step's loss after the last micro-batch, zero before.
        """
        model.train()
        self._micro_batches_of_step.append(self._prepare_inputs(inputs))
        if len(self._micro_batches_of_step) < self._num_expected:
            return torch.zeros((), device=self.args.device)
        step, self._micro_batches_of_step = self._micro_batches_of_step, []
        self.speed.count(sum(inputs["labels"].numel() for inputs in step))
        self._context = step[0]["labels"].shape[1]
        for stage in self.pipeline.stages:
            stage.targets = self._step_targets
        batch, num_real = self._batch_of_replica(step)
        self.pipeline.step(batch)
        taken = [(i, out) for i, out in self.pipeline.take_outputs() if i < num_real]
        outputs = self._outputs_of_all(taken, len(step))
        for out in outputs:
            self._loss_sums.add(out)
        return torch.stack([out.loss for out in outputs]).sum()

    def _batch_of_replica(self, step: list[dict]) -> tuple[dict[str, Tensor], int]:
        """Return this replica's micro-batches of a step as one batch, and how many of them are real.

        The last step of an epoch may have fewer than the schedule needs. Padding adds nothing to any sum.
        """
        replica, num_replicas = self.placement.replica, self.placement.num_replicas
        wanted = self.pipeline.micro_batches * num_replicas
        num_real = len(step[replica::num_replicas])
        if len(step) < wanted:
            step = [inputs | {"attention_mask": torch.ones_like(inputs["labels"])} for inputs in step]
            padding = {name: torch.zeros_like(value) for name, value in step[0].items()}
            padding["labels"] = torch.full_like(padding["labels"], IGNORE_INDEX)
            step = step + [padding] * (wanted - len(step))
        own = step[replica::num_replicas]
        return {name: torch.cat([inputs[name] for inputs in own]) for name in own[0]}, num_real

    def _outputs_of_all(self, taken: list[tuple[int, MoonwhaleOutput]], count: int) -> list[MoonwhaleOutput]:
        """Give every rank the outputs of all `count` micro-batches, which the last stages computed.

        Number i of replica c of C is number c + C · i of all.
        """
        depths = 1 if self.model.skips_mtp else 1 + self.model.config.num_nextn_predict_layers
        table = torch.zeros(count, 2 + 3 * depths, device=self.args.device)
        for i, out in taken:
            row = torch.cat([out.loss[None], out.balance_loss[None], out.losses, out.accuracies, out.targets.float()])
            table[self.placement.replica + i * self.placement.num_replicas] = row
        dist.all_reduce(table)
        loss, balance, *per_depth = table.T
        losses, accuracies, targets = torch.stack(per_depth).T.split(depths, dim=1)
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
        """Return the norm of the whole model's gradient, counting each parameter once."""
        experts = expert_slices(model)
        grads = {
            name: p.grad
            for name, p in model.named_parameters()
            if p.grad is not None and not (self._embedding_is_copy and name == EMBEDDING)
        }
        square = full_tensor(get_total_norm([grad for name, grad in grads.items() if name not in experts])).square()
        if self.placement.ep_group:
            of_experts = get_total_norm([grad for name, grad in grads.items() if name in experts]).square()
            of_experts = of_experts.to(square.device)  # a stage without experts gets a norm on the CPU
            dist.all_reduce(of_experts, group=self.placement.ep_group)
            square += of_experts
        square *= not self._is_mirror
        dist.all_reduce(square, group=self.placement.pp_group)
        return square.sqrt()

    def _last_hook_values(self) -> dict[str, Tensor]:
        """Collect what all ranks' step hooks saw, in the order of the whole model."""
        config, last, device = self.model.config, self._hooks.last, self.args.device
        here = [name for name, _ in self.model.named_modules()]
        logits = torch.full((len(self._attentions), config.num_attention_heads), -torch.inf, device=device)
        loads = torch.zeros(len(self._moes), config.n_routed_experts, device=device)
        for table, names, key in ((logits, self._attentions, "max_logits"), (loads, self._moes, "loads")):
            rows = [i for i, name in enumerate(names) if name in here]
            if rows:
                table[rows] = last[key]
            dist.all_reduce(table, dist.ReduceOp.MAX, group=self.placement.pp_group)
        clipped = torch.as_tensor(last.get("clipped_heads", 0), dtype=torch.float32, device=device)
        clipped = clipped * (not self._is_mirror)
        dist.all_reduce(clipped, group=self.placement.pp_group)
        seen = {"max_logits": logits, "clipped_heads": clipped}
        return seen | ({"loads": loads} if self._moes else {})

    def _speed_logs(self) -> dict[str, float]:
        speed = super()._speed_logs()
        return speed | {"mfu": speed["mfu"] / dist.get_world_size()} if speed else {}

    # Evaluation

    def _evaluate_batch(self, inputs: dict[str, Tensor]) -> Tensor:
        """Evaluate the same rows on every replica, and count the first replica's."""
        for stage in self.pipeline.stages:
            stage.targets = None  # the loss is divided by this batch's own targets, not by those of a training step
        self.pipeline.evaluate(inputs)
        taken = self.pipeline.take_outputs()
        [out] = self._outputs_of_all([(0, out) for _, out in taken] if self.placement.replica == 0 else [], 1)
        self._loss_sums.add(out)
        return out.loss

    # Checkpoints

    def _save_checkpoint(self, model, trial) -> None:
        """Write a checkpoint: every rank its shards of the weights and the optimizer state, rank 0 all other files.

        Rank 0 publishes the folder when all files are there.
        """
        control, is_leader = self.placement.control_group, self.placement.rank == 0
        try:
            run_on_all(self._empty_shards_folder if is_leader else None, control)
            save_weights(self._shards_folder / WEIGHTS, self._sizes, self._own_weights(), control)
            save_optimizer(self._shards_folder, self.optimizer, self._own_states(), control)
            run_on_all(partial(super()._save_checkpoint, model, trial) if is_leader else None, control)
        except Exception as error:
            if is_leader:
                shutil.rmtree(self._shards_folder, ignore_errors=True)
            if explained := explain_full_disk(error, self.args.output_dir):
                raise explained from error
            raise

    @property
    def _shards_folder(self) -> Path:
        """Where all ranks write, before rank 0 creates the checkpoint's folder and moves their files there."""
        return Path(self.args.output_dir, ".shards")

    def _empty_shards_folder(self) -> None:
        shutil.rmtree(self._shards_folder, ignore_errors=True)  # left by a run that was killed
        self._shards_folder.mkdir(parents=True)

    def _own_weights(self) -> dict[str, Tensor]:
        """Return the weights that this rank writes. Of replicas, the first that holds a tensor writes it."""
        shards = self._as_shards(self.model.state_dict())
        if self.fsdp:
            return shards
        if self.placement.replica >= self.placement.ep:
            return {}
        return {n: shard for n, shard in shards.items() if self.placement.replica == 0 or isinstance(shard, DTensor)}

    def _own_states(self) -> dict[str, Tensor]:
        """Return this rank's optimizer state by NAME.KEY."""
        states = {
            f"{name}.{key}": value
            for name, parameter in self.model.named_parameters()
            for key, value in self.optimizer.state.get(parameter, {}).items()
        }
        return self._as_shards(states)

    def _as_shards(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return the same tensors, those of shared experts as DTensors over the ranks that share them."""
        ep_group = self.placement.ep_group
        return tensors if ep_group is None else tensors | expert_shards(self.model, tensors, ep_group)

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        super()._save(output_dir, state_dict={})  # writes the configuration and the tokenizer, and no weights
        (self._shards_folder / WEIGHTS).rename(Path(output_dir, WEIGHTS))

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        for name in (OPTIMIZER, SETTINGS):
            (self._shards_folder / name).rename(Path(output_dir, name))
        self._shards_folder.rmdir()
        torch.save(self.lr_scheduler.state_dict(), Path(output_dir, SCHEDULER_NAME))

    def _optimizer_shards(self) -> dict[str, Tensor]:
        return self._as_shards(dict(self.model.named_parameters()))

    def _load_whole_optimizer(self, checkpoint: str | None) -> None:
        """Load this rank's part of the optimizer state that one process saved."""
        if checkpoint is None:
            return
        saved = torch.load(Path(checkpoint, SETTINGS), map_location="cpu", mmap=True, weights_only=True)
        order = [name for group in self._group_names for name in group["params"]]
        states = {name: saved["state"][i] for i, name in enumerate(order) if i in saved["state"]}
        for name, own in expert_slices(self.model).items():
            saved_state = states.get(name, {})
            states[name] = {key: value[own] if value.ndim else value for key, value in saved_state.items()}
        names = {parameter: name for name, parameter in self.model.named_parameters()}
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        state = {
            i: {key: shard_like(value, p).clone() for key, value in states[names[p]].items()}
            for i, p in enumerate(parameters)
            if names[p] in states
        }
        load_state(self.optimizer, state, saved["param_groups"])
        self._load_scheduler(checkpoint)
