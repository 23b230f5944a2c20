"""What a figure was measured on: the machine, the libraries and the files."""

from __future__ import annotations

import contextlib
import os
import platform
import re
import subprocess
import sys
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from llamabase.files import sha256_of
from llamabase.gguf.reader import GGUFFile
from llamabase.llama.ggml import build, gpus
from llamabase.llama.library import backends, physical_cores

COPIED = 256 << 20  # bytes that each thread copies: far more than any cache holds
COPIES = 5  # the fastest counts


def machine() -> dict[str, Any]:
    """Processor, cores, memory, GPUs, llama.cpp's backends and library versions."""
    memory = 0
    with contextlib.suppress(AttributeError, ValueError, OSError):  # not every system tells
        memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return {
        "cpu": _cpu(),
        "cores": physical_cores(),
        "logical_cores": os.cpu_count(),
        "memory_gb": round(memory / 1e9, 1),
        "gpus": gpus(),
        "backends": backends(),
        "system": platform.platform(),
        "python": platform.python_version(),
        "numpy": np.__version__,
        "llama_cpp_python": version("llama-cpp-python"),
        "ggml": build(),
        "date": time.strftime("%Y-%m-%d"),
    }


def _cpu() -> str:
    if sys.platform == "darwin":
        command = ["sysctl", "-n", "machdep.cpu.brand_string"]
        return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
    path = Path("/proc/cpuinfo")
    info = path.read_text() if path.exists() else ""
    for key in ("model name", "Model", "Hardware"):  # ARM boards name the board, not the core
        if line := re.search(rf"^{key}\s*: (.+)", info, re.MULTILINE):
            return line[1]
    return platform.processor() or platform.machine()


def bandwidth(n_threads: int | None = None) -> float:
    """Bytes per second that a plain copy reads and writes, which is about what memory can give."""
    n, best = n_threads or physical_cores(), 0.0
    pairs = [(np.ones(COPIED, np.uint8), np.ones(COPIED, np.uint8)) for _ in range(n)]
    with ThreadPoolExecutor(n) as pool:
        for _ in range(COPIES):
            started = time.perf_counter()
            list(pool.map(lambda pair: np.copyto(*pair), pairs))
            best = max(best, 2 * n * COPIED / (time.perf_counter() - started))
    return best


def describe(path: Path) -> dict[str, Any]:
    """A model file: its name, size, SHA-256, and the share of its bytes in each type."""
    sizes: Counter[str] = Counter()
    for tensor in GGUFFile(path).tensors.values():
        sizes[tensor.type.name] += tensor.n_bytes
    total = sizes.total()
    return {
        "file": path.name,
        "bytes": path.stat().st_size,
        "sha256": sha256_of(path),
        "types": {name: round(size / total, 3) for name, size in sizes.most_common() if size > total / 1000},
    }


def resident() -> int:
    """Bytes of memory that this process holds now, or the most it ever held if the system tells only that."""
    statm = Path("/proc/self/statm")
    return int(statm.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") if statm.exists() else peak()


def peak() -> int:
    """The most bytes of memory that this process ever held; 0 if the system does not tell."""
    try:
        import resource
    except ImportError:
        return 0
    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return used if sys.platform == "darwin" else used * 1024
