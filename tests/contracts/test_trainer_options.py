"""Every field of TrainingArguments and argument of Trainer works in an MTPTrainer, or is refused."""

import dataclasses
import inspect
import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import DataCollatorForLanguageModeling, Trainer, TrainerCallback, TrainingArguments

from moonwhale.checkpoint import find_damage, list_checkpoints
from moonwhale.train.mtp_trainer import MTPTrainer, MTPTrainingArguments
from moonwhale.train.muonclip_trainer import REFUSED
from tiny_trainers import LENGTH, Rows, Stream, maker

pytestmark = pytest.mark.contract("Trainer's options", "transformers.Trainer: fields and constructor arguments")


@pytest.fixture
def make(tmp_path, tiny_model):
    return maker(tmp_path, tiny_model)


# Every field: a value that is not its default, or why it is left alone
WORKS = {
    "per_device_train_batch_size": 2,
    "num_train_epochs": 1.0,
    "max_steps": 1,
    "learning_rate": 1e-4,
    "lr_scheduler_type": "cosine",
    "lr_scheduler_kwargs": {},
    "warmup_steps": 1,
    "weight_decay": 0.1,
    "adam_beta1": 0.8,
    "adam_beta2": 0.9,
    "adam_epsilon": 1e-6,
    "optim": "sgd",
    "gradient_accumulation_steps": 2,
    "average_tokens_across_devices": False,
    "max_grad_norm": 0.1,
    "bf16": True,
    "bf16_full_eval": True,
    "activation_checkpointing": True,
    "activation_checkpointing_kwargs": {"use_reentrant": False},
    "gradient_checkpointing": True,
    "gradient_checkpointing_kwargs": {"use_reentrant": False},
    "use_cache": True,
    "neftune_noise_alpha": 5.0,
    "torch_empty_cache_steps": 1,
    "auto_find_batch_size": True,
    "logging_strategy": "epoch",
    "logging_steps": 2,
    "logging_first_step": True,
    "log_on_each_node": False,
    "logging_nan_inf_filter": False,
    "include_num_input_tokens_seen": "all",
    "log_level": "error",
    "log_level_replica": "error",
    "run_name": "a run",
    "eval_strategy": "epoch",
    "eval_steps": 1,
    "eval_delay": 1,
    "per_device_eval_batch_size": 2,
    "prediction_loss_only": True,
    "eval_on_start": True,
    "eval_do_concat_batches": False,
    "eval_use_gather_object": True,
    "eval_accumulation_steps": 1,
    "include_for_metrics": ["inputs"],
    "batch_eval_metrics": True,
    "save_only_model": True,
    "save_strategy": "epoch",
    "save_steps": 1,
    "save_on_each_node": True,
    "save_total_limit": 1,
    "load_best_model_at_end": True,
    "metric_for_best_model": "loss_main",
    "greater_is_better": True,
    "ignore_data_skip": True,
    "restore_callback_states_from_checkpoint": True,
    "seed": 1,
    "data_seed": 1,
    "accelerator_config": {"even_batches": False},
    "dataloader_drop_last": True,
    "dataloader_num_workers": 1,
    "dataloader_pin_memory": False,
    "dataloader_persistent_workers": True,
    "dataloader_prefetch_factor": 2,
    "dataloader_multiprocessing_context": "fork",
    "dataloader_in_order": False,
    "remove_unused_columns": False,
    "label_names": ["labels"],
    "train_sampling_strategy": "sequential",
    "length_column_name": "n",
    "skip_memory_metrics": False,
}
TOGETHER = {  # what transformers wants together with a field
    "num_train_epochs": {"max_steps": -1},
    "eval_steps": {"eval_strategy": "steps"},
    "save_steps": {"save_strategy": "steps"},
    "save_total_limit": {"save_strategy": "steps", "save_steps": 1},
    "activation_checkpointing_kwargs": {"activation_checkpointing": True},
    "gradient_checkpointing_kwargs": {"gradient_checkpointing": True},
    "dataloader_persistent_workers": {"dataloader_num_workers": 1},
    "dataloader_prefetch_factor": {"dataloader_num_workers": 1},
    "dataloader_multiprocessing_context": {"dataloader_num_workers": 1},
    "load_best_model_at_end": {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1},
    "eval_delay": {"eval_strategy": "steps", "eval_steps": 1},
}
REFUSED_VALUES = {
    "fp16": True,
    "label_smoothing_factor": 0.1,
    "use_liger_kernel": True,
    "liger_kernel_config": {"rope": True},
    "deepspeed": {"zero_optimization": {"stage": 2}},
    "fsdp": "full_shard",
    "fsdp_config": {"version": 2},
    "parallelism_config": object(),
    "push_to_hub": True,
    "enable_jit_checkpoint": True,
    "optim_args": "a=1",
    "optim_target_modules": "all-linear",
}
NOT_TRIED = {
    "output_dir": "every test sets it",
    "report_to": "needs a reporter's package",
    "project trackio_space_id trackio_bucket_id trackio_static_space_id": "only trackio's reporter reads them",
    "hub_token hub_private_repo hub_model_id hub_strategy hub_always_push hub_revision": "only push_to_hub reads them",
    "ddp_find_unused_parameters ddp_bucket_cap_mb ddp_broadcast_buffers ddp_static_graph ddp_backend ddp_timeout": (
        "only several processes read them, see tests/train/test_ddp.py"
    ),
    "local_rank": "torchrun sets it",
    "disable_tqdm": "the progress bar is Trainer's callback",
    "do_train do_eval do_predict resume_from_checkpoint": "Trainer reads none of them, scripts do",
    "use_cpu": "every test sets it",
    "tf32": "needs a GPU",
    "fp16_full_eval": "the CPU's half precision is too slow",
    "torch_compile torch_compile_backend torch_compile_mode": "see test_trainer_effects.py; compiling takes minutes",
    "debug": "transformers' debugger reads outputs that are tensors or tuples of them, ours are dataclasses",
    "full_determinism": "it changes the settings of the whole process",
}


def test_every_field_of_training_arguments_is_decided():
    not_tried = " ".join(NOT_TRIED).split()
    decided = [*WORKS, *REFUSED_VALUES, *not_tried]
    assert len(decided) == len(set(decided))
    fields = {field.name for field in dataclasses.fields(TrainingArguments)}
    assert fields - set(decided) == set(), "decide what MTPTrainer does with these"
    assert set(REFUSED) <= set(REFUSED_VALUES)


EFFECTS = set(re.findall(r"\w+", Path(__file__).with_name("test_trainer_effects.py").read_text(encoding="utf-8")))


@pytest.mark.parametrize("field", [field for field in WORKS if field not in EFFECTS])  # the others do more there
def test_a_field_that_is_served(make, field):
    given = {field: WORKS[field]} | TOGETHER.get(field, {})
    args = make(**given)
    result = args.train()
    assert result.global_step == (1 if field == "max_steps" else args.state.max_steps)
    metrics = args.evaluate()
    assert np.isfinite([metrics["eval_loss"], metrics["eval_loss_main"], metrics["eval_accuracy_mtp_1"]]).all()


@pytest.mark.parametrize("field", REFUSED_VALUES)
def test_a_field_that_is_refused(make, field):
    with pytest.raises(ValueError, match=f"^{field}=.* is not supported") as caught:
        make(**{field: REFUSED_VALUES[field]})
    assert "\n" not in str(caught.value)


# Effects, with a plain Trainer as the oracle


def test_steps_log_keys_and_checkpoints_are_a_plain_trainers(make):
    options = {
        "max_steps": -1,
        "num_train_epochs": 2,
        "save_strategy": "steps",
        "save_steps": 1,
        "save_total_limit": 2,
        "eval_strategy": "epoch",
        "include_num_input_tokens_seen": "all",
    }
    runs = []
    for kind, args_kind, out in ((MTPTrainer, MTPTrainingArguments, "a"), (Trainer, TrainingArguments, "b")):
        done = make(kind=kind, args_kind=args_kind, **options, run_name=out)
        done.train()
        runs.append((done, {path.name for path in list_checkpoints(done.args.output_dir)}))
    (ours, our_checkpoints), (plain, plain_checkpoints) = runs
    assert ours.state.global_step == plain.state.global_step == 4
    assert ours.state.num_input_tokens_seen == plain.state.num_input_tokens_seen == 2 * 8 * LENGTH
    assert our_checkpoints == plain_checkpoints == {"checkpoint-3", "checkpoint-4"}
    for own, other in zip(ours.state.log_history, plain.state.log_history, strict=True):
        assert set(other) - set(own) <= {"eval_model_preparation_time"}


def test_eval_loss_is_a_plain_trainers(make):
    ours, plain = make(), make(kind=Trainer, args_kind=TrainingArguments)
    assert ours.evaluate()["eval_loss"] == pytest.approx(plain.evaluate()["eval_loss"], rel=1e-5)


def scored(make, values, **options):
    """Returns a run that evaluates after each step and gets these values of its metric, one after the other."""
    remaining = iter(values)
    metrics = {"compute_metrics": lambda prediction: {"score": next(remaining)}}
    return make(metrics, eval_strategy="steps", eval_steps=1, metric_for_best_model="score", **options)


@pytest.mark.parametrize("greater", [False, True])
def test_the_best_checkpoint_is_kept_and_loaded(make, greater):
    values = [3.0, 1.0, 2.0, 2.5] if not greater else [1.0, 3.0, 2.0, 2.5]
    best = scored(
        make,
        values,
        max_steps=4,
        save_strategy="steps",
        save_steps=1,
        save_total_limit=2,
        load_best_model_at_end=True,
        greater_is_better=greater,
    )
    best.train()
    out = Path(best.args.output_dir)
    assert best.state.best_model_checkpoint == f"{out}/checkpoint-2"
    assert {path.name for path in list_checkpoints(out)} == {"checkpoint-2", "checkpoint-4"}
    assert all(find_damage(path) is None for path in list_checkpoints(out))
    for step in (2, 4):
        state = json.loads((out / f"checkpoint-{step}" / "trainer_state.json").read_text())
        assert state["best_model_checkpoint"] == f"{out}/checkpoint-2"
    saved = type(best.model).from_pretrained(out / "checkpoint-2").state_dict()
    assert all(torch.equal(value, saved[name]) for name, value in best.model.state_dict().items() if "load" not in name)


def test_save_strategy_best_saves_only_improvements(make):
    values = [3.0, 1.0, 2.0]
    run = scored(make, values, max_steps=3, save_strategy="best", greater_is_better=False)
    run.train()
    assert [path.name for path in list_checkpoints(run.args.output_dir)] == ["checkpoint-2", "checkpoint-1"]


def test_a_plateau_schedule_follows_eval_loss(make):
    run = make(
        lr_scheduler_type="reduce_lr_on_plateau",
        lr_scheduler_kwargs={"patience": 0, "factor": 0.5, "threshold": 1e9, "threshold_mode": "abs"},
        max_steps=3,
        eval_strategy="steps",
        eval_steps=1,
    )
    run.train()
    rates = [entry["learning_rate"] for entry in run.state.log_history if "learning_rate" in entry]
    assert rates[0] == pytest.approx(1e-3) and rates[-1] < rates[0]


def test_training_twice_leaves_good_checkpoints(make):
    run = make(save_strategy="steps", save_steps=1)
    run.train()
    run.train()
    out = Path(run.args.output_dir)
    assert {path.name for path in out.iterdir() if path.is_dir()} == {"checkpoint-1", "checkpoint-2"}
    assert all(find_damage(path) is None for path in list_checkpoints(out))


def test_an_evaluation_that_fails_costs_no_step(make):
    def fail(prediction):
        raise RuntimeError("no metric")

    run = make({"compute_metrics": fail}, eval_strategy="steps", eval_steps=2, save_strategy="steps", save_steps=2)
    with pytest.raises(RuntimeError, match="no metric"):
        run.train()
    [checkpoint] = list_checkpoints(run.args.output_dir)
    assert checkpoint.name == "checkpoint-2" and find_damage(checkpoint) is None


# Constructor arguments


def test_every_argument_of_trainer_is_tried_here():
    source = Path(__file__).read_text()
    assert all(f'"{name}"' in source or f" {name}=" in source for name in ARGUMENTS)
    assert list(inspect.signature(Trainer).parameters) == ARGUMENTS


ARGUMENTS = [
    "model",
    "args",
    "data_collator",
    "train_dataset",
    "eval_dataset",
    "processing_class",
    "model_init",
    "compute_loss_func",
    "compute_metrics",
    "callbacks",
    "optimizers",
    "optimizer_cls_and_kwargs",
    "preprocess_logits_for_metrics",
]


def test_own_metrics_see_the_main_heads_logits(make):
    seen = {}

    def measure(prediction):
        seen["shapes"] = prediction.predictions.shape, prediction.label_ids.shape
        return {"right": float((prediction.predictions[:, :-1] == prediction.label_ids[:, 1:]).mean())}

    run = make({"compute_metrics": measure, "preprocess_logits_for_metrics": lambda logits, labels: logits.argmax(-1)})
    metrics = run.evaluate()
    assert seen["shapes"] == ((6, LENGTH), (6, LENGTH))
    assert metrics["eval_right"] == pytest.approx(metrics["eval_accuracy_main"], rel=1e-5)
    predicted = run.predict(Rows(3))
    assert predicted.predictions.shape == (3, LENGTH) and "test_right" in predicted.metrics


def test_predictions_without_metrics_are_logits(make):
    assert make().predict(Rows(3)).predictions.shape == (3, LENGTH, 61)


def test_a_dict_of_evaluation_sets(make):
    run = make({"eval_dataset": {"a": Rows(3), "b": Rows(5)}}, eval_strategy="steps", eval_steps=2)
    run.train()
    names = {name for entry in run.state.log_history for name in entry}
    assert {"eval_a_loss", "eval_b_loss", "eval_b_loss_main"} <= names


def test_streams(make):
    run = make({"train_dataset": Stream(), "eval_dataset": Stream()}, eval_strategy="steps", eval_steps=2)
    run.train()
    assert any("tokens_per_second" in entry for entry in run.state.log_history)
    assert run.evaluate()["eval_loss"] == pytest.approx(make().evaluate(Rows())["eval_loss"], rel=0.5)


def test_a_collator_that_makes_the_labels(make, small_tokenizer):
    rows = [{"input_ids": Rows()[i]["input_ids"].tolist()[: 8 + i]} for i in range(8)]
    collator = DataCollatorForLanguageModeling(small_tokenizer, mlm=False)
    given = {"train_dataset": rows, "eval_dataset": rows, "data_collator": collator}
    run = make(given | {"processing_class": small_tokenizer}, eval_strategy="steps", eval_steps=2)
    run.train()
    assert np.isfinite(run.evaluate()["eval_loss"])


def test_own_compute_loss_is_the_loss(make):
    class Doubled(MTPTrainer):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            out = model(**inputs)
            return (2 * out.loss, out) if return_outputs else 2 * out.loss

    run = make(kind=Doubled)
    assert run.evaluate()["eval_loss"] == pytest.approx(2 * make().evaluate()["eval_loss"], rel=1e-5)
    run.train()
    assert "loss" in run.state.log_history[0] and "loss_main" not in run.state.log_history[0]


def test_own_loss_functions_are_refused(make):
    with pytest.raises(ValueError, match=r"^compute_loss_func is not supported"):
        make({"compute_loss_func": lambda outputs, labels, num_items_in_batch=None: 0})


def test_arguments_of_another_class_are_refused(make):
    with pytest.raises(TypeError, match="without MuonClip's settings"):
        make(args_kind=TrainingArguments)


def test_model_init_and_optimizers(make, tiny_model):
    run = make({"model_init": lambda: tiny_model(num_nextn_predict_layers=1)})
    run.train()
    run.train()
    assert run._hooks.last  # of the second model's optimizer
    given = {"optimizer_cls_and_kwargs": (torch.optim.SGD, {"lr": 1e-3})}
    for run in (make(given), make(optim="sgd"), make(optim="adamw_torch")):
        run.train()
        assert "max_attention_logit" in run.state.log_history[0]
        assert type(run.optimizer.optimizer).__name__ in ("SGD", "AdamW")
    run = make()
    run.optimizer = own = torch.optim.SGD(run.model.parameters(), lr=1e-3)
    run.train()
    assert run.optimizer.optimizer is own


def test_callbacks_see_predictions(make):
    class Count(TrainerCallback):
        steps = 0

        def on_prediction_step(self, args, state, control, **kwargs):
            self.steps += 1

    count = Count()
    make({"callbacks": [count]}, per_device_eval_batch_size=2).evaluate()
    assert count.steps == 3
