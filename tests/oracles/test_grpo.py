"""GRPO's loss and gradients against the paper's formula, one answer at a time, without padding or batching."""

import copy
import json
from itertools import starmap

import datasets
import pytest
import torch

from moonwhale.checkpoint import open_checkpoint
from moonwhale.data.tasks import load_task
from moonwhale.posttrain.grpo import OBJECTIVES, GRPOOptions
from moonwhale.posttrain.grpo_trainer import MTPGRPOConfig, MTPGRPOTrainer, mtp_losses
from moonwhale.precision import choose
from moonwhale.train import run
from relative_error import relative_error

pytestmark = pytest.mark.cpu_only
GROUP, QUESTIONS = 4, 2


def vowels(completions, **_):
    """A reward under which the random model's answers differ."""
    return [sum(map(c[0]["content"].lower().count, "aeiou")) / 4 for c in completions]


@pytest.fixture
def batch(small_checkpoint, tmp_path, monkeypatch):
    """`batch(objective)` returns a trainer and a batch of answers that it drew and scored."""
    monkeypatch.setenv("HF_HUB_DISABLE_TELEMETRY", "1")
    (tmp_path / "task.jsonl").write_text(
        "".join(json.dumps({"question": f"{i}+{i}", "answer": str(2 * i)}) + "\n" for i in range(20))
    )

    def batch(objective: str, **changes):
        model, tokenizer = open_checkpoint(small_checkpoint)
        model.config.aux_loss_alpha, model.mtp_loss_weight = 0.0, 0.0
        for block in model.model.layers:
            block.mlp.alpha = 0.0
        task = load_task(str(tmp_path / "task.jsonl"))
        problems = task.problems(QUESTIONS)
        config = GRPOOptions(
            checkpoint=str(small_checkpoint), out=str(tmp_path / "run"), batch_size=GROUP * QUESTIONS, group_size=GROUP,
            questions_per_step=QUESTIONS, device="cpu", precision="fp32", report_to=["none"],
        )  # fmt: skip
        args = MTPGRPOConfig(
            **run.common_trainer_arguments(config, choose("cpu", "fp32"), 1), **(OBJECTIVES[objective] | changes),
            num_generations=GROUP, max_completion_length=12, eval_on_start=False,
        )  # fmt: skip
        args.eval_strategy = "no"
        data = datasets.Dataset.from_dict({"prompt": [p.messages for p in problems], "problem": [0, 1]})
        trainer = MTPGRPOTrainer(model, [vowels], args, data, processing_class=tokenizer)
        trainer.current_gradient_accumulation_steps = 1
        model.train()
        inputs = trainer._prepare_inputs([data[i // GROUP] for i in range(GROUP * QUESTIONS)])
        for row in range(0, GROUP * QUESTIONS, 3):  # answers of several lengths; this model's own all have the same
            inputs["completion_mask"][row, 3 + row :] = 0
        inputs["num_items_in_batch"] = inputs["completion_mask"].sum()
        generator = torch.Generator().manual_seed(0)  # so that the old policy differs from the current one
        with torch.no_grad():
            old = trainer._get_per_token_logps_and_entropies(model, *whole(inputs), inputs["completion_ids"].shape[1])[
                0
            ]
        inputs["old_per_token_logps"] = old + 0.3 * torch.randn(old.shape, generator=generator)
        if "ref_per_token_logps" in inputs:
            noise = torch.randn(old.shape, generator=generator)
            inputs["ref_per_token_logps"] = inputs["ref_per_token_logps"] + 0.3 * noise
        return trainer, inputs

    return batch


def whole(inputs):
    return (
        torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], 1),
        torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], 1),
    )


def paper_loss(model, inputs, rewards, epsilon, beta, kl="k3", average="answers"):
    """Computes −J of arXiv 2501.12948 eq. 1-3 from given log-probabilities of the old policy and the reference."""
    rewards = torch.tensor(rewards).view(-1, GROUP)
    advantages = ((rewards - rewards.mean(1, True)) / (rewards.std(1, keepdim=True) + 1e-4)).flatten()
    terms = []
    for i, advantage in enumerate(advantages):
        prompt = inputs["prompt_ids"][i][inputs["prompt_mask"][i].bool()]
        answer = inputs["completion_ids"][i][inputs["completion_mask"][i].bool()]
        logits = model(input_ids=torch.cat([prompt, answer])[None], use_cache=False).logits[0, len(prompt) - 1 : -1]
        logp = logits.log_softmax(-1)[range(len(answer)), answer]
        ratio = (logp - inputs["old_per_token_logps"][i, : len(answer)]).exp()
        away = inputs["ref_per_token_logps"][i, : len(answer)] - logp if beta else torch.zeros_like(logp)
        k3 = away.exp() - away - 1
        penalty = {"k3": k3, "k1": -away, "weighed": k3 * ratio}[kl]
        terms.append(torch.min(ratio * advantage, ratio.clip(1 - epsilon, 1 + epsilon) * advantage) - beta * penalty)
    return -torch.cat(terms).mean() if average == "tokens" else -torch.stack([t.mean() for t in terms]).mean()


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def compare(trainer, inputs, **formula):
    """Returns the largest relative difference in the loss and in any gradient."""
    model = trainer.model
    rewards = list(trainer._logs["rewards"]["vowels"])
    order = reorder(trainer, inputs)
    ours = trainer.compute_loss(model, inputs)
    mine = gradients(model, ours)
    theirs = paper_loss(model, order, rewards, trainer.epsilon_low, trainer.beta, **formula)
    wanted = gradients(model, theirs)
    main = [n for n in mine if not n.startswith("model.layers.2.")]  # this loss has no MTP term
    assert wanted.keys() >= set(main) and len(main) > 20
    pairs = [(ours, theirs), *((mine[n], wanted[n]) for n in main)]
    return max(starmap(relative_error, pairs))


def reorder(trainer, inputs):
    """Returns the batch in the order in which the answers were drawn, by groups. TRL shuffles them."""
    texts = [c[0]["content"] for c in trainer._logs["completion"]]
    decoded = trainer.processing_class.batch_decode(inputs["completion_ids"], skip_special_tokens=True)
    prompts = [p[-1]["content"] for p in trainer._logs["prompt"]]
    asked = [t.strip() for t in trainer.processing_class.batch_decode(inputs["prompt_ids"], skip_special_tokens=True)]
    left, places = list(range(len(texts))), []
    for text, prompt in zip(texts, prompts, strict=True):
        at = next(i for i in left if decoded[i] == text and asked[i] == prompt)
        left.remove(at)
        places.append(at)
    return {name: value[places] for name, value in inputs.items() if torch.is_tensor(value) and value.ndim}


@pytest.mark.parametrize(("objective", "average"), [("r1", "answers"), ("trl", "tokens")])
def test_loss_and_gradients_equal_the_papers(batch, objective, average):
    trainer, inputs = batch(objective, **({"beta": 0.05} if objective == "r1" else {}))
    assert inputs["completion_mask"].sum(1).unique().numel() > 1  # with equal lengths both averages would be the same
    assert compare(trainer, inputs, average=average) < 1e-5


@pytest.mark.parametrize("mutant", [{"average": "tokens"}, {"kl": "k1"}, {"kl": "weighed"}])
def test_another_formula_is_detected(batch, mutant):
    trainer, inputs = batch("r1", beta=0.05)
    assert compare(trainer, inputs, **mutant) > 1e-3


def test_ratios_are_clipped(batch):
    trainer, inputs = batch("r1", beta=0.05)
    trainer.epsilon_low = trainer.epsilon_high = 10.0
    whole_range = trainer.compute_loss(trainer.model, inputs).item()
    trainer.epsilon_low = trainer.epsilon_high = 0.2
    assert abs(trainer.compute_loss(trainer.model, inputs).item() - whole_range) > 1e-3


def test_the_trl_objective_is_trls_default():
    default = MTPGRPOConfig(output_dir="x", use_cpu=True, bf16=False)
    assert {k: getattr(default, k) for k in OBJECTIVES["trl"]} == OBJECTIVES["trl"]


def test_mtp_learns_without_influencing_the_policy(batch):
    trainer, inputs = batch("r1")
    model = trainer.model
    without = gradients(model, trainer.compute_loss(model, inputs))
    model.mtp_loss_weight = 1.0
    along = gradients(model, trainer.compute_loss(model, inputs))
    module = [n for n in along if n.startswith("model.layers.2.")]
    assert module and all(along[n].any() for n in module if "e_score" not in n)
    for name in without.keys() - set(module):
        torch.testing.assert_close(along[name], without[name], rtol=0, atol=0)


def test_mtp_losses_equal_the_models_own(batch):
    """`mtp_losses` returns the cross-entropy that the model's forward gives for its MTP modules."""
    trainer, inputs = batch("r1")
    model, (ids, mask) = copy.deepcopy(trainer.model), whole(inputs)
    del model.forward  # TRL has replaced it on the instance
    model.mtp_loss_weight = 1.0  # with 0 the model leaves its modules out
    labels = ids.masked_fill(mask == 0, -100)
    labels[:, : inputs["prompt_ids"].shape[1]] = -100
    with torch.no_grad():
        wanted = model(input_ids=ids, attention_mask=mask, labels=labels).losses[1:]
        hidden = model.model(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
        losses, _ = mtp_losses(model, hidden, ids, mask, labels)
    torch.testing.assert_close(losses, wanted, rtol=1e-5, atol=1e-6)
