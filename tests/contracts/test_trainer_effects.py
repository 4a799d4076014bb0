"""What each option of TrainingArguments does in an MTPTrainer. A plain Trainer or the definition is the oracle."""

import copy
from types import SimpleNamespace

import pytest
import torch
from transformers import Trainer, TrainerCallback, TrainingArguments, integrations
from transformers.hyperparameter_search import ALL_HYPERPARAMETER_SEARCH_BACKENDS
from transformers.trainer_callback import ExportableState
from transformers.trainer_utils import BestRun, HPSearchBackend

from moonwhale.checkpoint import list_checkpoints
from moonwhale.train.mtp_trainer import MTPTrainer, MTPTrainingArguments
from tiny_trainers import LENGTH, Rows, maker

pytestmark = pytest.mark.contract("Trainer's options", "transformers.Trainer: what each option does")

KINDS = ((MTPTrainer, MTPTrainingArguments), (Trainer, TrainingArguments))


def weights(trainer) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in trainer.model.parameters()])


@pytest.fixture
def make(tmp_path, tiny_model):
    return maker(tmp_path, tiny_model)


@pytest.fixture
def both(make, tmp_path):
    """`both(**fields)` trains an MTPTrainer and a plain Trainer with the same options, and returns both."""

    def both(given=dict, **fields):
        runs = []
        for i, (kind, args_kind) in enumerate(KINDS):
            options = {"output_dir": str(tmp_path / f"run{i}")} | fields
            run = make(given(), kind=kind, args_kind=args_kind, **options)
            run.train()
            runs.append(run)
        return runs

    return both


def moments(trainer) -> list[tuple]:
    """At which step what was logged, with the learning rate, and what was saved."""
    kinds = {"loss": "train", "eval_loss": "eval", "train_loss": "end"}
    logged = []
    for entry in trainer.state.log_history:
        kind = next(kinds[name] for name in ("loss", "eval_loss", "train_loss") if name in entry)
        rate = entry.get("learning_rate")
        logged.append((kind, entry["step"], rate if rate is None else pytest.approx(rate, rel=1e-6, abs=1e-12)))
    return [*logged, sorted(path.name for path in list_checkpoints(trainer.args.output_dir))]


FOUR = {"max_steps": 4, "per_device_train_batch_size": 2}
STEPS = {
    "logging_steps": {"logging_steps": 2},
    "logging_steps as a share": {"logging_steps": 0.5},
    "logging_first_step": {"logging_steps": 3, "logging_first_step": True},
    "logging_strategy": {"logging_strategy": "epoch", "max_steps": -1, "num_train_epochs": 2},
    "no logging": {"logging_strategy": "no"},
    "eval_steps": {"eval_strategy": "steps", "eval_steps": 2},
    "eval_strategy": {"eval_strategy": "epoch", "max_steps": -1, "num_train_epochs": 2},
    "eval_delay": {"eval_strategy": "steps", "eval_steps": 1, "eval_delay": 3},
    "eval_on_start": {"eval_strategy": "steps", "eval_steps": 4, "eval_on_start": True},
    "save_steps": {"save_strategy": "steps", "save_steps": 3, "logging_steps": 4},
    "save_total_limit": {"save_strategy": "steps", "save_steps": 1, "save_total_limit": 2},
    "save_strategy": {"save_strategy": "epoch", "max_steps": -1, "num_train_epochs": 2},
    "num_train_epochs": {"max_steps": -1, "num_train_epochs": 1.5},
    "dataloader_drop_last": {"max_steps": -1, "num_train_epochs": 1, "per_device_train_batch_size": 3}
    | {"dataloader_drop_last": True},
    "gradient_accumulation_steps": {"max_steps": -1, "num_train_epochs": 1, "gradient_accumulation_steps": 3},
    "warmup_steps": {"warmup_steps": 2},
    "warmup as a share": {"warmup_steps": 0.5},
    "cosine": {"lr_scheduler_type": "cosine", "lr_scheduler_kwargs": {"num_cycles": 2}},
    "polynomial": {"lr_scheduler_type": "polynomial", "lr_scheduler_kwargs": {"power": 2.0, "lr_end": 1e-5}},
    "constant": {"lr_scheduler_type": "constant_with_warmup", "warmup_steps": 3},
    "decay to a floor": {"lr_scheduler_type": "cosine_with_min_lr", "lr_scheduler_kwargs": {"min_lr": 5e-4}},
}


@pytest.mark.parametrize("fields", STEPS.values(), ids=STEPS)
def test_steps_rates_evaluations_and_checkpoints_are_a_plain_trainers(fields, both):
    ours, plain = both(**FOUR | fields)
    added = {"checkpoint steps are logged"} if "save_steps" in fields and "save_total_limit" not in fields else set()
    mine, theirs = moments(ours), moments(plain)
    if added:  # so that a resumed run averages over the same steps
        mine = [moment for moment in mine if moment[:2] != ("train", 3)]
    assert mine == theirs


class Recorder(Rows):
    """Records the rows that are read, in order."""

    def __init__(self, *args):
        super().__init__(*args)
        self.read = []

    def __getitem__(self, i):
        self.read.append(int(i))
        length = 4 + 3 * int(i) % 11
        return {name: x[:length] for name, x in super().__getitem__(i).items()}


def pad(rows):
    columns = {name: [row[name] for row in rows] for name in rows[0]}
    padded = torch.nn.utils.rnn.pad_sequence
    return {name: padded(column, True, -100 * (name == "labels")) for name, column in columns.items()}


ORDERS = {
    "random": {},
    "seed": {"seed": 5},
    "data_seed": {"data_seed": 7},
    "sequential": {"train_sampling_strategy": "sequential"},
    "group_by_length": {"train_sampling_strategy": "group_by_length"},
    "batch_rebalance": {"train_sampling_strategy": "batch_rebalance", "max_steps": -1, "num_train_epochs": 1},
}


@pytest.mark.parametrize("fields", ORDERS.values(), ids=ORDERS)
def test_rows_are_read_in_a_plain_trainers_order(fields, both):
    ours, plain = both(lambda: {"train_dataset": Recorder(12), "data_collator": pad}, **FOUR | fields)
    assert ours.train_dataset.read == plain.train_dataset.read != []


@pytest.mark.parametrize("skip", [False, True], ids=["from its place", "ignore_data_skip"])
def test_a_resumed_run_reads_on_from_its_place_or_anew(skip, make, tmp_path):
    read, moved = [], []
    for kind, args_kind in KINDS:
        fields = FOUR | {"save_strategy": "steps", "save_steps": 2, "train_sampling_strategy": "sequential"}
        fields |= {"kind": kind, "args_kind": args_kind, "output_dir": str(tmp_path / kind.__name__)}
        first = make({"train_dataset": Recorder(12), "data_collator": pad}, **fields)
        first.train()
        again = make({"train_dataset": Recorder(12), "data_collator": pad}, ignore_data_skip=skip, **fields)
        again.train(resume_from_checkpoint=f"{first.args.output_dir}/checkpoint-2")
        read.append(again.train_dataset.read)
        moved.append(torch.equal(weights(again), weights(first)))
    assert read[0] == read[1] and moved[0] == (not skip)


def test_resume_true_a_path_and_false(make):
    fields = FOUR | {"save_strategy": "steps", "save_steps": 2}
    first = make(**fields)
    with pytest.raises(ValueError, match="No valid checkpoint found"):
        make(**fields).train(resume_from_checkpoint=True)
    first.train(resume_from_checkpoint=False)
    newest = make(**fields | {"max_steps": 5})
    newest.train(resume_from_checkpoint=True)
    assert [entry["step"] for entry in newest.state.log_history if "loss" in entry] == [1, 2, 3, 4, 5]
    anew = make(**fields | {"save_strategy": "no"})
    anew.train(resume_from_checkpoint=False)
    assert torch.equal(weights(anew), weights(first))


def test_gradient_accumulation_equals_a_larger_batch(make):
    whole, halves = (
        make(optim="sgd", learning_rate=0.1, train_sampling_strategy="sequential", **fields)
        for fields in (
            {"per_device_train_batch_size": 4},
            {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2},
        )
    )
    before = weights(whole)
    for run in (whole, halves):
        run.train()
    moved = (weights(whole) - before).norm()
    assert (weights(whole) - weights(halves)).norm() < 1e-3 * moved


def test_max_grad_norm_bounds_the_step(make):
    run = make(optim="sgd", learning_rate=1.0, max_grad_norm=0.01, lr_scheduler_type="constant", max_steps=1)
    before = weights(run)
    run.train()
    assert (weights(run) - before).norm() == pytest.approx(0.01, rel=1e-3)
    assert run.state.log_history[0]["grad_norm"] > 0.01


def test_muonclip_takes_its_settings(make):
    fields = {"weight_decay": 0.3, "adam_beta1": 0.8, "adam_beta2": 0.9, "adam_epsilon": 1e-6, "muon_momentum": 0.7}
    groups = make(**fields).create_optimizer().param_groups
    assert {group["weight_decay"] for group in groups} == {0.3, 0.0}
    assert {(group["betas"], group["eps"], group["momentum"]) for group in groups} == {((0.8, 0.9), 1e-6, 0.7)}


UNCHANGED = {  # options that cost time or memory, and change no weight
    "gradient_checkpointing": {"gradient_checkpointing": True},
    "activation_checkpointing": {"activation_checkpointing": True},
    "dataloader workers": {"dataloader_num_workers": 1, "dataloader_persistent_workers": True}
    | {"dataloader_prefetch_factor": 3, "dataloader_multiprocessing_context": "fork"},
    "evaluations": {"eval_strategy": "steps", "eval_steps": 1, "eval_on_start": True},
    "checkpoints": {"save_strategy": "steps", "save_steps": 1, "save_only_model": True},
    "log lines": {"logging_steps": 2, "log_level": "error", "logging_nan_inf_filter": False},
    "memory": {"torch_empty_cache_steps": 1, "skip_memory_metrics": False},
    "input counts": {"include_num_input_tokens_seen": "non_padding"},
}


@pytest.mark.parametrize("fields", UNCHANGED.values(), ids=UNCHANGED)
def test_options_that_change_no_weight(fields, make):
    plain, other = make(run_name="a"), make(**fields)
    for run in (plain, other):
        run.train()
    assert torch.equal(weights(plain), weights(other))


def test_torch_compile_trains_the_same(make):
    plain, compiled = make(), make(torch_compile=True, torch_compile_backend="eager")
    for run in (plain, compiled):
        run.train()
    torch.testing.assert_close(weights(compiled), weights(plain), rtol=1e-4, atol=1e-6)
    assert compiled.evaluate()["eval_loss_main"] == pytest.approx(plain.evaluate()["eval_loss_main"], rel=1e-4)


def test_workers_options_reach_both_loaders(make):
    fields = {"dataloader_num_workers": 1, "dataloader_prefetch_factor": 3, "dataloader_in_order": False}
    run = make(dataloader_multiprocessing_context="fork", **fields)
    for loader in (run.get_train_dataloader(), run.get_eval_dataloader()):
        assert (loader.num_workers, loader.prefetch_factor, loader.in_order) == (1, 3, False)
        assert loader.multiprocessing_context.get_start_method() == "fork"


@pytest.mark.parametrize("count", [6, 8, 3])
def test_drop_last_evaluates_whole_batches_alone(count, make):
    given, fields = (
        {"eval_dataset": Rows(count, seed=1)},
        {"dataloader_drop_last": True, "per_device_eval_batch_size": 4},
    )
    ours, plain = (make(given, kind=kind, args_kind=args, **fields).evaluate() for kind, args in KINDS)
    assert ("eval_loss" in ours) == ("eval_loss" in plain) == (count >= 4)
    if count >= 4:
        assert ours["eval_loss"] == pytest.approx(plain["eval_loss"], rel=1e-5)
    assert ours.get("eval_targets", 0) == count // 4 * 4 * (LENGTH - 1)
    assert make(given | {"evaluate_all": True}, **fields).evaluate()["eval_targets"] == count * (LENGTH - 1)


def test_persistent_workers_serve_every_evaluation_of_their_rows(make):
    fields = {"dataloader_num_workers": 1, "dataloader_multiprocessing_context": "fork"}
    sets = {"a": Rows(6, seed=1), "b": Rows(4, seed=2)}
    run, kept = (make({"eval_dataset": sets}, dataloader_persistent_workers=p, **fields) for p in (False, True))
    assert run.get_eval_dataloader("a") is not run.get_eval_dataloader("a")
    assert kept.get_eval_dataloader("a") is kept.get_eval_dataloader(sets["a"]) is not kept.get_eval_dataloader("b")
    first, second = kept.evaluate(), kept.evaluate()
    assert [first[f"eval_{name}_loss"] for name in "ab"] == [second[f"eval_{name}_loss"] for name in "ab"]
    assert first["eval_a_loss"] == run.evaluate()["eval_a_loss"] != kept.evaluate(Rows(6, seed=3))["eval_loss"]


def test_save_only_model_leaves_out_the_optimizer(make):
    run = make(save_strategy="steps", save_steps=2, save_only_model=True)
    run.train()
    [checkpoint] = list_checkpoints(run.args.output_dir)
    assert (checkpoint / "model.safetensors").exists() and not (checkpoint / "optimizer.pt").exists()


def test_neftune_noise_changes_training_alone(make):
    plain, noisy = make(), make(neftune_noise_alpha=50.0)
    assert plain.evaluate()["eval_loss"] == noisy.evaluate()["eval_loss"]
    for run in (plain, noisy):
        run.train()
    assert plain.state.log_history[0]["loss"] != pytest.approx(noisy.state.log_history[0]["loss"], rel=1e-3)
    assert noisy.evaluate()["eval_loss"] == noisy.evaluate()["eval_loss"]


def test_a_batch_that_does_not_fit_is_halved(make):
    class Small(MTPTrainer):
        def training_step(self, model, inputs, num_items_in_batch=None):
            if len(inputs["input_ids"]) > 2:
                raise RuntimeError("CUDA out of memory.")
            return super().training_step(model, inputs, num_items_in_batch)

    run = make(kind=Small, auto_find_batch_size=True)
    run.train()
    assert run.state.global_step == 2 and run._train_batch_size == 2
    assert all(p.isfinite().all() for p in run.model.parameters())


def test_precision_of_autocast_and_of_evaluation(make):
    seen = []
    run = make(bf16=True, max_steps=1)
    run.model.model.layers[0].register_forward_hook(lambda module, inputs, out: seen.append(out[0].dtype))
    run.train()
    assert set(seen) == {torch.bfloat16} and next(run.model.parameters()).dtype == torch.float32
    whole, cast = make().evaluate()["eval_loss"], make(bf16_full_eval=True).evaluate()["eval_loss"]
    assert cast != whole and cast == pytest.approx(whole, rel=0.02)


METRICS = {
    "as it is": {},
    "eval_accumulation_steps": {"eval_accumulation_steps": 1},
    "eval_do_concat_batches": {"eval_do_concat_batches": False},
    "include_for_metrics": {"include_for_metrics": ["inputs", "loss"]},
    "batch_eval_metrics": {"batch_eval_metrics": True},
    "prediction_loss_only": {"prediction_loss_only": True},
    "per_device_eval_batch_size": {"per_device_eval_batch_size": 4},
    "eval_use_gather_object": {"eval_use_gather_object": True},
}


@pytest.mark.parametrize("fields", METRICS.values(), ids=METRICS)
def test_metrics_are_given_what_a_plain_trainer_gives(fields, make):
    given = []

    def shapes(x):
        return [shapes(part) for part in x] if isinstance(x, list | tuple) else None if x is None else tuple(x.shape)

    def measure(prediction, compute_result=None):
        parts = prediction.predictions, prediction.label_ids, prediction.inputs, prediction.losses
        given[-1].append((compute_result, shapes(parts)))
        return {"calls": len(given[-1])}

    metrics = []
    for kind, args_kind in KINDS:
        given.append([])
        run = make(
            {"compute_metrics": measure}, kind=kind, args_kind=args_kind, **{"per_device_eval_batch_size": 2} | fields
        )
        metrics.append(run.evaluate())
    assert given[0] == given[1]
    assert metrics[0].get("eval_calls") == metrics[1].get("eval_calls")
    assert metrics[0]["eval_loss"] == pytest.approx(metrics[1]["eval_loss"], rel=1e-5)


def test_input_counts_are_a_plain_trainers(both):
    for fields in ({"include_num_input_tokens_seen": "all"}, {"include_num_input_tokens_seen": "non_padding"}):
        ours, plain = both(**fields)
        assert ours.state.num_input_tokens_seen == plain.state.num_input_tokens_seen > 0


class Counter(TrainerCallback, ExportableState):
    def __init__(self, start=0):
        self.count = start

    def on_step_end(self, args, state, control, **kwargs):
        self.count += 1

    def state(self):
        return {"args": {"start": self.count}, "attributes": {}}


def test_callbacks_are_added_removed_and_restored(make):
    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_training_stop = control.should_save = control.should_evaluate = True

    counter = Counter()
    run = make({"callbacks": [counter]}, max_steps=4)
    run.add_callback(Stop)
    assert isinstance(run.pop_callback(Stop), Stop) and run.pop_callback(Stop) is None
    run.add_callback(Stop())
    run.train()
    assert counter.count == run.state.global_step == 1
    assert [path.name for path in list_checkpoints(run.args.output_dir)] == ["checkpoint-1"]
    assert any("eval_loss" in entry for entry in run.state.log_history)
    run.remove_callback(Stop)
    again = make({"callbacks": [Counter(100)]}, max_steps=4, restore_callback_states_from_checkpoint=True)
    again.train(resume_from_checkpoint=True)
    [restored] = [c for c in again.callback_handler.callbacks if isinstance(c, Counter)]
    assert restored.count == again.state.global_step == 4


def test_optimizer_and_schedule_of_ones_own(make, tiny_model):
    model = tiny_model(num_nextn_predict_layers=1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)
    run = make({"optimizers": (optimizer, schedule), "model": model}, max_steps=3)
    run.train()
    assert run.optimizer.optimizer is optimizer
    rates = [entry["learning_rate"] for entry in run.state.log_history if "loss" in entry]
    assert rates == pytest.approx([0.5, 0.25, 0.125]) or rates == pytest.approx([0.25, 0.125, 0.0625])
    assert run._hooks.last and "max_attention_logit" in run.state.log_history[0]


def test_hyperparameter_search(make, tiny_model, monkeypatch):
    class Search:
        """Tries two learning rates, as a search's package would."""

        def ensure_available(self):
            pass

        def run(self, trainer, n_trials, direction, **kwargs):
            found = []
            for rate in (1e-4, 1e-3):
                trainer.objective = None
                trainer.train(trial=SimpleNamespace(number=len(found), params={"learning_rate": rate}))
                found.append((trainer.compute_objective(trainer.evaluate()), rate, copy.deepcopy(trainer.args)))
            objective, rate, _ = min(found, key=lambda trial: trial[0])
            assert [args.learning_rate for *_, args in found] == [1e-4, 1e-3] and found[0][0] != found[1][0]
            return BestRun("0", objective, {"learning_rate": rate})

    monkeypatch.setattr(
        integrations, "hp_params", lambda trial: trial.params
    )  # which knows only the trials of packages that are installed
    monkeypatch.setitem(ALL_HYPERPARAMETER_SEARCH_BACKENDS, HPSearchBackend.OPTUNA, Search)
    run = make({"model_init": lambda: tiny_model(num_nextn_predict_layers=1)})
    best = run.hyperparameter_search(lambda trial: trial.params, n_trials=2, backend="optuna", direction="minimize")
    assert best.hyperparameters["learning_rate"] in (1e-4, 1e-3)
    with pytest.raises(RuntimeError, match="model_init"):
        make().hyperparameter_search(backend="optuna")
