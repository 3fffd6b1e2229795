"""The most memory a stretch of work needed: of the process on a CPU, of the allocator on a GPU."""

from __future__ import annotations

import ctypes
import sys

import torch

from flex_kernels.cpu import ops

PROC_STATUS, PROC_CLEAR = "/proc/self/status", "/proc/self/clear_refs"


class PeakMemory:
    """Measures from construction to :meth:`read`.

    On a GPU: ``torch.cuda.max_memory_allocated``, reset at the start. On Linux: the process's resident
    high-water mark, reset at the start (``kind`` "resident"). Elsewhere the mark cannot be reset and covers
    the process's whole life (``kind`` "resident since start").
    """

    def __init__(self, device: torch.device | str = "cpu"):
        self.device = torch.device(device)
        if self.device.type == "cuda":
            self.kind = "allocated on the GPU"
            torch.cuda.reset_peak_memory_stats(self.device)
            return
        try:
            # 5 resets VmHWM; see proc(5), clear_refs.
            with open(PROC_CLEAR, "w") as clear:
                clear.write("5")
            self.kind = "resident"
        except OSError:
            self.kind = "resident since start"

    def read(self) -> int:
        """Bytes."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device)
        try:
            with open(PROC_STATUS) as status:
                for line in status:
                    if line.startswith("VmHWM:"):
                        return int(line.split()[1]) * 1024
        except OSError:
            pass
        import resource

        mark = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return mark if sys.platform == "darwin" else mark * 1024


def give_back_freed() -> None:
    """Return to the system what this process has freed, where its C library would keep it (glibc).

    Freed pieces between others that stay, as when large weights come and their small codes remain, would
    otherwise count as the process's memory until it ends. So would the kernels' large buffers.
    """
    ops.kernels.give_back_pages()
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)
