"""The cost of a parallel layout, by arithmetic alone: memory, bytes sent and idle time of each rank.

A layout has pp x dp processes: dp replicas of a pipeline of pp ranks. Every `ep` replicas share their routed experts.
With `fsdp`, the ranks that hold the same stages shard their weights.
"""

from dataclasses import dataclass

from moonwhale.costs import forward_flops, part_sizes
from moonwhale.parallel.schedule_properties import SCHEDULES, stage_ranks
from moonwhale.parallel.stages import StageSpec, last_reads_embedding, partition


@dataclass(frozen=True)
class ParallelLayout:
    """How a step is spread over processes. Each replica computes `micro_batches` of `rows` rows each."""

    pp: int
    dp: int
    schedule: str
    micro_batches: int
    rows: int
    ep: int = 1
    fsdp: bool = False

    @property
    def bidirectional(self) -> bool:
        return self.pp > 1 and SCHEDULES[self.schedule].bidirectional

    @property
    def replicate_size(self) -> int:
        """How many ranks hold the same stages."""
        return self.dp * (1 + self.bidirectional)


@dataclass(frozen=True)
class RankCost:
    """What one rank holds at most in a step and sends, in bytes, and the operations it computes."""

    weights: float
    gradients: float
    optimizer: float
    activations: float
    pipeline: float  # sent: hidden states and their gradients, and the embedding's gradient if two ranks hold it
    reduce: float  # sent: gradients to ranks that hold the same weights, and weights that FSDP gathers
    experts: float  # sent: tokens to experts on other ranks, and their results back
    flops: float

    @property
    def memory(self) -> float:
        return self.weights + self.gradients + self.optimizer + self.activations


def idle_over_busy(layout: ParallelLayout) -> float:
    """Return the bubble relative to the time that a rank computes, with B = 2 F = 2 W and no overlap.

    The bubbles are those of DeepSeek-V3, table 2: (P - 1) (F + B) in 1F1B, (P/2 - 1) (F&B + B - 3W) in DualPipe, and in
    DualPipeV (P - 1) (F&B + B - 3W) of stages half as long. A rank computes M (F + B).
    """
    p = layout.pp
    bubbles = {"1f1b": 3 * (p - 1), "dualpipe": 2 * (p / 2 - 1), "dualpipev": p - 1}
    return bubbles[layout.schedule] / (3 * layout.micro_batches) if p > 1 else 0.0


def in_flight(layout: ParallelLayout, rank: int) -> list[int]:
    """Return the most micro-batches that a rank holds at once, for each of its stages."""
    p, m = layout.pp, layout.micro_batches
    if p == 1:
        return [1]
    if layout.schedule == "1f1b":
        return [min(p - rank, m)]
    if layout.bidirectional:
        near = min(rank, p - 1 - rank)  # the rank's place in a V over half of the ranks
        return [p - near, near + 1] if rank < p // 2 else [near + 1, p - near]
    return [2 * p - rank, rank + 1]


class LayoutCosts:
    """What layouts cost for a model that trains on rows of `context` tokens.

    Weights, gradients and optimizer state are fp32, as in training. Activations take `activation_bytes` per value, 2 in
    bf16.
    """

    def __init__(self, config, context: int, activation_bytes: int = 2):
        self.config, self.context, self.activation_bytes = config, context, activation_bytes
        self.sizes, self.flops = part_sizes(config), forward_flops(config, context)
        self.partitions: dict[int, list[StageSpec]] = {}

    def costs(self, layout: ParallelLayout) -> list[RankCost]:
        """Return the cost of every rank of a pipeline.

        Raises:
            UserError: if the model has too few blocks for the layout's stages.
        """
        num_stages = layout.pp * SCHEDULES[layout.schedule].stages_per_rank if layout.pp > 1 else 1
        if num_stages not in self.partitions:
            self.partitions[num_stages] = partition(self.config, num_stages, self.context)
        holders = stage_ranks(layout.schedule, layout.pp) if layout.pp > 1 else [0]
        stages = [(i, self.partitions[num_stages][i % num_stages]) for i in range(len(holders))]
        return [
            self._cost(layout, rank, [stage for stage, r in zip(stages, holders, strict=True) if r == rank], holders)
            for rank in range(layout.pp)
        ]

    def _cost(
        self, layout: ParallelLayout, rank: int, stages: list[tuple[int, StageSpec]], holders: list[int]
    ) -> RankCost:
        """Return the cost of a rank with these stages, each with its number; `holders` is the rank of each number."""
        specs = [spec for _, spec in stages]
        tokens = layout.rows * self.context
        micro_batches = layout.micro_batches // (1 + layout.bidirectional)  # of each stage
        dense, experts, matrices = self._parameters(specs)
        matrices -= experts * (1 - 1 / layout.ep)
        experts /= layout.ep
        own, kept = dense + experts, 1 / layout.replicate_size if layout.fsdp else 1.0
        weights = gradients = 4 * own
        if layout.fsdp and layout.pp == 1:  # one block is gathered at a time; embedding, norm and head stay gathered
            weights = gradients = 4 * (own * kept + max(self.sizes.blocks) + 2 * self.sizes.embedding)
        elif layout.fsdp:  # all weights are gathered during a step, in addition to the shards
            weights += 4 * own * kept
        messages = micro_batches * sum(_messages(i, spec, holders) for i, spec in stages)
        message_bytes = tokens * self.config.hidden_size * self.activation_bytes + 4
        away = 1 - 1 / layout.ep  # the part of the experts that other ranks hold
        routed = 4 * sum(map(self._routed, specs))  # to the experts and back, forward and backward
        return RankCost(
            weights=weights,
            gradients=gradients,
            optimizer=(8 * own - 4 * matrices) * kept,
            activations=sum(
                count * self._saved(spec, tokens, layout.ep)
                for count, spec in zip(in_flight(layout, rank), specs, strict=True)
            ),
            pipeline=messages * message_bytes + self._embedding_sent(rank, holders),
            reduce=_reduced(layout, dense, experts),
            experts=micro_batches * tokens * self.activation_bytes * away * routed,
            flops=micro_batches * tokens * 3 * sum(map(self._forward_flops, specs)),
        )

    def _embedding_sent(self, rank: int, holders: list[int]) -> int:
        """Return the bytes of the embedding's gradient that the first and the last rank exchange, if both hold it."""
        ends = holders[0], holders[-1]
        both_hold_it = last_reads_embedding(self.config) and ends[0] != ends[1]
        return 4 * self.sizes.embedding if both_hold_it and rank in ends else 0

    def _blocks(self, spec: StageSpec) -> list[int]:
        """Return the blocks of a stage; the last one's include the MTP modules'."""
        tail = range(self.config.num_hidden_layers, self.config.num_blocks) if spec.is_last else ()
        return [*range(spec.start, spec.stop), *tail]

    def _parameters(self, specs: list[StageSpec]) -> tuple[int, int, int]:
        """Count a rank's parameters: all but routed experts, routed experts, and what Muon trains of both."""
        sizes, modules, tied = self.sizes, self.config.num_nextn_predict_layers, self.config.tie_word_embeddings
        blocks = [i for spec in specs for i in self._blocks(spec)]
        experts = sum(sizes.routed_experts[i] for i in blocks)
        dense, matrices = sum(sizes.blocks[i] for i in blocks) - experts, sum(sizes.matrices[i] for i in blocks)
        has_last = any(spec.is_last for spec in specs)
        if any(spec.is_first for spec in specs) or (has_last and last_reads_embedding(self.config)):
            dense += sizes.embedding
        if has_last:
            dense += self.config.hidden_size + modules * (sizes.eh_proj + sizes.mtp_norms)
            dense += 0 if tied else sizes.embedding
            matrices += modules * sizes.eh_proj
        return dense, experts, matrices

    def _saved(self, spec: StageSpec, tokens: int, ep: int) -> float:
        """Return the bytes that a micro-batch saves for a stage's backward pass.

        In bf16 these include autocast's copies of the weights, and the routers' inputs in fp32.
        """
        hidden, blocks = self.config.hidden_size, self._blocks(spec)
        values_per_token = sum(self.sizes.saved_activations[i] for i in blocks)
        experts = sum(self.sizes.routed_experts[i] for i in blocks)
        if spec.is_last:
            values_per_token += self.sizes.saved_outside_blocks
        if ep > 1:  # the rows that other ranks' tokens send to this rank's experts
            values_per_token += self._routed(spec)
        saved = self.activation_bytes * tokens * values_per_token
        if self.activation_bytes < 4:
            copies = sum(self.sizes.matrices[i] for i in blocks) - experts * (1 - 1 / ep)
            routers = sum(self.sizes.routed_experts[i] > 0 for i in blocks)
            saved += self.activation_bytes * copies + 4 * tokens * hidden * routers
        # The chunked loss computes the head's gradient in the forward pass
        return saved + 4 * self.sizes.embedding * spec.is_last

    def _routed(self, spec: StageSpec) -> int:
        """Return the values that a token sends to its experts in a stage."""
        layers = sum(self.sizes.routed_experts[i] > 0 for i in self._blocks(spec))
        return layers * self.config.num_experts_per_tok * self.config.hidden_size

    def _forward_flops(self, spec: StageSpec) -> float:
        """Return a stage's floating-point operations per token in the forward pass."""
        tail = self.flops.outside_blocks(self.config.num_nextn_predict_layers) if spec.is_last else 0.0
        return tail + sum(self.flops.blocks[i] for i in self._blocks(spec))


def _messages(index: int, spec: StageSpec, holders: list[int]) -> int:
    """Count a micro-batch's messages that leave the rank: hidden states forward, their gradient backward."""
    forward = not spec.is_last and holders[index + 1] != holders[index]
    return forward + (not spec.is_first and holders[index - 1] != holders[index])


def _reduced(layout: ParallelLayout, dense: float, experts: float) -> float:
    """Return the bytes that a rank sends in rings to reduce gradients.

    Each value is sent once to be summed and once to be distributed, except for the rank's own share. With FSDP the
    second time it is a weight. Without a pipeline, FSDP does so for each micro-batch, and gathers weights twice.
    """
    times = 3 * layout.micro_batches if layout.fsdp and layout.pp == 1 else 2
    size = layout.replicate_size
    return times * 4 * (dense * (1 - 1 / size) + experts * (1 - layout.ep / size))
