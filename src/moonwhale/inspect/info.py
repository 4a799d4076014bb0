"""Computes what a preset or a checkpoint costs before it is trained or served."""

from dataclasses import asdict
from pathlib import Path

from moonwhale.checkpoint import read_config
from moonwhale.costs import dense_twin, flops_per_token, inference_bytes, model_size, one_device_training_bytes
from moonwhale.errors import UserError, did_you_mean
from moonwhale.presets import PRESETS
from moonwhale.train.config import TrainConfig, build_model_config
from moonwhale.train.effects import idle_model_fields, require_effects
from moonwhale.units import in_bytes, si


def find_config(target: str, overrides: dict) -> tuple:
    """Returns the MoonwhaleConfig of a preset or a checkpoint folder, and the preset's TrainConfig, or None.

    `overrides` holds the model's fields to change, under "model".

    Raises:
        UserError: `target` is neither a preset nor a readable checkpoint, or a field is impossible or without effect.
    """
    run = None
    if target in PRESETS:
        run = TrainConfig.resolve({"preset": target, **overrides})
        config = build_model_config(run)
    elif Path(target).is_dir():
        config = read_config(Path(target), overrides.get("model"))
    else:
        raise UserError(
            f"{target!r} is neither a preset ({', '.join(PRESETS)}) nor a folder{did_you_mean(target, PRESETS)}"
        )
    require_effects(idle_model_fields(config), overrides)
    return config, run


def gather_figures(config, context: int, batch: int, run: TrainConfig | None) -> dict:
    """Returns all figures of a configuration, ready for JSON. Bytes and FLOPs are plain numbers.

    `batch` is the number of rows of `context` tokens that are computed or cached at once.
    """
    size = model_size(config)
    figures = asdict(size) | {
        "cache_saving": size.mha_cache_bytes_per_token / size.kv_cache_bytes_per_token,
        "blocks": config.num_hidden_layers,
        "mtp_blocks": config.mtp_blocks,
        "context": context,
        "batch": batch,
        "flops_per_token_forward": flops_per_token(config, context, training=False),
        "flops_per_token_training": flops_per_token(config, context),
        "training_bytes": one_device_training_bytes(config, batch * context),
        "dense_twin": dense_twin(config),
        "inference_bytes": inference_bytes(config, batch * context),
    }
    if run:
        tokens = run.steps * run.tokens_per_step
        resting = tokens  # while the MTP modules are not trained
        if config.mtp_loss_weight:
            resting = round(run.steps * run.mtp_start) * run.tokens_per_step
        without_mtp = flops_per_token(config, run.context, mtp=False)
        figures |= {
            "steps": run.steps,
            "tokens_per_step": run.tokens_per_step,
            "tokens": tokens,
            "training_flops": resting * without_mtp + (tokens - resting) * flops_per_token(config, run.context),
        }
    return figures


def table(name: str, figures: dict) -> str:
    """Formats the figures of `gather_figures` as text."""
    f, train, infer = figures, figures["training_bytes"], figures["inference_bytes"]
    mtp = " + ".join(map(str, f["mtp_blocks"]))
    at = f"{f['batch']} x {f['context']:,} tokens"
    rows = [
        ("parameters", f"{si(f['parameters'])}, {si(f['active_parameters'])} active"),
        ("  per block", f"{si(f['parameters_per_block'])}, {si(f['active_parameters_per_block'])} active"),
        ("  blocks", f"{f['blocks']}" + (f", and {mtp} in MTP modules ({si(f['mtp'])})" if mtp else "")),
        ("  embedding, head", f"{si(f['embedding'])}, {si(f['head']) if f['head'] else 'tied'}"),
        (
            "FLOPs per token",
            f"{si(f['flops_per_token_forward'])} forward, {si(f['flops_per_token_training'])} training",
        ),
        ("  at a context of", f"{f['context']:,} tokens"),
        ("  as many, dense", " ".join(f"--model.{name} {value}" for name, value in f["dense_twin"].items())),
        ("cache per token", f"{f['kv_cache_bytes_per_token']:,} bytes in bf16"),
        ("  with MHA", f"{f['mha_cache_bytes_per_token']:,} bytes, {f['cache_saving']:.1f} times as much"),
        ("memory to train", f"{in_bytes(sum(train.values()))} in fp32, with {at} at once"),
        *((f"  {part}", in_bytes(size)) for part, size in train.items()),
        ("memory to infer", f"{in_bytes(sum(infer.values()))} in bf16, with {at} in the cache"),
        *((f"  {part}", in_bytes(size)) for part, size in infer.items()),
    ]
    if "steps" in f:
        rows.append(("the preset's run", f"{f['steps']:,} steps of {f['tokens_per_step']:,} tokens"))
        rows.append(("  in all", f"{si(f['tokens'])} tokens, {si(f['training_flops'])} FLOPs"))
    return "\n".join([name, *(f"  {label:<20}{value}" for label, value in rows)])
