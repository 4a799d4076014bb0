"""`attach_hooks` in other people's loops: own and wrapped optimizers, frozen weights, skipped steps, padding."""

import math

import pytest
import torch
from accelerate import Accelerator
from peft import LoraConfig, get_peft_model
from torch.utils.data import Dataset

from moonwhale.model.block import Block, BlockStatistics
from moonwhale.model.moe import DeepseekMoE
from moonwhale.optim import MuonClip, attach_hooks, param_groups
from moonwhale.posttrain.sft_trainer import Collator
from moonwhale.train.mtp_trainer import MTPTrainer, MTPTrainingArguments

CHAIN = {"num_nextn_predict_layers": 1}
TAU = 0.05  # far below the logits of random weights: every step clips


def batch(seed=0, rows=2):
    ids = torch.randint(61, (rows, 24), generator=torch.Generator().manual_seed(seed))
    return {"input_ids": ids, "labels": ids}


class Rows(Dataset):
    def __len__(self):
        return 8

    def __getitem__(self, i):
        return {name: x[0] for name, x in batch(i, rows=1).items()}


def biases(model):
    return torch.stack([moe.gate.e_score_correction_bias for moe in model.modules() if isinstance(moe, DeepseekMoE)])


def blocks(model):
    return [block for block in model.modules() if isinstance(block, Block)]


def state(model):
    return {name: x.clone() for name, x in model.state_dict().items()}


def changed(model, before):
    return {name for name, x in model.state_dict().items() if not torch.equal(x, before[name])}


def make_trainer(model, folder, optimizers=(None, None), **args):
    settings = {"max_steps": 2, "per_device_train_batch_size": 2, "report_to": [], "save_strategy": "no"}
    args = MTPTrainingArguments(
        str(folder), use_cpu=True, disable_tqdm=True, qk_clip_tau=TAU, logging_steps=1, **settings, **args
    )
    return MTPTrainer(model=model, args=args, train_dataset=Rows(), optimizers=optimizers)


def lora(model, **config):
    return get_peft_model(model, LoraConfig(target_modules=["q_b_proj", "kv_b_proj", "o_proj"], **config))


# --- which optimizers ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("wrap", ["before", "after"])
def test_prepared_by_accelerate(wrap, tiny_model):
    model = tiny_model(**CHAIN).train()
    optimizer, before = torch.optim.SGD(model.parameters(), lr=0.0), state(model)
    if wrap == "after":
        hooks = attach_hooks(optimizer, model, TAU)
    model, optimizer = Accelerator(cpu=True).prepare(model, optimizer)
    if wrap == "before":
        hooks = attach_hooks(optimizer, model, TAU)
    model(**batch()).loss.backward()
    optimizer.step()
    assert hooks.last["clipped_heads"] > 0
    assert any("kv_b_proj" in name for name in changed(model, before))


@pytest.mark.parametrize("wrap", ["torch.compile", "peft"])
def test_a_wrapped_module_counts_once(wrap, tiny_model):
    """A wrapper hands on the methods of the module inside it."""
    model = tiny_model().train()
    moe = model.model.layers[0].mlp
    if wrap == "peft":
        model = get_peft_model(model, LoraConfig(target_modules=["o_proj"], modules_to_save=["mlp"]))
        moe = model.get_submodule("base_model.model.model.layers.0.mlp").modules_to_save["default"]
    else:
        model.model.layers[0].mlp = torch.compile(moe, backend="eager")
    before, optimizer = moe.gate.e_score_correction_bias.clone(), torch.optim.SGD(model.parameters(), lr=0.0)
    attach_hooks(optimizer, model)
    model(**batch()).loss.backward()
    optimizer.step()
    moved = (moe.gate.e_score_correction_bias - before).abs().max()
    assert moved == pytest.approx(moe.bias_speed, rel=1e-3)


def test_something_else_is_refused(tiny_model):
    with pytest.raises(TypeError, match="LambdaLR has no step hooks"):
        optimizer = torch.optim.SGD(tiny_model().parameters(), lr=0.1)
        attach_hooks(torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: 1.0), tiny_model())


def test_own_optimizer_in_the_trainer(tiny_model, tmp_path):
    model = tiny_model(**CHAIN)
    trainer = make_trainer(model, tmp_path, (torch.optim.AdamW(model.parameters(), lr=0.0), None))
    trainer.train()
    logs = trainer.state.log_history[0]
    assert logs["clipped_heads"] > 0 and logs["expert_imbalance"] >= 1
    assert biases(model).abs().max() > 0


# --- frozen weights --------------------------------------------------------------------------------------------------


def test_frozen_embedding_keeps_the_hooks(tiny_model, tmp_path):
    model = tiny_model(**CHAIN)
    model.model.embed_tokens.weight.requires_grad_(False)
    before = biases(model).clone()
    trainer = make_trainer(model, tmp_path)
    trainer.train()
    assert trainer.state.log_history[0]["clipped_heads"] > 0
    assert not torch.equal(biases(model), before)


@pytest.mark.parametrize("loop", ["trainer", "own"])
def test_lora_leaves_the_base_as_it_is(loop, tiny_model, tmp_path):
    base = tiny_model(**CHAIN)
    model = lora(base)
    before = state(model)
    if loop == "trainer":
        make_trainer(model, tmp_path).train()
    else:
        model.train()
        trained = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.SGD(trained, lr=0.1)
        hooks = attach_hooks(optimizer, model, TAU)
        model(**batch()).loss.backward()
        optimizer.step()
        assert hooks.last["max_logits"].isfinite().all() and hooks.last["clipped_heads"] == 0
    names = changed(model, before)
    assert names and all("lora_" in name for name in names)


@pytest.mark.parametrize("frozen", ["q_b_proj", "kv_b_proj"])
def test_an_attention_with_a_frozen_half_is_not_clipped(frozen, tiny_model):
    model = tiny_model(**CHAIN).train()
    first = blocks(model)[0]
    getattr(first.self_attn, frozen).weight.requires_grad_(False)
    optimizer, before = torch.optim.SGD(model.parameters(), lr=0.0), state(model)
    attach_hooks(optimizer, model, TAU)
    model(**batch()).loss.backward()
    optimizer.step()
    names = changed(model, before)
    assert not any(name.startswith("model.layers.0.self_attn") for name in names)
    assert any(name.startswith("model.layers.1.self_attn") for name in names)


def test_a_frozen_router_keeps_its_bias(tiny_model):
    model = tiny_model(**CHAIN).train()
    blocks(model)[0].mlp.gate.weight.requires_grad_(False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    attach_hooks(optimizer, model)
    before = biases(model).clone()
    model(**batch()).loss.backward()
    optimizer.step()
    assert torch.equal(biases(model)[0], before[0]) and not torch.equal(biases(model)[1], before[1])


def test_final_mtp_weight_under_an_adapter(tiny_model, tmp_path):
    model = lora(tiny_model(**CHAIN))
    make_trainer(model, tmp_path, mtp_loss_weight_final=0.0, decay_steps=2).train()
    assert model.base_model.model.mtp_loss_weight == 0.0


# --- skipped steps ---------------------------------------------------------------------------------------------------


def skip_a_broken_batch(model, hooks=None):
    """Compute a batch whose activations are NaN in one row, and skip its step."""
    broken = model.model.embed_tokens.weight[0, 0].item()
    with torch.no_grad():
        model.model.embed_tokens.weight[0, 0] = math.nan
    ids = batch()["input_ids"].clone()
    ids[0, 3] = 0
    assert model(input_ids=ids, labels=ids).loss.isnan()
    with torch.no_grad():
        model.model.embed_tokens.weight[0, 0] = broken
    if hooks is not None:
        hooks.reset()


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_logit_that_is_not_finite_is_no_measurement(value, tiny_model):
    block = blocks(tiny_model())[0]
    block.collect(BlockStatistics(torch.tensor([1.0, value, 3.0]), None, None))
    block.collect(BlockStatistics(torch.tensor([value, 2.0, -math.inf]), None, None))
    assert block.self_attn.max_logit.tolist() == [1.0, 2.0, 3.0]


def test_a_skipped_batch_leaves_nothing_behind(tiny_model):
    def step(skip):
        model = tiny_model(**CHAIN).train()
        optimizer = MuonClip(param_groups(model, lr=1e-2))
        hooks = attach_hooks(optimizer, model, TAU)
        if skip:
            skip_a_broken_batch(model, hooks)
        model(**batch(1)).loss.backward()
        optimizer.step()
        return model, hooks

    (clean, clean_hooks), (after, after_hooks) = step(False), step(True)
    assert torch.equal(after_hooks.last["max_logits"], clean_hooks.last["max_logits"])
    assert torch.equal(after_hooks.last["loads"], clean_hooks.last["loads"])
    assert all(torch.equal(x, clean.state_dict()[name]) for name, x in after.state_dict().items())


def test_without_reset_a_nan_still_clips_nothing_away(tiny_model):
    model = tiny_model(**CHAIN).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    hooks = attach_hooks(optimizer, model, TAU)
    skip_a_broken_batch(model)
    model(**batch(1)).loss.backward()
    optimizer.step()
    assert hooks.last["max_logits"].isfinite().all()
    assert all(p.isfinite().all() for p in model.parameters())


# --- padding ---------------------------------------------------------------------------------------------------------


def test_padding_of_conversations_is_no_load(tiny_model):
    """A short conversation in a long row: the loads are those of its tokens alone."""
    model = tiny_model().train()
    ids = batch()["input_ids"][0, :5].tolist()
    row = {"input_ids": ids, "labels": ids, "seq_lengths": [2, 3]}
    model(**Collator(24, 0)([row]))
    padded = [block.mlp.load.clone() for block in blocks(model)]
    for block in blocks(model):
        block.mlp.load.zero_()
    model(**Collator(5, 0)([row]))
    for block, load in zip(blocks(model), padded, strict=True):
        assert torch.equal(load, block.mlp.load) and load.sum() == 5 * 2
