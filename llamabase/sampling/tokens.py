"""The array of tokens that llama.cpp's samplers act on."""

from __future__ import annotations

import ctypes
from typing import Any

import llama_cpp
import numpy as np

_TOKEN = np.dtype([("id", np.int32), ("logit", np.float32), ("p", np.float32)])  # llama_token_data


class Tokens:
    """Tokens in numpy's memory, where llama.cpp's samplers change, sort and drop them."""

    def __init__(self, memory: np.ndarray) -> None:
        """`memory`: an array of _TOKEN that nothing else uses."""
        self._memory = memory
        pointer = ctypes.cast(memory.ctypes.data, ctypes.POINTER(llama_cpp.llama_token_data))
        self._array = llama_cpp.llama_token_data_array(data=pointer, size=len(memory), selected=-1, sorted=False)

    @classmethod
    def of(cls, ids: np.ndarray, logits: np.ndarray) -> Tokens:
        memory = np.empty(len(logits), _TOKEN)
        memory["id"], memory["logit"], memory["p"] = ids, logits, 0
        return cls(memory)

    def apply(self, sampler: Any) -> None:
        """Let one of llama.cpp's samplers act."""
        llama_cpp.llama_sampler_apply(sampler, ctypes.byref(self._array))

    @property
    def left(self) -> np.ndarray:
        """What is left, in any order: a view of (id, logit, p)."""
        first = 0
        if self._array.size < len(self._memory):  # XTC moves the beginning
            first = (ctypes.addressof(self._array.data.contents) - self._memory.ctypes.data) // _TOKEN.itemsize
        return self._memory[first : first + self._array.size]
