"""How fast are training, MoBA and decoding on one NVIDIA GPU, compared with transformers, nanochat and flash attention?

    python benchmarks/gpu.py [--only mfu,moba,...] [--nanochat FOLDER] [--text FILE...]

The parts run one after another, and each result is written at once. Parts for which there was no time can follow later
with --only; gpu_all.py runs all of them with time limits. A training step is a forward and backward pass with labels,
with the seed model's shapes, under bf16 autocast, and compiled. If transformers has several implementations, the
fastest one is compared. MoBA is `attention` as the model calls it, including its gate and QK-clip's largest logits. Its
result must equal that of a dense mask before it is timed. Decoding is greedy steps of one sequence and of 64 after
prompts of the context's length.

Keys of the answer (results/gpu.json):
    mfu: FLOP/s of a training step with MTP divided by the GPU's peak in bf16 (tokens_per_second_with_mtp,
        peak_gigabytes_with_mtp).
    vs_transformers, vs_dense, vs_nanochat: tokens/s without MTP divided by the other's (tokens_per_second,
        peak_gigabytes, active_parameters).
    max_logit_share: the extra time of a step for finding the largest logits, as a share (max_logit_seconds).
    moba_8k, moba_32k, moba_128k: seconds of flash attention divided by those of MoBA, forward and backward, for the
        slower of two settings (`moba` has both). moba_error: the largest relative difference from a dense mask.
    fp8_vs_bf16: seconds of a step of `large` in bf16 divided by those in FP8 (fp8_seconds, why_no_fp8).
    decode_1, decode_64: milliseconds of transformers divided by ours with CUDA graphs (decode_milliseconds, per step).
    thresholds: the values for moonwhale/model/thresholds.py, and the seconds behind them.
    seed_bits_per_byte, seed_curve, seed_steps: see gpu_seed.train.
    gpu, rows, context: the GPU's name and the batch. failed: the error of each part that failed.
"""

import json
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from statistics import median
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import gpu_seed
import gpu_thresholds
from common import environment, options, write
from decode import TOKENS, Ours, Theirs, seed_model, transformers_model
from dense import DenseLM
from moonwhale import fp8
from moonwhale.costs import flops_per_token
from moonwhale.infer.decoder import Decoder
from moonwhale.infer.graphs import CAPTURE_AFTER
from moonwhale.model import MoonwhaleConfig, flex
from moonwhale.model.documents import Documents
from moonwhale.model.moba import moba_attention, moba_mask
from moonwhale.precision import peak_flops, precision_unsupported_reason
from moonwhale.presets import PAPER, PRESETS
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
        self.keep: Callable[[dict], None] = lambda found: None  # writes what a part has found so far
        self.seconds_to_train, self.texts = 60.0, []
        self.toy, self.known = {}, {}  # options of a toy run; the results so far

    def seconds(self, function: Callable[[], object]) -> float:
        taken = []
        for _ in range(self.rounds + 3):
            self.synchronize()
            start = time.perf_counter()
            function()
            self.synchronize()
            taken.append(time.perf_counter() - start)
        return median(taken[3:])

    def synchronize(self) -> None:
        if self.device.type != "cpu":
            torch.accelerator.synchronize(self.device)

    def training(self, model: nn.Module, rows: int, context: int) -> tuple[float, float]:
        """Returns the seconds of a step and its peak memory in gigabytes, weights and gradients included."""
        tokens = torch.randint(self.vocab_size(model), (rows, context), device=self.device)

        def step() -> None:
            with torch.autocast(self.device.type, BF16):
                out = model(tokens, labels=tokens)
            (out if isinstance(out, Tensor) else out.loss).backward()
            model.zero_grad(set_to_none=True)

        torch._dynamo.reset()  # it keeps the graphs of only a few models
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        seconds = self.seconds(step)
        peak = torch.cuda.max_memory_allocated(self.device) if self.device.type == "cuda" else 0
        return seconds, peak / 1e9

    @staticmethod
    def vocab_size(model: nn.Module) -> int:
        return model.tokens.num_embeddings if isinstance(model, DenseLM) else model.config.vocab_size

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
        bench.keep({"tokens_per_second": speeds, "peak_gigabytes": peaks})
        print(f"{name}: {speeds[name]:,} tokens/s", file=sys.stderr)

    measure("moonwhale", bench.ours("moonwhale", shapes, context))
    dense = build("dense", shapes, context).to(bench.device).train()
    if bench.device.type == "cuda":
        dense.compile()
    measure("dense", dense)
    for compiled in (False, True):
        for experts in EXPERTS:
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
        "vs_dense": ratio(speeds["moonwhale"], speeds["dense"]),
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
        torch._dynamo.reset()  # each length is compiled anew, and torch gives up after eight
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
        bench.keep(result | {"moba": table})
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


def thresholds(bench: Bench, _) -> dict:
    """Settles the values of moonwhale/model/thresholds.py."""
    setting = list(SETTINGS.values())[-1]
    return gpu_thresholds.sweep(bench, attention, setting, (HEADS, KEY_WIDTH, VALUE_WIDTH), gpu_name(bench.device))


def seed(bench: Bench, _) -> dict:
    """Trains `seed_190m` for `seconds_to_train`."""
    return gpu_seed.train(
        bench.seconds_to_train, bench.texts, bench.known.get("tokens_per_second_with_mtp"), **bench.toy
    )


def gpu_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "no GPU: a rehearsal"


def shrink() -> None:
    """Make shapes and lengths so small that a CPU runs all parts. Their figures then mean nothing."""
    toy = PRESETS["demo"].model | PAPER.model | {"vocab_size": 300, "hidden_size": 32, "num_hidden_layers": 2}
    toy |= {"num_attention_heads": 2, "q_lora_rank": 16, "kv_lora_rank": 16, "qk_nope_head_dim": 8}
    toy |= {"qk_rope_head_dim": 8, "v_head_dim": 8, "moba_block_size": 8, "moba_topk": 2}
    toy |= {"moba_full_attention_layers": [1], "n_routed_experts": 4, "num_experts_per_tok": 2}
    toy |= {"moe_intermediate_size": 16, "num_nextn_predict_layers": 1, "mtp_num_blocks": 1}
    for name in ("seed_190m", "large"):
        PRESETS[name].model.clear()
        PRESETS[name].model.update(toy)
    LENGTHS.clear()
    LENGTHS["8k"] = 64
    SETTINGS.clear()
    SETTINGS.update({"16_top2": (16, 2), "8_top3": (8, 3)})
    gpu_thresholds.TOKEN_COUNTS = (4, 8)


PARTS = {
    "mfu": mfu,
    "peers": peers,
    "moba": moba,
    "max_logits": max_logits,
    "decode": decode,
    "fp8": fp8_step,
    "thresholds": thresholds,
    "seed": seed,
}


def main(argv: list[str] | None = None) -> int:
    parser = options(__doc__.splitlines()[0])
    parser.add_argument("--only", default=",".join(PARTS), help=f"parts, as A,B ({','.join(PARTS)})")
    parser.add_argument("--rows", type=int, default=16, help="rows of 1,024 tokens per batch (16)")
    parser.add_argument("--nanochat", type=Path, metavar="FOLDER", help="checkout of nanochat, one of the peers")
    parser.add_argument("--text", nargs="*", default=[], metavar="FILE", help="more text for the part `seed`")
    parser.add_argument("--seconds", type=float, default=60, help="how long the part `seed` trains (60)")
    parser.add_argument("--rehearse", action="store_true", help="run at toy size, also without a GPU")
    arguments = parser.parse_args(argv)
    chosen = arguments.only.split(",")
    if unknown := [name for name in chosen if name not in PARTS]:
        parser.error(f"--only: no part {unknown[0]!r} (give some of {','.join(PARTS)})")
    if not torch.cuda.is_available() and not arguments.rehearse:
        print("gpu.py needs an NVIDIA GPU, and torch finds none: nothing was measured or written", file=sys.stderr)
        return 2
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    bench = Bench(device, arguments.rows)
    if arguments.rehearse:
        shrink()
        bench = Bench(device, rows=2, context=32, rounds=1)
        bench.toy = {"context": 32, "batch_size": 2, "tokens_per_step": 64, "data_documents": 5, "eval_rows": 4}
    bench.seconds_to_train, bench.texts = arguments.seconds, arguments.text
    failed = run(bench, gpu_name(device), chosen, arguments.nanochat, arguments.results)
    return 1 if failed else 0


def run(bench: Bench, gpu: str, chosen: list[str], nanochat: Path | None, results: Path) -> dict:
    """Runs the parts and writes each result. Results in gpu.json are kept if they are from the same GPU.

    Returns:
        the error of each of these parts that failed.
    """
    file = results / "gpu.json"
    before = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    result = before if before.get("gpu", gpu) == gpu else {}  # without a name: gpu_all.py alone has written
    result |= {"gpu": gpu, "rows": bench.rows, "context": bench.context}
    details = environment("bf16 autocast", False)

    def keep(found: dict) -> None:
        result.update(found)
        write(results, "gpu", result | {"environment": details})

    bench.keep, bench.known = keep, result
    for name in chosen:
        start = time.perf_counter()
        failed = result.setdefault("failed", {})
        failed.pop(name, None)
        try:
            result.update(PARTS[name](bench, nanochat))
        except Exception as error:  # use the remaining GPU time for the other parts
            failed[name] = f"{type(error).__name__}: {error}".splitlines()[0]
            traceback.print_exc()
        print(f"{name}: {time.perf_counter() - start:.0f} s {failed.get(name, '')}", file=sys.stderr)
        keep({})
    return {name: error for name, error in result.get("failed", {}).items() if name in chosen}


if __name__ == "__main__":
    sys.exit(main())
