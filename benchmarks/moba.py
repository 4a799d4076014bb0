"""How much faster is MoBA, including its gate, than full attention at 1 k, 16 k and 32 k tokens?

    python benchmarks/moba.py

Full attention is torch's `scaled_dot_product_attention` in its fastest form on a CPU. For this, values are padded to
the width of the keys; otherwise torch falls back to a kernel that stores all scores. MoBA is `moba_attention` as the
model calls it, which also finds the largest logit of each query for QK-clip. Both get the same new queries, keys and
values in each round. At 1 k tokens there are as many heads as in the seed model, at the longer lengths two, since each
head takes seconds there.

Keys of the answer (results/moba.json), for CASE 1k, 16k and 32k:
    fwd_CASE, fwdbwd_CASE: seconds of full attention divided by those of MoBA, in bf16, for the forward pass, and for
        the forward and backward pass; fwd_CASE_fp32 and fwdbwd_CASE_fp32 are the same in fp32.
    heads, topk: attention heads of each case, and MoBA's blocks per query, its own included.
    timings: the seconds of each contender, and the rounds used, discarded and busiest.
"""

import torch
import torch.nn.functional as F

from common import environment, options, timed_rounds, write
from moonwhale.model.documents import Documents
from moonwhale.model.moba import moba_attention
from moonwhale.native.training import use_kernels
from moonwhale.precision import tune_allocator

CASES = {"1k": (1024, 128, 12), "16k": (16_384, 256, 2), "32k": (32_768, 512, 2)}  # tokens, keys per block, heads
TOPK, KEY_WIDTH, VALUE_WIDTH = 3, 96, 64  # the seed's widths
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


def contenders(length: int, block_size: int) -> dict:
    """Returns both kinds of attention, without and with the backward pass, as functions of (q, k, v, gradient)."""
    documents, scale = Documents.from_inputs(1, length, torch.device("cpu"), None, None), KEY_WIDTH**-0.5

    def full(q, k, v):
        wide = F.pad(v, (0, KEY_WIDTH - VALUE_WIDTH))
        return F.scaled_dot_product_attention(q, k, wide, is_causal=True, scale=scale)[..., :VALUE_WIDTH]

    def moba(q, k, v):
        return moba_attention(q, k, v, scale, documents, block_size, TOPK)[0]

    def forward(attention):
        def run(given):
            with torch.no_grad():
                attention(*given[:3])

        return run

    def both(attention):
        def run(given):
            inputs = [x.detach().requires_grad_() for x in given[:3]]
            attention(*inputs).backward(given[3])

        return run

    return {
        "full fwd": forward(full),
        "moba fwd": forward(moba),
        "full fwdbwd": both(full),
        "moba fwdbwd": both(moba),
    }


def main(argv: list[str] | None = None) -> None:
    parser = options(__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5, help="valid rounds per case and dtype (5)")
    parser.add_argument("--shrink", type=int, default=1, help="divisor of lengths and blocks, for a quick trial (1)")
    arguments = parser.parse_args(argv)
    tuned, generator, result, details = tune_allocator(), torch.Generator().manual_seed(1), {}, {}
    use_kernels(torch.device("cpu"))
    for name, dtype in DTYPES.items():
        for case, (*sizes, heads) in CASES.items():
            length, block_size = (size // arguments.shrink for size in sizes)

            def draw(length=length, heads=heads, dtype=dtype):
                widths = (KEY_WIDTH, KEY_WIDTH, VALUE_WIDTH, VALUE_WIDTH)
                return [torch.randn(1, heads, length, w, generator=generator).to(dtype) for w in widths]

            timing = timed_rounds(contenders(length, block_size), draw, arguments.rounds)
            seconds = timing["seconds"]
            for what in ("fwd", "fwdbwd"):
                ratio = round(seconds[f"full {what}"] / seconds[f"moba {what}"], 3)
                result[f"{what}_{case}" if name == "bf16" else f"{what}_{case}_{name}"] = ratio
            details[f"{name} {case}"] = timing
    result |= {"heads": {case: heads for case, (*_, heads) in CASES.items()}, "topk": TOPK, "timings": details}
    write(arguments.results, "moba", result | {"environment": environment("bf16, and fp32 where named", tuned)})


if __name__ == "__main__":
    main()
