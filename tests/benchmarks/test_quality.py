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
    """Returns the benchmark module, with contenders of toy size."""
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "benchmarks")
    quality = importlib.import_module("quality")
    monkeypatch.setattr(quality, "tune_allocator", lambda: False)  # this setting would outlast the test
    module = quality.contenders
    monkeypatch.setattr(module, "VOCABULARY", 320)
    monkeypatch.setattr(module, "CONTEXT", 16)
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
    return quality


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
    return quality.contenders.load(str(text_folder))


def test_quality(quality, checkout, text_folder, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(quality, "compile_unsupported_reason", lambda device: "")
    monkeypatch.setattr(quality, "SECONDS", 0.2)
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
        curve = result["curves"][name]
        assert len(curve) == quality.TURNS
        assert curve[-1] == [result["seconds"][name], result["tokens"][name], bits[name]]

    again = tmp_path / "again.svg"
    quality.draw(result, again)
    assert again.read_bytes() == picture.read_bytes()
    for name in result["bits_per_byte"]:
        assert f"{quality.NAMES[name]}: {bits[name]:.3f}" in picture.read_text(), "the figure where the curve ends"


def test_without_nanochat_the_result_says_so(quality, text_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(quality, "SECONDS", 0.05)
    options = ["--results", str(tmp_path), "--picture", str(tmp_path / "quality.svg")]
    quality.main([str(text_folder), *options])
    result = json.loads((tmp_path / "quality.json").read_text())
    assert result["vs_nanochat"] is None and "--nanochat" in result["why_no_nanochat"]
    assert set(result["bits_per_byte"]) == {"ours", "dense"}


def test_a_single_contender_writes_no_files(quality, text_folder, tmp_path, capsys):
    options = ["--only", "dense", "--seconds", "0.05", "--results", str(tmp_path), "--picture", str(tmp_path / "q.svg")]
    quality.main([str(text_folder), *options])
    assert json.loads(capsys.readouterr().out)["dense"]["bits_per_byte"] > 0
    assert not list(tmp_path.iterdir())


def test_another_time_has_keys_and_a_file_of_its_own(quality, checkout, text_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(quality, "compile_unsupported_reason", lambda device: "")
    before = tmp_path / "before.json"
    before.write_text(json.dumps({"recipes": {"ours": {"lr": 0.001}, "nanochat": {"lr": 2.0}}}))
    options = ["--only", "ours", "nanochat", "--nanochat", str(checkout), "--seconds", "0.3", "--rates", str(before)]
    options += ["--name", "quality_longer", "--results", str(tmp_path), "--picture", str(tmp_path / "longer.svg")]
    quality.main([str(text_folder), *options])
    result = json.loads((tmp_path / "quality_longer.json").read_text())
    bits = result["bits_per_byte"]
    assert result["vs_nanochat_0.005min"] == pytest.approx(bits["ours"] / bits["nanochat"], abs=1e-4)
    assert result["vs_dense_0.005min"] is None and set(bits) == {"ours", "nanochat"}
    assert (result["recipes"]["ours"]["lr"], result["recipes"]["nanochat"]["lr"]) == (0.001, 2.0)
    assert not (tmp_path / "quality.json").exists()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--nanochat", "."], "no nanochat/gpt.py in ."),
        (["--only", "nanochat"], "no checkout of nanochat"),
        (["--rates", "absent.json"], "absent.json can't be read: No such file"),
        (["--rates", __file__], "is no result of this script"),
        (["--tune", "--rates", __file__], "--rates"),
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
    data = quality.contenders.load(str(text))
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


class Stub:
    """A contender whose loss is the number of the step, and whose step takes a second of the patched clock."""

    rows, optimizer, active_parameters = 2, torch.optim.SGD([torch.zeros(1)]), 0

    def __init__(self, diverges_at=None):
        self.model, self.seen, self.diverges_at = torch.nn.Linear(1, 1), [], diverges_at

    def step(self, number, progress, tokens):
        assert tokens.shape == (2, 16)
        self.seen.append((number, progress))
        return torch.tensor(math.nan if number == self.diverges_at else float(number))

    def mean_loss(self, tokens, labels):
        return torch.tensor(float(len(self.seen)))


@pytest.fixture
def clock(quality, monkeypatch):
    """Each look at the clock is a second later. Other processes use half a core."""
    ticks, cpu = itertools.count(), itertools.count()
    monkeypatch.setattr(quality.time, "perf_counter", lambda: float(next(ticks)))
    monkeypatch.setattr("common._cpu_seconds", lambda: (2.0 * next(cpu), 0.0, 1.0 * next(cpu)))
    monkeypatch.setattr(quality, "WARM_UP", ())


def test_contenders_take_turns_until_the_time_is_up(quality, data, clock, monkeypatch):
    monkeypatch.setattr(quality, "TURNS", 2)
    stubs, order = [Stub(), Stub()], []
    runs = [quality.Run(stub, data, 4.0) for stub in stubs]
    for run in runs:
        monkeypatch.setattr(run, "advance", lambda share, run=run: order.append(run) or quality.Run.advance(run, share))
    results = quality.race(runs, "race", curves=True)
    assert order == [*runs[::-1], *runs], "the first of a turn is the last of the next"
    for stub, result in zip(stubs, results, strict=True):
        assert stub.seen == [(0, 0.0), (1, 0.25), (2, 0.5), (3, 0.75)]
        assert (result["seconds"], result["tokens"], result["tokens_per_second"]) == (4.0, 4 * 32, 32)
        assert [point[:2] for point in result["curve"]] == [(2.0, 64), (4.0, 128)]
        assert result["others"] == result["busiest"] == 0.5


def test_trials_score_the_held_out_text_only_at_the_end(quality, data, clock):
    (result,) = quality.race([quality.Run(Stub(), data, 4.0)], "trial", curves=False)
    assert [point[0] for point in result["curve"]] == [4.0]
    assert result["bits_per_byte"] == result["curve"][0][2]


def test_a_run_that_diverges_stops(quality, data, clock):
    run = quality.Run(Stub(diverges_at=2), data, 1e6)
    for _ in range(2):
        run.advance(1.0)
    assert run.steps == 3


def test_a_rate_that_diverges_is_never_the_best(quality):
    runs = {rate: {"tuning_bits_per_byte": bits} for rate, bits in {1.0: math.nan, 2.0: 3.0, 4.0: 2.0}.items()}
    assert list(quality.best_first(runs)) == [4.0, 2.0, 1.0]


@pytest.mark.parametrize("name", ["ours", "dense"])
def test_warm_up_changes_nothing_and_runs_see_the_same_rows(quality, data, monkeypatch, name):
    """A longer warm-up changes neither the losses nor the result of a run of two steps."""

    def two_steps(seed=0):
        run = quality.Run(getattr(quality.contenders, name)(seed=seed), data, 1.0, seed)
        losses = [run.contender.step(number, 0.3, run._tokens()).item() for number in range(2)]
        return losses, run._score(data.held_out)

    first = two_steps()
    monkeypatch.setattr(quality, "WARM_UP", (0.0,) * 6)
    assert two_steps() == first
    assert two_steps(seed=1) != first


def test_schedules(quality):
    contenders = quality.contenders
    assert [contenders.linear_decay(at, 0.1, 0.5, 0.2) for at in (0.05, 0.3, 0.5)] == [0.5, 1.0, 1.0]
    assert [contenders.linear_decay(at, 0.1, 0.5, 0.2) for at in (0.75, 1.0)] == pytest.approx([0.6, 0.2])
    assert [contenders.cosine_decay(at, 0.1, 0.1) for at in (0.05, 0.1, 0.55, 1.0)] == pytest.approx(
        [0.5, 1.0, 0.55, 0.1]
    )
    assert contenders.nanochat_schedule(0, 0.0) == pytest.approx((1 / 40, 0.85, 1.0))
    assert contenders.nanochat_schedule(200, 0.2)[:2] == pytest.approx((1.0, 0.91))
    assert contenders.nanochat_schedule(1000, 0.675) == pytest.approx((0.525, 0.935, 0.2388), abs=1e-4)
    assert contenders.nanochat_schedule(2000, 1.0) == pytest.approx((0.05, 0.90, 0.0))


def test_the_dense_model_is_causal(quality):
    dense = importlib.import_module("dense")
    torch.manual_seed(0)
    model = dense.DenseLM(**quality.contenders.DENSE)
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
