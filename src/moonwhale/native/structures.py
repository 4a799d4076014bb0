"""The ctypes structures of the compiled steps, made from the C++ header that declares them (`step/structures.h`).

A structure holds the addresses of tensors. Its maker keeps these tensors alive.
"""

import ctypes
import re
from pathlib import Path

import torch
from torch import Tensor

SOURCES = Path(__file__).parent / "step"
POINTER, INTEGER, REAL = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float
DTYPE_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.int8: 2}  # as `Dtype` in structures.h


def address(tensor: Tensor | None) -> int | None:
    """Return the address of a tensor's first number."""
    return None if tensor is None else tensor.data_ptr()


def read_structures(header: str) -> dict[str, type[ctypes.Structure]]:
    """Make a ctypes structure of each struct in a header, by name. A pointer to any type becomes a `c_void_p`."""
    types: dict[str, type] = {"int64_t": INTEGER, "Dtype": INTEGER, "float": REAL}
    structures = {}
    code = re.sub(r"//.*", "", header)
    for struct, body in re.findall(r"struct (\w+) \{(.*?)\};", code, re.DOTALL):
        fields = []
        for declaration in body.split(";")[:-1]:
            type_name, names = declaration.replace("const ", "").split(maxsplit=1)
            for name in names.split(","):
                fields.append((name.strip(" *\n"), POINTER if "*" in name else types[type_name]))
        structures[struct] = type(f"{struct}Struct", (ctypes.Structure,), {"_fields_": fields})
        types[struct] = structures[struct]
    return structures


STRUCTURES = read_structures((SOURCES / "structures.h").read_text(encoding="utf-8"))
MatrixStruct = STRUCTURES["Matrix"]
NetworkStruct = STRUCTURES["Network"]
NormStruct = STRUCTURES["Norm"]
AttentionStruct = STRUCTURES["AttentionFields"]
FeedForwardStruct = STRUCTURES["FeedForwardFields"]
BlockStruct = STRUCTURES["Block"]
CacheStruct = STRUCTURES["Cache"]
PlacementStruct = STRUCTURES["Placement"]
RoutesStruct = STRUCTURES["Routes"]
RouterStruct = STRUCTURES["RouterSizes"]
