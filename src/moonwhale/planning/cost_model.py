"""What training costs when a model is spread over many processes, by arithmetic alone: memory, traffic, idle time.

A layout is pp x dp processes: dp copies of a pipeline of pp ranks. `ep` of the copies share their routed experts. With
`fsdp`, ranks that hold the same stages keep a part of the weights each.
"""

from dataclasses import dataclass

from moonwhale.costs import forward_flops, part_sizes
from moonwhale.parallel.schedule_properties import SCHEDULES, stage_ranks
from moonwhale.parallel.stages import StageSpec, partition


@dataclass(frozen=True)
class ParallelLayout:
    """`micro_batches` of `rows` rows each are what one copy of the pipeline computes in a step."""

    pp: int
    dp: int
    schedule: str
    micro_batches: int
    rows: int
    ep: int = 1
    fsdp: bool = False

    @property
    def mirrored(self) -> bool:
        return self.pp > 1 and SCHEDULES[self.schedule].bidirectional

    @property
    def same(self) -> int:
        """Ranks that hold the same stages."""
        return self.dp * (1 + self.mirrored)


@dataclass(frozen=True)
class Cost:
    """Of one rank in a step, in bytes: what it holds at most, and what it sends."""

    weights: float
    gradients: float
    optimizer: float
    activations: float
    pipeline: float  # hidden states and their gradients, and the embedding's if two ranks have it
    reduce: float  # gradients, between ranks that hold the same weights, and weights where FSDP gathers them
    experts: float  # tokens to experts on other ranks, and home
    flops: float

    @property
    def memory(self) -> float:
        return self.weights + self.gradients + self.optimizer + self.activations

    @property
    def sent(self) -> float:
        return self.pipeline + self.reduce + self.experts


def idle_over_busy(layout: ParallelLayout) -> float:
    """The bubble over the time that a rank works, with B = 2 F = 2 W and nothing that overlaps (DeepSeek-V3, table 2):
    (P - 1) (F + B) of M (F + B) in 1F1B; (P/2 - 1) (F&B + B - 3W) in DualPipe; (P - 1) (F&B + B - 3W) of stages half
    as long in DualPipeV.
    """
    p, idle = layout.pp, {"1f1b": 3 * (layout.pp - 1), "dualpipe": 2 * (layout.pp / 2 - 1), "dualpipev": layout.pp - 1}
    return idle[layout.schedule] / (3 * layout.micro_batches) if p > 1 else 0.0


def in_flight(layout: ParallelLayout, rank: int) -> list[int]:
    """Micro-batches that a rank holds at most at once, of each of its stages."""
    p, m = layout.pp, layout.micro_batches
    if p == 1:
        return [1]
    if layout.schedule == "1f1b":
        return [min(p - rank, m)]
    if layout.mirrored:
        near = min(rank, p - 1 - rank)  # a V over half the ranks
        return [p - near, near + 1] if rank < p // 2 else [near + 1, p - near]
    return [2 * p - rank, rank + 1]


class Estimate:
    """What layouts cost a model that learns from rows of `context` tokens; `number_bytes` of an activation, 2 in bf16.
    Weights, gradients and the optimizer's state are fp32, as training keeps them.
    """

    def __init__(self, config, context: int, number_bytes: int = 2):
        self.config, self.context, self.number_bytes = config, context, number_bytes
        self.sizes, self.flops = part_sizes(config), forward_flops(config, context)
        self.cuts: dict[int, list[StageSpec]] = {}

    def costs(self, layout: ParallelLayout) -> list[Cost]:
        """Of every rank of a pipeline.

        Raises:
            UserError: the model has too few blocks for so many stages.
        """
        kind = SCHEDULES[layout.schedule]
        count = layout.pp * kind.stages_per_rank if layout.pp > 1 else 1
        if count not in self.cuts:
            self.cuts[count] = partition(self.config, count, self.context)
        where = stage_ranks(layout.schedule, layout.pp) if layout.pp > 1 else [0]
        stages = [(i, self.cuts[count][i % count]) for i in range(len(where))]
        own = [[stage for stage, place in zip(stages, where, strict=True) if place == r] for r in range(layout.pp)]
        return [self._cost(layout, rank, own[rank], where) for rank in range(layout.pp)]

    def _cost(self, layout: ParallelLayout, rank: int, stages: list[tuple[int, StageSpec]], where: list[int]) -> Cost:
        held, number_bytes = [part for _, part in stages], self.number_bytes
        tokens = layout.rows * self.context
        each = layout.micro_batches // (1 + layout.mirrored)  # micro-batches that a stage computes
        dense, experts, matrices = self._parameters(held)
        matrices -= experts * (1 - 1 / layout.ep)
        experts /= layout.ep
        owned, kept = dense + experts, 1 / layout.same if layout.fsdp else 1.0
        weights = gradients = 4 * owned
        if layout.fsdp and layout.pp == 1:  # gathered a block at a time; embedding, norm and head stay
            weights = gradients = 4 * (owned * kept + max(self.sizes.blocks) + 2 * self.sizes.embedding)
        elif layout.fsdp:  # whole during a step
            weights += 4 * owned * kept
        hops = each * sum(_hops(i, part, where) for i, part in stages)
        return Cost(
            weights=weights,
            gradients=gradients,
            optimizer=(8 * owned - 4 * matrices) * kept,
            activations=sum(
                count * self._saved(part, tokens, layout.ep)
                for count, part in zip(in_flight(layout, rank), held, strict=True)
            ),
            pipeline=hops * (tokens * self.config.hidden_size * number_bytes + 4) + self._embedding_sent(rank, where),
            reduce=_reduced(layout, dense, experts),
            experts=each * tokens * number_bytes * (1 - 1 / layout.ep) * sum(map(self._routed, held)),
            flops=each * tokens * 3 * sum(map(self._operations, held)),
        )

    def _embedding_sent(self, rank: int, where: list[int]) -> int:
        """Bytes of the embedding's gradient between the first and the last rank, if both need it."""
        shared = self.config.num_nextn_predict_layers or self.config.tie_word_embeddings
        return 4 * self.sizes.embedding if shared and where[0] != where[-1] and rank in (where[0], where[-1]) else 0

    def _blocks(self, part: Part) -> list[int]:
        """Of a stage; those of the MTP modules are the last one's."""
        tail = range(self.config.num_hidden_layers, self.config.num_blocks) if part.is_last else ()
        return [*range(part.start, part.stop), *tail]

    def _parameters(self, held: list[StageSpec]) -> tuple[int, int, int]:
        """Of a rank's stages: parameters without routed experts, those of routed experts, what Muon trains of both."""
        sizes, modules, tied = self.sizes, self.config.num_nextn_predict_layers, self.config.tie_word_embeddings
        blocks = [i for part in held for i in self._blocks(part)]
        experts = sum(sizes.routed_experts[i] for i in blocks)
        dense, matrices = sum(sizes.blocks[i] for i in blocks) - experts, sum(sizes.matrices[i] for i in blocks)
        last = any(part.is_last for part in held)
        if any(part.is_first for part in held) or (last and (modules or tied)):
            dense += sizes.embedding
        if last:
            dense += self.config.hidden_size + modules * (sizes.eh_proj + sizes.mtp_norms)
            dense += 0 if tied else sizes.embedding
            matrices += modules * sizes.eh_proj
        return dense, experts, matrices

    def _saved(self, part: StageSpec, tokens: int, ep: int) -> float:
        """Bytes that a micro-batch leaves for a stage's backward pass. In bf16 these are also autocast's copies of the
        weights, and the routers' inputs in fp32.
        """
        hidden, blocks = self.config.hidden_size, self._blocks(part)
        numbers = sum(self.sizes.saved_activations[i] for i in blocks)
        experts = sum(self.sizes.routed_experts[i] for i in blocks)
        if part.is_last:
            numbers += 4 * hidden * (1 + 4 * self.config.num_nextn_predict_layers)
        saved = self.number_bytes * tokens * numbers
        if self.number_bytes < 4:
            copies = sum(self.sizes.matrices[i] for i in blocks) - experts * (1 - 1 / ep)
            routers = sum(self.sizes.routed_experts[i] > 0 for i in blocks)
            saved += self.number_bytes * copies + 4 * tokens * hidden * routers
        return saved + 4 * self.sizes.embedding * part.is_last  # the chunked loss makes the head's gradient at once

    def _routed(self, part: Part) -> int:
        """Numbers that a token sends to its experts and gets home, forward and backward."""
        layers = sum(self.sizes.routed_experts[i] > 0 for i in self._blocks(part))
        return 4 * layers * self.config.num_experts_per_tok * self.config.hidden_size

    def _operations(self, part: Part) -> float:
        """Floating-point operations that a token costs in a stage, forward."""
        flops, modules = self.flops, self.config.num_nextn_predict_layers
        tail = (1 + modules) * flops.head + modules * flops.eh_proj if part.is_last else 0.0
        return tail + sum(flops.blocks[i] for i in self._blocks(part))


def _hops(index: int, part: StageSpec, where: list[int]) -> int:
    """Messages of a micro-batch that leave the rank: hidden states forward, their gradient backward."""
    forward = not part.is_last and where[index + 1] != where[index]
    return forward + (not part.is_first and where[index - 1] != where[index])


def _reduced(layout: ParallelLayout, dense: float, experts: float) -> float:
    """Bytes of gradients in rings: each number is sent once to be added up and once to be known, but for the own share.
    With FSDP it is known as a weight again; without a pipeline so for every micro-batch, forward and backward.
    """
    times = 3 * layout.micro_batches if layout.fsdp and layout.pp == 1 else 2
    return times * 4 * (dense * (1 - 1 / layout.same) + experts * (1 - layout.ep / layout.same))
