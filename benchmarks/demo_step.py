"""Is a training step of the demo model at least 1.3 times as fast as one of transformers' DeepseekV3 with its shapes?

    python benchmarks/demo_step.py

A step is a forward and backward pass with labels. MTP is off on both sides, since transformers does not train it. Our
model runs with MoBA, as in the preset, and with full attention. transformers runs with sdpa and each of its experts
implementations that can train on a CPU. All models have the same weights. With full attention, the losses of both sides
must agree before anything is timed. Each round has new tokens, so the number of tokens per expert varies as in
training, and kernels that are compiled for one shape pay for it.

Keys of the answer (results/demo_step.json), for DTYPE fp32 and bf16 (autocast):
    vs_transformers_DTYPE: tokens/s with MoBA, divided by those of the fastest transformers contender.
    full_attention_vs_transformers_DTYPE: the same with full attention.
    DTYPE: tokens_per_second of each contender, and the rounds used, discarded and busiest (see common.timed_rounds).
    rows, context: rows of a batch, tokens per row.
"""

import torch
from transformers import DeepseekV3ForCausalLM

from common import deepseek_config, environment, options, timed_rounds, write
from moonwhale.model import MoonwhaleConfig, MoonwhaleForCausalLM
from moonwhale.native.training import use_kernels
from moonwhale.precision import tune_allocator
from moonwhale.presets import PAPER, PRESETS

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
EXPERTS = ("eager", "grouped_mm")  # batched_mm copies an expert's weights for every token


def models() -> dict[str, torch.nn.Module]:
    """Builds the contenders with the same weights."""
    torch.manual_seed(0)
    shapes = PRESETS["demo"].model | PAPER.model | {"num_nextn_predict_layers": 0}  # what both can compute
    full = MoonwhaleForCausalLM(MoonwhaleConfig(**shapes | {"moba_topk": 0}))
    moba = MoonwhaleForCausalLM(MoonwhaleConfig(**shapes))
    moba.load_state_dict(full.state_dict())
    contenders = {"moonwhale, MoBA": moba, "moonwhale, full attention": full}
    for experts in EXPERTS:
        model = DeepseekV3ForCausalLM(deepseek_config(full.config))
        model.load_state_dict(full.state_dict())
        model.set_experts_implementation(experts)
        contenders[f"transformers, {experts} experts"] = model
    return {name: model.train() for name, model in contenders.items()}


def check_same(contenders: dict[str, torch.nn.Module], tokens: torch.Tensor) -> None:
    """Checks that all models with full attention compute the same loss, so that only their speed differs."""
    ours = contenders["moonwhale, full attention"](tokens, labels=tokens).losses[0]
    for name, model in contenders.items():
        if name.startswith("transformers"):
            torch.testing.assert_close(model(tokens, labels=tokens, use_cache=False).loss, ours, atol=1e-4, rtol=0)


def step(model: torch.nn.Module, dtype: torch.dtype):
    def run(tokens: torch.Tensor) -> None:
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            loss = model(tokens, labels=tokens, use_cache=False).loss
        loss.backward()
        model.zero_grad()

    return run


def main(argv: list[str] | None = None) -> None:
    parser = options(__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=15, help="valid rounds per dtype (15)")
    parser.add_argument("--rows", type=int, help="rows per batch (the preset's batch size)")
    arguments = parser.parse_args(argv)
    context, rows = PRESETS["demo"].train["context"], arguments.rows or PRESETS["demo"].train["batch_size"]

    tuned, contenders = tune_allocator(), models()
    use_kernels(torch.device("cpu"))
    vocab_size = contenders["moonwhale, MoBA"].config.vocab_size
    generator = torch.Generator().manual_seed(1)

    def draw() -> torch.Tensor:
        return torch.randint(vocab_size, (rows, context), generator=generator)

    check_same(contenders, draw())
    result, timings = {}, {}
    for name, dtype in DTYPES.items():
        timing = timed_rounds({n: step(model, dtype) for n, model in contenders.items()}, draw, arguments.rounds)
        speeds = {n: round(rows * context / seconds) for n, seconds in timing.pop("seconds").items()}
        best = max(speed for n, speed in speeds.items() if n.startswith("transformers"))
        result[f"vs_transformers_{name}"] = round(speeds["moonwhale, MoBA"] / best, 3)
        result[f"full_attention_vs_transformers_{name}"] = round(speeds["moonwhale, full attention"] / best, 3)
        timings[name] = {"tokens_per_second": speeds, **timing}
    result |= {"rows": rows, "context": context, **timings, "environment": environment("fp32 and bf16", tuned)}
    write(arguments.results, "demo_step", result)


if __name__ == "__main__":
    main()
