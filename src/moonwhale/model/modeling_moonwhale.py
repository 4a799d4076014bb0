"""The whole model: embedding, blocks, head and the chain of MTP modules, with its initialisation and its loss."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, PreTrainedModel
from transformers import initialization as init
from transformers.cache_utils import Cache, DynamicCache
from transformers.conversion_mapping import get_checkpoint_conversion_mapping, register_checkpoint_conversion_mapping
from transformers.generation import GenerationMixin

from .block import Block, BlockStatistics
from .configuration_moonwhale import MoonwhaleConfig
from .documents import Documents
from .loss import IGNORE_INDEX, linear_cross_entropy
from .mla import MultiheadLatentAttention
from .moe import DeepseekMoE, Experts, Router
from .mtp import MTPModule, prediction_targets
from .norm import RMSNorm
from .outputs import MoonwhaleModelOutput, MoonwhaleOutput
from .rope import rotation_table


class MoonwhalePreTrainedModel(PreTrainedModel):
    """Initialisation, saving and loading, shared by the body and the language model."""

    config: MoonwhaleConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ("Block", "MTPModule")
    _skip_keys_device_placement = ("past_key_values",)
    # DeepSeek's MTP modules carry copies of the main model's embedding and head.
    _keys_to_ignore_on_load_unexpected = (r"layers\.\d+\.(embed_tokens|shared_head\.head)\.weight",)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Draw weights from a normal of `initializer_range`; those that write into the residual stream start at zero.

        So a new model passes its embeddings on unchanged, and the contribution of each block grows from nothing. After
        equal time this gave 1 % fewer bits per byte than normal weights there.
        """
        super()._init_weights(module)
        if getattr(module, "starts_at_zero", False):  # set on output projections, see mla.py and moe.py
            init.zeros_(module.weight)
        std = self.config.initializer_range
        if isinstance(module, Router):
            init.normal_(module.weight, mean=0.0, std=std)
            init.zeros_(module.e_score_correction_bias)
        elif isinstance(module, Experts):
            init.normal_(module.gate_up_proj, mean=0.0, std=std)
            init.zeros_(module.down_proj)
        elif isinstance(module, DeepseekMoE):
            init.zeros_(module.load)
        elif isinstance(module, MultiheadLatentAttention):
            init.constant_(module.max_logit, -torch.inf)
            if module.key_conv is not None:
                init.zeros_(module.key_conv)

    def save_pretrained(self, save_directory, save_original_format: bool = False, **kwargs) -> None:
        """Save as transformers does, but by default with experts as stacks: a resuming Trainer reads only these.

        `save_original_format=True` saves every expert by itself, which is DeepSeek's format.
        """
        super().save_pretrained(save_directory, save_original_format=save_original_format, **kwargs)


class MoonwhaleModel(MoonwhalePreTrainedModel):
    """The model without its head. `layers` holds the main model's blocks and, after them, the MTP modules."""

    def __init__(self, config: MoonwhaleConfig):
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)
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

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool = False,
        documents: Documents | None = None,
        with_mtp: bool = False,
        collect_statistics: bool | None = None,
        **_,
    ) -> MoonwhaleModelOutput:
        """Run T tokens per row, after those that are already in the cache.

        Args:
            input_ids: (B, T), or else `inputs_embeds` (B, T, hidden).
            attention_mask: (B, cached + T), 0 for padding.
            position_ids: (B, T). Where they restart, a new document begins. With a cache, a row continues its document.
            documents: what `Documents.from_inputs` makes of the two, if it is known already.
            with_mtp: whether to run the MTP modules too. They use no cache.
            collect_statistics: whether the batch counts in the statistics that QK-Clip and the router bias use at the
                next optimizer step. None: if gradients are enabled.

        Raises:
            ValueError: neither or both of input_ids and inputs_embeds, or a mask of another shape.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give exactly one of input_ids and inputs_embeds")
        x = self.embed(input_ids) if inputs_embeds is None else _as_computed(inputs_embeds)
        if collect_statistics is None:
            collect_statistics = torch.is_grad_enabled()
        if use_cache is None:
            use_cache = self.config.use_cache and not self.training
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        past = past_key_values.get_seq_length() if past_key_values is not None else 0
        batch, length, _ = x.shape
        if documents is None:
            starts = None if past else position_ids
            documents = Documents.from_inputs(batch, past + length, x.device, attention_mask, starts)
        if position_ids is None:
            position_ids = documents.positions[:, past:]
        rotation = rotation_table(self.config, position_ids, x.dtype)

        embeds, balance, block_inputs = x, x.new_zeros((), dtype=torch.float32), []
        for block in self.main_blocks:
            block_inputs.append(x)
            x, balance = self.run([block], x, balance, rotation, documents, past_key_values, collect_statistics)
        x, mtp = self.norm(x), ()
        if with_mtp:
            mtp, balance = self.run_mtp(x, embeds, balance, rotation, documents, collect_statistics)
        return MoonwhaleModelOutput(
            last_hidden_state=x,
            past_key_values=past_key_values,
            hidden_states=(*block_inputs, x) if output_hidden_states else None,
            mtp_hidden_states=mtp,
            balance_loss=balance,
        )

    # The steps of a forward pass, for callers that cut it into stages

    def embed(self, input_ids: Tensor) -> Tensor:
        """Embed tokens (B, T) as (B, T, hidden), in the precision of the blocks."""
        return _as_computed(self.embed_tokens(input_ids))

    def run(
        self,
        blocks: Iterable[Block],
        x: Tensor,
        balance: Tensor,
        rotation: tuple[Tensor, Tensor],
        documents: Documents,
        cache: Cache | None = None,
        collect_statistics: bool = False,
    ) -> tuple[Tensor, Tensor]:
        """Run x (B, T, hidden) through some main blocks.

        Returns:
            the new x, and `balance` (0-d) plus the blocks' balance losses.
        """
        for block in blocks:
            x, statistics = block(x, rotation, documents, cache)
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
            hidden, statistics = module(hidden, ahead, rotation, documents.with_successor(k))
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
            balance = balance + measured.balance
    return balance


def _as_computed(embeds: Tensor) -> Tensor:
    """Return the embeddings in the precision of the products, which under autocast the residual stream has too."""
    device = embeds.device.type
    return embeds.to(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else embeds


class MoonwhaleForCausalLM(MoonwhalePreTrainedModel, GenerationMixin):
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
        """
        has_loss = labels is not None
        if collect_statistics is None:
            collect_statistics = has_loss and torch.is_grad_enabled()
        if has_loss:
            _check_labels(labels, input_ids if inputs_embeds is None else inputs_embeds, past_key_values)
            if documents is None:
                documents = Documents.from_inputs(*labels.shape, labels.device, attention_mask, position_ids)
            if targets is None:
                targets = prediction_targets(labels, documents, self.config.num_nextn_predict_layers)
        body = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=False if has_loss else use_cache,
            documents=documents,
            with_mtp=has_loss,
            collect_statistics=collect_statistics,
            **kwargs,
        )
        out = MoonwhaleOutput(past_key_values=body.past_key_values, hidden_states=body.hidden_states)
        if has_loss:
            self.add_loss(out, body, targets, num_items_in_batch)
        if not (has_loss and self.training):
            keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
            out.logits = self.lm_head(body.last_hidden_state[:, keep])
        return out

    def add_loss(
        self, out: MoonwhaleOutput, body: MoonwhaleModelOutput, targets: Tensor, num_items: Tensor | int | None
    ) -> None:
        """Fill in `out` with main + λ/D Σ_k MTP_k + balance (V3 eq. 24-25), all heads in one chunked cross-entropy.

        `body` needs its hidden states and balance loss. `targets` (1 + D, B, T) and `num_items` are as in `forward`.
        """
        hidden = torch.stack([body.last_hidden_state, *body.mtp_hidden_states])  # (1 + D, B, T, hidden)
        counts = (targets != IGNORE_INDEX).sum((1, 2))
        own = counts.clamp(min=1).float()  # (1 + D,)
        total = own if num_items is None else torch.as_tensor(num_items, device=own.device).float().clamp(min=1)
        if total.dim() == 0:
            total = total * own / own[0]
        weights = torch.ones_like(own)
        weights[1:] = self.mtp_loss_weight / max(len(hidden) - 1, 1)
        row_weight = (weights / total).view(-1, 1, 1).expand(targets.shape)  # (1 + D, B, T)
        loss, nll, correct = linear_cross_entropy(
            hidden.flatten(0, 2), self.lm_head.weight, targets.flatten(), row_weight.flatten()
        )
        out.loss = loss + body.balance_loss * (own[0] / total[0])
        out.losses = nll.view_as(targets).sum((1, 2)) / own
        out.accuracies = correct.view_as(targets).sum((1, 2)) / own
        out.targets = counts
        out.balance_loss = body.balance_loss.detach()


def _check_labels(labels: Tensor, tokens: Tensor | None, past_key_values: Cache | None) -> None:
    if past_key_values is not None and past_key_values.get_seq_length() > 0:
        raise ValueError("labels need the whole sequence: leave out past_key_values")
    if tokens is not None and labels.shape != tokens.shape[:2]:
        raise ValueError(f"labels have shape {tuple(labels.shape)}, not {tuple(tokens.shape[:2])} as the tokens")


AutoConfig.register("moonwhale", MoonwhaleConfig)
AutoModel.register(MoonwhaleConfig, MoonwhaleModel)
AutoModelForCausalLM.register(MoonwhaleConfig, MoonwhaleForCausalLM)
for name in ("MoonwhaleModel", "MoonwhaleForCausalLM"):  # DeepSeek's checkpoints store every expert by itself
    register_checkpoint_conversion_mapping(name, get_checkpoint_conversion_mapping("deepseek_v3"), overwrite=True)
