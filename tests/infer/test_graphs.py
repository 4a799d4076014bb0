"""Steps as CUDA graphs. On a CPU a tape of operations emulates a graph.

Between replays only the contents of tensors may change. During capture nothing may be read back, and no tensor may be
made from Python numbers.
"""

import copy
import gc
import weakref

import pytest
import torch
from test_decoder import CONFIGS, MOBA
from test_scheduler import mixed, run, run_and_compare_modules, several
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from host_sync import NoHostSync
from moonwhale.infer import graphs, scheduler
from moonwhale.infer.decoder import Decoder
from moonwhale.infer.drafting import Drafting
from moonwhale.infer.feed_forward import ExpertLayer
from moonwhale.infer.graphs import Graphs
from moonwhale.infer.scheduler import Scheduler
from moonwhale.native import build

has_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")


class RefusesNumbers(TorchFunctionMode):
    """Refuses tensors made from Python numbers, which a graph would repeat unchanged."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        assert function not in (torch.tensor, torch.as_tensor, torch.from_numpy), (
            "a tensor made from Python numbers is on the tape"
        )
        return function(*args, **(kwargs or {}))


class Tape(TorchDispatchMode):
    """Records operations in order, with the tensors that they read and wrote."""

    def __init__(self):
        super().__init__()
        self.operations = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        self.operations.append((function, args, kwargs or {}, out))
        return out

    def replay(self):
        for function, args, kwargs, out in self.operations:
            again = function(*args, **kwargs)
            for old, new in zip(*map(torch.utils._pytree.tree_leaves, (out, again)), strict=True):
                if isinstance(old, torch.Tensor) and old.data_ptr() != new.data_ptr():
                    old.copy_(new)


def capture(function, device, pool):
    with NoHostSync(), RefusesNumbers(), Tape() as tape:
        out = function()
    return tape.replay, out, None


@pytest.fixture
def taped(monkeypatch):
    """`taped(model)` is the model's decoder as on a GPU, with tapes as graphs, captured at the first step."""
    monkeypatch.setattr(build, "supports", lambda weight: False)
    monkeypatch.setattr(graphs, "capture", capture)
    monkeypatch.setattr(graphs, "MIN_CONTEXT_BOUND", 8)
    monkeypatch.setattr(graphs, "CAPTURE_AFTER", 0)

    def taped(model):
        decoder = Decoder(model)
        ours = [*decoder.main, *(block for module in decoder.modules for block in module.blocks)]
        theirs = [
            *model.model.main_blocks,
            *(b for module in model.model.mtp_modules for b in (module, *module.blocks)),
        ]
        for block, of in zip(ours, theirs, strict=True):
            if isinstance(block.feed_forward, ExpertLayer):
                block.feed_forward.stacks = of.mlp.experts
        decoder.graphs = Graphs(max_length=len(decoder.modules) + 1)
        return decoder

    return taped


@pytest.mark.parametrize("changes", CONFIGS.values(), ids=CONFIGS)
@torch.inference_mode()
def test_captured_steps_equal_the_models(changes, tiny_model, taped):
    """Three sequences of different lengths, and one padding row."""
    model = tiny_model(num_nextn_predict_layers=2, mtp_num_blocks=[2, 1], **changes)
    decoder, lengths, cuts = taped(model), [2, 17, 9], [1, 3, 1, 2, 3, 3, 1, 1]
    ids = torch.randint(61, (3, 40), generator=torch.Generator().manual_seed(0))
    want = model.model(ids, use_cache=False).last_hidden_state
    cache = decoder.cache()
    cache.resize(4, 48)
    for slot, length in enumerate(lengths):
        decoder.run(ids[slot : slot + 1, :length], cache, decoder.place(cache, slot, [0], length))
    at = lengths
    for cut in cuts:
        new = torch.stack([row[n : n + cut] for row, n in zip(ids, at, strict=True)])
        got = decoder.run(new, cache, decoder.place(cache, 0, at, cut))
        for i, n in enumerate(at):
            torch.testing.assert_close(got[i], want[i, n : n + cut], atol=2e-5, rtol=1e-4)
        at = [n + cut for n in at]
    assert len(decoder.graphs._captured) < len(cuts), "some graphs are replayed"


def both(model, taped, draft, monkeypatch, **options):
    """Return what the same requests generate with a plain decoder and with one that has graphs."""
    monkeypatch.setattr(scheduler, "PREFILL_TOKENS", 8)  # so that the longest prompt is prefilled while the others run
    depth = Drafting(len(model.model.mtp_modules), draft)
    return [run(Scheduler(decoder, 10**8, 8, depth), mixed(**options)) for decoder in (Decoder(model), taped(model))]


@pytest.fixture(scope="module")
def model(tiny_model):
    more = MOBA | {"num_nextn_predict_layers": 2, "mtp_num_blocks": [1, 2]}
    return tiny_model(max_position_embeddings=256, **more)


@pytest.mark.parametrize("options", [{}, {"temperature": 1.0}], ids=["greedy", "sampled"])
@pytest.mark.parametrize("draft", [0, 1, 2])
def test_changing_batches_generate_the_same(draft, options, model, taped, monkeypatch):
    calls = []
    right = graphs.CapturedStep.__call__
    monkeypatch.setattr(
        graphs.CapturedStep, "__call__", lambda self, *args: calls.append(id(self)) or right(self, *args)
    )
    want, got = both(model, taped, draft, monkeypatch, **options)
    assert got == want
    assert len(calls) > 2 * len(set(calls)), "steps are replayed"


@torch.inference_mode()
def test_captured_steps_leave_no_rejected_draft_in_the_modules(model, taped, monkeypatch):
    monkeypatch.setattr(scheduler, "PREFILL_TOKENS", 8)
    to = Scheduler(taped(model), 10**8, 8, Drafting(2, 2))
    run_and_compare_modules(to, Decoder(model), several(temperature=2.0))
    assert to.decoder.graphs._captured


def test_few_graph_sizes_serve_all_batches():
    assert [graphs._round_rows(rows) for rows in (1, 2, 3, 5, 8, 9, 17, 64)] == [1, 2, 4, 8, 8, 16, 24, 64]
    assert [graphs._context_bound(tokens) for tokens in (1, 256, 257, 5000)] == [256, 256, 512, 8192]


@torch.inference_mode()
def test_padding_to_a_graphs_rows_needs_no_routing(model, taped):
    """85 rows of 3 tokens are few enough to run all experts, but the 88 rows of a graph are too many."""
    decoder, plain = taped(model), Decoder(model)
    tokens = torch.arange(85 * 3).view(85, 3) % 61
    found = []
    for one in (decoder, plain):
        cache = one.cache()
        cache.resize(88, 8)
        found.append(one.run(tokens, cache, one.place(cache, 0, [0] * 85, 3)))
    torch.testing.assert_close(*found)


@torch.inference_mode()
def test_rare_sizes_are_not_captured(model, taped, monkeypatch):
    monkeypatch.setattr(graphs, "CAPTURE_AFTER", 3)
    decoder = taped(model)
    cache, ids = decoder.cache(), torch.arange(8)[None]
    cache.resize(1, 16)
    captured = []
    for n in range(8):
        decoder.run(ids[:, n : n + 1], cache, decoder.place(cache, 0, [n], 1))
        captured.append(len(decoder.graphs._captured))
    assert captured == [0, 0, 0, 1, 1, 1, 1, 1]


@torch.inference_mode()
def test_a_decoder_that_is_no_longer_used_frees_its_memory_at_once(model, taped):
    """Python's cyclic collector, which would free it some time, does not know how full a GPU is."""
    decoder = taped(model)
    cache = decoder.cache()
    cache.resize(1, 16)
    decoder.run(torch.zeros(1, 1, dtype=torch.long), cache, decoder.place(cache, 0, [0], 1))
    gone = weakref.ref(decoder)
    gc.disable()
    try:
        del decoder
        assert gone() is None
    finally:
        gc.enable()


@torch.inference_mode()
def test_a_resized_cache_is_captured_again(model, taped):
    decoder = taped(model)
    cache, ids = decoder.cache(), torch.arange(30)[None]
    cache.resize(1, 16)
    for n in range(10):
        decoder.run(ids[:, n : n + 1], cache, decoder.place(cache, 0, [n], 1))
    cache.resize(2, 40)
    got = decoder.run(ids[:, 10:11], cache, decoder.place(cache, 0, [10], 1))
    torch.testing.assert_close(got, model.model(ids[:, :11], use_cache=False).last_hidden_state[:, -1:])


# --- mutants ---------------------------------------------------------------------------------------------------------


def test_mutant_positions_as_python_numbers(model, taped, monkeypatch):
    monkeypatch.setattr(graphs, "BufferedPlacement", lambda like, *_: like)
    with pytest.raises(AssertionError, match=r"made from Python numbers"):
        both(model, taped, 0, monkeypatch)


def test_mutant_positions_never_updated(model, taped, monkeypatch):
    monkeypatch.setattr(
        graphs.CapturedStep,
        "__call__",
        lambda self, tensors, placement: self.replay() or self.out[: len(placement.start)],
    )
    want, got = both(model, taped, 0, monkeypatch)
    assert got != want


def test_mutant_padding_rows_overwrite_entries(model, taped, monkeypatch):
    """They write to the beginning of their slots, where a prompt that is being prefilled has its entries."""
    right = graphs.CapturedStep._fill

    def fill(self, tensors, placement):
        right(self, tensors, placement)
        self.indices[1] = self.slot * self.slot_length + self.indices[0]

    monkeypatch.setattr(graphs.CapturedStep, "_fill", fill)
    want, got = both(model, taped, 0, monkeypatch)
    assert got != want


def test_mutant_block_means_never_updated(model, taped, monkeypatch):
    monkeypatch.setattr(graphs.BufferedPlacement, "write_means", lambda self, keys, means: None)
    want, got = both(model, taped, 0, monkeypatch)
    assert got != want


# --- on a GPU --------------------------------------------------------------------------------------------------------


@has_gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@torch.inference_mode()
def test_cuda_graphs_equal_uncaptured_steps(dtype, model, monkeypatch):
    monkeypatch.setattr(graphs, "CAPTURE_AFTER", 2)
    model = copy.deepcopy(model).to("cuda", dtype)
    ids, found = torch.randint(61, (1, 60), device="cuda"), []
    for use in (True, False):
        decoder = Decoder(model)
        decoder.graphs = decoder.graphs if use else None
        cache = decoder.cache()
        cache.resize(2, 64)
        decoder.run(ids[:, :40], cache, decoder.place(cache, 0, [0], 40))
        steps = [decoder.run(ids[:, n : n + 1], cache, decoder.place(cache, 0, [n], 1)).clone() for n in range(40, 60)]
        found.append(torch.cat(steps))
    torch.testing.assert_close(*found, rtol=1e-4 if dtype == torch.float32 else 2e-2, atol=1e-2)
