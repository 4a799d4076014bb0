"""FSDP2 (torch's `fully_shard`): the ranks that hold the same stages shard each weight, its gradient and its optimizer
state along the first dimension.

Without a pipeline, a block is unsharded when it computes, forward and backward, and its gradients are reduced and
sharded as soon as they are complete. In a pipeline that would happen for every micro-batch, and where the backward pass
is split it would shard a gradient before the weights' half is computed. So there all weights are unsharded before a
step, and all gradients are reduced after it.
"""

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, distribute_tensor

from moonwhale.parallel.stages import Stage


class ShardedStages:
    """Shards the weights of a rank's stages in place: they become DTensors over the ranks of `group`."""

    def __init__(self, stages: list[Stage], group: dist.ProcessGroup, device: torch.device):
        self.mesh, self.model = DeviceMesh.from_group(group, device.type), stages[0].model
        self.is_whole_model = len(stages) == 1 and stages[0].spec.num_stages == 1
        # The root shards the embedding, norm and head itself: the loss reads the head's weight without calling the
        # module, so hooks of its own would not run.
        root = stages[0] if self.is_whole_model else self.model
        blocks = [block for block in self.model.model.layers if any(True for _ in block.parameters())]
        self.units = [*blocks, root]
        for unit in self.units:
            fully_shard(unit, mesh=self.mesh, reshard_after_forward=None if self.is_whole_model else False)
            unit.set_gradient_divide_factor(1.0)  # gradients are sums: each loss is its share of the step's
            unit.set_force_sum_reduction_for_comms(True)
        if not self.is_whole_model:
            root.set_requires_gradient_sync(False)
            root.set_reshard_after_backward(False)

    def unshard(self) -> None:
        """Gather every weight before a pipeline's step or evaluation."""
        if not self.is_whole_model:
            for unit in self.units:
                unit.unshard()

    def reshard(self) -> None:
        """Free the gathered weights, so that each rank keeps its shards."""
        for unit in self.units:
            unit.reshard()

    def reduce_gradients(self) -> None:
        """Sum the gradients over the ranks after a pipeline's step, and shard them as the weights are."""
        if self.is_whole_model:
            return
        local_grads = {name: parameter.grad for name, parameter in self.model.named_parameters()}
        self.model.zero_grad()
        self.reshard()
        for name, parameter in self.model.named_parameters():
            if (grad := local_grads.pop(name)) is not None:
                unreduced = DTensor.from_local(grad, self.mesh, [Partial()])
                parameter.grad = unreduced.redistribute(placements=parameter.placements)


def full_tensor(tensor: Tensor) -> Tensor:
    """Return the whole of a tensor that may be sharded. All ranks that hold a shard of it call this together."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def shard_like(tensor: Tensor, like: Tensor) -> Tensor:
    """Return this rank's shard of a whole tensor if `like`, of the same shape, is sharded; else the tensor itself."""
    if isinstance(like, DTensor) and tensor.shape == like.shape:
        return distribute_tensor(tensor.to(like.device), like.device_mesh, like.placements, src_data_rank=None)
    return tensor
