"""Runs compiled steps with the address and undefined-behaviour sanitizers, on random shapes and on absurd values.

    python tests/native/fuzz.py ROUNDS [FOLDER]

The library is compiled in FOLDER. A finding of a sanitizer ends the process with its report and a status other than 0.
"""

import ctypes
import os
import random
import subprocess
import sys
import tempfile
from contextlib import suppress
from pathlib import Path

FLAGS = "-O1 -g -fsanitize=address,undefined -fno-sanitize-recover=all"
ABSURD = [-(2**63), -(2**31), -1, 0, 1, 7, 2**31, 2**40, 2**62, 2**63 - 1]
# Fields that say how long an array is. Only the caller knows that, so they are not changed.
LENGTHS = {"taps", "shared", "dtype", "positions", "slots", "rows"}


def sanitizers(compiler: str = "g++") -> str:
    """Return the sanitizers' libraries as LD_PRELOAD takes them, or "" if the compiler has none."""
    libraries = []
    for name in ("libasan.so", "libubsan.so"):
        command = [compiler, f"-print-file-name={name}"]
        libraries.append(subprocess.run(command, capture_output=True, text=True).stdout.strip())
    return ":".join(libraries) if all(os.path.isabs(library) for library in libraries) else ""


def rerun_with_sanitizers(rounds: int, folder: str) -> int:
    """Start this file in a process that has the sanitizers' libraries, and return its exit status."""
    variables = {
        "LD_PRELOAD": sanitizers(),
        # Python does not free all at its end. A size that no machine has is an exception, as without sanitizers.
        "ASAN_OPTIONS": "detect_leaks=0:allocator_may_return_null=1",
        "UBSAN_OPTIONS": "print_stacktrace=1",
        "MOONWHALE_CXXFLAGS": FLAGS,
        "OMP_NUM_THREADS": "2",
        "CXX": "g++",
    }
    return subprocess.run([sys.executable, __file__, str(rounds), folder], env=os.environ | variables).returncode


def random_model(draw: random.Random):
    import torch

    from moonwhale.model import MoonwhaleConfig, MoonwhaleForCausalLM

    groups = draw.choice([1, 1, 2, 3])  # more than sixteen experts in a group let a wrong sort leave its array
    experts = groups * draw.randint(2, 20)
    config = MoonwhaleConfig(
        vocab_size=31,
        hidden_size=8 * draw.randint(1, 9),
        num_hidden_layers=2,
        num_attention_heads=draw.randint(1, 9),
        q_lora_rank=draw.choice([None, draw.randint(1, 70)]),
        kv_lora_rank=draw.randint(1, 80),
        qk_nope_head_dim=draw.randint(1, 40),
        qk_rope_head_dim=2 * draw.randint(1, 10),
        v_head_dim=draw.randint(1, 40),
        n_routed_experts=experts,
        num_experts_per_tok=draw.randint(1, 2),
        n_group=groups,
        topk_group=draw.randint(1, groups),
        n_shared_experts=draw.randint(0, 2),
        moe_intermediate_size=8 * draw.randint(1, 9),
        intermediate_size=draw.randint(1, 70),
        first_k_dense_replace=draw.randint(0, 1),
        moba_block_size=draw.choice([1, 2, 7, 16]),
        moba_topk=draw.choice([0, 1, 3, 10**9]),
        moba_key_conv=draw.choice([0, 2]),
        embedding_conv=draw.choice([0, 2]),
        latent_embedding_every=draw.choice([0, 1]),
        max_position_embeddings=300,
    )
    model = MoonwhaleForCausalLM(config).to(draw.choice([torch.float32, torch.bfloat16])).eval()
    if draw.random() < 0.1:  # NaN in every score
        next(model.model.layers[-1].mlp.parameters()).fill_(torch.nan)
    return model


def steps(decoder, draw: random.Random, rows: int, length: int):
    """Return a filled cache, and a function that runs one step at the given placement."""
    import torch

    cache = decoder.cache()
    cache.resize(rows, length)
    for tensor in (*cache.keys, *cache.values, *(means for means in cache.means if means is not None)):
        tensor.normal_()

    def run(placement):
        tokens = torch.randint(31, (len(placement.start), placement.length))
        return decoder.run(tokens, cache, placement)

    return cache, run


def run_random_steps(draw: random.Random) -> None:
    """Run steps anywhere in a cache, its ends included."""
    import torch

    from moonwhale.infer.decoder import Decoder

    decoder = Decoder(random_model(draw), int8=draw.random() < 0.3)
    rows, length = draw.randint(1, 4), draw.choice([1, 2, 16, 17, 300])
    cache, run = steps(decoder, draw, rows, length)
    for _ in range(6):
        torch.set_num_threads(draw.randint(1, 3))
        first = draw.randint(0, rows - 1)
        new = draw.randint(1, min(length, 5))
        start = [draw.choice([0, length - new, draw.randint(0, length - new)]) for _ in range(first, rows)]
        run(decoder.place(cache, first, start, new))
    try_absurd_values(decoder, cache, run, draw)


def integers(structure: ctypes.Structure):
    """Yield (structure, field name) of each integer and address in a structure and in those within it."""
    for name, kind in structure._fields_:
        if issubclass(kind, ctypes.Structure):
            yield from integers(getattr(structure, name))
        elif kind is not ctypes.c_float and name not in LENGTHS:
            yield structure, name


def try_absurd_values(decoder, cache, run, draw: random.Random) -> None:
    """Change one value at a time, which must be refused or harmless, then change it back."""
    for _ in range(20):
        placement = decoder.place(cache, 0, [draw.randint(0, cache.length - 1)], 1)
        block = draw.choice(decoder.main).native._block
        structure, name = draw.choice([*integers(block), *integers(placement.for_native)])
        pointer = dict(structure._fields_)[name] is ctypes.c_void_p
        before = getattr(structure, name)
        setattr(structure, name, None if pointer else draw.choice(ABSURD))
        attempt(run, placement)
        setattr(structure, name, before)
        placement._start.fill_(draw.choice(ABSURD))
        attempt(run, placement)
    placement = decoder.place(cache, 0, [0], 1)
    for tensors in (cache.keys, cache.values, cache.means):
        old = tensors[0]
        if old is not None:
            for new in (old[:, 1:], old[..., 1:], old.half(), old.transpose(0, 1), old.char(), old[:0], old[0]):
                tensors[0] = new
                attempt(run, placement)
        tensors[0] = old


def attempt(run, placement) -> None:
    with suppress(ValueError, IndexError, MemoryError):
        run(placement)


def run_random_products(draw: random.Random) -> None:
    import torch

    from moonwhale.native import build
    from moonwhale.native.packed_linear import PackedLinear

    dtype, out, inputs = draw.choice([torch.float32, torch.bfloat16]), draw.randint(1, 200), draw.randint(1, 200)
    bias = draw.choice([None, torch.randn(out)])
    product = PackedLinear(torch.randn(out, inputs).to(dtype), bias, int8=draw.random() < 0.3)
    for rows in (0, 1, draw.randint(2, 64)):
        product(torch.randn(rows, inputs))
        attempt(product, torch.randn(rows, inputs + 1))
    x, y = torch.randn(2, inputs), torch.empty(2, out)
    for rows, threads in ((-1, 1), (2**62, 1), (2, 0), (2, -1), (2, 2**31)):
        assert build.library("step").run_product(
            ctypes.byref(product.matrix), y.data_ptr(), x.data_ptr(), rows, threads
        )
    for pointers in ((None, y.data_ptr(), x.data_ptr()), (ctypes.byref(product.matrix), None, None)):
        assert build.library("step").run_product(*pointers, 2, 1)


def run_random_training(draw: random.Random) -> None:
    """Run the parts of a training step on tables of any size, then with absurd sizes and without each address."""
    import torch

    from moonwhale.native import build, training

    torch.set_num_threads(draw.randint(1, 3))
    dtype, rows, columns = draw.choice([torch.float32, torch.bfloat16]), draw.randint(1, 150), draw.randint(1, 70)
    wide = torch.randn(rows, 2 * columns + draw.randint(0, 3)).to(dtype)
    if draw.random() < 0.2:
        wide[draw.randrange(rows), draw.randrange(columns)] = draw.choice([torch.nan, torch.inf, -1e38])
    x, up, weight = wide[:, :columns], wide[:, columns : 2 * columns], torch.randn(columns)
    _, inverse = training.norm(x, weight, 1e-6)
    training.norm_backward(up, x, weight, inverse)
    training.score(x.contiguous(), torch.randint(columns, (rows,)), draw.random() < 0.5)
    for row_weight in (None, torch.randn(rows)):
        training.gate_backward(training.gate(x, up, row_weight), x, up, row_weight)

    heads, queries = draw.randint(1, 4), draw.randint(1, 40)
    scores = torch.randn(heads, queries, queries + draw.randint(0, 40)).to(dtype)
    ids = [torch.randint(3, (heads, n)) for n in scores.shape[1:]]
    for log_sum in (None, torch.randn(heads, queries)):
        training.softmax_(scores.clone(), draw.random() < 0.5, draw.choice([None, ids]), log_sum)
    training.score_gradient_(scores.clone(), scores, torch.randn(heads, queries, 1), 0.5)

    heads_first = (
        torch.randn(draw.randint(1, 4), rows, draw.randint(1, 4), 2 * draw.randint(1, 9)).to(dtype).transpose(1, 2)
    )
    angles = torch.randn(1, 1, rows, heads_first.shape[3] // 2).to(dtype)
    for backward in (False, True):
        training.rotate(heads_first, angles, angles, draw.random() < 0.5, backward)
    address, absurd = heads_first.data_ptr(), (ctypes.c_int64 * 3)(1, draw.choice([-1, 2**40, 2**63 - 1]), 1)
    assert build.library("training").run_rotate(*[address] * 4, absurd, 1, 1, 1, 2, 0, 0, 0, 1) == 3

    momentum = torch.randn(draw.randint(1, 9000))
    training.descend_(momentum, training.nesterov_(momentum, -momentum, 0.9).to(dtype), 0.9, 0.1)

    run_random_experts(draw)
    spare = torch.zeros(1 << 12)
    for name, kinds in build.ARGUMENTS["training"].items():
        function = getattr(build.library("training"), name)
        pointer = [kind is ctypes.c_void_p for kind in kinds]
        good = [spare.data_ptr() if is_pointer else 1 for is_pointer in pointer]
        if name == "run_rotate":
            good[8] = 2  # the width, which is even
            assert function(*good) == 0
        optional = {"run_gate": {4}, "run_gate_backward": {3, 4, 9}, "run_softmax": {1, 2, 3}}.get(name, set())
        for i, kind in enumerate(kinds):
            if pointer[i]:
                refused = [None] if i not in optional else []
            else:
                is_flag = (name, i) in (("run_score", 7), ("run_softmax", 6), ("run_rotate", 9), ("run_rotate", 10))
                refused = [] if kind is ctypes.c_float or is_flag else [-1, 2**62]
            for value in refused:
                assert function(*good[:i], value, *good[i + 1 :]) in (2, 3)


def run_random_experts(draw: random.Random) -> None:
    """Route random tokens through random experts, then with absurd sizes."""
    import torch

    from moonwhale.model.routed import ExpertRows, line_up_by_expert
    from moonwhale.native import build, training

    n_tokens, experts, hidden, inner = draw.randint(1, 200), draw.randint(1, 9), *draw.choices([32, 64, 96], k=2)
    topk, how = draw.randint(1, experts), (draw.random() < 0.5, draw.random() < 0.5, 2.0)
    x, weight = torch.randn(n_tokens, hidden).bfloat16(), torch.randn(experts, hidden)
    scores, index, gates = training.route(x, weight, torch.randn(experts), topk, *how)
    training.route_backward(draw.choice([None, scores]), gates, x, weight, scores, index, *how)
    sizes = training.RouterStruct(n_tokens, hidden, experts, topk, *how)
    pointers = [tensor.data_ptr() for tensor in (scores, index, gates, x)]
    for name in ("tokens", "hidden", "experts", "chosen"):
        before = getattr(sizes, name)
        for value in (-(2**63), -1, 0, 2**40, 2**62, 2**63 - 1):
            setattr(sizes, name, value)
            arguments = hidden, weight.data_ptr(), weight.data_ptr(), ctypes.byref(sizes), 1, 2
            assert build.library("training").run_route(*pointers, *arguments) == 3
        setattr(sizes, name, before)
    valid = torch.rand(1, n_tokens) < 0.5
    p = training.balance(scores, valid, topk)[1]
    training.balance_backward(p, scores, valid)

    for group in (index.flatten(), torch.randint(experts + 1, (draw.randint(1, 300),))):
        training.line_up(group, experts, draw.randint(1, 70), draw.randint(1, 70))
    if training.has_units():
        token, row, ends = line_up_by_expert(index, experts, 64)
        rows = ExpertRows(token, row.view(index.shape), ends, torch.randn(len(token)))
        weights = torch.randn(experts, 2 * inner, hidden).bfloat16(), torch.randn(experts, hidden, inner).bfloat16()
        out, kept = training.routed(x, *weights, rows)
        training.routed_backward(out, x, *weights, rows, kept)
        training.newton_schulz(torch.randn(draw.randint(1, 3), draw.randint(1, 90), draw.randint(1, 90)), 5)
        routes, inputs = training._routes(x, *weights, rows)
        pointers = [tensor.data_ptr() for tensor in (out, kept, *inputs[:3])]
        for name, kind in routes._fields_:
            before = getattr(routes, name)
            for value in [None] if kind is ctypes.c_void_p else [-(2**63), -1, 0, 2**40, 2**62, 2**63 - 1]:
                setattr(routes, name, value)
                assert build.library("training").run_routed(*pointers, ctypes.byref(routes), 2) == 3
            setattr(routes, name, before)


def main(rounds: int, folder: Path) -> None:
    """Compile the steps with sanitizers, use them in place of the libraries, and run `rounds` of each kind."""
    del os.environ["LD_PRELOAD"]  # the compiler needs no sanitizers
    from moonwhale.native import build

    for name in build.ARGUMENTS:
        build.compile_steps(build.compiler(), build.SOURCES, folder, name)
    libraries = {name: build.load(folder, name) for name in build.ARGUMENTS}
    build.library = libraries.get
    build.available = lambda name: True

    import torch

    with torch.inference_mode():
        for number in range(rounds):
            torch.manual_seed(number)
            run_random_steps(random.Random(number))
            run_random_products(random.Random(number))
            run_random_training(random.Random(number))
    print(f"{rounds} rounds without a finding")


if __name__ == "__main__":
    count = int(sys.argv[1])
    if "LD_PRELOAD" in os.environ:
        main(count, Path(sys.argv[2]))
    elif not sanitizers():
        sys.exit("g++ has no sanitizers here")
    else:
        with tempfile.TemporaryDirectory() as temporary:
            sys.exit(rerun_with_sanitizers(count, temporary))
