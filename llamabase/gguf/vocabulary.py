"""The vocabulary of a GGUF file: its tokens, its fingerprint, and the tokens no drafter may lose."""

from __future__ import annotations

import hashlib
import re
import struct
from collections import Counter
from functools import cached_property, lru_cache

import numpy as np
from gguf.constants import TokenType

from llamabase.errors import FileFormatError, VocabularyMismatch

from .reader import GGUFFile

MOST_TOKENS = 1 << 24  # of a vocabulary, far more than any has

# Names under which llama.cpp recognises the end of a turn even where the metadata names no such id.
END_OF_TURN = {
    b"<|eot_id|>", b"<|eom_id|>", b"<|im_end|>", b"<|end|>", b"<end_of_turn>", b"<|endoftext|>", b"<|end_of_text|>",
    b"</s>", b"<EOT>", b"_<EOT>", b"<|end_of_sentence|>", b"<turn|>", b"[EOS]", b"<|return|>", b"<|call|>",
}  # fmt: skip

# Rows reserved for the future or padding the table: control tokens by type, but no model was trained to emit them.
_BYTE = re.compile(rb"<0x[0-9A-Fa-f]{2}>")
_PLACEHOLDER = re.compile(rb"<unused\d+>|<\|?reserved_special_token_?\d+\|?>|<\|?reserved_token_?\d+\|?>|\[PAD\d+\]")


@lru_cache(maxsize=1)
def _byte_of_char() -> dict[str, int]:
    """Byte-level BPE writes each byte as one printable character (GPT-2's table); this is its inverse."""
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


def _twice(tokens: list[bytes]) -> bytes | None:
    """A token that llama.cpp finds twice: it reads each up to a NUL, and names empty ones itself."""
    read = [token.partition(b"\0")[0] for token in tokens]
    return next((token for token, n in Counter(read).items() if n > 1 and token), None)


class Vocabulary:
    """Token texts (as stored) and types in id order, read from a GGUF file or from a companion file.

    Raises FileFormatError where the file has no tokenizer, or one that llama.cpp cannot use.
    """

    def __init__(self, file: GGUFFile) -> None:
        if "tokenizer.ggml.tokens" not in file.fields:
            raise FileFormatError(
                f"{file.path}: holds no tokenizer"
                + ("; it is a trimmed drafter: give the original" if "gguf_trim.k" in file.fields else "")
            )
        self.path = file.path
        self.model: str = file.get("tokenizer.ggml.model", "")
        self.tokens = file.strings("tokenizer.ggml.tokens")
        if (twice := _twice(self.tokens)) is not None:
            raise FileFormatError(f"{file.path}: has the token {twice!r} twice, over which llama.cpp ends the process")
        types = file.integers("tokenizer.ggml.token_type")
        self.types = np.ones(len(self.tokens), np.int32) if types is None else types.astype(np.int32)
        if len(self.types) != len(self.tokens):
            raise FileFormatError(f"{file.path}: has {len(self.tokens)} tokens and {len(self.types)} token types")
        if not isinstance(self.model, str):
            raise FileFormatError(f"{file.path}: the key tokenizer.ggml.model should hold text; download it again")
        self.special_ids = sorted(
            {
                int(file.integer(key))
                for key in file.fields
                if key.startswith("tokenizer.ggml.") and key.endswith("_token_id")
            }
        )

    def __len__(self) -> int:
        return len(self.tokens)

    @cached_property
    def n_real(self) -> int:
        """Tokens up to the last that is not filler: tables of one family are padded to different lengths."""
        used = np.flatnonzero(self.types != TokenType.UNUSED)
        return int(used[-1]) + 1 if len(used) else 0

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 over length, bytes and type of each token in id order, trailing filler left out."""
        return self.fingerprint_of_first(self.n_real)

    def fingerprint_of_first(self, n: int) -> str:
        digest = hashlib.sha256()
        types = self.types.tolist()
        digest.update(
            b"".join(
                struct.pack("<I", len(text)) + text + struct.pack("<i", kind)
                for text, kind in zip(self.tokens[:n], types[:n], strict=True)
            )
        )
        return digest.hexdigest()

    def text(self, token: int) -> bytes:
        """The bytes a token stands for (control tokens: their name)."""
        stored, kind = self.tokens[token], self.types[token]
        if kind == TokenType.BYTE:
            if not _BYTE.fullmatch(stored):
                raise FileFormatError(f"{self.path}: token {token} should be a byte, as <0x0A> is; download it again")
            return bytes([int(stored[3:5], 16)])
        if kind in (TokenType.CONTROL, TokenType.UNKNOWN, TokenType.UNUSED):
            return stored
        if self.model == "gpt2":
            table = _byte_of_char()
            try:
                return bytes(table[char] for char in stored.decode("utf-8"))
            except (KeyError, UnicodeDecodeError):
                return stored
        return stored.replace("▁".encode(), b" ")

    @cached_property
    def forced(self) -> list[int]:
        """Ids every keep list holds, the most needed first: ends of text and turn, control, unknown,
        user-defined, byte and single-byte tokens. Placeholders (`<unused12>`) wait for their counts instead:
        Gemma has 6242 of them, and no model emits one.
        """
        first = [i for i in self.special_ids if 0 <= i < len(self)]
        ends = [i for i, text in enumerate(self.tokens) if text in END_OF_TURN]
        by_type: dict[int, list[int]] = {kind: [] for kind in TokenType}
        for i in np.flatnonzero(self.types != TokenType.NORMAL).tolist():
            if not _PLACEHOLDER.fullmatch(self.tokens[i]):
                by_type.setdefault(int(self.types[i]), []).append(i)
        alphabet = {"▁".encode(), *(bytes([byte]) for byte in range(128))}
        if self.model == "gpt2":
            alphabet = {char.encode() for char in _byte_of_char()}
        single = [i for i, text in enumerate(self.tokens) if text in alphabet]
        order = [TokenType.CONTROL, TokenType.UNKNOWN, TokenType.BYTE, TokenType.USER_DEFINED]
        ranked = [*first, *ends, *(i for kind in order for i in by_type[kind]), *single]
        return list(dict.fromkeys(ranked))


def require_same(a: Vocabulary, b: Vocabulary) -> None:
    """Raise VocabularyMismatch, naming both files and the first difference, unless an id means the same in both.

    One table may be longer than the other (Qwen2.5 pads to 151,936 or 152,064 rows): ids beyond the shorter one are
    never drafted. Types may differ between converters and do no harm.
    """
    if a.fingerprint == b.fingerprint:
        return
    n = min(a.n_real, b.n_real)
    if a.tokens[:n] == b.tokens[:n] and n >= 0.99 * max(a.n_real, b.n_real):
        return
    i = next((i for i in range(n) if a.tokens[i] != b.tokens[i]), n)

    def show(v: Vocabulary) -> str:
        return repr(v.tokens[i].decode("utf-8", "replace")) if i < len(v) else "nothing"

    raise VocabularyMismatch(
        f"{a.path} and {b.path} have different vocabularies ({len(a)} tokens, {a.fingerprint[:12]}, and "
        f"{len(b)} tokens, {b.fingerprint[:12]}): token {i} is {show(a)} in one and {show(b)} in the other; "
        "use a drafter of the target's own family"
    )
