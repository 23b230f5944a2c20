"""The seam over llama.cpp: models and contexts.

`llama_cpp.Llama` keeps an n_ctx x n_vocab array of scores and ignores refused rewinds, so everything here drives the
`llama_*` functions that llama-cpp-python binds. A Model owns weights, a Context owns one KV cache.
"""

from __future__ import annotations

import ctypes
import os
from pathlib import Path
from typing import Any

import llama_cpp

from llamabase.errors import EngineError, FileFormatError
from llamabase.gguf.reader import GGUFFile

from .library import Owner, interruptible, last_error, start
from .tokenizing import Tokenizer

_MROPE = (llama_cpp.LLAMA_ROPE_TYPE_MROPE, llama_cpp.LLAMA_ROPE_TYPE_IMROPE)


class Model(Owner):
    """Weights and vocabulary of one GGUF.

    Raises EngineError where llama.cpp cannot load it, with llama.cpp's reason.
    """

    def __init__(self, path: str | Path, n_gpu_layers: int | None = None, vocab_only: bool = False) -> None:
        self._model = None
        self.path = Path(path)
        start()
        params = llama_cpp.llama_model_default_params()
        params.vocab_only = vocab_only
        params.load_mtp = True  # a block for multi-token prediction, where the file has one
        if n_gpu_layers is not None:
            params.n_gpu_layers = n_gpu_layers
        if not self.path.is_file():
            raise EngineError(f"{self.path}: there is no such file")
        if not vocab_only:
            try:
                file = GGUFFile(self.path)
            except FileFormatError:
                pass  # llama.cpp says itself what it cannot read
            else:
                file.require_loadable()
        with interruptible() as go_on:
            params.progress_callback = progress = llama_cpp.llama_progress_callback(lambda *_: go_on())
            self._model = llama_cpp.llama_model_load_from_file(os.fsencode(self.path), params)
            del progress  # kept alive until here
        if self._model is None:
            raise EngineError(f"{self.path}: llama.cpp cannot load it: {last_error()}")
        self.vocab = llama_cpp.llama_model_get_vocab(self._model)
        self._tokenizer = Tokenizer(self.path, self._model, self.vocab)
        self.samplers: dict[Any, Any] = {}  # of llama.cpp's that take long to make, to be cloned
        self.n_vocab: int = llama_cpp.llama_vocab_n_tokens(self.vocab)
        self.n_embd: int = llama_cpp.llama_model_n_embd(self._model)
        # Numbers of an input embedding, more than n_embd with DeepStack, and its positions, four with M-RoPE.
        self.n_embd_inp: int = llama_cpp.llama_model_n_embd_inp(self._model)
        self.n_pos: int = 4 if llama_cpp.llama_model_rope_type(self._model) in _MROPE else 1
        self.n_ctx_train: int = llama_cpp.llama_model_n_ctx_train(self._model)
        # Whether its cache is a state that goes on from token to token, wholly or in part.
        self.recurrent: bool = llama_cpp.llama_model_is_recurrent(self._model) or llama_cpp.llama_model_is_hybrid(
            self._model
        )

    @property
    def handle(self) -> Any:
        if self._model is None:
            raise EngineError(f"{self.path}: used after it was closed")
        return self._model

    def is_end(self, token: int) -> bool:
        """Whether a token ends the generation (EOS, EOT and their like)."""
        return bool(llama_cpp.llama_vocab_is_eog(self.vocab, token))

    @property
    def bos(self) -> int | None:
        """The token a text begins with where the vocabulary has one."""
        token = llama_cpp.llama_vocab_bos(self.vocab)
        return token if token >= 0 else None

    def tokenize(self, text: str, special: bool = True, add_bos: bool = True, n_ctx: int | None = None) -> list[int]:
        """Token ids of a text; `special` reads `<|im_end|>` and its like as tokens, `add_bos` as the model wants it.

        Raises TextError for a text that llama.cpp cannot split, and PromptTooLong before a large one is split that
        n_ctx tokens cannot hold; see `llamabase.llama.tokenizing`.
        """
        return self._tokenizer.ids(text, special, add_bos, n_ctx)

    def piece(self, token: int, special: bool = False) -> bytes:
        """The bytes of a token: possibly a part of a character. Control tokens are empty unless `special`."""
        size = 64
        while True:
            buffer = ctypes.create_string_buffer(size)
            n = llama_cpp.llama_token_to_piece(self.vocab, token, buffer, size, 0, special)
            if n >= 0:
                return buffer.raw[:n]
            size = -n

    def close(self) -> None:
        if self._model is not None:
            for sampler in self.samplers.values():
                llama_cpp.llama_sampler_free(sampler)
            llama_cpp.llama_model_free(self._model)
            self._model = None
