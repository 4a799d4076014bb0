"""A model cut into stages: which blocks each has, what is left of the model on a rank, and a stage's forward pass.

Stages are cut in V shape: rank r of P holds stages r and 2P - 1 - r, so that the embedding, the head and the MTP
modules, which share weights, are on one rank. A plain pipeline has P stages, one on each rank.
"""

from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from moonwhale.costs import forward_flops
from moonwhale.errors import UserError
from moonwhale.model.documents import Documents
from moonwhale.model.modeling_moonwhale import MoonwhaleForCausalLM, MoonwhaleModelOutput, MoonwhaleOutput
from moonwhale.model.mtp import prediction_targets
from moonwhale.model.rope import rotation_table


@dataclass(frozen=True)
class Part:
    """One stage of `count`: the main blocks `start … stop - 1`; the first stage embeds, the last has norm, head and MTP
    modules, and the embedding again where an MTP module reads it or the head is tied to it.
    """

    index: int
    count: int
    start: int
    stop: int

    @property
    def is_first(self) -> bool:
        return self.index == 0

    @property
    def is_last(self) -> bool:
        return self.index == self.count - 1


def cut(config, n_stages: int, context: int) -> list[Part]:
    """Cuts a model's main blocks into stages of costs as equal as whole blocks allow: the least sum of squares.

    A cost is the forward operations of a token in rows of `context` tokens. The last stage's includes the head, once
    for each depth, and the MTP modules, so it may have no block of its own; every other stage has one.

    Raises:
        UserError: there are more stages than blocks.
    """
    n_blocks = config.num_hidden_layers
    if n_stages > n_blocks:
        raise UserError(
            f"`model.num_hidden_layers`: {n_blocks} blocks can't be cut into {n_stages} stages: give at least "
            f"{n_stages}, or a smaller `parallel.pp`"
        )
    flops = forward_flops(config, context)
    modules = config.num_nextn_predict_layers
    tail = sum(flops.blocks[n_blocks:]) + (1 + modules) * flops.head + modules * flops.eh_proj
    # best[n]: the least sum of squares of the stages so far if they hold the first n blocks, and their ends
    best = {0: (0.0, ())}
    for index in range(n_stages):
        last, longer = index == n_stages - 1, {}
        for start, (total, ends) in best.items():
            stops = [n_blocks] if last else range(start + 1, n_blocks + 1)
            for stop in stops:
                cost = sum(flops.blocks[start:stop]) + (tail if last else 0)
                longer[stop] = min(longer.get(stop, (float("inf"), ())), (total + cost**2, (*ends, stop)))
        best = longer
    stops = best[n_blocks][1]
    return [Part(i, n_stages, start, stop) for i, (start, stop) in enumerate(zip((0, *stops), stops, strict=False))]


def keep_(model: MoonwhaleForCausalLM, parts: list[Part]) -> None:
    """Takes out of a model what none of a rank's `parts` needs, in place. What stays keeps its name, so that the ranks'
    state dicts together are the whole model's.
    """
    body, config = model.model, model.config
    last = any(part.is_last for part in parts)
    blocks = {i for part in parts for i in range(part.start, part.stop)}
    if last:
        blocks |= set(range(config.num_hidden_layers, len(body.layers)))
    for i in range(len(body.layers)):
        if i not in blocks:
            body.layers[i] = nn.Identity()
    reads_embedding = config.num_nextn_predict_layers or config.tie_word_embeddings
    if not (any(part.is_first for part in parts) or (last and reads_embedding)):
        body.embed_tokens = nn.Identity()
    if not last:
        body.norm, model.lm_head = nn.Identity(), nn.Identity()


class Stage(nn.Module):
    """One part of a model as a module: the first takes nothing, the others what the one before returned.

    What travels are the hidden states (B, T, hidden) and the sum of the balance losses so far (0-d, fp32), through
    which the blocks before get theirs gradients. The last stage returns the loss (0-d) and keeps its parts in
    `outputs`, one for each micro-batch, until somebody takes them.

    `targets`: (1 + D,) targets of the whole optimizer step for each depth, set before it; None: of the micro-batch.
    `autocast`: the precision of the products where it is not fp32.
    """

    def __init__(self, model: MoonwhaleForCausalLM, part: Part, autocast: torch.dtype | None = None):
        super().__init__()
        self.model, self.part, self.autocast = model, part, autocast
        self.targets: Tensor | None = None
        self.outputs: list[MoonwhaleOutput] = []

    def carried(self, batch: int, length: int) -> tuple[Tensor, Tensor]:
        """What travels between stages for (batch, length) tokens, as meta tensors."""
        shape = (batch, length, self.model.config.hidden_size)
        hidden = torch.empty(shape, dtype=self.autocast or torch.float32, device="meta", requires_grad=True)
        return hidden, torch.empty((), dtype=torch.float32, device="meta", requires_grad=True)

    def forward(
        self,
        *carried: Tensor,
        input_ids: Tensor,
        labels: Tensor,
        position_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
    ) -> tuple[Tensor, Tensor] | Tensor:
        """Every stage is given the micro-batch (B, T): where documents begin, and at the end the targets, matter to all
        of them. See `MoonwhaleForCausalLM.forward`.
        """
        kind, body, part = input_ids.device.type, self.model.model, self.part
        collect_statistics = torch.is_grad_enabled()  # an evaluation counts in no statistics
        documents = Documents.from_inputs(*input_ids.shape, input_ids.device, attention_mask, position_ids)
        positions = documents.positions if position_ids is None else position_ids
        with torch.autocast(kind, self.autocast) if self.autocast else nullcontext():
            if part.is_first:
                x = body.embed(input_ids)
                balance = x.new_zeros((), dtype=torch.float32)
            else:
                x, balance = carried
            table = rotation_table(self.model.config, positions, x.dtype)
            blocks = body.layers[part.start : part.stop]
            x, balance = body.run(blocks, x, balance, table, documents, collect_statistics=collect_statistics)
            if not part.is_last:
                return x, balance + 0.0  # a tensor of its own, even if no block added to it
            x = body.norm(x)
            embeds = body.embed(input_ids) if len(body.mtp_modules) else x
            mtp, balance = body.run_mtp(x, embeds, balance, table, documents, collect_statistics)
            out = MoonwhaleOutput()
            whole = MoonwhaleModelOutput(last_hidden_state=x, mtp_hidden_states=mtp, balance_loss=balance)
            targets = prediction_targets(labels, documents, len(body.mtp_modules))
            self.model.add_loss(out, whole, targets, self.targets)
        loss, out.loss = out.loss, out.loss.detach()
        self.outputs.append(out)
        return loss
