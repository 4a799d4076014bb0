"""Every mode of transformers' `generate` gives the tokens of DeepseekV3ForCausalLM, or those of a loop without a cache,
or is refused in one line.
"""

import dataclasses

import pytest
import torch
from transformers import (
    Cache,
    CompileConfig,
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    DynamicCache,
    GenerationConfig,
    LogitsProcessorList,
    StaticCache,
    StoppingCriteriaList,
    WatermarkingConfig,
    set_seed,
)
from transformers.cache_utils import QuantizedLayer
from transformers.generation.streamers import BaseStreamer

OUTSIDER = "transformers' generate, as DeepseekV3ForCausalLM does it"
pytestmark = pytest.mark.contract("Generation", OUTSIDER)

IDS = torch.randint(3, 61, (2, 9), generator=torch.Generator().manual_seed(0))
MASK = torch.ones_like(IDS)
MASK[1, :4] = 0
BATCH = {"input_ids": IDS.masked_fill(MASK == 0, 0), "attention_mask": MASK}
ALONE = {"input_ids": IDS[:1].repeat(1, 2), "attention_mask": torch.ones(1, 18, dtype=torch.long)}
EXTENSIONS = {"num_nextn_predict_layers": 2, "moba_topk": 2, "moba_block_size": 4, "moba_key_conv": 3}
EXTENSIONS |= {"embedding_conv": 2}

MODES = {
    "greedy": {},
    "greedy without a cache": {"use_cache": False},
    "sampling": {"do_sample": True},
    "sampling, three answers": {"do_sample": True, "num_return_sequences": 3},
    "top k, top p, min p": {"do_sample": True, "top_k": 20, "top_p": 0.9, "min_p": 0.01, "temperature": 0.7},
    "typical, epsilon, eta": {"do_sample": True, "typical_p": 0.9, "epsilon_cutoff": 1e-3, "eta_cutoff": 1e-3},
    "top h": {"do_sample": True, "top_h": 0.5},
    "beams": {"num_beams": 3},
    "beams, two answers": {"num_beams": 3, "num_return_sequences": 2, "length_penalty": 2.0, "early_stopping": True},
    "beams, sampled": {"num_beams": 3, "do_sample": True},
    "beams without a cache": {"num_beams": 3, "use_cache": False},
    "dynamic cache": {"cache_implementation": "dynamic"},
    "static cache": {"cache_implementation": "static"},
    "static cache, longer": {"cache_implementation": "static", "max_cache_len": 40},
    "static cache, beams": {"cache_implementation": "static", "num_beams": 3},
    "static cache, three answers": {"cache_implementation": "static", "num_return_sequences": 3, "do_sample": True},
    "static cache, prompt in pieces": {"cache_implementation": "static", "prefill_chunk_size": 4},
    "prompt in pieces": {"prefill_chunk_size": 4},
    "no repetition": {"repetition_penalty": 1.5, "no_repeat_ngram_size": 2, "encoder_repetition_penalty": 1.2},
    "forced tokens": {"forced_eos_token_id": 5, "suppress_tokens": [7, 8], "begin_suppress_tokens": [9]},
    "words": {"bad_words_ids": [[11], [12, 13]], "sequence_bias": [[[14], 2.0]]},
    "several ends": {"eos_token_id": [5, 17, 23, 42], "min_new_tokens": 2},
    "decaying length": {"exponential_decay_length_penalty": (2, 1.5), "eos_token_id": 5},
    "guidance": {"guidance_scale": 1.5},
    "checked logits": {"remove_invalid_values": True, "renormalize_logits": True},
    "a watermark": {"watermarking_config": WatermarkingConfig()},
    "no compilation": {"cache_implementation": "static", "disable_compile": True},
}
DRAFTED = {  # one row at a time; their tokens are those of plain decoding
    "prompt lookup": {"prompt_lookup_num_tokens": 3},
    "early exit": {"assistant_early_exit": 1},
}
REFUSED = {
    "MTP": ({"use_mtp": True}, "use_mtp"),
    "compilation": ({"cache_implementation": "static", "compile_config": CompileConfig()}, "compile_config"),
    "paged cache": ({"cache_implementation": "paged"}, "continuous batching"),
    "offloaded cache": ({"cache_implementation": "offloaded"}, "and this model is on cpu"),
    "offloaded static cache": ({"cache_implementation": "offloaded_static"}, "and this model is on cpu"),
    "offloaded hybrid cache": ({"cache_implementation": "offloaded_hybrid"}, "and this model is on cpu"),
    "quantized cache, default groups": ({"cache_implementation": "quantized"}, "optimum-quanto|Group size"),
    "no such cache": ({"cache_implementation": "latent"}, "Invalid `cache_implementation`"),
    "contrastive search": ({"penalty_alpha": 0.6, "top_k": 4}, "trust_remote_code"),
    "group beams": ({"num_beams": 4, "num_beam_groups": 2, "diversity_penalty": 0.5}, "trust_remote_code"),
    "constraints": ({"num_beams": 2, "force_words_ids": [[5]]}, "trust_remote_code"),
    "DoLa": ({"dola_layers": "low"}, "trust_remote_code"),
    "no such argument": ({"token_types": 1}, "token_types"),
}


def generate(model, inputs=BATCH, **options):
    set_seed(0)
    return model.generate(**inputs, **{"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0} | options)


@pytest.fixture(scope="module")
def pair(tiny_model):
    """Our plain model and transformers' DeepseekV3ForCausalLM, with the same weights."""
    ours = tiny_model()
    names = {f.name for f in dataclasses.fields(DeepseekV3Config)}
    config = DeepseekV3Config(**{k: v for k, v in ours.config.to_dict().items() if k in names})
    theirs = DeepseekV3ForCausalLM._from_config(config, attn_implementation="eager")  # SDPA returns no attentions
    theirs.load_state_dict(ours.state_dict())
    return ours, theirs.eval()


@pytest.fixture(scope="module")
def extended(tiny_model):
    """A model with MTP modules, MoBA and its key convolution."""
    return tiny_model(**EXTENSIONS)


@pytest.mark.parametrize("mode", MODES)
def test_a_mode_gives_deepseeks_tokens(pair, mode):
    ours, theirs = (generate(model, **MODES[mode]) for model in pair)
    assert torch.equal(ours, theirs)


@pytest.mark.contract("Generation", "transformers' generate, with MoBA and MTP")
@pytest.mark.parametrize("mode", MODES)
def test_a_mode_gives_the_tokens_of_a_loop_without_a_cache(extended, mode):
    uncached = {k: v for k, v in MODES[mode].items() if k not in ("cache_implementation", "max_cache_len")}
    uncached = {k: v for k, v in uncached.items() if k != "prefill_chunk_size"} | {"use_cache": False}
    assert torch.equal(generate(extended, **MODES[mode]), generate(extended, **uncached))


@pytest.mark.parametrize("mode", DRAFTED)
def test_drafts_change_no_token(pair, extended, mode):
    for model in (pair[0], extended):
        assert torch.equal(generate(model, ALONE, **DRAFTED[mode]), generate(model, ALONE))


@pytest.mark.parametrize("seed", [0, 1], ids=["the same model", "another model"])
def test_an_assistant_changes_no_token(tiny_model, pair, extended, seed):
    for model, assistant in ((pair[0], tiny_model(seed)), (extended, tiny_model(seed, **EXTENSIONS))):
        assert torch.equal(generate(model, ALONE, assistant_model=assistant), generate(model, ALONE))
        sampled = generate(model, ALONE, assistant_model=assistant, do_sample=True)
        assert sampled.shape == (1, 26) and sampled.max() < 61


@pytest.mark.parametrize("mode", REFUSED)
def test_a_mode_is_refused_in_one_line(pair, mode):
    options, reason = REFUSED[mode]
    with pytest.raises((ValueError, NotImplementedError, ImportError), match=reason) as refused:
        generate(pair[0], **options)
    assert len(str(refused.value).strip().splitlines()) == 1


class HalvedLayer(QuantizedLayer):
    """transformers' quantized cache of a layer, with half precision in place of another package's few bits."""

    def _quantize(self, tensor, axis):
        return tensor.half()

    def _dequantize(self, tensor):
        return tensor.float()


def test_a_quantized_cache_gives_deepseeks_tokens(pair, extended):
    def answer(model):
        layers = [HalvedLayer(residual_length=4) for _ in range(model.config.num_hidden_layers)]
        return generate(model, past_key_values=Cache(layers=layers), max_new_tokens=12)

    assert torch.equal(*map(answer, pair))
    assert torch.equal(answer(extended), generate(extended, max_new_tokens=12))


def test_gradient_checkpointing_refuses_a_cache(tiny_model):
    model = tiny_model().train()
    model.gradient_checkpointing_enable()
    with pytest.raises(ValueError, match=r"call model\.eval\(\)"):
        generate(model)
    assert torch.equal(generate(model, use_cache=False), generate(model.eval()))


def test_generate_batch_is_refused(extended):
    with pytest.raises(NotImplementedError, match=r"continuous batching: .*Engine"):
        extended.generate_batch([[1, 2, 3]], generation_config=GenerationConfig(max_new_tokens=3))


@pytest.mark.parametrize("options", [{}, {"num_beams": 2}, {"cache_implementation": "static"}], ids=str)
def test_every_output_is_deepseeks(pair, options):
    wanted = ("output_scores", "output_logits", "output_attentions", "output_hidden_states", "return_dict_in_generate")
    ours, theirs = both = [generate(model, **options, **dict.fromkeys(wanted, True)) for model in pair]
    assert set(ours.keys()) == set(theirs.keys())
    for name in ours.keys() - {"past_key_values"}:
        for a, b in zip(flat(ours[name]), flat(theirs[name]), strict=True):
            if name in ("hidden_states", "attentions"):
                a, b = at_tokens(a, name), at_tokens(b[..., : a.shape[-1]], name)  # a static cache ends with padding
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    assert ours.past_key_values.get_seq_length() == theirs.past_key_values.get_seq_length()
    chosen = [
        m.compute_transition_scores(o.sequences, o.scores, o.get("beam_indices"))
        for m, o in zip(pair, both, strict=True)
    ]
    torch.testing.assert_close(*chosen, rtol=1e-4, atol=1e-4)


def at_tokens(output, name):
    """Return an output with zeros where the prompt has padding: there is nothing to agree on."""
    query = 1 if name == "hidden_states" else 2
    if output.shape[query] == 1:
        return output
    mask = MASK.repeat_interleave(len(output) // 2, 0)
    return output * (mask[..., None] if name == "hidden_states" else mask[:, None, :, None])


def flat(value):
    return [x for item in value for x in flat(item)] if isinstance(value, tuple) else [value]


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("which", ["plain", "extended"])
def test_an_answer_is_continued_from_its_cache(pair, extended, which, cache):
    model = {"plain": pair[0], "extended": extended}[which]
    whole = generate(model, max_new_tokens=8)
    cache = DynamicCache(config=model.config) if cache == "dynamic" else StaticCache(model.config, max_cache_len=30)
    begun = generate(model, max_new_tokens=4, past_key_values=cache)
    mask = torch.nn.functional.pad(MASK, (0, 4), value=1)
    continued = {"input_ids": begun, "attention_mask": mask}
    assert torch.equal(generate(model, continued, max_new_tokens=4, past_key_values=cache), whole)


@pytest.mark.parametrize("options", [{}, {"num_beams": 2}, {"cache_implementation": "static"}], ids=str)
def test_embeddings_give_the_tokens_of_their_ids(pair, extended, options):
    for model in (pair[0], extended):
        embeds = {"inputs_embeds": model.get_input_embeddings()(BATCH["input_ids"]), "attention_mask": MASK}
        assert torch.equal(generate(model, embeds, **options), generate(model, **options)[:, 9:])


def test_padding_at_the_left_changes_no_token(pair, extended):
    for model in (pair[0], extended):
        alone = generate(model, {"input_ids": IDS[1:, 4:]}, max_new_tokens=8)
        assert torch.equal(generate(model)[1, 9:], alone[0, 5:])


def test_a_streamer_gets_every_token(extended):
    class Streamer(BaseStreamer):
        tokens = []  # noqa: RUF012

        def put(self, value):
            self.tokens += value.flatten().tolist()

        def end(self):
            self.tokens.append("end")

    answer = generate(extended, ALONE, streamer=Streamer())
    assert Streamer.tokens == [*answer[0].tolist(), "end"]


def test_own_criteria_and_processors_are_called(extended):
    def at_twelve(ids, scores):
        return torch.full((len(ids),), ids.shape[1] >= 12)

    def only_seven(ids, scores):
        return torch.full_like(scores, -torch.inf).index_fill_(1, torch.tensor([7]), 0.0)

    answer = generate(
        extended,
        stopping_criteria=StoppingCriteriaList([at_twelve]),
        logits_processor=LogitsProcessorList([only_seven]),
    )
    assert answer[:, 9:].tolist() == [[7] * 3] * 2
    allowed = generate(extended, prefix_allowed_tokens_fn=lambda row, ids: [3 + row])
    assert allowed[:, 9:].tolist() == [[3] * 8, [4] * 8]
    assert generate(extended, max_time=0.0).shape[1] == 10


@pytest.mark.parametrize("cast", ["double", "bfloat16", "half"])
def test_every_precision_generates(tiny_model, cast):
    model = getattr(tiny_model(**EXTENSIONS), cast)()
    assert torch.equal(generate(model, num_beams=2), generate(model, num_beams=2, cache_implementation="static"))
    if cast == "double":
        assert torch.equal(generate(model), generate(tiny_model(**EXTENSIONS)))


def test_the_cache_holds_latents(tiny_model):
    out = generate(tiny_model(), return_dict_in_generate=True, cache_implementation="static")
    layer = out.past_key_values.layers[0]
    assert layer.keys.shape == (2, 1, 16, 14) and layer.values.shape == (2, 1, 16, 6)
