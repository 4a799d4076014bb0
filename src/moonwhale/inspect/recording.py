"""Records what one forward pass over a text computes: choices, scores, logits and predictions of every block.

Forward hooks keep the inputs of each attention and the result of each router. What is kept for every pair of tokens
grows quadratically, so a recording keeps it for the last tokens only if the whole would exceed a budget.
"""

import base64
from contextlib import ExitStack

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from moonwhale.errors import UserError
from moonwhale.infer.decoder import require_latent_attention
from moonwhale.model import MoonwhaleForCausalLM
from moonwhale.model.block import Block
from moonwhale.model.mla import Logits, MultiheadLatentAttention
from moonwhale.model.moe import DeepseekMoE, Router, Routing

TOP_TOKENS = 6  # tokens shown for each prediction


@torch.no_grad()
def record(model: MoonwhaleForCausalLM, tokenizer: PreTrainedTokenizerFast, ids: list[int], budget: int) -> dict:
    """Returns what the model computes for a text, as JSON values. Arrays are base64 of little-endian numbers.

    "first" is the first token whose scores, gates and logits are kept, so that they take at most `budget` bytes; those
    of the last token are kept in any case. Choices and predictions are kept for all tokens.

    Raises:
        UserError: the attention is not latent, or a number is not finite.
    """
    require_latent_attention(model.config)
    blocks = [module for module in model.modules() if isinstance(module, Block)]
    calls = {}  # inputs and output of each attention and each router

    def keep(module, inputs, output):
        calls[module] = inputs, output

    with ExitStack() as hooks:
        for module in model.modules():
            if isinstance(module, MultiheadLatentAttention | Router):
                hooks.enter_context(module.register_forward_hook(keep))
        body = model.model(torch.tensor([ids], device=model.device), use_cache=False, with_mtp=True)
    hidden = [body.last_hidden_state[0], *(h[0] for h in body.mtp_hidden_states)]
    if not all(bool(h.isfinite().all()) for h in hidden):
        raise UserError("the model computes numbers that are not finite: its weights are damaged")
    log_probabilities = [model.lm_head(h).float().log_softmax(-1) for h in hidden]
    predictions = [p.exp() for p in log_probabilities]
    surprise = -log_probabilities[0][:-1].gather(1, torch.tensor(ids[1:], device=model.device).view(-1, 1)).squeeze(1)
    first = _first_detailed(blocks, len(ids), budget)
    return {
        "first": first,
        # Module k reads the token k places ahead, which the last k positions do not have.
        "predictions": [_top_tokens(p[: len(ids) - k], tokenizer) for k, p in enumerate(predictions)],
        "guesses": _guesses(predictions, ids, tokenizer),
        "surprise": [round(nats, 4) for nats in surprise.tolist()],
        "layers": [
            {
                "name": name,
                **_attention(block.self_attn, calls[block.self_attn][0], first),
                **(_experts(block.mlp.gate, calls[block.mlp.gate][1], first) if _is_moe(block) else {}),
            }
            for name, block in zip(_block_names(model), blocks, strict=True)
        ],
    }


def _is_moe(block: Block) -> bool:
    return isinstance(block.mlp, DeepseekMoE)


def _first_detailed(blocks: list[Block], length: int, budget: int) -> int:
    """Returns the first token whose details are kept."""
    left, first = budget, length
    while first > 0:
        for block in blocks:
            attention = block.self_attn
            count = -(-length // attention.block_size) if attention.topk else 0
            left -= 4 * attention.heads * (first + count) + (4 * block.mlp.gate.n_experts if _is_moe(block) else 0)
        if left < 0:
            break
        first -= 1
    return min(first, length - 1)


def _block_names(model: MoonwhaleForCausalLM) -> list[str]:
    """The names of all blocks, in the order of their indices."""
    main = [f"block {i}" for i in range(model.config.num_hidden_layers)]
    chain = [
        f"MTP {k}" if blocks == 1 else f"MTP {k}, block {i}"
        for k, blocks in enumerate(model.config.mtp_blocks, start=1)
        for i in range(blocks)
    ]
    return main + chain


def _attention(attention: MultiheadLatentAttention, inputs: tuple, first: int) -> dict:
    """Each head's logits in two parts, its largest logit, and with MoBA the gate of each block and the blocks read.

    "counted" is the number of tokens that the block sees properly. An MTP module also reads a token further on, which
    the last positions do not have.
    """
    x, rotation, documents, *_, input_ids = inputs
    logits = attention.logits(x, rotation, documents, input_ids)
    counted = int(documents.valid.sum())
    seen = (logits.content + logits.rotary).masked_fill(~logits.mask, -torch.inf)[0]  # (H, T, T)
    found = {
        "counted": counted,
        "heads": attention.heads,
        "largest": [round(value, 4) for value in seen[:, : max(counted, 1)].amax((1, 2)).tolist()],
        **_parts(logits, first),
    }
    return found | (_moba(attention, logits, first) if attention.topk else {})


def _parts(logits: Logits, first: int) -> dict:
    """The content and rotary parts of each head's logits as 16-bit multiples of the head's "step".

    Of each query from `first` on, its row holds the keys up to itself: key j of query i, both counted from 0, is at
    j + (i (i + 1) - first (first + 1)) / 2.
    """
    content, rotary = logits.content[0], logits.rotary[0]  # (H, T, T)
    past = torch.ones(content.shape[1:], dtype=torch.bool, device=content.device).tril()
    past[:first] = False
    content, rotary = content[:, past], rotary[:, past]  # (H, pairs)
    step = torch.maximum(content.abs().amax(1), rotary.abs().amax(1)).clamp(min=1e-9) / 32767
    content, rotary = ((part / step[:, None]).round().to(torch.int16) for part in (content, rotary))
    return {"step": step.tolist(), "content": _base64(content), "rotary": _base64(rotary)}


def _moba(attention: MultiheadLatentAttention, logits: Logits, first: int) -> dict:
    """The blocks that each head read for each token, one bit each, and the gates of the tokens from `first` on."""
    size, length = attention.block_size, logits.mask.shape[-1]
    count = -(-length // size)
    read = torch.nn.functional.pad(logits.mask[0], (0, count * size - length)).unflatten(-1, (count, size)).any(-1)
    bits = torch.nn.functional.pad(read.flatten(), (0, -read.numel() % 8)).view(-1, 8)
    packed = (bits * torch.tensor([128, 64, 32, 16, 8, 4, 2, 1], device=bits.device)).sum(1).to(torch.uint8)
    return {
        "block_size": size,
        "topk": attention.topk,
        "blocks": _base64(packed),  # (H, T, count)
        "block_gates": _base64(logits.gates[0, :, first:]),  # (H, T - first, count)
    }


def _experts(router: Router, routing: Routing, first: int) -> dict:
    """The experts that each token used, with their gates; and the scores of all experts, which the bias corrects."""
    gates, order = routing.gates.sort(-1, descending=True)
    return {
        "n_experts": router.n_experts,
        "experts": routing.index.gather(1, order).tolist(),  # (T, K)
        "gates": _base64(gates),  # (T, K)
        "scores": _base64(routing.scores[first:]),  # (T - first, E)
        "bias": router.e_score_correction_bias.tolist(),
        "groups": router.groups,
        "topk_groups": router.topk_groups,
    }


def _top_tokens(probabilities: Tensor, tokenizer) -> list[list]:
    """For each position, the most likely next tokens, as [id, text, probability]."""
    best = probabilities.topk(min(TOP_TOKENS, probabilities.shape[-1]))
    return [
        [[id, tokenizer.decode([id]), round(p, 4)] for id, p in zip(ids, row, strict=True)]
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
            text = tokenizer.decode([guess])
            guesses[target].append({"depth": depth, "id": guess, "text": text, "share": share, "held": held})
    return guesses


def _base64(x: Tensor) -> str:
    x = x.float() if x.dtype.is_floating_point else x
    return base64.b64encode(x.contiguous().cpu().numpy().tobytes()).decode()
