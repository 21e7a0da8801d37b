"""Memory: the most that is held while something runs, what is free, and giving back what was freed."""

import ctypes
import os
import re
import sys
from pathlib import Path

import psutil
import torch

STATUS, RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")


class PeakMemory:
    """Measures this process's memory, and the GPU's, from when it is made. Another one made meanwhile restarts it.

    Only Linux can forget an earlier peak: elsewhere the process's is not known.
    """

    def __init__(self):
        try:
            RESET.write_text("5")
            self.known = True
        except OSError:
            self.known = False
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()

    def measured(self) -> dict[str, int | None]:
        """``peak_rss_bytes`` and ``peak_gpu_bytes``; None if it is not known, or there is no GPU."""
        kilobytes = re.search(r"VmHWM:\s+(\d+)", STATUS.read_text()) if self.known else None
        gpu = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else None
        return {"peak_rss_bytes": int(kilobytes[1]) * 1024 if kilobytes else None, "peak_gpu_bytes": gpu}


def release() -> None:
    """Give back what the C library keeps of freed memory."""
    if sys.platform == "linux" and (trim := getattr(ctypes.CDLL(None), "malloc_trim", None)):
        trim(0)


def free_bytes(device: torch.device) -> int:
    """What can still be had on a device, and no more than JOINTQUANT_MEMORY says (bytes)."""
    if device.type == "cuda":
        kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        free = torch.cuda.mem_get_info(device)[0] + kept
    else:
        free = psutil.virtual_memory().available
    allowed = os.environ.get("JOINTQUANT_MEMORY", free)
    try:
        return int(min(free, float(allowed)))
    except ValueError as error:
        raise ValueError(f"JOINTQUANT_MEMORY={allowed!r}: expected a number of bytes, such as 8e9") from error
