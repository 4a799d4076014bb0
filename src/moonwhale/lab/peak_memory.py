"""How much memory a piece of work needs at its peak."""

import ctypes
import gc
from contextlib import suppress
from pathlib import Path

import torch

STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


class PeakMemory:
    """Context that measures the memory of what runs inside it. `bytes` is None where the system cannot tell.

    On a GPU this is what torch allocated at most. On Linux without a GPU it is what the process grew by at most, since
    free memory of earlier work is given back to the system first.
    """

    def __init__(self, device: torch.device):
        self.device, self.bytes = device, None

    def __enter__(self):
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(self.device)
        else:
            with suppress(OSError, AttributeError):
                ctypes.CDLL(None).malloc_trim(0)
            with suppress(OSError):
                CLEAR.write_text("5")  # sets the process's peak to what it holds now
                self._before = _status("VmRSS")
        return self

    def __exit__(self, *_):
        if self.device.type == "cuda":
            self.bytes = torch.cuda.max_memory_allocated(self.device)
        elif hasattr(self, "_before"):
            self.bytes = max(0, _status("VmHWM") - self._before)


def _status(name: str) -> int:
    """Returns a size of this process, in bytes."""
    line = next(line for line in STATUS.read_text().splitlines() if line.startswith(f"{name}:"))
    return 1024 * int(line.split()[1])
