"""`MTPGRPOTrainer`: TRL's GRPOTrainer with moonwhale's engine and optimizer, and MTP modules that follow the policy."""

import copy
import hashlib
import warnings
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor
from torch.utils.data import Sampler
from trl import GRPOConfig, GRPOTrainer
from trl.trainer.utils import RepeatSampler

from moonwhale.infer.engine import Engine
from moonwhale.model import MoonwhaleForCausalLM
from moonwhale.model.documents import Documents
from moonwhale.model.loss import IGNORE_INDEX, linear_cross_entropy
from moonwhale.model.mtp import shifted_labels
from moonwhale.model.rope import rotation_table
from moonwhale.train.muonclip_trainer import REFUSED, MuonClipArgumentsMixin, MuonClipTrainerMixin

# Fields of GRPOConfig that this trainer cannot serve, with the reason and the remedy
_BY_THE_ENGINE = "moonwhale's engine draws the completions; "
REFUSED_IN_GRPO = {
    "use_vllm": _BY_THE_ENGINE + "leave it False",
    "use_transformers_continuous_batching": _BY_THE_ENGINE + "leave it False",
    "use_transformers_paged": _BY_THE_ENGINE + "leave it False",
    "cache_implementation": _BY_THE_ENGINE + "leave it None",
    "generation_kwargs": _BY_THE_ENGINE + "give temperature, top_p, top_k or min_p",
    "repetition_penalty": _BY_THE_ENGINE + "leave it at 1.0",
    "chat_template_kwargs": _BY_THE_ENGINE + "put its values into the tokenizer's chat template",
    "router_aux_loss_coef": "the balance loss has its weight in the model's configuration; set aux_loss_alpha there",
}
REFUSED_ARGUMENTS = {
    "rollout_func": _BY_THE_ENGINE + "leave it out, or override _roll_out",
    "tools": _BY_THE_ENGINE + "leave it out",
    "environment_factory": _BY_THE_ENGINE + "leave it out",
    "peft_config": "moonwhale's engine reads no adapters; merge them into the model first",
}


@dataclass
class MTPGRPOConfig(MuonClipArgumentsMixin, GRPOConfig):
    """TRL's GRPOConfig with the arguments of MuonClip and MTP.

    Raises:
        ValueError: a field has a value that MTPGRPOTrainer cannot serve.
    """

    refused: ClassVar[dict[str, str]] = REFUSED | REFUSED_IN_GRPO


class _OrderOfPass(Sampler):
    """TRL's sampler of questions, in an order that depends only on the seed and on the number of the pass over them.

    TRL draws the order of each pass from a generator that no checkpoint holds. A resumed run would read the first
    pass's order again.
    """

    def __init__(self, sampler: RepeatSampler, trainer: GRPOTrainer):
        self.sampler, self.trainer = sampler, trainer

    def __iter__(self):
        if self.sampler.shuffle:
            passes_done = int(self.trainer.state.epoch)
            self.sampler.generator.manual_seed(self.sampler.seed + passes_done)
        return iter(self.sampler)

    def __len__(self) -> int:
        return len(self.sampler)


class MTPGRPOTrainer(MuonClipTrainerMixin, GRPOTrainer):
    """Trains by GRPO (arXiv 2402.03300 §4.1; DeepSeek-R1 §2.2) with TRL's loss.

    It differs from TRL's trainer in this:

    - Completions come from moonwhale's engine, which reads the policy's weights anew for each batch.
    - The optimizer is MuonClip, with QK-clip and the router-bias update.
    - The loss includes the balance loss and the MTP modules' loss on the completions. The MTP loss trains the modules
      alone, not the embedding and head that they share with the policy. So the modules learn to draft for the policy
      and do not steer it.

    Raises:
        ValueError: `tools`, `rollout_func`, `environment_factory` or `peft_config` is given, or the model has adapters.
    """

    def __init__(self, *args, **kwargs):
        for name, why in REFUSED_ARGUMENTS.items():
            if kwargs.get(name) is not None:
                raise ValueError(f"{name} is not supported: {why}")
            kwargs.pop(name, None)
        if hasattr(kwargs.get("model", args[0] if args else None), "peft_config"):
            raise ValueError(f"a model with adapters is not supported: {REFUSED_ARGUMENTS['peft_config']}")
        # `rollout_func` replaces TRL's generation, which is transformers' `generate` or vLLM. TRL warns that it is
        # experimental.
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="You are using 'rollout_func'")
            super().__init__(*args, rollout_func=self._roll_out, **kwargs)
        # TRL's loss keeps only log-probabilities of the policy's forward. The losses added here need its hidden states
        # and balance loss.
        self._policy_output = None
        # The step of the last rollout, and its number in that step
        self._rollouts = {"train": (-1, 0), "eval": (-1, 0)}
        self.model.model.register_forward_hook(self._keep_policy_output)

    def create_model_card(self, *args, **kwargs) -> None:
        """Does nothing. TRL would write a README.md into the run's folder with each checkpoint."""

    def _get_train_sampler(self, dataset=None) -> Sampler:
        return _OrderOfPass(super()._get_train_sampler(dataset), self)

    def _keep_policy_output(self, module, inputs, output) -> None:
        """Keeps the output of the latest forward with gradients, which is that of the loss."""
        if torch.is_grad_enabled():
            self._policy_output = output

    def _roll_out(self, prompts: list[list[dict]], _) -> dict[str, list]:
        """Draws a completion for each prompt from the current policy. A repeated run draws the same completions."""
        self._stop_unless_finite()  # NaN weights give no distribution to draw from
        args, model = self.args, self.accelerator.unwrap_model(self.model)
        engine = Engine(model, self.processing_class, sequences=len(prompts))
        ids = [engine.encode(self._tokenize(p) if isinstance(p, str) else p) for p in prompts]
        completions = engine.generate(
            ids,
            max_new_tokens=args.max_completion_length,
            temperature=args.temperature,
            top_p=args.top_p,
            top_k=args.top_k,
            min_p=args.min_p or 0.0,
            seed=self._rollout_seed(len(prompts)),
        )
        return {"prompt_ids": ids, "completion_ids": [c.token_ids for c in completions], "logprobs": None}

    def _tokenize(self, text: str) -> list[int]:
        """Returns the ids of a text prompt, from bos on. As in TRL, it may hold control tokens."""
        tokenizer = self.processing_class
        ids, bos = tokenizer(text, add_special_tokens=False)["input_ids"], tokenizer.bos_token_id
        return ids if bos is None or ids[:1] == [bos] else [bos, *ids]

    def _rollout_seed(self, n_prompts: int) -> int:
        """Returns a seed that no other rollout has, in this run or with another seed. The resumed run has it too."""
        args, step, mode = self.args, self.state.global_step, "train" if self.model.training else "eval"
        last_step, number = self._rollouts[mode]
        number = number + 1 if step == last_step else 0
        self._rollouts[mode] = step, number
        rollout = 2 * number + (mode == "eval")
        row = (step * args.world_size + args.process_index) * n_prompts
        if args.seed < 2**22 and rollout < 2**8 and row < 2**32:
            return (args.seed << 40) + (rollout << 32) + row
        # Larger numbers do not fit side by side into the 62 bits that every generator takes
        return int.from_bytes(hashlib.sha256(f"{args.seed} {rollout} {row}".encode()).digest()[:8]) >> 2

    def evaluate(self, *args, **kwargs):
        """Evaluates as TRL does, but leaves no trace: the answers that TRL keeps for completions/ remain those of
        training, and so does the state of the random numbers, by which TRL shuffles answers.
        """
        kept = copy.deepcopy(self._logs)
        with torch.random.fork_rng([self.args.device] if self.args.device.type == "cuda" else []):
            metrics = super().evaluate(*args, **kwargs)
        self._logs = kept
        return metrics

    def _get_per_token_logps_and_entropies(self, model, *args, **kwargs):
        """Calls TRL's method, which runs the model with and without gradients.

        Only passes with gradients collect the statistics of QK-clip and balancing. The old policy's log-probabilities
        would count the same tokens a second time.
        """
        forward = partial(model, collect_statistics=torch.is_grad_enabled())
        return super()._get_per_token_logps_and_entropies(forward, *args, **kwargs)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """Adds the balance loss and the MTP loss to TRL's loss, which has neither."""
        loss = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        output, self._policy_output = self._policy_output, None
        if not self.model.training:
            return loss
        ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], dim=1)  # (B, T)
        mask = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], dim=1)  # (B, T)
        labels = ids.masked_fill(mask == 0, IGNORE_INDEX)
        labels[:, : inputs["prompt_ids"].shape[1]] = IGNORE_INDEX
        unwrapped = self.accelerator.unwrap_model(self.model)
        added = output.balance_loss
        if unwrapped.skips_mtp:
            added = added + unwrapped.zero_of_mtp()
        elif unwrapped.config.num_nextn_predict_layers:
            with self.accelerator.autocast():
                losses, balance = mtp_losses(unwrapped, output.last_hidden_state, ids, mask, labels)
            added = added + balance + unwrapped.mtp_loss_weight * losses.mean()
            for depth, value in enumerate(losses.tolist(), start=1):
                self._metrics["train"][f"loss_mtp_{depth}"].append(value)
        # Gradients are summed over the micro-batches of a step. TRL has scaled its own loss for that.
        return loss + added / self.current_gradient_accumulation_steps

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds the statistics of the step hooks. Keeps TRL from writing the completions of evaluations too."""
        is_training = "loss" in logs
        self.log_completions = self.args.log_completions and is_training
        if is_training:
            logs |= self._hook_statistics.pop_logs()
        super().log(logs, start_time)


def mtp_losses(
    model: MoonwhaleForCausalLM, hidden: Tensor, input_ids: Tensor, attention_mask: Tensor, labels: Tensor
) -> tuple[Tensor, Tensor]:
    """Computes the MTP modules' losses, with gradients for the modules' own weights alone.

    Args:
        hidden: the main model's normed hidden states (B, T, hidden).
        labels: (B, T), -100 where a token has none.

    Returns:
        the mean cross-entropy of each depth in nats (D,), and the sum of the modules' balance losses.
    """
    documents = Documents.from_inputs(*input_ids.shape, input_ids.device, attention_mask, None)
    embeds = model.model.embed(input_ids).detach()  # (B, T, hidden)
    rotation = rotation_table(model.config, documents.positions, hidden.dtype)
    no_balance_loss = hidden.new_zeros((), dtype=torch.float32)
    outputs, balance = model.model.run_mtp(
        hidden.detach(), embeds, no_balance_loss, rotation, documents, collect_statistics=torch.is_grad_enabled()
    )
    losses = []
    for depth, output in enumerate(outputs, start=1):
        targets = shifted_labels(labels, documents, depth)  # (B, T)
        weights = torch.ones(targets.numel(), device=output.device) / (targets != IGNORE_INDEX).sum().clamp(min=1)
        loss, _, _ = linear_cross_entropy(
            output.flatten(0, 1), model.lm_head.weight.detach(), targets.flatten(), weights
        )
        losses.append(loss)
    return torch.stack(losses), balance
