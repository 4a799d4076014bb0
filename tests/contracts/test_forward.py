"""The forward pass keeps the contract of a transformers language model, as callers such as its Trainer rely on it."""

import pytest
import torch
from transformers import DataCollatorWithFlattening, Trainer, TrainingArguments

pytestmark = pytest.mark.contract("transformers' model tests", "callers of a forward pass")
IDS = torch.randint(61, (2, 12), generator=torch.Generator().manual_seed(0))


@pytest.fixture
def model(tiny_model):
    return tiny_model(num_nextn_predict_layers=2)


def test_the_first_output_is_the_logits_or_the_loss(model):
    out = model(IDS, labels=IDS)
    assert torch.equal(model(IDS)[0], out.logits) and out[0] is out.loss and out[1] is out.logits
    as_tuple = model(IDS, labels=IDS, return_dict=False)
    assert isinstance(model.model(IDS, return_dict=False), tuple)
    assert isinstance(as_tuple, tuple) and torch.equal(as_tuple[0], out.loss)


def test_the_configuration_turns_outputs_on(model):
    model.config.output_hidden_states = model.config.output_attentions = True
    out = model(IDS)
    assert len(out.hidden_states) == 3 and [a.shape for a in out.attentions] == [(2, 3, 12, 12)] * 2
    assert model(IDS, output_attentions=False).attentions is None
    torch.testing.assert_close(out.attentions[0].sum(-1), torch.ones(2, 3, 12))
    torch.testing.assert_close(out.logits, model(IDS, output_attentions=False).logits)


def test_hidden_states_are_chosen_by_index(model):
    every = model(IDS, output_hidden_states=True).hidden_states
    for wanted, indices in ((0, {0}), (-1, {2}), ([1, -1, 7], {1, 2})):
        some = model(IDS, output_hidden_states=wanted).hidden_states
        assert {i for i, x in enumerate(some) if x is not None} == indices
        assert all(torch.equal(some[i], every[i]) for i in indices)
    assert model(IDS, output_hidden_states=[]).hidden_states is None


def test_shift_labels_are_the_targets_at_every_depth(model):
    by_itself = model(IDS, labels=IDS)
    shifted = torch.nn.functional.pad(IDS[:, 1:], (0, 1), value=-100)
    torch.testing.assert_close(model(IDS, shift_labels=shifted).losses, by_itself.losses)
    torch.testing.assert_close(model(IDS, labels=IDS.flip(1), shift_labels=shifted).losses, by_itself.losses)


def test_a_plain_trainers_predictions_are_the_logits(model, tmp_path):
    rows = [{"input_ids": row, "labels": row} for row in IDS]
    arguments = TrainingArguments(str(tmp_path), use_cpu=True, report_to="none", per_device_eval_batch_size=2)
    trainer = Trainer(model, arguments, eval_dataset=rows)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(model(IDS, labels=IDS).loss.item(), rel=1e-5)
    predictions = trainer.predict(rows).predictions
    torch.testing.assert_close(torch.from_numpy(predictions), model(IDS).logits.detach())


@pytest.mark.parametrize("cast", ["bfloat16", "half", "double"])
def test_statistics_and_bias_stay_in_fp32(tiny_model, cast, tmp_path):
    model = getattr(tiny_model(), cast)()
    assert {b.dtype for b in model.buffers()} == {torch.float32} and model.lm_head.weight.dtype != torch.float32
    assert {b.dtype for b in model.to(torch.bfloat16).buffers()} == {torch.float32}
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert {b.dtype for b in loaded.buffers()} == {torch.float32} and loaded.dtype == torch.bfloat16


def test_a_starved_experts_bias_grows_beyond_a_half_in_bf16(tiny_model):
    moe = tiny_model().bfloat16().model.layers[0].mlp
    moe.gate.e_score_correction_bias.fill_(0.5)
    moe.load.copy_(torch.tensor([0.0, 9, 9, 9, 9, 9]))
    moe.update_bias_()
    assert moe.gate.e_score_correction_bias[0] > 0.5


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpointing_keeps_every_gradient(tiny_model, use_reentrant):
    gradients = []
    for checkpointing in (False, True):
        model = tiny_model(num_nextn_predict_layers=2, mtp_num_blocks=2, aux_loss_alpha=1.0).train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
        model(IDS, labels=IDS).loss.backward()
        gradients.append([p.grad for p in model.parameters()])
        statistics = [b.clone() for b in model.buffers()]
        assert not any(b.requires_grad for b in statistics)
    torch.testing.assert_close(*gradients)


PACKED = {
    "position_ids": torch.tensor([[0, 1, 2, 3, 4, 0, 1, 2, 3, 0, 1, 2]]),
    "cu_seq_lens_q": torch.tensor([0, 5, 9, 12], dtype=torch.int32),
    "cu_seq_lens_k": torch.tensor([0, 5, 9, 12], dtype=torch.int32),
    "max_length_q": 5,
    "max_length_k": 5,
    "seq_idx": torch.tensor([[0, 0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2]], dtype=torch.int32),
}


@pytest.mark.parametrize(
    "given", [["cu_seq_lens_q"], ["cu_seq_lens_k", "max_length_k"], ["seq_idx"], [*PACKED]], ids=str
)
def test_every_description_of_packed_documents_keeps_them_apart(model, given):
    ids, arguments = IDS[:1], {name: PACKED[name] for name in given}
    packed = model(ids, labels=ids, **arguments)
    alone = torch.cat([model(part).logits for part in ids.split([5, 4, 3], dim=1)], dim=1)
    torch.testing.assert_close(packed.logits, alone)
    torch.testing.assert_close(model(ids, **arguments).logits, alone)
    torch.testing.assert_close(packed.losses, model(ids, labels=ids, position_ids=PACKED["position_ids"]).losses)


def test_cumulative_lengths_count_through_all_rows(model):
    ends = torch.tensor([0, 5, 12, 24])
    rows = torch.cat([torch.arange(5), torch.arange(7), torch.arange(12)]).view(2, 12)
    torch.testing.assert_close(model(IDS, cu_seq_lens_q=ends).logits, model(IDS, position_ids=rows).logits)


@pytest.mark.parametrize(
    "arguments",
    [
        {"cu_seq_lens_q": torch.tensor([0, 5, 12]), "cu_seq_lens_k": torch.tensor([0, 6, 12])},
        {"cu_seq_lens_q": torch.tensor([0, 5, 12]), "position_ids": torch.arange(12)[None]},
        {"seq_idx": PACKED["seq_idx"], "position_ids": torch.arange(12)[None]},
        {"seq_idx": PACKED["seq_idx"][:, 1:]},
        {"cu_seq_lens_q": torch.tensor([0, 5])},
        {"cu_seq_lens_q": torch.tensor([0, 13, 12])},
        {"cu_seq_lens_q": torch.tensor([[0, 12]])},
        {"max_length_q": 5},
        {"cache_position": torch.arange(3, 15)},
        {"cache_position": torch.arange(3)},
    ],
    ids=str,
)
def test_contradictions_are_refused(model, arguments):
    with pytest.raises(ValueError, match=r"^[^\n]+$"):
        model(IDS[:1], **arguments)
    with pytest.raises(ValueError, match=r"^[^\n]+$"):
        model(IDS[:1], labels=IDS[:1], **arguments)


def test_packing_is_refused_after_a_cache(model):
    cache = model(IDS[:1], use_cache=True).past_key_values
    model(IDS[:1], past_key_values=cache, cache_position=torch.arange(12, 24))
    with pytest.raises(ValueError, match="leave out past_key_values"):
        model(IDS[:1], past_key_values=cache, seq_idx=PACKED["seq_idx"])


def test_a_flattening_collators_batch_is_read(model):
    rows = [{"input_ids": part} for part in IDS[0].split([5, 4, 3])]
    for options in ({"return_flash_attn_kwargs": True}, {"return_seq_idx": True}):
        batch = DataCollatorWithFlattening(return_position_ids=False, return_tensors="pt", **options)(rows)
        wanted = model(IDS[:1], position_ids=PACKED["position_ids"], labels=batch["labels"])
        torch.testing.assert_close(model(**batch).loss, wanted.loss)


def test_an_unknown_argument_is_refused(model):
    with pytest.raises(TypeError, match=r"token_type_ids=.* no such argument"):
        model(IDS, token_type_ids=IDS)
