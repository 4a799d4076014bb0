"""A training step forces no host sync. On a GPU every sync would wait for all the work queued before it.

The tests run on a CPU that takes the GPU's paths, under a mode that raises on every operation that would sync.
"""

from contextlib import ExitStack
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from transformers import TrainerControl

from host_sync import NoHostSync
from moonwhale import fp8, precision
from moonwhale.checkpoint import list_checkpoints, step_of
from moonwhale.errors import UserError
from moonwhale.model import core, documents, flex, loss, moba, routed
from moonwhale.optim.muonclip import MuonClip, param_groups
from moonwhale.optim.step_hooks import attach_hooks
from moonwhale.train import callbacks, muonclip_trainer, pretrain, run
from moonwhale.train.mtp_trainer import MTPTrainer

TOKENS = torch.arange(128).view(2, 64) * 7 % 61
DOCUMENTS = torch.tensor([[*range(17), *range(47)], [*range(64)]])


def dense(q, k, v, scale, mask):
    """Compute what flex_attention computes. As in flex_attention, a query that sees no key gives no NaN."""
    index = (torch.arange(n)[(..., *[None] * (3 - i))] for i, n in enumerate((*q.shape[:3], k.shape[2])))
    logits = (q @ k.mT * scale).masked_fill(~mask.mask_mod(*index), -1e9)
    return logits.softmax(-1) @ v, logits.logsumexp(-1), logits.amax(-1)


@pytest.fixture
def as_on_a_gpu(monkeypatch):
    for module in (documents, loss, moba, routed, muonclip_trainer):
        monkeypatch.setattr(module, "needs_static_shapes", lambda device: True)
    monkeypatch.setattr(core, "flex_serves", lambda q, layout: True)
    monkeypatch.setattr(flex, "_compiled", lambda: flex._attention)
    monkeypatch.setattr(flex, "_has_flex", lambda q, v: True)
    monkeypatch.setattr(flex, "_flex", dense)
    monkeypatch.setattr(flex, "FLEX_TILE", 8)


def make_step(model):
    """Return a function that runs forward, backward and an optimizer step with its hooks."""
    optimizer = MuonClip(param_groups(model, lr=1e-3))
    hooks = attach_hooks(optimizer, model, qk_clip_tau=1.0)

    def step():
        out = model(TOKENS, position_ids=DOCUMENTS, labels=TOKENS, num_items_in_batch=torch.tensor([100, 98, 96]))
        out.loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return [out.loss.detach(), norm, hooks.last["max_logits"], hooks.last["loads"]]

    return step


@pytest.fixture
def model(tiny_model):
    sparse = {"moba_topk": 2, "moba_block_size": 8, "moba_full_attention_layers": [1], "num_nextn_predict_layers": 2}
    return lambda: tiny_model(num_hidden_layers=3, first_k_dense_replace=1, **sparse).train()


@pytest.mark.parametrize(("context", "recipe"), [("short", None), ("long", None), ("long", "blockwise")])
def test_a_step_never_syncs(context, recipe, model, as_on_a_gpu, monkeypatch):
    monkeypatch.setattr(flex, "LONG_CONTEXT", 0 if context == "long" else 99)
    model = model()
    if recipe:
        fp8.convert(model, recipe, emulate=True)
    step = make_step(model)
    step()  # creates the optimizer's state
    with NoHostSync():
        step()


def test_the_gpu_paths_compute_the_same_as_the_cpu_paths(model, as_on_a_gpu, monkeypatch):
    monkeypatch.setattr(flex, "LONG_CONTEXT", 0)
    step = make_step(model())
    found = [step(), step()]
    monkeypatch.undo()
    step = make_step(model())
    torch.testing.assert_close(found, [step(), step()], rtol=1e-3, atol=1e-4)


def test_the_cpu_paths_do_sync(model):
    with NoHostSync(), pytest.raises(AssertionError, match="_local_scalar_dense"):
        make_step(model())()


@pytest.fixture
def in_steps_3_and_4(monkeypatch):
    """`in_steps_3_and_4(context)` makes a Trainer run its third and fourth step in that context."""
    with ExitStack() as stack:

        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step == 2:
                stack.enter_context(context)
            if state.global_step == 4:
                stack.close()
            return original(self, args, state, control, **kwargs)

        def in_steps_3_and_4(given):
            nonlocal context
            context = given

        context, original = None, muonclip_trainer._MuonClipCallback.on_step_begin
        monkeypatch.setattr(muonclip_trainer._MuonClipCallback, "on_step_begin", on_step_begin)
        yield in_steps_3_and_4


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_trainer_does_not_sync_between_log_lines(precision, tiny_run, as_on_a_gpu, in_steps_3_and_4):
    """Steps without a log line force no host sync, from loading data to the Trainer's work after the optimizer step."""
    refuses = NoHostSync()
    in_steps_3_and_4(refuses)
    pretrain.train(tiny_run(precision=precision, log_every=10))


def test_a_trainer_that_syncs_is_detected(tiny_run, as_on_a_gpu, in_steps_3_and_4, monkeypatch):
    monkeypatch.setattr(muonclip_trainer, "needs_static_shapes", lambda device: False)
    in_steps_3_and_4(NoHostSync())
    with pytest.raises(AssertionError, match="tolist waits"):
        pretrain.train(tiny_run(log_every=10))


@pytest.mark.parametrize(
    ("asked", "finds"), [({"log_every": 4}, None), ({"save_every": 2}, 2), ({"eval_every": 4}, None)], ids=str
)
def test_a_nan_is_found_before_it_is_logged_or_saved(asked, finds, tiny_run, as_on_a_gpu, monkeypatch):
    """A NaN raises an error before the next log line, checkpoint or evaluation.

    The loss of the third step is NaN, so all weights are NaN from then on. The first step is always logged.
    """
    compute, steps = MTPTrainer.compute_loss, []

    def compute_loss(self, *args, **kwargs):
        steps.append(self.state.global_step + 1)
        return compute(self, *args, **kwargs) * (torch.nan if steps[-1] == 3 else 1.0)

    monkeypatch.setattr(MTPTrainer, "compute_loss", compute_loss)
    config = tiny_run(**{"log_every": 10} | asked)
    with pytest.raises(UserError, match=r"^step 3: the loss is nan; " + ("the last" if finds else "no checkpoint")):
        pretrain.train(config)
    assert steps[-1] == 4, "it goes on until there is something to say"
    assert [step_of(found) for found in list_checkpoints(config.out)] == ([finds] if finds else [])


@pytest.mark.parametrize("on_gpus", [True, False], ids=["GPUs", "CPUs"])
@pytest.mark.parametrize("own", [True, False], ids=["this rank", "the other rank"])
def test_ranks_agree_on_a_stop(own, on_gpus, monkeypatch):
    """One of two ranks is asked to stop in step 2. On GPUs both stop in step 3: to know the answer in the step itself,
    they would have to sync.
    """
    stop, stopped = callbacks.StopAtStepEnd(), []
    args = SimpleNamespace(device=torch.device("cpu"), gradient_accumulation_steps=1)
    monkeypatch.setattr(callbacks, "needs_static_shapes", lambda device: on_gpus)
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_world_size", lambda: 2)
    monkeypatch.setattr(dist, "all_reduce", lambda requested, op: requested.clamp_(min=float(step > 1 and not own)))
    for step in (1, 2, 3):
        stop.stop_requested |= own and step == 2
        control = TrainerControl()
        stop.on_step_end(args, SimpleNamespace(global_step=step), control)
        assert control.should_save == control.should_training_stop
        stopped.append(control.should_save)
    assert stopped == [False, not on_gpus, True]


def test_batches_are_copied_while_the_gpu_computes(tiny_run):
    for device in ("cpu", "cuda"):
        choice = precision.ComputeSettings(torch.device(device), torch.float32, False, "")
        arguments = run.common_trainer_arguments(tiny_run(), choice, 6)
        assert (
            arguments["accelerator_config"]["non_blocking"] == arguments["dataloader_pin_memory"] == (device == "cuda")
        )


@pytest.mark.parametrize(
    "sync",
    [lambda x: x.sum().item(), lambda x: x[x > 0], lambda x: bool(x.any()), torch.nonzero, lambda x: x.tolist()],
)
def test_a_sync_is_detected(sync):
    with NoHostSync(), pytest.raises(AssertionError, match="waits"):
        sync(torch.arange(4.0))
