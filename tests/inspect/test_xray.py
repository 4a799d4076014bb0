"""The X-ray draws what the model computed, and its page loads no other files."""

import base64
import json
import re

import pytest
import torch

from moonwhale.errors import UserError
from moonwhale.inspect.commands import main_xray
from moonwhale.inspect.xray import MAX_TOKENS, clip_threshold, record, render


@pytest.fixture(scope="module")
def ids(small_tokenizer):
    return small_tokenizer("The whale sang to the moon, and the moon sang back to the whale.")["input_ids"]


@pytest.fixture(scope="module")
def recorded(small_model, small_tokenizer, ids):
    return record(small_model, small_tokenizer, ids, 5)


def array(text, *shape):
    return torch.frombuffer(bytearray(base64.b64decode(text)), dtype=torch.uint8).view(*shape)


def test_the_recording_equals_what_the_model_computed(recorded, small_model, ids):
    seen, hooks = {}, []
    for block in (*small_model.model.main_blocks, *small_model.model.mtp_modules):
        index = block.self_attn.layer_idx

        def keep(_, given, result, index=index):
            seen[index] = (given, result)

        hooks.append(block.self_attn.register_forward_hook(keep))
    with torch.no_grad():
        logits = small_model(torch.tensor([ids])).logits[0]
        small_model.model(torch.tensor([ids]), use_cache=False, with_mtp=True)
    for hook in hooks:
        hook.remove()
    best = logits.softmax(-1).max(-1).values
    assert [p[0][1] for p in recorded["predictions"][0]] == pytest.approx(best.tolist(), abs=1e-4)

    n = len(ids)
    for index, block in enumerate((*small_model.model.main_blocks, *small_model.model.mtp_modules)):
        attention, layer = block.self_attn, recorded["layers"][index]
        given, (out, largest) = seen[index]
        assert layer["counted"] == n - (index == 2), "the MTP module has no token ahead of the last position"
        assert layer["largest"] == pytest.approx(largest.tolist(), abs=0.01)
        # The drawn attention weights, applied to the values, reproduce the attention's output.
        shares = (array(layer["attention"], attention.heads, n, n).double() / 255).square()
        assert torch.allclose(shares.sum(-1), torch.ones(attention.heads, n, dtype=torch.double), atol=0.03)
        latent = attention._project(given[0], given[1])[2][0]
        values = latent.double() @ attention._split_up()[1].double().transpose(1, 2)
        rebuilt = (shares @ values).transpose(0, 1).flatten(1) @ attention.o_proj.weight.double().T
        assert (rebuilt - out[0]).norm() < 0.05 * out.norm()


def test_recorded_blocks_are_those_with_attention(recorded, ids):
    n, layer = len(ids), recorded["layers"][0]
    size, count = layer["block_size"], -(-len(ids) // layer["block_size"])
    read, shares = array(layer["blocks"], 2, n, count), array(layer["attention"], 2, n, n)
    for token in range(n):
        own = token // size
        assert read[:, token, own].all() and not read[:, token, own + 1 :].any()
        assert (read[:, token].sum(-1) == min(layer["topk"], own + 1)).all()
        for block in range(own):
            inside = shares[:, token, block * size : (block + 1) * size]
            assert not inside[read[:, token, block] == 0].any()
    assert "blocks" not in recorded["layers"][1], "that one has full attention"


def test_recorded_experts_are_distinct_and_sorted_by_gate(recorded, ids):
    for layer in recorded["layers"]:
        assert len(layer["experts"]) == len(layer["gates"]) == len(ids)
        for experts, gates in zip(layer["experts"], layer["gates"], strict=True):
            assert len(set(experts)) == 2 and max(experts) < layer["n_experts"] == 4
            assert sum(gates) == pytest.approx(1, abs=2e-3) and gates == sorted(gates, reverse=True)


def test_accepted_guesses_equal_the_tokens(recorded, small_tokenizer, ids):
    assert recorded["guesses"][0] == recorded["guesses"][1] == []
    for id, guesses in zip(ids[2:], recorded["guesses"][2:], strict=True):
        (guess,) = guesses
        assert guess["depth"] == 1 and (not guess["held"] or guess["text"] == small_tokenizer.decode([id]))


@pytest.mark.parametrize(
    ("text", "tau"), [("qk_clip_tau: 30.0", 30), ("qk_clip_tau: 0", 0), ("lr: 1", None), ("- 3", None), (None, None)]
)
@pytest.mark.parametrize("place", [".", "checkpoint-10"])
def test_the_threshold_is_that_of_the_run(text, tau, place, tmp_path):
    (tmp_path / "checkpoint-10").mkdir()
    if text is not None:
        (tmp_path / "run.yaml").write_text(text)
    assert clip_threshold(tmp_path / place) == tau


def test_facts_agree_with_the_configuration(recorded, small_model):
    assert recorded["facts"]["latent_bytes"] == 2 * 2 * (16 + 8)
    assert recorded["facts"]["plain_bytes"] == 2 * 2 * 2 * (16 + 8)
    assert [layer["name"] for layer in recorded["layers"]] == ["block 0", "block 1", "MTP 1"]


def test_the_page_is_self_contained_and_escapes_tokens(recorded):
    page = render(recorded | {"tokens": ["</script><script>alert(1)</script>"] * len(recorded["tokens"])})
    assert page.count("</script>") == 1
    assert not re.findall(r"(?:src|href)\s*=\s*[\"'](?!data:)|@import|url\(|https?://", page)
    (line,) = [line for line in page.splitlines() if line.startswith("const R = ")]
    assert json.loads(line.removeprefix("const R = ").removesuffix(";"))["prompt_tokens"] == 5


def test_a_text_too_long_is_one_line(small_model, small_tokenizer):
    with pytest.raises(UserError, match=f"has {MAX_TOKENS + 1} tokens: an X-ray shows from 1 to {MAX_TOKENS}"):
        record(small_model, small_tokenizer, [5] * (MAX_TOKENS + 1), 1)


def test_the_command_writes_a_page(small_checkpoint, tmp_path, capsys):
    out = tmp_path / "x.html"
    main_xray([str(small_checkpoint), "--prompt", "The whale", "--max-new-tokens", "6", "--out", str(out)])
    assert "of answer; open it in a browser" in capsys.readouterr().out
    assert "const R = {" in out.read_text(encoding="utf-8")
    with pytest.raises(UserError, match="is no place for a file"):
        main_xray([str(small_checkpoint), "--prompt", "x", "--out", str(tmp_path / "no" / "x.html")])
