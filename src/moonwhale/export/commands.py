"""`moonwhale export`: a checkpoint for those who do not have moonwhale, and one of theirs for us.

DeepSeek-V3's format knows MLA, the experts and MTP modules of one block, under the names our weights have anyway. It
knows no MoBA: what is exported attends to everything, which is the same model as long as the chosen blocks cover the
context. `moonwhale.json` beside it keeps what got lost, for the way back. GGUF is the same model in one file, without
MTP and the way back.
"""

import shutil
import sys
from dataclasses import fields
from pathlib import Path

from moonwhale.errors import UserError
from moonwhale.options import Parser

FORMATS = {
    "deepseek": "plain DeepSeek-V3, which transformers loads with no code of ours",
    "gguf": "a GGUF file, model.gguf, for llama.cpp",
    "code": "with our model's code in it, for trust_remote_code",
    "moonwhale": "ours again, from a DeepSeek-V3 folder",
}
KEPT = "moonwhale.json"  # our configuration, in a folder of theirs
DTYPES = ("fp32", "bf16")


def main(argv: list[str]) -> None:
    parser = Parser(
        prog="moonwhale export",
        description="Write a checkpoint in another format.",
        epilog="formats: " + "; ".join(f"{name}: {what}" for name, what in FORMATS.items()),
    )
    parser.add_argument("folder", metavar="FOLDER", help="checkpoint to read")
    parser.add_argument("--to", choices=FORMATS, default="deepseek", help="format to write (%(default)s)")
    parser.add_argument("--out", required=True, metavar="FOLDER", help="a new or empty folder")
    parser.add_argument("--dtype", choices=DTYPES, default="fp32", help="of the weights (%(default)s)")
    args = parser.parse_args(argv)
    out = Path(args.out)
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise UserError(f"`out`: {out} exists and is not an empty folder: name a new one, nothing is overwritten")

    import torch

    from moonwhale.checkpoint import quiet

    dtype = torch.bfloat16 if args.dtype == "bf16" else torch.float32
    write = {"deepseek": to_deepseek, "gguf": to_gguf, "code": to_code, "moonwhale": from_deepseek}[args.to]
    unfinished = out.with_name(f".{out.name}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    try:
        unfinished.mkdir(parents=True)
        with quiet():
            notes = write(Path(args.folder), unfinished, dtype)
        if out.exists():
            out.rmdir()
        unfinished.rename(out)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    for line in notes:
        print(line, file=sys.stderr)
    print(f"written    {out}, {FORMATS[args.to]}")


def to_deepseek(folder: Path, out: Path, dtype) -> list[str]:
    """Writes a `DeepseekV3ForCausalLM`; returns what a user should know of the difference, a line each.

    Raises:
        UserError: for a model that the format cannot hold.
    """
    import torch
    from transformers import DeepseekV3Config

    from moonwhale.checkpoint import open_checkpoint

    model, tokenizer = open_checkpoint(folder, dtype)
    config = model.config
    notes = _without_moba(folder, config, config.num_blocks)
    if config.scoring_func != "sigmoid":
        raise UserError(f"{folder}: DeepSeek-V3's router scores by sigmoid, not {config.scoring_func}: `to` code")
    weights, n = model.state_dict(), config.num_hidden_layers
    modules = config.num_nextn_predict_layers
    if any(blocks > 1 for blocks in config.mtp_blocks):
        weights = {name: w for name, w in weights.items() if _layer(name) < n}
        notes.append(f"warning: MTP is left out: the format has one block a module, and this has {config.mtp_blocks}")
        modules = 0
    for layer in range(n, n + modules):  # the format has the shared embedding and head in each module
        weights[f"model.layers.{layer}.embed_tokens.weight"] = weights["model.embed_tokens.weight"].clone()
        weights[f"model.layers.{layer}.shared_head.head.weight"] = model.lm_head.weight.detach().clone()

    with torch.device("meta"):  # a model that was loaded would write its experts as it found them
        new = type(model)(config)
    new.save_pretrained(out, state_dict=weights, save_original_format=True)
    names = {f.name for f in fields(DeepseekV3Config)} & config.to_dict().keys()
    values = {name: getattr(config, name) for name in names} | {"architectures": ["DeepseekV3ForCausalLM"]}
    theirs = DeepseekV3Config(**values | {"dtype": dtype, "num_nextn_predict_layers": modules})
    theirs.save_pretrained(out)
    tokenizer.save_pretrained(out)
    config.to_json_file(out / KEPT, use_diff=False)
    return notes


def to_gguf(folder: Path, out: Path, dtype) -> list[str]:
    """Writes `model.gguf` for llama.cpp; returns what a user should know of the difference, a line each.

    Raises:
        UserError: for a model that llama.cpp cannot run, or without the package gguf.
    """
    from moonwhale.checkpoint import open_checkpoint
    from moonwhale.export.gguf import write_gguf

    model, tokenizer = open_checkpoint(folder)  # fp32, as what stays fp32 in the file comes from there
    config = model.config
    notes = _without_moba(folder, config, config.num_hidden_layers)
    if config.num_nextn_predict_layers:
        notes.append("warning: MTP is left out: the file holds the main model only")
    if config.rms_norm_eps != 1e-6:
        notes.append(
            f"warning: llama.cpp norms latents with rms_norm_eps={config.rms_norm_eps} too, this model with 1e-06"
        )
    write_gguf(out / "model.gguf", folder, model, tokenizer, dtype)
    return notes


def _without_moba(folder: Path, config, blocks: int) -> list[str]:
    """A line on what full attention in the first `blocks` blocks changes, if it does. Refuses a convolution on keys."""
    if config.moba_key_conv:
        raise UserError(f"{folder}: DeepSeek-V3's format has no convolution on keys (moba_key_conv is set): `to` code")
    covered = config.moba_topk * config.moba_block_size
    if covered >= config.max_position_embeddings or not any(map(config.is_moba_layer, range(blocks))):
        return []
    return [
        f"warning: MoBA is left out: from token {covered + 1:,} on this model attends to chosen blocks, "
        "and the exported one to everything"
    ]


def to_code(folder: Path, out: Path, dtype) -> list[str]:
    """Writes the model with the files of `moonwhale.model` beside it."""
    from moonwhale import model as ours
    from moonwhale.checkpoint import open_checkpoint

    model, tokenizer = open_checkpoint(folder, dtype)
    modeling = "modeling_moonwhale.Moonwhale"
    model.config.auto_map = {
        "AutoConfig": "configuration_moonwhale.MoonwhaleConfig",
        "AutoModel": f"{modeling}Model",
        "AutoModelForCausalLM": f"{modeling}ForCausalLM",
    }
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    for path in Path(ours.__file__).parent.glob("*.py"):
        if path.name != "__init__.py":
            shutil.copy(path, out)
    return []


def from_deepseek(folder: Path, out: Path, dtype) -> list[str]:
    """Writes our checkpoint of a DeepSeek-V3 folder, MoBA as in its `moonwhale.json`, or off if it has none."""
    from transformers import DeepseekV3Config

    from moonwhale.checkpoint import load_model, load_tokenizer_of, read_json
    from moonwhale.model import MoonwhaleConfig

    values = read_json(folder / "config.json")
    if values.get("model_type") != "deepseek_v3":
        raise UserError(f"{folder}/config.json is of a model of type {values.get('model_type')!r}, not 'deepseek_v3'")
    if (folder / KEPT).exists():
        values = read_json(folder / KEPT)
    else:
        theirs = DeepseekV3Config.from_pretrained(folder).to_dict()
        values = {f.name: theirs[f.name] for f in fields(MoonwhaleConfig) if f.name in theirs}
    modules = _mtp_modules(folder, values["num_hidden_layers"])
    blocks = range(values["num_hidden_layers"] + modules)
    values["moba_full_attention_layers"] = [i for i in values.get("moba_full_attention_layers") or [] if i in blocks]
    config = MoonwhaleConfig.from_dict(values | {"num_nextn_predict_layers": modules, "mtp_num_blocks": 1})
    model = load_model(folder, config, dtype)
    model.save_pretrained(out)
    load_tokenizer_of(folder, model).save_pretrained(out)
    return [] if (folder / KEPT).exists() else [f"note: {folder} holds no {KEPT}: MoBA is off, set moba_topk to use it"]


def _mtp_modules(folder: Path, n_layers: int) -> int:
    """How many MTP modules the weights of a folder hold."""
    from safetensors import safe_open

    layers = {-1}
    for path in folder.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            layers |= set(map(_layer, file.keys()))
    return max(max(layers) + 1 - n_layers, 0)


def _layer(name: str) -> int:
    """The layer that a weight belongs to; -1 for embedding, head and last norm."""
    return int(name.split(".")[2]) if name.startswith("model.layers.") else -1
