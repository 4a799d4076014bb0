"""Tests supervised fine-tuning: the labels, the packing of rows, and whole runs at toy size."""

import copy
import json
import os
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file

from moonwhale.checkpoint import log_history, newest_checkpoint, open_checkpoint
from moonwhale.data import chat
from moonwhale.data.chat import encode_answers, encode_document
from moonwhale.data.loading import load_source
from moonwhale.data.packing import pack_split
from moonwhale.data.sft_dataset import load_conversations
from moonwhale.data.split import document_hash
from moonwhale.data.templates import CHAT_TEMPLATE
from moonwhale.data.tokenizer import byte_lengths, train_tokenizer
from moonwhale.errors import UserError
from moonwhale.posttrain.sft import SFTOptions, check_processes, contents_of, sft
from moonwhale.posttrain.sft_trainer import Collator, pack
from moonwhale.train import run_folder
from moonwhale.train.run_options import parse_run

CHAT = [
    {"role": "user", "content": "moon?"},
    {"role": "assistant", "content": "whale"},
    {"role": "user", "content": "sang?"},
    {"role": "assistant", "content": "back <|eos|> to"},
]


@pytest.fixture(scope="module")
def chats(tmp_path_factory):
    """Sixty short conversations of one or two turns each."""
    path = tmp_path_factory.mktemp("chats") / "chats.jsonl"
    rows = [
        CHAT[:2] if i % 3 else [*CHAT[:3], {"role": "assistant", "content": "to the moon " * (i % 5 + 1)}]
        for i in range(60)
    ]
    rows = [[{**row[0], "content": f"moon {i}?"}, *row[1:]] for i, row in enumerate(rows)]
    path.write_text("".join(json.dumps({"messages": row}) + "\n" for row in rows))
    return path


@pytest.fixture
def options(small_checkpoint, chats, tmp_path, tmp_path_factory, monkeypatch):
    """`options(**changes)` returns the options of a run of about a second."""
    monkeypatch.setenv("MOONWHALE_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))
    given = {
        "checkpoint": str(small_checkpoint), "data": str(chats), "out": str(tmp_path / "run"), "context": 48,
        "steps": 6, "batch_size": 2, "accumulation": 2, "warmup_steps": 1, "lr": 3e-3, "eval_every": 0,
        "save_every": 0, "log_every": 1, "report_to": ["none"], "device": "cpu", "precision": "fp32",
    }  # fmt: skip
    return lambda **changes: SFTOptions(**given | changes)


def losses(out):
    history = log_history(newest_checkpoint(out))
    return [entry["loss_main"] for entry in history if "loss_main" in entry]


def test_the_loss_covers_only_the_assistants_tokens(small_tokenizer):
    ((ids, answered),) = encode_answers(small_tokenizer, [CHAT])
    assert (ids == encode_document(small_tokenizer, CHAT)).all()
    assert small_tokenizer.decode(ids[answered]) == "whale<|eos|>back <|eos|> to<|eos|>"
    plain = [[*CHAT[:3], {"role": "assistant", "content": "back"}]]  # nothing forged: transformers' own mask
    ((ids, answered),) = encode_answers(small_tokenizer, plain)
    assert small_tokenizer.decode(ids[answered]) == "whale<|eos|>back<|eos|>"


def test_both_ways_to_find_the_answers_agree(small_tokenizer):
    for messages in (CHAT[:2], [*CHAT[:3], {"role": "assistant", "content": "back"}]):
        ((ids, answered),) = encode_answers(small_tokenizer, [messages])
        sanitized = chat._encode_sanitized(small_tokenizer, messages, chat._control_tokens(small_tokenizer))
        assert (ids == sanitized[0]).all() and (answered == sanitized[1]).all()


def test_both_ways_agree_where_the_text_around_an_answer_is_tokenized_with_it():
    tokenizer = train_tokenizer(["Hello!\n\n", "Hello!!\n", "moon? whale\n\n\n"] * 9, 330)
    tokenizer.chat_template = (
        "{% for message in messages %}{{ message['role'] }}:\n\n{% if message['role'] == 'assistant' %}{% generation %}"
        "{{ message['content'] }}{% endgeneration %}{% else %}{{ message['content'] }}{% endif %}!\n\n{% endfor %}"
    )
    messages = [{"role": "user", "content": "moon?"}, {"role": "assistant", "content": "Hello!"}] * 2
    ((ids, answered),) = encode_answers(tokenizer, [messages])
    sanitized = chat._encode_sanitized(tokenizer, messages, chat._control_tokens(tokenizer))
    assert (ids == sanitized[0]).all() and (answered == sanitized[1]).all()
    assert "Hello!" in tokenizer.decode(ids[answered])


def test_only_a_chat_that_mentions_a_control_token_is_sanitized(small_tokenizer, monkeypatch):
    monkeypatch.setattr(chat, "_encode_sanitized", lambda tokenizer, messages, control: messages)
    first, second, third = encode_answers(small_tokenizer, [CHAT[:2], CHAT, CHAT[:2]])
    assert second is CHAT
    assert small_tokenizer.decode(first[0][first[1]]) == small_tokenizer.decode(third[0][third[1]]) == "whale<|eos|>"


def test_answers_are_found_where_the_template_drops_earlier_thoughts(small_tokenizer):
    tokenizer, written = copy.deepcopy(small_tokenizer), "generation %}{{ message['content']"
    assert written in CHAT_TEMPLATE
    drops = "generation %}{{ (message['content'] if loop.last else message['content'][-5:])"
    tokenizer.chat_template = CHAT_TEMPLATE.replace(written, drops)
    answer = {"role": "assistant", "content": "<think>sang</think>whale"}
    messages = [CHAT[0], answer, CHAT[2], answer]
    ((ids, answered),) = encode_answers(tokenizer, [messages])
    assert (ids == encode_document(tokenizer, messages)).all()
    assert tokenizer.decode(ids[answered]) == "whale<|eos|><think>sang</think>whale<|eos|>"


def test_sft_holds_out_the_same_documents_as_pretraining(small_tokenizer, chats, tmp_path):
    source = load_source(str(chats))
    train, held_out = load_conversations(source, small_tokenizer, tmp_path)
    assert len(train) + len(held_out) == 60
    _, aside = pack_split(source, small_tokenizer, 48, cache_dir=tmp_path)
    stream = np.concatenate([aside[i]["input_ids"].numpy() for i in range(len(aside))])[: aside.n_tokens]
    assert np.concatenate([row["input_ids"] for row in held_out]).tolist() == stream.tolist()
    assert len({document_hash(c) for c in source}) == 60
    again = load_conversations(source, small_tokenizer, tmp_path)  # from the cache
    assert again[0].to_dict() == train.to_dict()


def test_packed_conversations_do_not_see_each_other(small_checkpoint, chats, tmp_path):
    """Packed rows and single conversations have the same loss, also in the MTP modules."""
    model, tokenizer = open_checkpoint(small_checkpoint)
    train, _ = load_conversations(load_source(str(chats)), tokenizer, tmp_path)
    rows, split = pack(train, 64)
    assert split == 0 and len(rows) < len(train)
    some = [rows[i] for i in range(4)]
    batch = Collator(64, tokenizer.pad_token_id)(some)
    assert batch["input_ids"].shape == (4, 64)
    alone = [
        (row["input_ids"][start - n : start], row["labels"][start - n : start])
        for row in some
        for n, start in zip(row["seq_lengths"], np.cumsum(row["seq_lengths"]), strict=True)
    ]
    with torch.no_grad():
        packed = model(**batch)
        single = [model(input_ids=torch.tensor([ids]), labels=torch.tensor([labels])) for ids, labels in alone]
    counts = sum(out.targets for out in single)
    assert (packed.targets == counts).all() and counts.min() > 10
    nll = sum(out.losses * out.targets for out in single)
    torch.testing.assert_close(packed.losses * packed.targets, nll, rtol=1e-5, atol=1e-4)
    mixed = {
        **batch,
        "position_ids": torch.arange(64).expand(4, 64),
    }  # a plausible bug: a row is treated as one long conversation
    with torch.no_grad():
        assert (model(**mixed).losses - packed.losses).abs().max() > 1e-2


def test_the_collator_takes_rows_without_labels():
    """As TRL's collator takes them: without labels, every token is one."""
    batch = Collator(4, pad_token_id=0)([{"input_ids": [5, 6]}, {"input_ids": [7, 8, 9], "labels": [-100, 8, 9]}])
    assert batch["labels"].tolist() == [[5, 6, -100, -100], [-100, 8, 9, -100]]
    with pytest.raises(ValueError, match="a row has 5 tokens, more than max_length 4"):
        Collator(4, pad_token_id=0)([{"input_ids": [1, 2, 3, 4, 5]}])


def test_a_long_conversation_continues_in_the_next_row(chats, small_tokenizer, tmp_path):
    train, _ = load_conversations(load_source(str(chats)), small_tokenizer, tmp_path)
    rows, split = pack(train, 16)
    assert split > 5
    assert sum(map(len, rows["input_ids"])) == sum(map(len, train["input_ids"]))


@pytest.mark.slow
def test_a_run_trains_the_model_and_its_mtp_modules(options, small_checkpoint, capsys):
    config = options(steps=30)
    sft(config)
    said = capsys.readouterr().out
    assert re.search(r"data +.*chats.jsonl: \d+ conversations in \d+ rows, \d+ held out", said)
    curve = losses(config.out)
    assert curve[-1] < 0.5 * curve[0]
    history = log_history(newest_checkpoint(config.out))
    mtp = [entry["loss_mtp_1"] for entry in history if "loss_mtp_1" in entry]
    assert mtp[-1] < 0.7 * mtp[0]
    model, _ = open_checkpoint(config.out)  # a plain checkpoint, whole
    before, _ = open_checkpoint(small_checkpoint)
    for block, old in zip(model.model.layers, before.model.layers, strict=True):
        assert (block.mlp.gate.e_score_correction_bias == old.mlp.gate.e_score_correction_bias).all()
    assert Path(config.out, "loss.png").stat().st_size > 10_000


def test_samples_answer_a_message_and_change_nothing(options, tmp_path, capsys):
    plain = options(out=str(tmp_path / "plain"), steps=2, sample_every=0)
    sft(plain)
    assert "sample: " not in capsys.readouterr().out
    sampling = options(steps=2, sample_every=1, sample_prompt="moon <|eos|>?")
    sft(sampling)
    said = capsys.readouterr().out
    assert len(re.findall(r"^step      [12]  sample: moon <\|eos\|>\? → ", said, re.MULTILINE)) == 2
    assert losses(sampling.out) == losses(plain.out)
    ours, theirs = (load_file(Path(config.out, "model.safetensors")) for config in (sampling, plain))
    assert all(torch.equal(value, theirs[name]) for name, value in ours.items())


def test_bits_per_byte_count_the_bytes_of_what_was_predicted(options):
    """The first token of a conversation, or of the rest of one that was split, is not predicted."""
    config = options(steps=1, context=12, eval_rows=100)  # splits most conversations
    sft(config)
    last = [entry for entry in log_history(newest_checkpoint(config.out)) if "eval_bits_per_byte" in entry][-1]
    _, tokenizer = open_checkpoint(config.out)
    _, held_out = load_conversations(config.load_source(), tokenizer)
    rows, _ = pack(held_out, 12)
    lengths, n_bytes, targets = byte_lengths(tokenizer), 0, 0
    for row in rows:
        ends = np.cumsum([0, *row["seq_lengths"]])[:-1]
        told = [t for i, t in enumerate(row["labels"]) if t >= 0 and i not in ends]
        n_bytes, targets = n_bytes + sum(lengths[told]), targets + len(told)
    assert last["eval_targets"] == targets
    assert last["eval_bits_per_byte"] == pytest.approx(last["eval_loss_main"] * targets / np.log(2) / n_bytes, rel=1e-5)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"sample_prompt": "caf\udce9"}, "`sample_prompt`: the prompt is not valid UTF-8"),
        ({"warmup_steps": 500, "steps": None}, "`warmup_steps`: 500 is impossible"),
    ],
    ids=["sample_prompt", "warmup_steps"],
)
def test_what_is_refused_leaves_no_run_behind(wrong, message, options):
    asked = options(**wrong)
    with pytest.raises(UserError, match=message):
        sft(asked)
    assert not Path(asked.out, "run.yaml").exists()


def test_a_refused_device_leaves_no_run_behind(options, monkeypatch):
    def refuse(*args, **kwargs):
        raise UserError("`device`: set CUDA_VISIBLE_DEVICES")

    monkeypatch.setattr("moonwhale.posttrain.sft.common_trainer_arguments", refuse)
    with pytest.raises(UserError, match="`device`"):
        sft(asked := options())
    assert not Path(asked.out, "run.yaml").exists()


def test_epochs_are_passes_with_accumulation_too(options, capsys):
    """The last step of an epoch takes the micro-batches that are left."""
    sft(options(steps=None, epochs=2, accumulation=64))
    assert re.search(r"^run +2 steps of 128 rows, 2 passes over the text, into ", capsys.readouterr().out, re.MULTILINE)


def test_many_passes_are_warned_of(options, capsys):
    sft(options(steps=40, lr=1e-4))
    said = capsys.readouterr().out
    passes = re.search(r"^run +40 steps of 4 rows, (\S+) passes over the text, into ", said, re.MULTILINE)
    assert float(passes[1]) > 5
    assert f"\nwarning    the run reads the text {float(passes[1]):.0f} times: " in said


@pytest.mark.slow
def test_a_resumed_run_equals_an_uninterrupted_one(options, tmp_path):
    whole = options(out=str(tmp_path / "whole"), save_every=3)
    sft(whole)
    part = options(save_every=3)
    sft(part)
    for name in ("model.safetensors", "config.json", "loss.png"):
        Path(part.out, name).unlink()
    again = parse_run(SFTOptions, ["--out", part.out, "--resume"])
    sft(again)  # killed after its last checkpoint
    assert Path(part.out, "model.safetensors").exists()
    sft(again)  # ended
    shutil.rmtree(Path(part.out, "checkpoint-6"))
    Path(part.out, "config.json").unlink()
    sft(again)  # killed before it
    ours, theirs = (load_file(Path(config.out, "model.safetensors")) for config in (part, whole))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.slow
def test_lora_trains_adapters_and_gives_a_plain_checkpoint(options, small_checkpoint):
    config = options(lora_rank=4, steps=12, lr=1e-2, sample_every=6)
    sft(config)
    assert losses(config.out)[-1] < losses(config.out)[0]
    assert any(Path(config.out).glob("checkpoint-*/adapter_model.safetensors"))
    ours, before = (
        load_file(Path(config.out, "model.safetensors")),
        load_file(Path(small_checkpoint, "model.safetensors")),
    )
    assert ours.keys() == before.keys()
    moved = {name for name in ours if not torch.equal(ours[name], before[name])}
    assert moved and all(name.rpartition(".")[0].rpartition(".")[2] in ADAPTED for name in moved)
    open_checkpoint(config.out)


ADAPTED = ("q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "o_proj", "gate_proj", "up_proj", "down_proj")


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"checkpoint": None}, "CHECKPOINT: name the folder"),
        ({"checkpoint": "nowhere"}, "nowhere is no folder"),
        ({"context": 1000}, "`context`: 1000 is longer than the model's context of 96"),
        ({"batch_size": 500}, "`batch_size`: 500 rows are computed at once, but the conversations fill only"),
        ({"steps": 0}, "`steps`: 0 is impossible"),
        ({"epochs": 0.0}, "`epochs`: 0.0 is impossible"),
        ({"warmup_steps": 99}, "`warmup_steps`: 99 is impossible: the run has 6 steps: give at most that"),
        ({"lora_rank": -1}, "`lora_rank`: -1 is impossible"),
        ({"data": "python"}, "holds text, not conversations: to go on training a model on text, use moonwhale train"),
        ({"lr": 0.0}, "`lr`: 0.0 is impossible"),
    ],
)
def test_impossible_options_are_one_line(options, changes, complaint):
    with pytest.raises(UserError) as error:
        sft(options(**changes))
    assert complaint in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("--steps 9 --epochs 2", "`epochs`: it has no effect with `steps` 9"),
        ("--sample-every 0 --sample-prompt moon", "`sample_prompt`: it has no effect with `sample_every` 0"),
        ("--lora-rank 4 --qk-clip-tau 50", "`qk_clip_tau`: it has no effect with `lora_rank` 4"),
        ("--lora-rank 4 --bias-update-speed 0.01", "`bias_update_speed`: it has no effect with `lora_rank` 4"),
        ("--optimizer adamw --momentum 0.9", "`momentum`: it has no effect with `optimizer` adamw"),
    ],
)
def test_an_option_without_effect_is_refused(given, message):
    with pytest.raises(UserError) as error:
        parse_run(SFTOptions, ["base", *given.split()])
    assert str(error.value).startswith(message) and "\n" not in str(error.value)


def test_steps_replace_the_epochs_of_a_record(options, tmp_path):
    run_folder.create(options(steps=None, epochs=2.0))
    record = str(tmp_path / "run" / "run.yaml")
    assert parse_run(SFTOptions, ["--config", record, "--steps", "9"]).steps == 9
    with pytest.raises(UserError, match=r"^`epochs`: it has no effect with `steps` 9"):
        parse_run(SFTOptions, ["--config", record, "--steps", "9", "--epochs", "2"])


def test_a_template_without_generation_marks_is_refused(small_tokenizer, chats, tmp_path):
    import copy

    tokenizer = copy.deepcopy(small_tokenizer)
    tokenizer.chat_template = re.sub(r"\{% (end)?generation %\}", "", tokenizer.chat_template)
    with pytest.raises(UserError, match=r"has no \{% generation %\} marks"):
        load_conversations(load_source(str(chats)), tokenizer, tmp_path)


def test_a_folder_that_holds_a_run_is_not_overwritten(options, tmp_path):
    config = options()
    run_folder.create(config)
    with pytest.raises(UserError, match="already holds a run"):
        sft(config)
    with pytest.raises(UserError, match=r"`lr`: 0.5 differs from the 0.003 that the run"):
        sft(options(resume=True, lr=0.5))


def test_changed_conversations_are_noticed(options, chats, tmp_path):
    """A run is resumed on the same conversations only. A run from before `data.txt` takes what it gets."""
    data = shutil.copy(chats, tmp_path / "chats.jsonl")
    config = options(data=str(data), steps=1, context=96)

    def as_if_killed_before_the_first_checkpoint():
        shutil.rmtree(Path(config.out, "checkpoint-1"))
        Path(config.out, "config.json").unlink()

    sft(config)
    as_if_killed_before_the_first_checkpoint()
    resumed = options(data=str(data), steps=1, context=96, resume=True)
    data.write_text(data.read_text())  # the same again
    sft(resumed)
    as_if_killed_before_the_first_checkpoint()
    data.write_text(data.read_text().replace("whale", "whales"))
    with pytest.raises(UserError, match=r"^`data`: .*chats.jsonl, or its tokenizer, has changed since the run in "):
        sft(resumed)
    Path(config.out, "data.txt").unlink()
    sft(resumed)
    assert "checksum" in Path(config.out, "data.txt").read_text()


def test_the_checksum_covers_tokens_labels_and_the_ends_of_rows():
    def contents(ids, labels):
        return contents_of(Dataset.from_dict({"input_ids": ids, "labels": labels}))

    before = contents([[1, 2], [3]], [[-100, 2], [3]])
    assert before == contents([[1, 2], [3]], [[-100, 2], [3]])
    assert before != contents([[1, 2], [4]], [[-100, 2], [3]])
    assert before != contents([[1, 2], [3]], [[1, 2], [3]])
    assert before != contents([[1], [2, 3]], [[-100], [2, 3]])


def test_an_interrupted_lora_merge_leaves_no_model_and_is_made_up_for(options, tmp_path, monkeypatch):
    def interrupted(checkpoint, out):
        raise KeyboardInterrupt

    whole = options(lora_rank=2, steps=3, out=str(tmp_path / "whole"))
    sft(whole)
    config = options(lora_rank=2, steps=3)
    with monkeypatch.context() as patch:
        patch.setattr("moonwhale.posttrain.lora.publish_model", interrupted)
        with pytest.raises(KeyboardInterrupt):
            sft(config)
    assert not Path(config.out, "config.json").exists() and not list(Path(config.out).glob(".merged-*"))
    sft(parse_run(SFTOptions, ["--out", config.out, "--resume"]))
    open_checkpoint(config.out)
    ours, theirs = (load_file(Path(run.out, "model.safetensors")) for run in (config, whole))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert newest_checkpoint(config.out).name == "checkpoint-3"


def test_another_number_of_processes_is_one_line(options, tmp_path, monkeypatch):
    config = options(resume=True)
    checkpoint = tmp_path / "run" / "checkpoint-2"
    checkpoint.mkdir(parents=True)
    for rank in range(2):
        (checkpoint / f"rng_state_{rank}.pth").touch()
    with pytest.raises(UserError, match=r"^`resume`: the run in .* has its steps from 2 processes, not 1: start 2, or"):
        check_processes(config)
    monkeypatch.setenv("WORLD_SIZE", "2")
    check_processes(config)


def test_a_folder_that_cannot_be_written_is_one_line_before_anything_is_encoded(options, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"^`out`: .*/file is a file: name a folder"):
        sft(options(out=str(tmp_path / "file" / "below")))
    with monkeypatch.context() as patch:
        patch.setattr(os, "access", lambda path, mode: Path(path) != tmp_path)
        with pytest.raises(UserError, match=r"^`out`: .* is not yours to write in: give yourself the right"):
            sft(options())
    monkeypatch.setenv("MOONWHALE_CACHE", str(tmp_path / "file"))
    with pytest.raises(
        UserError, match=r"^cannot write in .*/file/conversations: .* \(MOONWHALE_CACHE moves the cache\)"
    ):
        sft(options())
    assert os.listdir(tmp_path) == ["file"]
