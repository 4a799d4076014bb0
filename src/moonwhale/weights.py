"""Reads a checkpoint's safetensors files. What their headers say is compared with the configuration first.

config.json may describe a model of any size, and a header may name any tensor. So the tensors that the configuration
needs are computed without memory for their values (on the meta device), and nothing is read before the headers agree.
"""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from moonwhale.errors import NotFiniteError, UserError, one_line, printable, shown
from moonwhale.files import read_json
from moonwhale.model import MoonwhaleConfig, MoonwhaleForCausalLM

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
COPY_AGAIN = "save or copy the checkpoint again"
DTYPES = {"F32", "BF16", "F16"}
BLOCK = re.compile(r"model\.layers\.\d+\.(blocks\.\d+\.)?input_layernorm\.weight")  # each block has one
STACKED = re.compile(r"(.*\.experts)\.(gate_up_proj|down_proj)")  # our format; DeepSeek's has each expert by itself
COPIES = re.compile("|".join(MoonwhaleForCausalLM._keys_to_ignore_on_load_unexpected))  # of MTP modules: not needed


class Header(NamedTuple):
    """Where a tensor is, and what it is."""

    file: Path
    shape: tuple[int, ...]
    dtype: str  # as safetensors names it


def weight_files(folder: Path) -> list[Path]:
    """Returns the weight files of a folder, or an empty list if it has none.

    Raises:
        UserError: the index is damaged, or names anything but safetensors files in its own folder.
    """
    if (folder / WEIGHTS).is_file():
        return [folder / WEIGHTS]
    index = folder / INDEX
    if not index.is_file():
        return []
    names = read_json(index).get("weight_map")
    if not isinstance(names, dict) or not names or not all(isinstance(name, str) for name in names.values()):
        raise UserError(f"{index} names no weight files; {COPY_AGAIN}")
    for name in names.values():
        if Path(name).name != name or not name.endswith(".safetensors"):
            raise UserError(f"{index} names {shown(name)}, which is no safetensors file in its folder; {COPY_AGAIN}")
    files = [folder / name for name in sorted(set(names.values()))]
    for path in files:
        if not path.is_file():
            raise UserError(f"{index} names {path.name}, which is missing, or is no plain file; {COPY_AGAIN}")
    return files


def read_headers(files: list[Path]) -> dict[str, Header]:
    """Returns the headers of all tensors in the given files.

    Raises:
        UserError: a file is damaged, or two files hold the same tensor.
    """
    headers: dict[str, Header] = {}
    for path in files:
        with _opened(path) as file:
            for name in file.keys():  # noqa: SIM118 (the handle is no mapping)
                if name in headers:
                    raise UserError(f"{path}: {shown(name)} is also in {headers[name].file.name}; {COPY_AGAIN}")
                part = file.get_slice(name)
                headers[name] = Header(path, tuple(part.get_shape()), str(part.get_dtype()))
    return headers


def check_headers(folder: Path, headers: dict[str, Header], config: MoonwhaleConfig) -> None:
    """Compares the tensors of a folder with those that the configuration needs.

    Raises:
        UserError: a tensor is missing, unknown, of another shape or of another kind of number.
    """
    faults = _faults({name: header for name, header in headers.items() if not COPIES.search(name)}, config)
    if faults:
        more = f" (and {len(faults) - 1:,} more)" if len(faults) > 1 else ""
        raise UserError(f"{folder}: the weights do not fit config.json: {faults[0]}{more}; {COPY_AGAIN}")


def read_weights(folder: Path, config: MoonwhaleConfig) -> dict[str, Tensor]:
    """Returns the tensors of a folder, on the CPU as they are stored, after `check_headers`.

    Raises:
        NotFiniteError: a weight is not finite.
        UserError: the files are damaged or do not fit the configuration.
    """
    files = weight_files(folder)
    headers = read_headers(files)
    check_headers(folder, headers, config)
    tensors = {}
    for path in files:
        with _opened(path) as file:
            for name in file.keys():  # noqa: SIM118
                if not COPIES.search(name):
                    tensors[name] = file.get_tensor(name)
    for name, tensor in tensors.items():
        if not all(end.isfinite() for end in tensor.aminmax()):  # NaN passes through both
            raise NotFiniteError(f"{headers[name].file}: {name} holds values that are NaN or infinite; {COPY_AGAIN}")
    return tensors


def _opened(path: Path):
    try:
        return safe_open(path, "pt")
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path}: the weights are damaged or cut short ({one_line(error)}); {COPY_AGAIN}") from error


def _faults(headers: dict[str, Header], config: MoonwhaleConfig) -> list[str]:
    """Says what is wrong with each tensor that does not fit."""
    found = sum(BLOCK.fullmatch(name) is not None for name in headers)
    if found != config.num_blocks:  # building many blocks to compare them would take seconds
        return [f"it describes {config.num_blocks:,} blocks, and the files hold {found:,}"]
    with torch.device("meta"):
        needed = MoonwhaleForCausalLM(config).state_dict()
    if config.tie_word_embeddings and "lm_head.weight" not in headers:
        del needed["lm_head.weight"]
    missing, misfits, known = [], [], set()
    for name, shape in _stored(needed, headers):
        if name not in headers:
            missing.append(f"{name} is missing")
            if len(missing) > len(headers):  # a million experts
                break
            continue
        known.add(name)
        _, got, dtype = headers[name]
        if got != shape:
            misfits.append(f"{name} is {_size(got)}, not {_size(shape)}")
        elif dtype not in DTYPES:
            misfits.append(f"{name} holds {dtype} numbers, not {', '.join(sorted(DTYPES))}")
    unknown = [f"{printable(name, '')[:200]} is unknown" for name in sorted(headers.keys() - known)]
    return missing + unknown + misfits


def _stored(needed: dict[str, Tensor], headers: dict[str, Header]) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Yields the name and shape of each tensor to find in the files: experts as a stack, or each by itself."""
    for name, tensor in sorted(needed.items()):
        stack = STACKED.fullmatch(name)
        if not stack or name in headers:
            yield name, tuple(tensor.shape)
            continue
        n_experts, *shape = tensor.shape
        parts = ["gate_proj", "up_proj"] if stack[2] == "gate_up_proj" else ["down_proj"]
        for expert in range(n_experts):
            for part in parts:
                yield f"{stack[1]}.{expert}.{part}.weight", (shape[0] // len(parts), shape[1])


def _size(shape: tuple[int, ...]) -> str:
    return "×".join(map(str, shape)) or "a single number"
