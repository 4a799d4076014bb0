"""Measures how well a model predicts text: bits per byte, which compare across tokenizers, and each depth's loss."""

import math

import torch
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm
from transformers import PreTrainedTokenizerFast

from moonwhale.data.tokenizer import byte_lengths
from moonwhale.errors import UserError
from moonwhale.model import MoonwhaleForCausalLM
from moonwhale.model.loss import IGNORE_INDEX


@torch.no_grad()
def score_text(
    model: MoonwhaleForCausalLM,
    rows: Dataset,
    tokenizer: PreTrainedTokenizerFast,
    batch_size: int = 8,
    autocast: torch.dtype | None = None,
    progress: bool = True,
) -> dict:
    """Runs the model over packed rows (see `PackedDataset`).

    batch_size: rows per forward.
    autocast: dtype of matrix products; None takes the weights' dtype.
    progress: show a progress bar in a terminal. A second bar would move the cursor by control sequences, which
        the command line shows instead of obeying.

    The first token of a document is not a target, because no token before it could predict it. The scores equal those
    of training's own evaluations.

    Returns:
        bits_per_byte: of the main head, over the targets' text.
        perplexity: of the main head, per token; infinite from 710 nats on.
        rows: rows that were read.
        targets: tokens that the main head predicted.
        bytes: length of the targets' text.
        losses: mean cross-entropy of each depth, in nats per token. Index 0 is the next token; MTP module k, at index
            k, predicts the token k positions after that.
        accuracies: share of targets of each depth that were the likeliest token.

    Raises:
        UserError: the rows hold no text to predict.
    """
    token_bytes = torch.from_numpy(byte_lengths(tokenizer)).to(model.device)  # (V,)
    depths = 1 + model.config.num_nextn_predict_layers
    nll, right, targets = torch.zeros(3, depths, dtype=torch.float64)  # sums over tokens, by depth
    n_bytes = 0
    with tqdm(total=len(rows), desc="text", unit=" rows", leave=False, disable=None if progress else True) as bar:
        for batch in DataLoader(rows, batch_size):
            batch = {name: ids.to(model.device) for name, ids in batch.items()}  # (B, T)
            with torch.autocast(model.device.type, autocast, enabled=autocast is not None):
                out = model(**batch, logits_to_keep=1)
            n = out.targets.cpu()
            nll += out.losses.cpu().double() * n
            right += out.accuracies.cpu().double() * n
            targets += n
            labels = batch["labels"][:, 1:]
            n_bytes += int(token_bytes[labels[labels != IGNORE_INDEX]].sum())
            bar.update(len(labels))
    if not n_bytes:
        raise UserError("`data`: there is no text to predict in these rows: give more text, or a larger `context`")
    losses, accuracies = (sums / targets.clamp(min=1) for sums in (nll, right))
    return {
        "bits_per_byte": losses[0].item() * int(targets[0]) / math.log(2) / n_bytes,
        "perplexity": losses[0].exp().item(),  # math.exp would raise OverflowError from 710 nats on
        "rows": len(rows),
        "targets": int(targets[0]),
        "bytes": n_bytes,
        "losses": losses.tolist(),
        "accuracies": accuracies.tolist(),
    }
