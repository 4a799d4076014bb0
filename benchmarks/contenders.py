"""The contenders of quality.py, and the text they learn: moonwhale, a dense model with AdamW, and nanochat."""

import math
import os
import re
import sys
from collections.abc import Callable
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from dense import DenseLM, adamw_groups, cosine_decay
from moonwhale.costs import model_size
from moonwhale.data.chat import encode_documents
from moonwhale.data.loading import load_source
from moonwhale.data.source import texts_of
from moonwhale.data.tokenizer import byte_lengths, train_tokenizer
from moonwhale.errors import UserError
from moonwhale.model import MoonwhaleConfig, MoonwhaleForCausalLM
from moonwhale.optim.muonclip import MuonClip, param_groups
from moonwhale.optim.step_hooks import attach_hooks
from moonwhale.precision import choose
from moonwhale.presets import FAST, TINY

VOCABULARY, CONTEXT = 4096, 256
MODEL = {
    "vocab_size": VOCABULARY,
    "max_position_embeddings": CONTEXT,
    **TINY,
    **FAST.model,
}
RECIPE = {  # warmup, decay, momentum_warmup and mtp_start are shares of the time
    "rows": 16,
    "lr": 1.2e-2,
    "warmup": 0.03,
    "decay": 0.95,
    "floor": 0.0,
    "momentum": (0.95, 0.95),
    "momentum_warmup": 0.1,
    "weight_decay": 0.3,  # the best of 0, 0.1, 0.3 and 1 on novels (docs/training_recipe.md)
    "grad_clip": 1.0,
    "qk_clip_tau": 100.0,
    **FAST.train,
}
# For longer runs: as many active parameters as nanochat has, and half of the optimizer's and MTP's share of the time
WIDE = {"kv_lora_rank": 128, "latent_embedding_every": 1, "moe_intermediate_size": 192}
WIDE_RECIPE = RECIPE | {"rows": 32, "mtp_start": 0.9}
OUR_RATES = (3e-3, 6e-3, 1.2e-2, 2.4e-2)
DENSE = {"vocab_size": VOCABULARY, "layers": 4, "width": 256, "heads": 4, "inner": 1024, "context": CONTEXT}
DENSE_RECIPE = {"rows": 16, "lr": 2e-3, "warmup": 0.02, "floor": 0.1, "weight_decay": 0.1, "grad_clip": 1.0}
DENSE_RATES = (5e-4, 1e-3, 2e-3, 4e-3)
# Full attention, heads of 64 and the linear warm-up are from nanochat's runs/runcpu.sh, the rest from its
# scripts/base_train.py.
NANOCHAT = {"vocab_size": VOCABULARY, "sequence_len": CONTEXT, "n_layer": 4, "n_embd": 256, "window_pattern": "L"}
NANOCHAT |= {"n_head": 4, "n_kv_head": 4}
NANOCHAT_LR = {"embedding_lr": 0.3, "unembedding_lr": 0.008, "matrix_lr": 0.02, "scalar_lr": 0.5}
NANOCHAT_RECIPE = {"rows": 16, "lr": 1.0, "weight_decay": 0.28}  # lr multiplies all learning rates of nanochat
NANOCHAT_RATES = (4.0, 8.0, 16.0, 32.0)


@dataclass(frozen=True)
class Data:
    """Token ids (int64): the training stream `train` (n,), and the rows `tuning` and `held_out` (rows, CONTEXT).

    `lengths` (V,) holds the bytes of each token.
    """

    train: Tensor
    tuning: Tensor
    held_out: Tensor
    lengths: Tensor


def load(text: str) -> Data:
    """Loads and splits the documents of a source (see `load_source`). 90 % of the bytes are for training.

    The documents of a text are its paragraphs.
    """
    documents = []
    for document in load_source(text):
        documents += re.split(r"\n\s*\n", document) if isinstance(document, str) else [document]
    sizes = np.cumsum([sum(len(t.encode()) for t in texts_of(document)) for document in documents])
    parts = [[], [], []]
    for document, part in zip(documents, np.searchsorted([0.9, 0.95], sizes / sizes[-1]), strict=True):
        parts[part].append(document)
    tokenizer = train_tokenizer((t for document in parts[0] for t in texts_of(document)), VOCABULARY)
    ids = [np.concatenate([[], *encode_documents(tokenizer, part)]).astype(np.int64) for part in parts]
    if min(map(len, ids)) < CONTEXT:
        raise UserError(f"{text}: 5 % of it are less than a row of {CONTEXT} tokens (give a longer text)")
    device = choose().device
    train, tuning, held_out, lengths = (torch.from_numpy(a).to(device) for a in (*ids, byte_lengths(tokenizer)))
    return Data(train, _rows(tuning), _rows(held_out), lengths)


def _rows(stream: Tensor) -> Tensor:
    return stream[: len(stream) // CONTEXT * CONTEXT].view(-1, CONTEXT)


@torch.no_grad()
def bits_per_byte(mean_loss: Callable[[Tensor, Tensor], Tensor], rows: Tensor, lengths: Tensor) -> float:
    """Returns the bits per byte of rows (n, T). Control tokens and the first token of each row are not scored.

    `mean_loss(tokens, labels)` returns the mean in nats over those labels[:, 1:] that are not -100.
    """
    nats = n_bytes = 0
    for tokens in rows.split(16):
        labels = tokens.masked_fill(lengths[tokens] == 0, -100)
        scored = labels[:, 1:][labels[:, 1:] != -100]
        nats += mean_loss(tokens, labels).item() * len(scored)
        n_bytes += lengths[scored].sum().item()
    return round(nats / math.log(2) / n_bytes, 5)


def _autocast() -> torch.autocast:
    choice = choose()
    return torch.autocast(choice.device.type, choice.dtype, enabled=choice.autocast)


@dataclass(frozen=True)
class Contender:
    """A model and how it is trained.

    `step(number, share of the time that has passed, tokens (rows, CONTEXT))` trains the model and returns its loss.
    `mean_loss(tokens, labels)` is that of `bits_per_byte`.
    """

    model: nn.Module
    optimizer: torch.optim.Optimizer
    rows: int
    step: Callable[[int, float, Tensor], Tensor]
    mean_loss: Callable[[Tensor, Tensor], Tensor]
    active_parameters: int


def _descend(model, optimizer, loss: Tensor, grad_clip: float) -> None:
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), grad_clip)
    optimizer.step()
    optimizer.zero_grad()


def ours(recipe: dict = RECIPE, seed: int = 0, **changes) -> Contender:
    """Returns our model with all its mechanisms. `changes` are fields of MODEL."""
    torch.manual_seed(seed)
    net = MoonwhaleForCausalLM(MoonwhaleConfig(**MODEL | changes)).to(choose().device)
    optimizer = MuonClip(param_groups(net, **{name: recipe[name] for name in ("lr", "weight_decay", "embedding_lr")}))
    attach_hooks(optimizer, net, qk_clip_tau=recipe["qk_clip_tau"])
    peaks = [group["lr"] for group in optimizer.param_groups]
    low, high = recipe["momentum"]

    def step(number: int, progress: float, tokens: Tensor) -> Tensor:
        factor = linear_decay(progress, recipe["warmup"], recipe["decay"], recipe["floor"])
        momentum = low + (high - low) * min(1.0, progress / recipe["momentum_warmup"])
        for group, peak in zip(optimizer.param_groups, peaks, strict=True):
            group |= {"lr": peak * factor, "momentum": momentum}
        # With a weight of 0 the modules are not run.
        net.mtp_loss_weight = net.config.mtp_loss_weight if progress >= recipe["mtp_start"] else 0.0
        with _autocast():
            out = net(tokens, labels=tokens)
        _descend(net, optimizer, out.loss, recipe["grad_clip"])
        return out.losses[0]

    def mean_loss(tokens: Tensor, labels: Tensor) -> Tensor:
        with _autocast():
            return net(tokens, labels=labels, logits_to_keep=1).losses[0]

    return Contender(net, optimizer, recipe["rows"], step, mean_loss, model_size(net.config).active_parameters)


def linear_decay(progress: float, warmup: float, decay: float, floor: float) -> float:
    """Returns the share of the peak learning rate: linear warm-up, constant, then linear decay to `floor`."""
    if progress < warmup:
        return progress / warmup
    return min(1.0, floor + (1 - floor) * (1 - progress) / decay)


def dense(recipe: dict = DENSE_RECIPE, seed: int = 0) -> Contender:
    """Returns `DenseLM` with AdamW, trained as nanoGPT trains its models."""
    torch.manual_seed(seed)
    model = DenseLM(**DENSE).to(choose().device)
    optimizer = torch.optim.AdamW(adamw_groups(model, recipe["weight_decay"]), betas=(0.9, 0.95), fused=True)

    def mean_loss(tokens: Tensor, labels: Tensor) -> Tensor:
        with _autocast():
            return model(tokens, labels)

    def step(number: int, progress: float, tokens: Tensor) -> Tensor:
        for group in optimizer.param_groups:
            group["lr"] = recipe["lr"] * cosine_decay(progress, recipe["warmup"], recipe["floor"])
        loss = mean_loss(tokens, tokens)
        _descend(model, optimizer, loss, recipe["grad_clip"])
        return loss

    return Contender(model, optimizer, recipe["rows"], step, mean_loss, sum(p.numel() for p in model.parameters()))


def nanochat(folder: Path, recipe: dict = NANOCHAT_RECIPE, seed: int = 0) -> Contender:
    """Returns nanochat's model and optimizer of the checkout `folder`, trained as its scripts/base_train.py does."""
    choice = choose()
    os.environ.setdefault("NANOCHAT_DTYPE", "bfloat16" if choice.autocast else "float32")
    sys.path.insert(0, str(folder))
    with redirect_stdout(sys.stderr):
        from nanochat.gpt import GPT, GPTConfig

        torch.manual_seed(seed)
        with torch.device("meta"):
            model = GPT(GPTConfig(**NANOCHAT))
            reference = GPT(GPTConfig(**NANOCHAT | {"n_layer": 12, "n_embd": 768}))  # its rates are for this size
        model.to_empty(device=choice.device)
        model.init_weights()
        # Learning rates grow with the square root of the batch. A smaller model, trained on fewer tokens, gets more
        # weight decay.
        batch = math.sqrt(recipe["rows"] * CONTEXT / 2**19)
        sizes = [m.num_scaling_params() for m in (reference, model)]
        horizon, own_horizon = (size["transformer_matrices"] + size["lm_head"] for size in sizes)
        weight_decay = recipe["weight_decay"] * batch * horizon / own_horizon
        rates = {name: rate * batch * recipe["lr"] for name, rate in NANOCHAT_LR.items()}
        optimizer = model.setup_optimizer(**rates, weight_decay=weight_decay)
    compiled = torch.compile(model, dynamic=False)

    def targets(labels: Tensor) -> Tensor:
        following = labels.roll(-1, 1).masked_fill(labels.roll(-1, 1) == -100, -1)
        following[:, -1] = -1
        return following

    def step(number: int, progress: float, tokens: Tensor) -> Tensor:
        loss = compiled(tokens, targets(tokens))
        loss.backward()
        factor, momentum, decay = nanochat_schedule(number, progress)
        for group in optimizer.param_groups:
            group["lr"] = group["initial_lr"] * factor
            if group["kind"] == "muon":
                group |= {"momentum": momentum, "weight_decay": weight_decay * decay}
        optimizer.step()
        model.zero_grad(set_to_none=True)
        return loss.detach()

    def mean_loss(tokens: Tensor, labels: Tensor) -> Tensor:
        return model(tokens, targets(labels))

    return Contender(model, optimizer, recipe["rows"], step, mean_loss, sum(p.numel() for p in model.parameters()))


def nanochat_schedule(number: int, progress: float, warmdown: float = 0.65) -> tuple[float, float, float]:
    """Returns the share of the peak learning rate, Muon's momentum, and the share of the weight decay."""
    left = min(1.0, (1 - progress) / warmdown)
    factor = (number + 1) / 40 if number < 40 else 0.05 + 0.95 * left
    momentum = 0.85 + 0.12 * number / 400 if number < 400 else 0.90 + 0.07 * left
    return factor, momentum, (1 + math.cos(math.pi * progress)) / 2
