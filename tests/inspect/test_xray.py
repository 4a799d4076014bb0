"""The X-ray holds what the model computed, with any setting, and its page loads no other files."""

import base64
import json
import re
from dataclasses import asdict
from importlib.resources import files

import pytest
import torch

from moonwhale.errors import UserError
from moonwhale.infer.engine import Engine
from moonwhale.inspect.commands import main_xray
from moonwhale.inspect.example import TURNS, example_conversation
from moonwhale.inspect.settings import MAX_TOKENS, Settings, check, instructive, limits, trained_settings
from moonwhale.inspect.xray import clip_threshold, content_hashes, describe, record_with, render, to_json
from moonwhale.model import MoonwhaleForCausalLM

TEXT = "The whale sang to the moon, and the moon sang back to the whale."


@pytest.fixture(scope="module")
def ids(small_tokenizer):
    return small_tokenizer(TEXT)["input_ids"]


@pytest.fixture(scope="module")
def described(small_model, small_tokenizer, ids):
    return describe(small_model, small_tokenizer, ids, 5)


@pytest.fixture(scope="module")
def recorded(described):
    return described["recordings"][0]


@pytest.fixture(scope="module")
def computed(small_model, ids):
    """The inputs and results of every attention and router in one forward pass, by the block's index."""
    seen, hooks = {"attention": {}, "router": {}}, []
    for index, block in enumerate(blocks_of(small_model)):
        for kind, module in (("attention", block.self_attn), ("router", block.mlp.gate)):

            def keep(_, given, result, kind=kind, index=index):
                seen[kind][index] = (given, result)

            hooks.append(module.register_forward_hook(keep))
    with torch.no_grad():
        seen["body"] = small_model.model(torch.tensor([ids]), use_cache=False, with_mtp=True)
    for hook in hooks:
        hook.remove()
    return seen


def blocks_of(model):
    return (*model.model.main_blocks, *model.model.mtp_modules)


def array(text, dtype, *shape):
    return torch.frombuffer(bytearray(base64.b64decode(text)), dtype=dtype).view(*shape)


def pairs(layer, part, first, n):
    """A part of a layer's logits, (heads, n - first, n), NaN above the diagonal."""
    flat = array(layer[part], torch.int16, layer["heads"], -1) * torch.tensor(layer["step"])[:, None]
    full = torch.full((layer["heads"], n, n), torch.nan)
    past = torch.ones(n, n, dtype=torch.bool).tril()
    past[:first] = False
    full[:, past] = flat
    return full[:, first:]


def blocks_read(layer, n):
    count = -(-n // layer["block_size"])
    bits = (array(layer["blocks"], torch.uint8, -1, 1) >> torch.arange(7, -1, -1)) & 1
    return bits.flatten()[: layer["heads"] * n * count].view(layer["heads"], n, count).bool()


def keys_read(layer, n):
    past = torch.ones(n, n, dtype=torch.bool).tril().expand(layer["heads"], n, n)
    if "blocks" not in layer:
        return past
    return past & blocks_read(layer, n).repeat_interleave(layer["block_size"], -1)[..., :n]


@torch.no_grad()
def queries_and_keys(attention, given):
    """The queries and every head's own keys, (heads, T, nope + rope), spelled out."""
    q_nope, q_rope, latent, k_rope = attention._project(given[0], given[1], given[-1])
    if attention.key_conv is not None:
        latent = attention._convolved(latent, given[2])
    k_nope = torch.einsum("hdr,tr->htd", attention._split_up()[0], latent[0, 0])
    return q_nope[0], q_rope[0], k_nope, k_rope[0].expand_as(q_rope[0])


def test_both_parts_of_each_logit_are_the_models_products(recorded, small_model, computed, ids):
    for index, block in enumerate(blocks_of(small_model)):
        attention, layer = block.self_attn, recorded["layers"][index]
        q_nope, q_rope, k_nope, k_rope = queries_and_keys(attention, computed["attention"][index][0])
        past = torch.ones(len(ids), len(ids), dtype=torch.bool).tril()
        for part, product in (("content", q_nope @ k_nope.mT), ("rotary", q_rope @ k_rope.mT)):
            wanted, drawn = product * attention.scale, pairs(layer, part, 0, len(ids))
            step = torch.tensor(layer["step"])[:, None]
            assert ((drawn - wanted)[:, past].abs() <= 0.51 * step + 1e-5).all()


def test_the_drawn_weights_reproduce_the_attentions_output(recorded, small_model, computed, ids):
    n = len(ids)
    for index, block in enumerate(blocks_of(small_model)):
        attention, layer = block.self_attn, recorded["layers"][index]
        given, (out, largest) = computed["attention"][index]
        assert layer["counted"] == n - (index == 2), "the MTP module has no token ahead of the last position"
        assert layer["largest"] == pytest.approx(largest.tolist(), abs=1e-3)
        logits = pairs(layer, "content", 0, n) + pairs(layer, "rotary", 0, n)
        weights = logits.masked_fill(~keys_read(layer, n), -torch.inf).softmax(-1).double()
        latent = attention._project(given[0], given[1], given[-1])[2][0]
        values = latent.double() @ attention._split_up()[1].double().mT
        rebuilt = (weights @ values).transpose(0, 1).flatten(1) @ attention.o_proj.weight.double().T
        assert (rebuilt - out[0]).norm() < 2e-3 * out.norm()


def test_gates_are_products_with_mean_keys_and_decide_the_blocks(recorded, small_model, computed, ids):
    n, layer = len(ids), recorded["layers"][0]
    size, count = layer["block_size"], -(-n // layer["block_size"])
    q_nope, q_rope, k_nope, k_rope = queries_and_keys(blocks_of(small_model)[0].self_attn, computed["attention"][0][0])
    q, k = torch.cat([q_nope, q_rope], -1), torch.cat([k_nope, k_rope], -1)
    gates, read = array(layer["block_gates"], torch.float32, 2, n, count), blocks_read(layer, n)
    for token in range(n):
        own = token // size
        means = k[:, : own * size].unflatten(1, (own, size)).mean(2) if own else k[:, :0]
        wanted = torch.einsum("hd,hbd->hb", q[:, token], means)
        assert torch.allclose(gates[:, token, :own], wanted, atol=1e-5)
        assert read[:, token, own].all() and not read[:, token, own + 1 :].any()
        best = wanted.topk(min(layer["topk"] - 1, own)).indices
        assert torch.equal(read[:, token, :own], torch.zeros(2, own, dtype=torch.bool).scatter(1, best, True))
    assert "blocks" not in recorded["layers"][1], "that one has full attention"


def test_all_experts_have_the_routers_scores_bias_and_gates(recorded, small_model, computed, ids):
    for index, block in enumerate(blocks_of(small_model)):
        layer, (scores, chosen, gates) = recorded["layers"][index], computed["router"][index][1]
        assert torch.equal(array(layer["scores"], torch.float32, len(ids), 4), scores)
        assert layer["bias"] == block.mlp.gate.e_score_correction_bias.tolist() and any(layer["bias"])
        drawn = array(layer["gates"], torch.float32, len(ids), 2)
        for token, experts in enumerate(layer["experts"]):
            assert set(experts) == set(chosen[token].tolist())
            assert set(experts) == set((scores[token] + torch.tensor(layer["bias"])).topk(2).indices.tolist())
            by_expert = dict(zip(chosen[token].tolist(), gates[token].tolist(), strict=True))
            assert drawn[token].tolist() == [by_expert[e] for e in experts]
        assert (drawn[:, 0] >= drawn[:, 1]).all()


def test_each_head_has_its_own_distribution(recorded, small_model, small_tokenizer, computed, ids):
    states = [computed["body"].last_hidden_state, *computed["body"].mtp_hidden_states]
    for depth, (rows, state) in enumerate(zip(recorded["predictions"], states, strict=True)):
        with torch.no_grad():
            best = small_model.lm_head(state[0]).softmax(-1).topk(6)
        assert len(rows) == len(ids) - depth, "the last ones would read tokens beyond the end"
        for token, row in enumerate(rows):
            assert [p for _, _, p in row] == pytest.approx(best.values[token].tolist(), abs=1e-4)
            best_ids = best.indices[token].tolist()
            assert [[id, text] for id, text, _ in row] == [[id, small_tokenizer.decode([id])] for id in best_ids]


def test_surprise_is_the_models_loss(recorded, small_model, ids):
    with torch.no_grad():
        loss = small_model(torch.tensor([ids]), labels=torch.tensor([ids])).losses[0].item()
    assert sum(recorded["surprise"]) / (len(ids) - 1) == pytest.approx(loss, abs=1e-3)


def test_accepted_guesses_equal_the_tokens(recorded, small_tokenizer, ids):
    assert recorded["guesses"][0] == recorded["guesses"][1] == []
    for id, guesses in zip(ids[2:], recorded["guesses"][2:], strict=True):
        (guess,) = guesses
        assert guess["depth"] == 1 and guess["held"] == (guess["id"] == id)
        assert guess["text"] == small_tokenizer.decode([guess["id"]])


@pytest.mark.parametrize(
    "asked", [{"num_experts_per_tok": 1}, {"num_experts_per_tok": 4}, {"moba_topk": 1}, {"moba_block_size": 8}]
)
def test_another_setting_is_what_a_model_built_with_it_computes(small_model, small_tokenizer, ids, recorded, asked):
    settings = check(small_model, asked)
    drawn = record_with(small_model, small_tokenizer, ids, settings)
    config = type(small_model.config).from_dict(small_model.config.to_dict() | asked)
    other = MoonwhaleForCausalLM(config).eval()
    other.load_state_dict(small_model.state_dict())
    fresh = record_with(other, small_tokenizer, ids, trained_settings(other))
    assert drawn == fresh and drawn["surprise"] != recorded["surprise"]
    again = record_with(small_model, small_tokenizer, ids, trained_settings(small_model))
    assert again == recorded, "the model is as it was"


def test_a_setting_out_of_bounds_is_one_line(small_model, tiny_model):
    for name, (low, high) in limits(small_model).items():
        for value in (low - 1, high + 1):
            with pytest.raises(UserError, match=f"`{name}`: {value} is out of bounds: give from {low} to {high}"):
                check(small_model, {name: value})
    dense = tiny_model(first_k_dense_replace=2, num_nextn_predict_layers=0)
    for name, mechanism in (("num_experts_per_tok", "experts"), ("moba_topk", "MoBA"), ("moba_block_size", "MoBA")):
        with pytest.raises(UserError, match=f"`{name}`: this model has no {mechanism}"):
            check(dense, {name: 1})


def test_the_file_holds_settings_that_change_something(described, small_model, ids):
    trained, *others = (recording["settings"] for recording in described["recordings"])
    assert trained == asdict(trained_settings(small_model))
    assert others == [asdict(settings) for settings in instructive(small_model, len(ids))] and len(others) >= 5
    for other in others:
        assert sum(other[name] != value for name, value in trained.items()) == 1
    assert not [s for s in instructive(small_model, 2) if s.moba_topk != 2], "all of so short a text is in one block"


def test_a_model_without_the_mechanisms_is_drawn_without_them(tiny_model, small_tokenizer):
    model = tiny_model(first_k_dense_replace=2, num_nextn_predict_layers=0, vocab_size=310)
    described = describe(model, small_tokenizer, [5, 6, 7], 1)
    assert described["limits"] == {} and len(described["recordings"]) == 1
    assert described["recordings"][0]["settings"] == asdict(Settings())
    for layer in described["recordings"][0]["layers"]:
        assert not {"blocks", "experts"} & layer.keys()
    assert len(described["recordings"][0]["predictions"]) == 1


def test_groups_of_experts_are_recorded(tiny_model, small_tokenizer):
    model = tiny_model(n_routed_experts=8, n_group=4, topk_group=2, vocab_size=310)
    assert limits(model)["num_experts_per_tok"] == [1, 4], "two groups of two"
    ids = list(range(5, 25))
    layer = record_with(model, small_tokenizer, ids, trained_settings(model))["layers"][0]
    sums = array(layer["scores"], torch.float32, len(ids), 8) + torch.tensor(layer["bias"])
    assert layer["groups"] == 4 and layer["topk_groups"] == 2
    best = sums.unflatten(1, (4, 2)).sum(-1).topk(2).indices
    for token, experts in enumerate(layer["experts"]):
        assert {e // 2 for e in experts} <= set(best[token].tolist())


def test_a_recording_keeps_what_its_budget_allows(small_model, small_tokenizer, ids):
    n, whole = len(ids), record_with(small_model, small_tokenizer, ids, trained_settings(small_model))
    details = ("content", "rotary", "block_gates", "scores")
    everything, kept = 0, 0
    for layer in whole["layers"]:
        everything += sum(len(base64.b64decode(layer.get(name, ""))) for name in details)
    part = record_with(small_model, small_tokenizer, ids, trained_settings(small_model), budget=everything // 2)
    for layer in part["layers"]:
        kept += sum(len(base64.b64decode(layer.get(name, ""))) for name in details)
    first = part["first"]
    assert 0 < first < n - 1 and 0.4 * everything < kept <= 0.5 * everything and whole["first"] == 0
    for layer, full in zip(part["layers"], whole["layers"], strict=True):
        assert torch.allclose(
            pairs(layer, "content", first, n), pairs(full, "content", 0, n)[:, first:], equal_nan=True, atol=1e-3
        )
        assert layer["experts"] == full["experts"] and layer.get("blocks") == full.get("blocks")
        assert torch.equal(
            array(layer["scores"], torch.float32, -1, 4), array(full["scores"], torch.float32, n, 4)[first:]
        )
    assert record_with(small_model, small_tokenizer, ids, trained_settings(small_model), budget=0)["first"] == n - 1


@pytest.mark.parametrize(
    ("text", "tau"), [("qk_clip_tau: 30.0", 30), ("qk_clip_tau: 0", 0), ("lr: 1", None), ("- 3", None), (None, None)]
)
@pytest.mark.parametrize("place", [".", "checkpoint-10"])
def test_the_threshold_is_that_of_the_run(text, tau, place, tmp_path):
    (tmp_path / "checkpoint-10").mkdir()
    if text is not None:
        (tmp_path / "run.yaml").write_text(text)
    assert clip_threshold(tmp_path / place) == tau


def test_facts_agree_with_the_configuration(described, recorded):
    assert described["facts"]["latent_bytes"] == 2 * 2 * (16 + 8)
    assert described["facts"]["plain_bytes"] == 2 * 2 * 2 * (16 + 8)
    assert [layer["name"] for layer in recorded["layers"]] == ["block 0", "block 1", "MTP 1"]


def test_the_page_is_self_contained_and_escapes_tokens(described):
    page = render(described | {"tokens": ["</script><script>alert(1)</script>"] * len(described["tokens"])})
    assert page.count("</script>") == 2
    outside = re.sub(r"http://www\.w3\.org/\S+", "", page)  # a namespace's name, which nothing loads
    assert not re.findall(r"(?:src|href)\s*=\s*[\"'](?!data:)|@import|url\(|https?://", outside)
    (data,) = re.findall(r'<script type="application/json" id="recorded">(.*?)</script>', page, re.DOTALL)
    assert json.loads(data)["prompt_tokens"] == 5
    assert not re.findall(r"innerHTML|insertAdjacentHTML|outerHTML|document\.write|\beval\(", page)
    for kind, source in content_hashes().items():
        assert re.fullmatch(r"'sha256-[\w+/]{43}='", source) and kind in ("script-src", "style-src")


def test_what_cannot_be_drawn_is_one_line(small_model, small_tokenizer, tiny_model):
    for count in (0, MAX_TOKENS + 1):
        with pytest.raises(UserError, match=f"has {count} tokens: an X-ray shows from 1 to {MAX_TOKENS}"):
            describe(small_model, small_tokenizer, [5] * count, 1)
    damaged = tiny_model()
    with torch.no_grad():
        damaged.model.norm.weight[0] = torch.inf
    with pytest.raises(UserError, match="not finite: its weights are damaged"):
        describe(damaged, small_tokenizer, [5, 6], 1)
    with pytest.raises(ValueError, match="JSON"):
        to_json({"x": float("nan")})


def test_the_command_writes_a_page(small_checkpoint, tmp_path, capsys):
    out = tmp_path / "x.html"
    main_xray([str(small_checkpoint), "--prompt", "The whale", "--max-new-tokens", "6", "--out", str(out)])
    assert "of answer; open it in a browser" in capsys.readouterr().out
    assert '"recordings":[{' in out.read_text(encoding="utf-8")
    with pytest.raises(UserError, match="is no place for a file"):
        main_xray([str(small_checkpoint), "--prompt", "x", "--out", str(tmp_path / "no" / "x.html")])
    with pytest.raises(UserError, match="`max_new_tokens`: -1 is below 0"):
        main_xray([str(small_checkpoint), "--prompt", "x", "--max-new-tokens", "-1", "--out", str(out)])
    with pytest.raises(UserError, match="`chat`: there is no `prompt` to answer"):
        main_xray([str(small_checkpoint), "--chat", "--out", str(out)])
    with pytest.raises(UserError, match="`seed`: it has no effect with `temperature` 0"):
        main_xray([str(small_checkpoint), "--prompt", "x", "--seed", "3", "--out", str(out)])
    with pytest.raises(UserError, match="`temperature`: it has no effect with `max_new_tokens` 0"):
        main_xray([str(small_checkpoint), "--max-new-tokens", "0", "--temperature", "1", "--out", str(out)])


def test_the_example_has_several_blocks(small_model, small_tokenizer, monkeypatch):
    engine = Engine(small_model, small_tokenizer)
    alone = len(example_conversation(engine, 10**6))
    for size in (4, 16):
        monkeypatch.setattr(engine.config, "moba_block_size", size)
        monkeypatch.setattr(engine, "context", 4096)
        ids = example_conversation(engine, 6)
        assert len(ids) > max(3 * size, alone - 1)
        text = small_tokenizer.decode(ids)
        assert all(text.count(question) <= 1 for question, _ in TURNS)


# Colours

CSS = (files("moonwhale.inspect") / "web" / "xray.css").read_text(encoding="utf-8")


def colours(css: str, theme: str) -> dict[str, tuple[int, ...]]:
    """The colours of a theme as RGB."""
    light, dark = css.split("@media (prefers-color-scheme: dark)")[:2]
    found = dict(re.findall(r"--(\w+):(#\w{6}|[\d,]+)", light))
    if theme == "dark":
        found |= dict(re.findall(r"--(\w+):(#\w{6}|[\d,]+)", dark.split("} }")[0]))
    return {name: rgb(value) for name, value in found.items()}


def rgb(value: str) -> tuple[int, ...]:
    return tuple(bytes.fromhex(value[1:])) if value.startswith("#") else tuple(map(int, value.split(",")))


def contrast(a, b) -> float:
    """WCAG 2's contrast ratio of two RGB colours."""

    def luminance(rgb):
        linear = [x / 12.92 if x <= 0.04045 else ((x + 0.055) / 1.055) ** 2.4 for x in (c / 255 for c in rgb)]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    high, low = sorted((luminance(a), luminance(b)), reverse=True)
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_colours_have_enough_contrast(theme):
    of = colours(CSS, theme)
    assert of["ink"] == of["on"], "a strip's darkest cell is a bar's colour"
    assert contrast((0, 0, 0), (255, 255, 255)) == pytest.approx(21)
    for ground in ("back", "panel", "mark", "shade"):
        for ink in ("text", "soft", "good", "bad"):
            assert contrast(of[ink], of[ground]) >= 4.5, (ink, ground)
    for ink in ("on", "alt"):  # bars, and the darkest cells of strips and map
        assert contrast(of[ink], of["panel"]) >= 4.5 and contrast(of[ink], of["back"]) >= 4.5
    assert contrast(of["line"], of["panel"]) >= 3  # the outline of what is empty
