"""GGUF files describe the model correctly, and llama.cpp computes from them what we compute."""

import json
from itertools import islice

import gguf
import jinja2
import numpy as np
import pytest
import torch
from gguf.quants import dequantize
from tokenizers.pre_tokenizers import ByteLevel, Punctuation, Sequence

from moonwhale.cli import main as cli
from moonwhale.data.chat import encode_prompt
from moonwhale.data.tokenizer import load_tokenizer
from moonwhale.export.gguf import pre_tokenizer_name

CHAT = [{"role": "user", "content": "Hi! How are you?"}, {"role": "assistant", "content": "Fine."}] * 2
TEXTS = [
    "The whale sang to the moon, and the moon sang back.",
    "  two spaces,\n\na line\tand a tab \n and don't, it's we'll ",
    "Ünïcode! 日本語 тест 😀 e\u0301 ½ Ⅷ ١٢",
    "3.14159 and 10,000 + 2x = 1234567890",
    "<think>six times seven</think><answer>42</answer>",
    "a <|eos|> that is text",
    "x",
]
READER = pytest.mark.contract("Readers of our exports", "gguf.GGUFReader")
LLAMA = pytest.mark.contract("Readers of our exports", "llama.cpp")
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 16}


@pytest.fixture
def checkpoint(drawn_checkpoint, small_tokenizer):
    """`checkpoint(tokenizer, **overrides)` returns the folder of a randomly initialized model, and the model."""

    def checkpoint(tokenizer=small_tokenizer, **overrides):
        return drawn_checkpoint(tokenizer, **{"vocab_size": len(tokenizer) + 3, **overrides})

    return checkpoint


@pytest.fixture
def exported(checkpoint, tmp_path, capsys):
    """`exported(*options, **overrides)` returns the file, the model, and standard error."""

    def exported(*options, **overrides):
        folder, model = checkpoint(**overrides)
        assert cli(["export", str(folder), "--to", "gguf", "--out", str(tmp_path / "out"), *options]) == 0
        assert [p.name for p in (tmp_path / "out").iterdir()] == ["model.gguf"]
        return tmp_path / "out" / "model.gguf", model, capsys.readouterr().err

    return exported


def read(path) -> tuple[dict, dict[str, np.ndarray], dict]:
    """Returns the metadata, the tensors in fp32, and the tensors' types."""
    reader = gguf.GGUFReader(path)
    metadata = {name: field.contents() for name, field in reader.fields.items()}
    tensors = {t.name: dequantize(t.data, t.tensor_type) for t in reader.tensors}
    return metadata, tensors, {t.name: t.tensor_type.name for t in reader.tensors}


@READER
def test_metadata(exported):
    path, model, said = exported(n_group=3, topk_group=2, routed_scaling_factor=2.5, first_k_dense_replace=1)
    found, config = read(path)[0], model.config
    assert said == ""
    assert found["general.architecture"] == "deepseek2" and found["general.file_type"] == 0
    assert {name.removeprefix("deepseek2."): value for name, value in found.items() if "deepseek2." in name} == {
        "context_length": 64,
        "vocab_size": config.vocab_size,
        "embedding_length": 32,
        "block_count": 2,
        "feed_forward_length": 48,
        "leading_dense_block_count": 1,
        "attention.layer_norm_rms_epsilon": pytest.approx(1e-6),
        "attention.head_count": 3,
        "attention.head_count_kv": 1,
        "attention.q_lora_rank": 20,
        "attention.kv_lora_rank": 14,
        "attention.key_length": 14 + 6,
        "attention.value_length": 14,
        "attention.key_length_mla": 10 + 6,
        "attention.value_length_mla": 7,
        "rope.dimension_count": 6,
        "rope.freq_base": 10000.0,
        "expert_count": 6,
        "expert_used_count": 2,
        "expert_shared_count": 1,
        "expert_feed_forward_length": 16,
        "expert_gating_func": 2,
        "expert_weights_norm": True,
        "expert_weights_scale": 2.5,
        "expert_group_count": 3,
        "expert_group_used_count": 2,
    }


@READER
def test_tensors(exported):
    path, model, _ = exported(first_k_dense_replace=1, rope_interleave=False)
    _, found, types = read(path)
    assert set(types.values()) == {"F32"}
    block = [
        *("attn_norm", "attn_q_a", "attn_q_a_norm", "attn_q_b", "attn_kv_a_mqa", "attn_kv_a_norm", "attn_k_b"),
        *("attn_v_b", "attn_output", "ffn_norm"),
    ]
    experts = ["ffn_gate_inp", *(f"ffn_{part}_{kind}" for part in ("gate", "up", "down") for kind in ("exps", "shexp"))]
    assert found.keys() == {
        *("token_embd.weight", "output_norm.weight", "output.weight", "blk.1.exp_probs_b.bias"),
        *(f"blk.{i}.{name}.weight" for i in (0, 1) for name in block),
        *(f"blk.0.{name}.weight" for name in ("ffn_gate", "ffn_up", "ffn_down")),
        *(f"blk.1.{name}.weight" for name in experts),
    }
    ours = {name.removeprefix("model.layers.1."): w.numpy() for name, w in model.state_dict().items()}
    theirs = {name.removeprefix("blk.1."): w for name, w in found.items()}

    def same(name: str, expected: np.ndarray) -> bool:
        return theirs[name].shape == expected.shape and (theirs[name] == expected).all()

    assert same("token_embd.weight", ours["model.embed_tokens.weight"])
    assert same("exp_probs_b.bias", ours["mlp.gate.e_score_correction_bias"])
    assert same("ffn_up_exps.weight", ours["mlp.experts.gate_up_proj"][:, 16:])
    assert same("ffn_gate_exps.weight", ours["mlp.experts.gate_up_proj"][:, :16])
    assert same("ffn_down_shexp.weight", ours["mlp.shared_experts.down_proj.weight"])
    up = ours["self_attn.kv_b_proj.weight"].reshape(3, 10 + 7, 14)
    assert same("attn_k_b.weight", up[:, :10].transpose(0, 2, 1)) and same("attn_v_b.weight", up[:, 10:])
    pairs = [0, 3, 1, 4, 2, 5]  # from halves to neighbouring pairs, which llama.cpp rotates
    kv_a = ours["self_attn.kv_a_proj_with_mqa.weight"]
    assert same("attn_kv_a_mqa.weight", np.concatenate([kv_a[:14], kv_a[14:][pairs]]))
    q_b = ours["self_attn.q_b_proj.weight"].reshape(3, 16, 20)
    q_b = np.concatenate([q_b[:, :10], q_b[:, 10:][:, pairs]], axis=1)
    assert same("attn_q_b.weight", q_b.reshape(48, 20))


@READER
def test_bf16_keeps_vectors_and_routers(exported):
    path, model, _ = exported("--dtype", "bf16", tie_word_embeddings=True)
    metadata, found, types = read(path)
    assert metadata["general.file_type"] == gguf.LlamaFileType.MOSTLY_BF16 and "output.weight" not in found
    kept = {name for name, kind in types.items() if kind == "F32"}
    assert kept == {name for name, w in found.items() if w.ndim == 1 or "ffn_gate_inp" in name}
    assert {types[name] for name in types.keys() - kept} == {"BF16"}
    embedding = model.model.embed_tokens.weight.detach().bfloat16().float().numpy()
    assert (found["token_embd.weight"] == embedding).all()


@READER
def test_vocabulary(exported, small_tokenizer):
    found, tokenizer = read(exported()[0])[0], small_tokenizer
    found = {name.removeprefix("tokenizer."): value for name, value in found.items()}
    assert (found["ggml.model"], found["ggml.pre"]) == ("gpt2", "smollm")
    n, tokens, types = len(tokenizer), found["ggml.tokens"], found["ggml.token_type"]
    assert tokens == [*tokenizer.convert_ids_to_tokens(range(n)), *(f"[PAD{i}]" for i in range(n, n + 3))]
    special = set(tokenizer.all_special_ids)
    assert {i for i, kind in enumerate(types) if kind == gguf.TokenType.CONTROL} == special
    markup = {token for token, kind in zip(tokens, types, strict=True) if kind == gguf.TokenType.USER_DEFINED}
    assert markup == {"<think>", "</think>", "<answer>", "</answer>"}
    assert types[n:] == [gguf.TokenType.UNUSED] * 3
    for name in ("bos", "eos"):
        assert found[f"ggml.{name}_token_id"] == getattr(tokenizer, f"{name}_token_id")
    assert found["ggml.padding_token_id"] == tokenizer.pad_token_id
    assert found["ggml.add_bos_token"] is True and found["ggml.add_eos_token"] is False
    assert "h e" in found["ggml.merges"] and all(merge.count(" ") == 1 for merge in found["ggml.merges"])
    plain = jinja2.Environment().from_string(found["chat_template"])  # plain Jinja does not know generation blocks
    rendered = plain.render(messages=CHAT, bos_token=tokenizer.bos_token, eos_token=tokenizer.eos_token)
    assert rendered == tokenizer.apply_chat_template(CHAT, tokenize=False)


@pytest.mark.parametrize(("name", "cut"), [("gpt2", "gpt-2"), ("deepseek", "deepseek-v3")])
def test_foreign_tokenizers_are_recognized(name, cut, tmp_path):
    """The pre-tokenizer is recognized from a saved tokenizer, without its vocabulary file."""
    load_tokenizer(name).save_pretrained(tmp_path)
    assert pre_tokenizer_name(tmp_path, load_tokenizer(str(tmp_path))) == cut


def test_what_is_lost_is_reported(exported):
    overrides = {"moba_topk": 2, "moba_block_size": 4, "num_nextn_predict_layers": 2, "rms_norm_eps": 1e-5}
    path, _, said = exported(**overrides)
    assert ["from token 9 on" in said, "MTP is left out" in said, "rms_norm_eps=1e-05" in said] == [True] * 3
    assert len(said.splitlines()) == 3 and not any("blk.2" in name for name in read(path)[1])


def test_further_end_tokens_are_reported(checkpoint, tmp_path, capsys):
    folder, model = checkpoint()
    eos = model.config.eos_token_id
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [eos, 9, 7]}))
    assert cli(["export", str(folder), "--to", "gguf", "--out", str(tmp_path / "out")]) == 0
    said = capsys.readouterr().err
    assert said == f"warning: end tokens 7, 9 are left out: the file has one, {eos}\n"


@pytest.mark.parametrize(
    ("overrides", "why"),
    [
        ({"moba_key_conv": 3}, "moba_key_conv"),
        ({"embedding_conv": 2}, "embedding_conv"),
        ({"latent_embedding_every": 1}, "latent_embedding_every"),
        ({"attention_bias": True}, "attention_bias"),
        ({"n_shared_experts": 0}, "n_shared_experts"),
        ({"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}}, "type linear"),
        ({"rope_parameters": YARN | {"truncate": False}}, "of type yarn"),
        ({"rope_parameters": YARN | {"beta_fast": 16}}, "of type yarn"),
        ({"rope_parameters": YARN | {"factor": 1.0}}, "a factor of 1"),
        ({"num_hidden_layers": 26}, "in 26 blocks"),
    ],
)
def test_refused_in_one_line(overrides, why, checkpoint, tmp_path, capsys):
    folder, _ = checkpoint(**overrides)
    assert cli(["export", str(folder), "--to", "gguf", "--out", str(tmp_path / "out")]) == 2
    said = capsys.readouterr().err
    assert why in said and len(said.splitlines()) == 1
    assert sorted(p.name for p in tmp_path.iterdir()) == ["ours"], "nothing is left behind"


def test_a_tokenizer_unknown_to_llama_cpp_is_refused(checkpoint, tmp_path, capsys):
    folder, _ = checkpoint()
    tokenizer = load_tokenizer(str(folder))
    tokenizer.backend_tokenizer.pre_tokenizer = Sequence([Punctuation(), ByteLevel(add_prefix_space=False)])
    tokenizer.save_pretrained(folder)
    assert cli(["export", str(folder), "--to", "gguf", "--out", str(tmp_path / "out")]) == 2
    assert "no name for this tokenizer" in capsys.readouterr().err


# --- llama.cpp -------------------------------------------------------------------------------------------------------


@pytest.fixture
def llama():
    """`llama(path)` loads the file in llama.cpp, with an fp32 cache."""
    llama_cpp = pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed (its build takes minutes)")
    options = {"n_ctx": 64, "n_threads": 1, "logits_all": True, "verbose": False, "type_k": 0, "type_v": 0}
    opened = []

    def llama(path):
        opened.append(llama_cpp.Llama(str(path), **options))
        return opened[-1]

    yield llama
    for one in opened:
        one.close()


def greedy(model, ids: torch.Tensor, **options) -> list[int]:
    """Returns the twenty tokens, or fewer before an eos, with which our model greedily continues ids (1, T)."""
    options |= {"max_new_tokens": 20, "do_sample": False, "attention_mask": torch.ones_like(ids)}
    return model.generate(ids, **options)[0, ids.shape[1] :].tolist()


VARIANTS = {
    "plain": {},
    "blocks that cover the context": {"moba_topk": 4, "moba_block_size": 16},
    "queries uncompressed": {"q_lora_rank": None},
    "softmax, gates as they are": {"scoring_func": "softmax", "norm_topk_prob": False, "routed_scaling_factor": 1.5},
    "groups": {"n_group": 3, "topk_group": 1, "routed_scaling_factor": 2.5},
    "all groups": {"n_group": 3, "topk_group": 3},
    "dense and tied": {"first_k_dense_replace": 1, "tie_word_embeddings": True, "n_shared_experts": 2},
    "all dense": {"first_k_dense_replace": 9},
    "rotated halves": {"rope_interleave": False},
    "yarn": {"rope_parameters": YARN},
    "yarn, DeepSeek-V3's": {"rope_parameters": YARN | {"mscale": 1.0, "mscale_all_dim": 1.0}},
    "yarn, DeepSeek-V2-Lite's": {"rope_parameters": YARN | {"mscale": 0.707, "mscale_all_dim": 0.707}},
    "yarn, of two scales": {"rope_parameters": YARN | {"mscale": 0.5, "mscale_all_dim": 1.3}},
}


@LLAMA
@pytest.mark.slow
@pytest.mark.parametrize("variant", VARIANTS)
def test_llama_cpp_computes_the_same(variant, exported, llama, small_tokenizer):
    path, model, said = exported(**VARIANTS[variant])
    assert said == ""
    theirs = llama(path)
    for text in TEXTS[:4]:
        ids = encode_prompt(small_tokenizer, text)[:40]
        theirs.reset()
        theirs.eval(ids)
        with torch.no_grad():
            expected = model(torch.tensor([ids])).logits[0].numpy()
        assert np.abs(theirs.scores[: len(ids)] - expected).max() < 3e-5 * np.abs(expected).max()
        found = list(islice(theirs.generate(ids, temp=0.0), 20))
        assert found == greedy(model, torch.tensor([ids]), eos_token_id=None)


@LLAMA
@pytest.mark.slow
def test_llama_cpp_reads_bf16(exported, llama, small_tokenizer):
    """llama.cpp rounds the inputs of products. All experts are chosen, so that rounding cannot change the choice."""
    path, model, _ = exported("--dtype", "bf16", num_experts_per_tok=6)
    theirs, ids = llama(path), encode_prompt(small_tokenizer, TEXTS[0])
    theirs.eval(ids)
    with torch.no_grad():
        expected = model(torch.tensor([ids])).logits[0].numpy()
    assert np.abs(theirs.scores[: len(ids)] - expected).max() < 0.04 * np.abs(expected).max()


@LLAMA
@pytest.mark.slow
@pytest.mark.parametrize("name", ["trained here", "gpt2", "deepseek"])
def test_llama_cpp_tokenizes_text_the_same(name, exported, llama, small_tokenizer):
    tokenizer = small_tokenizer if name == "trained here" else load_tokenizer(name)
    theirs = llama(exported(tokenizer=tokenizer, hidden_size=8)[0])
    for text in TEXTS:
        assert theirs.tokenize(text.encode(), special=False) == encode_prompt(tokenizer, text)
    ids = encode_prompt(tokenizer, TEXTS[2])
    assert theirs.detokenize(ids).decode() == TEXTS[2]
    chat = tokenizer.apply_chat_template(CHAT, tokenize=False, add_generation_prompt=True)
    ids = tokenizer.apply_chat_template(CHAT, add_generation_prompt=True)["input_ids"]
    assert theirs.tokenize(chat.encode(), add_bos=False, special=True) == ids


@LLAMA
@pytest.mark.slow
def test_llama_cpp_chats(exported, llama, small_tokenizer):
    """With the template in the file, llama.cpp has the same prompt and answer tokens."""
    path, model, _ = exported(max_position_embeddings=128)
    theirs = llama(path)
    theirs.create_chat_completion(CHAT[:1], temperature=0.0, max_tokens=20)
    seen = theirs.input_ids[: theirs.n_tokens].tolist()
    ids = small_tokenizer.apply_chat_template(CHAT[:1], add_generation_prompt=True, return_tensors="pt")["input_ids"]
    expected = [*ids[0].tolist(), *greedy(model, ids)]
    assert seen[: len(expected) - 1] == expected[:-1], "the last one is written, but need not be read"
