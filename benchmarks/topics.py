"""Does a chat model stay on the topic of a question?

    python benchmarks/topics.py CHECKPOINT [CHECKPOINT ...]

Each question of topics.txt is asked on its own, as the first turn of a conversation, five times (temperature 0.5, seeds
0 to 4). The rule was written before the models were trained:

- An answer is on the topic if it has one of the question's words in topics.txt, where `*` stands for any ending.
- A question counts if at least three of its five answers are on the topic.
- The control: every answer is also judged by the words of the 19 other questions: a common word can occur anywhere.

Keys of the answer (results/topics.json), each with one value per checkpoint, named as its folder:
    questions_on_topic: how many of the questions count.
    answers_on_topic, control: the share of answers on the topic, by the words of their own question and of the others.
    answers: for each question, the five answers.
"""

import re
from pathlib import Path
from statistics import mean

from common import environment, options, write
from moonwhale.infer.engine import Engine

SEEDS, NEEDED = 5, 3
SAMPLING = {"temperature": 0.5, "max_new_tokens": 80}


def read_topics(path: Path) -> dict[str, re.Pattern]:
    """Returns the questions, each with a pattern of its words. A line is a question, a bar, and words with commas."""
    topics = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        question, _, words = line.partition("|")
        alternatives = "|".join(re.escape(word.strip()).replace(r"\*", r"\w*") for word in words.split(","))
        topics[question.strip()] = re.compile(rf"\b(?:{alternatives})\b", re.IGNORECASE)
    return topics


def judge(topics: dict[str, re.Pattern], answers: dict[str, list[str]]) -> dict:
    """Counts the questions and answers on the topic, and the control."""
    own = {question: [bool(topics[question].search(a)) for a in answers[question]] for question in topics}
    others = [
        bool(topics[other].search(answer))
        for question in topics
        for answer in answers[question]
        for other in topics
        if other != question
    ]
    return {
        "questions_on_topic": sum(sum(hits) >= NEEDED for hits in own.values()),
        "answers_on_topic": round(mean(hit for hits in own.values() for hit in hits), 3),
        "control": round(mean(others), 3),
    }


def ask(checkpoint: Path, questions: list[str]) -> dict[str, list[str]]:
    """Returns the answers of a checkpoint to each question."""
    engine = Engine.load(checkpoint)
    prompts = {question: [[{"role": "user", "content": question}]] * SEEDS for question in questions}
    return {
        question: [completion.text for completion in engine.generate(rows, seed=0, **SAMPLING)]  # row i has seed i
        for question, rows in prompts.items()
    }


def main(argv: list[str] | None = None) -> None:
    parser = options(__doc__.partition("\n")[0])
    parser.add_argument("checkpoints", metavar="CHECKPOINT", type=Path, nargs="+", help="folder of a chat model")
    args = parser.parse_args(argv)
    topics = read_topics(Path(__file__).with_name("topics.txt"))
    result: dict[str, dict] = {"questions_on_topic": {}, "answers_on_topic": {}, "control": {}}
    answers = {}
    for checkpoint in args.checkpoints:
        answers[checkpoint.name] = ask(checkpoint, list(topics))
        for key, value in judge(topics, answers[checkpoint.name]).items():
            result[key][checkpoint.name] = value
    result |= {"questions": len(topics), "environment": environment("fp32", allocator_tuned=False)}
    write(args.results, "topics", result, answers=answers)


if __name__ == "__main__":
    main()
