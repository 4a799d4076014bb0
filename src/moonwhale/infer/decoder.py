"""The model as inference runs it: the same function on weights laid out once, with few operations a token.

`model/` is written to be read and trained; a step of one token there spends most of its time between operations. This
is its twin over a `LatentCache`, block by block: many new tokens (a prompt) *expand* latents into keys and values, few
(a step, drafts to verify) *absorb* the expansion into queries and work on latents. Where MoBA chooses blocks, a step
reads those and no others, by a gate on mean latents.
"""

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from moonwhale.infer.cache import LatentCache
from moonwhale.infer.linear import linear
from moonwhale.model import MoonwhaleForCausalLM
from moonwhale.model.attention import attend
from moonwhale.model.layout import Layout
from moonwhale.model.mla import MultiheadLatentAttention
from moonwhale.model.moba import moba_attention
from moonwhale.model.moe import MLP, DeepseekMoE
from moonwhale.model.norm import RMSNorm
from moonwhale.model.rope import rotate, rotation_table

MANY = 32  # new tokens of a row from which expanding latents is cheaper than absorbing
SHORTLIST = 8192  # tokens a draft is chosen from: the first ids of a BPE vocabulary are its most frequent ones

Product = Callable[[Tensor], Tensor]


class Span:
    """Where Q new tokens of each of B sequences go: sequence i sits in slot `first + i` and has `start[i]` tokens."""

    def __init__(
        self, size: int, rotation: tuple[Tensor, Tensor], cache: LatentCache, first: int, start: list[int], length: int
    ):
        """`size` is a MoBA block's, `rotation` the cosines and sines (T, rope / 2) of all positions."""
        device = cache.device
        self.start, self.length, self.end = start, length, max(start) + length
        self.slots = slice(first, first + len(start))
        begin = torch.tensor(start, device=device)
        self.positions = begin[:, None] + torch.arange(length, device=device)  # (B, Q)
        self.slot = torch.arange(first, first + len(start), device=device)[:, None]
        self.place = (self.slot * cache.length + self.positions).flatten()  # of each token among all slots' entries
        self.rotation = tuple(table[self.positions].unsqueeze(2) for table in rotation)  # (B, Q, 1, rope / 2)
        self.future = None  # (B, Q, 1, end) what lies behind a token
        if len(start) > 1 or length > 1:
            self.future = (torch.arange(self.end, device=device) > self.positions[..., None])[:, :, None]
        self._blocks(size, device)

    def _blocks(self, size: int, device) -> None:
        """What MoBA needs to know."""
        self.own = (self.positions // size)[:, :, None, None]  # (B, Q, 1, 1) a token's own block
        self.full = (self.end - 1) // size  # blocks that are an earlier one for some token
        self.not_earlier = torch.arange(self.full, device=device) >= self.own  # (B, Q, 1, full)
        self.behind = torch.arange(size, device=device) > (self.positions % size)[..., None]  # (B, Q, size)
        self.filled = [  # blocks whose last token is among these
            (i, block) for i, n in enumerate(self.start) for block in range(n // size, (n + self.length) // size)
        ]


class Decoder:
    """A model's main blocks, head and MTP modules, in the dtype of its weights, or with weights of 8 bits.

    What it returns is `MoonwhaleModel`'s up to rounding, whatever the cache held before and however tokens are cut into
    spans. It keeps no reference to the model.
    """

    def __init__(self, model: MoonwhaleForCausalLM, int8: bool = False):
        prepare = partial(linear, int8=int8)
        body, head = model.model, model.lm_head.weight
        self.config = model.config
        self.embedding = body.embed_tokens.weight
        self.dtype, self.device = self.embedding.dtype, self.embedding.device
        reach = (
            self.config.max_position_embeddings + 2 * len(body.mtp_modules) + 1
        )  # drafts may look beyond the context
        positions = torch.arange(reach, device=self.device)[None]
        self.rotation = tuple(table[0, 0] for table in rotation_table(self.config, positions, self.dtype))
        self.main = [_Block(block, prepare) for block in body.main_blocks]
        self.modules = [_Module(module, prepare) for module in body.mtp_modules]
        self.norm = _norm(body.norm)
        self.head = prepare(head)
        self.draft_head = prepare(head[:SHORTLIST]) if len(head) > 2 * SHORTLIST else self.head

    def cache(self) -> LatentCache:
        return LatentCache(self.config, self.dtype, self.device)

    def span(self, cache: LatentCache, first: int, start: list[int], length: int) -> Span:
        return Span(self.config.moba_block_size, self.rotation, cache, first, start, length)

    def run(self, tokens: Tensor, cache: LatentCache, span: Span) -> Tensor:
        """The normed hidden states (B, Q, hidden) of new tokens (B, Q), whose entries go into the cache."""
        x = F.embedding(tokens, self.embedding)
        for block in self.main:
            x = block(x, cache, span)
        return self.norm(x)

    def guess(self, depth: int, hidden: Tensor, ahead: Tensor, cache: LatentCache, span: Span) -> Tensor:
        """MTP module `depth` (from 1) of the chain: its normed hidden states (B, Q, hidden), for `draft_head`.

        hidden (B, Q, hidden) is `run`'s, or the module's before; ahead (B, Q) are the tokens `depth` after each
        position.
        """
        return self.modules[depth - 1](hidden, F.embedding(ahead, self.embedding), cache, span)


class _Block:
    def __init__(self, block, prepare):
        self.norms = _norm(block.input_layernorm), _norm(block.post_attention_layernorm)
        self.attention = _Attention(block.self_attn, prepare)
        self.mlp = _mlp(block.mlp, prepare) if isinstance(block.mlp, MLP) else _experts(block.mlp, prepare)

    def __call__(self, x: Tensor, cache: LatentCache, span: Span) -> Tensor:
        x = x + self.attention(self.norms[0](x), cache, span)
        return x + self.mlp(self.norms[1](x))


class _Module:
    def __init__(self, module, prepare):
        self.norms = _norm(module.enorm), _norm(module.hnorm)
        self.join = prepare(module.eh_proj.weight)
        self.blocks = [_Block(block, prepare) for block in (module, *module.blocks)]
        self.norm = _norm(module.shared_head["norm"])

    def __call__(self, hidden: Tensor, ahead: Tensor, cache: LatentCache, span: Span) -> Tensor:
        x = self.join(torch.cat([self.norms[0](ahead), self.norms[1](hidden)], dim=-1))
        for block in self.blocks:
            x = block(x, cache, span)
        return self.norm(x)


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
        self.q_norm, self.q_up = (_norm(m.q_a_layernorm), prepare(m.q_b_proj.weight)) if compressed else (None, None)
        self.kv_norm, self.key_conv = _norm(m.kv_a_layernorm), m.key_conv
        self.up = m.kv_b_proj.weight
        self.w_k, self.w_v = m._split_up()  # (heads, nope | v, rank)
        self.out = prepare(m.o_proj.weight, m.o_proj.bias)

    def __call__(self, x: Tensor, cache: LatentCache, span: Span) -> Tensor:
        q, latent, k_rope = self.down(x).split(self.widths, dim=-1)
        if self.q_up:
            q = self.q_up(self.q_norm(q))
        q_nope, q_rope = q.unflatten(-1, (self.heads, -1)).split([self.nope, self.rope], dim=-1)
        rotated = rotate(torch.cat([q_rope, k_rope.unsqueeze(2)], dim=2), span.rotation, self.interleaved)
        q_rope, k_rope = rotated[:, :, :-1], rotated[:, :, -1]
        self._remember(self.kv_norm(latent), k_rope, cache, span)
        if span.length >= MANY:
            out = self._expanded(torch.cat([q_nope, q_rope], dim=-1), cache, span)
        else:
            out = self._absorbed(q_nope, q_rope, cache, span)
        return self.out(out)

    def _remember(self, latent: Tensor, k_rope: Tensor, cache: LatentCache, span: Span) -> None:
        keys, values, means = cache.keys[self.layer], cache.values[self.layer], cache.means[self.layer]
        if self.key_conv is not None:
            values.flatten(0, 1).index_copy_(0, span.place, latent.flatten(0, 1))
            latent = self._convolved(latent, values, span)
        keys.flatten(0, 1).index_copy_(0, span.place, torch.cat([latent, k_rope], dim=-1).flatten(0, 1))
        if means is not None:
            for i, block in span.filled:
                entries = keys[span.slots.start + i, block * self.size : (block + 1) * self.size]
                means[span.slots.start + i, block] = entries.mean(0, dtype=torch.float32)

    def _convolved(self, latent: Tensor, values: Tensor, span: Span) -> Tensor:
        """`c + silu(causal depthwise convolution of c)` (arXiv 2511.11571), from the latents remembered."""
        mixed = 0.0
        for back in range(self.key_conv.shape[-1]):
            tap = values.flatten(0, 1)[(span.place - back).clamp(min=0)].view_as(latent)
            inside = (span.positions >= back).unsqueeze(-1)
            mixed = mixed + torch.where(inside, tap, 0.0) * self.key_conv[:, 0, -1 - back].to(latent.dtype)
        return latent + F.silu(mixed)

    def _expanded(self, q: Tensor, cache: LatentCache, span: Span) -> Tensor:
        """q (B, Q, heads, D) over the keys and values of every head; (B, Q, heads * v)."""
        keys, values = (x[self.layer][span.slots, : span.end] for x in (cache.keys, cache.values))
        nope = len(self.w_k[0])
        v = F.linear(values[..., : self.rank], self.up).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        k_nope, v = v.split([nope, v.shape[-1] - nope], dim=-1)
        if self.key_conv is not None:
            up = self.w_k.flatten(0, 1)
            k_nope = F.linear(keys[..., : self.rank], up).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        k_rope = keys[..., self.rank :].unsqueeze(1).expand(-1, self.heads, -1, -1)
        q, k = q.transpose(1, 2), torch.cat([k_nope, k_rope], dim=-1)
        if self.topk:
            layout = Layout.of(len(keys), span.end, keys.device, None, None)
            out, _ = moba_attention(q, k, v, self.scale, layout, self.size, self.topk)
        else:
            out, _ = attend(q, k, v, self.scale, causal=True)
        return out.transpose(1, 2).flatten(2)

    def _absorbed(self, q_nope: Tensor, q_rope: Tensor, cache: LatentCache, span: Span) -> Tensor:
        """Scores and sums of latents; (B, Q, heads * v)."""
        batch, length = q_nope.shape[:2]
        q = q_nope.permute(2, 0, 1, 3).flatten(1, 2) @ self.w_k  # (heads, B * Q, rank)
        q = torch.cat([q.transpose(0, 1).view(batch, length, self.heads, self.rank), q_rope], dim=-1)
        if not self.topk or span.end <= self.topk * self.size:
            latent = self._of_all(q, cache, span, None)
        elif span.end <= self.heads * self.topk * self.size:
            latent = self._of_all(q, cache, span, self._choose(q, cache, span))
        else:
            latent = self._of_chosen(q, cache, span, self._choose(q, cache, span))
        latent = latent.view(batch * length, self.heads, self.rank).transpose(0, 1)
        return (latent @ self.w_v.transpose(1, 2)).transpose(0, 1).reshape(batch, length, -1)

    def _choose(self, q: Tensor, cache: LatentCache, span: Span) -> torch.return_types.topk:
        """MoBA's gate on latents, a query's product with a block's mean entry: the values and indices of the `topk - 1`
        best earlier blocks, (B, Q, heads, topk - 1) each. The value is -inf where there are fewer.
        """
        means = cache.means[self.layer][span.slots, : span.full]
        gates = (q.float().flatten(1, 2) @ means.transpose(1, 2)).view(*q.shape[:3], -1)
        return gates.masked_fill_(span.not_earlier, -torch.inf).topk(min(self.topk - 1, span.full), dim=-1)

    def _of_all(self, q: Tensor, cache: LatentCache, span: Span, best: torch.return_types.topk | None) -> Tensor:
        """Reads every entry, once for all heads; with `best`, only the own block and those count."""
        keys, values = (x[self.layer][span.slots, : span.end] for x in (cache.keys, cache.values))
        scores = self._scores(q.flatten(1, 2), keys).view(*q.shape[:3], -1)
        if best is not None:
            bias = scores.new_full((*q.shape[:3], span.full + 1), -torch.inf)
            bias.scatter_(3, best.indices, 0.0).scatter_(3, span.own.expand(-1, -1, self.heads, -1), 0.0)
            scores += bias.repeat_interleave(self.size, dim=3)[..., : span.end]
        if span.future is not None:
            scores.masked_fill_(span.future, -torch.inf)
        return self._sum(scores.flatten(1, 2), values)

    def _of_chosen(self, q: Tensor, cache: LatentCache, span: Span, best: torch.return_types.topk) -> Tensor:
        """Reads the chosen blocks and no others, for each head its own."""
        keys, values = cache.keys[self.layer], cache.values[self.layer]
        queries = q.shape[0] * q.shape[1] * self.heads
        chosen = torch.cat([best.indices, span.own.expand(-1, -1, self.heads, -1)], dim=-1).flatten(1)
        index = (span.slot * (cache.length // self.size) + chosen).flatten()
        taken = [
            x.view(-1, self.size * x.shape[-1]).index_select(0, index).view(queries, -1, x.shape[-1])
            for x in ([keys] if values is keys else [keys, values])
        ]
        missing = (best.values == -torch.inf)[..., None].expand(-1, -1, -1, -1, self.size).flatten(3)
        behind = span.behind[:, :, None].expand(-1, -1, self.heads, -1)
        hidden = torch.cat([missing, behind], dim=-1).view(queries, 1, -1)
        return self._sum(self._scores(q.view(queries, 1, -1), taken[0]).masked_fill_(hidden, -torch.inf), taken[-1])

    def _scores(self, q: Tensor, keys: Tensor) -> Tensor:
        if len(q) == 1:  # a batch of one: the product for batches would copy the keys first
            return F.linear(q[0], keys[0]).mul_(self.scale).unsqueeze(0)
        return torch.baddbmm(q.new_empty(()), q, keys.transpose(1, 2), beta=0, alpha=self.scale)

    def _sum(self, scores: Tensor, values: Tensor) -> Tensor:
        probs = scores.softmax(-1, dtype=torch.promote_types(scores.dtype, torch.float32)).to(values.dtype)
        # Over the whole width: a slice of it would be copied first.
        summed = (probs[0] @ values[0]).unsqueeze(0) if len(probs) == 1 else probs @ values
        return summed[..., : self.rank]


def _norm(norm: RMSNorm) -> Product:
    weight, eps = norm.weight, norm.eps
    return lambda x: F.rms_norm(x, weight.shape, weight, eps)


def _mlp(mlp: MLP, prepare) -> Product:
    up = prepare(torch.cat([mlp.gate_proj.weight, mlp.up_proj.weight]))
    down = prepare(mlp.down_proj.weight)

    def run(x: Tensor) -> Tensor:
        gate, x = up(x).chunk(2, dim=-1)
        return down(F.silu(gate) * x)

    return run


def _experts(moe: DeepseekMoE, prepare) -> Product:
    """The experts in the form that suits their number and the device."""
    experts = len(moe.experts.down_proj)
    if moe.experts.down_proj.device.type != "cpu":
        return _grouped(moe, prepare)
    return (_all_at_once if experts <= 2 * moe.gate.topk else _one_by_one)(moe, prepare)


def _all_at_once(moe: DeepseekMoE, prepare) -> Product:
    """Every expert for every token, those not chosen at a gate of 0: where a token takes half of them or more, one
    large product beats many small ones. Shared experts are further ones at a gate of 1.
    """
    gate, up = moe.experts.gate_up_proj.chunk(2, dim=1)  # (E, inner, hidden) each
    inner, down = gate.shape[1], moe.experts.down_proj.transpose(1, 2).flatten(0, 1)  # (E * inner, hidden)
    parts = [gate.flatten(0, 1)], [up.flatten(0, 1)], [down]
    shared = 0
    if moe.shared_experts is not None:
        mlp = moe.shared_experts
        shared = len(mlp.gate_proj.weight) // inner
        for part, weight in zip(parts, (mlp.gate_proj.weight, mlp.up_proj.weight, mlp.down_proj.weight.T), strict=True):
            part.append(weight)
    gate_up, down = prepare(torch.cat([*parts[0], *parts[1]])), prepare(torch.cat(parts[2]).T.contiguous())
    route, n_experts = moe.gate, moe.gate.n_experts

    def run(x: Tensor) -> Tensor:
        routing = route(x.flatten(0, -2))
        weight = x.new_zeros(len(routing.index), n_experts + shared)
        weight[:, n_experts:] = 1.0
        weight.scatter_(1, routing.index, routing.gates.to(x.dtype))
        gate, up = gate_up(x).chunk(2, dim=-1)
        activated = (F.silu(gate) * up).unflatten(-1, (-1, inner)) * weight.view(*x.shape[:-1], -1, 1)
        return down(activated.flatten(-2))

    return run


def _one_by_one(moe: DeepseekMoE, prepare) -> Product:
    """Each chosen expert for its own tokens."""
    products = [
        (prepare(up), prepare(down)) for up, down in zip(moe.experts.gate_up_proj, moe.experts.down_proj, strict=True)
    ]
    shared = None if moe.shared_experts is None else _mlp(moe.shared_experts, prepare)

    def run(x: Tensor) -> Tensor:
        rows = x.flatten(0, -2)
        index, gates = moe.gate(rows)[1:]
        expert, order = index.flatten().sort()
        token, weight = order // index.shape[1], gates.flatten()[order].to(x.dtype).unsqueeze(1)
        pieces = rows[token].split(torch.bincount(expert, minlength=len(products)).tolist())
        done = []
        for piece, (up, down) in zip(pieces, products, strict=True):
            if len(piece):
                gate, wide = up(piece).chunk(2, dim=-1)
                done.append(down(F.silu(gate) * wide))
        out = torch.zeros_like(rows) if shared is None else shared(rows)
        return out.index_add_(0, token, torch.cat(done) * weight).view_as(x)

    return run


def _grouped(moe: DeepseekMoE, prepare) -> Product:
    """The model's own grouped products, which suit a GPU."""
    shared = None if moe.shared_experts is None else _mlp(moe.shared_experts, prepare)

    def run(x: Tensor) -> Tensor:
        rows = x.flatten(0, -2)
        routing = moe.gate(rows)
        out = moe.experts(rows, routing.index, routing.gates)
        return (out if shared is None else out + shared(rows)).view_as(x)

    return run
