"""How well a model predicts text: bits per byte, which compare across tokenizers, and the loss of each depth."""

import math
from dataclasses import asdict, dataclass

import torch
from torch.utils.data import DataLoader, Dataset, Subset
from tqdm import tqdm
from transformers import PreTrainedTokenizerFast

from moonwhale.data.tokenizer import byte_lengths
from moonwhale.errors import UserError
from moonwhale.model import MoonwhaleForCausalLM
from moonwhale.model.loss import IGNORE_INDEX


@dataclass(frozen=True)
class TextScore:
    """A depth's index is 0 for the next token and k for MTP module k, which predicts the one k tokens behind it.

    rows: rows that were read. targets: tokens that the main head had to predict. bytes: those of their text.
    losses: mean cross-entropy of each depth in nats a token. accuracies: how often its likeliest token was right.
    """

    rows: int
    targets: int
    bytes: int
    losses: list[float]
    accuracies: list[float]

    @property
    def bits_per_byte(self) -> float:
        return self.losses[0] * self.targets / math.log(2) / self.bytes

    @property
    def perplexity(self) -> float:
        """Of a token."""
        return math.exp(self.losses[0])

    def results(self) -> dict:
        """All of it, ready for JSON."""
        return {"bits_per_byte": self.bits_per_byte, "perplexity": self.perplexity} | asdict(self)


def choose_rows(rows: Dataset, n: int | None) -> Dataset:
    """n rows spread over all, the same as training's own evaluations take; all where n is None or there are fewer."""
    if n is None or n >= len(rows):
        return rows
    return Subset(rows, torch.linspace(0, len(rows) - 1, n).long().tolist())


@torch.no_grad()
def score_text(
    model: MoonwhaleForCausalLM,
    rows: Dataset,
    tokenizer: PreTrainedTokenizerFast,
    batch_size: int = 8,
    autocast: torch.dtype | None = None,
) -> TextScore:
    """Runs the model over packed rows (see `PackedDataset`), `batch_size` at a time, under a bar.

    autocast: dtype of the matrix products, None for that of the weights. Each document's first token is no target, as
    nothing before it could predict it. The figures are those of the training's own evaluations.

    Raises:
        UserError: the rows hold no text to predict.
    """
    assert not model.training, "the loss would count in the statistics of training"
    lengths, n_bytes = torch.from_numpy(byte_lengths(tokenizer)).to(model.device), 0
    depths = 1 + model.config.num_nextn_predict_layers
    nll, right, counts = torch.zeros(3, depths, dtype=torch.float64)
    with tqdm(total=len(rows), desc="text", unit=" rows", leave=False, disable=None) as bar:
        for batch in DataLoader(rows, batch_size):
            batch = {name: ids.to(model.device) for name, ids in batch.items()}
            with torch.autocast(model.device.type, autocast, enabled=autocast is not None):
                out = model(**batch, logits_to_keep=1)
            n = out.targets.cpu()
            nll += out.losses.cpu().double() * n
            right += out.accuracies.cpu().double() * n
            counts += n
            targets = batch["labels"][:, 1:]
            n_bytes += int(lengths[targets[targets != IGNORE_INDEX]].sum())
            bar.update(len(targets))
    if not n_bytes:
        raise UserError("`data`: there is no text to predict in these rows: give more of it, or a larger `context`")
    means = [(part / counts.clamp(min=1)).tolist() for part in (nll, right)]
    return TextScore(len(rows), int(counts[0]), n_bytes, *means)
