"""One rank of the pipeline tests: `main` runs the cases in a folder's cases.pt and saves this rank's results there."""

from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from moonwhale import fp8
from moonwhale.model import MoonwhaleConfig, MoonwhaleForCausalLM
from moonwhale.model.documents import Documents
from moonwhale.model.loss import IGNORE_INDEX
from moonwhale.model.moe import Experts
from moonwhale.model.mtp import shifted_labels
from moonwhale.optim.muon_distributed import DistributedMuonClip
from moonwhale.optim.muonclip import MuonClip, param_groups
from moonwhale.optim.step_hooks import attach_hooks
from moonwhale.parallel import expert_parallel
from moonwhale.parallel import pipeline as running
from moonwhale.parallel.expert_parallel import AllToAll, DispatchPlan, ParallelExperts, expert_slices, shard_experts_
from moonwhale.parallel.fsdp import full_tensor
from moonwhale.parallel.pipeline import Pipeline
from moonwhale.parallel.process_groups import place_rank
from moonwhale.parallel.schedule_properties import SCHEDULES
from moonwhale.parallel.schedules import splits_backward, stages_of_rank
from moonwhale.parallel.stages import Stage, partition, prune_
from relative_error import relative_error

LIMIT = 120  # seconds that a rank waits for another rank


def batch_of(config: dict, rows: int, length: int, seed: int) -> dict[str, Tensor]:
    """Return rows of two documents each. The last three labels of every second row are ignored, as for padding."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(config["vocab_size"], (rows, length), generator=generator)
    starts = torch.randint(2, length - 2, (rows, 1), generator=generator)
    position = torch.arange(length).expand(rows, length)
    labels = ids.clone()
    labels[::2, -3:] = IGNORE_INDEX
    positions = torch.where(position < starts, position, position - starts)
    return {"input_ids": ids, "labels": labels, "position_ids": positions}


def targets_of(config: MoonwhaleConfig, batch: dict[str, Tensor]) -> Tensor:
    documents = Documents.from_inputs(*batch["labels"].shape, "cpu", None, batch["position_ids"])
    depths = range(1 + config.num_nextn_predict_layers)
    return torch.stack([(shifted_labels(batch["labels"], documents, d) != IGNORE_INDEX).sum() for d in depths])


def model_of(config: dict, weights: dict[str, Tensor]) -> MoonwhaleForCausalLM:
    model = MoonwhaleForCausalLM(MoonwhaleConfig(**config)).train()
    model.load_state_dict(weights)
    return model


def optimizer_of(model, place=None):
    groups, dtype = param_groups(model, lr=2e-3), torch.float32
    if place is None:
        optimizer, same = MuonClip(groups, newton_schulz_dtype=dtype), None
    else:
        same, experts = place.replicate_group, place.expert_replicate_group
        optimizer = DistributedMuonClip(groups, group=same, experts=experts, newton_schulz_dtype=dtype)
    return optimizer, attach_hooks(optimizer, model, qk_clip_tau=0.3, group=same)


def one_process(case: dict) -> list[dict]:
    """Run a case in a single process. Return the losses, gradients and resulting state of each step."""
    model = model_of(case["config"], case["weights"])
    optimizer, hooks = optimizer_of(model)
    return [_step(case, seed, model, optimizer, hooks, None) for seed in range(case["steps"])]


class StageWithoutBalanceGradient(Stage):
    """A mutant: the gradient of the balance loss does not flow back to earlier stages."""

    def forward(self, *carried, **batch):
        out = super().forward(*carried, **batch)
        return out if self.spec.is_last else (out[0], out[1].detach().requires_grad_())


def swapped_results(index, *args) -> DispatchPlan:
    """A mutant: the experts' results are returned to the wrong tokens."""
    plan = DispatchPlan.from_choices(index, *args)
    return plan._replace(row_of_pair=plan.row_of_pair.flip(0))


def run_rank(case: dict) -> list[dict]:
    """Run a case as this rank. Return the same as `one_process`, for the parameters that this rank holds."""
    model = model_of(case["config"], case["weights"])
    pp, ep, length = case["pp"], case["ep"], case["length"]
    num_replicas, kind = dist.get_world_size() // pp, SCHEDULES[case["schedule"]]
    place = place_rank(pp, num_replicas, ep, kind.bidirectional, timedelta(seconds=LIMIT))
    parts = stages_of_rank(
        partition(model.config, pp * kind.stages_per_rank, length), case["schedule"], pp, place.pp_rank
    )
    prune_(model, parts)
    all_to_all = AllToAll(place.ep_group, place.expert_replicate_group) if ep > 1 else None
    if all_to_all:
        shard_experts_(model, all_to_all)
    stages = [(StageWithoutBalanceGradient if case["mutant"] == "balance" else Stage)(model, part) for part in parts]
    size = case["rows"] // case["micro_batches"]
    if case["mutant"] == "embedding":  # the two ranks that hold the embedding do not sum its gradient
        Pipeline._sum_embedding_gradient = lambda self: None
    if case["mutant"] == "experts":  # replicas do not sum the experts' gradients
        all_to_all.expert_replicate_group = None
    running.splits_backward = lambda: splits_backward() and not case["whole"]
    each, on = case["micro_batches"] // num_replicas, torch.device("cpu")
    pipeline = Pipeline(
        stages, case["schedule"], each, (size, length), on, place.pp_group, place.replicate_group, all_to_all
    )
    if case["fsdp"]:
        pipeline.fully_shard_()
        if case["mutant"] == "mean":
            for unit in pipeline.fsdp.units:
                unit.set_gradient_divide_factor(2.0)
    optimizer, hooks = optimizer_of(model, place)
    return [_step(case, seed, model, optimizer, hooks, pipeline, place) for seed in range(case["steps"])]


def local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _step(case, seed, model, optimizer, hooks, pipeline, place=None) -> dict:
    batch = batch_of(case["config"], case["rows"], case["length"], seed)
    targets = targets_of(model.config, batch)
    outputs, size = {}, case["rows"] // case["micro_batches"]
    if pipeline is None:
        for i in range(case["micro_batches"]):
            micro = {name: value[i * size : (i + 1) * size] for name, value in batch.items()}
            outputs[i] = model(**micro, num_items_in_batch=targets)
            outputs[i].loss.backward()
    else:
        for stage in pipeline.stages:
            stage.targets = targets
        pipeline.step(
            {name: torch.cat(value.split(size)[place.replica :: place.num_replicas]) for name, value in batch.items()}
        )
        outputs = {place.replica + i * place.num_replicas: out for i, out in pipeline.take_outputs()}
    result = {
        "losses": {i: (out.loss.item(), out.balance_loss.item(), *out.losses.tolist()) for i, out in outputs.items()},
        "grads": {name: full_tensor(p.grad).clone() for name, p in model.named_parameters() if p.grad is not None},
    }
    optimizer.step()
    optimizer.zero_grad()
    states = [state.get("momentum_buffer", state.get("exp_avg")) for state in optimizer.state.values()]
    result["held"] = [sum(local(t).numel() for t in tensors) for tensors in (model.parameters(), states)]
    result["clipped"] = float(hooks.last.get("clipped_heads", 0)) / (
        1 if pipeline is None else dist.get_world_size(hooks.group)
    )
    seen = {  # identical on all ranks that hold the same modules
        "max_logits": [name for name, module in model.named_modules() if hasattr(module, "clip_qk_")],
        "loads": [name for name, module in model.named_modules() if hasattr(module, "update_bias_")],
    }
    result["seen"] = {f"{n} {kind}": row for kind in seen for n, row in zip(seen[kind], hooks.last[kind], strict=True)}
    passes = [event for stage in pipeline.engine_stages for event in stage.events] if pipeline else []
    result["pairs"] = sum(  # backward passes that began during a forward pass
        f.begin < b.begin < f.end for f in passes for b in passes if (f.kind, b.kind) == ("F", "B")
    )
    result["experts"] = {name: (own.start, own.stop) for name, own in expert_slices(model).items()}
    result["state"] = {name: full_tensor(value).clone() for name, value in model.state_dict().items()}
    return result


def run_expert_layer(case: dict) -> dict:
    """Compare an expert layer sharded over two ranks with the whole layer.

    Return the number of rows that this rank received, and the relative errors of the output and every gradient.
    """
    generator = torch.Generator().manual_seed(0)
    config, rank = MoonwhaleConfig(**case["config"]), dist.get_rank()
    e, k, hidden = config.n_routed_experts, config.num_experts_per_tok, config.hidden_size
    whole = Experts(config)
    if case["precision"] == "fp8":
        whole.product, whole.row_multiple = fp8.emulated_product, fp8.TILE_SIZE
    for p in whole.parameters():
        torch.nn.init.normal_(p, std=p.shape[-1] ** -0.5, generator=generator)
    first, n = 7, 50  # tokens on rank 0, and on both ranks together
    dtype = torch.bfloat16 if case["precision"] == "bf16" else torch.float32
    x, d_out = (torch.randn(n, hidden, generator=generator).to(dtype) for _ in range(2))
    index = torch.rand(n, e - case["shut"], generator=generator).topk(k).indices
    gates = torch.rand(n, k, generator=generator)
    all_to_all = AllToAll(dist.group.WORLD)
    part = ParallelExperts(whole, all_to_all)
    mine = slice(0, first) if rank == 0 else slice(first, n)
    seen = []
    for module, tokens in ((whole, slice(None)), (part, mine)):
        inputs = [x[tokens].clone().requires_grad_(), gates[tokens].clone().requires_grad_()]
        out = module(inputs[0], index[tokens], inputs[1])
        out.backward(d_out[tokens])
        seen.append([out.detach(), *(t.grad for t in inputs), *(p.grad for p in module.parameters())])
    expected = [t[mine] for t in seen[0][:3]] + [t[part.local] for t in seen[0][3:]]
    errors = [relative_error(a, b) for a, b in zip(seen[1], expected, strict=True)]
    return {"rows": sum(DispatchPlan.from_choices(index[mine], e, all_to_all).recv_counts), "errors": errors}


def run_case(case: dict) -> list[dict] | dict:
    mutant = SimpleNamespace(from_choices=swapped_results)
    expert_parallel.DispatchPlan = mutant if case.get("mutant") == "home" else DispatchPlan
    return (run_expert_layer if "precision" in case else run_rank)(case)


def main(rank: int, n_ranks: int, folder: Path) -> None:
    store = dist.FileStore(str(folder / "store"), n_ranks)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=n_ranks, timeout=timedelta(seconds=LIMIT))
    cases = torch.load(folder / "cases.pt", weights_only=True)
    torch.save(
        {name: run_case(case) for name, case in cases.items()},
        folder / f"rank{rank}.pt",
    )
    dist.destroy_process_group()
