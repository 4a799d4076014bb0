"""A mode for CPU tests that raises on every operation that would force a host sync on a GPU."""

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

ATEN = torch.ops.aten
SYNCS = {
    ATEN._local_scalar_dense,
    ATEN.item,  # inference_mode does not decompose it
    ATEN.is_nonzero,
    ATEN.equal,
    ATEN.nonzero,
    ATEN.masked_select,
    ATEN.bincount,
    ATEN._unique2,
    ATEN.unique_consecutive,
    ATEN.histc,
}
READS = {torch.Tensor.tolist, torch.Tensor.numpy, torch.Tensor.cpu}  # on a CPU these dispatch no operation


class _NoReads(TorchFunctionMode):
    def __torch_function__(self, function, types, args=(), kwargs=None):
        assert function not in READS, f"{function.__name__} waits"
        return function(*args, **(kwargs or {}))


class NoHostSync(TorchDispatchMode):
    def __enter__(self):
        self.reading = _NoReads()
        self.reading.__enter__()
        return super().__enter__()

    def __exit__(self, *error):
        super().__exit__(*error)
        self.reading.__exit__(*error)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        operation = function.overloadpacket
        masks = operation in (ATEN.index, ATEN.index_put, ATEN.index_put_, ATEN._index_put_impl_) and any(
            index is not None and index.dtype is torch.bool for index in args[1]
        )
        repeats = operation is ATEN.repeat_interleave and (kwargs or {}).get("output_size") is None
        assert not (operation in SYNCS or masks or (repeats and isinstance(args[0], torch.Tensor))), f"{function} waits"
        return function(*args, **(kwargs or {}))
