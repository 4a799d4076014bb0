"""The model: embedding, blocks, head, and the chain of MTP modules behind them; its initialisation and its loss."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, PreTrainedModel
from transformers import initialization as init
from transformers.cache_utils import Cache, DynamicCache
from transformers.conversion_mapping import get_checkpoint_conversion_mapping, register_checkpoint_conversion_mapping
from transformers.generation import GenerationMixin
from transformers.utils import ModelOutput

from .block import Block
from .configuration_moonwhale import MoonwhaleConfig
from .documents import Documents
from .loss import IGNORE_INDEX, linear_cross_entropy
from .mla import MultiheadLatentAttention
from .moe import DeepseekMoE, Experts, Router
from .mtp import MTPModule, shifted_labels
from .norm import RMSNorm
from .rope import rotation_table


@dataclass
class MoonwhaleModelOutput(ModelOutput):
    """What the body gives: normed hidden states (B, T, hidden), those of each MTP module, and the summed balance
    losses.
    """

    last_hidden_state: Tensor | None = None
    past_key_values: Cache | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    mtp_hidden_states: tuple[Tensor, ...] | None = None
    balance_loss: Tensor | None = None


@dataclass
class MoonwhaleOutput(ModelOutput):
    """What the model gives. With labels, the parts of the loss; a depth's index is 0 for the main head and k for MTP
    module k.

    loss: 0-d, what to differentiate: main + λ/D Σ MTP + balance.
    losses: (1 + D,) mean cross-entropy in nats of each depth over this batch.
    accuracies: (1 + D,) how often the most likely token was the target.
    targets: (1 + D,) number of targets.
    balance_loss: 0-d, weighted by α.
    logits: (B, T or logits_to_keep, V) of the main head; none while training with labels.
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    past_key_values: Cache | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    losses: Tensor | None = None
    accuracies: Tensor | None = None
    targets: Tensor | None = None
    balance_loss: Tensor | None = None


class MoonwhalePreTrainedModel(PreTrainedModel):
    config: MoonwhaleConfig
    config_class = MoonwhaleConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ("Block", "MTPModule")
    _skip_keys_device_placement = ("past_key_values",)
    # DeepSeek's MTP modules carry copies of the main model's embedding and head.
    _keys_to_ignore_on_load_unexpected = (r"layers\.\d+\.(embed_tokens|shared_head\.head)\.weight",)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Normal of `initializer_range`, but zero where a block writes into the residual stream.

        So a new model passes its embeddings on unchanged, and each block's part grows from nothing: 1 % fewer bits per
        byte after equal time than with normal weights there.
        """
        super()._init_weights(module)
        if getattr(module, "starts_at_zero", False):
            init.zeros_(module.weight)
        std = self.config.initializer_range
        if isinstance(module, RMSNorm):
            init.ones_(module.weight)
        elif isinstance(module, Router):
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
        """Saves experts as stacks, all that a resuming Trainer can read; in the original format, DeepSeek's, singly."""
        super().save_pretrained(save_directory, save_original_format=save_original_format, **kwargs)


class MoonwhaleModel(MoonwhalePreTrainedModel):
    """Embedding and blocks. `layers` holds the main model's blocks and, after them, the MTP modules."""

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
        **_,
    ) -> MoonwhaleModelOutput:
        """Runs T tokens a row, after those already in the cache.

        attention_mask (B, cached + T): 0 for padding. position_ids (B, T): where they restart, a new document begins,
        which sees nothing of the one before; a cache goes on with one sequence a row. `with_mtp` runs the MTP modules
        too, which have no cache.

        Raises:
            ValueError: neither or both of input_ids and inputs_embeds, or a mask of another shape.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give exactly one of input_ids and inputs_embeds")
        x = self.embed(input_ids) if inputs_embeds is None else _as_computed(inputs_embeds)
        if use_cache is None:
            use_cache = self.config.use_cache and not self.training
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        past = past_key_values.get_seq_length() if past_key_values is not None else 0
        batch, length, _ = x.shape
        if documents is None:
            documents = Documents.from_inputs(
                batch, past + length, x.device, attention_mask, None if past else position_ids
            )
        if position_ids is None:
            position_ids = documents.positions[:, past:]
        table = rotation_table(self.config, position_ids, x.dtype)

        embeds, balance, seen = x, x.new_zeros((), dtype=torch.float32), []
        for block in self.main_blocks:
            seen.append(x)
            x, balance = self.run([block], x, balance, table, documents, past_key_values)
        x = self.norm(x)
        mtp, balance = self.run_mtp(x, embeds, balance, table, documents) if with_mtp else ((), balance)
        return MoonwhaleModelOutput(
            last_hidden_state=x,
            past_key_values=past_key_values,
            hidden_states=(*seen, x) if output_hidden_states else None,
            mtp_hidden_states=mtp,
            balance_loss=balance,
        )

    # What a forward pass is made of, for those who cut it into stages

    def embed(self, input_ids: Tensor) -> Tensor:
        """(B, T) to (B, T, hidden), in the precision of the blocks."""
        return _as_computed(self.embed_tokens(input_ids))

    def run(self, blocks, x: Tensor, balance: Tensor, table, documents: Documents, cache=None) -> tuple[Tensor, Tensor]:
        """x (B, T, hidden) through some main blocks, whose balance losses are added to `balance` (0-d)."""
        for block in blocks:
            x, stats = block(x, table, documents, cache)
            balance = self._collect([block], [stats], balance)
        return x, balance

    def run_mtp(
        self, hidden: Tensor, embeds: Tensor, balance: Tensor, table, documents: Documents
    ) -> tuple[tuple[Tensor, ...], Tensor]:
        """The chain of MTP modules from the main model's normed output and the embeddings, both (B, T, hidden).

        Returns:
            each module's normed output; `balance` with their balance losses added.
        """
        outputs = []
        for k, module in enumerate(self.mtp_modules, start=1):
            hidden, stats = module(hidden, embeds.roll(-k, dims=1), table, documents.with_successor(k))
            balance = self._collect([module, *module.blocks], stats, balance)
            outputs.append(hidden)
        return tuple(outputs), balance

    def _collect(self, blocks, stats, balance: Tensor) -> Tensor:
        for block, measured in zip(blocks, stats, strict=True):
            if self.training:
                block.collect(measured)
            if measured.balance is not None:
                balance = balance + measured.balance
        return balance


def _as_computed(embeds: Tensor) -> Tensor:
    """Under autocast the residual stream has the precision of the products, too."""
    kind = embeds.device.type
    return embeds.to(torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else embeds


class MoonwhaleForCausalLM(MoonwhalePreTrainedModel, GenerationMixin):
    """The language model. With MoBA and MTP off, its weights are those of a `DeepseekV3ForCausalLM`, name by name."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012 (the base class wants a plain dict)

    def __init__(self, config: MoonwhaleConfig):
        super().__init__(config)
        self.model = MoonwhaleModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.mtp_loss_weight = config.mtp_loss_weight  # λ, which a schedule may lower (V3 §4.2: 0.3, then 0.1)
        # DDP would overwrite every rank's own statistics with rank 0's.
        self._ddp_params_and_buffers_to_ignore = [
            n for n, _ in self.named_buffers() if n.endswith(("max_logit", "load"))
        ]
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
        **kwargs,
    ) -> MoonwhaleOutput:
        """Logits of (B, T) tokens; with `labels` (B, T), shifted here and -100 where there is none, the loss and its
        parts too.

        num_items_in_batch: targets of the whole optimizer step when this is one of its micro-batches, (1 + D,) for each
        depth; the sum over micro-batches is then the loss of the large batch. One number counts the main head's alone,
        and gives the micro-batch the same share of every depth.

        While training with labels no logits are returned: they are made and dropped a chunk at a time.
        """
        documents = None
        if labels is not None:
            if past_key_values is not None and past_key_values.get_seq_length() > 0:
                raise ValueError("labels need the whole sequence: leave out past_key_values")
            given = input_ids if inputs_embeds is None else inputs_embeds
            if given is not None and labels.shape != given.shape[:2]:
                raise ValueError(f"labels have shape {tuple(labels.shape)}, not {tuple(given.shape[:2])} as the tokens")
            documents = Documents.from_inputs(*labels.shape, labels.device, attention_mask, position_ids)
        body = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache if labels is None else False,
            documents=documents,
            with_mtp=labels is not None,
            **kwargs,
        )
        out = MoonwhaleOutput(past_key_values=body.past_key_values, hidden_states=body.hidden_states)
        if labels is not None:
            self.add_loss(out, body, labels, documents, num_items_in_batch)
        if labels is None or not self.training:
            keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
            out.logits = self.lm_head(body.last_hidden_state[:, keep])
        return out

    def add_loss(
        self, out: MoonwhaleOutput, body: MoonwhaleModelOutput, labels: Tensor, documents: Documents, num_items
    ) -> None:
        """Fills in main + λ/D Σ_k MTP_k + balance (V3 eq. 24-25), all heads in one chunked cross-entropy.

        `body` needs its hidden states and balance loss; for the rest see `forward`.
        """
        hidden = torch.stack([body.last_hidden_state, *body.mtp_hidden_states])
        targets = torch.stack([shifted_labels(labels, documents, depth) for depth in range(len(hidden))])
        counts = (targets != IGNORE_INDEX).sum((1, 2))
        own = counts.clamp(min=1).float()
        total = own if num_items is None else torch.as_tensor(num_items, device=own.device).float().clamp(min=1)
        if total.dim() == 0:
            total = total * own / own[0]
        weights = torch.ones_like(own)
        weights[1:] = self.mtp_loss_weight / max(len(hidden) - 1, 1)
        row_weight = (weights / total).view(-1, 1, 1).expand(targets.shape)
        loss, nll, correct = linear_cross_entropy(
            hidden.flatten(0, 2), self.lm_head.weight, targets.flatten(), row_weight.flatten()
        )
        out.loss = loss + body.balance_loss * (own[0] / total[0])
        out.losses = nll.view_as(targets).sum((1, 2)) / own
        out.accuracies = correct.view_as(targets).sum((1, 2)) / own
        out.targets = counts
        out.balance_loss = body.balance_loss.detach()


AutoConfig.register("moonwhale", MoonwhaleConfig)
AutoModel.register(MoonwhaleConfig, MoonwhaleModel)
AutoModelForCausalLM.register(MoonwhaleConfig, MoonwhaleForCausalLM)
for name in ("MoonwhaleModel", "MoonwhaleForCausalLM"):  # DeepSeek's checkpoints hold every expert by itself
    register_checkpoint_conversion_mapping(name, get_checkpoint_conversion_mapping("deepseek_v3"), overwrite=True)

__all__ = ["MoonwhaleForCausalLM", "MoonwhaleModel"]
