"""lm-eval gets from the server what it gets from the checkpoint itself, by `moonwhale eval`."""

import json
import logging
import re
from pathlib import Path

import pytest

from moonwhale.evaluate.harness import HarnessTasks
from moonwhale.serve.app import create_app
from serving import NAME, Running

pytestmark = [
    pytest.mark.contract("OpenAI clients and endpoints", "lm-eval (local-completions, local-chat-completions)"),
    pytest.mark.filterwarnings("ignore"),
]
pytest.importorskip("lm_eval")
pytest.importorskip("tenacity", reason="lm-eval's API models need its extra: pip install 'moonwhale[eval]'")

QUESTIONS = ["The whale sang", "The moon sang back, and", "Ünï", "the moon " * 5, "A", "sang. The whale"]
CHOICES = ["to the moon", "back", "Ünïcode!", "a whale and a whale"]
LENGTH = 12  # tokens of an answer
TASK = """task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {folder}/rows.jsonl}}}}
test_split: test
output_type: {kind}
"""
KINDS = {
    "choose": (
        "multiple_choice",
        'doc_to_text: "{{q}}"\ndoc_to_choice: "{{choices}}"\ndoc_to_target: right\n'
        "metric_list: [{metric: acc}, {metric: acc_norm}]\n",
    ),
    "read": (
        "loglikelihood_rolling",
        'doc_to_text: ""\ndoc_to_target: "{{q}}"\nmetric_list: [{metric: bits_per_byte}, {metric: word_perplexity}]\n',
    ),
    "write": (
        "generate_until",
        f'doc_to_text: "{{{{q}}}}"\ndoc_to_target: "{{{{text}}}}"\n'
        f'generation_kwargs: {{until: ["mo"], max_gen_toks: {LENGTH}, do_sample: false}}\n'
        "metric_list: [{metric: exact_match}]\n",
    ),
    "chat": (
        "generate_until",
        'doc_to_text: "{{q}}"\ndoc_to_target: "{{said}}"\n'
        f"generation_kwargs: {{until: [], max_gen_toks: {LENGTH}}}\nmetric_list: [{{metric: exact_match}}]\n",
    ),
}


@pytest.fixture(scope="module")
def engine(small_engine):
    return small_engine()


@pytest.fixture(scope="module")
def url(engine, small_checkpoint):
    with Running(create_app(engine, NAME, small_checkpoint)) as server:
        yield server.url + "/v1"


@pytest.fixture(scope="module")
def folder(engine, tmp_path_factory):
    """A folder with a task of each kind. The answers of four of the six rows are the model's own."""
    folder = tmp_path_factory.mktemp("tasks")
    own = {
        "text": engine.generate(QUESTIONS, temperature=0, max_new_tokens=LENGTH, stop=["mo"]),
        "said": engine.generate(
            [[{"role": "user", "content": q}] for q in QUESTIONS], temperature=0, max_new_tokens=LENGTH
        ),
    }
    with open(folder / "rows.jsonl", "w") as file:
        for i, question in enumerate(QUESTIONS):
            answers = {key: completions[i].text if i % 3 else "wrong" for key, completions in own.items()}
            file.write(json.dumps({"q": question, "choices": CHOICES, "right": i % 4} | answers) + "\n")
    for name, (kind, text) in KINDS.items():
        (folder / f"{name}.yaml").write_text(TASK.format(name=name, folder=folder, kind=kind) + text)
    return folder


@pytest.fixture(scope="module")
def figures(folder):
    """`figures(model, arguments, tasks)` returns lm-eval's figures over the server."""
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    def figures(model: str, arguments: str, tasks: list[str], **options) -> dict:
        manager = TaskManager(include_path=str(folder), include_defaults=False)
        arguments = f"model={NAME},max_retries=1,{arguments}"
        found = simple_evaluate(
            model, model_args=arguments, tasks=tasks, task_manager=manager, bootstrap_iters=0, **options
        )
        return {
            name: {key.removesuffix(",none"): value for key, value in values.items() if key.endswith(",none")}
            for name, values in found["results"].items()
        }

    return figures


@pytest.fixture(scope="module")
def expected(folder, small_model, small_tokenizer):
    """The figures of `moonwhale eval --lm-eval`, which reads the checkpoint."""
    tasks = HarnessTasks(["choose", "read", "write"], str(folder))
    return tasks.run(small_model, small_tokenizer, batch_size=3)


def assert_equal(found: dict, expected: dict) -> None:
    for task, values in found.items():
        for key in ("acc", "acc_norm", "bits_per_byte", "word_perplexity", "exact_match"):
            assert (key in values) == (key in expected[task])
            assert key not in values or values[key] == pytest.approx(expected[task][key], rel=1e-5)


def printed(model: str, url: str, checkpoint) -> str:
    """Returns the `--model_args` of docs/evaluation.md for a model of lm-eval, with our server and checkpoint."""
    page = (Path(__file__).parents[2] / "docs" / "evaluation.md").read_text(encoding="utf-8")
    [arguments] = re.findall(rf"^lm-eval run .*--model {model} .*--model_args model=demo,(\S+)$", page, re.MULTILINE)
    own = {"runs/demo": checkpoint, "http://127.0.0.1:8000/v1": url, "max_length=1024": "max_length=96"}
    for there, here in own.items():
        arguments = arguments.replace(there, str(here))
    return arguments


@pytest.mark.parametrize("options", ["", ",batch_size=4,num_concurrent=2"])
def test_local_completions(url, figures, expected, small_checkpoint, options):
    """`add_bos_token` begins each text as documents begin in training."""
    arguments = printed("local-completions", url, small_checkpoint) + options
    found = figures("local-completions", arguments, ["choose", "write"])
    assert_equal(found, expected)
    assert expected["write"]["exact_match"] == pytest.approx(4 / 6)
    assert 0 < found["choose"]["acc"] < 1


def test_a_rolling_likelihood_needs_no_bos_of_the_tokenizer(url, figures, expected, small_checkpoint):
    """lm-eval puts one before each text itself."""
    arguments = printed("local-completions", url, small_checkpoint).replace(",add_bos_token=True", "")
    assert_equal(figures("local-completions", arguments, ["read"]), expected)


def test_local_completions_with_text_prompts(url, figures, expected, small_checkpoint):
    """The server itself puts bos before a text, whatever the tokenizer does."""
    arguments = f"base_url={url}/completions,tokenizer={small_checkpoint},max_length=96,tokenized_requests=False"
    assert_equal(figures("local-completions", arguments, ["choose", "write"]), expected)


def test_the_likelihoods_themselves(url, small_checkpoint, small_model, small_tokenizer):
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM
    from lm_eval.models.openai_completions import LocalCompletionsAPI

    pairs = [(question, f" {choice}") for question in QUESTIONS for choice in CHOICES] + [("", "The whale")]
    requests = [Instance("loglikelihood", {}, pair, i) for i, pair in enumerate(pairs)]
    options = {"tokenizer": str(small_checkpoint), "add_bos_token": True, "max_length": 96}
    theirs = LocalCompletionsAPI(f"{url}/completions", model=NAME, **options).loglikelihood(requests)
    own = HFLM(pretrained=small_model, tokenizer=small_tokenizer, add_bos_token=True, max_length=96)
    for (logprob, greedy), (wanted, is_greedy) in zip(theirs, own.loglikelihood(requests), strict=True):
        assert logprob == pytest.approx(wanted, abs=1e-3) and greedy == is_greedy


def test_local_chat_completions(url, figures, small_checkpoint):
    arguments = printed("local-chat-completions", url, small_checkpoint)
    found = figures("local-chat-completions", arguments, ["chat"], apply_chat_template=True)
    assert found["chat"]["exact_match"] == pytest.approx(4 / 6)


def test_a_refusal_reaches_the_user(url, figures, small_checkpoint, caplog):
    arguments = f"base_url={url}/completions,tokenizer={small_checkpoint},add_bos_token=True,max_length=96"
    with pytest.raises(Exception, match="400"), caplog.at_level(logging.WARNING, logger="lm_eval"):
        figures("local-completions", arguments, ["write"], gen_kwargs="num_beams=2")
    assert "num_beams: this server does not know this field: leave it out" in caplog.text
