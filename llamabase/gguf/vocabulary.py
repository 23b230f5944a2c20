"""The vocabulary of a GGUF file: its tokens, its fingerprint, and the tokens no drafter may lose."""

from __future__ import annotations

import hashlib
import re
import struct
from collections import Counter
from functools import cached_property

import numpy as np
from gguf.constants import TokenType
from gguf.vocab import bytes_to_unicode

from llamabase.errors import FileFormatError, VocabularyMismatch

from .reader import GGUFFile

MOST_TOKENS = 1 << 24  # of a vocabulary, far more than any has

# Names by which llama.cpp recognises the end of a turn, even if the metadata names no such id.
END_OF_TURN = {
    b"<|eot_id|>", b"<|eom_id|>", b"<|im_end|>", b"<|end|>", b"<end_of_turn>", b"<|endoftext|>", b"<|end_of_text|>",
    b"</s>", b"<EOT>", b"_<EOT>", b"<|end_of_sentence|>", b"<turn|>", b"[EOS]", b"<|return|>", b"<|call|>",
}  # fmt: skip

# Byte-level BPE writes each byte as one printable character.
_BYTE_OF = {char: byte for byte, char in bytes_to_unicode().items()}
_BYTE = re.compile(rb"<0x[0-9A-Fa-f]{2}>")
# Rows that are reserved or pad the table: control tokens by type, but no model was trained to emit them.
_PLACEHOLDER = re.compile(rb"<unused\d+>|<\|?reserved_special_token_?\d+\|?>|<\|?reserved_token_?\d+\|?>|\[PAD\d+\]")


class Vocabulary:
    """Token texts (as stored) and types in id order, read from a GGUF file or from a companion file.

    Raises FileFormatError if the file has no tokenizer, or one that llama.cpp cannot use.
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
        # llama.cpp reads each up to a NUL, and names empty ones itself.
        counts = Counter(token.partition(b"\0")[0] for token in self.tokens)
        if (twice := next((token for token, n in counts.items() if n > 1 and token), None)) is not None:
            raise FileFormatError(f"{file.path}: has the token {twice!r} twice, over which llama.cpp ends the process")
        types = file.integers("tokenizer.ggml.token_type")
        self.types = np.ones(len(self.tokens), np.int32) if types is None else types.astype(np.int32)
        if len(self.types) != len(self.tokens):
            raise FileFormatError(f"{file.path}: has {len(self.tokens)} tokens and {len(self.types)} token types")
        if not isinstance(self.model, str):
            raise FileFormatError(f"{file.path}: the key tokenizer.ggml.model should hold text; download it again")
        keys = [key for key in file.fields if key.startswith("tokenizer.ggml.") and key.endswith("_token_id")]
        self.special_ids = sorted({int(file.integer(key)) for key in keys})

    def __len__(self) -> int:
        return len(self.tokens)

    @cached_property
    def n_real(self) -> int:
        """Tokens without the padding at the end: tables of one family are padded to different lengths."""
        used = np.flatnonzero(self.types != TokenType.UNUSED)
        return int(used[-1]) + 1 if len(used) else 0

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 over length, bytes and type of each token in id order, without the padding at the end."""
        return self.fingerprint_of_first(self.n_real)

    def fingerprint_of_first(self, n: int) -> str:
        tokens = zip(self.tokens[:n], self.types[:n].tolist(), strict=True)
        encoded = (struct.pack("<I", len(text)) + text + struct.pack("<i", kind) for text, kind in tokens)
        return hashlib.sha256(b"".join(encoded)).hexdigest()

    def text(self, token: int) -> bytes:
        """The bytes that a token stands for; of a control token, its name."""
        stored, kind = self.tokens[token], self.types[token]
        if kind == TokenType.BYTE:
            if not _BYTE.fullmatch(stored):
                raise FileFormatError(f"{self.path}: token {token} should be a byte, as <0x0A> is; download it again")
            return bytes([int(stored[3:5], 16)])
        if kind in (TokenType.CONTROL, TokenType.UNKNOWN, TokenType.UNUSED):
            return stored
        if self.model == "gpt2":
            try:
                return bytes(_BYTE_OF[char] for char in stored.decode("utf-8"))
            except (KeyError, UnicodeDecodeError):
                return stored
        return stored.replace("▁".encode(), b" ")

    @cached_property
    def forced(self) -> list[int]:
        """Ids that every keep list holds, the most needed first: ends of text and turn, control, unknown, byte,
        user-defined and single-byte tokens. Placeholders (`<unused12>`) are not among them: no model emits one, and
        Gemma has 6242.
        """
        named = [i for i in self.special_ids if 0 <= i < len(self)]
        ends = [i for i, text in enumerate(self.tokens) if text in END_OF_TURN]
        order = (TokenType.CONTROL, TokenType.UNKNOWN, TokenType.BYTE, TokenType.USER_DEFINED)
        special = [i for kind in order for i in np.flatnonzero(self.types == kind).tolist()]
        alphabet = {"▁".encode(), *(bytes([byte]) for byte in range(128))}
        if self.model == "gpt2":
            alphabet = {char.encode() for char in _BYTE_OF}
        single = [i for i, text in enumerate(self.tokens) if text in alphabet]
        used = [i for i in special if not _PLACEHOLDER.fullmatch(self.tokens[i])]
        return list(dict.fromkeys([*named, *ends, *used, *single]))


def require_same(a: Vocabulary, b: Vocabulary) -> None:
    """Raise VocabularyMismatch, naming both files and the first difference, unless an id means the same in both.

    One table may be longer than the other (Qwen2.5 pads to 151,936 or 152,064 rows): ids beyond the shorter one are
    never drafted. Types may differ between converters, which does no harm.
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
