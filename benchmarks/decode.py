"""How fast is decoding: compared with transformers, with a growing context, and with drafts from the MTP modules?

    python benchmarks/decode.py [CHECKPOINT]

Transformers: batch size 1 on the `seed_190m` shapes, compared with `generate` of transformers' DeepseekV3 on the same
weights, in bf16, with its fastest experts implementation. Ours runs in bf16 and with int8 weights, with the preset's
MoBA. The prompt is in both caches before the clock starts, so only the following tokens are timed.

MoBA: the same shapes with MoBA in every block, at 4 k and at 32 k tokens of context, compared with full attention on
latents.

llama.cpp, if `llama-cpp-python` is installed: the same shapes with full attention, exported to GGUF, bf16 compared with
bf16 and int8 with Q8_0; see llamacpp.py.

Drafts, and the cost of 16 and 8 bits, need a trained model with MTP modules: CHECKPOINT, as `make demo` leaves it in
runs/demo. The prompts are the beginnings of held-out conversations of its data. Bits per byte are those of their whole
text.
"""

import importlib.util
import itertools
import math
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import DeepseekV3ForCausalLM, DynamicCache

from common import deepseek_config, environment, options, timed_rounds, write
from llamacpp import against_llamacpp
from moonwhale.checkpoint import open_checkpoint
from moonwhale.costs import model_size
from moonwhale.data.loading import load_source
from moonwhale.data.packing import pack_split
from moonwhale.infer.cache import LatentCache
from moonwhale.infer.decoder import Decoder
from moonwhale.infer.detokenizer import TokenBytes
from moonwhale.infer.engine import Engine
from moonwhale.model import MoonwhaleConfig, MoonwhaleForCausalLM
from moonwhale.precision import tune_allocator
from moonwhale.presets import PRESETS

EXPERTS = ("eager", "grouped_mm", "batched_mm")
CONTEXTS = (128, 1024)
TOKENS = 8  # tokens that are timed together
ROW = 256  # tokens in a row of held-out text
STEP = 16  # tokens of a row that are scored together


def seed_model(context: int, **changes) -> MoonwhaleForCausalLM:
    """Make a model with the shapes of `seed_190m` in bf16, without MTP modules, and with random weights."""
    torch.manual_seed(0)
    shapes = PRESETS["seed_190m"].model | {"num_nextn_predict_layers": 0, "max_position_embeddings": context}
    model = MoonwhaleForCausalLM(MoonwhaleConfig(**shapes | changes)).eval()
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.02)
    return model.to(torch.bfloat16)


def transformers_model(ours: MoonwhaleForCausalLM, experts: str) -> DeepseekV3ForCausalLM:
    config = deepseek_config(ours.config, attn_implementation="sdpa")
    model = DeepseekV3ForCausalLM(config).to(torch.bfloat16).eval()
    model.load_state_dict(ours.state_dict())
    model.set_experts_implementation(experts)
    return model


class Theirs:
    """Transformers' `generate` from a prompt (1, T) that is in its cache."""

    def __init__(self, model: DeepseekV3ForCausalLM, prompt: Tensor):
        self.model, self.prompt, self.cache = model, prompt, DynamicCache(config=model.config)
        model(prompt[:, :-1], past_key_values=self.cache)

    def __call__(self, _=None) -> Tensor:
        out = self.model.generate(
            self.prompt,
            attention_mask=torch.ones_like(self.prompt),
            past_key_values=self.cache,
            max_new_tokens=TOKENS,
            min_new_tokens=TOKENS,
            do_sample=False,
        )
        self.cache.crop(self.prompt.shape[1] - 1 - self.cache.get_seq_length())
        return out


class Ours:
    """The decoder's steps from prompts (B, T) that are in its cache."""

    def __init__(self, decoder: Decoder, prompt: Tensor):
        self.decoder, self.prompt, self.cache = decoder, prompt, decoder.cache()
        self.rows, self.length = prompt.shape
        self.cache.resize(self.rows, self.length + TOKENS)
        decoder.run(prompt[:, :-1], self.cache, decoder.place(self.cache, 0, [0] * self.rows, self.length - 1))

    def __call__(self, _=None) -> Tensor:
        token, decoder = self.prompt[:, -1:], self.decoder
        for at in range(self.length - 1, self.length - 1 + TOKENS):
            placement = decoder.place(self.cache, 0, [at] * self.rows, 1)
            token = decoder.head(decoder.run(token, self.cache, placement)).float().argmax(-1)
        return token


def filled(decoder: Decoder, context: int) -> Ours:
    """Return steps after a context of this length. Its entries are random, since reading them is what takes time."""
    ours = Ours(decoder, torch.zeros(1, 2, dtype=torch.long))
    ours.length = context
    ours.cache.resize(1, context + TOKENS)
    for tensor in (*ours.cache.keys, *ours.cache.means):
        if tensor is not None:
            tensor.normal_(std=0.5)
    return ours


def against_transformers(rounds: int) -> dict:
    """Measure milliseconds per token of each contender at each context, and the ratios."""
    ours = seed_model(2048)
    decoders = {"bf16": Decoder(ours), "int8": Decoder(ours, int8=True)}
    models = {f"transformers, {experts}": transformers_model(ours, experts) for experts in EXPERTS}
    result: dict = {"milliseconds_per_token": {}}
    for context in CONTEXTS:
        prompt = torch.randint(ours.config.vocab_size, (1, context))
        contenders = {name: Theirs(model, prompt) for name, model in models.items()}
        contenders |= {f"moonwhale, {name}": Ours(decoder, prompt) for name, decoder in decoders.items()}
        timing = timed_rounds(contenders, lambda: None, rounds)
        seconds = timing["seconds"]
        best = min(seconds[name] for name in models)
        for name in decoders:
            result[f"{name}_{context}"] = round(best / seconds[f"moonwhale, {name}"], 2)
        result["milliseconds_per_token"][str(context)] = {n: round(1e3 * s / TOKENS, 2) for n, s in seconds.items()}
        print(f"context {context}: {result['milliseconds_per_token'][str(context)]}", file=sys.stderr)
    return result


def with_moba(rounds: int, short: int, long: int) -> dict:
    """Measure how MoBA's time per token grows with the context, and compare full attention at the longer one."""
    moba = Decoder(seed_model(long + TOKENS, moba_full_attention_layers=None))
    full = Decoder(seed_model(long + TOKENS, moba_topk=0))
    contenders = {"short": filled(moba, short), "long": filled(moba, long), "long, full": filled(full, long)}
    seconds = timed_rounds(contenders, lambda: None, rounds)["seconds"]
    return {
        "moba_growth": round(seconds["long"] / seconds["short"], 3),
        "moba_32k": round(seconds["long, full"] / seconds["long"], 2),
        "moba_contexts": [short, long],
        "moba_milliseconds_per_token": {n: round(1e3 * s / TOKENS, 2) for n, s in seconds.items()},
    }


def cache_sizes() -> dict:
    """Bytes per token in the cache: ours as counted and as allocated without drafts, ours as allocated with drafts from
    all MTP modules, and those of multi-head attention.
    """
    found = {}
    for preset in ("demo", "seed_190m"):
        config = MoonwhaleConfig(**PRESETS[preset].model)
        cache, drafting = LatentCache(config, torch.bfloat16, depth=0), LatentCache(config, torch.bfloat16)
        cache.resize(1, 1024)
        drafting.resize(1, 1024)
        found[preset] = {
            "latent": round(cache.bytes_per_token, 1),
            "latent_allocated": round(cache.bytes / 1024, 1),
            "drafting_allocated": round(drafting.bytes / 1024, 1),
            "multi_head": model_size(config).mha_cache_bytes_per_token,
        }
    return {"cache_bytes_per_token": found}


def held_out(tokenizer, context: int, rows: int) -> list[list[int]]:
    """Return rows of ids from the built-in conversations that training leaves out."""
    _, aside = pack_split(load_source("chitchat"), tokenizer, context)
    return [aside[row]["input_ids"].tolist() for row in range(min(rows, len(aside)))]


def with_drafts(folder: Path, rounds: int, prompts: int) -> dict:
    """Measure tokens per forward of the main model, and the speed of drafting relative to no drafts."""
    model, tokenizer = open_checkpoint(folder)
    beginnings = [row[:64] for row in held_out(tokenizer, ROW, prompts)]
    engines = {"off": Engine(model, tokenizer, draft=0), "auto": Engine(model, tokenizer)}
    engines["all"] = Engine(model, tokenizer, draft=model.config.num_nextn_predict_layers)
    greedy = {"temperature": 0.0, "max_new_tokens": 64}
    answers = engines["all"].generate(beginnings, **greedy)
    tokens = sum(len(answer.token_ids) for answer in answers)
    forwards = sum(len(answer.token_ids) / answer.tokens_per_forward for answer in answers)
    turns = itertools.count()

    def draw() -> list[list[int]]:
        """Return the next 24 beginnings."""
        return [beginnings[next(turns) % len(beginnings)] for _ in range(24)]

    contenders = {
        name: lambda some, engine=engine: [engine.generate([ids], **greedy) for ids in some]
        for name, engine in engines.items()
    }
    seconds = timed_rounds(contenders, draw, 4 * rounds)["seconds"]  # these rounds are short
    depths = range(model.config.num_nextn_predict_layers)
    accepted = [[a.acceptance[depth] for a in answers if len(a.acceptance) > depth] for depth in depths]
    return {
        "tokens_per_forward": round(tokens / forwards, 3),
        "auto_vs_off": round(seconds["off"] / seconds["auto"], 3),
        "always_vs_off": round(seconds["off"] / seconds["all"], 3),
        "acceptance": [round(sum(shares) / len(shares), 3) for shares in accepted],
    }


@torch.inference_mode()
def bits_per_byte(folder: Path, rows: int) -> dict:
    """Score held-out text with the decoder, with weights in 32, 16 and 8 bits."""
    found = {}
    for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16), ("int8", torch.bfloat16)):
        model, tokenizer = open_checkpoint(folder, dtype)
        decoder, sizes = Decoder(model, int8=name == "int8"), TokenBytes(tokenizer)
        bits = n_bytes = 0
        for row in held_out(tokenizer, ROW, rows):
            ids, cache = torch.tensor([row]), decoder.cache()
            cache.resize(1, len(row))
            pieces = [  # short enough to run as steps
                decoder.head(decoder.run(piece, cache, decoder.place(cache, 0, [i * STEP], piece.shape[1])))
                for i, piece in enumerate(ids.split(STEP, dim=1))
            ]
            logits = torch.cat(pieces, dim=1)[0, :-1]
            bits += F.cross_entropy(logits.float(), ids[0, 1:], reduction="sum").item() / math.log(2)
            n_bytes += sum(len(sizes[id]) for id in row[1:])
        found[name] = round(bits / n_bytes, 4)
    return {"bits_per_byte": found}


def main(argv: list[str] | None = None) -> None:
    parser = options(__doc__.splitlines()[0])
    parser.add_argument("checkpoint", nargs="?", type=Path, help="a trained model with MTP modules, for the drafts")
    parser.add_argument("--rounds", type=int, default=9, help="measured rounds (9)")
    parser.add_argument("--prompts", type=int, default=48, help="held-out beginnings to continue (48)")
    parser.add_argument("--long", type=int, default=32_768, help="MoBA's longer context (32768)")
    arguments = parser.parse_args(argv)
    tuned = tune_allocator()
    with torch.inference_mode():
        result = against_transformers(arguments.rounds)
        result |= with_moba(arguments.rounds, arguments.long // 8, arguments.long)
        if importlib.util.find_spec("llama_cpp"):
            result |= against_llamacpp(seed_model(2048, moba_topk=0), CONTEXTS, Ours, TOKENS, arguments.rounds)
        else:
            print("llama.cpp is left out: `pip install llama-cpp-python` builds it in minutes", file=sys.stderr)
    result |= cache_sizes()
    if arguments.checkpoint:
        result |= with_drafts(arguments.checkpoint, arguments.rounds, arguments.prompts)
        result |= bits_per_byte(arguments.checkpoint, arguments.prompts)
    result |= {"rounds": arguments.rounds, "environment": environment("bfloat16", tuned)}
    write(arguments.results, "decode", result)


if __name__ == "__main__":
    main()
