"""The quality benchmark races its contenders fairly and writes its results. No test asserts which one wins."""

import importlib
import itertools
import json
import math
import sys
from pathlib import Path

import pytest
import torch

NANOCHAT = '''
from dataclasses import dataclass

import torch
from torch import nn


@dataclass
class GPTConfig:
    sequence_len: int
    vocab_size: int
    n_layer: int
    n_head: int
    n_kv_head: int
    n_embd: int
    window_pattern: str


class GPT(nn.Module):
    """What the benchmark touches of nanochat's, as a bigram model."""

    def __init__(self, config):
        super().__init__()
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)

    def init_weights(self):
        nn.init.normal_(self.wte.weight)
        nn.init.zeros_(self.lm_head.weight)
        print("said on standard output")

    def num_scaling_params(self):
        return {"transformer_matrices": 0, "lm_head": self.lm_head.weight.numel()}

    def setup_optimizer(self, embedding_lr, unembedding_lr, matrix_lr, scalar_lr, weight_decay):
        groups = [
            {"kind": "adamw", "params": [self.wte.weight], "lr": embedding_lr},
            {"kind": "muon", "params": [self.lm_head.weight], "lr": matrix_lr, "weight_decay": weight_decay},
        ]
        optimizer = torch.optim.SGD(groups, lr=1.0, momentum=0.5)
        for group in optimizer.param_groups:
            group["initial_lr"] = group["lr"]
        return optimizer

    def forward(self, idx, targets):
        logits = self.lm_head(self.wte(idx)).float()
        return nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-1)
'''


@pytest.fixture
def quality(monkeypatch):
    """Returns the benchmark module at toy size."""
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "benchmarks")
    module = importlib.import_module("quality")
    monkeypatch.setattr(module, "VOCABULARY", 320)
    monkeypatch.setattr(module, "CONTEXT", 16)
    monkeypatch.setattr(module, "tune_allocator", lambda: False)  # this setting would outlast the test
    small = {"vocab_size": 320, "hidden_size": 32, "num_hidden_layers": 2, "q_lora_rank": 16, "kv_lora_rank": 16}
    small |= {"moba_block_size": 4, "moba_full_attention_layers": [1], "n_routed_experts": 4}
    for name, value in (small | {"moe_intermediate_size": 16, "num_nextn_predict_layers": 1}).items():
        monkeypatch.setitem(module.MODEL, name, value)
    for name, value in {"vocab_size": 320, "layers": 1, "width": 16, "inner": 16, "context": 16}.items():
        monkeypatch.setitem(module.DENSE, name, value)
    for name, value in {"vocab_size": 320, "sequence_len": 16, "n_embd": 16}.items():
        monkeypatch.setitem(module.NANOCHAT, name, value)
    for recipe in (module.RECIPE, module.DENSE_RECIPE, module.NANOCHAT_RECIPE):
        monkeypatch.setitem(recipe, "rows", 2)
    for rates in ("OUR_RATES", "DENSE_RATES", "NANOCHAT_RATES"):
        monkeypatch.setattr(module, rates, getattr(module, rates)[:3])
    return module


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    """Yields a checkout with a stand-in for nanochat."""
    folder = tmp_path / "checkout"
    (folder / "nanochat").mkdir(parents=True)
    (folder / "nanochat" / "__init__.py").touch()
    (folder / "nanochat" / "gpt.py").write_text(NANOCHAT)
    monkeypatch.setenv("NANOCHAT_DTYPE", "float32")
    monkeypatch.syspath_prepend(folder)
    monkeypatch.setattr(torch, "compile", lambda model, **_: model)
    yield folder
    for name in ("nanochat", "nanochat.gpt"):
        sys.modules.pop(name, None)


@pytest.fixture
def data(quality, text_folder):
    return quality.load(str(text_folder))


def test_quality(quality, checkout, text_folder, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(quality, "compile_unsupported_reason", lambda device: "")
    picture = tmp_path / "quality.svg"
    options = ["--seconds", "0.2", "--tune", "--tune-seconds", "0.05", "--nanochat", str(checkout)]
    options += ["--results", str(tmp_path), "--picture", str(picture)]
    quality.main([str(text_folder), *options])
    result = json.loads((tmp_path / "quality.json").read_text())
    assert json.loads(capsys.readouterr().out.splitlines()[-1]).items() <= result.items()

    bits = result["bits_per_byte"]
    assert result["vs_dense"] == pytest.approx(bits["ours"] / bits["dense"], abs=1e-4)
    assert result["vs_nanochat"] == pytest.approx(bits["ours"] / bits["nanochat"], abs=1e-4)
    assert result["active_parameters"]["ours"] < result["parameters"]["ours"]
    for name, tried in result["rates"].items():
        finals = result["finals"][name]
        assert len(tried) == 3 and set(finals) == set(sorted(tried, key=tried.get)[:2])
        best = min(finals, key=finals.get)
        assert result["recipes"][name]["lr"] == float(best)
        assert result["tuning_bits_per_byte"][name] == finals[best]
        assert result["seconds"][name] >= 0.2
        assert result["curves"][name][-1][1] == result["tokens"][name]

    again = tmp_path / "again.svg"
    quality.draw(result, again)
    assert again.read_bytes() == picture.read_bytes()
    for name in result["bits_per_byte"]:
        assert f"{name}: {bits[name]:.3f} on all rows" in picture.read_text()


def test_without_nanochat_the_result_says_so(quality, text_folder, tmp_path):
    options = ["--seconds", "0.05", "--results", str(tmp_path), "--picture", str(tmp_path / "quality.svg")]
    quality.main([str(text_folder), *options])
    result = json.loads((tmp_path / "quality.json").read_text())
    assert result["vs_nanochat"] is None and "--nanochat" in result["why_no_nanochat"]
    assert set(result["bits_per_byte"]) == {"ours", "dense"}


def test_a_single_contender_writes_no_files(quality, text_folder, tmp_path, capsys):
    options = ["--only", "dense", "--seconds", "0.05", "--results", str(tmp_path), "--picture", str(tmp_path / "q.svg")]
    quality.main([str(text_folder), *options])
    assert json.loads(capsys.readouterr().out)["bits_per_byte"] > 0
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--nanochat", "."], "no nanochat/gpt.py in ."),
        (["--only", "nanochat"], "no checkout of nanochat"),
        ([], "less than a row of 16 tokens"),
    ],
)
def test_impossible_races_are_refused(quality, tmp_path, capsys, options, said):
    text = tmp_path / "short.txt"
    text.write_text("One.\n\nTwo.\n\nThree.")
    with pytest.raises(SystemExit, match="2"):
        quality.main([str(text), *options])
    assert said in capsys.readouterr().err


def test_a_text_is_split_by_paragraphs(quality, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("\n\n".join(f"{i} " * 30 for i in range(100)))
    data = quality.load(str(text))
    assert data.held_out.shape[1] == data.tuning.shape[1] == 16
    train, rest = data.train.numel(), data.tuning.numel() + data.held_out.numel()
    assert 0.05 < rest / (train + rest) < 0.12
    assert (data.lengths[data.train] == 0).sum() == 2 * 90, "bos and eos around each of 90 paragraphs"


def test_bits_per_byte_of_a_uniform_model(quality):
    rows, lengths = torch.tensor([[0, 1, 2, 3], [1, 0, 2, 2]]), torch.tensor([0, 1, 2, 5])

    def mean_loss(tokens, labels):
        assert (labels == -100).equal(tokens == 0), "what is no text is not scored"
        return torch.tensor(math.log(4))

    # The first row scores tokens 1, 2 and 3; the second scores 2 and 2. Its 0 has no bytes and is not scored.
    assert quality.bits_per_byte(mean_loss, rows, lengths) == pytest.approx(2 * 5 / (1 + 2 + 5 + 2 + 2), abs=1e-5)


def test_the_race_ends_when_the_time_is_up(quality, monkeypatch):
    ticks = itertools.count()
    monkeypatch.setattr(quality.time, "perf_counter", lambda: float(next(ticks)))  # each step takes a second
    monkeypatch.setattr(quality, "_cpu_seconds", lambda: (2.0 * next(cpu), 0.0, 1.0 * next(cpu)))
    cpu, seen = itertools.count(), []

    def step(number, progress):
        seen.append((number, progress))
        return torch.tensor(float(number))

    run = quality.race(step, 4.0, lambda: 1.5 * len(seen))
    assert seen == [(0, 0.0), (1, 0.25), (2, 0.5), (3, 0.75)]
    assert (run["seconds"], run["steps"]) == (4.0, 4)
    assert run["curve"] == [(1.0, 1, 1.5), (2.0, 2, 3.0), (3.0, 3, 4.5), (4.0, 4, 6.0)]
    assert run["others"] == run["busiest"] == 0.5


def test_a_race_that_diverges_stops(quality):
    run = quality.race(lambda number, progress: torch.tensor(math.nan if number == 2 else 1.0), 1e6, float)
    assert run["steps"] == 3


def test_a_rate_that_diverges_is_never_the_best(quality):
    def train(seconds, recipe):
        return {"tuning_bits_per_byte": {1.0: math.nan, 2.0: 3.0, 4.0: 2.0}[recipe["lr"]]}

    assert list(quality.tried(train, {"lr": 0}, (1.0, 2.0, 4.0), 1)) == [4.0, 2.0, 1.0]


@pytest.mark.parametrize("name", ["ours", "dense"])
def test_warm_up_changes_nothing_and_runs_see_the_same_rows(quality, data, monkeypatch, name):
    """A longer warm-up changes neither the losses nor the result of a run of two steps."""
    runs = []
    monkeypatch.setattr(quality, "race", lambda step, seconds, score: runs.append(_two_steps(step)) or _STOPPED.copy())
    train = {"ours": quality.train_ours, "dense": quality.train_dense}[name]
    first = train(data, 1.0)
    monkeypatch.setattr(quality, "WARM_UP", (0.0,) * 6)
    assert train(data, 1.0)["bits_per_byte"] == first["bits_per_byte"]
    assert runs[0] == runs[1]
    assert train(data, 1.0, seed=1)["bits_per_byte"] != first["bits_per_byte"]


_STOPPED = {"seconds": 1.0, "steps": 2, "curve": [], "others": 0.0, "busiest": 0.0}


def _two_steps(step) -> list[float]:
    return [step(number, 0.3).item() for number in range(2)]


def test_schedules(quality):
    assert [quality.linear_decay(at, 0.1, 0.5, 0.2) for at in (0.05, 0.3, 0.5)] == [0.5, 1.0, 1.0]
    assert [quality.linear_decay(at, 0.1, 0.5, 0.2) for at in (0.75, 1.0)] == pytest.approx([0.6, 0.2])
    assert [quality.cosine_decay(at, 0.1, 0.1) for at in (0.05, 0.1, 0.55, 1.0)] == pytest.approx([0.5, 1.0, 0.55, 0.1])
    assert quality.nanochat_schedule(0, 0.0) == pytest.approx((1 / 40, 0.85, 1.0))
    assert quality.nanochat_schedule(200, 0.2)[:2] == pytest.approx((1.0, 0.91))
    assert quality.nanochat_schedule(1000, 0.675) == pytest.approx((0.525, 0.935, 0.2388), abs=1e-4)
    assert quality.nanochat_schedule(2000, 1.0) == pytest.approx((0.05, 0.90, 0.0))


def test_the_dense_model_is_causal(quality):
    dense = importlib.import_module("dense")
    torch.manual_seed(0)
    model = dense.DenseLM(**quality.DENSE)
    tokens = torch.randint(320, (2, 16))
    assert model(tokens, tokens).item() == pytest.approx(math.log(320), abs=0.1)
    labels = torch.full_like(tokens, -100)
    labels[:, 8] = tokens[:, 8]
    loss = model(tokens, labels)
    ahead, behind = tokens.clone(), tokens.clone()
    ahead[:, 8:] = (ahead[:, 8:] + 1) % 320
    behind[:, 3] = (behind[:, 3] + 1) % 320
    assert torch.equal(model(ahead, labels), loss)
    assert not torch.equal(model(behind, labels), loss)
    decayed, plain = dense.adamw_groups(model, 0.1)
    assert {p.dim() for p in decayed["params"]} == {2} and {p.dim() for p in plain["params"]} == {1}
    assert (decayed["weight_decay"], plain["weight_decay"]) == (0.1, 0.0)
