"""The model as inference runs it: the same function on weights laid out once, over a `LatentCache`.

Block by block it is `model/`'s twin: many new tokens (a prompt) *expand* latents into keys and values, few (a step,
drafts to verify) *absorb* the expansion into queries and work on latents. Where MoBA chooses blocks, a step reads those
and no others, by a gate on mean latents.

On a CPU few tokens go through `native` instead, the same once more in C++: what is here is then its naive twin.
"""

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from moonwhale.infer.cache import LatentCache
from moonwhale.infer.feed_forward import Experts, Network
from moonwhale.infer.graphs import Graphs
from moonwhale.infer.native_block import NativeBlock
from moonwhale.infer.placement import Placement
from moonwhale.model import MoonwhaleForCausalLM
from moonwhale.model.attention import attend
from moonwhale.model.documents import Documents
from moonwhale.model.mla import MultiheadLatentAttention
from moonwhale.model.moba import moba_attention
from moonwhale.model.moe import MLP
from moonwhale.model.norm import RMSNorm
from moonwhale.model.rope import rotate, rotation_table
from moonwhale.native import bindings
from moonwhale.native.packed_linear import Linear

MANY = 64  # new tokens of a row from which expanding latents is cheaper than absorbing
FEW = 256  # tokens up to which the compiled blocks are the faster
SHORTLIST = 8192  # tokens a draft is chosen from: the first ids of a BPE vocabulary are its most frequent ones


class Decoder:
    """A model's main blocks, head and MTP modules, in the dtype of its weights, or with weights of 8 bits.

    What it returns is `MoonwhaleModel`'s up to rounding, whatever the cache held before and however tokens are cut into
    spans. It keeps no reference to the model.
    """

    def __init__(self, model: MoonwhaleForCausalLM, int8: bool = False):
        prepare = partial(Linear, int8=int8)
        body, head = model.model, model.lm_head.weight
        self.config = model.config
        self.size = model.config.moba_block_size
        self.embedding = body.embed_tokens.weight
        self.dtype, self.device = self.embedding.dtype, self.embedding.device
        reach = (
            self.config.max_position_embeddings + 2 * len(body.mtp_modules) + 1
        )  # drafts may look beyond the context
        positions = torch.arange(reach, device=self.device)[None]
        self.rotation = tuple(table[0, 0] for table in rotation_table(self.config, positions, torch.float32))
        self.main = [_Block(block, prepare) for block in body.main_blocks]
        self.modules = [_Module(module, prepare) for module in body.mtp_modules]
        self.norm = _Norm(body.norm)
        self.head = prepare(head)
        self.draft_head = prepare(head[:SHORTLIST]) if len(head) > 2 * SHORTLIST else self.head
        self.graphs = Graphs(longest=len(self.modules) + 1) if self.device.type == "cuda" else None

    def cache(self) -> LatentCache:
        return LatentCache(self.config, self.dtype, self.device)

    def span(self, cache: LatentCache, first: int, start: list[int], length: int) -> Placement:
        return Placement(self.size, self.rotation, cache, first, start, length)

    def run(self, tokens: Tensor, cache: LatentCache, placement: Placement) -> Tensor:
        """The normed hidden states (B, Q, hidden) of new tokens (B, Q), whose entries go into the cache."""
        return self._step(self._main_blocks, (F.embedding(tokens, self.embedding),), cache, placement)

    def guess(self, depth: int, hidden: Tensor, ahead: Tensor, cache: LatentCache, placement: Placement) -> Tensor:
        """MTP module `depth` (from 1) of the chain: its normed hidden states (B, Q, hidden), for `draft_head`.

        hidden (B, Q, hidden) is `run`'s, or the module's before; ahead (B, Q) are the tokens `depth` after each
        position.
        """
        return self._step(self.modules[depth - 1], (hidden, F.embedding(ahead, self.embedding)), cache, placement)

    def _step(
        self, function: Callable[..., Tensor], tensors: tuple, cache: LatentCache, placement: Placement
    ) -> Tensor:
        if self.graphs and self.graphs.serve(placement):
            return self.graphs(function, tensors, cache, placement)
        return function(*tensors, cache, placement)

    def _main_blocks(self, x: Tensor, cache: LatentCache, placement: Placement) -> Tensor:
        for block in self.main:
            x = block(x, cache, placement)
        return self.norm(x)


class _Block:
    def __init__(self, block, prepare):
        self.before, self.after = _Norm(block.input_layernorm), _Norm(block.post_attention_layernorm)
        self.attention = _Attention(block.self_attn, prepare)
        self.feed_forward = (Network.of if isinstance(block.mlp, MLP) else Experts)(block.mlp, prepare)
        self.native = NativeBlock(self) if bindings.serves(self.before.weight) else None

    def __call__(self, x: Tensor, cache: LatentCache, placement: Placement) -> Tensor:
        if self.native and placement.length < MANY and placement.tokens <= FEW:
            return self.native(x, cache, placement)
        x = x + self.attention(self.before(x), cache, placement)
        return x + self.feed_forward(self.after(x))


class _Module:
    def __init__(self, module, prepare):
        self.norms = _Norm(module.enorm), _Norm(module.hnorm)
        self.join = prepare(module.eh_proj.weight)
        self.blocks = [_Block(block, prepare) for block in (module, *module.blocks)]
        self.norm = _Norm(module.shared_head["norm"])

    def __call__(self, hidden: Tensor, ahead: Tensor, cache: LatentCache, placement: Placement) -> Tensor:
        x = self.join(torch.cat([self.norms[0](ahead), self.norms[1](hidden)], dim=-1))
        for block in self.blocks:
            x = block(x, cache, placement)
        return self.norm(x)


class _Norm:
    def __init__(self, norm: RMSNorm):
        self.weight, self.eps = norm.weight, norm.eps

    def __call__(self, x: Tensor) -> Tensor:
        """In the dtype of x, back in the model's."""
        return F.rms_norm(x, self.weight.shape, self.weight.to(x.dtype), self.eps).to(self.weight.dtype)


class _Attention:
    """`MultiheadLatentAttention`, after whose names its parts are called."""

    def __init__(self, m: MultiheadLatentAttention, prepare):
        self.layer, self.heads, self.scale = m.layer_idx, m.heads, m.scale
        self.nope, self.rope, self.rank, self.interleaved = m.nope, m.rope, m.rank, m.interleaved
        self.size, self.topk = m.block_size, m.topk
        compressed = hasattr(m, "q_a_proj")
        first = m.q_a_proj if compressed else m.q_proj
        down = (first, m.kv_a_proj_with_mqa)
        bias = None
        if any(part.bias is not None for part in down):
            bias = torch.cat([p.weight.new_zeros(len(p.weight)) if p.bias is None else p.bias for p in down])
        self.down = prepare(torch.cat([part.weight for part in down]), bias)
        self.widths = [len(first.weight), self.rank, self.rope]
        self.q_norm, self.q_up = (_Norm(m.q_a_layernorm), prepare(m.q_b_proj.weight)) if compressed else (None, None)
        self.kv_norm, self.key_conv = _Norm(m.kv_a_layernorm), m.key_conv
        self.up = m.kv_b_proj.weight
        self.w_k, w_v = m._split_up()  # (heads, nope | v, rank)
        self.w_v = w_v.transpose(1, 2)  # (heads, rank, v)
        self.out = prepare(m.o_proj.weight, m.o_proj.bias)

    def __call__(self, x: Tensor, cache: LatentCache, placement: Placement) -> Tensor:
        q, latent, k_rope = self.down(x).split_with_sizes(self.widths, dim=-1)
        if self.q_up:
            q = self.q_up(self.q_norm(q))
        q_nope, q_rope = q.unflatten(-1, (self.heads, -1)).split([self.nope, self.rope], dim=-1)
        rotated = rotate(torch.cat([q_rope, k_rope.unsqueeze(2)], dim=2), placement.rotation, self.interleaved)
        q_rope, k_rope = rotated[:, :, :-1], rotated[:, :, -1]
        self._remember(self.kv_norm(latent), k_rope, cache, placement)
        if placement.length >= MANY:
            out = self._expanded(torch.cat([q_nope, q_rope], dim=-1), cache, placement)
        else:
            out = self._absorbed(q_nope, q_rope, cache, placement)
        return self.out(out)

    def _remember(self, latent: Tensor, k_rope: Tensor, cache: LatentCache, placement: Placement) -> None:
        keys, values, means = cache.keys[self.layer], cache.values[self.layer], cache.means[self.layer]
        if self.key_conv is not None:
            values.flatten(0, 1).index_copy_(0, placement.place, latent.flatten(0, 1))
            latent = self._convolved(latent, values, placement)
        keys.flatten(0, 1).index_copy_(0, placement.place, torch.cat([latent, k_rope], dim=-1).flatten(0, 1))
        if means is not None:
            placement.average(keys, means)

    def _convolved(self, latent: Tensor, values: Tensor, placement: Placement) -> Tensor:
        """`c + silu(causal depthwise convolution of c)` (arXiv 2511.11571), from the latents remembered."""
        mixed = 0.0
        for back in range(self.key_conv.shape[-1]):
            tap = values.flatten(0, 1)[(placement.place - back).clamp(min=0)].view_as(latent)
            inside = (placement.positions >= back).unsqueeze(-1)
            mixed = mixed + torch.where(inside, tap, 0.0) * self.key_conv[:, 0, -1 - back].to(latent.dtype)
        return latent + F.silu(mixed)

    def _expanded(self, q: Tensor, cache: LatentCache, placement: Placement) -> Tensor:
        """q (B, Q, heads, D) over the keys and values of every head; (B, Q, heads * v)."""
        keys, values = (x[self.layer][placement.slots, : placement.end] for x in (cache.keys, cache.values))
        nope = len(self.w_k[0])
        v = F.linear(values[..., : self.rank], self.up).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        k_nope, v = v.split([nope, v.shape[-1] - nope], dim=-1)
        if self.key_conv is not None:
            up = self.w_k.flatten(0, 1)
            k_nope = F.linear(keys[..., : self.rank], up).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        k_rope = keys[..., self.rank :].unsqueeze(1).expand(-1, self.heads, -1, -1)
        q, k = q.transpose(1, 2), torch.cat([k_nope, k_rope], dim=-1)
        if self.topk:
            documents = Documents.from_inputs(len(keys), placement.end, keys.device, None, None)
            out, _ = moba_attention(q, k, v, self.scale, documents, self.size, self.topk)
        else:
            out, _ = attend(q, k, v, self.scale, causal=True)
        return out.transpose(1, 2).flatten(2)

    def _absorbed(self, q_nope: Tensor, q_rope: Tensor, cache: LatentCache, placement: Placement) -> Tensor:
        """Scores and sums of latents; (B, Q, heads * v)."""
        batch, length = q_nope.shape[:2]
        q = q_nope.permute(2, 0, 1, 3).flatten(1, 2) @ self.w_k  # (heads, B * Q, rank)
        q = torch.cat([q.transpose(0, 1).view(batch, length, self.heads, self.rank), q_rope], dim=-1)
        chooses = self.topk and placement.end > self.topk * self.size
        if chooses and placement.end > self.heads * self.topk * self.size:
            latent = self._of_chosen(q, cache, placement)
        else:
            latent = self._of_all(q, cache, placement, chooses)
        latent = latent.view(batch * length, self.heads, self.rank).transpose(0, 1)
        return (latent @ self.w_v).transpose(0, 1).reshape(batch, length, -1)

    def _of_all(self, q: Tensor, cache: LatentCache, placement: Placement, chooses: bool) -> Tensor:
        """Reads every entry, once for all heads; where MoBA `chooses`, a block's gate is the sum of its scores, and
        only those of the chosen ones count.
        """
        end = (placement.full + 1) * self.size if chooses else placement.end
        keys, values = (x[self.layer][placement.slots, :end] for x in (cache.keys, cache.values))
        scores = self._scores(q.flatten(1, 2), keys).view(*q.shape[:3], -1)
        if chooses:
            blocks = scores.view(*q.shape[:3], -1, self.size)
            best = self._choose(blocks.sum(-1, dtype=torch.promote_types(q.dtype, torch.float32)), placement)
            blocks += scores.new_full(blocks.shape[:-1], -torch.inf).scatter_(3, best.indices, 0.0).unsqueeze(4)
            scores[..., placement.end :] = -torch.inf
        if placement.future is not None:
            scores[..., : placement.end].masked_fill_(placement.future, -torch.inf)
        return self._sum(scores.flatten(1, 2), values)

    def _of_chosen(self, q: Tensor, cache: LatentCache, placement: Placement) -> Tensor:
        """Reads the chosen blocks and no others, for each head its own. A block's gate is the query's product with its
        mean entry.
        """
        keys, values, means = (x[self.layer] for x in (cache.keys, cache.values, cache.means))
        gates = q.float().flatten(1, 2) @ means[placement.slots, : placement.full + 1].transpose(1, 2)
        best = self._choose(gates.view(*q.shape[:3], -1), placement)
        index = (placement.slot * means.shape[1] + best.indices.flatten(1)).flatten()
        queries = q.shape[0] * q.shape[1] * self.heads
        taken = [
            x.view(-1, self.size * x.shape[-1]).index_select(0, index).view(queries, -1, x.shape[-1])
            for x in ([keys] if values is keys else [keys, values])
        ]
        missing, own = best.values == -torch.inf, best.indices == placement.own
        hidden = missing.unsqueeze(4) | (own.unsqueeze(4) & placement.behind)
        scores = self._scores(q.view(queries, 1, -1), taken[0]).masked_fill_(hidden.view(queries, 1, -1), -torch.inf)
        return self._sum(scores, taken[-1])

    def _choose(self, gates: Tensor, placement: Placement) -> torch.return_types.topk:
        """The own block and the `topk - 1` earlier ones of the best gates (B, Q, heads, blocks): values and indices,
        (B, Q, heads, topk) each. The value is -inf where there are fewer. `gates` is written over.
        """
        if placement.future is not None:
            gates.masked_fill_(placement.not_earlier, -torch.inf)
        gates.scatter_(3, placement.own.expand(-1, -1, self.heads, -1), torch.inf)
        return gates.topk(min(self.topk, gates.shape[3]), dim=-1)

    def _scores(self, q: Tensor, keys: Tensor) -> Tensor:
        if len(q) == 1:  # a batch of one: the product for batches would copy the keys first
            return torch.addmm(q.new_empty(()), q[0], keys[0].T, beta=0, alpha=self.scale).unsqueeze(0)
        return torch.baddbmm(q.new_empty(()), q, keys.transpose(1, 2), beta=0, alpha=self.scale)

    def _sum(self, scores: Tensor, values: Tensor) -> Tensor:
        probs = scores.softmax(-1)
        # Over the whole width: a slice of it would be copied first.
        summed = (probs[0] @ values[0]).unsqueeze(0) if len(probs) == 1 else probs @ values
        return summed[..., : self.rank]
