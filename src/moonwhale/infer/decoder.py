"""`Decoder`: the model as inference runs it. It computes the same function over a `LatentCache`, on prepared weights.

Its blocks mirror those of `model/`. Many new tokens (a prompt) *expand* the latents into keys and values. A few new
tokens (a step, or drafts to verify) *absorb* the expansion into the queries and work on latents. Where MoBA chooses
blocks, a step reads only the chosen ones, by a gate on mean latents.

On a CPU a few tokens run through `native`, the same blocks in C++. The code here is then their plain twin.
"""

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from moonwhale.errors import UserError
from moonwhale.infer.cache import LatentCache
from moonwhale.infer.convolution import convolution
from moonwhale.infer.feed_forward import ExpertLayer, GatedNetwork, Pack
from moonwhale.infer.graphs import Graphs
from moonwhale.infer.placement import Placement
from moonwhale.model import MoonwhaleConfig, MoonwhaleForCausalLM
from moonwhale.model.adapters import is_adapted
from moonwhale.model.attention import attend
from moonwhale.model.documents import Documents
from moonwhale.model.mla import MultiheadLatentAttention
from moonwhale.model.moba import moba_attention
from moonwhale.model.moe import MLP
from moonwhale.model.norm import RMSNorm
from moonwhale.model.rope import rotate, rotation_table
from moonwhale.native import build
from moonwhale.native.block import NativeBlock
from moonwhale.native.packed_linear import PackedLinear

# With this many new tokens in a row, expanding latents in PyTorch is faster than absorbing. Shorter rows run natively.
# Such rows never share a forward (see PREFILL_TOKENS), since PyTorch chooses kernels by the number of all rows.
EXPAND_FROM_TOKENS = 129
DRAFT_VOCABULARY = 8192  # drafts are chosen from the first ids: a BPE vocabulary's most frequent tokens


def require_latent_attention(config: MoonwhaleConfig) -> None:
    """Raise a UserError if the model has no latents for the cache to hold."""
    if config.attention != "mla":
        raise UserError(
            f"the engine caches MLA's latents, and this model has attention={config.attention}: generate with "
            "transformers, AutoModelForCausalLM.from_pretrained(FOLDER).generate(...)"
        )


class Decoder:
    """A model's main blocks, head and MTP modules, with weights in the model's dtype or in 8 bits.

    Its outputs equal `MoonwhaleModel`'s up to rounding. They do not depend on what the cache held before, nor on how
    tokens are divided into calls. The decoder keeps no reference to the model.
    """

    def __init__(self, model: MoonwhaleForCausalLM, int8: bool = False):
        require_latent_attention(model.config)
        if any(map(is_adapted, model.modules())):
            raise UserError("the engine reads no adapters: merge them into the model first (peft's merge_and_unload)")
        pack = partial(PackedLinear, int8=int8)
        body, head = model.model, model.lm_head.weight
        self.config = model.config
        self.block_size = model.config.moba_block_size
        self.embedding = body.embed_tokens.weight
        self.conv = None if body.embed_conv is None else body.embed_conv.weight[:, 0].T  # (taps, hidden), newest last
        self.dtype, self.device = self.embedding.dtype, self.embedding.device
        n_positions = self.config.max_position_embeddings + 2 * len(body.mtp_modules) + 1  # drafts exceed the context
        positions = torch.arange(n_positions, device=self.device)[None]
        self.rotations = tuple(table[0, 0] for table in rotation_table(self.config, positions, torch.float32))
        self.main = [DecoderBlock(block, pack) for block in body.main_blocks]
        self.modules = [DecoderMTPModule(module, pack) for module in body.mtp_modules]
        self.norm = DecoderNorm(body.norm)
        self.head = pack(head)
        self.draft_head = pack(head[:DRAFT_VOCABULARY]) if len(head) > 2 * DRAFT_VOCABULARY else self.head
        self.graphs = Graphs(max_length=len(self.modules) + 1) if self.device.type == "cuda" else None

    def cache(self, depth: int | None = None) -> LatentCache:
        """Return an empty cache for the main blocks and the first `depth` MTP modules, by default all of them."""
        return LatentCache(self.config, self.dtype, self.device, depth)

    def place(self, cache: LatentCache, first_slot: int, start: list[int], length: int) -> Placement:
        """Place `length` new tokens behind the `start[i]` tokens of each slot `first_slot + i`."""
        return Placement(cache, self.rotations, first_slot, start, length)

    def run(self, tokens: Tensor, cache: LatentCache, placement: Placement) -> Tensor:
        """Return normed hidden states (B, Q, hidden) of new tokens (B, Q), and write their entries into the cache."""
        return self._step(0, self._main_blocks, (self._embed(tokens, cache, placement), tokens), cache, placement)

    def draft(self, depth: int, hidden: Tensor, ahead: Tensor, cache: LatentCache, placement: Placement) -> Tensor:
        """Run MTP module `depth` (from 1) of the chain. Return normed hidden states (B, Q, hidden) for `draft_head`.

        hidden (B, Q, hidden) comes from `run`, or from the previous module. ahead (B, Q) holds the token that is
        `depth` positions after each position.
        """
        tensors = hidden, F.embedding(ahead, self.embedding)
        return self._step(depth, self.modules[depth - 1], tensors, cache, placement)

    def _embed(self, tokens: Tensor, cache: LatentCache, placement: Placement) -> Tensor:
        """Return the first block's input (B, Q, hidden), as `MoonwhaleModel.convolve` does."""
        x = F.embedding(tokens, self.embedding)
        if self.conv is None:
            return x
        known = cache.tokens.flatten()
        known.index_copy_(0, placement.entry_index, tokens.flatten())
        return x + convolution(lambda entries: F.embedding(known[entries], self.embedding), self.conv, placement)

    def _step(
        self, depth: int, function: Callable[..., Tensor], tensors: tuple, cache: LatentCache, placement: Placement
    ) -> Tensor:
        if self.graphs and self.graphs.serves(placement):
            return self.graphs(depth, function, tensors, cache, placement)
        return function(*tensors, cache, placement)

    def _main_blocks(self, x: Tensor, tokens: Tensor, cache: LatentCache, placement: Placement) -> Tensor:
        for block in self.main:
            x = block(x, cache, placement, tokens)
        return self.norm(x)


class DecoderBlock:
    """One block: the attention and the feed-forward half, each behind its norm and with a residual connection."""

    def __init__(self, block, pack: Pack):
        self.before, self.after = DecoderNorm(block.input_layernorm), DecoderNorm(block.post_attention_layernorm)
        self.attention = DecoderAttention(block.self_attn, pack)
        if isinstance(block.mlp, MLP):
            self.feed_forward = GatedNetwork.of(block.mlp, pack)
        else:
            self.feed_forward = ExpertLayer(block.mlp, pack)
        self.native = None
        if build.supports(self.before.weight):
            fields = self.feed_forward.native_fields()
            self.native = NativeBlock(self.before, vars(self.attention), self.after, fields)

    def __call__(self, x: Tensor, cache: LatentCache, placement: Placement, tokens: Tensor | None = None) -> Tensor:
        """Run the block on x (B, Q, hidden) of new `tokens` (B, Q), which a block with a latent embedding needs."""
        table = self.attention.latent_embedding
        added = None if table is None else F.embedding(tokens, table)  # (B, Q, rank)
        if self.native and placement.length < EXPAND_FROM_TOKENS:
            return self.native(x, cache.of_layer(self.attention.layer), placement.for_native, added)
        x = x + self.attention(self.before(x), cache, placement, added)
        return x + self.feed_forward(self.after(x))


class DecoderMTPModule:
    """One MTP module: it joins the hidden states with the embeddings of later tokens and runs its blocks."""

    def __init__(self, module, pack: Pack):
        self.embedding_norm, self.hidden_norm = DecoderNorm(module.enorm), DecoderNorm(module.hnorm)
        self.join = pack(module.eh_proj.weight)
        self.blocks = [DecoderBlock(block, pack) for block in (module, *module.blocks)]
        self.norm = DecoderNorm(module.shared_head["norm"])

    def __call__(self, hidden: Tensor, ahead: Tensor, cache: LatentCache, placement: Placement) -> Tensor:
        x = self.join(torch.cat([self.embedding_norm(ahead), self.hidden_norm(hidden)], dim=-1))
        for block in self.blocks:
            x = block(x, cache, placement)
        return self.norm(x)


class DecoderNorm:
    """RMSNorm, computed in the dtype of its input and returned in the model's."""

    def __init__(self, norm: RMSNorm):
        self.weight, self.eps = norm.weight, norm.eps

    def __call__(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.weight.shape, self.weight.to(x.dtype), self.eps).to(self.weight.dtype)


class DecoderAttention:
    """`MultiheadLatentAttention` over the latent cache.

    native/step/structures.h lists some of the attributes by name, and says how to add one.
    """

    def __init__(self, m: MultiheadLatentAttention, pack: Pack):
        self.layer, self.heads, self.scale = m.layer_idx, m.heads, m.scale
        self.nope, self.rope, self.rank, self.v = m.nope, m.rope, m.rank, m.v_dim
        self.interleaved, self.block_size, self.topk = m.interleaved, m.block_size, m.topk

        compressed = hasattr(m, "q_a_proj")
        first = m.q_a_proj if compressed else m.q_proj
        self.down = self._joined(first, m.kv_a_proj_with_mqa, pack)
        self.widths = [len(first.weight), self.rank, self.rope]  # of the outputs of `down`
        self.q_norm = DecoderNorm(m.q_a_layernorm) if compressed else None
        self.q_up = pack(m.q_b_proj.weight) if compressed else None

        self.kv_norm = DecoderNorm(m.kv_a_layernorm)
        self.latent_embedding = None if m.latent_embedding is None else m.latent_embedding.weight  # (V, rank)
        self.conv = None if m.key_conv is None else m.key_conv[:, 0].T  # (taps, rank), the newest tap last
        self.taps = 0 if self.conv is None else len(self.conv)
        self.up = m.kv_b_proj.weight  # (heads * (nope + v), rank)
        self.w_k, w_v = m._split_up()  # (heads, nope, rank), (heads, v, rank)
        self.w_v = w_v.transpose(1, 2)  # (heads, rank, v)
        self.out = pack(m.o_proj.weight, m.o_proj.bias)

    @staticmethod
    def _joined(first: torch.nn.Linear, second: torch.nn.Linear, pack: Pack) -> PackedLinear:
        """Make one product of two layers with the same input. A missing bias becomes zeros if the other has one."""
        layers, bias = (first, second), None
        if any(layer.bias is not None for layer in layers):
            bias = torch.cat(
                [layer.weight.new_zeros(len(layer.weight)) if layer.bias is None else layer.bias for layer in layers]
            )
        return pack(torch.cat([layer.weight for layer in layers]), bias)

    def __call__(self, x: Tensor, cache: LatentCache, placement: Placement, added: Tensor | None) -> Tensor:
        """Attend from the new tokens x (B, Q, hidden). `added` (B, Q, rank) is added to their latents."""
        q, latent, k_rope = self.down(x).split_with_sizes(self.widths, dim=-1)
        if self.q_up:
            q = self.q_up(self.q_norm(q))
        q = q.unflatten(-1, (self.heads, -1))  # (B, Q, heads, nope + rope)
        q_nope, q_rope = q.split([self.nope, self.rope], dim=-1)
        rotated = rotate(torch.cat([q_rope, k_rope.unsqueeze(2)], dim=2), placement.rotation, self.interleaved)
        q_rope, k_rope = rotated[:, :, :-1], rotated[:, :, -1]  # (B, Q, heads, rope), (B, Q, rope)
        latent = self.kv_norm(latent)
        self._write_entries(latent if added is None else latent + added, k_rope, cache, placement)
        if placement.length >= EXPAND_FROM_TOKENS:
            out = self._expanded(torch.cat([q_nope, q_rope], dim=-1), cache, placement)
        else:
            out = self._absorbed(q_nope, q_rope, cache, placement)
        return self.out(out)  # (B, Q, hidden)

    def _write_entries(self, latent: Tensor, k_rope: Tensor, cache: LatentCache, placement: Placement) -> None:
        """Write latents (B, Q, rank) and rotary keys (B, Q, rope) into the cache, and the means of full blocks."""
        keys, values, means = cache.of_layer(self.layer)
        if self.conv is not None:
            values.flatten(0, 1).index_copy_(0, placement.entry_index, latent.flatten(0, 1))
            latent = self._convolved(latent, values, placement)
        entries = torch.cat([latent, k_rope], dim=-1)  # (B, Q, rank + rope)
        keys.flatten(0, 1).index_copy_(0, placement.entry_index, entries.flatten(0, 1))
        if means is not None:
            placement.write_means(keys, means)

    def _convolved(self, latent: Tensor, values: Tensor, placement: Placement) -> Tensor:
        """`c + silu(causal depthwise convolution of c)` (arXiv 2511.11571), from the latents c in the cache."""
        known = values.flatten(0, 1)
        return latent + F.silu(convolution(lambda entries: known[entries], self.conv, placement))

    def _expanded(self, q: Tensor, cache: LatentCache, placement: Placement) -> Tensor:
        """Expand latents into every head's keys and values, and attend with q (B, Q, heads, D): (B, Q, heads * v)."""
        keys, values, _ = cache.of_layer(self.layer)
        keys, values = keys[placement.slots, : placement.end], values[placement.slots, : placement.end]
        kv = F.linear(values[..., : self.rank], self.up).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        k_nope, v = kv.split([self.nope, self.v], dim=-1)  # (B, heads, T, nope | v)
        if self.conv is not None:
            k_nope = F.linear(keys[..., : self.rank], self.w_k.flatten(0, 1))
            k_nope = k_nope.unflatten(-1, (self.heads, -1)).transpose(1, 2)
        k_rope = keys[..., self.rank :].unsqueeze(1).expand(-1, self.heads, -1, -1)
        q, k = q.transpose(1, 2), torch.cat([k_nope, k_rope], dim=-1)
        if self.topk:
            documents = Documents.from_inputs(len(keys), placement.end, keys.device, None, None)
            out, _ = moba_attention(q, k, v, self.scale, documents, self.block_size, self.topk)
        else:
            out, _ = attend(q, k, v, self.scale, causal=True)
        return out.transpose(1, 2).flatten(2)

    def _absorbed(self, q_nope: Tensor, q_rope: Tensor, cache: LatentCache, placement: Placement) -> Tensor:
        """Attend to the latents themselves, with W_UK in the queries and W_UV after the softmax: (B, Q, heads * v)."""
        batch, length = q_nope.shape[:2]
        q = q_nope.permute(2, 0, 1, 3).flatten(1, 2) @ self.w_k  # (heads, B * Q, rank)
        q = q.transpose(0, 1).view(batch, length, self.heads, self.rank)
        q = torch.cat([q, q_rope], dim=-1)  # (B, Q, heads, rank + rope)
        chooses = self.topk and placement.end > self.topk * self.block_size
        if chooses and placement.end > self.heads * self.topk * self.block_size:
            latent = self._over_chosen_blocks(q, cache, placement)
        else:
            latent = self._over_all_entries(q, cache, placement, chooses)
        latent = latent.view(batch * length, self.heads, self.rank).transpose(0, 1)
        return (latent @ self.w_v).transpose(0, 1).reshape(batch, length, -1)

    def _over_all_entries(self, q: Tensor, cache: LatentCache, placement: Placement, chooses: bool) -> Tensor:
        """Read every entry once for all heads, for q (B, Q, heads, rank + rope).

        Where MoBA `chooses`, a block's gate is the sum of its scores, and the scores of other blocks are masked.
        """
        end = (placement.full_blocks + 1) * self.block_size if chooses else placement.end
        keys, values, _ = cache.of_layer(self.layer)
        keys, values = keys[placement.slots, :end], values[placement.slots, :end]
        scores = self._scores(q.flatten(1, 2), keys).view(*q.shape[:3], -1)  # (B, Q, heads, end)
        if chooses:
            blocks = scores.view(*q.shape[:3], -1, self.block_size)  # a view, which masks `scores`
            gates = blocks.sum(-1, dtype=torch.promote_types(q.dtype, torch.float32))
            best = self._choose(gates, placement)
            blocks += scores.new_full(blocks.shape[:-1], -torch.inf).scatter_(3, best.indices, 0.0).unsqueeze(4)
            scores[..., placement.end :] = -torch.inf
        if placement.future is not None:
            scores[..., : placement.end].masked_fill_(placement.future, -torch.inf)
        return self._weighted_sum(scores.flatten(1, 2), values)

    def _over_chosen_blocks(self, q: Tensor, cache: LatentCache, placement: Placement) -> Tensor:
        """Read only the blocks that each head chooses, for q (B, Q, heads, rank + rope).

        A block's gate is the product of the query and the block's mean entry.
        """
        keys, values, means = cache.of_layer(self.layer)
        gates = q.float().flatten(1, 2) @ means[placement.slots, : placement.full_blocks + 1].transpose(1, 2)
        best = self._choose(gates.view(*q.shape[:3], -1), placement)  # (B, Q, heads, topk)
        index = (placement.slot_index * means.shape[1] + best.indices.flatten(1)).flatten()
        n_queries = q.shape[0] * q.shape[1] * self.heads

        def gather(entries: Tensor) -> Tensor:
            blocks = entries.view(-1, self.block_size * entries.shape[-1])
            return blocks.index_select(0, index).view(n_queries, -1, entries.shape[-1])

        chosen_keys = gather(keys)  # (B * Q * heads, topk * block_size, rank + rope)
        chosen_values = chosen_keys if values is keys else gather(values)
        missing, own = best.values == -torch.inf, best.indices == placement.own_block
        hidden = missing.unsqueeze(4) | (own.unsqueeze(4) & placement.future_in_own_block)
        scores = self._scores(q.view(n_queries, 1, -1), chosen_keys)
        return self._weighted_sum(scores.masked_fill_(hidden.view(n_queries, 1, -1), -torch.inf), chosen_values)

    def _choose(self, gates: Tensor, placement: Placement) -> torch.return_types.topk:
        """Choose a token's own block and the `topk - 1` earlier blocks of the best gates (B, Q, heads, blocks).

        Returns values and indices (B, Q, heads, topk). A value is -inf where there are too few blocks. `gates` is
        overwritten.
        """
        if placement.future is not None:
            gates.masked_fill_(placement.not_earlier_blocks, -torch.inf)
        gates.scatter_(3, placement.own_block.expand(-1, -1, self.heads, -1), torch.inf)
        return gates.topk(min(self.topk, gates.shape[3]), dim=-1)

    def _scores(self, q: Tensor, keys: Tensor) -> Tensor:
        """Scaled products of q (B, N, D) and keys (B, T, D): (B, N, T)."""
        none = q.new_zeros(())  # not left empty: on MPS, torch up to 2.13 multiplies what is there by beta
        if len(q) == 1:  # the batched product would copy the keys first
            return torch.addmm(none, q[0], keys[0].T, beta=0, alpha=self.scale).unsqueeze(0)
        return torch.baddbmm(none, q, keys.transpose(1, 2), beta=0, alpha=self.scale)

    def _weighted_sum(self, scores: Tensor, values: Tensor) -> Tensor:
        """The softmax of scores (B, N, T) applied to the latents of values (B, T, D): (B, N, rank)."""
        probs = scores.softmax(-1)
        # The product takes the whole width, because a slice of it would be copied first.
        summed = (probs[0] @ values[0]).unsqueeze(0) if len(probs) == 1 else probs @ values
        return summed[..., : self.rank]
