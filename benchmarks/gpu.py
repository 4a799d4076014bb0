"""How fast are training, MoBA and decoding on one NVIDIA GPU, compared with transformers, nanochat and flash attention?

    python benchmarks/gpu.py [--only mfu,moba,...] [--nanochat FOLDER]

The parts run one after another, and each result is written at once. Parts for which there was no time can follow later
with --only. A training step is a forward and backward pass with labels, with the seed model's shapes, under bf16
autocast, and compiled. If transformers has several implementations, the fastest one is compared. MoBA is `attention`
as the model calls it, including its gate and QK-clip's largest logits. Its result must equal that of a dense mask
before it is timed. Decoding is greedy steps of one sequence and of 64 after prompts of the context's length.

Keys of the answer (results/gpu.json):
    mfu: FLOP/s of a training step with MTP divided by the GPU's peak in bf16 (tokens_per_second_with_mtp,
        peak_gigabytes_with_mtp).
    vs_transformers, vs_nanochat: tokens/s without MTP divided by the other's (tokens_per_second, peak_gigabytes,
        active_parameters).
    max_logit_share: the extra time of a step for finding the largest logits, as a share (max_logit_seconds).
    moba_8k, moba_32k, moba_128k: seconds of flash attention divided by those of MoBA, forward and backward, for the
        slower of two settings (`moba` has both). moba_error: the largest relative difference from a dense mask.
    fp8_vs_bf16: seconds of a step of `large` in bf16 divided by those in FP8 (fp8_seconds, why_no_fp8).
    decode_1, decode_64: milliseconds of transformers divided by ours with CUDA graphs (decode_milliseconds, per step).
    gpu, rows, context: the GPU's name and the batch. failed: the error of each part that failed.
"""

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from common import environment, options, write
from decode import TOKENS, Ours, Theirs, seed_model, transformers_model
from moonwhale import fp8
from moonwhale.costs import flops_per_token
from moonwhale.infer.decoder import Decoder
from moonwhale.infer.graphs import CAPTURE_AFTER
from moonwhale.model import MoonwhaleConfig, flex
from moonwhale.model.documents import Documents
from moonwhale.model.moba import moba_attention, moba_mask
from moonwhale.precision import peak_flops, precision_unsupported_reason
from moonwhale.presets import PRESETS
from moonwhale.train.pretrain import compile_blocks
from train import EXPERTS, active, build

BF16 = torch.bfloat16
SETTINGS = {"128_top8": (128, 8), "512_top3": (512, 3)}  # keys per block, blocks per query
LENGTHS = {"8k": 8192, "32k": 32_768, "128k": 131_072}
HEADS, KEY_WIDTH, VALUE_WIDTH = 12, 96, 64  # those of the seed model


class Bench:
    """Times functions on a device: the median of `rounds` calls after three warm-up calls.

    A training step has `rows` rows of `context` tokens.
    """

    def __init__(self, device: torch.device, rows: int = 16, context: int = 1024, rounds: int = 10):
        self.device, self.rows, self.context, self.rounds = device, rows, context, rounds

    def seconds(self, function: Callable[[], object]) -> float:
        taken = []
        for _ in range(self.rounds + 3):
            self._synchronize()
            start = time.perf_counter()
            function()
            self._synchronize()
            taken.append(time.perf_counter() - start)
        return median(taken[3:])

    def _synchronize(self) -> None:
        if self.device.type != "cpu":
            torch.accelerator.synchronize(self.device)

    def training(self, model: nn.Module, rows: int, context: int) -> tuple[float, float]:
        """Returns the seconds of a step and its peak memory in gigabytes, weights and gradients included."""
        tokens = torch.randint(model.config.vocab_size, (rows, context), device=self.device)

        def step() -> None:
            with torch.autocast(self.device.type, BF16):
                out = model(input_ids=tokens, labels=tokens)
            out.loss.backward()
            model.zero_grad(set_to_none=True)

        torch._dynamo.reset()  # it keeps the graphs of only a few models
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        seconds = self.seconds(step)
        peak = torch.cuda.max_memory_allocated(self.device) if self.device.type == "cuda" else 0
        return seconds, peak / 1e9

    def ours(self, kind: str, shapes: dict, context: int) -> nn.Module:
        model = build(kind, shapes, context).to(self.device).train()
        if self.device.type == "cuda":
            compile_blocks(model, self.device)
        return model


def mfu(bench: Bench, _) -> dict:
    """Measures the whole seed model with its MTP modules, as a share of the GPU's peak FLOP/s."""
    shapes = PRESETS["seed_190m"].model
    seconds, peak = bench.training(bench.ours("moonwhale with MTP", shapes, bench.context), bench.rows, bench.context)
    speed = bench.rows * bench.context / seconds
    flops = flops_per_token(MoonwhaleConfig(**shapes), bench.context)
    share = speed * flops / peak_flops(bench.device, BF16)
    return {
        "mfu": round(share, 4),
        "tokens_per_second_with_mtp": round(speed),
        "peak_gigabytes_with_mtp": round(peak, 2),
    }


def peers(bench: Bench, nanochat: Path | None) -> dict:
    """Compares the tokens/s of our model with those of each peer. MTP is off, since no peer has it."""
    shapes, context, speeds, peaks = PRESETS["seed_190m"].model, bench.context, {}, {}

    def measure(name: str, model: nn.Module) -> None:
        seconds, peak = bench.training(model, bench.rows, context)
        speeds[name], peaks[name] = round(bench.rows * context / seconds), round(peak, 2)
        print(f"{name}: {speeds[name]:,} tokens/s", file=sys.stderr)

    measure("moonwhale", bench.ours("moonwhale", shapes, context))
    for experts in EXPERTS:
        for compiled in (False, True):
            model = build("transformers", shapes, context).to(bench.device).train()
            model.set_experts_implementation(experts)
            name = f"transformers, {experts}" + ", compiled" * compiled
            try:
                if compiled and bench.device.type == "cuda":
                    model.compile()
                measure(name, model)
            except RuntimeError as error:  # leave out a peer that cannot run, and report it
                speeds[name] = None
                print(f"{name}: left out, {str(error).splitlines()[0]}", file=sys.stderr)
    if nanochat:
        measure("nanochat", Nanochat(nanochat, shapes, context, bench.device))
    theirs = max((speed for name, speed in speeds.items() if name.startswith("transformers") and speed), default=None)
    return {
        "vs_transformers": ratio(speeds["moonwhale"], theirs),
        "vs_nanochat": ratio(speeds["moonwhale"], speeds.get("nanochat")),
        "tokens_per_second": speeds,
        "peak_gigabytes": peaks,
        "active_parameters": active(MoonwhaleConfig(**shapes | {"num_nextn_predict_layers": 0})),
    }


class Nanochat(nn.Module):
    """The model in a checkout of nanochat, compiled, with the width and the depth of ours.

    A layer has 12 times the square of its width parameters. At the seed model's width, this is the number of active
    parameters in one of our blocks.
    """

    def __init__(self, folder: Path, shapes: dict, context: int, device: torch.device):
        super().__init__()
        sys.path.insert(0, str(folder))
        from nanochat.gpt import GPT, GPTConfig

        heads = {"n_head": shapes["num_attention_heads"], "n_kv_head": shapes["num_attention_heads"]}
        widths = {"n_layer": shapes["num_hidden_layers"], "n_embd": shapes["hidden_size"], "window_pattern": "L"}
        self.config = MoonwhaleConfig(**shapes)
        with torch.device("meta"):
            model = GPT(GPTConfig(vocab_size=shapes["vocab_size"], sequence_len=context, **heads, **widths))
        model.to_empty(device=device)
        model.init_weights()
        self.model = torch.compile(model, dynamic=False)

    def forward(self, input_ids: Tensor, labels: Tensor):
        following = labels.roll(-1, 1)
        following[:, -1] = -1
        return SimpleNamespace(loss=self.model(input_ids, following))


def max_logits(bench: Bench, _) -> dict:
    """Measures the cost of finding the largest logits: a step with them, divided by one without."""
    shapes, right = PRESETS["seed_190m"].model, flex._flex

    def without(q, k, v, scale, mask):
        auxiliary = flex.AuxRequest(lse=True)
        out, aux = flex.flex_attention(q, k, v, block_mask=mask, scale=scale, return_aux=auxiliary)
        return out, aux.lse, torch.zeros_like(aux.lse)

    found = {}
    for name, function in (("without", without), ("with", right), ("without again", without)):
        flex._flex = function
        try:
            found[name], _ = bench.training(bench.ours("moonwhale", shapes, bench.context), bench.rows, bench.context)
        finally:
            flex._flex = right
    least = min(found["without"], found["without again"])
    return {"max_logit_share": round(found["with"] / least - 1, 4), "max_logit_seconds": found}


def moba(bench: Bench, _) -> dict:
    """Compares MoBA's forward and backward pass with SDPA's flash kernel at both settings; the slower one counts."""
    scale, result, table = KEY_WIDTH**-0.5, {}, {}
    result["moba_error"] = max(error(bench, *setting, scale) for setting in SETTINGS.values())
    for case, length in LENGTHS.items():
        widths = (KEY_WIDTH, KEY_WIDTH, VALUE_WIDTH, VALUE_WIDTH)
        *inputs, d_out = (torch.randn(1, HEADS, length, width, device=bench.device, dtype=BF16) for width in widths)
        inputs = [x.requires_grad_() for x in inputs]
        documents = Documents.from_inputs(1, length, bench.device, None, None)

        def both(run, inputs=inputs, d_out=d_out):
            torch.autograd.grad(run(*inputs), inputs, d_out)

        taken = {"flash": bench.seconds(lambda both=both: both(lambda *qkv: flash(*qkv, scale)))}
        for name, setting in SETTINGS.items():
            taken[name] = bench.seconds(
                lambda both=both, documents=documents, setting=setting: both(
                    lambda *qkv: attention(*qkv, scale, documents, *setting)
                )
            )
        ratios = {name: round(taken["flash"] / taken[name], 3) for name in SETTINGS}
        result[f"moba_{case}"], table[case] = min(ratios.values()), {"seconds": taken, "times_as_fast": ratios}
        print(f"{case}: {ratios} times as fast as flash", file=sys.stderr)
    return result | {"moba": table}


def attention(
    q: Tensor, k: Tensor, v: Tensor, scale: float, documents: Documents, block_size: int, topk: int
) -> Tensor:
    """Computes MoBA's output as the model would on this device."""
    way = flex.attention if flex.serves(q, documents) else moba_attention
    return way(q, k, v, scale, documents, block_size, topk)[0]


def flash(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """Computes full attention with the flash kernel, which needs values as wide as the keys."""
    wide = F.pad(v, (0, KEY_WIDTH - VALUE_WIDTH))
    with sdpa_kernel([SDPBackend.FLASH_ATTENTION]):
        return F.scaled_dot_product_attention(q, k, wide, is_causal=True, scale=scale)[..., :VALUE_WIDTH]


def error(bench: Bench, block_size: int, topk: int, scale: float) -> float:
    """Returns the largest relative difference of the output and gradients from a dense mask in fp32.

    It checks both ways of MoBA, for short and for long contexts.
    """
    length = block_size * (topk + 5)
    documents, widths = (
        Documents.from_inputs(1, length, bench.device, None, None),
        (KEY_WIDTH, KEY_WIDTH, VALUE_WIDTH, VALUE_WIDTH),
    )
    *given, d_out = (torch.randn(1, 2, length, width, device=bench.device, dtype=BF16) for width in widths)
    results, usual = [], flex.LONG_CONTEXT
    for long in (0, usual, None):
        inputs = [x.float() if long is None else x for x in given]
        inputs = [x.detach().requires_grad_() for x in inputs]
        if long is None:
            q, k, v = inputs
            seen = moba_mask(q @ k.mT, documents, block_size, topk)
            out = (q @ k.mT * scale).masked_fill(~seen, -torch.inf).softmax(-1) @ v
        else:
            torch._dynamo.reset()
            flex.LONG_CONTEXT = long
            out = attention(*inputs, scale, documents, block_size, topk)
            flex.LONG_CONTEXT = usual
        results.append([out.detach(), *torch.autograd.grad(out, inputs, d_out.to(out.dtype))])
    *ours, exact = results
    worst = max(((a.float() - b).norm() / b.norm()).item() for found in ours for a, b in zip(found, exact, strict=True))
    if worst > 0.02:  # bf16 has eight bits
        raise ValueError(f"MoBA differs from its dense twin by {worst:.3f}")
    return round(worst, 5)


def fp8_step(bench: Bench, _) -> dict:
    """Compares a step of `large` in DeepSeek's blockwise FP8 with one in bf16."""
    shapes, emulate = PRESETS["large"].model, bench.device.type == "cpu"
    if not emulate and (why := precision_unsupported_reason(bench.device, "fp8-blockwise")):
        return {"fp8_vs_bf16": None, "why_no_fp8": why}
    rows, context, seconds = max(1, bench.rows // 4), bench.context, {}
    for name in ("bf16", "fp8-blockwise"):
        model = build("moonwhale", shapes, context).to(bench.device).train()
        if name != "bf16":
            fp8.convert(model, "blockwise", emulate=emulate)
        if bench.device.type == "cuda":
            compile_blocks(model, bench.device)
        seconds[name], _ = bench.training(model, rows, context)
    return {"fp8_vs_bf16": ratio(seconds["bf16"], seconds["fp8-blockwise"]), "fp8_seconds": seconds}


@torch.inference_mode()
def decode(bench: Bench, _) -> dict:
    """Compares decoding steps of 1 and 64 sequences, with and without CUDA graphs, with transformers' `generate`."""
    ours, result, table = seed_model(2 * bench.context).to(bench.device), {}, {}
    peers = {experts: transformers_model(ours, experts).to(bench.device) for experts in EXPERTS}
    for rows in (1, 64):
        prompt = torch.randint(ours.config.vocab_size, (rows, bench.context), device=bench.device)
        decoders = {"graphs": Decoder(ours), "one by one": Decoder(ours)}
        decoders["one by one"].graphs = None
        contenders: dict = {name: Ours(decoder, prompt) for name, decoder in decoders.items()}
        for _ in range(CAPTURE_AFTER // TOKENS):
            contenders["graphs"]()  # until they are captured
        contenders |= {f"transformers, {experts}": Theirs(model, prompt) for experts, model in peers.items()}
        taken = {name: round(1e3 * bench.seconds(step) / TOKENS, 3) for name, step in contenders.items()}
        best = min(seconds for name, seconds in taken.items() if name.startswith("transformers"))
        result[f"decode_{rows}"], table[rows] = ratio(best, taken["graphs"]), taken
        print(f"{rows} sequences, milliseconds a step: {taken}", file=sys.stderr)
    return result | {"decode_milliseconds": table}


def ratio(above: float | None, below: float | None) -> float | None:
    return round(above / below, 3) if above and below else None


PARTS = {"mfu": mfu, "moba": moba, "peers": peers, "max_logits": max_logits, "fp8": fp8_step, "decode": decode}


def main(argv: list[str] | None = None) -> int:
    parser = options(__doc__.splitlines()[0])
    parser.add_argument("--only", default=",".join(PARTS), help=f"parts, as A,B ({','.join(PARTS)})")
    parser.add_argument("--rows", type=int, default=16, help="rows of 1,024 tokens per batch (16)")
    parser.add_argument("--nanochat", type=Path, metavar="FOLDER", help="checkout of nanochat, one of the peers")
    arguments = parser.parse_args(argv)
    chosen = arguments.only.split(",")
    if unknown := [name for name in chosen if name not in PARTS]:
        parser.error(f"--only: no part {unknown[0]!r} (give some of {','.join(PARTS)})")
    if not torch.cuda.is_available():
        print("gpu.py needs an NVIDIA GPU, and torch finds none: nothing was measured or written", file=sys.stderr)
        return 2
    device = torch.device("cuda")
    run(
        Bench(device, arguments.rows), torch.cuda.get_device_name(device), chosen, arguments.nanochat, arguments.results
    )
    return 0


def run(bench: Bench, gpu: str, chosen: list[str], nanochat: Path | None, results: Path) -> None:
    """Runs the parts and writes each result. Results in gpu.json are kept if they are from the same GPU."""
    file = results / "gpu.json"
    before = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    result = before if before.get("gpu") == gpu else {}
    result |= {"gpu": gpu, "rows": bench.rows, "context": bench.context}
    for name in chosen:
        start = time.perf_counter()
        failed = result.setdefault("failed", {})
        failed.pop(name, None)
        try:
            result |= PARTS[name](bench, nanochat)
        except Exception as error:  # use the remaining GPU time for the other parts
            failed[name] = f"{type(error).__name__}: {error}".splitlines()[0]
        print(f"{name}: {time.perf_counter() - start:.0f} s {failed.get(name, '')}", file=sys.stderr)
        write(results, "gpu", result | {"environment": environment("bf16 autocast", False)})


if __name__ == "__main__":
    sys.exit(main())
