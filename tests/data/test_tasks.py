"""Tests tasks: the split of questions, right and wrong answers, demonstrations, and impossible specs."""

import itertools
import json
import os

import datasets
import pytest

from moonwhale import files
from moonwhale.data import gym_answers, opening
from moonwhale.data.answers import same_answer
from moonwhale.data.expressions import parse_expression
from moonwhale.data.loading import load_source
from moonwhale.data.tasks import UNUSABLE, Problem, extract_answer, is_held_out, is_well_formed, load_task
from moonwhale.errors import UserError

SUMS = "chain_sum:max_terms=3:max_digits=2"


@pytest.fixture
def own_file(tmp_path):
    path = tmp_path / "own.jsonl"
    rows = [{"question": f"Half of {n}?", "answer": f"\\frac{{{n}}}{{2}}"} for n in range(1, 60)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_problems_depend_on_the_seed_alone():
    task = load_task(SUMS)
    first, again, other = (task.problems(50, seed) for seed in (1, 1, 2))
    assert first == again
    # In reasoning-gym, consecutive seeds share all questions except one.
    assert len({p.question for p in first} & {p.question for p in other}) < 10


def test_a_seed_whose_questions_would_be_those_of_another_is_refused():
    with pytest.raises(UserError, match=r"^`seed`: 2147483648 is impossible: a task of reasoning-gym takes seeds"):
        load_task(SUMS).problems(1, 2**31)


def test_no_question_is_in_training_and_held_out():
    task = load_task(SUMS)
    train, held_out = task.problems(1000, 0), task.problems(100, 0, held_out=True)
    assert not {p.question for p in train} & {p.question for p in held_out}
    assert not any(is_held_out(p.question) for p in train)


def test_settings_reach_the_task():
    assert all(p.question.count(" + ") + p.question.count(" - ") <= 2 for p in load_task(SUMS).problems(50))


def test_answers_are_right_or_wrong_and_need_answer_tags():
    task = load_task(SUMS)
    problem = task.problems(1)[0]
    right = f"<think></think><answer> {problem.answer} </answer>"
    assert task.accuracy(problem, right) == 1
    assert task.accuracy(problem, f"<answer>It is {problem.answer}, I think</answer>") == 0  # the gym gives a part
    assert task.accuracy(problem, problem.answer) == 0
    assert task.accuracy(problem, "<answer>1</answer>" + right) == 1  # the last one counts


@pytest.mark.parametrize("name", ["chain_sum", "gcd", "spell_backward", "prime_factorization", "calendar_arithmetic"])
def test_demonstrations_are_right_and_junk_is_wrong(name):
    task = load_task(name)
    for problem in task.problems(5):
        shown = task.demonstrate(problem)
        assert is_well_formed(shown)
        assert task.accuracy(problem, shown) == 1
        assert task.accuracy(problem, f"<answer>{'9' * 40} or so…</answer>") == 0


def test_sums_are_demonstrated_step_by_step():
    problem = Problem("", "-4", {"metadata": {"expression": "4 - 1 - 7"}})
    assert load_task("chain_sum").steps(problem) == "4 - 1 = 3; 3 - 7 = -4"


@pytest.mark.parametrize(
    ("text", "well_formed"),
    [
        ("<think>so</think>\n<answer>4</answer>", True),
        (" <think></think><answer></answer>\n", True),
        ("<think>so</think> then <answer>4</answer>", False),
        ("<answer>4</answer><think>so</think>", False),
        ("<think>so</think><answer>4</answer><answer>5</answer>", False),
        ("<think><think>so</think><answer>4</answer>", False),
        ("<think>so</think><answer>4", False),
        ("Sure! <think>so</think><answer>4</answer>", False),
    ],
)
def test_form(text, well_formed):
    assert is_well_formed(text) == well_formed


def test_an_answer_without_an_end_takes_linear_time():
    assert extract_answer("<answer>" * 100_000) is None
    assert not is_well_formed("<think>" + "</think><answer>" * 20_000 + "</answer>" * 20_000)


def test_the_answer_is_the_text_in_the_last_answer_tags():
    assert extract_answer("<answer>1</answer> no <answer>\n2 </answer>") == "2"
    assert extract_answer("2") is None


def test_an_own_file_is_compared_as_mathematics(own_file):
    task = load_task(str(own_file))
    problem = task.problems(1)[0]
    number = int(problem.question.split()[-1][:-1])
    assert task.score(problem, str(number / 2)) == 1
    assert task.score(problem, str(number / 2 + 1)) == 0
    assert task.score(problem, "") == 0
    assert len(task.problems(40)) == 40
    with pytest.raises(UserError, match=r"own.jsonl has \d+ training questions, not 60: ask for fewer"):
        task.problems(60)


def test_gsm8k_is_read_and_compared(monkeypatch):
    row = {"question": "How many?", "answer": "He has 2*1,000=<<2*1000=2000>>2,000.\n#### 2,000"}
    splits = []

    def load_dataset(name, configuration, split):
        splits.append((name, configuration, split))
        return datasets.Dataset.from_list([row] * 3)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    task = load_task("gsm8k")
    problem = task.problems(3)[0]
    task.problems(1, held_out=True)
    assert splits == [("openai/gsm8k", "main", "train"), ("openai/gsm8k", "main", "test")]
    assert problem.answer == "2000"
    assert task.demonstrate(problem) == "<think>He has 2*1,000=2,000.</think>\n<answer>2000</answer>"
    assert task.score(problem, "2,000") == task.score(problem, "2000.0") == 1
    assert task.score(problem, "200") == 0


def test_a_task_is_a_source_of_conversations(own_file):
    source = load_source(f"task:{SUMS}", limit=5)
    conversations = list(source)
    assert [[m["role"] for m in c] for c in conversations] == [["user", "assistant"]] * 5
    assert all(is_well_formed(c[1]["content"]) and not is_held_out(c[0]["content"]) for c in conversations)
    assert source.fingerprint != load_source(f"task:{SUMS}", limit=6).fingerprint
    with pytest.MonkeyPatch.context() as patch:  # another version may ask other questions
        patch.setattr("importlib.metadata.version", lambda package: "99.0")
        assert source.fingerprint != load_source(f"task:{SUMS}", limit=5).fingerprint
    mixed = list(load_source(f"task:{SUMS}=0.5,task:{own_file}=0.5", limit=4))
    assert ["Half" in c[0]["content"] for c in mixed] == [False, True, False, True]


@pytest.mark.parametrize(
    ("spec", "complaint"),
    [
        ("chain_sums", "'chain_sums' is no task of reasoning-gym (did you mean chain_sum?)"),
        ("chain_sum:terms=3", "'terms=3' is no setting of chain_sum: it has min_terms, max_terms"),
        ("chain_sum:max_terms", "'max_terms' is no setting"),
        ("chain_sum:max_terms=1", "max_terms must be"),
        ("gsm8k:x=1", "gsm8k has no settings"),
        ("missing.jsonl", "cannot read missing.jsonl: No such file"),
    ],
)
def test_impossible_specs_are_one_line(spec, complaint):
    with pytest.raises(UserError) as error:
        load_task(spec)
    assert complaint in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("line", ["{", "[1]", '{"question": "x"}', '{"question": "x", "answer": 4}'])
def test_a_damaged_file_is_one_line(tmp_path, line):
    (tmp_path / "own.jsonl").write_text(line + "\n")
    with pytest.raises(UserError, match=r"own\.jsonl"):
        load_task(str(tmp_path / "own.jsonl"))


HOSTILE = {
    "values": ('{"question": "x", "answer": "4", "y": [1' + ",1" * 5000 + "]}", "it has more than 4,096 values"),
    "nested": ('{"question": ' + "[" * 4000, "it is a line that is not JSON"),
    "no text": ('{"question": "\udcff", "answer": "4"}', "is not UTF-8"),
    "length": ('{"question": "x", "answer": "' + "''" * 10_000 + '"}', "its answer has more than 16,384 characters"),
    "line": ('{"question": "' + "a" * (1 << 20) + '"}', "a line has more than 1,048,576 bytes"),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_a_hostile_file_is_refused_in_one_line(tmp_path, monkeypatch, kind):
    monkeypatch.setattr(files, "JSON_VALUES", 1 << 12)
    monkeypatch.setattr(opening, "MOST_AT_ONCE", 1 << 20)
    text, complaint = HOSTILE[kind]
    (tmp_path / "own.jsonl").write_text(text + "\n", errors="surrogateescape")
    with pytest.raises(UserError, match=f"^`task`: .*{complaint}") as error:
        load_task(str(tmp_path / "own.jsonl"))
    assert "\n" not in str(error.value) and len(str(error.value)) < 500


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir, lambda path: os.symlink("/dev/zero", path)])
def test_a_pipe_device_or_folder_is_no_task(tmp_path, make):
    make(tmp_path / "own.jsonl")
    with pytest.raises(UserError, match=r"^`task`: cannot read .*own\.jsonl: it is no plain file"):
        load_task(str(tmp_path / "own.jsonl"))


def test_of_an_own_file_only_texts_are_kept(tmp_path):
    rows = [{"question": str(n), "answer": "4", "steps": [1] * 9, "more": [1] * 99} for n in range(20)]
    (tmp_path / "own.jsonl").write_text("\n".join(map(json.dumps, [*rows, rows[0] | {"steps": "2 + 2 = 4"}])))
    problems = load_task(str(tmp_path / "own.jsonl")).problems(10)
    assert {tuple(problem.entry) for problem in problems} == {("steps",)}
    assert {problem.entry["steps"] for problem in problems} <= {"", "2 + 2 = 4"}


def test_a_setting_nested_without_an_end_is_text():
    with pytest.raises(UserError, match=r"^`task`: "):
        load_task("chain_sum:max_terms=" + "[" * 100_000)


@pytest.mark.parametrize("answer", ["Paris", "B", "(1,2)", "true", "北京", "Straße", "x²", "9^{9^{9}}", "."])
def test_the_right_answer_of_an_own_file_scores(tmp_path, answer):
    path = tmp_path / "words.jsonl"
    rows = [json.dumps({"question": f"a\u2028{n}", "answer": answer}, ensure_ascii=False) for n in range(20)]
    path.write_text("\ufeff" + "\n".join(rows), encoding="utf-8")
    task = load_task(str(path))
    problem = task.problems(1)[0]
    assert task.accuracy(problem, task.demonstrate(problem)) == 1


@pytest.mark.parametrize(
    ("right", "given", "same"),
    [
        ("Paris", " paris. ", True),
        ("Paris", r"\boxed{\text{Paris}}", True),
        ("Paris", "“Paris”", True),
        ("é", "e\u0301", True),
        ("x²", "x2", False),
        ("B", "C", False),
        (r"\Gamma", r"\gamma", False),
        ("5", "-5", False),
        ("1/2", "0.5", True),
    ],
)
def test_answers_are_compared_as_text_and_as_mathematics(right, given, same):
    assert same_answer(right, given) == same


@pytest.mark.parametrize("given", ["9^{9^{9}}", "$999999999!$"])
def test_an_endless_answer_is_wrong(given):
    assert not same_answer("4", given)
    assert same_answer("4", "8/2")  # by a new worker


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("2*(3 + 4) - 1/2", "27/2"),
        (" -x**2 + 3*x*y ", "3*x*y - x**2"),
        ("exp(2*x)/2 + C", "C + exp(2*x)/2"),
        ("sin(pi/2)", "1"),
        ("0.5", "0.5"),
    ],
)
def test_expressions_have_the_value_that_sympy_gives_them(text, value):
    import sympy

    assert parse_expression(text) == sympy.parse_expr(value) == sympy.parse_expr(text)


PROGRAMS = (
    "__import__('os') x.real [1] 'x' 1j True (lambda:1)() sin sin(x,y) eval(x) sin(x=1) f'{x}' x:=1 {x} x[0] 9**9**9 "
    "1<2 *x sympify(x) x@y x%y 1//2 () x;y"
)


@pytest.mark.parametrize("text", PROGRAMS.split())
def test_expressions_hold_nothing_that_runs(text):
    with pytest.raises((ValueError, SyntaxError)):
        parse_expression(text)


@pytest.mark.parametrize("answer", ["\\ud800", "1</answer> <answer>2"])
def test_an_answer_that_cannot_be_given_is_refused(tmp_path, answer):
    (tmp_path / "own.jsonl").write_text(f'{{"question": "x", "answer": "{answer}"}}\n')
    with pytest.raises(UserError, match=r"own\.jsonl, object 1"):
        load_task(str(tmp_path / "own.jsonl"))


@pytest.mark.parametrize("name", UNUSABLE)
def test_unusable_tasks_of_the_gym_are_refused(name):
    with pytest.raises(UserError, match=f"`task`: {name} .*: choose another task"):
        load_task(name)


def test_errors_of_a_task_that_is_data_name_that_option():
    for spec in ("task:chain_sums", "task:word_ladder", "task:nowhere.jsonl"):
        with pytest.raises(UserError, match=r"^`data`"):
            load_source(spec)


def programs(canary) -> list[str]:
    """Returns answers that write the file `canary` if they are evaluated, in each way that an evaluator might."""
    call = f"__import__('pathlib').Path({str(canary)!r}).touch()"
    lists = [f"[{call}]", f"[[{call}]]", f"[{call} for _ in [0]]", f"[x for x in [{call}]]"]
    return [call, *lists, f"(lambda: {call})()", f"1 + {call}", f"sin({call})", f"{call}=1", f'{{"a": {call}}}']


# The gym takes seconds to make a question of these, or refuses its own settings. The slow test below has them.
NOT_QUICK = "arc_agi codeio composite figlet_font gsm_symbolic group_anagrams knight_swap quantum_lock word_ladder"


def test_no_answer_to_the_gym_runs(tmp_path):
    import reasoning_gym
    from reasoning_gym.factory import DATASETS

    answers = programs(tmp_path / "canary")
    eval(answers[0])
    (tmp_path / "canary").unlink()  # the canary would have been written
    for name in DATASETS.keys() - UNUSABLE.keys() - set(NOT_QUICK.split()):
        entry = reasoning_gym.create_dataset(name, seed=0, size=gym_answers.QUESTIONS)[0]
        scores = [gym_answers.score_answer(name, {}, entry, answer) for answer in answers]
        assert all(score is not None and score < 1 for score in scores), name
        assert not (tmp_path / "canary").exists(), name


@pytest.mark.parametrize("name", ["spiral_matrix", "n_queens", "countdown", "puzzle24", "simple_integration"])
def test_tasks_whose_scorers_evaluate_answers_still_score(name):
    task = load_task(name)
    (problem,) = task.problems(1)
    assert task.accuracy(problem, task.demonstrate(problem)) == 1
    assert task.accuracy(problem, "<answer>9**9**9**9</answer>") == 0
    assert not task.overran


def test_an_endless_answer_to_the_gym_is_counted_and_not_tried_again(monkeypatch):
    monkeypatch.setattr(gym_answers._worker, "ask", lambda request: asked.append(request))
    task, asked = load_task("coin_flip"), []
    (problem,) = task.problems(1)
    endless = "<answer>1e999999999</answer>"
    for _ in range(2):
        assert task.accuracy(problem, endless) == 0
    assert len(asked) == 1
    assert task.ran_out(problem, endless) and not task.ran_out(problem, "<answer>1</answer>")


REFUSED = {
    "acre": "builds all its questions at once",
    "boxnet": "has no right answers to show",
    "composite": "Must specify at least one dataset",
    "game_of_life_halting": "scores every answer as right",
    "graph_color": "has no right answers to show",
    "propositional_logic": "has no right answers to show",
    "rubiks_cube": "has no right answers to show",
    "rush_hour": "has no right answers to show",
    "word_ladder": "Dataset size too large",
}


@pytest.mark.slow
def test_every_task_of_the_gym_scores_its_own_answers_or_is_refused_by_name(tmp_path):
    from reasoning_gym.factory import DATASETS

    refused = {}
    for name in DATASETS:
        try:
            task = load_task(name)
            scores = [task.accuracy(problem, task.demonstrate(problem)) for problem in task.problems(2)]
            assert scores == [1, 1], name
            for problem, answer in itertools.product(task.problems(1), programs(tmp_path / "canary")):
                assert task.score(problem, answer) is not None, name
                assert not (tmp_path / "canary").exists(), name
        except UserError as error:
            refused[name] = str(error)
    assert refused.keys() == REFUSED.keys()
    for name, reason in REFUSED.items():
        assert f"{name}" in refused[name] and reason in refused[name] and "choose another task" in refused[name]
