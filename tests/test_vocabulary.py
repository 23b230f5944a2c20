"""The vocabulary: which tokens no drafter may lose, what a token's bytes are, and when two vocabularies are one."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gguf_trim.cut import lay_out, write
from llamabase.errors import FileFormatError, VocabularyMismatch
from llamabase.gguf.reader import GGUFFile
from llamabase.gguf.vocabulary import TokenType, Vocabulary, require_same
from llamabase.llama.model import Model

from . import encode
from .conftest import keep_first
from .encode import vocabulary
from .toy import vocabulary as toy_vocabulary
from .toy import write_model

NORMAL, UNKNOWN, CONTROL, USER, UNUSED, BYTE = (int(kind) for kind in TokenType)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("vocabulary") / "m.gguf")


@pytest.fixture(scope="module")
def toy(model: Path) -> Vocabulary:
    return Vocabulary(GGUFFile(model))


def test_tokens_and_types_are_those_written(toy: Vocabulary) -> None:
    tokens, types, _ = toy_vocabulary()
    assert toy.tokens == [token.encode() for token in tokens]
    assert toy.types.tolist() == types
    assert len(toy) == len(tokens) == 600
    assert toy.special_ids == sorted({tokens.index("<|endoftext|>"), tokens.index("<|im_end|>")})


def test_without_types_every_token_is_normal(tmp_path: Path) -> None:
    assert vocabulary(tmp_path / "v.gguf", ["a", "b"], None).types.tolist() == [NORMAL, NORMAL]


def test_as_many_types_as_tokens(tmp_path: Path) -> None:
    with pytest.raises(FileFormatError, match="2 tokens and 3 token types"):
        vocabulary(tmp_path / "v.gguf", ["a", "b"], [1, 1, 1])


def test_a_file_without_a_tokenizer_says_so(tmp_path: Path, model: Path) -> None:
    bare = tmp_path / "bare.gguf"
    bare.write_bytes(encode.gguf())
    with pytest.raises(FileFormatError, match=r"bare\.gguf: holds no tokenizer$"):
        Vocabulary(GGUFFile(bare))
    write(lay_out(model, keep_first(320)), tmp_path / "trimmed.gguf")
    with pytest.raises(FileFormatError, match="is a trimmed drafter: give the original"):
        Vocabulary(GGUFFile(tmp_path / "trimmed.gguf"))


def test_forced_tokens_of_the_toy(toy: Vocabulary) -> None:
    """All 256 byte letters, the ends, every control, unknown and user-defined token; no merge, placeholder, padding."""
    texts = {toy.tokens[i].decode() for i in toy.forced}
    assert {"<|endoftext|>", "<|im_start|>", "<|im_end|>", "<tool>", "<unk>"} <= texts
    assert set(range(256)) <= set(toy.forced)
    assert len(toy.forced) == 256 + 5
    assert len(toy.forced) == len(set(toy.forced))


def test_ends_of_text_come_first(toy: Vocabulary) -> None:
    """So that the smallest k still holds them: a drafter that cannot end drafts nonsense after every text."""
    assert {toy.tokens[i] for i in toy.forced[:2]} == {b"<|endoftext|>", b"<|im_end|>"}


@pytest.mark.parametrize("kind", [CONTROL, UNKNOWN, USER, BYTE])
def test_every_special_type_is_forced(tmp_path: Path, kind: int) -> None:
    tokens = ["aa", "bb", "<0x0A>" if kind == BYTE else "special", "cc"]
    assert vocabulary(tmp_path / "v.gguf", tokens, [1, 1, kind, 1]).forced == [2]


@pytest.mark.parametrize("name", ["<unused0>", "<unused6241>", "[PAD151700]", "<|reserved_special_token_12|>"])
@pytest.mark.parametrize("kind", [CONTROL, USER, UNUSED])
def test_placeholders_are_not_forced(tmp_path: Path, name: str, kind: int) -> None:
    assert vocabulary(tmp_path / "v.gguf", ["aa", name], [1, kind]).forced == []


def test_a_placeholder_that_ends_the_text_is_forced(tmp_path: Path) -> None:
    v = vocabulary(tmp_path / "v.gguf", ["aa", "<|reserved_special_token_0|>"], [1, CONTROL], eos_token_id=1)
    assert v.forced == [1]


@pytest.mark.parametrize("key", ["eos_token_id", "bos_token_id", "eot_token_id", "unknown_token_id"])
def test_ids_that_the_metadata_names_are_forced(tmp_path: Path, key: str) -> None:
    assert vocabulary(tmp_path / "v.gguf", ["aa", "bb"], None, **{key: 1}).forced == [1]


def test_a_named_id_beyond_the_table_is_left_out(tmp_path: Path) -> None:
    """Some converters write 0xFFFFFFFF for "none"."""
    assert vocabulary(tmp_path / "v.gguf", ["aa"], None, padding_token_id=0xFFFFFFFF).forced == []


def test_an_end_of_turn_is_forced_by_its_name(tmp_path: Path) -> None:
    """llama.cpp stops at these names whatever type the converter gave them."""
    assert vocabulary(tmp_path / "v.gguf", ["aa", "<|eot_id|>", "<end_of_turn>"], [1, NORMAL, NORMAL]).forced == [1, 2]


def test_single_letters_of_a_sentencepiece_vocabulary_are_forced(tmp_path: Path) -> None:
    tokens = ["<unk>", "<0x41>", "▁", "a", "▁a", "é", "ab"]
    v = vocabulary(tmp_path / "v.gguf", tokens, [UNKNOWN, BYTE, 1, 1, 1, 1, 1], "llama")
    assert set(v.forced) == {0, 1, 2, 3}


def test_byte_level_letters_spell_every_byte_once(toy: Vocabulary) -> None:
    assert sorted(toy.text(i) for i in range(256)) == [bytes([byte]) for byte in range(256)]


def test_token_texts_are_those_of_llama_cpp(model: Path, toy: Vocabulary) -> None:
    with Model(model, vocab_only=True) as llama:
        for token in range(len(toy)):
            if toy.types[token] != UNUSED:
                assert toy.text(token) == llama.piece(token, special=True), toy.tokens[token]


@given(st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=40))
@settings(max_examples=50)
def test_the_tokens_of_a_text_spell_the_text(model: Path, toy: Vocabulary, text: str) -> None:
    with Model(model, vocab_only=True) as llama:
        ids = llama.tokenize(text, special=False, add_bos=False)
    assert b"".join(toy.text(token) for token in ids) == text.encode()


def test_sentencepiece_and_byte_tokens_as_bytes(tmp_path: Path) -> None:
    v = vocabulary(tmp_path / "v.gguf", ["▁the", "<0x0A>", "<s>"], [1, BYTE, CONTROL], "llama")
    assert [v.text(i) for i in range(3)] == [b" the", b"\n", b"<s>"]


words = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=5).filter("end".__ne__)
entries = st.lists(st.tuples(words, st.integers(1, 6)), min_size=1, max_size=8, unique_by=lambda entry: entry[0])


@given(entries, st.data())
@settings(max_examples=100)
def test_the_fingerprint_knows_every_token_and_type(
    tmp_path_factory: pytest.TempPathFactory, table: list[tuple[str, int]], data: st.DataObject
) -> None:
    """Any other token or type before the filler gives another fingerprint; the same table gives the same."""
    path = tmp_path_factory.getbasetemp() / "fingerprint.gguf"
    table = [*table, ("end", NORMAL)]

    def fingerprint(table: list[tuple[str, int]]) -> str:
        return vocabulary(path, [text for text, _ in table], [kind for _, kind in table]).fingerprint

    before = fingerprint(table)
    assert fingerprint(table) == before
    i = data.draw(st.integers(0, len(table) - 1))
    text, kind = table[i]
    assert fingerprint([*table[:i], (f"{text} changed", kind), *table[i + 1 :]]) != before
    assert fingerprint([*table[:i], (text, kind % 4 + 1), *table[i + 1 :]]) != before
    assert fingerprint([*table[:i], *table[i + 1 :]]) != before
    padded = [*table, *((f"[PAD{n}]", UNUSED) for n in range(data.draw(st.integers(1, 5))))]
    assert fingerprint(padded) == before


def test_the_fingerprint_does_not_run_tokens_together(tmp_path: Path) -> None:
    """Two tokens, and one whose text is both with the first one's type between them."""
    two = vocabulary(tmp_path / "v.gguf", ["a", "b"], [1, 1]).fingerprint
    assert vocabulary(tmp_path / "v.gguf", ["a\x01\0\0\0b"], [1]).fingerprint != two


def test_require_same_accepts_other_padding_and_other_types(tmp_path: Path) -> None:
    a = vocabulary(tmp_path / "a.gguf", ["x", "y", "[PAD2]"], [1, 3, UNUSED])
    require_same(a, vocabulary(tmp_path / "b.gguf", ["x", "y", "[PAD2]", "[PAD3]", "[PAD4]"], [1, 3, *[UNUSED] * 3]))
    require_same(a, vocabulary(tmp_path / "c.gguf", ["x", "y"], [1, USER]))


def test_require_same_names_both_files_and_the_first_difference(tmp_path: Path) -> None:
    a = vocabulary(tmp_path / "a.gguf", ["x", "y", "z"], None)
    b = vocabulary(tmp_path / "b.gguf", ["x", "other", "else"], None)
    with pytest.raises(VocabularyMismatch) as caught:
        require_same(a, b)
    message = str(caught.value)
    assert str(a.path) in message and str(b.path) in message and "\n" not in message
    assert "token 1 is 'y' in one and 'other' in the other" in message


def test_require_same_refuses_a_vocabulary_that_only_begins_alike(tmp_path: Path) -> None:
    """Up to one per cent may be missing at the end (added tokens); half of a vocabulary is another vocabulary."""
    tokens = [f"t{i}" for i in range(200)]
    whole = vocabulary(tmp_path / "a.gguf", tokens, None)
    require_same(whole, vocabulary(tmp_path / "b.gguf", tokens[:199], None))
    with pytest.raises(VocabularyMismatch, match="token 100 is 't100' in one and nothing in the other"):
        require_same(whole, vocabulary(tmp_path / "c.gguf", tokens[:100], None))


def test_a_token_that_is_there_twice(tmp_path: Path) -> None:
    """llama.cpp ends the process over it; it reads each up to a NUL, and names empty ones itself."""
    for tokens in (["a", "b", "a"], ["a", "b", "a\0x"]):
        with pytest.raises(FileFormatError, match=r"v\.gguf: has the token b'a' twice"):
            vocabulary(tmp_path / "v.gguf", tokens, None)
    assert len(vocabulary(tmp_path / "v.gguf", ["a", "", ""], None)) == 3
