"""Every field of TRL's SFTConfig and GRPOConfig works in our trainers, or is refused."""

import dataclasses
import math

import datasets
import pytest
from transformers import TrainingArguments
from trl import GRPOConfig, SFTConfig

from moonwhale.checkpoint import open_checkpoint
from moonwhale.infer.engine import Engine
from moonwhale.posttrain.grpo_trainer import MTPGRPOConfig, MTPGRPOTrainer
from moonwhale.posttrain.sft_trainer import MTPSFTConfig, MTPSFTTrainer
from tiny_trainers import BASE

pytestmark = pytest.mark.contract("Trainer's options", "trl.SFTConfig and trl.GRPOConfig: fields")

SFT_WORKS = {  # each group in one run
    "packed": {"packing": True, "packing_strategy": "bfd_split", "eval_packing": False, "max_length": 24},
    "wrapped": {"packing": True, "packing_strategy": "wrapped", "max_length": 24, "shuffle_dataset": True},
    "cut": {"max_length": 12, "truncation_mode": "keep_end", "dataset_num_proc": None},
}
SFT_TESTED = ["completion_only_loss", "dataset_text_field", "eos_token", "pad_token", "chat_template_path"]
SFT_REFUSED = {
    "loss_type": "dft",
    "router_aux_loss_coef": 0.0,
    "padding_free": True,
    "activation_offloading": True,
    "pad_to_multiple_of": 8,
    "max_length": None,
}
GRPO_WORKS = {
    "one": {"loss_type": "dr_grpo", "scale_rewards": "batch", "epsilon": 0.1, "epsilon_high": 0.3, "delta": 2.0}
    | {"mask_truncated_completions": True, "num_generations_eval": 2, "reward_weights": [0.5]},
    "two": {"loss_type": "sapo", "sapo_temperature_neg": 1.2, "sapo_temperature_pos": 0.9, "top_entropy_quantile": 0.5}
    | {"multi_objective_aggregation": "normalize_then_sum", "shuffle_dataset": False, "temperature": 0.7}
    | {"top_p": 0.9, "top_k": 5, "min_p": 0.05, "steps_per_generation": 2, "gradient_accumulation_steps": 2},
    "three": {"loss_type": "luspo", "importance_sampling_level": "sequence", "beta": 0.1, "sync_ref_model": True}
    | {"ref_model_mixup_alpha": 0.5, "ref_model_sync_steps": 1, "num_iterations": 2, "use_bias_correction_kl": False},
    "four": {"entropy_coef": 0.01, "use_adaptive_entropy": True, "entropy_coef_min": 0.001, "entropy_coef_max": 0.1}
    | {"entropy_coef_delta": 0.01, "entropy_target": 0.5, "cast_lm_head_to_fp32": True, "disable_dropout": True}
    | {"pad_to_multiple_of": 8, "log_completions": True, "num_completions_to_print": 1, "log_unique_prompts": True}
    | {"off_policy_mask_threshold": 0.5, "generation_batch_size": 8, "seed": 2**32 - 1},
    "five": {"loss_type": "vespo", "vespo_k_pos": 1.5, "vespo_lambda_pos": 2.5, "vespo_k_neg": 2.5}
    | {"vespo_lambda_neg": 1.5, "max_completion_length": 5, "num_generations": 2},
}
GRPO_REFUSED = {
    "use_vllm": True,
    "use_transformers_continuous_batching": True,
    "use_transformers_paged": True,
    "cache_implementation": "static",
    "generation_kwargs": {"num_beams": 2},
    "repetition_penalty": 1.2,
    "chat_template_kwargs": {"enable_thinking": False},
    "router_aux_loss_coef": 0.1,
}
NOT_TRIED = {
    "model_init_kwargs trust_remote_code": "only read if the model is given by name",
    "dataset_kwargs assistant_only_loss": "see tests/posttrain; the latter needs a template with generation marks",
    "ds3_gather_for_generation": "only DeepSpeed reads it, which is refused",
    "log_multimodal": "only rows with images read it",
    "max_tool_calling_iterations": "only tools read it, which are refused",
    "log_completions_hub_repo": "needs the hub",
    "transformers_continuous_batching_config": "only continuous batching reads it, which is refused",
}


def own_fields(config) -> set[str]:
    shared = {field.name for field in dataclasses.fields(TrainingArguments)}
    return {field.name for field in dataclasses.fields(config)} - shared


def test_every_field_is_decided():
    not_tried = set(" ".join(NOT_TRIED).split())
    sft = {name for fields in SFT_WORKS.values() for name in fields} | {*SFT_TESTED, *SFT_REFUSED}
    assert own_fields(SFTConfig) - sft - not_tried == set()
    grpo = {name for fields in GRPO_WORKS.values() for name in fields} | set(GRPO_REFUSED)
    vllm = {name for name in own_fields(GRPOConfig) if name.startswith("vllm_")}  # read by vLLM, which is refused
    assert own_fields(GRPOConfig) - grpo - not_tried - vllm == set()


@pytest.mark.parametrize(
    ("config", "field", "value"),
    [(MTPSFTConfig, *item) for item in SFT_REFUSED.items()] + [(MTPGRPOConfig, *item) for item in GRPO_REFUSED.items()],
)
def test_a_field_that_is_refused(config, field, value, tmp_path):
    with pytest.raises(ValueError, match=rf"^{field}=.* is not supported: .*(leave|give|set|choose|put)") as caught:
        config(str(tmp_path), use_cpu=True, **{field: value})
    assert "\n" not in str(caught.value)


@pytest.fixture
def sft(small_checkpoint, tmp_path):
    """`sft(rows, **fields)` returns a trainer of TRL's usual kind: unprepared rows, positional arguments."""

    def sft(rows=None, tokenizer=None, **fields):
        model, own = open_checkpoint(small_checkpoint)
        args = MTPSFTConfig(str(tmp_path / "run"), **BASE | {"per_device_train_batch_size": 2} | fields)
        rows = datasets.Dataset.from_list(rows or [{"text": "The whale sang to the moon. " * n} for n in (1, 2, 3, 4)])
        return MTPSFTTrainer(
            model, args, train_dataset=rows, eval_dataset=rows.select(range(2)), processing_class=tokenizer or own
        )

    return sft


@pytest.mark.parametrize("fields", SFT_WORKS.values(), ids=SFT_WORKS)
def test_sft_serves(fields, sft):
    trainer = sft(**fields)
    batch = next(iter(trainer.get_train_dataloader()))
    assert batch["input_ids"].shape[1] == fields["max_length"]
    trainer.train()
    assert math.isfinite(trainer.evaluate()["eval_loss_main"]) and trainer.state.global_step == 2


@pytest.mark.parametrize("only", [True, False])
def test_sft_learns_from_the_completion_or_from_all(only, sft):
    rows = [{"prompt": "The whale", "completion": " sang to the moon"}] * 2
    trainer = sft(rows, completion_only_loss=only, max_length=32)
    batch = next(iter(trainer.get_train_dataloader()))
    ignored = (batch["labels"][0] == -100) & (batch["attention_mask"][0] == 1)
    assert ignored.any() == only


def test_sft_reads_the_named_column_and_marks(sft, small_tokenizer, tmp_path):
    (tmp_path / "chat.jinja").write_text("{% for m in messages %}{{ m['content'] }}|{% endfor %}")
    trainer = sft(
        [{"body": "The moon"}] * 2, dataset_text_field="body", chat_template_path=str(tmp_path / "chat.jinja"),
        eos_token=small_tokenizer.eos_token, pad_token=small_tokenizer.pad_token, max_length=16,
    )  # fmt: skip
    ids = trainer.train_dataset[0]["input_ids"]
    assert small_tokenizer.decode(ids, skip_special_tokens=True).strip() == "The moon"
    assert trainer.processing_class.chat_template.startswith("{% for m in messages %}{{ m['content'] }}|")


def test_sft_takes_a_collator_of_ones_own(sft, small_checkpoint, tmp_path):
    model, tokenizer = open_checkpoint(small_checkpoint)
    args = MTPSFTConfig(str(tmp_path / "run"), **BASE)
    rows = datasets.Dataset.from_list([{"text": "The whale"}] * 4)

    def collate(rows):
        return "mine"

    trainer = MTPSFTTrainer(model, args, collate, rows, processing_class=tokenizer)
    assert trainer.data_collator is collate


@pytest.fixture
def grpo(small_checkpoint, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_DISABLE_TELEMETRY", "1")

    def grpo(given=None, **fields):
        model, tokenizer = open_checkpoint(small_checkpoint)
        options = {"per_device_train_batch_size": 4, "num_generations": 4, "max_completion_length": 6, "max_steps": 1}
        args = MTPGRPOConfig(str(tmp_path / "run"), **BASE | options | fields)
        rows = [{"prompt": [{"role": "user", "content": word}]} for word in ("moon", "sea", "whale", "sang")]

        def reward(completions, **_):
            return [float(len(c[0]["content"]) % 3) for c in completions]

        data = datasets.Dataset.from_list(rows)
        return MTPGRPOTrainer(model, [reward], args, data, processing_class=tokenizer, **(given or {}))

    return grpo


@pytest.mark.parametrize("fields", GRPO_WORKS.values(), ids=GRPO_WORKS)
def test_grpo_serves(fields, grpo, monkeypatch):
    asked, generate = [], Engine.generate

    def recorded(self, prompts, **options):
        asked.append(options)
        return generate(self, prompts, **options)

    monkeypatch.setattr(Engine, "generate", recorded)
    trainer = grpo(**fields)
    trainer.train()
    assert all(math.isfinite(entry["loss"]) for entry in trainer.state.log_history if "loss" in entry)
    for name, field in (("temperature", "temperature"), ("top_p", "top_p"), ("top_k", "top_k"), ("min_p", "min_p")):
        assert asked[0][name] == fields.get(field, asked[0][name])
    assert asked[0]["max_new_tokens"] == fields.get("max_completion_length", 6)


@pytest.mark.parametrize("name", ["rollout_func", "tools", "environment_factory", "peft_config"])
def test_grpo_refuses_what_replaces_the_engine(name, grpo):
    with pytest.raises(ValueError, match=f"^{name} is not supported: moonwhale's engine"):
        grpo({name: [len]})
    grpo({name: None})


def test_grpo_refuses_a_model_with_adapters(small_checkpoint, grpo):
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(open_checkpoint(small_checkpoint)[0], LoraConfig(target_modules=["o_proj"]))
    with pytest.raises(
        ValueError, match=r"^a model with adapters is not supported: .* merge them into the model first"
    ):
        MTPGRPOTrainer(model, [len])


def test_grpo_reads_the_control_tokens_of_a_text(grpo):
    """TRL tokenizes a text prompt that way, so its data sets may hold the chat template's tokens."""
    trainer = grpo()
    messages = [{"role": "user", "content": "sea"}]
    text = trainer.processing_class.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    alone, of_text, of_messages = trainer._roll_out(["sea", text, messages], None)["prompt_ids"]
    assert alone[0] == trainer.processing_class.bos_token_id and of_text == of_messages


def test_no_two_rollouts_of_grpo_share_a_seed(grpo, monkeypatch):
    seeds, generate = [], Engine.generate

    def recorded(self, prompts, seed, **options):
        seeds.extend(range(seed, seed + len(prompts)))
        return generate(self, prompts, seed=seed, **options)

    monkeypatch.setattr(Engine, "generate", recorded)
    trainer = grpo(steps_per_generation=1, gradient_accumulation_steps=2, max_steps=2)
    trainer.train()
    trainer.evaluate(trainer.train_dataset)
    assert len(seeds) > 4 * 4 and len(set(seeds)) == len(seeds)


def test_every_seed_draws_rollouts_of_its_own(grpo):
    trainer = grpo()

    def first_seed(seed: int) -> int:
        trainer.args.seed, trainer._rollouts = seed, {"train": (-1, 0), "eval": (-1, 0)}
        return trainer._rollout_seed(4)

    seeds = [0, 1, 2**22 - 1, 2**22, 2**22 + 1, 2**31, 2**32 - 1]
    found = [first_seed(seed) for seed in seeds]
    assert len(set(found)) == len(seeds) and max(found) < 2**62 and found == [first_seed(seed) for seed in seeds]


def test_an_evaluation_leaves_the_answers_of_training(grpo):
    trainer = grpo(log_completions=True)
    trainer.train()
    kept = list(trainer._logs["completion"])
    trainer.evaluate(trainer.train_dataset)
    assert kept and list(trainer._logs["completion"]) == kept
