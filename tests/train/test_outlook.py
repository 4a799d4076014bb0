"""What a run says about its plan, and how long it says that it will take."""

import re
import threading
from itertools import islice
from types import SimpleNamespace

import pytest
from transformers import TrainerState

from moonwhale.train import callbacks, pretrain
from moonwhale.train.callbacks import ProgressLines, StepClock
from moonwhale.train.config import TrainConfig
from moonwhale.train.mtp_trainer import MTPTrainer
from moonwhale.train.outlook import describe_run, steps_within, tokens_after
from moonwhale.units import duration


@pytest.mark.parametrize(
    ("steps", "said"),
    [
        (10, "10 steps of 4,096 tokens, 0.4 passes over the text, into runs/demo$"),
        (25, ", 1 pass over the text, into runs/demo$"),
        (110, "4.4 passes over the text, into runs/demo$"),
        (
            125,
            "reads the text 5 times: up to 4 passes .* teach less and less .*: give more `data`, or make the run",
        ),
        (400, "16 passes .*\nwarning    the run reads the text 16 times.* teach less and less"),
        (4500, "180 passes .*\nwarning    the run reads the text 180 times.* add almost nothing after 16"),
    ],
)
def test_many_passes_are_warned_of(steps, said):
    config = TrainConfig.resolve({"steps": steps})
    assert re.search(said, describe_run(config, 200), re.DOTALL)
    assert ("warning" in describe_run(config, 200)) == (steps > 110)


@pytest.mark.parametrize(
    ("replicas", "steps", "rows"),
    [(1, 9, 36), (1, 10, 38), (1, 14, 54), (1, 20, 76), (2, 9, 36), (2, 14, 56)],
)
def test_the_last_step_of_an_epoch_reads_fewer_tokens(tiny_run, replicas, steps, rows):
    """Of 39 rows, one device reads 19 micro-batches of 2 in 10 steps, and two devices read 9 each in 9 steps."""
    config = tiny_run()
    assert tokens_after(steps, config, 39, replicas) == rows * config.context


@pytest.mark.parametrize("n_rows", [3, 7, 24, 25, 40])
@pytest.mark.parametrize("per_step", [1, 4, 30])
def test_tokens_are_those_of_each_step(n_rows, per_step):
    """Micro-batches have three rows of ten tokens."""
    config = SimpleNamespace(batch_size=3, context=10, tokens_per_step=30 * per_step)
    micro_batches = range(n_rows // 3)
    epoch = [30 * len(micro_batches[first : first + per_step]) for first in micro_batches[::per_step]]
    read = [sum(islice(epoch * 20, steps)) for steps in range(20)]
    assert [tokens_after(steps, config, n_rows) for steps in range(20)] == read
    for tokens in range(0, read[-1], 5):
        assert steps_within(tokens, config, n_rows) == sum(after <= tokens for after in read[1:])


def test_a_step_cannot_read_more_than_the_text():
    config = TrainConfig.resolve({"preset": "small", "steps": 10})  # 128 rows a step, in micro-batches of 16
    assert "10 steps of 65,536 tokens, 8 passes over the text" in describe_run(config, 20)


def test_a_run_counts_the_tokens_that_it_has_read(tiny_run, monkeypatch, capsys):
    read, step = [], MTPTrainer.training_step

    def training_step(self, model, inputs, *args):
        read.append(inputs["input_ids"].numel())
        return step(self, model, inputs, *args)

    monkeypatch.setattr(MTPTrainer, "training_step", training_step)
    pretrain.train(tiny_run(steps=4, tokens_per_step=1600))
    assert f"done       4 steps, {sum(read):,} tokens; " in capsys.readouterr().out
    assert sum(read) < 4 * 1600


@pytest.mark.parametrize(
    ("options", "warned"),
    [
        ({"warmup_steps": 50}, True),
        ({"warmup_steps": 49}, False),
        ({"decay_fraction": 1.0}, False),  # no warm-up either: the rate falls from its peak, as some like it
        ({"warmup_steps": 90, "schedule": "cosine"}, False),
    ],
)
def test_a_schedule_without_room_is_warned_of(options, warned):
    config = TrainConfig.resolve({"steps": 100, "decay_fraction": 0.5, **options})
    warning = "warning    the learning rate never stays at its peak: warm-up takes 50 and decay 50 of all 100 steps"
    assert (warning in describe_run(config, 10_000)) == warned


def test_the_time_left_is_measured_after_the_first_step(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(callbacks.time, "monotonic", lambda: now[0])
    clock = StepClock()
    assert clock.left(20) is None
    clock.tick(7)  # resumed after step 6
    assert clock.left(20) is None
    now[0] += 12
    clock.tick(10)
    assert clock.timed == 1 and clock.left(20) == 40


@pytest.mark.parametrize(("seconds_each", "told_after"), [(1.0, 11), (15.0, 3), (60.0, 2)])
def test_the_time_is_told_within_a_long_step(monkeypatch, capsys, seconds_each, told_after):
    """Of 64 micro-batches, after ten that were timed, or after 20 seconds. `told_after` counts the first one, too."""
    now = [100.0]
    monkeypatch.setattr(callbacks.time, "monotonic", lambda: now[0])
    args = SimpleNamespace(gradient_accumulation_steps=64)
    state = TrainerState(global_step=0, max_steps=10)
    lines = ProgressLines(lambda logs: None)
    for micro_batch in range(1, 63):
        now[0] += seconds_each
        lines.on_substep_end(args, state, None)
        said = capsys.readouterr().out
        assert bool(said) == (micro_batch == told_after)
        if said:
            left = seconds_each * (640 - told_after)
            assert said == f"time       {duration(left)} for the steps to come\n"


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.2, "0 s"), (59.6, "1 min"), (200, "3 min 20 s"), (3600, "1 h"), (7500, "2 h 5 min"), (525_600, "6 days 2 h")],
)
def test_durations(seconds, text):
    assert duration(seconds) == text


def test_a_run_tells_its_time_and_may_be_in_a_thread(tiny_run, capsys):
    """As when a notebook's cell draws curves while the run goes on."""
    config = tiny_run(steps=12, log_every=4)
    thread = threading.Thread(target=pretrain.train, args=(config,))
    thread.start()
    thread.join()
    said = capsys.readouterr().out
    assert "warning    the run reads" not in said
    assert re.search(r"^time       \d+ s for the steps to come$", said, re.MULTILINE)
    assert re.search(r"^step      8  loss .* \d+ s left$", said, re.MULTILINE)
    assert not re.search(r"^step     (1|12)  .* left$", said, re.MULTILINE)
    assert "done       12 steps" in said
