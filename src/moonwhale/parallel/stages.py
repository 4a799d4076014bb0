"""A model partitioned into pipeline stages: the layers of each, what a rank keeps of the model, and the forward pass.

The default places the stages in V shape: rank r of P holds stages r and 2P - 1 - r, so that the embedding, the head and
the MTP modules, which share weights, are on one rank. A plain pipeline has P stages, one on each rank.
"""

from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from moonwhale.costs import forward_flops
from moonwhale.errors import UserError
from moonwhale.model.documents import Documents
from moonwhale.model.modeling_moonwhale import MoonwhaleForCausalLM
from moonwhale.model.mtp import prediction_targets
from moonwhale.model.outputs import MoonwhaleModelOutput, MoonwhaleOutput
from moonwhale.model.rope import rotation_table


@dataclass(frozen=True)
class StageSpec:
    """Which part of the model a stage has: the main blocks `start` to `stop - 1`, and what belongs to its end.

    The first stage also has the embedding. The last one has the norm, the head and the MTP modules, and the embedding
    again if an MTP module reads it or the head is tied to it.
    """

    index: int
    num_stages: int
    start: int
    stop: int

    @property
    def is_first(self) -> bool:
        return self.index == 0

    @property
    def is_last(self) -> bool:
        return self.index == self.num_stages - 1


def partition(config, num_stages: int, context: int) -> list[StageSpec]:
    """Partition a model's main blocks into stages with costs as equal as whole blocks allow.

    The cost of a stage is its forward FLOPs per token in rows of `context` tokens. The last stage's cost includes the
    MTP modules, and the head once for each depth. So the last stage may have no block; every other stage has at least
    one. The result has the least sum of squared costs.

    Raises:
        UserError: if there are more stages than blocks.
    """
    num_blocks = config.num_hidden_layers
    if num_stages > num_blocks:
        raise UserError(
            f"`model.num_hidden_layers`: {num_blocks} blocks can't be cut into {num_stages} stages: give at least "
            f"{num_stages}, or a smaller `parallel.pp`"
        )
    flops = forward_flops(config, context)
    tail = sum(flops.blocks[num_blocks:]) + flops.outside_blocks(config.num_nextn_predict_layers)
    # best[n]: the least sum of squares of the stages so far if they hold the first n blocks, and where each stage ends
    best = {0: (0.0, ())}
    for index in range(num_stages):
        is_last, extended = index == num_stages - 1, {}
        for start, (total, ends) in best.items():
            stops = [num_blocks] if is_last else range(start + 1, num_blocks + 1)
            for stop in stops:
                cost = sum(flops.blocks[start:stop]) + (tail if is_last else 0)
                candidate = (total + cost**2, (*ends, stop))
                extended[stop] = min(extended.get(stop, (float("inf"), ())), candidate)
        best = extended
    stops = best[num_blocks][1]
    bounds = enumerate(zip((0, *stops), stops, strict=False))
    return [StageSpec(i, num_stages, start, stop) for i, (start, stop) in bounds]


def last_reads_embedding(config) -> bool:
    """Return whether the last stage reads the embedding too: in an MTP module, or as a tied head."""
    return bool(config.num_nextn_predict_layers or config.tie_word_embeddings)


def prune_(model: MoonwhaleForCausalLM, specs: list[StageSpec]) -> None:
    """Remove from a model what none of a rank's stages needs, in place.

    What stays keeps its name, so the state dicts of all ranks together are the whole model's.
    """
    body, config = model.model, model.config
    has_last = any(spec.is_last for spec in specs)
    blocks = {i for spec in specs for i in range(spec.start, spec.stop)}
    if has_last:
        blocks |= set(range(config.num_hidden_layers, len(body.layers)))
    for i in range(len(body.layers)):
        if i not in blocks:
            body.layers[i] = nn.Identity()
    if not (any(spec.is_first for spec in specs) or (has_last and last_reads_embedding(config))):
        body.embed_tokens = nn.Identity()
    if not any(spec.is_first for spec in specs):
        body.embed_conv = None
    if not has_last:
        body.norm, model.lm_head = nn.Identity(), nn.Identity()


class Stage(nn.Module):
    """One stage of a model as a module. The first takes no hidden states, each other what the one before it returned.

    Stages pass on the hidden states (B, T, hidden) and the sum of the balance losses so far (0-d, fp32). Through that
    sum, earlier blocks get the gradients of their balance losses. The last stage returns the loss (0-d) and appends its
    output to `outputs`, one for each micro-batch, from where the caller takes them.

    Attributes:
        targets: (1 + D,) targets of the whole optimizer step for each depth, set before it; None: of the micro-batch.
        autocast: the precision of the matrix products, if it is not fp32.
    """

    def __init__(self, model: MoonwhaleForCausalLM, spec: StageSpec, autocast: torch.dtype | None = None):
        super().__init__()
        self.model, self.spec, self.autocast = model, spec, autocast
        self.targets: Tensor | None = None
        self.outputs: list[MoonwhaleOutput] = []

    def boundary_tensors(self, batch: int, length: int) -> tuple[Tensor, Tensor]:
        """Return what passes between stages for (batch, length) tokens, as meta tensors."""
        shape = (batch, length, self.model.config.hidden_size)
        hidden = torch.empty(shape, dtype=self.autocast or torch.float32, device="meta", requires_grad=True)
        return hidden, torch.empty((), dtype=torch.float32, device="meta", requires_grad=True)

    def forward(
        self,
        *previous: Tensor,
        input_ids: Tensor,
        labels: Tensor,
        position_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
    ) -> tuple[Tensor, Tensor] | Tensor:
        """Every stage gets the whole micro-batch (B, T): each needs to know where documents begin, and the last needs
        the targets. See `MoonwhaleForCausalLM.forward`.
        """
        device_type, body, spec = input_ids.device.type, self.model.model, self.spec
        collect_statistics = torch.is_grad_enabled()  # evaluations must not change the statistics
        documents = Documents.from_inputs(*input_ids.shape, input_ids.device, attention_mask, position_ids)
        positions = documents.positions if position_ids is None else position_ids
        with torch.autocast(device_type, self.autocast) if self.autocast else nullcontext():
            if spec.is_first:
                x = body.convolve(body.embed(input_ids), documents)
                balance = x.new_zeros((), dtype=torch.float32)
            else:
                x, balance = previous
            table = rotation_table(self.model.config, positions, x.dtype)
            blocks = body.layers[spec.start : spec.stop]
            x, balance = body.run(
                blocks, x, balance, table, documents, collect_statistics=collect_statistics, input_ids=input_ids
            )
            if not spec.is_last:
                return x, balance + 0.0  # a tensor of its own, even if no block added to it
            x = body.norm(x)
            mtp = ()
            if len(body.mtp_modules) and not self.model.skips_mtp:
                embeds = body.embed(input_ids)
                mtp, balance = body.run_mtp(x, embeds, balance, table, documents, collect_statistics)
            whole = MoonwhaleModelOutput(last_hidden_state=x, mtp_hidden_states=mtp, balance_loss=balance)
            targets = prediction_targets(labels, documents, len(body.mtp_modules))
            losses = self.model.losses(whole, targets, self.targets)
        loss = losses["loss"]
        self.outputs.append(MoonwhaleOutput(**losses | {"loss": loss.detach()}))
        return loss
