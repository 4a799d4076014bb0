"""`moonwhale info`: what a preset or a checkpoint costs, before anybody pays for it."""

import json
from dataclasses import asdict, fields
from pathlib import Path

from moonwhale import options
from moonwhale.costs import flops_per_token, inference_bytes, model_size, one_device_training_bytes
from moonwhale.errors import UserError, did_you_mean
from moonwhale.options import positive
from moonwhale.presets import PRESETS
from moonwhale.train.config import MODEL_FIELDS, ModelOverrides, TrainConfig, build_model_config, resolve
from moonwhale.units import in_bytes, si


def main(argv: list[str]) -> int:
    parser = options.Parser(
        prog="moonwhale info",
        description="Parameters, FLOPs, cache and memory of a preset or a checkpoint.\n"
        "--model.FIELD VALUE overrides a field of the model's configuration: see `moonwhale train --help`.",
        epilog="presets:\n" + "\n".join(f"  {name:<11}{preset.summary}" for name, preset in PRESETS.items()),
    )
    parser.add_argument("target", metavar="PRESET_OR_FOLDER", help="name of a preset, or folder of a checkpoint")
    parser.add_argument("--context", metavar="N", help="tokens of a row (the preset's, or the checkpoint's longest)")
    parser.add_argument("--batch", metavar="N", default="1", help="rows at once (1)")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of a table")
    options.add_options(parser, ModelOverrides, show=False)
    overrides, arguments = options.read_argv(parser, ModelOverrides, argv)

    run = None
    if arguments.target in PRESETS:
        run = resolve({"preset": arguments.target, **overrides})
        config = build_model_config(run)
    else:
        config = read_config(arguments.target, overrides.get("model"))
    context = positive(arguments.context, "`context`") if arguments.context else config.max_position_embeddings
    figures = gather(config, context, positive(arguments.batch, "`batch`"), run)
    print(json.dumps(figures, indent=2) if arguments.json else table(arguments.target, figures))
    return 0


def read_config(folder: str, overrides: dict | None = None):
    """The MoonwhaleConfig of a checkpoint folder, with some fields overridden.

    Raises:
        UserError: it is no folder, holds no readable config.json, or one of another or of an impossible model.
    """
    from moonwhale.model.configuration_moonwhale import MoonwhaleConfig

    path = Path(folder) / "config.json"
    if not path.parent.is_dir():
        raise UserError(
            f"{folder!r} is neither a preset ({', '.join(PRESETS)}) nor a folder{did_you_mean(folder, PRESETS)}"
        )
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{folder} is not a checkpoint: it holds no config.json") from None
    except ValueError as error:
        raise UserError(f"{path} is damaged, not JSON: {error}; save or copy the checkpoint again") from error
    kind = values.get("model_type") if isinstance(values, dict) else None
    if kind != "moonwhale":
        raise UserError(f"{path} is of a model of type {kind!r}, not 'moonwhale'")
    known = {field.name for field in fields(MODEL_FIELDS)}
    values = options.check(MODEL_FIELDS, {name: value for name, value in values.items() if name in known}, str(path))
    try:
        return MoonwhaleConfig(**values | (overrides or {}))
    except ValueError as error:
        raise UserError(f"{path}: {error}") from error


def gather(config, context: int, batch: int, run: TrainConfig | None = None) -> dict:
    """All figures of a configuration, ready for JSON. Bytes and FLOPs are plain numbers."""
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
        "inference_bytes": inference_bytes(config, batch * context),
    }
    if run:
        tokens = run.steps * run.tokens_per_step
        figures |= {
            "steps": run.steps,
            "tokens_per_step": run.tokens_per_step,
            "tokens": tokens,
            "training_flops": tokens * flops_per_token(config, run.context),
        }
    return figures


def table(name: str, figures: dict) -> str:
    """The figures for people."""
    f, train, infer = figures, figures["training_bytes"], figures["inference_bytes"]
    mtp = " + ".join(map(str, f["mtp_blocks"]))
    at = f"{f['batch']} x {f['context']:,} tokens"
    rows = [
        ("parameters", f"{si(f['parameters'])}, {si(f['active_parameters'])} active"),
        ("  a block", f"{si(f['parameters_per_block'])}, {si(f['active_parameters_per_block'])} active"),
        ("  blocks", f"{f['blocks']}" + (f", and {mtp} in MTP modules ({si(f['mtp'])})" if mtp else "")),
        ("  embedding, head", f"{si(f['embedding'])}, {si(f['head']) if f['head'] else 'tied'}"),
        (
            "FLOPs a token",
            f"{si(f['flops_per_token_forward'])} forward, {si(f['flops_per_token_training'])} training",
        ),
        ("  at a context of", f"{f['context']:,} tokens"),
        ("cache a token", f"{f['kv_cache_bytes_per_token']:,} bytes in bf16"),
        ("  plain MHA", f"{f['mha_cache_bytes_per_token']:,} bytes, {f['cache_saving']:.1f} times as much"),
        ("memory to train", f"{in_bytes(sum(train.values()))} in fp32, with {at} at once"),
        *((f"  {part}", in_bytes(size)) for part, size in train.items()),
        ("memory to infer", f"{in_bytes(sum(infer.values()))} in bf16, with {at} in the cache"),
        *((f"  {part}", in_bytes(size)) for part, size in infer.items()),
    ]
    if "steps" in f:
        rows.append(("the preset's run", f"{f['steps']:,} steps of {f['tokens_per_step']:,} tokens"))
        rows.append(("  in all", f"{si(f['tokens'])} tokens, {si(f['training_flops'])} FLOPs"))
    return "\n".join([name, *(f"  {label:<20}{value}" for label, value in rows)])
