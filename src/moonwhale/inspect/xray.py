"""Draws an X-ray: what happens inside the model, for each token and layer, in one HTML file.

Forward hooks record one pass over the whole text: each router's choice, each head's attention and the blocks it read,
and each MTP module's guess. The page draws only these numbers and needs only a browser.
"""

import base64
import json
from contextlib import ExitStack
from importlib.resources import files
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from moonwhale.costs import model_size
from moonwhale.errors import UserError
from moonwhale.infer.decoder import require_latent_attention
from moonwhale.model import MoonwhaleForCausalLM
from moonwhale.model.block import Block
from moonwhale.model.mla import MultiheadLatentAttention
from moonwhale.model.moe import DeepseekMoE, Router
from moonwhale.train.run_folder import RUN_FILE
from moonwhale.yaml_files import read_yaml_file

MAX_TOKENS = 512  # the file holds each head's attention between all tokens, so it grows quadratically
TOP_TOKENS = 6  # tokens shown for each prediction


def xray(
    model: MoonwhaleForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    ids: list[int],
    prompt_tokens: int,
    tau: float | None = None,
) -> str:
    """Returns the page about a text. The first `prompt_tokens` ids are the prompt; the model wrote the rest.

    tau: threshold of QK-clip in the model's training; 0 if it was off, None if it is not known.

    Raises:
        UserError: the text is empty or longer than MAX_TOKENS.
    """
    return render(record(model, tokenizer, ids, prompt_tokens, tau))


def clip_threshold(folder: str | Path) -> float | None:
    """Returns QK-clip's τ from the run.yaml of the run that wrote the checkpoint, or None if there is no such file.

    A run's folder holds run.yaml itself; for a checkpoint within the run it is one folder above.

    Raises:
        UserError: the file is not YAML.
    """
    for place in (Path(folder), Path(folder).resolve().parent):
        if (place / RUN_FILE).is_file():
            options = read_yaml_file(place / RUN_FILE)
            tau = options.get("qk_clip_tau") if isinstance(options, dict) else None
            return tau if isinstance(tau, int | float) and 0 <= tau < float("inf") else None
    return None


@torch.no_grad()
def record(
    model: MoonwhaleForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    ids: list[int],
    prompt_tokens: int,
    tau: float | None = None,
) -> dict:
    """Returns everything that `render` draws, as JSON values. Arrays of bytes are base64 strings."""
    require_latent_attention(model.config)
    if not 1 <= len(ids) <= MAX_TOKENS:
        raise UserError(f"the text has {len(ids):,} tokens: an X-ray shows from 1 to {MAX_TOKENS}")
    calls = {}  # inputs and output of each attention and each router

    def keep(module, inputs, output):
        calls[module] = inputs, output

    with ExitStack() as hooks:
        for module in model.modules():
            if isinstance(module, MultiheadLatentAttention | Router):
                hooks.enter_context(module.register_forward_hook(keep))
        body = model.model(torch.tensor([ids], device=model.device), use_cache=False, with_mtp=True)
    hidden = [body.last_hidden_state[0], *(h[0] for h in body.mtp_hidden_states)]
    predictions = [model.lm_head(h).float().softmax(-1) for h in hidden]
    text = [tokenizer.decode([id]) for id in ids]
    blocks = [module for module in model.modules() if isinstance(module, Block)]
    return {
        "tokens": text,
        "prompt_tokens": prompt_tokens,
        "predictions": [_top_tokens(p, tokenizer) for p in predictions],
        "guesses": _guesses(predictions, ids, tokenizer),
        "layers": [
            {
                "name": name,
                **_attention(block.self_attn, *calls[block.self_attn][0][:3]),
                **(_experts(calls[block.mlp.gate][1]) if isinstance(block.mlp, DeepseekMoE) else {}),
            }
            for name, block in zip(_block_names(model), blocks, strict=True)
        ],
        "facts": _facts(model) | {"tau": tau},
    }


def render(recorded: dict) -> str:
    """Returns one HTML file that loads nothing from elsewhere."""
    template = (files("moonwhale.inspect") / "xray.html").read_text(encoding="utf-8")
    # Only "<" could end the script element early.
    data = json.dumps(recorded, ensure_ascii=False, separators=(",", ":")).replace("<", "\\u003c")
    return template.replace("/*RECORDED*/null", data)


def _block_names(model: MoonwhaleForCausalLM) -> list[str]:
    """The names of all blocks, in the order of their indices."""
    main = [f"block {i}" for i in range(model.config.num_hidden_layers)]
    chain = [
        f"MTP {k}" if blocks == 1 else f"MTP {k}, block {i}"
        for k, blocks in enumerate(model.config.mtp_blocks, start=1)
        for i in range(blocks)
    ]
    return main + chain


def _attention(attention: MultiheadLatentAttention, x: Tensor, table, documents) -> dict:
    """Each head's attention between all tokens, the blocks it read, and its largest logit.

    "counted" is the number of tokens that the block sees properly. An MTP module also reads a token further on, which
    the last positions do not have.
    """
    content, rotary, mask, _ = attention.logits(x, table, documents)  # (1, H, T, T)
    logits = (content + rotary).masked_fill(~mask, -torch.inf)
    probabilities, length = logits.softmax(-1)[0], x.shape[1]
    counted = int(documents.valid.sum())
    found = {
        "counted": counted,
        "heads": attention.heads,
        # The square root makes small weights visible, and one byte is precise enough to draw.
        "attention": _bytes((probabilities.sqrt() * 255).round()),
        "largest": [round(value, 2) for value in logits[0, :, : max(counted, 1)].amax((1, 2)).tolist()],
    }
    if attention.topk:
        size = attention.block_size
        count = -(-length // size)
        blocks = torch.nn.functional.pad(mask[0], (0, count * size - length)).unflatten(-1, (count, size)).any(-1)
        found |= {"block_size": size, "topk": attention.topk, "blocks": _bytes(blocks)}
    return found


def _experts(routing: tuple) -> dict:
    """The experts that each token used, with their gates."""
    _, index, gates = routing
    gates, order = gates.sort(-1, descending=True)
    return {
        "n_experts": routing.scores.shape[-1],
        "experts": index.gather(1, order).tolist(),
        "gates": [[round(gate, 3) for gate in row] for row in gates.tolist()],
    }


def _top_tokens(probabilities: Tensor, tokenizer) -> list[list]:
    """For each position, the most likely next tokens, as [text, probability]."""
    best = probabilities.topk(min(TOP_TOKENS, probabilities.shape[-1]))
    return [
        [[tokenizer.decode([id]), round(p, 4)] for id, p in zip(ids, row, strict=True)]
        for ids, row in zip(best.indices.tolist(), best.values.tolist(), strict=True)
    ]


def _guesses(predictions: list[Tensor], ids: list[int], tokenizer) -> list[list[dict]]:
    """For each token, what each MTP module guessed it to be, and whether a speculative decoder would keep the guess.

    The module of depth d guesses the token d + 1 positions ahead. A guess holds only if it is right and all shallower
    guesses made from the same position hold too.
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
    """Facts about the model. The cache sizes are bytes per token in all main blocks, in bf16."""
    config, size = model.config, model_size(model.config)
    return {
        "parameters": sum(p.numel() for p in model.parameters()),
        "latent_bytes": size.kv_cache_bytes_per_token,
        "plain_bytes": size.mha_cache_bytes_per_token,
        "rank": config.kv_lora_rank,
        "rope": config.qk_rope_head_dim,
        "heads": config.num_attention_heads,
    }


def _bytes(x: Tensor) -> str:
    return base64.b64encode(x.to(torch.uint8).cpu().numpy().tobytes()).decode()
