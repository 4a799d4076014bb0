"""MTPTrainer: what a step does, what it logs, and when it stops."""

import copy
import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch.utils.data import Dataset
from transformers import AutoTokenizer

from moonwhale.checkpoint import log_history, newest_checkpoint
from moonwhale.costs import flops_per_token
from moonwhale.data.packing import build_data
from moonwhale.errors import UserError
from moonwhale.model import MoonwhaleForCausalLM, modeling_moonwhale
from moonwhale.model.compiling import compile_unsupported_reason
from moonwhale.model.documents import Documents
from moonwhale.optim import muonclip
from moonwhale.precision import peak_flops
from moonwhale.train import pretrain, speed
from moonwhale.train.mtp_trainer import MTPTrainer, MTPTrainingArguments

LENGTH = 24


class Rows(Dataset):
    """Rows of packed documents of one to twenty tokens. No two rows have the same number of targets."""

    def __init__(self, count: int, vocab_size: int = 61):
        generator = torch.Generator().manual_seed(1)
        self.ids = torch.randint(vocab_size, (count, LENGTH), generator=generator)
        starts = torch.rand(count, LENGTH, generator=generator) < torch.linspace(0.02, 0.6, count)[:, None]
        starts[:, 0] = True
        index = torch.arange(LENGTH)
        self.positions = index - torch.where(starts, index, 0).cummax(1).values
        self.labels = self.ids.masked_fill(starts, -100)

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, i: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self.ids[i], "position_ids": self.positions[i], "labels": self.labels[i]}


@pytest.fixture
def make_trainer(tmp_path, tiny_model, monkeypatch):
    """`make_trainer(rows, model=..., **arguments)`, by default one step of all rows at a constant rate."""
    monkeypatch.setattr(muonclip, "_fast_dtype", lambda device: torch.float32)
    model_options = {"num_nextn_predict_layers": 2, "moba_block_size": 8, "moba_topk": 2}

    def make(rows, model=None, **changes):
        options = {
            "output_dir": str(tmp_path / "run"),
            "max_steps": 1,
            "per_device_train_batch_size": len(rows),
            "learning_rate": 1e-2,
            "lr_scheduler_type": "constant",
            "max_grad_norm": 0.0,
            "save_strategy": "no",
            "logging_steps": 1,
            "report_to": "none",
            "disable_tqdm": True,
            "remove_unused_columns": False,
            "use_cpu": True,
        }
        args = MTPTrainingArguments(**(options | changes))
        return MTPTrainer(model=model or tiny_model(**model_options), args=args, train_dataset=rows)

    return make


def logged(done: MTPTrainer) -> list[dict]:
    return [entry for entry in done.state.log_history if "loss_main" in entry]


def history(config, evaluations: bool = False) -> list[dict]:
    """The log lines of a finished run."""
    entries = log_history(newest_checkpoint(config.out))
    return [entry for entry in entries if ("eval_loss_main" if evaluations else "loss_main") in entry]


def weights(folder) -> dict[str, torch.Tensor]:
    return load_file(f"{folder}/model.safetensors")


# A step


def test_accumulating_micro_batches_is_one_large_batch(make_trainer, tiny_model):
    results = []
    for size, count in ((8, 1), (2, 4), (1, 8)):
        # The balance loss is a product of means over a batch, so it is not a sum over micro-batches.
        model = tiny_model(num_nextn_predict_layers=2, moba_block_size=8, moba_topk=2, aux_loss_alpha=0.0)
        sizes = {"per_device_train_batch_size": size, "gradient_accumulation_steps": count}
        done = make_trainer(Rows(16), model, **sizes, max_steps=3, logging_steps=2)
        done.train()
        results.append((done.model.state_dict(), logged(done)[0]))
    (large, large_log), *others = results
    for small, small_log in others:
        for name, value in large.items():
            torch.testing.assert_close(small[name], value, atol=2e-5, rtol=1e-4, msg=lambda m, n=name: f"{n}: {m}")
        for key in ("loss", "loss_main", "loss_mtp_1", "loss_mtp_2", "accuracy_mtp_2", "targets", "expert_imbalance"):
            assert small_log[key] == pytest.approx(large_log[key], rel=1e-4), key


def test_a_step_moves_every_weight_and_every_bias(make_trainer):
    one_step = make_trainer(Rows(8))
    before = copy.deepcopy(one_step.model.state_dict())
    one_step.train()
    still = [name for name, value in one_step.model.state_dict().items() if torch.equal(value, before[name])]
    assert not still
    assert any(name.endswith("e_score_correction_bias") for name in before)


def test_activation_checkpointing_gives_the_same_weights_and_counts_once(make_trainer):
    plain = make_trainer(Rows(8), max_steps=2)
    saving = make_trainer(Rows(8), max_steps=2, activation_checkpointing=True)
    plain.train()
    saving.train()
    assert saving.model.model.is_activation_checkpointing
    for name, value in plain.model.state_dict().items():
        torch.testing.assert_close(saving.model.state_dict()[name], value, atol=1e-6, rtol=1e-6)
    for a, b in zip(logged(plain), logged(saving), strict=True):
        assert {k: a[k] for k in a if "imbalance" in k or "logit" in k} == pytest.approx(
            {k: b[k] for k in b if "imbalance" in k or "logit" in k}
        )


def test_qk_clip_holds_the_logits(make_trainer):
    tau, logs = 0.5, {}
    for clip in (tau, 0):
        done = make_trainer(Rows(8), max_steps=5, qk_clip_tau=clip)
        done.train()
        logs[clip] = logged(done)
    assert logs[tau][0]["clipped_heads"] > 0
    assert max(log["max_attention_logit"] for log in logs[tau][1:]) < 2 * tau
    assert min(log["max_attention_logit"] for log in logs[0]) > 4 * tau
    assert all(log["clipped_heads"] == 0 for log in logs[0])


def test_bf16_is_close(make_trainer):
    runs = {bf16: make_trainer(Rows(8), max_steps=4, bf16=bf16) for bf16 in (False, True)}
    for run in runs.values():
        run.train()
        assert all(p.dtype is torch.float32 for p in run.model.parameters())
    for a, b in zip(*(logged(run) for run in runs.values()), strict=True):
        assert a["loss"] != b["loss"]
        assert a["loss"] == pytest.approx(b["loss"], rel=0.02)


def test_documents_and_targets_are_computed_once_a_micro_batch(make_trainer, monkeypatch):
    calls, right = [], Documents.from_inputs
    monkeypatch.setattr(Documents, "from_inputs", lambda *args: calls.append("documents") or right(*args))
    monkeypatch.setattr(modeling_moonwhale, "prediction_targets", lambda *args: calls.append("again"))
    trainer = make_trainer(Rows(8), max_steps=2, per_device_train_batch_size=4, gradient_accumulation_steps=2)
    trainer.train()
    assert calls == ["documents"] * 4


# What is logged


def test_the_first_line_is_true(make_trainer):
    rows = Rows(8)
    one_step = make_trainer(rows)
    reference = copy.deepcopy(one_step.model).train()
    one_step.train()
    log = logged(one_step)[0]

    logits = reference(input_ids=rows.ids, position_ids=rows.positions).logits[:, :-1].flatten(0, 1)
    targets = rows.labels[:, 1:].flatten()
    assert log["loss_main"] == pytest.approx(F.cross_entropy(logits, targets).item(), rel=1e-5)
    real = targets != -100
    assert log["accuracy_main"] == pytest.approx((logits.argmax(-1) == targets)[real].float().mean().item(), rel=1e-5)
    assert log["targets"] == real.sum()

    reference.zero_grad()
    for layer in reference.modules():  # what the forward above counted
        if hasattr(layer, "load"):
            layer.load.zero_()
    out = reference(input_ids=rows.ids, position_ids=rows.positions, labels=rows.labels)
    out.loss.backward()
    norm = torch.stack([p.grad.norm() for p in reference.parameters()]).norm()
    assert log["grad_norm"] == pytest.approx(norm.item(), rel=1e-4)
    assert log["loss"] == pytest.approx(out.loss.item(), rel=1e-5)
    assert log["loss_mtp_2"] == pytest.approx(out.losses[2].item(), rel=1e-5)
    assert log["accuracy_mtp_1"] == pytest.approx(out.accuracies[1].item(), rel=1e-5)
    assert log["loss_balance"] == pytest.approx(out.balance_loss.item(), rel=1e-5)
    logits = [m.max_logit.max().item() for m in reference.modules() if hasattr(m, "max_logit")]
    assert log["max_attention_logit"] == pytest.approx(max(logits), rel=1e-5)
    loads = [m.load for m in reference.modules() if hasattr(m, "load")]
    assert len(loads) == 4
    for i, load in enumerate(loads):
        assert log[f"expert_imbalance_{i}"] == pytest.approx((load.max() / load.mean()).item(), rel=1e-5)
    assert log["expert_imbalance"] == max(log[f"expert_imbalance_{i}"] for i in range(4))


def test_speed_leaves_out_start_up_logging_and_evaluation(make_trainer, monkeypatch):
    seconds = iter(range(0, 10_000, 2))  # every look at the clock is two seconds after the last
    monkeypatch.setattr(speed, "time", SimpleNamespace(perf_counter=lambda: next(seconds)))
    run = make_trainer(Rows(8), max_steps=5, per_device_train_batch_size=2, logging_steps=2, logging_first_step=True)
    run.train()
    first, *others = logged(run)
    assert "tokens_per_second" not in first  # it warms up
    for log in others:
        assert log["tokens_per_second"] == pytest.approx(2 * LENGTH / 2)
        peak = peak_flops(torch.device("cpu"), torch.float32)
        assert log["mfu"] == pytest.approx(24 * flops_per_token(run.model.config, LENGTH) / peak)


def test_sums_of_loss_parts_do_not_grow(make_trainer):
    run = make_trainer(Rows(8), max_steps=8, per_device_train_batch_size=2, logging_steps=100)
    run.train()
    assert [sums.numel() for sums in (run._loss_sums.per_depth, run._loss_sums.balance)] == [9, 2]


def test_tensorboard_has_every_part(tiny_run):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    config = tiny_run(report_to=["tensorboard"], steps=4, eval_every=2)
    pretrain.train(config)
    (folder,) = (path for path in (Path(config.out) / "runs").iterdir())
    events = EventAccumulator(str(folder)).Reload()
    names = ["loss", "loss_main", "loss_mtp_1", "loss_mtp_2", "loss_balance", "accuracy_main", "accuracy_mtp_2"]
    names += ["tokens_per_second", "mfu", "grad_norm", "learning_rate", "max_attention_logit", "clipped_heads"]
    names += ["expert_imbalance", "expert_imbalance_0", "expert_imbalance_3"]
    assert {f"train/{name}" for name in names} <= set(events.Tags()["scalars"])
    assert [event.step for event in events.Scalars("train/loss_main")] == [1, 2, 3, 4]
    assert [event.step for event in events.Scalars("eval/bits_per_byte")] == [2, 4]
    assert events.Scalars("train/loss_main")[-1].value == pytest.approx(history(config)[-1]["loss_main"])


# Schedules


def test_wsd_and_cosine_rates(tiny_run, tmp_path):
    common = {"steps": 10, "warmup_steps": 2, "lr": 1e-3, "min_lr_ratio": 0.1}
    wsd = tiny_run(**common, out=str(tmp_path / "wsd"), schedule="wsd", decay_fraction=0.4)
    cosine = tiny_run(**common, out=str(tmp_path / "cosine"), schedule="cosine")
    expected = {
        "wsd": [0.1, 0.55, 1, 1, 1, 1] + [0.1 + 0.9 * (1 - i / 4) for i in range(4)],
        "cosine": [0, 0.5] + [0.1 + 0.9 * (1 + math.cos(math.pi * i / 8)) / 2 for i in range(8)],
    }
    for config in (wsd, cosine):
        pretrain.train(config)
        rates = [log["learning_rate"] for log in history(config)]
        assert rates == pytest.approx([1e-3 * part for part in expected[config.schedule]]), config.schedule


def test_mtp_weight_changes_when_the_rate_decays(tiny_run):
    config = tiny_run(steps=10, decay_fraction=0.3, mtp_loss_weight_final=0.05, model={"mtp_loss_weight": 0.4})
    pretrain.train(config)
    for log in history(config):
        mtp = (log["loss_mtp_1"] + log["loss_mtp_2"]) / 2
        weight = (log["loss"] - log["loss_main"] - log["loss_balance"]) / mtp
        assert weight == pytest.approx(0.05 if log["step"] > 7 else 0.4, abs=1e-3), log["step"]


def test_the_embeddings_rate_follows_the_schedule(tiny_run):
    config = tiny_run(steps=2, embedding_lr=10.0, save_every=1, min_lr_ratio=0.5, warmup_steps=0)
    pretrain.train(config)
    saved = torch.load(newest_checkpoint(config.out) / "optimizer.pt", weights_only=True)["param_groups"]
    assert saved[-1]["lr"] == pytest.approx(10 * saved[0]["lr"]) and saved[0]["lr"] > 0


def test_mtp_modules_rest_until_they_start(make_trainer):
    def modules(trainer: MTPTrainer) -> dict[str, torch.Tensor]:
        return {name: p.detach().clone() for name, p in trainer.model.model.mtp_modules.named_parameters()}

    trainer = make_trainer(Rows(8), max_steps=5, mtp_start_step=3)
    seen, before = [], modules(trainer)
    trainer._hook_statistics.add = lambda last: seen.append(modules(trainer))
    trainer.train()
    for name, weight in before.items():
        assert torch.equal(seen[2][name], weight), name
    assert all(not torch.equal(seen[3][name], weight) for name, weight in before.items() if "proj" in name)
    for log in logged(trainer):
        assert ("loss_mtp_2" in log) == (log["step"] > 3), log["step"]
        flops = flops_per_token(trainer.model.config, LENGTH, training=log["step"] > 3) * (1 if log["step"] > 3 else 3)
        peak = peak_flops(trainer.args.device, torch.float32)
        if "mfu" in log:  # the first step warms up
            assert log["mfu"] * peak / log["tokens_per_second"] == pytest.approx(flops), log["step"]
        mtp = 0.3 * (log.get("loss_mtp_1", 0) + log.get("loss_mtp_2", 0)) / 2
        assert log["loss"] == pytest.approx(log["loss_main"] + mtp + log["loss_balance"], rel=1e-5)


def test_resting_mtp_modules_have_no_figures_in_an_evaluation(tiny_run):
    config = tiny_run(steps=4, eval_every=1, mtp_start=0.5)
    pretrain.train(config)
    log = history(config, evaluations=True)
    assert [("eval_accuracy_mtp_1" in entry, "eval_accuracy_main" in entry) for entry in log] == [
        (entry["step"] > 2, True) for entry in log
    ]


def test_resting_mtp_modules_leave_the_main_model_as_weight_zero_does(tiny_model):
    model = tiny_model(num_nextn_predict_layers=2)
    model.mtp_loss_weight = 0.0
    batch = {"input_ids": (ids := torch.randint(61, (2, 12))), "labels": ids}
    body, head = model.train(), model.lm_head.weight
    resting = body(**batch)
    rested = torch.autograd.grad(resting.loss, head)[0]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(model), "skips_mtp", False)
        running = model(**batch)
    assert resting.losses.shape == (1,) and running.losses.shape == (3,)
    assert torch.equal(resting.losses[0], running.losses[0])
    balance = running.balance_loss - resting.balance_loss
    torch.testing.assert_close(resting.loss + balance, running.loss)
    torch.testing.assert_close(rested, torch.autograd.grad(running.loss, head)[0])
    assert model.eval()(**batch).losses.shape == (3,)


# Evaluation


def test_bits_per_byte_by_hand(tiny_run):
    config = tiny_run(steps=4)
    pretrain.train(config)
    tokenizer, model = AutoTokenizer.from_pretrained(config.out), MoonwhaleForCausalLM.from_pretrained(config.out)
    held_out = build_data(config.load_source(), vocab_size=300, context=config.context).held_out
    nats = n_bytes = 0
    assert len(held_out) <= config.eval_rows
    for row in held_out:
        logits = model(input_ids=row["input_ids"][None], position_ids=row["position_ids"][None]).logits[0, :-1]
        targets = row["labels"][1:]
        nats += F.cross_entropy(logits, targets, reduction="sum").item()
        targets = targets[(targets != -100)].tolist()
        n_bytes += len(tokenizer.decode(targets, skip_special_tokens=True).encode())
    log = history(config, evaluations=True)[-1]
    assert log["eval_bits_per_byte"] == pytest.approx(nats / math.log(2) / n_bytes, rel=1e-4)
    assert {"eval_loss_mtp_1", "eval_accuracy_main", "eval_accuracy_mtp_2"} <= set(log)


def test_evaluation_leaves_training_alone_and_ends_the_run(tiny_run, tmp_path):
    often, never = tiny_run(eval_every=1, out=str(tmp_path / "a")), tiny_run(eval_every=4, out=str(tmp_path / "b"))
    for config in (often, never):
        pretrain.train(config)
    assert [log["step"] for log in history(often, evaluations=True)] == [1, 2, 3, 4, 5, 6]
    assert [log["step"] for log in history(never, evaluations=True)] == [4, 6]
    for name, value in weights(often.out).items():
        assert torch.equal(value, weights(never.out)[name]), name


# When it cannot go on


def break_after(monkeypatch, step: int, what: str) -> None:
    """Makes the loss or a gradient infinite in the step after `step`."""
    original = MTPTrainer.training_step

    def training_step(self, model, inputs, num_items_in_batch=None):
        loss = original(self, model, inputs, num_items_in_batch)
        if self.state.global_step == step:
            if what == "loss":
                return loss * math.nan
            next(self.model.parameters()).grad[0] = math.inf
        return loss

    monkeypatch.setattr(MTPTrainer, "training_step", training_step)


@pytest.mark.parametrize(("what", "said"), [("loss", "the loss is nan"), ("gradient", "the gradient norm is inf")])
def test_nan_stops_with_the_step_and_the_last_good_checkpoint(tiny_run, monkeypatch, what, said):
    config = tiny_run(save_every=2, log_every=10)
    break_after(monkeypatch, 5, what)
    with pytest.raises(UserError, match=rf"^step 6: {said}; the last good checkpoint is .*checkpoint-4: [^\n]*`lr`"):
        pretrain.train(config)
    assert all(value.isfinite().all() for value in weights(f"{config.out}/checkpoint-4").values())
    assert (Path(config.out) / "loss.png").exists()


def test_nan_before_any_checkpoint(tiny_run, monkeypatch):
    break_after(monkeypatch, 0, "loss")
    with pytest.raises(UserError, match=r"^step 1: the loss is nan; no checkpoint was written yet"):
        pretrain.train(tiny_run())


def test_too_little_text_for_a_batch(tiny_run):
    with pytest.raises(UserError, match=r"^`batch_size`: 64 rows are computed at once, but the text fills only \d+ "):
        pretrain.train(tiny_run(batch_size=64, tokens_per_step=64 * 32))


def test_another_gpu_than_the_first(tiny_run):
    choice = SimpleNamespace(device=torch.device("cuda:1"), autocast=False)
    with pytest.raises(UserError, match=r"^`device`: .*CUDA_VISIBLE_DEVICES=1"):
        pretrain.trainer_arguments(tiny_run(), choice, replicas=1)


# Compilation


def test_no_compiler(tiny_run, monkeypatch):
    monkeypatch.setattr("shutil.which", lambda _: None)
    config = tiny_run(compile=True)
    with pytest.raises(UserError, match=r"^`compile`: no C\+\+ compiler is found .*, or leave it out$"):
        pretrain.train(config)
    assert not Path(config.out).exists()


@pytest.mark.skipif(
    bool(compile_unsupported_reason(torch.device("cpu"))), reason=compile_unsupported_reason(torch.device("cpu")) or "-"
)
@pytest.mark.slow
def test_compiled_blocks_learn_the_same(tiny_run, tmp_path):
    small = {"num_hidden_layers": 1, "num_nextn_predict_layers": 0, "moba_full_attention_layers": []}
    runs = [tiny_run(compile=c, steps=2, out=str(tmp_path / str(c)), model=small) for c in (False, True)]
    for config in runs:
        pretrain.train(config)
    for a, b in zip(*map(history, runs), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-4)
    assert weights(runs[0].out).keys() == weights(runs[1].out).keys()
