"""From text to token ids: llama.cpp's own ids for any text, or a refusal with its reason.

llama.cpp splits a text before it merges, for many vocabularies with std::regex, which recurses once for each character
of a match: 30,000 letters in a row overflow a stack of 8 MB, and the process ends. So a text is measured first. A text
with a long run of characters, and any large one, is tokenized in a thread whose stack fits its longest run, one such
text at a time. A text that would take minutes with its vocabulary is refused.
"""

from __future__ import annotations

import ctypes
import itertools
import re
import threading
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import Path
from typing import Any

import llama_cpp

from llamabase.errors import FileFormatError, PromptTooLong, TextError

SHALLOW = 1_000  # characters of a run that the stack of any thread holds: they take 320 kB
DEEPEST = 1_000_000  # characters of a run: a longer one needs more than half a GB of stack
STACK = 512  # bytes of stack for a character of a run: measured 320, with every expression (GCC 12, x86-64)
LARGE = 1 << 20  # bytes of a text, for each of which llama.cpp holds up to 140 bytes of memory
LARGEST = 1 << 30  # bytes of a text: llama.cpp counts them, and what it makes of them, in 32 bits
MANY = 1_000  # special tokens that llama.cpp finds in 10 ms: the time grows with the square, to hours for a million
MOST = 10_000  # control tokens of a text: llama.cpp compiles its expressions anew after each, in up to 1.2 ms
STEPS = 50_000_000  # of an expression that looks through a run again from each of its characters: 3 to 6 s
_NEGLIGIBLE = 100  # characters of a run whose square does not matter

# What one match can span: a word, then white space, or the line ends and slashes of `[\r\n/]*`. Only EXAONE's
# expression goes on to another word, over single spaces. Only ASCII white space is certain to end a word, and any white
# space that Python knows may continue it.
_WORD, _LINE, _SPACE = re.compile(r"[^ \t\n\v\f\r]+"), re.compile(r"[^\r\n]+"), re.compile(r"\s+")
_ENDS = re.compile(r"[\r\n/]+")
_SPANS = {"exaone-moe": _LINE}
# Runs that an expression looks through again from each of their characters, by `tokenizer.ggml.pre`: `\s+$`,
# `\s*[\r\n]+` before `\s{512}`, and `(?=(\d{3})+(?!\d))`.
_SLOW = {"deepseek-llm": _SPACE, "jais-2": _SPACE, "superbpe": re.compile(r"[0-9]+")}

_one_at_a_time = threading.Lock()
_SPM, _BPE, _WPM, _RWKV, _PLAMO2 = 1, 2, 3, 5, 6  # of llama_vocab_type
_STRIPS = llama_cpp.LLAMA_TOKEN_ATTR_LSTRIP | llama_cpp.LLAMA_TOKEN_ATTR_RSTRIP
_CONTROL = llama_cpp.LLAMA_TOKEN_ATTR_CONTROL | llama_cpp.LLAMA_TOKEN_ATTR_UNKNOWN
_USER = llama_cpp.LLAMA_TOKEN_ATTR_USER_DEFINED


class Tokenizer:
    """llama_tokenize over the vocabulary of a loaded model, which must outlive it.

    Raises TextError for a text that llama.cpp cannot tokenize, or not within seconds, and FileFormatError for a
    vocabulary over which it ends the process or never ends.
    """

    def __init__(self, path: Path, model: Any, vocab: Any) -> None:
        self._path, self._vocab = path, vocab
        self._kind = llama_cpp.llama_vocab_type(vocab)
        self._name, pre = (_metadata(model, f"tokenizer.ggml.{key}") for key in ("model", "pre"))
        self._word, self._slow = _SPANS.get(pre, _WORD), _SLOW.get(pre)

    def ids(self, text: str, special: bool = True, add_bos: bool = True, n_ctx: int | None = None) -> list[int]:
        """Token ids of a text; `special` and `add_bos` as llama_tokenize takes them.

        n_ctx: raise PromptTooLong, before it is split, for a large text that needs more tokens than this.
        """
        data = text.encode("utf-8", "replace")  # an argument may hold bytes that are not UTF-8
        if self._flaw:
            raise FileFormatError(f"{self._path}: {self._flaw}; get another file")
        if len(data) <= SHALLOW:
            return self._ids(data, special, add_bos)
        if len(data) > LARGEST:
            raise TextError(f"{self._path}: a text of {len(data)} bytes is too large for llama.cpp; cut it in parts")
        if n_ctx is not None and len(data) > LARGE and self._longest:
            self._require_room(-(-len(data) // self._longest), n_ctx)
        text = data.decode()
        self._require_quick(text)
        depth, pieces = self._depth(text), [data]
        if len(data) > MANY * 3:  # bytes of `<s>`, the shortest special token that files have
            special = special and self._has_control(text)
            pieces = list(self._pieces(data, special))
        if depth <= SHALLOW and len(data) <= LARGE:
            return self._joined(pieces, special, add_bos)
        return self._apart(depth, pieces, special, add_bos)

    def piece(self, token: int, special: bool) -> bytes:
        """The bytes of a token: possibly a part of a character. Control tokens are empty unless `special`."""
        size = 64
        while True:
            buffer = ctypes.create_string_buffer(size)
            n = llama_cpp.llama_token_to_piece(self._vocab, token, buffer, size, 0, special)
            if n >= 0:
                return buffer.raw[:n]
            size = -n

    def _ids(self, data: bytes, special: bool, add_bos: bool) -> list[int]:
        room = len(data) + 8
        while True:
            ids = (llama_cpp.llama_token * room)()
            n = llama_cpp.llama_tokenize(self._vocab, data, len(data), ids, room, add_bos, special)
            if n >= 0:
                return list(ids[:n])
            if -n <= room:
                raise TextError(f"{self._path}: llama.cpp could not tokenize a text of {len(data)} bytes")
            room = -n  # a vocabulary may make several tokens of one byte, such as of a space without a token

    def _joined(self, pieces: Sequence[bytes], special: bool, add_bos: bool) -> list[int]:
        if len(pieces) == 1:
            return self._ids(pieces[0], special, add_bos)
        around = self._ids(b"", special, add_bos)
        n_before = int(bool(around) and (self._kind == _WPM or llama_cpp.llama_vocab_get_add_bos(self._vocab)))
        between = itertools.chain.from_iterable(self._ids(piece, special, False) for piece in pieces)
        return [*around[:n_before], *between, *around[n_before:]]

    def _apart(self, depth: int, pieces: Sequence[bytes], special: bool, add_bos: bool) -> list[int]:
        """`_joined` in a thread with a stack for matches of `depth` characters; the unused part takes no memory."""
        with _one_at_a_time, ThreadPoolExecutor(1, "tokenize") as pool:  # which also waits for it if interrupted
            before = threading.stack_size(((depth * STACK >> 20) + 8) << 20)  # of any thread that starts meanwhile
            try:
                future = pool.submit(self._joined, pieces, special, add_bos)
            except RuntimeError as error:
                raise TextError(
                    f"{self._path}: a run of {depth} characters needs a stack of {depth * STACK >> 20} MB, which this "
                    "system does not give; break it with white space"
                ) from error
            finally:
                threading.stack_size(before)
            return future.result()

    def _depth(self, text: str) -> int:
        """Characters that one match can span, at most. Raises TextError for more than DEEPEST."""
        named = {"a line" if self._word is _LINE else "a word": self._word, "white space": _SPACE, "line ends": _ENDS}
        runs = {
            what: max((range(*match.span()) for match in pattern.finditer(text)), key=len, default=range(0))
            for what, pattern in named.items()
        }
        depth = sum(map(len, runs.values()))
        if depth > DEEPEST:
            what, run = max(runs.items(), key=lambda named: len(named[1]))
            raise TextError(
                f"{self._path}: {what} of {len(run)} characters, which begins with {text[run[0] : run[0] + 20]!r} at "
                f"character {run[0]}, is longer than the {DEEPEST} that can be split; break it up"
            )
        return depth

    def _require_quick(self, text: str) -> None:
        if self._slow is None:
            return
        lengths = [match.end() - match.start() for match in self._slow.finditer(text)]
        if sum(length * length for length in lengths if length > _NEGLIGIBLE) > STEPS:
            what = "white space" if self._slow is _SPACE else "digits"
            raise TextError(
                f"{self._path}: the longest of the text's runs of {what} has {max(lengths)} characters, over which "
                "llama.cpp takes too long with this vocabulary; shorten them"
            )

    def _require_room(self, fewest: int, n_ctx: int) -> None:
        if fewest > n_ctx:
            raise PromptTooLong(
                f"{self._path}: the prompt has at least {fewest} tokens, {fewest - n_ctx} more than the context of "
                f"{n_ctx}; raise --ctx-size (n_ctx) or shorten it"
            )

    def _too_many(self, n: int, most: int) -> TextError:
        return TextError(
            f"{self._path}: a text with {n} special tokens is more than llama.cpp can split in time; "
            f"give at most {most} at once"
        )

    def _has_control(self, text: str) -> bool:
        """Whether a text holds a control token; if not, llama.cpp need not look for each of thousands."""
        if (n := sum(1 for _ in self._control.finditer(text))) > MOST:
            raise self._too_many(n, MOST)
        return n > 0

    def _pieces(self, data: bytes, special: bool) -> Iterator[bytes]:
        """A text cut before special tokens. The ids of the pieces are together those of the whole, but for BOS and EOS.

        llama.cpp first finds the longest of the special tokens, from left to right, then shorter ones in what is left.
        So a token that it finds in the whole it also finds in a piece that begins with it, and the text before a token
        never matters to the text after it.
        """

        def places(name: bytes, text: bytes) -> list[int]:
            return [match.start() for match in re.finditer(re.escape(name), text)]

        left, starts, ambiguous = data, list[int](), self._strips
        names = [name for name, control in self._special if (special or not control) and name in data]
        for length, group in itertools.groupby(names, len):
            before = left
            for name in group:
                starts += places(name, left)
                # Of two of one length, it may look for the other one first.
                ambiguous |= places(name, left) != places(name, before)
                left = left.replace(name, b"\xff" * length)  # a byte that UTF-8 does not have
        if len(starts) > MANY and ambiguous:
            raise self._too_many(len(starts), MANY)
        for start, end in itertools.pairwise([0, *sorted(starts)[MANY::MANY], len(data)]):
            yield data[start:end]

    @cached_property
    def _strips(self) -> bool:
        """Whether special tokens take the white space beside them, too."""
        return any(attribute & _STRIPS for attribute in self._attributes)

    @cached_property
    def _attributes(self) -> list[int]:
        n = llama_cpp.llama_vocab_n_tokens(self._vocab)
        return [llama_cpp.llama_vocab_get_attr(self._vocab, token) for token in range(n)]

    @cached_property
    def _texts(self) -> list[bytes]:
        n = llama_cpp.llama_vocab_n_tokens(self._vocab)
        return [llama_cpp.llama_vocab_get_text(self._vocab, token) or b"" for token in range(n)]

    @cached_property
    def _special(self) -> list[tuple[bytes, bool]]:
        """Texts of the special tokens in llama.cpp's order, the longest first, and whether it is a control token."""
        named = zip(self._texts, self._attributes, strict=True)
        special = [(text, bool(kind & _CONTROL)) for text, kind in named if text and kind & (_CONTROL | _USER)]
        return sorted(special, key=lambda each: -len(each[0]))

    @cached_property
    def _control(self) -> re.Pattern[str]:
        texts = (text.decode("utf-8", "replace") for text, control in self._special if control)
        return re.compile(_any_of(text[:64] for text in texts))  # a longer expression cannot be compiled

    @cached_property
    def _longest(self) -> int:
        """Bytes of a text that one token can stand for, at most; 0 if parts of a text may become no token."""
        if self._kind == _BPE:  # the byte-level kind writes a byte as one character; a byte without its token is lost
            alphabet = sum(len(text.decode("utf-8", "replace")) == 1 for text in self._texts)
            whole = self._name == "gpt2" and alphabet >= 256
        else:
            whole = self._kind in (_SPM, _RWKV, _PLAMO2)
        return max(map(len, self._texts)) if whole and not self._strips else 0

    @cached_property
    def _flaw(self) -> str:
        """What ends the process, or never ends, with this vocabulary; "" if nothing does."""
        lacking: set[bytes] = set()
        if self._kind == llama_cpp.LLAMA_VOCAB_TYPE_NONE:
            return "it has no tokenizer"
        if self._kind == _SPM:
            texts = set(self._texts)
            alphabet = ((bytes([byte]), f"<0x{byte:02X}>".encode()) for byte in range(256))
            lacking = {byte for byte, name in alphabet if texts.isdisjoint((byte, name))}
        if self._kind == _RWKV:
            pieces = {self.piece(token, True) for token in range(len(self._texts))} - {b""}
            lacking = {piece[:1] for piece in pieces} - pieces
        return f"its vocabulary has no token for the byte 0x{min(lacking).hex().upper()}" if lacking else ""


def _metadata(model: Any, key: str) -> str:
    buffer = ctypes.create_string_buffer(256)
    n = llama_cpp.llama_model_meta_val_str(model, key.encode(), buffer, len(buffer))
    return buffer.value.decode("utf-8", "replace") if n >= 0 else ""


def _any_of(texts: Iterable[str]) -> str:
    """An expression for the beginnings of these texts, whose time to match does not grow with their number."""
    rests: dict[str, list[str]] = defaultdict(list)
    for text in texts:
        if not text:  # a longer one begins here, too
            return ""
        rests[text[0]].append(text[1:])
    ways = [re.escape(char) + _any_of(rest) for char, rest in rests.items()]
    return ways[0] if len(ways) == 1 else f"(?:{'|'.join(ways) or '(?!)'})"
