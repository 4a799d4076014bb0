"""llama.cpp as a contender of decode.py, through `llama-cpp-python`: the same weights, exported to GGUF, in bf16 and in
Q8_0.

Its flash attention stays off, as `Llama` has it. Its logits must agree with ours, so that
both decode the same model. The memory's bandwidth is that of a sum over 512 MB, measured in the same rounds.
"""

import ctypes
import sys
import tempfile
from pathlib import Path
from unittest.mock import patch

import numpy as np
import torch
from torch import Tensor

from common import timed_rounds
from moonwhale.costs import model_size
from moonwhale.data.tokenizer import load_tokenizer
from moonwhale.export.gguf import to_gguf
from moonwhale.infer.decoder import Decoder
from moonwhale.model import MoonwhaleForCausalLM

FORMATS = {"bf16": "BF16", "int8": "Q8_0"}  # our weights, and llama.cpp's that are compared with them
PROMPT = 512  # tokens that are read at once
READ = 1 << 29  # bytes that are summed to measure the bandwidth
LARGEST_DIFFERENCE = {"bf16": 0.03, "int8": 0.06}  # of logits, relative to their norm


def exported(model: MoonwhaleForCausalLM, folder: Path) -> dict[str, Path]:
    """Write the model as GGUF in each format. The tokenizer is that of GPT-2: the ids are random anyway."""
    import llama_cpp

    tokenizer = load_tokenizer("gpt2")
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        setattr(model.config, name, getattr(tokenizer, name))
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    to_gguf(folder / "model", folder, torch.bfloat16)
    bf16, q8 = folder / "model.gguf", folder / "q8.gguf"
    parameters = llama_cpp.llama_model_quantize_default_params()
    parameters.ftype, parameters.nthread = llama_cpp.LLAMA_FTYPE_MOSTLY_Q8_0, torch.get_num_threads()
    if llama_cpp.llama_model_quantize(bytes(bf16), bytes(q8), ctypes.byref(parameters)) != 0:
        raise RuntimeError(f"llama.cpp did not quantize {bf16}")
    return {"bf16": bf16, "int8": q8}


def load(path: Path, context: int):
    """Load a GGUF file with our number of threads.

    Its weights are not repacked: on CPUs with AMX, llama.cpp 0.3.36 repacks Q8_0's W_UK into a layout that it then
    can't multiply by, and aborts. Repacking changes neither bf16 nor, without AMX, Q8_0 on x86.
    """
    import llama_cpp

    def parameters(defaults=llama_cpp.llama_cpp.llama_model_default_params):
        found = defaults()
        found.use_extra_bufts = False
        return found

    threads = torch.get_num_threads()
    threads = {"n_threads": threads, "n_threads_batch": threads}
    with patch.object(llama_cpp.llama_cpp, "llama_model_default_params", parameters):
        return llama_cpp.Llama(str(path), n_ctx=context, n_batch=PROMPT, n_ubatch=PROMPT, **threads, verbose=False)


class Steps:
    """llama.cpp's steps from a prompt (1, T) that is in its cache. Like our steps, they take the likeliest token."""

    def __init__(self, llama, prompt: Tensor, tokens: int):
        self.llama, self.prompt, self.tokens = llama, prompt[0].tolist(), tokens
        llama.reset()
        llama.eval(self.prompt[:-1])

    def __call__(self, _=None) -> None:
        self.llama.n_tokens, token = len(self.prompt) - 1, self.prompt[-1]
        for _ in range(self.tokens):
            self.llama.eval([token])
            token = int(logits(self.llama).argmax())


def read_prompt(llama, prompt: Tensor) -> np.ndarray:
    """Read a prompt (1, T) with llama.cpp and return the last token's logits (V,)."""
    llama.reset()
    llama.eval(prompt[0].tolist())
    return logits(llama)


def logits(llama) -> np.ndarray:
    """Return the logits (V,) of the last token."""
    return np.ctypeslib.as_array(llama._ctx.get_logits_ith(-1), shape=(llama.n_vocab(),))


def check_same_model(llama, decoder: Decoder, prompt: Tensor, largest: float) -> None:
    """Raise RuntimeError unless both give nearly the same logits after the prompt."""
    theirs, ours = torch.from_numpy(read_prompt(llama, prompt).copy()), reading(decoder, prompt)
    difference = ((theirs - ours).norm() / ours.norm()).item()
    if not difference <= largest:
        raise RuntimeError(f"llama.cpp's logits differ from ours by {difference:.1%}: it is not the same model")


def reading(decoder: Decoder, prompt: Tensor) -> Tensor:
    """Read a prompt (1, T) with our decoder and return the last token's logits (V,)."""
    cache = decoder.cache()
    cache.resize(1, prompt.shape[1])
    hidden = decoder.run(prompt, cache, decoder.place(cache, 0, [0], prompt.shape[1]))
    return decoder.head(hidden[:, -1:]).float().flatten()


def against_llamacpp(model: MoonwhaleForCausalLM, contexts: tuple, steps: type, tokens: int, rounds: int) -> dict:
    """Measure tokens per second compared with llama.cpp's, after contexts and in reading a prompt, and our share of the
    memory bandwidth.

    `steps(decoder, prompt)` are our steps of `tokens` tokens.
    """
    decoders = {"bf16": Decoder(model), "int8": Decoder(model, int8=True)}
    vocabulary, result = model.config.vocab_size, {}
    memory = torch.zeros(READ // 4)
    with tempfile.TemporaryDirectory() as folder:
        paths = exported(model, Path(folder))
        size = max(*contexts, PROMPT) + tokens
        llamas = {kind: load(path, size) for kind, path in paths.items()}
        for kind, llama in llamas.items():
            check_same_model(llama, decoders[kind], torch.randint(vocabulary, (1, 64)), LARGEST_DIFFERENCE[kind])
        for context in contexts:
            prompt = torch.randint(vocabulary, (1, context))
            contenders = {("moonwhale", kind): steps(decoder, prompt) for kind, decoder in decoders.items()}
            contenders |= {("llama.cpp", kind): Steps(llama, prompt, tokens) for kind, llama in llamas.items()}
            contenders["memory"] = lambda _: memory.sum()
            seconds = timed_rounds(contenders, lambda: None, rounds)["seconds"]
            _report(result, seconds, context, tokens)
            if context == contexts[0]:
                gigabytes = READ / seconds["memory"] / 1e9
                n_bytes = 2 * (model_size(model.config).active_parameters - model_size(model.config).embedding)
                share = n_bytes / (seconds["moonwhale", "bf16"] / tokens) / 1e9 / gigabytes
                result |= {"bandwidth_gb_per_s": round(gigabytes, 1), "bandwidth_share_bf16": round(share, 3)}
        prompt = torch.randint(vocabulary, (1, PROMPT))
        contenders = {
            "moonwhale": lambda _: reading(decoders["bf16"], prompt),
            "llama.cpp": lambda _: read_prompt(llamas["bf16"], prompt),
        }
        seconds = timed_rounds(contenders, lambda: None, rounds)["seconds"]
        result["prompt_vs_llamacpp"] = round(seconds["llama.cpp"] / seconds["moonwhale"], 2)
    return result


def _report(result: dict, seconds: dict, context: int, tokens: int) -> None:
    """Add the ratios and the milliseconds per token of one context to the result."""
    per_token = {}
    for kind, theirs in FORMATS.items():
        result[f"{kind}_vs_llamacpp_{context}"] = round(seconds["llama.cpp", kind] / seconds["moonwhale", kind], 2)
        per_token |= {f"moonwhale, {kind}": seconds["moonwhale", kind]}
        per_token |= {f"llama.cpp, {theirs}": seconds["llama.cpp", kind]}
    per_token = {name: round(1e3 * s / tokens, 2) for name, s in per_token.items()}
    result.setdefault("llamacpp_milliseconds_per_token", {})[str(context)] = per_token
    print(f"context {context}, full attention: {per_token}", file=sys.stderr)
