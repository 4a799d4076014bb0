"""peft's adapters work where attention and loss read a weight without calling its layer."""

import pytest
import torch
from torch.testing import assert_close

from moonwhale.errors import UserError
from moonwhale.infer.engine import Engine

peft = pytest.importorskip("peft")


def adapted(model, target: str):
    torch.manual_seed(0)
    config = peft.LoraConfig(target_modules=[target], init_lora_weights=False, lora_alpha=64)
    return peft.get_peft_model(model.eval(), config).eval()


@pytest.mark.parametrize("changes", [{}, {"moba_key_conv": 4}], ids=["plain", "key convolution"])
def test_steps_from_the_cache_have_the_adapter(changes, tiny_model):
    model, ids = adapted(tiny_model(**changes), "kv_b_proj"), torch.arange(40)[None] % 50
    with torch.no_grad():
        whole = model(input_ids=ids).logits[:, -1]
        past = model(input_ids=ids[:, :-1], use_cache=True).past_key_values
        assert_close(model(input_ids=ids[:, -1:], past_key_values=past).logits[:, -1], whole, rtol=1e-4, atol=1e-5)
        assert_close(model(input_ids=ids, output_attentions=True).logits[:, -1], whole, rtol=1e-4, atol=1e-5)
        with model.disable_adapter():
            assert (model(input_ids=ids).logits[:, -1] - whole).abs().max() > 1e-3


def test_the_head_has_its_adapter_in_the_loss(tiny_model):
    model, ids = adapted(tiny_model(num_nextn_predict_layers=0), "lm_head"), torch.arange(40)[None] % 50
    out = model(input_ids=ids, labels=ids)
    logits = model(input_ids=ids).logits
    assert_close(out.losses[0], torch.nn.functional.cross_entropy(logits[0, :-1], ids[0, 1:]), rtol=1e-4, atol=1e-5)
    out.loss.backward()
    gradients = [p.grad for name, p in model.named_parameters() if "lora_" in name]
    assert gradients and all(g is not None and g.abs().max() > 0 for g in gradients)


def test_the_engine_refuses_adapters(tiny_model, small_tokenizer):
    model = tiny_model(vocab_size=len(small_tokenizer))
    model.add_adapter(peft.LoraConfig(target_modules=["o_proj"]))
    with pytest.raises(UserError, match="the engine reads no adapters: merge them"):
        Engine(model, small_tokenizer)
