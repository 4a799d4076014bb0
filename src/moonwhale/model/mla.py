"""Multi-head Latent Attention with decoupled RoPE (DeepSeek-V2 §2.1), full or over MoBA's blocks.

Each token has one compressed latent c, from which every head's content key and value are computed, and one small rotary
key, which all heads share. Only these two are cached. Training and prefill *expand* the latent into keys and values.
Decoding *absorbs* the expansion into the queries and works on latents. Both give the same numbers.

infer/decoder.py and native/step repeat this for serving. What a new field needs there is listed in
native/step/structures.h.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.cache_utils import Cache

from .adapters import effective_weight
from .configuration_moonwhale import MoonwhaleConfig
from .convolution import depthwise_convolution
from .core import Attention, attend_to_documents, scale_rows_, seen_keys, softmax_weights
from .documents import Documents
from .moba import moba_gates
from .norm import RMSNorm
from .rope import rotate


class Logits(NamedTuple):
    """Every logit between T tokens. A logit is the sum of its two parts."""

    content: Tensor  # (B, heads, T, T) scaled products of the content queries and keys, in fp32
    rotary: Tensor  # (B, heads, T, T) scaled products of the rotary ones, in fp32
    mask: Tensor  # (B, heads, T, T) which logits the softmax sees
    gates: Tensor | None  # (B, heads, T, blocks) MoBA's gates in fp32, see `moba_gates`; None in full attention


class MultiheadLatentAttention(Attention):
    """The attention of one block. Parameters are named as in DeepSeek-V3's checkpoints.

    It can be a part of any module: `config` is a MoonwhaleConfig, or has its fields about attention, and x alone is
    enough for `forward`. Weights start as `nn.Linear`'s do.
    """

    def __init__(self, config: MoonwhaleConfig, layer_idx: int = 0):
        super().__init__(config, layer_idx)
        self.nope, self.rope, self.v_dim = config.qk_nope_head_dim, config.qk_rope_head_dim, config.v_head_dim
        self.rank = config.kv_lora_rank

        hidden, bias, q_width = config.hidden_size, config.attention_bias, self.heads * (self.nope + self.rope)
        # ε of the latents' norms is 1e-6 whatever rms_norm_eps says, as in DeepSeek-V3
        if config.q_lora_rank is None:
            self.q_proj = nn.Linear(hidden, q_width, bias=False)
        else:
            self.q_a_proj = nn.Linear(hidden, config.q_lora_rank, bias=bias)
            self.q_a_layernorm = RMSNorm(config.q_lora_rank)
            self.q_b_proj = nn.Linear(config.q_lora_rank, q_width, bias=False)
        self.kv_a_proj_with_mqa = nn.Linear(hidden, self.rank + self.rope, bias=bias)
        self.kv_a_layernorm = RMSNorm(self.rank)
        self.kv_b_proj = nn.Linear(self.rank, self.heads * (self.nope + self.v_dim), bias=False)
        self.o_proj = nn.Linear(self.heads * self.v_dim, hidden, bias=bias)
        self.o_proj.starts_at_zero = config.zero_init_residual  # read by `MoonwhalePreTrainedModel._init_weights`
        self.latent_embedding = None
        if config.has_latent_embedding(layer_idx):
            self.latent_embedding = nn.Embedding(config.vocab_size, self.rank)
            self.latent_embedding.starts_at_zero = True  # as no embedding at all
        # (rank, 1, width), the newest tap last. It is initialised to zero, so it starts as no convolution at all.
        self.key_conv = nn.Parameter(torch.zeros(self.rank, 1, config.moba_key_conv)) if config.moba_key_conv else None

    def forward(
        self,
        x: Tensor,
        rotation: tuple[Tensor, Tensor] | None = None,
        documents: Documents | None = None,
        cache: Cache | None = None,
        output_attentions: bool = False,
        collect_statistics: bool | None = None,
        input_ids: Tensor | None = None,
    ) -> tuple[Tensor | None, ...]:
        """Attend from the newest Tq tokens to all Tk tokens.

        Args:
            x: (B, Tq, hidden) the newest tokens.
            rotation: cosines and sines of their positions, from `rotation_table`. None: of those in `documents`.
            documents: describes all Tk tokens. None: each row is one document, its cached tokens and x.
            cache: a transformers cache. Of this layer it holds latents (B, 1, Tk, rank) and rotary keys
                (B, 1, Tk, rope).
            output_attentions: whether to return the softmax's weights too. This takes memory for all of them.
            collect_statistics: whether the pass counts in `max_logit`. None: if gradients are enabled.
            input_ids: (B, Tq) the newest tokens, which a block with a latent embedding needs.

        Returns:
            (B, Tq, hidden), and each head's largest scaled logit (heads,), or None when decoding from a cache; then the
            weights (B, heads, Tq, Tk), if asked for.
        """
        rotation, documents = self.with_defaults(x, rotation, documents, cache)
        q_nope, q_rope, latent, k_rope = self._project(x, rotation, input_ids)
        if cache is not None:
            n_tokens = documents.document_ids.shape[1]  # a static cache returns its unused end too
            latent, k_rope = (x[:, :, :n_tokens] for x in cache.update(latent, k_rope, self.layer_idx))

        weights, every_token_is_a_query = (), latent.shape[2] == x.shape[1]
        if every_token_is_a_query and not output_attentions:
            out, max_logit = self._expanded(torch.cat([q_nope, q_rope], dim=-1), latent, k_rope, documents)
        else:
            out, probs, max_logit = self._absorbed(q_nope, q_rope, latent, k_rope, documents)
            weights = (probs,) if output_attentions else ()
        return *self._output(out, max_logit, documents, collect_statistics), *weights

    def logits(
        self, x: Tensor, rotation: tuple[Tensor, Tensor], documents: Documents, input_ids: Tensor | None = None
    ) -> Logits:
        """Return every logit of x (B, T, hidden), in its two parts.

        This is for inspection. The forward pass never has all of them.
        """
        content, rotary = self._parts(*self._project(x, rotation, input_ids), documents)
        products = content + rotary
        gates = moba_gates(products, documents, self.block_size) if self.topk else None
        mask = seen_keys(products, documents, self.block_size, self.topk).expand_as(products)
        return Logits(content.float() * self.scale, rotary.float() * self.scale, mask, gates)

    def _project(
        self, x: Tensor, rotation: tuple[Tensor, Tensor], input_ids: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return the queries' two parts (B, heads, T, nope) and (B, heads, T, rope), the latents (B, 1, T, rank), and
        the rotary keys (B, 1, T, rope).

        A latent is c = RMSNorm(W^DKV x), and where the block has `latent_embedding`, the token's row of it is added.
        Keys and values get it alike, and the cache holds the sum, so that decoding never looks a token up again.

        Raises:
            ValueError: the block has `latent_embedding`, and there are no `input_ids`.
        """
        q_nope, q_rope = self._queries(x).split([self.nope, self.rope], dim=-1)
        latent, k_rope = self.kv_a_proj_with_mqa(x).split([self.rank, self.rope], dim=-1)
        q_rope = rotate(q_rope, rotation, self.interleaved)
        k_rope = rotate(k_rope.unsqueeze(1), rotation, self.interleaved)
        latent = self.kv_a_layernorm(latent)
        if self.latent_embedding is not None:
            if input_ids is None:
                raise ValueError("give input_ids: latent_embedding_every looks tokens up, which inputs_embeds are not")
            latent = latent + self.latent_embedding(input_ids).to(latent.dtype)
        return q_nope, q_rope, latent.unsqueeze(1), k_rope

    def _queries(self, x: Tensor) -> Tensor:
        q = self.q_b_proj(self.q_a_layernorm(self.q_a_proj(x))) if hasattr(self, "q_a_proj") else self.q_proj(x)
        return self._by_head(q)

    def _expanded(self, q: Tensor, latent: Tensor, k_rope: Tensor, documents: Documents) -> tuple[Tensor, Tensor]:
        """Expand the latents into every head's keys and values. This is cheaper when every token is a query.

        Returns:
            out (B, heads, T, v), and the largest scaled logit of each query (B, heads, T).
        """
        k_nope, v = self._by_head(self.kv_b_proj(latent.squeeze(1))).split([self.nope, self.v_dim], dim=-1)
        if self.key_conv is not None:
            documents.check_unbroken()
            w_k = self._split_up()[0].flatten(0, 1)
            k_nope = self._by_head(F.linear(self._convolved(latent, documents).squeeze(1), w_k))
        k = torch.cat([k_nope, k_rope.expand(-1, self.heads, -1, -1)], dim=-1)  # (B, heads, T, nope + rope)
        return attend_to_documents(q, k, v, self.scale, documents, self.block_size, self.topk)

    def _absorbed(
        self, q_nope: Tensor, q_rope: Tensor, latent: Tensor, k_rope: Tensor, documents: Documents
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Score and sum the latents themselves. W_UK moves to the query and W_UV behind the softmax, so that no key or
        value is expanded.

        Returns:
            out (B, heads, Tq, v), the softmax's weights (B, heads, Tq, Tk), and the largest scaled logit of each query
            (B, heads, Tq).
        """
        content, rotary = self._parts(q_nope, q_rope, latent, k_rope, documents)
        products = content + rotary
        w_v = self._split_up()[1].to(latent.dtype)  # (heads, v, rank)
        mask = seen_keys(products, documents, self.block_size, self.topk)
        probs, max_logit = softmax_weights(products, mask, self.scale)
        return probs @ latent @ w_v.transpose(-1, -2), probs, max_logit

    def _parts(
        self, q_nope: Tensor, q_rope: Tensor, latent: Tensor, k_rope: Tensor, documents: Documents
    ) -> tuple[Tensor, Tensor]:
        """Return the two summands of q·k, of content and of position, (B, heads, Tq, Tk) each."""
        w_k = self._split_up()[0].to(q_nope.dtype)  # (heads, nope, rank)
        key_latent = latent
        if self.key_conv is not None:
            documents.check_unbroken()
            key_latent = self._convolved(latent, documents)
        return (q_nope @ w_k) @ key_latent.transpose(-1, -2), q_rope @ k_rope.transpose(-1, -2)

    def _by_head(self, x: Tensor) -> Tensor:
        """Reshape (B, T, heads * width) to (B, heads, T, width)."""
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)

    def _split_up(self) -> tuple[Tensor, Tensor]:
        """Return W_UK (heads, nope, rank) and W_UV (heads, v, rank), the rows of `kv_b_proj`."""
        return effective_weight(self.kv_b_proj).unflatten(0, (self.heads, -1)).split([self.nope, self.v_dim], dim=1)

    def _convolved(self, latent: Tensor, documents: Documents) -> Tensor:
        """Return the latents that keys are computed from: c + silu(conv(c)), with a causal depthwise convolution within
        each document (arXiv 2511.11571).

        Values are computed from the plain latent. The cache holds the plain latent too, so this is recomputed when the
        cache is read.
        """
        c = latent.squeeze(1)  # (B, T, rank)
        return (c + F.silu(depthwise_convolution(c, self.key_conv, documents.positions))).unsqueeze(1)

    @torch.no_grad()
    def clip_qk_(self, tau: float) -> Tensor:
        """Apply QK-Clip (Kimi K2, §2.1): shrink the heads whose `max_logit` exceeds tau.

        With γ = min(1, tau / max_logit), a head's rows of W_UQ and of W_UK are multiplied by √γ and its rows of W_QR by
        γ. Both parts of its logits shrink by γ, and the same batch would just reach tau. The shared rotary key and the
        values stay as they are: the former belongs to no single head, and the latter are in no logit.

        Nothing happens if one of these weights is frozen: under LoRA they belong to the base model.

        Returns:
            the number of clipped heads, a 0-d tensor.
        """
        query = self.q_b_proj if hasattr(self, "q_b_proj") else self.q_proj
        if not (query.weight.requires_grad and self.kv_b_proj.weight.requires_grad):
            return torch.zeros((), dtype=torch.long, device=self.max_logit.device)
        above = self.max_logit > tau
        gamma = torch.where(above, tau / self.max_logit, 1.0).to(self.kv_b_proj.weight.dtype)[:, None]
        root = gamma.sqrt().expand(-1, self.nope)
        scale_rows_(query.weight, torch.cat([root, gamma.expand(-1, self.rope)], dim=1))
        scale_rows_(self.kv_b_proj.weight, torch.cat([root, gamma.new_ones(self.heads, self.v_dim)], dim=1))
        return above.sum()
