"""From text to token ids: llama.cpp's own ids for any text, or a refusal with its reason.

llama.cpp splits a text before it merges, for many vocabularies with std::regex, which recurses once for each character
of a match: 30,000 letters in a row overflow a stack of 8 MB, and the process ends. So a text is measured first. A text
with a long run of characters, and any large one, is tokenized in a thread whose stack is made for its longest run, one
such text at a time. What would take minutes with its vocabulary is refused.
"""

from __future__ import annotations

import ctypes
import re
import threading
from collections.abc import Iterator, Sequence
from functools import cached_property
from itertools import groupby
from pathlib import Path
from typing import Any

import llama_cpp

from llamabase.errors import FileFormatError, PromptTooLong, TextError

SHALLOW = 1_000  # characters of a run that the stack of any thread holds: they take 320 kB
DEEPEST = 1_000_000  # characters of a run: more than half a GB of stack beyond
STACK = 512  # bytes of stack for a character of a run: measured 320, with every expression (GCC 12, x86-64)
LARGE = 1 << 20  # bytes of a text, for each of which llama.cpp holds up to 140 bytes of memory
LARGEST = 1 << 30  # bytes of a text: llama.cpp counts them, and what it makes of them, in 32 bits
MANY = 1_000  # special tokens that llama.cpp finds in 10 ms: the time grows with the square, to hours for a million
MOST = 10_000  # control tokens of a text: the expressions are compiled anew for what is between two, in up to 1.2 ms
STEPS = 50_000_000  # of an expression that looks through a run again from each of its characters: 3 to 6 s
_BEGUN = 100  # characters of a run whose square does not matter

# What one match can span: a word, then white space, or the line ends and slashes of `[\r\n/]*`. No expression goes on
# to another word, but EXAONE's does over single spaces. Only ASCII white space is certain to end a word, and any that
# Python knows may go on with it.
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
    vocabulary with which it never ends or ends the process.
    """

    def __init__(self, path: Path, model: Any, vocab: Any) -> None:
        self._path, self._vocab = path, vocab
        self._kind = llama_cpp.llama_vocab_type(vocab)
        self._name, pre = (_metadata(model, f"tokenizer.ggml.{key}") for key in ("model", "pre"))
        self._word, self._slow = _SPANS.get(pre, _WORD), _SLOW.get(pre)

    def ids(self, text: str, special: bool = True, add_bos: bool = True, n_ctx: int | None = None) -> list[int]:
        """Token ids of a text; `special` and `add_bos` as llama_tokenize takes them.

        n_ctx: raise PromptTooLong for a large text that cannot be as few tokens, before it is split.
        """
        data = text.encode("utf-8", "replace")  # bytes of an argument that were no UTF-8
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
        if len(data) > MANY * 3:  # bytes of the shortest that one finds in files, `<s>`
            special = special and self._has_control(text)
            pieces = list(self._pieces(data, special))
        if depth <= SHALLOW and len(data) <= LARGE:
            return self._joined(pieces, special, add_bos)
        return self._apart(depth, pieces, special, add_bos)

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
        ids = around[:n_before]
        for piece in pieces:
            ids += self._ids(piece, special, False)
        return ids + around[n_before:]

    def _apart(self, depth: int, pieces: Sequence[bytes], special: bool, add_bos: bool) -> list[int]:
        """`_joined` in a thread with a stack for matches of `depth` characters; untouched, it takes no memory."""
        found: list[list[int]] = []
        failures: list[BaseException] = []

        def run() -> None:
            try:
                found.append(self._joined(pieces, special, add_bos))
            except BaseException as failure:
                failures.append(failure)

        thread = threading.Thread(target=run, name="tokenize")
        with _one_at_a_time:
            before = threading.stack_size(((depth * STACK >> 20) + 8) << 20)  # of any thread that starts meanwhile
            try:
                thread.start()
            except RuntimeError as error:
                raise TextError(
                    f"{self._path}: a run of {depth} characters needs a stack of {depth * STACK >> 20} MB, which this "
                    "system does not give; break it with white space"
                ) from error
            finally:
                threading.stack_size(before)
            try:
                thread.join()
            finally:  # an interrupted wait does not end the thread, which reads the vocabulary
                thread.join()
        if failures:
            raise failures[0]
        return found[0]

    def _depth(self, text: str) -> int:
        """Characters that one match may span, at most. Raises TextError for more than any stack is made for."""
        named = ("a line" if self._word is _LINE else "a word", self._word), ("white space", _SPACE)
        found = [(what, *_longest(pattern, text)) for what, pattern in (*named, ("line ends", _ENDS))]
        depth = sum(length for _, length, _ in found)
        if depth > DEEPEST:
            what, length, start = max(found, key=lambda each: each[1])
            raise TextError(
                f"{self._path}: {what} of {length} characters, which begins with {text[start : start + 20]!r} at "
                f"character {start}, is longer than the {DEEPEST} that can be split; break it up"
            )
        return depth

    def _require_quick(self, text: str) -> None:
        if self._slow is None:
            return
        lengths = [match.end() - match.start() for match in self._slow.finditer(text)]
        if sum(length * length for length in lengths if length > _BEGUN) > STEPS:
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

    def _has_control(self, text: str) -> bool:
        """Whether a text holds a control token; if not, llama.cpp need not look for each of thousands.

        Raises TextError for too many.
        """
        n = 0 if self._control is None else sum(1 for _ in self._control.finditer(text))
        if n > MOST:
            raise TextError(
                f"{self._path}: a text with {n} special tokens is more than llama.cpp can split in time; "
                f"give at most {MOST} at once"
            )
        return n > 0

    def _pieces(self, data: bytes, special: bool) -> Iterator[bytes]:
        """A text cut before special tokens. Their ids are together those of the whole, but for BOS and EOS.

        llama.cpp first finds the longest of the special tokens, from left to right, then shorter ones in what is left.
        So a token that it finds in the whole it finds in a piece that begins with it, and what stands before a token
        never matters to what stands after it.
        """
        names = [name for name, control in self._special if (special or not control) and name in data]
        taken, starts = bytearray(len(data)), []
        for name in names:
            at = data.find(name)
            while at >= 0:
                end = at + len(name)
                mark = taken.rfind(1, at, end)
                if mark < 0:
                    taken[at:end] = b"\1" * len(name)
                    starts.append(at)
                    mark = end - 1
                at = data.find(name, mark + 1)
        if len(starts) > MANY and self._ambiguous:
            raise TextError(
                f"{self._path}: a text with {len(starts)} special tokens is more than llama.cpp can split in time; "
                f"give at most {MANY} at once"
            )
        cuts = [0, *sorted(starts)[MANY::MANY], len(data)]
        for i in range(len(cuts) - 1):
            yield data[cuts[i] : cuts[i + 1]]

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
        found = [(text, bool(attribute & _CONTROL)) for text, attribute in named if attribute & (_CONTROL | _USER)]
        return sorted((each for each in found if each[0]), key=lambda each: -len(each[0]))

    @cached_property
    def _control(self) -> re.Pattern[str] | None:
        return _any_of([text for text, control in self._special if control])

    @cached_property
    def _ambiguous(self) -> bool:
        """Whether special tokens take white space with them, or two of one length overlap, whose order is unknown."""
        if any(attribute & _STRIPS for attribute in self._attributes):
            return True
        for _, group in groupby(self._special, lambda each: len(each[0])):
            heads: dict[bytes, set[bytes]] = {}
            names = [name for name, _ in group]
            for name in names:
                for n in range(1, len(name)):
                    heads.setdefault(name[:n], set()).add(name)
            if any(heads.get(name[-n:], {name}) != {name} for name in names for n in range(1, len(name))):
                return True
        return False

    @cached_property
    def _longest(self) -> int:
        """Bytes of a text that one token can stand for, at most; 0 if parts of a text may become no token."""
        if any(attribute & _STRIPS for attribute in self._attributes):
            return 0
        if self._kind == _BPE:  # the byte-level kind writes a byte as one character; without its token a byte is lost
            if self._name != "gpt2" or sum(len(text.decode("utf-8", "replace")) == 1 for text in self._texts) < 256:
                return 0
        elif self._kind not in (_SPM, _RWKV, _PLAMO2):
            return 0
        return max(map(len, self._texts))

    @cached_property
    def _flaw(self) -> str:
        """What ends the process, or never ends, with this vocabulary; "" if nothing does."""
        if self._kind == _SPM:
            texts = set(self._texts)
            for byte in range(256):
                if f"<0x{byte:02X}>".encode() not in texts and bytes([byte]) not in texts:
                    return f"its vocabulary has no token for the byte 0x{byte:02X}"
        if self._kind == llama_cpp.LLAMA_VOCAB_TYPE_NONE:
            return "it has no tokenizer"
        if self._kind == _RWKV:
            starts = {text[:1] for text in map(self._unescaped, range(len(self._texts))) if text}
            lone = {text for text in map(self._unescaped, range(len(self._texts))) if len(text) == 1}
            if starts - lone:
                return f"its vocabulary has no token for the byte 0x{min(starts - lone).hex().upper()}"
        return ""

    def _unescaped(self, token: int) -> bytes:
        buffer = ctypes.create_string_buffer(1024)
        n = llama_cpp.llama_token_to_piece(self._vocab, token, buffer, len(buffer), 0, True)
        return buffer.raw[: max(n, 0)]


def _metadata(model: Any, key: str) -> str:
    buffer = ctypes.create_string_buffer(256)
    n = llama_cpp.llama_model_meta_val_str(model, key.encode(), buffer, len(buffer))
    return buffer.value.decode("utf-8", "replace") if n >= 0 else ""


def _longest(pattern: re.Pattern[str], text: str) -> tuple[int, int]:
    """Length and start of the longest match; (0, 0) without one."""
    return max(((match.end() - match.start(), match.start()) for match in pattern.finditer(text)), default=(0, 0))


def _any_of(texts: Sequence[bytes]) -> re.Pattern[str] | None:
    """Finds what begins as any of these texts does, in a time that does not grow with their number."""
    tree: dict[str, Any] = {}
    for text in texts:
        node = tree
        for char in text.decode("utf-8", "replace")[:64]:  # nested deeper, an expression cannot be compiled
            node = node.setdefault(char, {})
        node[""] = {}

    def written(node: dict[str, Any]) -> str:
        if "" in node:  # whatever is longer begins here, too
            return ""
        ways = [re.escape(char) + written(child) for char, child in node.items()]
        return ways[0] if len(ways) == 1 else f"(?:{'|'.join(ways)})"

    return re.compile(written(tree)) if tree else None
