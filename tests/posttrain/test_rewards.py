"""Tests the values of rewards, and the messages when a user's own reward fails."""

import math
import sys

import pytest

from moonwhale.data.tasks import load_task
from moonwhale.errors import UserError
from moonwhale.posttrain.rewards import language, length_rewards, load_rewards, script_of, well_formed

TASK = load_task("chain_sum:max_terms=2")
PROBLEMS = TASK.problems(2)
RIGHT = [f"<think>so</think><answer>{p.answer}</answer>" for p in PROBLEMS]


def said(*texts):
    return [[{"role": "assistant", "content": text}] for text in texts]


def pay(spec, completions, **columns):
    (reward,), weights = load_rewards([spec], TASK, PROBLEMS)
    n = len(completions)
    prompts = [[{"role": "user", "content": f"question {i}"}] for i in range(n)]
    ids = [[0] * len(c[0]["content"]) for c in completions]
    return reward(prompts=prompts, completions=completions, completion_ids=ids, **columns), weights


@pytest.fixture
def mine(tmp_path, monkeypatch):
    """Puts a module with the user's rewards into the working folder."""
    (tmp_path / "mine.py").write_text(
        "import math\n"
        "def short(completions, **_): return [1.0 / len(c[0]['content']) for c in completions]\n"
        "def picky(completions, **_): return [1 / (c[0]['content'] != 'bad') for c in completions]\n"
        "def nan(completions, **_): return [math.nan if c[0]['content'] == 'bad' else 1.0 for c in completions]\n"
        "def few(completions, **_): return [1.0]\n"
        "def none(completions, **_): return [None for _ in completions]\n"
        "constant = 3\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delitem(sys.modules, "mine", raising=False)


def test_accuracy_is_the_tasks_own():
    paid, weights = pay("accuracy=2", said(RIGHT[0], RIGHT[0], RIGHT[1]), problem=[0, 1, 1])
    assert paid == [1, float(PROBLEMS[0].answer == PROBLEMS[1].answer), 1] and weights == [2.0]


def test_format_ignores_the_answer_itself():
    assert well_formed(said("<think>a</think><answer>junk</answer>", "4")) == [1, 0]


def test_language_rewards_the_prompts_script():
    prompts = [[{"role": "user", "content": text}] for text in ("How many whales?", "Сколько китов?", "2 + 2")]
    assert language(prompts, said("two whales, два кита", "два кита", "whatever")) == [0.5, 1.0, 1.0]
    assert language(prompts[:1], said("4 = 4")) == [1.0]
    assert language([[{"role": "user", "content": "Привет hello"}]], said("hello")) == [0.0]  # the first of two
    assert script_of("1а") == "CYRILLIC" and script_of("鲸") == "CJK" and script_of("12") is None


def test_length_prefers_short_right_answers_and_ignores_wrong_ones():
    assert length_rewards([1, 1, 0, 0], [10, 30, 10, 20], ["a"] * 4) == [0.5, -0.5, 0.0, 0.0]
    assert length_rewards([1, 0], [10, 10], ["a", "a"]) == [0.0, 0.0]
    assert length_rewards([1, 1], [10, 30], ["a", "b"]) == [0.0, 0.0]  # each completion is its own group
    paid, _ = pay("length", said(RIGHT[0], RIGHT[0] + " " * 10), problem=[0, 0])
    assert paid == [0.5, -0.5]


def test_a_users_own_function_is_called(mine):
    assert pay("mine:short=0.5", said("ab", "abcd")) == ([0.5, 0.25], [0.5])
    assert pay("mine:none", said("ab")) == ([None], [1.0])  # for TRL: the reward does not apply


@pytest.mark.parametrize(
    ("spec", "complaint"),
    [
        (
            "mine:picky",
            "mine:picky raised ZeroDivisionError (division by zero) on prompt 'question 1', completion 'bad'",
        ),
        ("mine:nan", "mine:nan returned nan on prompt 'question 1', completion 'bad'"),
        ("mine:few", "mine:few must return a list of 2 numbers, one for each completion"),
    ],
)
def test_a_failing_function_names_itself_prompt_and_completion(mine, spec, complaint):
    with pytest.raises(UserError) as error:
        pay(spec, said("good", "bad"))
    assert complaint in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("spec", "complaint"),
    [
        (["acuracy"], "'acuracy' is none of accuracy, format, language, length (did you mean accuracy?)"),
        (["accuracy=much"], "the weight of accuracy is 'much'"),
        (["accuracy=inf"], "give a finite number"),
        (["format", "format=2"], "format is given twice"),
        (["mine:missing"], "cannot import mine:missing"),
        (["mine:constant"], "mine:constant is not a plain function"),
        (["no_such_module:f"], "cannot import no_such_module:f"),
        ([], "give at least one of"),
    ],
)
def test_impossible_rewards_are_one_line(mine, spec, complaint):
    with pytest.raises(UserError) as error:
        load_rewards(spec, TASK, PROBLEMS)
    assert complaint in str(error.value)


def test_weights_follow_the_order_of_the_rewards():
    rewards, weights = load_rewards(["accuracy", "format=0.2", "length=-1"], TASK, PROBLEMS)
    assert [r.__name__ for r in rewards] == ["accuracy", "format", "length"] and weights == [1.0, 0.2, -1.0]
    assert not any(map(math.isnan, weights))


@pytest.mark.parametrize("values", ["[np.float32(1), None]", "[True, None]", "[torch.tensor(1.0), None]", "(1, None)"])
def test_numbers_of_all_kinds_are_rewards(mine, tmp_path, values):
    (tmp_path / "mine.py").write_text(f"import numpy as np, torch\ndef f(completions, **_): return {values}\n")
    assert pay("mine:f", said("a", "b"))[0] == [1.0, None]


@pytest.mark.parametrize("value", ["'1'", "np.nan", "[1]", "1j"])
def test_what_is_no_number_is_no_reward(mine, tmp_path, value):
    (tmp_path / "mine.py").write_text(f"import numpy as np\ndef f(completions, **_): return [{value}]\n")
    with pytest.raises(UserError, match="mine:f returned"):
        pay("mine:f", said("a"))
