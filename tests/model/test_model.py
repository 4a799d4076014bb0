"""The public behaviour of the model: configuration errors, saved files, `generate`, precisions, smallest batches."""

import pytest
import torch
import torch.nn.functional as F
from accelerate.utils import send_to_device
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from moonwhale.model import Documents, MoonwhaleConfig, MoonwhaleForCausalLM, MoonwhaleModel, core, flex
from moonwhale.model.outputs import MoonwhaleModelOutput, MoonwhaleOutput

EVERYTHING = {
    "first_k_dense_replace": 1,
    "moba_topk": 2,
    "moba_block_size": 4,
    "moba_full_attention_layers": [2],
    "moba_key_conv": 2,
    "embedding_conv": 3,
    "latent_embedding_every": 2,
    "n_routed_experts": 8,
    "n_group": 2,
    "num_nextn_predict_layers": 2,
    "mtp_num_blocks": [2, 1],
    "attention_bias": True,
    "aux_loss_alpha": 0.1,
}
IDS = torch.randint(61, (2, 15), generator=torch.Generator().manual_seed(0))


# --- configuration ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wrong", "fix"),
    [
        ({"hidden_size": 0}, "at least 1"),
        ({"vocab_size": "many"}, "a whole number"),
        ({"num_hidden_layers": 2.5}, "a whole number"),
        ({"n_shared_experts": -1}, "at least 0"),
        ({"q_lora_rank": 0}, "null for uncompressed queries"),
        ({"qk_rope_head_dim": 5}, "must be even"),
        ({"num_key_value_heads": 1}, "as many key heads as query heads (3)"),
        ({"attention_dropout": 0.1}, "set it to 0"),
        ({"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}}, "default, linear, yarn"),
        ({"moba_block_size": 0}, "at least one key"),
        ({"moba_topk": -1}, "at least 0"),
        ({"moba_full_attention_layers": [2]}, "from 0 to 1"),
        ({"num_experts_per_tok": 7}, "n_routed_experts=6"),
        ({"hidden_size": 36}, "experts' grouped products want a multiple of 8"),
        ({"moe_intermediate_size": 20}, "experts' grouped products want a multiple of 8"),
        ({"n_group": 4}, "divide n_routed_experts=6"),
        ({"n_group": 6}, "at least two"),
        ({"n_group": 2, "topk_group": 3}, "between 1 and n_group=2"),
        ({"n_group": 3, "topk_group": 1, "num_experts_per_tok": 3}, "hold fewer experts"),
        ({"n_device_groups": 4}, "divide n_routed_experts=6"),
        ({"balance_loss": "device"}, "give n_device_groups, at least two"),
        ({"scoring_func": "tanh"}, "sigmoid, softmax"),
        ({"balance_loss": "batch"}, "sequence, expert, device, none"),
        ({"aux_loss_alpha": -1.0}, "at least 0"),
        ({"bias_update_speed": "fast"}, "a number"),
        ({"num_nextn_predict_layers": -1}, "at least 0"),
        ({"num_nextn_predict_layers": 2, "mtp_num_blocks": [1]}, "num_nextn_predict_layers=2"),
        ({"num_nextn_predict_layers": 1, "mtp_num_blocks": 0}, "number >= 1"),
        ({"mtp_loss_weight": -0.3}, "at least 0"),
        ({"pad_token_id": 61}, "vocab_size=61"),
    ],
    ids=lambda x: ", ".join(x) if isinstance(x, dict) else "",
)
def test_an_impossible_configuration_is_one_clear_line(wrong, fix, tiny_config):
    with pytest.raises(ValueError) as error:
        tiny_config(**wrong)
    message = str(error.value)
    field = "num_experts_per_tok" if len(wrong) == 3 else list(wrong)[-1]
    assert message.startswith(f"{field}=") and repr(wrong[field])[:-1] in message and fix in message
    assert "\n" not in message


def test_a_dense_model_accepts_any_hidden_size(tiny_model):
    model = tiny_model(first_k_dense_replace=2, hidden_size=35)
    model(torch.arange(9)[None], labels=torch.arange(9)[None]).loss.backward()


def test_a_configuration_is_the_same_after_saving_and_loading(tiny_config, tmp_path):
    config = tiny_config(**EVERYTHING, rope_parameters={"rope_type": "yarn", "rope_theta": 5e4, "factor": 4.0})
    config.save_pretrained(tmp_path)
    loaded = AutoConfig.from_pretrained(tmp_path)
    assert isinstance(loaded, MoonwhaleConfig)
    assert loaded.to_dict() | {"_name_or_path": ""} == config.to_dict()
    assert loaded.rope_parameters["original_max_position_embeddings"] == 64


def test_dense_only_and_tied_models_train(tiny_model):
    model = tiny_model(first_k_dense_replace=9, tie_word_embeddings=True, n_shared_experts=0).train()
    assert model.lm_head.weight is model.model.embed_tokens.weight
    model(IDS, labels=IDS).loss.backward()
    assert all(p.grad is not None for p in model.parameters())


# --- weights ---------------------------------------------------------------------------------------------------------


def test_initialisation_is_normal_except_zeros_and_ones(tiny_config):
    model = MoonwhaleForCausalLM(tiny_config(**EVERYTHING, hidden_size=256, initializer_range=0.05))
    for name, p in model.named_parameters():
        zeros = "key_conv", "embed_conv.weight", "latent_embedding.weight", "bias"
        if name.endswith((*zeros, "o_proj.weight", "down_proj", "down_proj.weight")):
            assert (p == 0).all(), name
        elif "norm" in name:
            assert (p == 1).all(), name
        else:
            assert abs(p.mean()) < 0.01 and abs(p.std() - 0.05) < 0.01, name
    assert all(name.endswith(("e_score_correction_bias", "load", "max_logit")) for name, _ in model.named_buffers())


def test_the_embedding_may_start_larger(tiny_config):
    drawn = [
        MoonwhaleForCausalLM(tiny_config(vocab_size=500, pad_token_id=3, embedding_initializer_range=std)).model
        for std in (0.8, None)
    ]
    large, small = (body.embed_tokens.weight for body in drawn)
    assert (large[3] == 0).all() and abs(large.std() - 0.8) < 0.05 and abs(small.std() - 0.02) < 0.005
    assert abs(drawn[0].layers[0].self_attn.kv_b_proj.weight.std() - 0.02) < 0.005


@pytest.mark.parametrize("role", [{"eos_token_id": 3}, {"eos_token_id": [5, 3]}, {"bos_token_id": 3}], ids=str)
def test_a_padding_token_that_begins_or_ends_texts_learns(role, tiny_config):
    model = MoonwhaleForCausalLM(tiny_config(pad_token_id=3, **role))
    model(torch.tensor([[3, 1, 2]]), labels=torch.tensor([[3, 1, 2]])).loss.backward()
    embedding = model.model.embed_tokens.weight
    assert (embedding[3] != 0).any() and (embedding.grad[3] != 0).any()


def test_a_new_model_passes_its_embeddings_through(tiny_config):
    """A new model adds nothing to the residual stream, and every parameter has a gradient after one step."""
    model = MoonwhaleForCausalLM(
        tiny_config(
            **EVERYTHING | {"num_nextn_predict_layers": 0, "mtp_num_blocks": 1, "moba_full_attention_layers": []}
        )
    ).train()
    *_, before_last, _ = model.model(IDS, output_hidden_states=True).hidden_states
    assert torch.equal(before_last, model.model.embed_tokens(IDS))
    for _ in range(2):  # zero matrices block the gradients of their inputs until the first step changes them
        model.zero_grad()
        model(IDS, labels=IDS).loss.backward()
        with torch.no_grad():
            for p in model.parameters():
                p -= p.grad.sign() * 1e-3
    assert all((p.grad != 0).any() for p in model.parameters() if p.requires_grad)


def statistics(model):
    return {name: b for name, b in model.named_buffers() if name.endswith(("load", "max_logit"))}


@pytest.mark.parametrize("tied", [False, True])
def test_a_model_is_the_same_after_saving_and_loading(tied, tiny_model, tmp_path):
    model = tiny_model(**EVERYTHING, tie_word_embeddings=tied)
    model.train()(IDS, labels=IDS)  # fills the statistics, which are not saved
    model.save_pretrained(tmp_path)
    loaded, report = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert isinstance(loaded, MoonwhaleForCausalLM) and not any(report.values()) and not loaded.training
    assert loaded.state_dict().keys() == model.state_dict().keys()
    assert all(torch.equal(p, model.state_dict()[name]) for name, p in loaded.state_dict().items())
    assert torch.equal(loaded(IDS).logits, model.eval()(IDS).logits)
    for name, b in statistics(loaded).items():  # created on the meta device, so initialised again
        assert (b == (0.0 if name.endswith("load") else -torch.inf)).all()
    body = AutoModel.from_pretrained(tmp_path)
    assert isinstance(body, MoonwhaleModel)
    assert torch.equal(body(IDS).last_hidden_state, loaded.model(IDS).last_hidden_state)


def test_ddp_does_not_broadcast_the_statistics(tiny_model):
    model = tiny_model(**EVERYTHING)
    assert set(model._ddp_params_and_buffers_to_ignore) == set(statistics(model))


def test_the_vocabulary_can_grow(tiny_model):
    model = tiny_model(**EVERYTHING)
    with torch.no_grad():
        before = model(IDS).logits
    model.resize_token_embeddings(70)
    assert model.config.vocab_size == 70
    assert torch.allclose(model(IDS).logits[..., :61], before, atol=1e-6)
    model.train()(IDS + 9, labels=IDS + 9).loss.backward()


# --- forward ---------------------------------------------------------------------------------------------------------


def test_outputs_have_the_documented_fields_and_shapes(tiny_model):
    model = tiny_model(**EVERYTHING)
    out = model(IDS, output_hidden_states=True)
    assert isinstance(out, MoonwhaleOutput) and out.loss is None and out.losses is None
    assert out.logits.shape == (2, 15, 61) and out.past_key_values.get_seq_length() == 15
    assert len(out.hidden_states) == 3 and all(h.shape == (2, 15, 32) for h in out.hidden_states)
    assert torch.equal(model.lm_head(out.hidden_states[-1]), out.logits)
    documents = Documents.from_inputs(*IDS.shape, IDS.device)
    assert torch.equal(out.hidden_states[0], model.model.convolve(model.model.embed(IDS), documents))

    scored = model(IDS, labels=IDS)
    assert torch.allclose(scored.logits, out.logits) and scored.past_key_values is None
    for part in (scored.losses, scored.accuracies, scored.targets):
        assert part.shape == (3,)
    assert scored.loss.shape == scored.balance_loss.shape == () and not scored.losses.requires_grad

    body = model.model(IDS, with_mtp=True, use_cache=False)
    assert isinstance(body, MoonwhaleModelOutput) and len(body.mtp_hidden_states) == 2
    training = model.train()(IDS)
    assert training.past_key_values is None and torch.allclose(training.logits, out.logits)
    assert model(IDS, labels=IDS).logits is None


def test_logits_to_keep_selects_positions(tiny_model):
    model = tiny_model()
    logits = model(IDS).logits
    assert torch.allclose(model(IDS, logits_to_keep=4).logits, logits[:, -4:], atol=1e-6)
    assert torch.allclose(model(IDS, logits_to_keep=torch.tensor([3, 0])).logits, logits[:, [3, 0]], atol=1e-6)


def test_embeddings_give_the_same_as_ids(tiny_model):
    model = tiny_model(**EVERYTHING | {"latent_embedding_every": 0})  # which need ids
    embeds = model.model.embed_tokens(IDS)
    assert torch.equal(model(inputs_embeds=embeds).logits, model(IDS).logits)
    assert torch.equal(model(inputs_embeds=embeds, labels=IDS).loss, model(IDS, labels=IDS).loss)
    text = model.generate(IDS, max_new_tokens=4, do_sample=False)[:, 15:]
    assert torch.equal(model.generate(inputs_embeds=embeds, max_new_tokens=4, do_sample=False), text)


def test_invalid_arguments_of_forward_are_one_clear_line(tiny_model):
    model = tiny_model()
    cache = model(IDS).past_key_values
    mask = torch.ones_like(IDS)
    for arguments, message in [
        ({}, "exactly one of input_ids and inputs_embeds"),
        ({"labels": IDS}, "exactly one of input_ids and inputs_embeds"),
        ({"input_ids": IDS, "labels": IDS[:, 1:]}, "(2, 14), not (2, 15)"),
        ({"input_ids": IDS, "inputs_embeds": model.model.embed_tokens(IDS)}, "exactly one"),
        ({"input_ids": IDS, "attention_mask": mask[:, 1:]}, "(2, 14), not (2, 15)"),
        ({"input_ids": IDS[:, :1], "labels": IDS[:, :1], "past_key_values": cache}, "leave out past_key_values"),
    ]:
        with pytest.raises(ValueError) as error:
            model(**arguments)
        assert message in str(error.value) and "\n" not in str(error.value)
    with pytest.raises(ValueError, match=r"^with_mtp needs the whole sequence: leave out past_key_values$"):
        model.model(IDS[:, :1], past_key_values=cache, with_mtp=True)
    for arguments in ({"token_type_ids": IDS}, {"output_router_logits": True}, {"is_causal": False}):
        with pytest.raises(TypeError, match=rf"^{next(iter(arguments))}=.*leave it out$"):
            model(IDS, **arguments)


@pytest.mark.parametrize("static", [False, True], ids=["eager", "static shapes"])
def test_padding_inside_a_document_changes_nothing(static, tiny_model, monkeypatch):
    """A right-padded prompt that goes on: the tokens see each other across the padding, by their position ids."""
    if static:  # as in training on CUDA and under torch.compile
        monkeypatch.setattr(core, "flex_serves", lambda q, documents: True)
        monkeypatch.setattr(flex, "_compiled", lambda: flex._attention)
    for options in ({}, {"moba_topk": 2, "moba_block_size": 4}):
        model, mask = tiny_model(**options), torch.ones_like(IDS)
        mask[:, 6:9] = 0
        real = mask[0].bool()
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        padded = model(IDS, attention_mask=mask, position_ids=positions).logits[:, real]
        torch.testing.assert_close(padded, model(IDS[:, real]).logits, atol=1e-5, rtol=1e-4)
    for option in ("moba_key_conv", "embedding_conv"):
        with pytest.raises(ValueError, match="which a convolution cannot skip: pad at the left"):
            tiny_model(**{option: 3})(IDS, attention_mask=mask, position_ids=positions)


def test_documents_move_with_the_model_to_another_device():
    """accelerate moves what a block gets, if the model is spread over several devices."""
    mask = torch.ones(1, 6, dtype=torch.long)
    for documents in (Documents.from_inputs(1, 6, "cpu"), Documents.from_inputs(1, 6, "cpu", mask)):
        moved = send_to_device(documents, "meta")
        tensors = moved.document_ids, moved.positions, moved.valid, moved.ranks
        assert {x.device.type for x in tensors} == {"meta"}
        assert (moved.one_per_row, moved.may_have_padding) == (documents.one_per_row, documents.may_have_padding)
        assert documents.to("cpu") is documents


def test_padding_between_packed_documents_changes_nothing(tiny_model):
    model, mask = tiny_model(**EVERYTHING), torch.ones_like(IDS)
    mask[:, 6:8] = 0
    position_ids = torch.cat([torch.arange(8), torch.arange(7)]).expand(2, -1)
    packed = model(IDS, attention_mask=mask, position_ids=position_ids).logits
    assert torch.allclose(packed[:, :6], model(IDS[:, :6]).logits, atol=1e-5)
    assert torch.allclose(packed[:, 8:], model(IDS[:, 8:]).logits, atol=1e-5)


@pytest.mark.parametrize("label", [-1, 61])
def test_a_label_that_is_no_token_fails(label, tiny_model):
    labels = IDS.clone()
    labels[0, 7] = label
    with pytest.raises((IndexError, RuntimeError), match="out of bounds"):
        tiny_model(num_nextn_predict_layers=1)(IDS, labels=labels)


# --- training --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("shape", [(2, 15), (1, 1), (1, 2), (3, 1)], ids=str)
def test_every_parameter_gets_a_gradient(shape, checkpointing, tiny_model):
    """Every parameter gets a gradient even without a target, since DDP waits for all of them."""
    model = tiny_model(**EVERYTHING).train()
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    ids = IDS.repeat(2, 1)[: shape[0], : shape[1]]
    out = model(ids, labels=ids)
    out.loss.backward()
    assert out.loss.isfinite() and out.targets[0] == shape[0] * (shape[1] - 1)
    for name, p in model.named_parameters():
        assert p.grad is not None and p.grad.isfinite().all(), name


def test_training_lowers_the_loss_at_every_depth(tiny_model):
    model = tiny_model(**EVERYTHING).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(30):
        out = model(IDS, labels=IDS)
        optimizer.zero_grad()
        out.loss.backward()
        optimizer.step()
        losses.append(out.losses)
    assert (losses[-1] < 0.5 * losses[0]).all()  # at every prediction depth


@pytest.mark.parametrize("whole", [False, True], ids=["autocast", "bf16 weights"])
def test_bf16_is_close_to_fp32(whole, tiny_model):
    model = tiny_model(seed=1, **EVERYTHING).train()  # with seed 0, rounding sends a token to another expert
    expected = model(IDS, labels=IDS)
    expected.loss.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    if whole:
        model.bfloat16()
    kinds = set()
    model.model.layers[0].register_forward_hook(lambda _, args, out: kinds.add(out[0].dtype))
    with torch.autocast("cpu", torch.bfloat16, enabled=not whole):
        out = model(IDS, labels=IDS)
    out.loss.backward()
    assert kinds == {torch.bfloat16}  # the residual stream is bf16 too
    assert out.loss.dtype == out.losses.dtype == torch.float32
    assert torch.allclose(out.losses, expected.losses, rtol=0.05)
    for name, p in model.named_parameters():
        assert p.grad.dtype == p.dtype
        assert F.cosine_similarity(p.grad.flatten().float(), gradients[name].flatten(), dim=0) > 0.8, name
    text = model.eval().generate(IDS, max_new_tokens=4, do_sample=False)
    assert text.shape == (2, 19)


# --- generate --------------------------------------------------------------------------------------------------------


def test_generate_is_the_same_with_and_without_a_cache(tiny_model):
    model = tiny_model(**EVERYTHING)
    mask = torch.ones_like(IDS)
    mask[0, :6] = 0
    for how in ({}, {"num_beams": 3}, {"do_sample": True, "top_k": 5}):
        texts = []
        for use_cache in (True, False):
            torch.manual_seed(0)
            settings = {"do_sample": False, "max_new_tokens": 9, "use_cache": use_cache} | how
            texts.append(model.generate(IDS, attention_mask=mask, **settings))
        assert torch.equal(*texts) and texts[0].shape == (2, 24)


def test_generate_stops_at_the_end_token(tiny_model):
    model = tiny_model(pad_token_id=3)
    free = model.generate(IDS, max_new_tokens=6, do_sample=False)
    stopped = model.generate(IDS, max_new_tokens=6, do_sample=False, eos_token_id=free[0, 16].item())
    assert torch.equal(stopped[0, :17], free[0, :17]) and (stopped[0, 17:] == 3).all()
