"""Draws an X-ray: what happens inside the model, for each token and layer, in one HTML file.

recording.py records one forward pass over the whole text for each setting. The page draws only these numbers and needs
only a browser. Its parts are in web/: this file puts them into one.
"""

import base64
import hashlib
import json
from dataclasses import asdict
from importlib.resources import files
from pathlib import Path

from transformers import PreTrainedTokenizerFast

from moonwhale.costs import model_size
from moonwhale.errors import UserError
from moonwhale.inspect.recording import record
from moonwhale.inspect.settings import MAX_TOKENS, Settings, changed, instructive, limits, trained_settings
from moonwhale.model import MoonwhaleForCausalLM
from moonwhale.train.run_folder import RUN_FILE
from moonwhale.yaml_files import read_yaml_file

DETAIL_BYTES = 8_000_000  # of the recording with the trained settings; base64 takes 4/3 of it
OTHER_BYTES = 6_000_000  # of the recordings with all other settings
SCRIPTS = (
    "data.js",
    "draw.js",
    "text.js",
    "predictions.js",
    "experts.js",
    "attention.js",
    "logits.js",
    "map.js",
    "settings.js",
    "export.js",
    "tour.js",
    "main.js",
)


def xray(
    model: MoonwhaleForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    ids: list[int],
    prompt_tokens: int,
    tau: float | None = None,
    live: bool = False,
) -> str:
    """Returns the page about a text. The first `prompt_tokens` ids are the prompt; the model wrote the rest.

    tau: threshold of QK-clip in the model's training; 0 if it was off, None if it is not known.
    live: a server recomputes the text with other settings when the page asks. Else the page holds a few of them.

    Raises:
        UserError: the text is empty or longer than MAX_TOKENS, or the model is none that this can draw.
    """
    return render(describe(model, tokenizer, ids, prompt_tokens, tau, live))


def clip_threshold(folder: str | Path) -> float | None:
    """Returns QK-clip's τ from the run.yaml of the run that wrote the checkpoint, or None if there is no such file.

    A run's folder holds run.yaml itself; for a checkpoint within the run it is one folder above.

    Raises:
        UserError: the file is not YAML.
    """
    for place in (Path(folder), Path(folder).resolve().parent):
        if (place / RUN_FILE).is_file():
            options = read_yaml_file(place / RUN_FILE)
            tau = options.get("qk_clip_tau") if isinstance(options, dict) else None
            return tau if isinstance(tau, int | float) and 0 <= tau < float("inf") else None
    return None


def describe(
    model: MoonwhaleForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    ids: list[int],
    prompt_tokens: int,
    tau: float | None = None,
    live: bool = False,
) -> dict:
    """Returns everything that `render` draws, as JSON values."""
    if not 1 <= len(ids) <= MAX_TOKENS:
        raise UserError(f"the text has {len(ids):,} tokens: an X-ray shows from 1 to {MAX_TOKENS}")
    others = [] if live else instructive(model, len(ids))
    return {
        "ids": ids,  # several may have the same text: in a byte-level tokenizer, "�" is every part of a character
        "tokens": [tokenizer.decode([id]) for id in ids],
        "prompt_tokens": prompt_tokens,
        "facts": _facts(model) | {"tau": tau},
        "limits": limits(model),
        "live": live,
        "recordings": [
            record_with(model, tokenizer, ids, trained_settings(model)),
            *(record_with(model, tokenizer, ids, other, OTHER_BYTES // len(others)) for other in others),
        ],
    }


def record_with(
    model: MoonwhaleForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    ids: list[int],
    settings: Settings,
    budget: int = DETAIL_BYTES,
) -> dict:
    """Returns the recording of a text with the given settings, which it names."""
    with changed(model, settings):
        return {"settings": asdict(settings), **record(model, tokenizer, ids, budget)}


def render(described: dict) -> str:
    """Returns one HTML file that loads nothing from elsewhere."""
    # Only "<" could end the element early.
    data = to_json(described).replace("<", "\\u003c")
    page = _read("xray.html")
    for name, text in (("STYLE", _read("xray.css")), ("SCRIPT", _script()), ("RECORDED", data)):
        page = page.replace(f"/*{name}*/", text)
    return page


def to_json(values: dict) -> str:
    return json.dumps(values, ensure_ascii=False, allow_nan=False, separators=(",", ":"))


def content_hashes() -> dict[str, str]:
    """Returns the sources of a content security policy that allow the page's own script and style, and no other."""
    inner = {"script-src": _script(), "style-src": _read("xray.css")}
    digests = {name: base64.b64encode(hashlib.sha256(text.encode()).digest()) for name, text in inner.items()}
    return {name: f"'sha256-{digest.decode()}'" for name, digest in digests.items()}


def _script() -> str:
    return "".join(_read(name) for name in SCRIPTS)


def _read(name: str) -> str:
    return (files("moonwhale.inspect") / "web" / name).read_text(encoding="utf-8")


def _facts(model: MoonwhaleForCausalLM) -> dict:
    """Facts about the model. The cache sizes are bytes per token in all main blocks, in bf16."""
    config, size = model.config, model_size(model.config)
    return {
        "parameters": sum(p.numel() for p in model.parameters()),
        "latent_bytes": size.kv_cache_bytes_per_token,
        "plain_bytes": size.mha_cache_bytes_per_token,
        "rank": config.kv_lora_rank,
        "rope": config.qk_rope_head_dim,
        "heads": config.num_attention_heads,
        "shared_experts": config.n_shared_experts,
        "scoring": config.scoring_func,
        "bias_speed": config.bias_update_speed,
    }
