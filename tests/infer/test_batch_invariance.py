"""What a request generates does not depend on its company: tokens and log-probabilities are equal to the last bit."""

import pytest
import torch
from silent import Silent

from moonwhale.infer import decoder as decoder_module
from moonwhale.infer.decoder import EXPAND_FROM_TOKENS, Decoder
from moonwhale.infer.drafting import Drafting
from moonwhale.infer.request import Request
from moonwhale.infer.sampling import Noise
from moonwhale.infer.sampling_options import SamplingOptions
from moonwhale.infer.scheduler import PREFILL_TOKENS, Scheduler
from moonwhale.native import build

SHAPES = {  # wide enough that PyTorch's kernels depend on the number of rows
    "vocab_size": 320,
    "hidden_size": 128,
    "num_attention_heads": 4,
    "q_lora_rank": 96,
    "kv_lora_rank": 40,
    "qk_nope_head_dim": 24,
    "qk_rope_head_dim": 8,
    "v_head_dim": 24,
    "moe_intermediate_size": 72,
    "moba_block_size": 16,
    "moba_topk": 2,
    "moba_full_attention_layers": [1],
    "moba_key_conv": 3,
    "embedding_conv": 3,
    "latent_embedding_every": 2,
    "num_nextn_predict_layers": 1,
    "max_position_embeddings": 512,
}
LENGTHS = 3, 98, 1, 63, 64, 17, 70, 200, 128, 129, 33  # tokens of the prompts
PRECISIONS = {"fp32": (torch.float32, False), "bf16": (torch.bfloat16, False), "int8": (torch.bfloat16, True)}


def request(i: int) -> Request:
    """Make request i, which always has the same prompt, options and seed."""
    prompt = torch.randint(320, (LENGTHS[i],), generator=torch.Generator().manual_seed(i)).tolist()
    new = 6 + i % 5
    penalty = (1.0, 1.3)[i % 2]  # which the log-probabilities do not show
    options = SamplingOptions(temperature=1.3, min_p=0.0, max_new_tokens=new, repetition_penalty=penalty)
    noise = Noise(i, 320, torch.device("cpu"))
    return Request(prompt, options, {}, Silent(), noise, new, top_logprobs=4, scores_prompt=True)


def answers(decoder, together, steps_apart=0, sequences=16, draft=0) -> dict:
    """Return tokens and log-probabilities of the requests `together`, which come some steps apart."""
    server = Scheduler(decoder, 10**9, sequences, Drafting(1, draft))
    requests = {i: request(i) for i in together}
    for one in requests.values():
        server.submit(one)
        for _ in range(steps_apart):
            server.step()
    while any(one.finish_reason is None for one in requests.values()):
        server.step()
    return {i: (one.token_ids, one.logprobs, one.prompt_logprobs) for i, one in requests.items()}


EVERY = range(len(LENGTHS))
COMPOSITIONS = {
    "all at once": [{"together": EVERY}],
    "all at once, the last first": [{"together": EVERY[::-1]}],
    "with drafts": [{"together": EVERY, "draft": 1}],
    "two slots, used again and again": [{"together": EVERY, "sequences": 2}],
    "one step apart": [{"together": EVERY, "steps_apart": 1}],
    "three steps apart, with drafts": [{"together": EVERY[::-1], "steps_apart": 3, "sequences": 4, "draft": 1}],
    "in pairs": [{"together": [i, (i + 1) % len(LENGTHS)]} for i in EVERY],
}


@pytest.fixture(scope="module")
def decoder_of(tiny_model):
    """`decoder_of(precision)` returns a decoder with weights that make predictions differ clearly."""

    @torch.inference_mode()
    def decoder_of(precision):
        dtype, int8 = PRECISIONS[precision]
        model = tiny_model(**SHAPES)
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(1.5)
        return Decoder(model.to(dtype), int8)

    return decoder_of


def differing(decoder, compositions=COMPOSITIONS) -> list[str]:
    """Return the compositions in which any request's answer is not the one it gets alone."""
    alone = {}
    for i in EVERY:
        alone |= answers(decoder, [i])
    found = []
    for name, runs in compositions.items():
        if any(answer != alone[i] for run in runs for i, answer in answers(decoder, **run).items()):
            found.append(name)
    return found


@pytest.fixture
def _compiler():
    if reason := build.unavailable_reason("step"):
        pytest.skip(reason)


@pytest.mark.usefixtures("_compiler")
@pytest.mark.parametrize("precision", PRECISIONS)
def test_company_changes_no_bit(decoder_of, precision):
    assert not differing(decoder_of(precision))


def test_rows_that_run_in_pytorch_never_share_a_forward():
    assert EXPAND_FROM_TOKENS > PREFILL_TOKENS // 2


@pytest.mark.usefixtures("_compiler")
def test_mutant_prompts_share_a_forward_in_pytorch(decoder_of, monkeypatch):
    monkeypatch.setattr(decoder_module, "EXPAND_FROM_TOKENS", 64)
    assert differing(decoder_of("bf16"), {"all at once": COMPOSITIONS["all at once"]})
