"""Checkpoints that all ranks write together, each only its own shards, and that any other layout of ranks can load.

The weights become one plain `model.safetensors`: every rank writes its tensors, or its rows of them, to their place in
the file. So the folder is the one that a single process writes, and no process ever holds more than its own share.
torch.distributed.checkpoint would write the weights twice, first as shards and then merged by rank 0, and its merged
file lacks the `format` entry that older versions of transformers ask for.

The optimizer state goes through torch.distributed.checkpoint in the safetensors format, which needs no pickle: the
folder `optimizer/` holds a tensor NAME.KEY for each entry KEY of a parameter's state. Loading reads what a rank needs,
whatever the layout that wrote it. `optimizer.pt` has the settings of the parameter groups.

Saving is synchronous. An asynchronous save would keep a second copy of each rank's share in memory during the next
steps, and the manifest's checksums need the finished files anyway.
"""

import json
import warnings
from collections.abc import Mapping
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.checkpoint._hf_utils import CUSTOM_METADATA_KEY, SAVED_OFFSETS_KEY
from torch.distributed.checkpoint.storage import WriteResult
from torch.distributed.tensor import DTensor
from torch.futures import Future

from moonwhale.parallel.process_groups import run_on_all

OPTIMIZER, SETTINGS = "optimizer", "optimizer.pt"


def save_weights(
    path: Path, sizes: Mapping[str, torch.Size], shards: Mapping[str, Tensor], group: dist.ProcessGroup
) -> None:
    """Write the whole model's fp32 weights to one safetensors file, called by all ranks of `group` together.

    Args:
        sizes: shapes of all tensors of the whole model by name, the same on every rank.
        shards: the tensors that this rank writes; a DTensor sharded along dimension 0 stands for its local rows.
            Ranks that hold the same rows may all write them.
    """
    header, offsets = _safetensors_header(sizes)

    def create() -> None:
        with path.open("wb") as file:
            file.write(header)
            file.truncate(len(header) + sum(size.numel() * 4 for size in sizes.values()))

    def write() -> None:
        with path.open("r+b") as file:
            for name in sizes.keys() & shards.keys():
                shard, first_row = _local_rows(shards[name].detach())
                file.seek(len(header) + offsets[name] + 4 * first_row * sizes[name][1:].numel())
                file.write(shard.to("cpu", torch.float32).contiguous().numpy().data)

    run_on_all(create if dist.get_rank(group) == 0 else None, group)
    run_on_all(write, group)


def _safetensors_header(sizes: Mapping[str, torch.Size]) -> tuple[bytes, dict[str, int]]:
    """The header of a safetensors file of fp32 tensors, as the library writes it, and each tensor's byte offset."""
    entries, offsets, end = {"__metadata__": {"format": "pt"}}, {}, 0
    for name in sorted(sizes):
        offsets[name], end = end, end + 4 * sizes[name].numel()
        entries[name] = {"dtype": "F32", "shape": list(sizes[name]), "data_offsets": [offsets[name], end]}
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # so that the tensors are aligned
    return len(text).to_bytes(8, "little") + text, offsets


def _local_rows(tensor: Tensor) -> tuple[Tensor, int]:
    """The rows that this rank holds of a tensor, and the index of the first."""
    if not isinstance(tensor, DTensor):
        return tensor, 0
    (chunk,) = tensor.__create_chunk_list__()
    return tensor.to_local(), chunk.offsets[0]


class _ShardWriter(dcp.HuggingFaceStorageWriter):
    """Writes a rank's shards to one file, without copies of CPU tensors. torch's writer copies each file twice."""

    def write_data(self, plan: dcp.SavePlan, planner: dcp.SavePlanner) -> Future:
        shards = {item.index.fqn: planner.resolve_data(item).detach().cpu().contiguous() for item in plan.items}
        offsets = {item.index.fqn: {SAVED_OFFSETS_KEY: item.tensor_data.chunk.offsets} for item in plan.items}
        if shards:
            path = Path(self.path, f"shard-{plan.storage_data['shard_index']:05}.safetensors")
            save_file(shards, path, {"format": "pt", CUSTOM_METADATA_KEY: json.dumps(offsets)})
        done = Future()
        done.set_result([WriteResult(item.index, shards[item.index.fqn].nbytes, None) for item in plan.items])
        return done


def save_optimizer(
    folder: Path, optimizer: torch.optim.Optimizer, shards: Mapping[str, Tensor], group: dist.ProcessGroup
) -> None:
    """Write the state of an optimizer into a checkpoint folder, called by all ranks of `group` together.

    Args:
        shards: this rank's state, by NAME.KEY; replicas of a tensor are written once.

    Raises:
        Exception: on every rank, the error of the first that could not write.
    """
    writer = _ShardWriter(str(folder / OPTIMIZER), save_distributed=True)
    try:
        dcp.save(dict(shards), storage_writer=writer, process_group=group)
    except dcp.CheckpointException as error:  # no Exception: callers could not handle it like any other
        _, (failure, _) = min(error.failures.items())
        raise failure from None
    if dist.get_rank(group) == 0:
        settings = [{k: v for k, v in g.items() if k != "params"} for g in optimizer.param_groups]
        torch.save({"param_groups": settings}, folder / SETTINGS)


def has_sharded_optimizer(checkpoint: Path) -> bool:
    """Whether `save_optimizer` wrote a checkpoint's optimizer state, not torch.save."""
    return (checkpoint / OPTIMIZER).is_dir()


def load_optimizer(
    checkpoint: Path, optimizer: torch.optim.Optimizer, names: Mapping[Tensor, str], shards: Mapping[str, Tensor]
) -> None:
    """Load this rank's part of the state that `save_optimizer` wrote. All ranks of the run call it together.

    Args:
        names: the names of the optimizer's parameters.
        shards: by name, what this rank holds of each parameter: a DTensor if that is some rows, else all of it.
    """
    reader = dcp.HuggingFaceStorageReader(str(checkpoint / OPTIMIZER))
    saved = reader.read_metadata().state_dict_metadata
    keys: dict[str, list[str]] = {}
    for entry in saved:
        name, _, key = entry.rpartition(".")
        keys.setdefault(name, []).append(key)
    tensors = {}
    for name in shards.keys() & keys.keys():
        for key in keys[name]:
            entry = f"{name}.{key}"
            tensors[entry] = torch.zeros_like(shards[name]) if saved[entry].size else torch.zeros(())
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # a single process loads alone
        dcp.load(tensors, storage_reader=reader, no_dist=not dist.is_initialized())

    def as_parameter(tensor: Tensor, parameter: Tensor) -> Tensor:
        expert_rows = isinstance(tensor, DTensor) and not isinstance(parameter, DTensor)
        return tensor.to_local() if expert_rows else tensor

    state = {}
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for i, (p, name) in enumerate((p, names[p]) for p in parameters):
        if name in keys:
            state[i] = {key: as_parameter(tensors[f"{name}.{key}"], p) for key in keys[name]}
    load_state(optimizer, state, torch.load(checkpoint / SETTINGS, weights_only=True)["param_groups"])


def load_state(optimizer: torch.optim.Optimizer, state: dict[int, dict[str, Tensor]], settings: list[dict]) -> None:
    """Give an optimizer the state of its parameters, by their number, and the settings of its groups."""
    own = optimizer.state_dict()
    for group, saved in zip(own["param_groups"], settings, strict=True):
        group |= {name: value for name, value in saved.items() if name != "params"}
    optimizer.load_state_dict(own | {"state": state})
