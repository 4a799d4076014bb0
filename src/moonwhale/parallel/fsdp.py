"""FSDP2 (torch's `fully_shard`): of every weight, its gradient and its optimizer state, each of the ranks that hold the
same stages keeps a part, cut along the first dimension.

A model that is whole on a rank is gathered a block at a time, when the block is computed, forward and backward, and a
block's gradients are added up and cut as soon as they are there. In a pipeline that would be so for every micro-batch,
and in a backward pass that is split, too early; so there a step begins with gathering and ends with cutting.
"""

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, distribute_tensor

from moonwhale.parallel.stages import Stage


class Shards:
    """Cuts the weights of a rank's stages, in place: they become DTensors over the ranks of `group`."""

    def __init__(self, stages: list[Stage], group: dist.ProcessGroup, device: torch.device):
        self.mesh, self.model = DeviceMesh.from_group(group, device.type), stages[0].model
        self.alone = len(stages) == 1 and stages[0].part.count == 1
        # Embedding, norm and head are the root's own: the loss reads the head's weight past any module's hooks
        root = stages[0] if self.alone else self.model
        blocks = [block for block in self.model.model.layers if any(True for _ in block.parameters())]
        self.units = [*blocks, root]
        for unit in self.units:
            fully_shard(unit, mesh=self.mesh, reshard_after_forward=None if self.alone else False)
            unit.set_gradient_divide_factor(1.0)  # a sum: each loss is its share of the step's already
            unit.set_force_sum_reduction_for_comms(True)
        if not self.alone:
            root.set_requires_gradient_sync(False)
            root.set_reshard_after_backward(False)

    def gather(self) -> None:
        """Before a pipeline's step or evaluation: every weight whole."""
        if not self.alone:
            for unit in self.units:
                unit.unshard()

    def release(self) -> None:
        """Every weight in parts again."""
        for unit in self.units:
            unit.reshard()

    def scatter(self) -> None:
        """After a pipeline's step: gradients added up over the ranks, and cut as the weights are."""
        if self.alone:
            return
        whole = {name: parameter.grad for name, parameter in self.model.named_parameters()}
        self.model.zero_grad()
        self.release()
        for name, parameter in self.model.named_parameters():
            if (grad := whole.pop(name)) is not None:
                summed = DTensor.from_local(grad, self.mesh, [Partial()])
                parameter.grad = summed.redistribute(placements=parameter.placements)


def gathered(tensor: Tensor) -> Tensor:
    """A tensor put together, if it is in parts: by all of its ranks at once."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def part_of(tensor: Tensor, like: Tensor) -> Tensor:
    """This rank's part of a whole tensor, if a tensor `like` it is in parts."""
    if isinstance(like, DTensor) and tensor.shape == like.shape:
        return distribute_tensor(tensor.to(like.device), like.device_mesh, like.placements, src_data_rank=None)
    return tensor
