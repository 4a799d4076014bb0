"""`moonwhale xray`: what happened inside the model, token by token and layer by layer, in one HTML file.

One forward over the whole text is recorded with hooks: every router's choice, every head's attention and the blocks it
read, every MTP module's guess. The page draws those numbers and no others, and needs nothing but a browser.
"""

import base64
import json
from importlib.resources import files

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from moonwhale.costs import model_size
from moonwhale.errors import UserError
from moonwhale.model import MoonwhaleForCausalLM
from moonwhale.model.block import Block
from moonwhale.model.mla import MultiheadLatentAttention
from moonwhale.model.moe import Router

LONGEST = 512  # tokens: every head's attention among all of them is in the file
LIKELIEST = 6  # tokens shown of a prediction


def xray(model: MoonwhaleForCausalLM, tokenizer: PreTrainedTokenizerFast, ids: list[int], prompt_tokens: int) -> str:
    """The page about a text of ids, of which the first `prompt_tokens` were given and the model wrote the rest.

    Raises:
        UserError: more than LONGEST tokens, or none.
    """
    return render(record(model, tokenizer, ids, prompt_tokens))


@torch.no_grad()
def record(model: MoonwhaleForCausalLM, tokenizer: PreTrainedTokenizerFast, ids: list[int], prompt_tokens: int) -> dict:
    """What `render` draws, as JSON knows it; arrays of bytes are base64."""
    if not 1 <= len(ids) <= LONGEST:
        raise UserError(f"the text has {len(ids):,} tokens: an X-ray shows from 1 to {LONGEST}")
    seen = _Seen(model)
    with seen:
        body = model.model(torch.tensor([ids], device=model.device), use_cache=False, with_mtp=True)
    hidden = [body.last_hidden_state[0], *(h[0] for h in body.mtp_hidden_states)]
    predictions = [model.lm_head(h).float().softmax(-1) for h in hidden]
    text = [tokenizer.decode([id]) for id in ids]
    return {
        "tokens": text,
        "prompt_tokens": prompt_tokens,
        "predictions": [_likeliest(p, tokenizer) for p in predictions],
        "guesses": _guesses(predictions, ids, tokenizer),
        "layers": [
            {"name": name, **_attention(seen.attention[i]), **_experts(seen.routing.get(i))}
            for i, name in enumerate(_names(model))
        ],
        "facts": _facts(model),
    }


def render(recorded: dict) -> str:
    """One HTML file that loads nothing."""
    template = (files("moonwhale.inspect") / "xray.html").read_text(encoding="utf-8")
    # "<" is all that could end the script element early.
    data = json.dumps(recorded, ensure_ascii=False, separators=(",", ":")).replace("<", "\\u003c")
    return template.replace("/*RECORDED*/null", data)


class _Seen:
    """Hooks that keep what attention was given and what routers decided, by the index of the block."""

    def __init__(self, model: MoonwhaleForCausalLM):
        self._model, self._hooks = model, []
        self.attention: dict[int, tuple] = {}
        self.routing: dict[int, tuple] = {}

    def __enter__(self):
        blocks = [module for module in self._model.modules() if isinstance(module, Block)]
        for block in blocks:
            attention: MultiheadLatentAttention = block.self_attn
            self._keep(attention, self.attention, attention.layer_idx, lambda m, given, _: (m, *given[:3]))
            if isinstance(router := getattr(block.mlp, "gate", None), Router):
                self._keep(router, self.routing, attention.layer_idx, lambda _, __, routing: routing)

    def _keep(self, module, where: dict, index: int, what) -> None:
        def hook(module, given, result):
            where[index] = what(module, given, result)

        self._hooks.append(module.register_forward_hook(hook))

    def __exit__(self, *_):
        for hook in self._hooks:
            hook.remove()


def _names(model: MoonwhaleForCausalLM) -> list[str]:
    """Of all blocks, in the order of their indices."""
    main = [f"block {i}" for i in range(model.config.num_hidden_layers)]
    chain = [
        f"MTP {k}" if blocks == 1 else f"MTP {k}, block {i}"
        for k, blocks in enumerate(model.config.mtp_blocks, start=1)
        for i in range(blocks)
    ]
    return main + chain


def _attention(kept: tuple) -> dict:
    """Each head's attention among all tokens, which blocks it read, and its largest logit."""
    attention, x, table, layout = kept
    logits, mask = attention.logits(x, table, layout)  # (1, H, T, T)
    logits = logits.masked_fill(~mask, -torch.inf)
    probabilities, length = logits.softmax(-1)[0], x.shape[1]
    found = {
        "heads": attention.heads,
        # The root makes small shares visible, and a byte holds it well enough to draw.
        "attention": _bytes((probabilities.sqrt() * 255).round()),
        "largest": [round(value, 2) for value in logits[0].amax((1, 2)).tolist()],
    }
    if attention.topk:
        size = attention.block_size
        count = -(-length // size)
        blocks = torch.nn.functional.pad(mask[0], (0, count * size - length)).unflatten(-1, (count, size)).any(-1)
        found |= {"block_size": size, "topk": attention.topk, "blocks": _bytes(blocks)}
    return found


def _experts(routing: tuple | None) -> dict:
    """Which experts each token took and with what gates; nothing for a dense block."""
    if routing is None:
        return {}
    _, index, gates = routing
    gates, order = gates.sort(-1, descending=True)
    return {
        "n_experts": routing.scores.shape[-1],
        "experts": index.gather(1, order).tolist(),
        "gates": [[round(gate, 3) for gate in row] for row in gates.tolist()],
    }


def _likeliest(probabilities: Tensor, tokenizer) -> list[list]:
    """For each position, [text, share] of the tokens likeliest to come."""
    best = probabilities.topk(min(LIKELIEST, probabilities.shape[-1]))
    return [
        [[tokenizer.decode([id]), round(share, 4)] for id, share in zip(ids, shares, strict=True)]
        for ids, shares in zip(best.indices.tolist(), best.values.tolist(), strict=True)
    ]


def _guesses(predictions: list[Tensor], ids: list[int], tokenizer) -> list[list[dict]]:
    """For each token, what the MTP modules had guessed it to be, from as many positions before, and whether that held:
    it counts only if the guesses before it, made from the same position, held too.
    """
    best = [p.argmax(-1).tolist() for p in predictions]
    guesses: list[list[dict]] = [[] for _ in ids]
    for i in range(len(ids)):
        held = True
        for depth in range(1, len(predictions)):
            target = i + depth + 1
            if target >= len(ids):
                break
            guess = best[depth][i]
            held &= guess == ids[target]
            share = round(predictions[depth][i, guess].item(), 4)
            guesses[target].append({"depth": depth, "text": tokenizer.decode([guess]), "share": share, "held": held})
    return guesses


def _facts(model: MoonwhaleForCausalLM) -> dict:
    """The cache in bytes a token in all main blocks, in bf16, and what plain attention of these heads would keep."""
    config, size = model.config, model_size(model.config)
    return {
        "tau": 100,
        "parameters": sum(p.numel() for p in model.parameters()),
        "latent_bytes": size.kv_cache_bytes_per_token,
        "plain_bytes": size.mha_cache_bytes_per_token,
        "rank": config.kv_lora_rank,
        "rope": config.qk_rope_head_dim,
        "heads": config.num_attention_heads,
    }


def _bytes(x: Tensor) -> str:
    return base64.b64encode(x.to(torch.uint8).cpu().numpy().tobytes()).decode()
