"""How does QK-clip change the attention logits, and what does it cost in loss?

    python benchmarks/muonclip_at_work.py

A small model is trained twice on the same batches from the same weights: once the logits are only recorded, once they
are clipped. The learning rate is far too high on purpose, so that logits grow. τ is far below the paper's 100, which a
model of this size rarely reaches. The script also draws docs/muonclip.svg. It takes about 1.5 minutes on one core.

Keys of the answer (results/muonclip_at_work.json):
    largest_logit_with, largest_logit_without: the largest attention logit of the run with and without the clip.
    final_loss_with, final_loss_without: the mean training loss of the last 20 steps, in nats per token.
    tau, learning_rate, steps: the settings of both runs.
    with, without: each run's `logits` (heads, steps) and `loss` (steps).
"""

from pathlib import Path

import torch

from common import ROOT, environment, options, picture, write
from moonwhale.data.loading import load_source
from moonwhale.data.packing import PackedDataset, build_data
from moonwhale.model import MoonwhaleConfig, MoonwhaleForCausalLM
from moonwhale.optim.muonclip import MuonClip, param_groups
from moonwhale.optim.step_hooks import attach_hooks

MODEL = {
    "vocab_size": 1024,
    "hidden_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "q_lora_rank": 48,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
    "moba_block_size": 32,
    "moba_topk": 2,
    "moba_full_attention_layers": [2],
    "n_routed_experts": 4,
    "num_experts_per_tok": 1,
    "moe_intermediate_size": 48,
}
CONTEXT, ROWS, WARMUP, SMOOTHED = 128, 8, 20, 20
RATE, TAU = 0.03, 8.0
STYLES = {
    "without": ("#d97706", 3.0),
    "with": ("#2563eb", 1.3),
}  # colour, line width of the loss


def train(data: PackedDataset, steps: int, tau: float | None) -> dict[str, list]:
    """Returns the largest logit of each head (heads of all layers, steps) and the loss (steps,), in nats per token."""
    torch.manual_seed(0)
    model = MoonwhaleForCausalLM(MoonwhaleConfig(**MODEL)).train()
    optimizer = MuonClip(param_groups(model, lr=RATE))
    hooks = attach_hooks(optimizer, model, qk_clip_tau=tau)
    warmup = torch.optim.lr_scheduler.LinearLR(optimizer, 1 / WARMUP, total_iters=WARMUP)
    order, logits, losses = torch.randperm(len(data)).tolist(), [], []
    for step in range(steps):
        rows = [data[order[i % len(data)]] for i in range(step * ROWS, (step + 1) * ROWS)]
        out = model(**{name: torch.stack([row[name] for row in rows]) for name in rows[0]})
        out.loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        warmup.step()
        logits.append(hooks.last["max_logits"].flatten())
        losses.append(round(out.losses[0].item(), 4))
    return {"logits": [[round(v, 2) for v in head.tolist()] for head in torch.stack(logits, 1)], "loss": losses}


def smoothed(losses: list[float]) -> torch.Tensor:
    """Returns the mean of each group of `SMOOTHED` steps."""
    return torch.tensor(losses).unfold(0, SMOOTHED, SMOOTHED).mean(-1)


def draw(runs: dict[str, dict], path: Path) -> None:
    """Draws a panel of heads for each run, as thin lines on one scale, and a panel with both losses."""
    top = 1.05 * max(max(head) for run in runs.values() for head in run["logits"])
    with picture(path, 1, 3, figsize=(10, 3.8), width_ratios=(3, 3, 2.2)) as (figure, axes):
        for ax, (which, (colour, width)) in zip(axes, STYLES.items(), strict=False):
            for head in runs[which]["logits"]:
                ax.plot(range(1, len(head) + 1), head, color=colour, linewidth=0.7, alpha=0.7)
            ax.axhline(TAU, color="black", linestyle="--", linewidth=1)
            ax.annotate(f"τ = {TAU:g}", (1, TAU), (0, 5), textcoords="offset points")
            ax.set_title(f"{which} the clip", color=colour, weight="bold")
            ax.set_ylim(0, top)
            losses = smoothed(runs[which]["loss"])
            at = SMOOTHED * torch.arange(1, len(losses) + 1)
            axes[2].plot(at, losses, color=colour, linewidth=width, label=which)
        axes[0].set_ylabel("largest attention logit of each head")
        axes[2].set(title="training loss", ylabel="nats per token")
        axes[2].legend(frameon=False)
        for ax in axes:
            ax.set_xlabel("optimizer step")
            ax.grid(alpha=0.25)
        figure.suptitle(
            f"MuonClip on real conversations, {len(runs['with']['logits'])} heads; the learning rate is too high and τ "
            "low on purpose: a small model rarely reaches the paper's τ = 100",
            fontsize=9,
            color="#4b5563",
        )


def main(argv: list[str] | None = None) -> None:
    parser = options(__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=300, help="optimizer steps per run (300)")
    parser.add_argument("--picture", type=Path, default=ROOT / "docs" / "muonclip.svg", help="file of the picture")
    arguments = parser.parse_args(argv)

    data = build_data(load_source("chitchat"), vocab_size=MODEL["vocab_size"], context=CONTEXT).train
    runs = {"without": train(data, arguments.steps, None), "with": train(data, arguments.steps, TAU)}
    draw(runs, arguments.picture)
    result = {"tau": TAU, "learning_rate": RATE, "steps": arguments.steps}
    for which, run in runs.items():
        result[f"largest_logit_{which}"] = max(max(head) for head in run["logits"])
        result[f"final_loss_{which}"] = round(smoothed(run["loss"])[-1].item(), 4)
    write(arguments.results, "muonclip_at_work", result | {"environment": environment("fp32", False)}, **runs)


if __name__ == "__main__":
    main()
