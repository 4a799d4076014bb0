"""Tests `moonwhale eval`: its figures equal those counted by hand, and every user error is one line."""

import copy
import json
import math
import re
import shutil
import socket
from itertools import combinations

import pytest
import torch

from moonwhale import cli
from moonwhale.checkpoint import log_history, newest_checkpoint
from moonwhale.data.loading import Source, load_source
from moonwhale.data.packing import pack_all, pack_split
from moonwhale.data.tasks import Problem, Task, is_held_out
from moonwhale.data.tokenizer import train_tokenizer
from moonwhale.errors import UserError
from moonwhale.evaluate import tasks
from moonwhale.evaluate.config import EvalConfig
from moonwhale.evaluate.drafts import continue_text, score_drafts
from moonwhale.evaluate.evaluation import evaluate
from moonwhale.evaluate.text import score_text
from moonwhale.infer.engine import Completion
from moonwhale.train import pretrain

QUESTIONS = [(f"What is {i} + {i}?", str(2 * i)) for i in range(6)]


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path_factory):
    monkeypatch.setenv("MOONWHALE_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))


@pytest.fixture(scope="module")
def engine(small_engine):
    return small_engine(draft=1)


@pytest.fixture
def questions(tmp_path):
    path = tmp_path / "sums.jsonl"
    path.write_text("".join(json.dumps({"question": q, "answer": a}) + "\n" for q, a in QUESTIONS))
    return str(path)


def run(capsys, *argv) -> str:
    """Returns what `moonwhale eval` prints."""
    assert cli.main(["eval", *map(str, argv)]) == 0
    return capsys.readouterr().out


def refused(capsys, *argv) -> str:
    """Returns the one-line error message of a call that must fail."""
    assert cli.main(["eval", *map(str, argv)]) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("moonwhale: error: ") and len(line) < 400
    return line


# ---- text


def by_hand(model, tokenizer, rows):
    """Returns bits, bytes and, for the next token and the one after it, [right, all]. Counts fp64 logits by token."""
    bits, n_bytes, hits, head = 0.0, 0, [[0, 0], [0, 0]], model.lm_head.weight.double()
    for row in rows:
        ids, positions = row["input_ids"], row["position_ids"]
        body = model.model(ids[None], position_ids=positions[None], with_mtp=True, use_cache=False)
        chain = [h[0].double() @ head.T for h in (body.last_hidden_state, *body.mtp_hidden_states)]
        for at in range(len(ids)):
            for depth, logits in enumerate(chain):
                to = at + 1 + depth
                same = to < len(ids) and all(positions[i + 1] == positions[i] + 1 for i in range(at, to))
                if same and row["labels"][to] != -100:
                    hits[depth][0] += int(logits[at].argmax() == ids[to])
                    hits[depth][1] += 1
                    if depth == 0:
                        bits -= float(logits[at].log_softmax(-1)[ids[to]]) / math.log(2)
                        n_bytes += len(tokenizer.decode([ids[to]], skip_special_tokens=True))  # the text is ASCII
    return bits, n_bytes, hits


@torch.no_grad()
def test_text_is_scored_as_by_hand(small_model, small_tokenizer, text_folder):
    rows = pack_all(load_source(str(text_folder)), small_tokenizer, 48)
    score = score_text(small_model, rows, small_tokenizer, batch_size=3)
    bits, n_bytes, hits = by_hand(small_model, small_tokenizer, rows)
    assert (score["rows"], score["targets"], score["bytes"]) == (len(rows), hits[0][1], n_bytes)
    assert score["bits_per_byte"] == pytest.approx(bits / n_bytes, rel=1e-5)
    assert score["losses"][0] == pytest.approx(bits * math.log(2) / hits[0][1], rel=1e-5)
    assert score["perplexity"] == pytest.approx(2 ** (bits / hits[0][1]), rel=1e-4)
    assert score["accuracies"] == pytest.approx([right / n for right, n in hits])
    # Plausible bugs: dividing by all bytes, predicted or not; letting documents attend to each other.
    assert score["bits_per_byte"] != pytest.approx(bits / rows.n_bytes, rel=1e-3)
    blind = [row | {"position_ids": torch.arange(48)} for row in rows]
    assert score["losses"][0] != pytest.approx(score_text(small_model, blind, small_tokenizer)["losses"][0], rel=1e-3)


def test_the_text_score_equals_trainings_last_evaluation(tiny_run, text_folder, tmp_path, capsys):
    config = tiny_run()
    pretrain.train(config)
    logged = log_history(newest_checkpoint(config.out))
    last = next(entry for entry in reversed(logged) if "eval_loss_main" in entry)
    run(capsys, config.out, "--data", text_folder, "--rows", config.eval_rows, "--device", "cpu", "--precision", "fp32",
        "--out", tmp_path / "found.json")  # fmt: skip
    found = json.loads((tmp_path / "found.json").read_text())["results"]["text"]
    names = ("main", "mtp_1", "mtp_2")
    assert found["bits_per_byte"] == pytest.approx(last["eval_bits_per_byte"], rel=1e-6)
    assert found["losses"] == pytest.approx([last[f"eval_loss_{name}"] for name in names], rel=1e-6)
    assert found["accuracies"] == pytest.approx([last[f"eval_accuracy_{name}"] for name in names], rel=1e-6)
    assert (found["targets"], found["rows"], found["context"]) == (last["eval_targets"], 4, config.context)


def test_a_perplexity_beyond_all_numbers_is_null(small_model, small_tokenizer, text_folder, tmp_path, capsys):
    """exp overflows from 710 nats on. JSON has no infinity."""
    loud, file = copy.deepcopy(small_model), tmp_path / "found.json"
    loud.lm_head.weight.detach().mul_(1e6)
    loud.save_pretrained(tmp_path / "loud")
    small_tokenizer.save_pretrained(tmp_path / "loud")
    printed = run(capsys, tmp_path / "loud", "--data", text_folder, "--device", "cpu", "--out", file)
    found = json.loads(file.read_text(), parse_constant=pytest.fail)["results"]["text"]
    assert found["perplexity"] is None and found["losses"][0] > 710 and "perplexity inf" in printed


def test_packing_everything_keeps_all_of_the_text(small_tokenizer, text_folder):
    source = load_source(str(text_folder))
    parts, whole = pack_split(source, small_tokenizer, 32), pack_all(source, small_tokenizer, 32)
    assert whole.n_bytes == sum(len(path.read_bytes()) for path in text_folder.iterdir())
    assert whole.n_tokens == sum(part.n_tokens for part in parts) and all(part.n_tokens for part in parts)
    with pytest.raises(UserError, match="`context` 1"):
        pack_all(source, small_tokenizer, 1)


def test_packing_everything_takes_both_declared_splits(small_tokenizer, tmp_path):
    for name in ("train", "test"):
        rows = [{"text": f"The whale sang {name} {i}"} for i in range(5)]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = load_source(str(tmp_path))
    assert source.held_out is not None and pack_all(source, small_tokenizer, 32).n_documents == 10


def test_rows_without_text_are_one_line(small_model, small_tokenizer):
    ids = torch.tensor([small_tokenizer.bos_token_id, small_tokenizer.eos_token_id])
    row = {"input_ids": ids, "position_ids": torch.arange(2), "labels": torch.tensor([-100, int(ids[1])])}
    with pytest.raises(UserError, match="no text to predict"):
        score_text(small_model, [row], small_tokenizer)


# ---- tasks


@pytest.mark.parametrize(("n", "c"), [(1, 0), (1, 1), (5, 0), (5, 2), (5, 4), (5, 5)])
def test_pass_at_k_is_the_share_of_draws_with_a_right_one(n, c):
    right = [i < c for i in range(n)]
    for k in range(1, n + 1):
        draws = list(combinations(right, k))
        assert tasks.pass_at_k(n, c, k) == pytest.approx(sum(map(any, draws)) / len(draws))


def test_pass_at_k_is_not_the_biased_estimate():
    assert tasks.pass_at_k(5, 2, 3) != pytest.approx(1 - (1 - 2 / 5) ** 3)


def completion(text: str, tokens: int = 1, reason: str = "eos", **counts) -> Completion:
    return Completion(text, [0] * tokens, reason, 3, 0.1, **{"forwards": 1, "drafted": [], "accepted": []} | counts)


def test_answers_are_scored_as_by_hand():
    def equal(problem, answer):
        return None if answer == "9^9^9" else float(answer == problem.answer)

    task = Task("given", lambda seed, held_out: iter(()), equal, lambda problem: "")
    problems = [Problem("one?", "1", {}), Problem("two?", "2", {})]
    good, bare, wrong = "<think></think><answer>{}</answer>", "it is <answer>{}</answer>", "<answer>{}"
    one = [completion(good.format(1), 4), completion(bare.format(1), 2), completion(wrong.format(1), 6, "length")]
    two = [completion(good.format(1), 4), completion(bare.format(1), 1), completion(wrong.format(2), 1)]
    greedy = [completion(good.format(1)), completion(good.format(1))]
    score = tasks.score_answers(task, problems, greedy, [one, two], [1, 2, 3])
    assert (score["problems"], score["samples"]) == (2, 3)
    assert score["greedy"] == (0.5, 0.5)  # of 1 and 0: the standard deviation √½ divided by √2
    assert {k: mean for k, (mean, _) in score["pass_at"].items()} == pytest.approx({1: (2 / 3) / 2, 2: 1 / 2, 3: 1 / 2})
    assert (score["well_formed"], score["cut_off"], score["mean_tokens"]) == pytest.approx((2 / 6, 1 / 6, 18 / 6))
    assert score["over_limit"] == 0
    endless = completion(good.format("9^9^9"))
    score = tasks.score_answers(task, problems, [greedy[0], endless], [[*one[:2], endless], two], [1])
    assert (score["over_limit"], score["greedy"], score["pass_at"][1][0]) == (2, (0.5, 0.5), pytest.approx((2 / 3) / 2))


def test_answers_equal_those_of_the_engine_one_at_a_time(engine):
    problems = [Problem(question, answer, {}) for question, answer in QUESTIONS[:2]]
    greedy, sampled = tasks.generate_answers(engine, problems, samples=3, temperature=1.5, max_new_tokens=8, seed=7)
    for i, problem in enumerate(problems):
        (alone,) = engine.generate([problem.messages], temperature=0, max_new_tokens=8)
        assert greedy[i].token_ids == alone.token_ids
        for j in range(3):
            options = {"temperature": 1.5, "min_p": 0, "max_new_tokens": 8, "seed": 7 + 3 * i + j}
            assert sampled[i][j].token_ids == engine.generate([problem.messages], **options)[0].token_ids
    assert len({tuple(c.token_ids) for own in sampled for c in own}) > 3


def test_a_file_of_questions(small_checkpoint, questions, tmp_path, capsys):
    out = run(
        capsys, small_checkpoint, "--task", questions, "--whole", "--samples", 2, "--max-new-tokens", 6, "--seed", 3,
        "--speculation", "--out", tmp_path / "found.json",
    )  # fmt: skip
    report = json.loads((tmp_path / "found.json").read_text())
    found = report["results"]["task"]
    assert (found["problems"], found["samples"], list(found["pass_at"])) == (6, 2, ["1"])
    assert {example["question"] for example in found["examples"]} < {question for question, _ in QUESTIONS}
    assert report["settings"] | {"k": [1], "seed": 3, "task": questions, "rows": None} == report["settings"]
    assert report["results"]["drafts_task"]["tokens_per_forward"] >= 1
    for piece in ("6 problems, 2 samples", "greedy", "pass@1", "well-formed", "mean length", "drafts", "What is"):
        assert piece in out


def test_a_question_beyond_the_context_is_one_line(engine):
    with pytest.raises(UserError, match=r"`task`: the prompt has .* tokens, .* the model's context of 96"):
        tasks.generate_answers(engine, [Problem("why " * 99, "so", {})], 1, 1.0, 8, 0)


def test_a_context_that_is_longer_than_the_text_is_padding_no_one_computes(small_checkpoint, tmp_path):
    folder = shutil.copytree(small_checkpoint, tmp_path / "run")
    (tmp_path / "text.txt").write_text("The whale sang to the moon. " * 20)
    config = {"data": str(tmp_path / "text.txt"), "whole": True, "device": "cpu", "precision": "fp32"}
    values = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(values | {"max_position_embeddings": 16_000_000}))
    long = evaluate(str(folder), EvalConfig(**config))["text"]
    asked = evaluate(str(folder), EvalConfig(**config, context=15_000_000))["text"]
    assert long == asked and long["rows"] == 1 and long["targets"] == long["context"] - 1 < 1000


# ---- drafts


def test_counts_of_drafts_are_summed():
    some = [completion("", 5, forwards=3, drafted=[3, 2], accepted=[2, 0]), completion("", 4, forwards=2),
            completion("", 1, forwards=1, drafted=[1], accepted=[0])]  # fmt: skip
    assert score_drafts(some) == {"tokens": 10, "tokens_per_forward": 10 / 6, "acceptance": [2 / 4, 0 / 2]}


@torch.no_grad()
def test_drafts_are_counted_as_by_hand(engine, small_model, small_tokenizer, text_folder):
    """For any answer length, module 1 drafts token n from its state at n - 2 and the embedding of token n - 1."""
    texts = [path.read_text() for path in sorted(text_folder.iterdir())][:30]
    rows = pack_all(Source("given", "thirty", lambda: iter(texts)), small_tokenizer, 48)
    completions = continue_text(engine, rows)
    tokens = forwards = tested = held = 0
    for document, completion in enumerate(completions):
        prompt, answer = rows.beginning(document, 48).tolist(), completion.token_ids
        ids = torch.tensor([prompt + answer])
        guess = small_model.lm_head(small_model.model(ids, with_mtp=True).mtp_hidden_states[0])[0].argmax(-1)
        tokens, forwards, n = tokens + len(answer), forwards + 1, len(prompt) + 1
        while n < ids.shape[1]:
            right = int(guess[n - 2] == ids[0, n])
            forwards, tested, held = forwards + 1, tested + 1, held + right
            n += 1 + right
    score = score_drafts(completions)
    assert len(completions) == rows.n_documents
    assert (score["tokens"], score["tokens_per_forward"]) == (tokens, pytest.approx(tokens / forwards))
    assert score["acceptance"] == [pytest.approx(held / tested)]
    assert 0 < held < tested


def test_prompts_are_beginnings_of_documents(small_tokenizer):
    texts = ["The whale sang to the moon.", "Moon.", "The whale and the moon sang back to the whale."]
    rows = pack_all(Source("given", "beginnings", lambda: iter(texts)), small_tokenizer, 8)
    for document, text in enumerate(texts):
        ids = small_tokenizer(text)["input_ids"]  # bos and the text
        assert [rows.beginning(document, n).tolist() for n in (1, 3, 99)] == [ids[:1], ids[:3], ids]


# ---- lm-eval

CHOICES = ["moon", "whale sang back", "sang", "the moon"]


@pytest.fixture
def harness_folder(tmp_path):
    """Returns a folder with `whales`, a task of 16 questions with four choices."""
    pytest.importorskip("lm_eval")
    folder = tmp_path / "tasks"
    folder.mkdir()
    rows = [{"q": "The whale " * (i % 5 + 1) + f"sang {i}", "a": CHOICES, "right": i * 7 % 4} for i in range(16)]
    (folder / "whales.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "whales.yaml").write_text(
        "task: whales\ndataset_path: json\ntest_split: test\noutput_type: multiple_choice\n"
        f"dataset_kwargs: {{data_files: {{test: {folder}/whales.jsonl}}}}\n"
        'doc_to_text: "{{q}}"\ndoc_to_choice: "{{a}}"\ndoc_to_target: right\n'
        "metric_list: [{metric: acc}, {metric: acc_norm}]\n"
    )
    return folder


@torch.no_grad()
def choose(model, tokenizer, question: str, with_bos: bool = True) -> tuple[int, int]:
    """Returns the likeliest choice, and the likeliest one per character."""
    sums = []
    for choice in CHOICES:
        start, ids = (
            tokenizer.encode(text, add_special_tokens=with_bos) for text in (question, f"{question} {choice}")
        )
        logs = model(torch.tensor([ids])).logits[0].double().log_softmax(-1)
        sums.append(sum(float(logs[i - 1, ids[i]]) for i in range(len(start), len(ids))))
    by_length = [total / len(choice) for total, choice in zip(sums, CHOICES, strict=True)]
    return sums.index(max(sums)), by_length.index(max(by_length))


def test_lm_eval_scores_as_by_hand(small_checkpoint, small_model, small_tokenizer, harness_folder, tmp_path, capsys,
                                   monkeypatch):  # fmt: skip
    def connect(*_):
        raise OSError("a local task needs no network")

    monkeypatch.setattr(socket.socket, "connect", connect)
    out = run(
        capsys, small_checkpoint, "--lm-eval", "whales", "--include-path", harness_folder, "--limit", 12,
        "--batch-size", 5, "--precision", "fp32", "--out", tmp_path / "found.json",
    )  # fmt: skip
    found = json.loads((tmp_path / "found.json").read_text())["results"]["lm_eval"]["whales"]
    rows = [json.loads(line) for line in (harness_folder / "whales.jsonl").read_text().splitlines()][:12]

    def accuracies(**options):
        chosen = [choose(small_model, small_tokenizer, row["q"], **options) for row in rows]
        return [sum(c[i] == row["right"] for c, row in zip(chosen, rows, strict=True)) / 12 for i in (0, 1)]

    assert [found["acc"], found["acc_norm"]] == pytest.approx(accuracies())
    assert accuracies() != accuracies(with_bos=False)
    assert 0 < found["acc stderr"] < 0.2 and found["examples"] == 12
    assert "whales (12 examples)" in out and f"{found['acc']:.4f} ±" in out


def test_lm_eval_reads_a_text_as_by_hand(small_checkpoint, small_model, small_tokenizer, harness_folder):
    """A rolling likelihood begins with a single bos, which is not predicted."""
    (harness_folder / "texts.yaml").write_text(
        "task: texts\ndataset_path: json\ntest_split: test\noutput_type: loglikelihood_rolling\n"
        f"dataset_kwargs: {{data_files: {{test: {harness_folder}/whales.jsonl}}}}\n"
        'doc_to_text: ""\ndoc_to_target: "{{q}}"\nmetric_list: [{metric: bits_per_byte}]\n'
    )
    config = EvalConfig(lm_eval=["texts"], include_path=str(harness_folder), device="cpu", precision="fp32")
    found = evaluate(str(small_checkpoint), config)["lm_eval"]["texts"]["bits_per_byte"]
    texts = [json.loads(line)["q"] for line in (harness_folder / "whales.jsonl").read_text().splitlines()]
    nats = 0.0
    for text in texts:
        ids = torch.tensor([[small_tokenizer.bos_token_id, *small_tokenizer.encode(text, add_special_tokens=False)]])
        with torch.no_grad():
            logs = small_model(ids).logits[0, :-1].double().log_softmax(-1)
        nats -= logs.gather(1, ids[0, 1:, None]).sum().item()
    assert found == pytest.approx(nats / math.log(2) / sum(len(text.encode()) for text in texts), rel=1e-5)


def test_an_answer_longer_than_the_context_is_one_line(small_checkpoint, harness_folder, capsys):
    file = harness_folder / "whales.jsonl"
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    file.write_text("".join(json.dumps(row | {"a": ["whale " * 200, *CHOICES[1:]]}) + "\n" for row in rows))
    line = refused(capsys, small_checkpoint, "--lm-eval", "whales", "--include-path", harness_folder)
    assert "ValueError: a choice of " in line and "exceeds the context of 96" in line


def test_truncated_prompts_give_a_warning(small_checkpoint, harness_folder, capsys, caplog):
    given = [small_checkpoint, "--lm-eval", "whales", "--include-path", harness_folder]
    run(capsys, *given)
    assert not caplog.records
    rows = [json.loads(line) for line in (harness_folder / "whales.jsonl").read_text().splitlines()]
    rows[3]["q"] *= 20
    (harness_folder / "whales.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    run(capsys, *given)
    (warning,) = (record.getMessage() for record in caplog.records)
    # lm-eval scores choices of one token together.
    assert re.fullmatch("`lm_eval`: [34] prompts or more lost their beginnings, to fit a context of 96", warning)


@pytest.mark.parametrize("settings", ["{until: [moon]}", "{until: [moon], max_new_tokens: 96}"])
def test_answers_that_would_fill_the_context_are_shortened(
    settings, small_checkpoint, harness_folder, tmp_path, capsys, caplog
):
    """lm-eval's own 256 tokens, and those that a task asks for."""
    (harness_folder / "songs.yaml").write_text(
        "task: songs\ndataset_path: json\ntest_split: test\noutput_type: generate_until\n"
        f"dataset_kwargs: {{data_files: {{test: {harness_folder}/whales.jsonl}}}}\n"
        f'doc_to_text: "{{{{q}}}}"\ndoc_to_target: "{{{{a[0]}}}}"\ngeneration_kwargs: {settings}\n'
        "metric_list: [{metric: exact_match}]\n"
    )
    run(
        capsys, small_checkpoint, "--lm-eval", "songs", "--include-path", harness_folder, "--limit", 2,
        "--out", tmp_path / "found.json",
    )  # fmt: skip
    assert "exact_match" in json.loads((tmp_path / "found.json").read_text())["results"]["lm_eval"]["songs"]
    length = 96 if "96" in settings else 256
    said = [record.getMessage() for record in caplog.records]
    assert said == [f"`lm_eval`: answers of up to {length} tokens do not fit a context of 96: they end after 48"]


def test_a_task_that_lm_eval_does_not_know(small_checkpoint, harness_folder, capsys):
    from lm_eval.tasks import TaskManager

    original = TaskManager.__init__

    def quick(self, *args, include_defaults=True, **options):
        original(self, *args, include_defaults=False, **options)  # reading its own 14,000 tasks takes ten seconds

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TaskManager, "__init__", quick)
        line = refused(capsys, small_checkpoint, "--lm-eval", "whale", "--include-path", harness_folder)
    assert line.endswith("--lm-eval: there is no task 'whale' (did you mean whales?)")


@pytest.mark.slow
def test_lm_evals_own_tasks_are_known(small_checkpoint, capsys):
    pytest.importorskip("lm_eval")
    assert "(did you mean arc_easy?)" in refused(capsys, small_checkpoint, "--lm-eval", "arc_esy")


def test_a_task_that_cannot_be_loaded(small_checkpoint, harness_folder, capsys):
    (harness_folder / "whales.jsonl").unlink()
    line = refused(capsys, small_checkpoint, "--lm-eval", "whales", "--include-path", harness_folder)
    assert "--lm-eval whales: FileNotFoundError: " in line


# ---- the verb


def test_several_evaluations_in_one_call(small_checkpoint, text_folder, questions, harness_folder):
    config = EvalConfig(
        data=str(text_folder), rows=2, task=questions, problems=1, whole=True, samples=1, max_new_tokens=2,
        lm_eval=["whales"], include_path=str(harness_folder), limit=2, speculation=True,
    )  # fmt: skip
    found = evaluate(str(small_checkpoint), config)
    assert list(found) == ["text", "lm_eval", "drafts_text", "task", "drafts_task"]
    json.dumps(found)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "there is nothing to evaluate: give --data, --task or --lm-eval"),
        (["--speculation"], "there is nothing to evaluate"),
        (["--data", "TEXT", "--rows", "0"], "--rows: 0 is impossible: it must be at least 1"),
        (["--data", "TEXT", "--rows", "few"], "--rows: 'few' is not a whole number"),
        (["--data", "TEXT", "--context", "97"], "--context: 97 is longer than the model's context of 96"),
        (["--data", "TEXT", "--context", "1"], "--context 1: a row needs at least 2 tokens"),
        (["--data", "nothing.txt"], "--data: no such file or folder: nothing.txt"),
        (["--data", "TEXT", "--data-split", "test"], "--data-split test: only hub data sets and folders"),
        (["--task", "chain_sun"], "(did you mean chain_sum?)"),
        (["--task", "nothing.jsonl"], "--task: cannot read nothing.jsonl"),
        (["--task", "QUESTIONS", "--samples", "4", "--k", "1,8"], "--k: 1,8 does not fit --samples 4"),
        (["--task", "QUESTIONS", "--k", "0"], "--k: 0 does not fit --samples 4"),
        (["--task", "QUESTIONS", "--temperature", "0"], "--temperature: 0 draws the greedy answer again and again"),
        (["--task", "QUESTIONS", "--problems", "7", "--whole"], "has 6 questions, not 7: lower --problems"),
        (["--task", "QUESTIONS", "--problems", "7"], "or take all questions by --whole"),
        (["--task", "QUESTIONS", "--batch-size", "4"], "--batch-size: it has no effect without --data or --lm-eval"),
        (["--lm-eval", "whales", "--speculation"], "--speculation: it has no effect without text or questions"),
        (["--lm-eval", "whales", "--whole"], "--whole: it has no effect without text or questions: give --data"),
        (["--task", "QUESTIONS", "--rows", "2"], "--rows: it has no effect without --data: give both, or leave it out"),
        (["--task", "QUESTIONS", "--data-split", "test"], "--data-split: it has no effect without --data"),
        (["--data", "TEXT", "--limit", "9"], "--limit: it has no effect without --lm-eval"),
        (["--data", "TEXT", "--temperature", "0"], "--temperature: it has no effect without --task"),
        (["--lm-eval", "whales", "--k", "1"], "--k: it has no effect without --task"),
        (["--lm-eval", "whales", "--include-path", "nowhere"], "--include-path: nowhere is no folder"),
        (["--data", "TEXT", "--precision", "fp8"], "--precision: 'fp8' is none of auto, fp32, bf16"),
        (["--data", "TEXT", "--out", "nowhere/found.json"], "--out: nowhere/found.json is no new file"),
        (["--data", "TEXT", "--row", "1"], "unknown option --row (did you mean --rows?)"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_mistakes_are_one_line(argv, message, small_checkpoint, text_folder, questions, capsys):
    given = {"TEXT": str(text_folder), "QUESTIONS": questions}
    assert message in refused(capsys, small_checkpoint, *(given.get(word, word) for word in argv))


def test_all_questions_are_asked_for_only_where_the_held_out_ones_are_too_few(small_checkpoint, tmp_path, capsys):
    rows = [{"question": f"What is {i}?", "answer": str(i)} for i in range(100)]
    (tmp_path / "many.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    n = sum(is_held_out(row["question"]) for row in rows)
    asked = ["--task", tmp_path / "many.jsonl", "--whole", "--problems", n]
    assert f"has at least {n} held-out questions: leave it out" in refused(capsys, small_checkpoint, *asked)
    small = ["--samples", 1, "--max-new-tokens", 2, "--device", "cpu"]
    assert f"{n + 1} problems, 1 samples" in run(capsys, small_checkpoint, *asked[:-1], n + 1, *small)


def test_no_checkpoint(text_folder, tmp_path, capsys):
    assert "nowhere is no folder" in refused(capsys, tmp_path / "nowhere", "--data", text_folder)


def test_a_tokenizer_of_another_vocabulary(small_checkpoint, text_folder, tmp_path, capsys):
    folder = shutil.copytree(small_checkpoint, tmp_path / "mixed")
    train_tokenizer(
        [path.read_text() for path in text_folder.iterdir()] + ["abc def ghi jkl"] * 9, 400
    ).save_pretrained(folder)
    assert "the tokenizer is of another vocabulary" in refused(capsys, folder, "--data", text_folder)


def test_a_model_without_modules_drafts_nothing(tiny_model, small_tokenizer, text_folder, tmp_path, capsys):
    tiny_model(vocab_size=len(small_tokenizer), eos_token_id=small_tokenizer.eos_token_id).save_pretrained(tmp_path)
    small_tokenizer.save_pretrained(tmp_path)
    line = refused(capsys, tmp_path, "--data", text_folder, "--speculation")
    assert "has no MTP modules" in line
    assert "MTP" not in run(capsys, tmp_path, "--data", text_folder)


def test_results_are_never_overwritten(small_checkpoint, text_folder, tmp_path, capsys):
    before = tmp_path / "before.json"
    before.write_text("{}")
    assert "before.json is no new file" in refused(capsys, small_checkpoint, "--data", text_folder, "--out", before)
    assert before.read_text() == "{}"
