"""`MTPGRPOTrainer`: TRL's GRPOTrainer on our engine and optimizer, with MTP modules that follow the policy."""

import warnings
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from trl import GRPOConfig, GRPOTrainer

from moonwhale.infer.engine import Engine
from moonwhale.model import MoonwhaleForCausalLM
from moonwhale.model.documents import Documents
from moonwhale.model.loss import IGNORE_INDEX, linear_cross_entropy
from moonwhale.model.mtp import shifted_labels
from moonwhale.model.rope import rotation_table
from moonwhale.train.muonclip_trainer import MuonClipArgumentsMixin, MuonClipTrainerMixin


@dataclass
class MTPGRPOConfig(MuonClipArgumentsMixin, GRPOConfig):
    """GRPOConfig and what MuonClip and MTP add to it."""


class MTPGRPOTrainer(MuonClipTrainerMixin, GRPOTrainer):
    """GRPO (arXiv 2402.03300 §4.1; DeepSeek-R1 §2.2) as TRL computes it. What is ours around it:

    Completions come from the engine, whose weights are laid out anew for each batch; MuonClip with QK-clip and router
    bias takes the steps; the balance loss and the MTP modules' loss on the completions are added. The latter reaches
    the modules alone, never what they share with the policy, so they learn to draft for it and do not steer it.
    """

    def __init__(self, *args, **kwargs):
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="You are using 'rollout_func'")
            super().__init__(*args, rollout_func=self._roll_out, **kwargs)
        self._body = None  # of the latest forward with gradients
        self.model.model.register_forward_hook(self._keep)

    def create_model_card(self, *args, **kwargs) -> None:
        """TRL would write a README.md into the run's folder."""

    def _keep(self, module, inputs, output) -> None:
        if torch.is_grad_enabled():
            self._body = output

    def _roll_out(self, prompts: list[list[dict]], _) -> dict[str, list]:
        """A completion for each prompt, drawn from the policy as it is now; the same again when a run is repeated."""
        self._stop_unless_finite()  # nothing can be drawn from what is not
        args, model = self.args, self.accelerator.unwrap_model(self.model)
        engine = Engine(model, self.processing_class, sequences=len(prompts))
        ids = [engine.encode(prompt) for prompt in prompts]
        drawn = self.state.global_step * args.world_size + args.process_index
        completions = engine.generate(
            ids,
            max_new_tokens=args.max_completion_length,
            temperature=args.temperature,
            top_p=args.top_p,
            top_k=args.top_k,
            min_p=args.min_p or 0.0,
            seed=(args.seed << 40) + drawn * len(prompts),
        )
        return {"prompt_ids": ids, "completion_ids": [c.token_ids for c in completions], "logprobs": None}

    def _get_per_token_logps_and_entropies(self, model, *args, **kwargs):
        """Call TRL's method. Only passes with gradients count in the statistics of QK-clip and balancing; the old
        policy's log-probabilities would count the same tokens twice.
        """
        forward = partial(model, collect_statistics=torch.is_grad_enabled())
        return super()._get_per_token_logps_and_entropies(forward, *args, **kwargs)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        loss = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        body, self._body = self._body, None
        if not self.model.training:
            return loss
        ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], dim=1)
        mask = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], dim=1)
        labels = ids.masked_fill(mask == 0, IGNORE_INDEX)
        labels[:, : inputs["prompt_ids"].shape[1]] = IGNORE_INDEX
        unwrapped = self.accelerator.unwrap_model(self.model)
        beside = body.balance_loss
        if unwrapped.config.num_nextn_predict_layers:
            with self.accelerator.autocast():
                losses, balance = mtp_losses(unwrapped, body.last_hidden_state, ids, mask, labels)
            beside = beside + balance + unwrapped.mtp_loss_weight * losses.mean()
            for depth, value in enumerate(losses.tolist(), start=1):
                self._metrics["train"][f"loss_mtp_{depth}"].append(value)
        return loss + beside / self.current_gradient_accumulation_steps

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        self.log_completions = self.args.log_completions and "loss" in logs  # not those of an evaluation
        if "loss" in logs:
            logs |= self._hook_statistics.pop_logs()
        super().log(logs, start_time)


def mtp_losses(
    model: MoonwhaleForCausalLM, hidden: Tensor, input_ids: Tensor, attention_mask: Tensor, labels: Tensor
) -> tuple[Tensor, Tensor]:
    """What the MTP modules lose on the `labels` (B, T), -100 where there is none, given the main model's normed hidden
    states (B, T, hidden); with gradients for the modules' own weights alone.

    Returns:
        the mean cross-entropy in nats of each depth (D,), and the sum of the modules' balance losses.
    """
    documents = Documents.from_inputs(*input_ids.shape, input_ids.device, attention_mask, None)
    embeds = model.model.embed(input_ids).detach()
    table = rotation_table(model.config, documents.positions, hidden.dtype)
    nothing = hidden.new_zeros((), dtype=torch.float32)
    seen, balance = model.model.run_mtp(
        hidden.detach(), embeds, nothing, table, documents, collect_statistics=torch.is_grad_enabled()
    )
    losses = []
    for depth, out in enumerate(seen, start=1):
        targets = shifted_labels(labels, documents, depth)
        share = torch.ones(targets.numel(), device=out.device) / (targets != IGNORE_INDEX).sum().clamp(min=1)
        loss, _, _ = linear_cross_entropy(out.flatten(0, 1), model.lm_head.weight.detach(), targets.flatten(), share)
        losses.append(loss)
    return torch.stack(losses), balance
