"""The README's tables of benchmark results: one figure a cell, each with the script that measures it."""

MEMORY_WITHOUT_KERNELS = "2895a3d0adcf37478e91938d6201f7698bc23ede"  # commit of a train.json whose memory is that
PARTS = {"optimizer": ("race", "cost"), "parallel": ("equality", "kills")}  # each with an environment of its own


def tables(results: dict[str, dict]) -> str:
    """Returns all tables, from the benchmarks' results by name."""
    sections = {
        "What training reaches": quality(
            [results["quality"], results["quality_20min"]], results["optimizer"], results["grpo"], results["fp8"]
        ),
        "Training speed": training(results["train"], results["demo_step"], results["optimizer"]),
        "MoBA, compared with full attention": moba({"AVX-512": results["moba"], "AMX": results["moba_amx"]}),
        "Decoding, one request": decoding(results["decode"]),
        "Memory and drafts": memory(results["decode"]),
        "Serving, and several processes": serving(results["serve"], results["parallel"]),
    }
    return "\n\n".join(f"**{title}**\n\n{table}" for title, table in sections.items()) + "\n\n" + machines(results)


def table(head: list[str], rows: list[list[str]]) -> str:
    """Returns a Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def script(name: str) -> str:
    return f"[{name}.py](benchmarks/{name}.py)"


def times(ratio: float, digits: int = 2) -> str:
    return f"{ratio:.{digits}f}×"


def quality(races: list[dict], optimizer: dict, grpo: dict, fp8: dict) -> str:
    """What models learn: bits per byte after equal time, tokens that MuonClip saves, right answers after GRPO."""
    names = {"ours": "moonwhale", "nanochat": "nanochat", "dense": "a dense GPT with AdamW"}
    rows = [
        [
            f"held-out bits per byte after {race['seconds']['ours']:.0f} s: {name}",
            f"{race['bits_per_byte'][key]:.3f}",
            script("quality"),
        ]
        for race in races
        for key, name in names.items()
        if key in race["bits_per_byte"]
    ]
    seeds = len(optimizer["tokens_vs_adamw_by_seed"])
    saved = f"tokens to AdamW's final loss with MuonClip, relative to AdamW; median of {seeds} seeds"
    rows.append([saved, times(optimizer["tokens_vs_adamw"]), script("optimizer")])
    after = min(each["pass1"] for each in grpo["after"])
    for what, share in {
        "right answers to sums, held out (pass@1), before GRPO": grpo["before"]["pass1"],
        f"after GRPO, the lowest of {grpo['seeds']} seeds": after,
        "after GRPO with rewards for the format alone": grpo["after_format_alone"]["pass1"],
    }.items():
        rows.append([what, f"{share:.0%}", script("grpo")])
    error = f"held-out loss after {fp8['steps']} steps in emulated DeepSeek FP8, compared with bf16's"
    rows.append([error, f"{fp8['relative_held_out_error']:+.2%}", script("fp8")])
    return table(["question", "figure", "script"], rows)


def training(train: dict, demo_step: dict, optimizer: dict) -> str:
    """Tokens per second and memory of training steps, relative to others. A column is a precision of moonwhale."""
    seed = [times(train[f"vs_transformers_{pair}"]) for pair in ("fp32_same_dtype", "autocast")]
    demo = [times(demo_step[f"vs_transformers_{dtype}"]) for dtype in ("fp32", "bf16")]
    old = train["environment"]["commit"] == MEMORY_WITHOUT_KERNELS
    without = ", without the [kernels](docs/training.md#kernels-for-a-cpu)" if old else ""
    peer = "tokens/s relative to transformers' `DeepseekV3ForCausalLM`"
    rows = [
        [f"{peer} in the same precision, `seed_190m`", *seed, "train"],
        ["the same, `demo`", *demo, "demo_step"],
        [f"{peer} in fp32, `seed_190m`", "", times(train["vs_transformers_fp32"]), "train"],
        [f"{peer} in pure bf16, `seed_190m`", "", times(train["vs_transformers_bf16"]), "train"],
        ["tokens/s relative to a dense GPT with as many active parameters", "", times(train["vs_dense"]), "train"],
        [f"peak memory relative to transformers{without}", "", times(train["memory_vs_transformers"]), "train"],
        ["FLOP/s with MTP, share of the fastest bf16 matrix product", "", f"{train['ceiling_share']:.0%}", "train"],
        ["share of MuonClip in a step of 8,192 tokens", "", f"{optimizer['muonclip_share']:.1%}", "optimizer"],
        ["share of QK-Clip in it", "", f"{optimizer['qkclip_share']:.1%}", "optimizer"],
    ]
    head = ["", "moonwhale in fp32", "moonwhale in bf16 autocast", "script"]
    return table(head, [[*row[:3], script(row[3])] for row in rows])


def moba(units: dict[str, dict]) -> str:
    """How much faster MoBA is than full attention, by the processor's units that multiply bf16."""
    cases = ("1k", "16k", "32k")
    passes = {"fwd": "forward", "fwdbwd": "forward and backward"}
    rows = [
        [f"{name}, {unit}", *(times(result[f"{key}_{case}"], 1) for case in cases)]
        for key, name in passes.items()
        for unit, result in units.items()
    ]
    head = [f"speed relative to flash attention, {script('moba')}", "1 k tokens", "16 k", "32 k"]
    return table(head, rows)


def decoding(decode: dict) -> str:
    """Tokens per second of decoding, relative to others."""
    pairs = [
        ("bf16", "transformers' `generate` in bf16", "bf16_{}"),
        ("int8", "transformers' `generate` in bf16", "int8_{}"),
        ("bf16", "llama.cpp in bf16", "bf16_vs_llamacpp_{}"),
        ("int8", "llama.cpp in Q8_0", "int8_vs_llamacpp_{}"),
    ]
    rows = [
        [f"{bits} relative to {other}", *(times(decode[key.format(context)]) for context in (128, 1024))]
        for bits, other, key in pairs
        if key.format(128) in decode
    ]
    for what, key in {
        "reading a prompt of 512 tokens relative to llama.cpp, bf16": ("prompt_vs_llamacpp", times),
        "share of the memory's bandwidth that bf16 decoding reads": ("bandwidth_share_bf16", "{:.0%}".format),
    }.items():
        if key[0] in decode:
            rows.append([what, key[1](decode[key[0]]), ""])
    short, long = (f"{n // 1024} k" for n in decode["moba_contexts"])
    rows.append([f"time per token with MoBA at {long} tokens, relative to {short}", times(decode["moba_growth"]), ""])
    rows.append([f"the same with full attention at {long}, relative to MoBA", times(decode["moba_32k"], 1), ""])
    head = [f"tokens/s with the shapes of `seed_190m`, {script('decode')}", "after 128 tokens", "after 1,024"]
    return table(head, rows)


def memory(decode: dict) -> str:
    """Bytes of the cache, and what drafts and fewer bits change."""
    cache, bits = decode["cache_bytes_per_token"]["seed_190m"], decode["bits_per_byte"]
    rows = [
        ["cache bytes per token, `seed_190m`, as allocated", f"{cache['latent_allocated']:,.0f}"],
        ["with drafts from all MTP modules", f"{cache['drafting_allocated']:,.0f}"],
        ["multi-head attention's, without drafts", f"{cache['multi_head']:,}"],
        ["tokens per forward pass with MTP drafts, demo model", f"{decode['tokens_per_forward']:.2f}"],
        ["accepted guesses", ", ".join(f"{share:.0%}" for share in decode["acceptance"])],
        ["speed with `--draft auto` relative to no drafts", times(decode["auto_vs_off"])],
        *(
            [
                f"held-out bits per byte of the demo model in rows of 256 tokens (its context is 512), {name}",
                f"{bits[name]:.3f}",
            ]
            for name in bits
        ),
    ]
    return table([f"question, {script('decode')}", "figure"], rows)


def serving(serve: dict, parallel: dict) -> str:
    """The server under load, and training over several processes."""
    clients, broken = serve["clients"], f"{serve['malformed_requests']:,} malformed requests"
    layouts = len(parallel["equality"]["layouts"])
    rows = [
        [f"errors with {clients} streaming clients", f"{serve['errors']}", "serve"],
        [f"throughput with {clients} clients relative to one", times(serve["throughput_vs_one"], 1), "serve"],
        [f"5xx responses to {broken}", f"{serve['server_errors']}", "serve"],
        [f"hangs under {broken}", f"{serve['hangs']}", "serve"],
        [
            f"largest relative difference of gradients, {layouts} layouts on 2 and 4 processes from one process",
            f"{parallel['max_gradient_error']:.0e}",
            "parallel",
        ],
        [
            "recoveries from `kill -9` of a rank",
            f"{parallel['kills_survived']} of {parallel['kills']['made']}",
            "parallel",
        ],
        ["idle share of a DualPipeV step relative to the formula", times(parallel["bubble_vs_formula"]), "parallel"],
        ["the same relative to 1F1B", times(parallel["bubble_vs_1f1b"]), "parallel"],
    ]
    return table(["question", "figure", "script"], [[*row[:2], script(row[2])] for row in rows])


def machines(results: dict[str, dict]) -> str:
    """Says where the figures were measured: the machine of most, what ran on another, and what ran in fp32."""
    where: dict[str, list[str]] = {}
    found = environments(results)
    for name, machine in found.items():
        key = f"{machine['cpu']}, {machine['threads']} of {machine['cores']} cores"
        where.setdefault(key, []).append(name)
    most = max(where, key=lambda key: len(where[key]))
    others = "".join(f"; {', '.join(names)} on {key}" for key, names in where.items() if key != most)
    fp32 = ", ".join(name for name, machine in found.items() if machine["dtype"] in ("fp32", "float32"))
    machine = found["train"]
    return (
        f"Measured on {most}{others}; in fp32: {fp32}; the rest in bf16 unless stated otherwise; torch "
        f"{machine['torch']}, transformers {machine['transformers']}. Both sides use the same allocator, rounds are "
        "interleaved, figures are medians. Nothing has been measured on a GPU."
    )


def environments(results: dict[str, dict]) -> dict[str, dict]:
    """Returns the environment of each result and of each of its PARTS, by name."""
    found: dict[str, dict] = {}
    for name, result in results.items():
        if "environment" in result:
            found[name] = result["environment"]
        found |= {f"{name}'s {part}": result[part]["environment"] for part in PARTS.get(name, ())}
    return found
