"""Models: the weights and the vocabulary of a GGUF, loaded by llama.cpp.

`llama_cpp.Llama` keeps an n_ctx x n_vocab array of scores and ignores refused rewinds, so this package calls the
`llama_*` functions that llama-cpp-python binds. A Model owns weights, a Context owns a KV cache.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
from pathlib import Path
from typing import Any

import llama_cpp

from llamabase.errors import EngineError, FileFormatError
from llamabase.gguf.reader import GGUFFile
from llamabase.gguf.tensors import is_block_alone

from .library import Owner, interruptible, last_error, start
from .tokenizing import Tokenizer

_NO_DEVICES = (ctypes.c_void_p * 1)()  # a list of devices that ends at once
_MROPE = (llama_cpp.LLAMA_ROPE_TYPE_MROPE, llama_cpp.LLAMA_ROPE_TYPE_IMROPE)


class Model(Owner):
    """Weights and vocabulary of one GGUF. Raises EngineError, with llama.cpp's reason, if it cannot be loaded.

    `cpu_only`: nothing of it is computed on another device. With n_gpu_layers = 0 llama.cpp would still move the
    products of large batches to a GPU, and lay out weights for that.
    """

    def __init__(
        self,
        path: str | Path,
        n_gpu_layers: int | None = None,
        vocab_only: bool = False,
        cpu_only: bool = False,
    ) -> None:
        self._model = None
        self.path = Path(path)
        start()
        params = llama_cpp.llama_model_default_params()
        params.vocab_only = vocab_only
        params.load_mtp = True  # the block for multi-token prediction, if the file has one
        if n_gpu_layers is not None:
            params.n_gpu_layers = n_gpu_layers
        if cpu_only:
            params.devices = ctypes.addressof(_NO_DEVICES)
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
