"""The README's tables of benchmark results: one figure a cell, each with the script that measures it."""

MEMORY_WITHOUT_KERNELS = "2895a3d0adcf37478e91938d6201f7698bc23ede"  # commit of a train.json whose memory is that
PARTS = {"optimizer": ("race", "cost"), "parallel": ("equality", "kills")}  # each with an environment of its own
# What `machines` calls a result, or a part of one, if not by its script
NAMES = {
    "quality_20min_amx": "`quality.py` (1,200 s)",
    "optimizer's race": "`optimizer.py` (tokens)",
    "optimizer's cost": "`optimizer.py` (shares of a step)",
    "moba_amx": "`moba.py` (AMX)",
    "parallel": "`parallel.py` (idle time)",
    "parallel's equality": "`parallel.py` (gradients)",
    "parallel's kills": "`parallel.py` (recoveries)",
}
TEXTS = {"sotu.txt.xz": "speeches", "mix76.txt": "mixed text"}  # of quality.py


def tables(results: dict[str, dict]) -> str:
    """Returns all tables, from the benchmarks' results by name."""
    sections = {
        "What training reaches": quality(
            [results["quality"], results["quality_20min_amx"]], results["optimizer"], results["grpo"], results["fp8"]
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


def cpu(environment: dict) -> str:
    """Returns the name of the machine's processor, without decoration."""
    return environment["cpu"].replace("(R)", "").removesuffix(" Processor")


def against_nanochat(races: dict[str, dict]) -> str:
    """Returns the table of moonwhale's bits per byte relative to nanochat's, from the results of quality.py by name."""
    rows = []
    for name, race in races.items():
        bits, units = race["bits_per_byte"], " with AMX" if name.endswith("_amx") else ""
        more = bits["ours"] / bits["nanochat"] - 1
        result = f"{abs(more):.1%} {'more' if more > 0 else 'fewer'}"
        minutes = f"{race['seconds']['ours'] / 60:.0f} minutes"
        file = f"[{name}.json](benchmarks/results/{name}.json)"
        rows.append([cpu(race["environment"]) + units, TEXTS[race["text"]], minutes, f"{result} ({file})"])
    return table(["machine", "text", "time", "moonwhale's bits per byte, relative to nanochat's"], rows)


def quality(races: list[dict], optimizer: dict, grpo: dict, fp8: dict) -> str:
    """What models learn: bits per byte after equal time, tokens that MuonClip saves, right answers after GRPO."""
    names = {"ours": "moonwhale", "nanochat": "nanochat", "dense": "a dense GPT with AdamW"}
    rows = [
        [
            f"held-out bits per byte, {TEXTS[race['text']]}, after {race['seconds']['ours']:,.0f} s: {name}",
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
    return table(["quantity", "value", "script"], rows) + "\n\n" + parameters(races[0], names)


def parameters(race: dict, names: dict[str, str]) -> str:
    """Returns a line with the sizes of quality.py's models."""
    sizes = []
    for key, name in names.items():
        if key in race["parameters"]:
            size, active = race["parameters"][key], race["active_parameters"][key]
            sizes.append(f"{name} {size / 1e6:.1f} M" + (f" ({active / 1e6:.1f} M active)" if active < size else ""))
    return f"Parameters in {script('quality')}: {', '.join(sizes)}."


def training(train: dict, demo_step: dict, optimizer: dict) -> str:
    """Tokens per second and memory of training steps, relative to others. A column is a precision of moonwhale."""
    seed = [times(train[f"vs_transformers_{pair}"]) for pair in ("fp32_same_dtype", "autocast")]
    demo = [times(demo_step[f"vs_transformers_{dtype}"]) for dtype in ("fp32", "bf16")]
    old = train["environment"]["commit"] == MEMORY_WITHOUT_KERNELS
    without = ", without the [kernels](docs/training.md#kernels-for-a-cpu)" if old else ""
    active = f"{train['active_parameters']['moonwhale'] / 1e6:.1f} M, without embedding and MTP"
    dense = f"tokens/s relative to a dense GPT with as many active parameters ({active})"
    share = f"{train['ceiling_share']:.0%}"
    peer = "tokens/s relative to transformers' `DeepseekV3ForCausalLM`"
    rows = [
        [f"{peer} in the same precision, `seed_190m`", *seed, "train"],
        ["the same, `demo`", *demo, "demo_step"],
        [f"{peer} in fp32, `seed_190m`", "", times(train["vs_transformers_fp32"]), "train"],
        [f"{peer} in pure bf16, `seed_190m`", "", times(train["vs_transformers_bf16"]), "train"],
        [dense, "", times(train["vs_dense"]), "train"],
        [f"peak memory relative to transformers{without}", "", times(train["memory_vs_transformers"]), "train"],
        ["FLOP/s with MTP, share of the fastest bf16 matrix product", "", share, "train"],
        ["share of MuonClip in a step of 8,192 tokens", "", f"{optimizer['muonclip_share']:.1%}", "optimizer"],
        ["share of QK-clip in the same step", "", f"{optimizer['qkclip_share']:.1%}", "optimizer"],
    ]
    machine = {"train": train["environment"], "demo_step": demo_step["environment"]}
    machine["optimizer"] = optimizer["cost"]["environment"]
    head = ["", "moonwhale in fp32", "moonwhale in bf16 autocast", "machine", "script"]
    return table(head, [[*row[:3], cpu(machine[row[3]]), script(row[3])] for row in rows])


def moba(units: dict[str, dict]) -> str:
    """How much faster MoBA is than full attention, by the processor's units that multiply bf16."""
    cases = ("1k", "16k", "32k")
    heads, blocks = units["AMX"]["heads"], units["AMX"]["topk"]
    passes = {"fwd": "forward", "fwdbwd": "forward and backward"}
    rows = [
        [f"{name}, {unit}", *(times(result[f"{key}_{case}"], 1) for case in cases)]
        for key, name in passes.items()
        for unit, result in units.items()
    ]
    what = f"speed relative to flash attention, {blocks} blocks per query, {script('moba')}"
    return table([what, *(f"{case[:-1]} k tokens, {heads[case]} heads" for case in cases)], rows)


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
        "share of the memory bandwidth that bf16 decoding uses": ("bandwidth_share_bf16", "{:.0%}".format),
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
        ["share of accepted draft tokens", ", ".join(f"{share:.0%}" for share in decode["acceptance"])],
        ["speed with `--draft auto` relative to no drafts", times(decode["auto_vs_off"])],
        *(
            [
                f"held-out bits per byte of the demo model in rows of 256 tokens (its context is 512), {name}",
                f"{bits[name]:.3f}",
            ]
            for name in bits
        ),
    ]
    return table([f"quantity, {script('decode')}", "value"], rows)


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
            f"largest relative difference of gradients between {layouts} layouts on 2 and 4 processes and one process",
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
    return table(["quantity", "value", "script"], [[*row[:2], script(row[2])] for row in rows])


def machines(results: dict[str, dict]) -> str:
    """Lists where the figures were measured: the machine of most, what ran on another, and what ran in fp32."""
    where: dict[str, list[str]] = {}
    in_fp32: list[str] = []
    for result, machine in environments(results).items():
        name = NAMES.get(result, f"`{result}.py`")
        where.setdefault(f"{cpu(machine)}, {machine['threads']} of {machine['cores']} cores", []).append(name)
        if machine["dtype"] in ("fp32", "float32"):
            in_fp32.append(name)
    most = max(where, key=lambda key: len(where[key]))
    versions = results["train"]["environment"]
    lines = [
        "Where the figures were measured:\n",
        f"- {most}: all that are not listed below",
        *(f"- {key}: {', '.join(names)}" for key, names in where.items() if key != most),
        f"- in fp32: {', '.join(in_fp32)}; the rest in bf16 unless stated otherwise\n",
        f"All with torch {versions['torch']} and transformers {versions['transformers']}. Both sides use the same "
        "allocator, rounds are interleaved, and figures are medians. Nothing has been measured on a GPU.",
    ]
    return "\n".join(lines)


def environments(results: dict[str, dict]) -> dict[str, dict]:
    """Returns the environment of each result and of each of its PARTS, by name."""
    found: dict[str, dict] = {}
    for name, result in results.items():
        if "environment" in result:
            found[name] = result["environment"]
        found |= {f"{name}'s {part}": result[part]["environment"] for part in PARTS.get(name, ())}
    return found
