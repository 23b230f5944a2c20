"""Models: the weights and the vocabulary of a GGUF, loaded by llama.cpp.

`llama_cpp.Llama` keeps an n_ctx x n_vocab array of scores and ignores refused rewinds, so this package calls the
`llama_*` functions that llama-cpp-python binds. A Model owns weights, a Context owns a KV cache.
"""

from __future__ import annotations

import contextlib
import ctypes
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import llama_cpp

from llamabase.errors import EngineError, FileFormatError, SettingError
from llamabase.gguf.reader import GGUFFile
from llamabase.gguf.tensors import is_block_alone

from .ggml import buffer_types, offloading
from .library import Owner, interruptible, last_error, start
from .tokenizing import Tokenizer

_MROPE = (llama_cpp.LLAMA_ROPE_TYPE_MROPE, llama_cpp.LLAMA_ROPE_TYPE_IMROPE)
# By the words of llama.cpp's --split-mode and --load-mode.
SPLIT_MODES: dict[str, int] = {
    "none": llama_cpp.LLAMA_SPLIT_MODE_NONE,
    "layer": llama_cpp.LLAMA_SPLIT_MODE_LAYER,
    "row": llama_cpp.LLAMA_SPLIT_MODE_ROW,
    "tensor": llama_cpp.LLAMA_SPLIT_MODE_TENSOR,
}
LOAD_MODES: dict[str, int] = {
    "auto": llama_cpp.LLAMA_LOAD_MODE_AUTO,
    "none": llama_cpp.LLAMA_LOAD_MODE_NONE,
    "mmap": llama_cpp.LLAMA_LOAD_MODE_MMAP,
    "mlock": llama_cpp.LLAMA_LOAD_MODE_MLOCK,
    "mmap+mlock": llama_cpp.LLAMA_LOAD_MODE_MMAP_MLOCK,
    "dio": llama_cpp.LLAMA_LOAD_MODE_DIRECT_IO,
}
NO_DEVICE = "none"


class _Override(ctypes.Structure):
    """llama_model_tensor_buft_override, which llama-cpp-python does not bind."""

    _fields_ = [("pattern", ctypes.c_char_p), ("kind", ctypes.c_void_p)]


@dataclass(frozen=True)
class ModelParams:
    """Where llama.cpp puts a model's weights and how it loads them, in the words of its flags.

    n_gpu_layers: layers that go to devices; -1 for all, None for llama.cpp's default. device: the devices that take
    them, as "CUDA0,CUDA1", or "none"; None for all there are. split_mode, one of SPLIT_MODES: how several devices share
    the model. tensor_split: the share of each. main_gpu: the index of the one that takes it all with split_mode "none".
    load_mode: one of LOAD_MODES. override_tensor: "PATTERN=BUFFER,...", the kind of memory that keeps the tensors whose
    names match a regular expression. n_cpu_moe: the first layers, whose experts the CPU keeps; -1 for all.

    Raises SettingError for what does not exist here.
    """

    n_gpu_layers: int | None = None
    device: str | None = None
    split_mode: str = "layer"
    tensor_split: Sequence[float] = ()
    main_gpu: int = 0
    load_mode: str = "auto"
    override_tensor: str = ""
    n_cpu_moe: int = 0

    def __post_init__(self) -> None:
        for name, known in (("split_mode", SPLIT_MODES), ("load_mode", LOAD_MODES)):
            if (given := getattr(self, name)) not in known:
                raise SettingError(f"{name}={given!r}: choose one of {', '.join(known)}")
        self._shares()
        self._devices()
        self._overrides()

    def fill(self, params: llama_cpp.llama_model_params) -> list[Any]:
        """Set these fields of llama_model_params. Returns the memory that they point to."""
        if self.n_gpu_layers is not None:
            params.n_gpu_layers = self.n_gpu_layers
        params.split_mode, params.load_mode = SPLIT_MODES[self.split_mode], LOAD_MODES[self.load_mode]
        params.main_gpu = self.main_gpu
        kept: list[Any] = []
        if (shares := self._shares()) is not None:
            kept.append((ctypes.c_float * llama_cpp.llama_max_devices())(*shares))
            params.tensor_split = ctypes.cast(kept[-1], ctypes.POINTER(ctypes.c_float))
        if (devices := self._devices()) is not None:  # lists that end with a null pointer
            kept.append((ctypes.c_void_p * (len(devices) + 1))(*devices))
            params.devices = ctypes.addressof(kept[-1])
        if overrides := self._overrides():
            kept.append((_Override * (len(overrides) + 1))(*overrides))
            params.tensor_buft_overrides = ctypes.addressof(kept[-1])
        return kept

    def _shares(self) -> list[float] | None:
        try:
            shares = [float(share) for share in self.tensor_split]
        except (TypeError, ValueError):
            shares = [-1.0]
        if not all(0 <= share < math.inf for share in shares) or (shares and not any(shares)):
            raise SettingError(f"tensor_split={self.tensor_split!r}: is not a list of proportions, such as 3,1")
        if len(shares) >= (most := llama_cpp.llama_max_devices()):
            raise SettingError(f"tensor_split has {len(shares)} parts, and llama.cpp takes fewer than {most}")
        return shares or None

    def _devices(self) -> list[Any] | None:
        if self.device is None:
            return None
        if self.device == NO_DEVICE:
            return []
        known = offloading()
        for name in (names := self.device.split(",")):
            if name not in known:
                raise SettingError(
                    f"device {name!r}: llama.cpp has no such device here; choose from {', '.join([*known, NO_DEVICE])}"
                )
        return [known[name] for name in names]

    def _overrides(self) -> list[_Override]:
        known = buffer_types() if self.override_tensor or self.n_cpu_moe else {}
        found = []
        for text in filter(None, self.override_tensor.split(",")):
            pattern, _, kind = text.rpartition("=")
            if not pattern or kind not in known:
                raise SettingError(
                    f"override_tensor {text!r}: is not PATTERN=BUFFER with a buffer that llama.cpp has here, which are "
                    f"{', '.join(known)}"
                )
            found.append(_Override(pattern.encode(), known[kind]))
        if self.n_cpu_moe:
            layers = r"\d+" if self.n_cpu_moe < 0 else "|".join(map(str, range(self.n_cpu_moe)))
            experts = rf"blk\.({layers})\.ffn_(gate_up|gate|up|down)_(ch)?exps"
            found.append(_Override(experts.encode(), known["CPU"]))
        return found


MODEL_DEFAULTS = ModelParams()
# With n_gpu_layers=0 llama.cpp would still move the products of large batches to a GPU, and lay out weights for that.
CPU_ONLY = ModelParams(device=NO_DEVICE)


class Model(Owner):
    """Weights and vocabulary of one GGUF. Raises EngineError, with llama.cpp's reason, if it cannot be loaded."""

    def __init__(self, path: str | Path, how: ModelParams = MODEL_DEFAULTS, vocab_only: bool = False) -> None:
        self._model = None
        self.path, self.how = Path(path), how
        start()
        params = llama_cpp.llama_model_default_params()
        params.vocab_only = vocab_only
        params.load_mtp = True  # the block for multi-token prediction, if the file has one
        self._kept = how.fill(params)
        if not self.path.is_file():
            raise EngineError(f"{self.path}: there is no such file")
        file = None
        with contextlib.suppress(FileFormatError):  # llama.cpp says itself what it cannot read
            file = None if vocab_only else GGUFFile(self.path)
        self.is_block_alone = file is not None and is_block_alone(file)
        if file is not None:
            file.require_loadable()
        with interruptible() as go_on:
            params.progress_callback = progress = llama_cpp.llama_progress_callback(lambda *_: go_on())
            self._model = llama_cpp.llama_model_load_from_file(os.fsencode(self.path), params)
            del progress  # kept alive until here
        if self._model is None:
            raise EngineError(f"{self.path}: llama.cpp cannot load it: {last_error()}")
        self.vocab = llama_cpp.llama_model_get_vocab(self._model)
        self._tokenizer = Tokenizer(self.path, self._model, self.vocab)
        self.samplers: dict[Any, Any] = {}  # llama.cpp's samplers that take long to make, to be cloned
        self.n_vocab: int = llama_cpp.llama_vocab_n_tokens(self.vocab)
        self.n_embd: int = llama_cpp.llama_model_n_embd(self._model)
        # Numbers of an input embedding (more than n_embd with DeepStack) and of its positions (four with M-RoPE).
        self.n_embd_inp: int = llama_cpp.llama_model_n_embd_inp(self._model)
        self.n_pos: int = 4 if llama_cpp.llama_model_rope_type(self._model) in _MROPE else 1
        self.n_ctx_train: int = llama_cpp.llama_model_n_ctx_train(self._model)
        kinds = (llama_cpp.llama_model_is_recurrent, llama_cpp.llama_model_is_hybrid)
        self.recurrent = any(kind(self._model) for kind in kinds)  # its cache is a state, wholly or in part

    @property
    def handle(self) -> Any:
        if self._model is None:
            raise EngineError(f"{self.path}: used after it was closed")
        return self._model

    def is_end(self, token: int) -> bool:
        """Whether a token ends the generation, as EOS and EOT do."""
        return bool(llama_cpp.llama_vocab_is_eog(self.vocab, token))

    @property
    def bos(self) -> int | None:
        """The token that begins a text, if the vocabulary has one."""
        token = llama_cpp.llama_vocab_bos(self.vocab)
        return token if token >= 0 else None

    def tokenize(self, text: str, special: bool = True, add_bos: bool = True, n_ctx: int | None = None) -> list[int]:
        """Token ids of a text. `special`: names such as `<|im_end|>` are tokens. `add_bos`: as the model wants it.

        Raises TextError for a text that llama.cpp cannot split, and PromptTooLong, before it is split, for a large one
        that needs more than n_ctx tokens; see `llamabase.llama.tokenizing`.
        """
        return self._tokenizer.ids(text, special, add_bos, n_ctx)

    def piece(self, token: int, special: bool = False) -> bytes:
        """The bytes of a token: possibly a part of a character. Control tokens are empty unless `special`."""
        return self._tokenizer.piece(token, special)

    def close(self) -> None:
        if self._model is not None:
            for sampler in self.samplers.values():
                llama_cpp.llama_sampler_free(sampler)
            llama_cpp.llama_model_free(self._model)
            self._model = None
