"""Trainers of a tiny model on random rows, without our command's options."""

import torch
from torch.utils.data import Dataset, IterableDataset

from moonwhale.train.mtp_trainer import MTPTrainer, MTPTrainingArguments

LENGTH = 16


class Rows(Dataset):
    def __init__(self, count: int = 8, seed: int = 0):
        self.ids = torch.randint(61, (count, LENGTH), generator=torch.Generator().manual_seed(seed))

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, i: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self.ids[i], "labels": self.ids[i]}


class Stream(IterableDataset):
    def __iter__(self):
        yield from (Rows()[i] for i in range(8))


BASE = {
    "max_steps": 2,
    "per_device_train_batch_size": 4,
    "learning_rate": 1e-3,
    "logging_steps": 1,
    "save_strategy": "no",
    "report_to": "none",
    "disable_tqdm": True,
    "use_cpu": True,
}


def maker(folder, tiny_model):
    """Returns `make(trainer={...}, **fields)`, a new trainer that writes into folder/run."""

    def make(trainer=None, kind=MTPTrainer, args_kind=MTPTrainingArguments, **fields):
        args = args_kind(**({"output_dir": str(folder / "run")} | BASE | fields))
        given = {"train_dataset": Rows(), "eval_dataset": Rows(6, seed=1)} | (trainer or {})
        if "model" not in given and "model_init" not in given:
            given["model"] = tiny_model(num_nextn_predict_layers=1)
        return kind(args=args, **given)

    return make
