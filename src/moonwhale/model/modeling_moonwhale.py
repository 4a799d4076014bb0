"""The whole model: embedding, blocks, head and the chain of MTP modules, with its initialisation and its loss."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM
from transformers.cache_utils import Cache
from transformers.conversion_mapping import get_checkpoint_conversion_mapping, register_checkpoint_conversion_mapping
from transformers.utils import can_return_tuple

from .adapters import effective_weight
from .arguments import check_labels, chosen_hidden_states, complete_inputs, packed_positions
from .block import Block, BlockStatistics
from .configuration_moonwhale import MoonwhaleConfig
from .convolution import EmbeddingConvolution
from .documents import Documents
from .generation import MoonwhaleGenerationMixin
from .loss import IGNORE_INDEX, linear_cross_entropy
from .mtp import MTPModule, prediction_targets
from .norm import RMSNorm
from .outputs import MoonwhaleModelOutput, MoonwhaleOutput
from .pretrained import MoonwhalePreTrainedModel
from .rope import rotation_table
from .step_statistics import collects


class MoonwhaleModel(MoonwhalePreTrainedModel):
    """The model without its head. `layers` holds the main model's blocks and, after them, the MTP modules."""

    def __init__(self, config: MoonwhaleConfig):
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, config.padding_row)
        self.embed_conv = (
            EmbeddingConvolution(config.embedding_conv, config.hidden_size) if config.embedding_conv else None
        )
        self.layers = nn.ModuleList(Block(config, i) for i in range(config.num_hidden_layers))
        for n_blocks in config.mtp_blocks:
            first = sum(1 + len(getattr(layer, "blocks", ())) for layer in self.layers)
            self.layers.append(MTPModule(config, first, n_blocks))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.gradient_checkpointing = False
        self.post_init()

    @property
    def main_blocks(self) -> nn.ModuleList:
        return self.layers[: self.config.num_hidden_layers]

    @property
    def mtp_modules(self) -> nn.ModuleList:
        return self.layers[self.config.num_hidden_layers :]

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | int | Iterable[int] | None = None,
        output_attentions: bool | None = None,
        documents: Documents | None = None,
        with_mtp: bool = False,
        collect_statistics: bool | None = None,
        **kwargs,
    ) -> MoonwhaleModelOutput:
        """Run T tokens per row, after those that are already in the cache.

        Args:
            input_ids: (B, T), or else `inputs_embeds` (B, T, hidden).
            attention_mask: (B, cached + T), 0 for padding.
            position_ids: (B, T). Where they restart, a new document begins. With a cache, a row continues its document.
                Flash attention's `cu_seq_lens_q`, `seq_idx` and so on in `kwargs` are read as such position ids.
            output_hidden_states: whether to return every block's input and the normed output, or the indices of those
                to return, with None for the others. None: as the configuration says.
            output_attentions: whether to return the weights of every block's softmax; None: as the configuration says.
            documents: what `Documents.from_inputs` makes of the two, if it is known already.
            with_mtp: whether to run the MTP modules too. They use no cache.
            collect_statistics: whether the batch counts in the statistics that QK-Clip and the router bias use at the
                next optimizer step. None: if gradients are enabled.

        Raises:
            ValueError: neither or both of input_ids and inputs_embeds, a mask of another shape, or MTP after a cache.
            TypeError: an argument that the model does not know, or knows but cannot obey.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give exactly one of input_ids and inputs_embeds")
        embeds = self.embed(input_ids) if inputs_embeds is None else _in_autocast_dtype(inputs_embeds)
        cache, documents, position_ids = complete_inputs(
            self, embeds, attention_mask, position_ids, past_key_values, use_cache, documents, with_mtp, kwargs
        )
        rotation = rotation_table(self.config, position_ids, embeds.dtype)
        collect_statistics = collects(collect_statistics)
        chosen = chosen_hidden_states(output_hidden_states, self.config, len(self.main_blocks) + 1)
        if output_attentions is None:
            output_attentions = getattr(self.config, "output_attentions", False)

        x = self.convolve(embeds, documents, cache)
        balance, hidden_states = x.new_zeros((), dtype=torch.float32), []
        attentions = [] if output_attentions else None
        for i, block in enumerate(self.main_blocks):
            hidden_states.append(x if i in chosen else None)
            x, balance = self.run(
                [block], x, balance, rotation, documents, cache, collect_statistics, attentions, input_ids
            )
        x, mtp = self.norm(x), None
        if with_mtp:
            mtp, balance = self.run_mtp(x, embeds, balance, rotation, documents, collect_statistics)
        return MoonwhaleModelOutput(
            last_hidden_state=x,
            past_key_values=cache,
            hidden_states=(*hidden_states, x if len(hidden_states) in chosen else None) if chosen else None,
            attentions=tuple(attentions) if output_attentions else None,
            mtp_hidden_states=mtp,
            balance_loss=balance,
        )

    # The steps of a forward pass, for callers that cut it into stages

    def embed(self, input_ids: Tensor) -> Tensor:
        """Embed tokens (B, T) as (B, T, hidden), in the precision of the blocks."""
        return _in_autocast_dtype(self.embed_tokens(input_ids))

    def convolve(self, embeds: Tensor, documents: Documents, cache: Cache | None = None) -> Tensor:
        """Return the first block's input (B, T, hidden): the embeddings, convolved if the model does so."""
        if self.embed_conv is None:
            return embeds
        if cache is None:
            return self.embed_conv(embeds, documents)
        return self.embed_conv.continue_from(cache, self.config.num_hidden_layers, embeds, documents)

    def run(
        self,
        blocks: Iterable[Block],
        x: Tensor,
        balance: Tensor,
        rotation: tuple[Tensor, Tensor],
        documents: Documents,
        cache: Cache | None = None,
        collect_statistics: bool = False,
        attentions: list[Tensor] | None = None,
        input_ids: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Run x (B, T, hidden) through some main blocks. Append the weights of each softmax to `attentions`, if given.
        Blocks with a latent embedding need `input_ids` (B, T).

        Returns:
            the new x, and `balance` (0-d) plus the blocks' balance losses.
        """
        for block in blocks:
            x, *measured = block(x, rotation, documents, cache, attentions is not None, input_ids)
            statistics = BlockStatistics(*measured)
            if attentions is not None:
                attentions.append(statistics.attention)
            balance = _add_up([block], [statistics], balance, collect_statistics)
        return x, balance

    def run_mtp(
        self,
        hidden: Tensor,
        embeds: Tensor,
        balance: Tensor,
        rotation: tuple[Tensor, Tensor],
        documents: Documents,
        collect_statistics: bool = False,
    ) -> tuple[tuple[Tensor, ...], Tensor]:
        """Run the MTP modules on the main model's normed output and the embeddings, both (B, T, hidden).

        Returns:
            each module's normed output (B, T, hidden), and `balance` (0-d) plus the modules' balance losses.
        """
        outputs = []
        for k, module in enumerate(self.mtp_modules, start=1):
            ahead = embeds.roll(-k, dims=1)  # position i has the embedding of token i + k
            hidden, *measured = module(hidden, ahead, rotation, documents.with_successor(k))
            width = len(BlockStatistics._fields)
            statistics = [BlockStatistics(*measured[i : i + width]) for i in range(0, len(measured), width)]
            balance = _add_up([module, *module.blocks], statistics, balance, collect_statistics)
            outputs.append(hidden)
        return tuple(outputs), balance


def _add_up(
    blocks: Iterable[Block], statistics: Iterable[BlockStatistics], balance: Tensor, collect_statistics: bool
) -> Tensor:
    """Return `balance` plus the blocks' balance losses; with `collect_statistics`, let them keep the other figures."""
    for block, measured in zip(blocks, statistics, strict=True):
        if collect_statistics:
            block.collect(measured)
        if measured.balance is not None:
            balance = balance + measured.balance.to(balance.device)  # a model may be spread over several GPUs
    return balance


def _in_autocast_dtype(embeds: Tensor) -> Tensor:
    """Return the embeddings in the precision of the products, which under autocast the residual stream has too."""
    device = embeds.device.type
    return embeds.to(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else embeds


class MoonwhaleForCausalLM(MoonwhalePreTrainedModel, MoonwhaleGenerationMixin):
    """The language model. With MoBA and MTP off, its weights load into a `DeepseekV3ForCausalLM` name by name."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012 (the base class wants a plain dict)

    def __init__(self, config: MoonwhaleConfig):
        super().__init__(config)
        self.model = MoonwhaleModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.mtp_loss_weight = config.mtp_loss_weight  # λ; a schedule may lower it (V3 §4.2: 0.3, then 0.1)
        # Each rank collects its own statistics. DDP would overwrite them with those of rank 0.
        statistics = [name for name, _ in self.named_buffers() if name.endswith(("max_logit", "load"))]
        self._ddp_params_and_buffers_to_ignore = statistics
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        num_items_in_batch: Tensor | int | None = None,
        documents: Documents | None = None,
        targets: Tensor | None = None,
        collect_statistics: bool | None = None,
        **kwargs,
    ) -> MoonwhaleOutput:
        """Compute the logits of (B, T) tokens and, with `labels`, the loss. In training mode it is one or the other.

        Args:
            input_ids, attention_mask, position_ids, inputs_embeds: see `MoonwhaleModel.forward`.
            labels: (B, T), -100 where there is none. They are shifted here.
            logits_to_keep: compute the logits of so many last positions, 0 for all, or of these positions.
            num_items_in_batch: number of targets of the whole optimizer step if this is one of its micro-batches,
                (1 + D,) for each depth. The sum over micro-batches is then the loss of the large batch. A single number
                counts the main head's targets, and weights every depth by this micro-batch's share of them.
            documents: what `Documents.from_inputs` makes of mask and position ids, if it is known already.
            targets: (1 + D, B, T), what `prediction_targets` makes of labels and documents, if it is known already.
            collect_statistics: whether the batch counts in the statistics that QK-Clip and the router bias use at the
                next optimizer step. None: if there are labels and gradients are enabled.
            **kwargs: `shift_labels` (B, T), the target of each position, in place of `labels`: sequence parallelism
                shifts before it cuts a row. In the signature, Trainer would take them for labels that every batch has.
                The others go to `MoonwhaleModel.forward`.
        """
        shift_labels = kwargs.pop("shift_labels", None)
        has_loss = labels is not None or shift_labels is not None
        if collect_statistics is None:
            collect_statistics = has_loss and torch.is_grad_enabled()
        if has_loss:
            given, shifted = (labels, False) if shift_labels is None else (shift_labels, True)
            check_labels(given, input_ids if inputs_embeds is None else inputs_embeds, past_key_values)
            position_ids = packed_positions(kwargs, position_ids, given, past_key_values)
            if documents is None:
                documents = Documents.from_inputs(*given.shape, given.device, attention_mask, position_ids)
            if targets is None:
                targets = prediction_targets(given, documents, self.config.num_nextn_predict_layers, shifted)
        body = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=None if has_loss else past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=False if has_loss else use_cache,
            documents=documents,
            with_mtp=has_loss and not self.skips_mtp,
            collect_statistics=collect_statistics,
            **kwargs,
        )
        logits, losses = None, {}
        if has_loss:
            losses = self.losses(body, targets, num_items_in_batch)
            if self.skips_mtp and torch.distributed.is_initialized():
                losses["loss"] = losses["loss"] + self.zero_of_mtp()
        if not (has_loss and self.training):
            keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
            logits = self.lm_head(body.last_hidden_state[:, keep])
        # All at once: a field that is set later would come after the others in the output's tuple.
        return MoonwhaleOutput(
            logits=logits,
            past_key_values=body.past_key_values,
            hidden_states=body.hidden_states,
            attentions=body.attentions,
            **losses,
        )

    @property
    def skips_mtp(self) -> bool:
        """Whether a training step leaves the MTP modules out: with λ = 0 their loss counts for nothing."""
        return self.training and self.mtp_loss_weight == 0

    def zero_of_mtp(self) -> Tensor | int:
        """Return 0 as a function of the resting modules' parameters, since DDP waits for a gradient of each."""
        return sum(p[:0].sum() for p in self.model.mtp_modules.parameters())

    def losses(self, body: MoonwhaleModelOutput, targets: Tensor, num_items: Tensor | int | None) -> dict[str, Tensor]:
        """Return the fields of `MoonwhaleOutput` about the loss: main + λ/D Σ_k MTP_k + balance (V3 eq. 24-25), all
        heads in one chunked cross-entropy.

        `body` needs its hidden states and balance loss. `targets` (1 + D, B, T) and `num_items` are as in `forward`. If
        the modules were not run, D is 0 in all fields.
        """
        hidden = torch.stack([body.last_hidden_state, *(body.mtp_hidden_states or ())])  # (1 + D, B, T, hidden)
        targets = targets[: len(hidden)]
        counts = (targets != IGNORE_INDEX).sum((1, 2))
        n_here = counts.clamp(min=1).float()  # (1 + D,) targets of this micro-batch, and below of the whole step
        n_step = n_here if num_items is None else torch.as_tensor(num_items, device=n_here.device).float().clamp(min=1)
        if n_step.dim() == 0:  # the main head's targets alone
            n_step = n_step * n_here / n_here[0]
        n_step = n_step[: len(hidden)]
        weights = torch.ones_like(n_here)
        weights[1:] = self.mtp_loss_weight / max(len(hidden) - 1, 1)
        row_weight = (weights / n_step).view(-1, 1, 1).expand(targets.shape)  # (1 + D, B, T)
        loss, nll, correct = linear_cross_entropy(
            hidden.flatten(0, 2), effective_weight(self.lm_head), targets.flatten(), row_weight.flatten()
        )
        return {
            "loss": loss + body.balance_loss * (n_here[0] / n_step[0]),
            "losses": nll.view_as(targets).sum((1, 2)) / n_here,
            "accuracies": correct.view_as(targets).sum((1, 2)) / n_here,
            "targets": counts,
            "balance_loss": body.balance_loss.detach(),
        }


AutoConfig.register("moonwhale", MoonwhaleConfig)
AutoModel.register(MoonwhaleConfig, MoonwhaleModel)
AutoModelForCausalLM.register(MoonwhaleConfig, MoonwhaleForCausalLM)
for name in ("MoonwhaleModel", "MoonwhaleForCausalLM"):  # DeepSeek's checkpoints store every expert by itself
    register_checkpoint_conversion_mapping(name, get_checkpoint_conversion_mapping("deepseek_v3"), overwrite=True)
