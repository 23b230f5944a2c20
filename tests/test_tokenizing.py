"""Any text is tokenized as llama.cpp does it, or refused with a reason: no signal, and not for minutes."""

from __future__ import annotations

import random
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import llama_cpp
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from llamabase.errors import FileFormatError, PromptTooLong, TextError
from llamabase.llama import tokenizing
from llamabase.llama.model import Model

from .tokenizing import Child, bare
from .vocabularies import OTHERS, PRE_TOKENIZERS, write_vocabulary

UNITS = [
    "A", "a", "7", "\n", " ", "=", "é", "中", "\u0301", "a ", "Aa", "😀", "\n ", "/", "'s", "\u3000", "\x1c", "\0",
    "ⅷ", "\n/", "\r\n", "\t", "<sentinel:7", "IMGIMGA", "한", "ไทย", "<|im_end|>", "<tool>", "the ", "#", "1,", "a\x1c",
]  # fmt: skip
LONG = 27_000  # characters of a run that overflow the 8 MB of a main thread, and the 8 MB of others


@pytest.fixture(scope="module")
def child() -> Iterator[Child]:
    found = Child()
    yield found
    found.close()


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("vocabularies")
    written = {pre: write_vocabulary(folder / f"{pre}.gguf", pre) for pre in PRE_TOKENIZERS}
    return written | {model: write_vocabulary(folder / f"{model}.gguf", "default", model) for model in OTHERS}


@pytest.mark.parametrize("name", [*PRE_TOKENIZERS, *OTHERS])
def test_long_runs_end_no_process(files: dict[str, Path], child: Child, name: str) -> None:
    """Of letters and of signs: 31 names and more split by std::regex, which recurses over them."""
    found = child.ask(files[name], [("A", LONG), (" ", 1), ("=", LONG), (" x", 1)])
    assert found.get("n", 0) > 1


@pytest.mark.parametrize("name", ["tekken", "deepseek-v3", "exaone-moe"])
def test_texts_of_every_class(files: dict[str, Path], child: Child, name: str) -> None:
    for unit in UNITS:
        assert "n" in child.ask(files[name], [(unit, LONG // len(unit)), ("x7", 1)]), unit


CLASSES = "Aa7\n\r =/!'.é中\u0301\u3000\x1c😀"
ANY = st.one_of(st.sampled_from(UNITS), st.text(CLASSES, min_size=1, max_size=4), st.text(max_size=6))
TEXTS = st.lists(st.tuples(ANY, st.one_of(st.integers(1, 3_000), st.just(LONG))), max_size=5)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(name=st.sampled_from([*PRE_TOKENIZERS, *OTHERS]), text=TEXTS, special=st.booleans(), add_bos=st.booleans())
def test_ids_are_llama_cpps(
    files: dict[str, Path], child: Child, name: str, text: list[tuple[str, int]], special: bool, add_bos: bool
) -> None:
    child.ask(files[name], [(unit.encode("utf-8", "replace").decode(), n) for unit, n in text], special, add_bos)


@pytest.mark.slow
@pytest.mark.parametrize("name", [*PRE_TOKENIZERS, *OTHERS])
def test_ids_are_llama_cpps_at_length(files: dict[str, Path], child: Child, name: str) -> None:
    """Runs and mixtures of up to 10 MB: the same ids, or a refusal, within a bounded time."""
    rng = random.Random(name)
    for size in (200_000, 200_000, 2_000_000, 10_000_000):
        text, left = [], size
        while left > 0:
            unit = rng.choice([*UNITS, "".join(rng.choices(CLASSES, k=3))])
            times = min(left // len(unit.encode()) + 1, int(10 ** rng.uniform(0, 6)))
            text.append((unit, times))
            left -= times * len(unit.encode())
        found = child.ask(files[name], text, compare=size == 200_000)
        assert found["seconds"] < 300, (size, text)


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("superbpe", [("7", 20_000)], "digits has 20000 characters"),
        ("deepseek-llm", [(" ", 20_000), ("7", 1)], "white space has 20000 characters"),
        ("jais-2", [(" ", 200_000)], "white space has 200000 characters"),
        ("tekken", [("A", 1_000_001)], "a word of 1000001 characters, which begins with 'AAAAAAAAAAAAAAAAAAAA'"),
        ("qwen2", [("x ", 9), ("\n", 1_000_001)], "white space of 1000002 characters"),
        ("exaone-moe", [("a ", 600_000)], "a line of 1200000 characters"),
        ("tekken", [("<|im_end|>a", 10_001)], "10001 special tokens"),
    ],
)
def test_what_would_take_too_long_is_refused(
    files: dict[str, Path], child: Child, name: str, text: list[tuple[str, int]], said: str
) -> None:
    found = child.ask(files[name], text, compare=False)
    assert said in found["refused"]
    assert found["seconds"] < 5


@pytest.mark.slow
def test_ten_megabytes_of_running_text(files: dict[str, Path], child: Child) -> None:
    found = child.ask(files["gpt-2"], [("It was the best of times.\n", 400_000)], compare=False)
    assert found["n"] > 400_000
    assert found["seconds"] < 120


ODD = [
    ("ab", 3), ("bcd", 3), ("cda", 3), ("abca", 4), ("\n\n", 4), ("\n\n\n", 4), ("  ", 4), ("cc", 3), ("<a>", 3),
    ("<a>b", 4),
]  # fmt: skip
PARTS = [*(name for name, _ in ODD), *"abcd<>\n éx", "<s>"]


@pytest.fixture(scope="module")
def odd(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[Model]]:
    """Vocabularies whose special tokens overlap one another, and themselves."""
    folder = tmp_path_factory.mktemp("odd")
    pairs = [("gpt-2", "gpt2"), ("tekken", "gpt2"), ("default", "llama"), ("default", "t5"), ("default", "plamo2")]
    few = [each for each in ODD if "\n" not in each[0]]  # the others have those with line ends already
    files = [
        write_vocabulary(folder / f"{pre}-{kind}.gguf", pre, kind, ODD if kind == "gpt2" else few)
        for pre, kind in pairs
    ]
    models = [Model(path, vocab_only=True) for path in files]
    yield models
    for model in models:
        model.close()


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    text=st.lists(st.sampled_from(PARTS), min_size=1, max_size=40).map("".join),
    special=st.booleans(),
    add_bos=st.booleans(),
    which=st.integers(0, 4),
    many=st.integers(1, 3),
)
def test_pieces_cut_at_special_tokens_have_the_ids_of_the_whole(
    odd: list[Model], text: str, special: bool, add_bos: bool, which: int, many: int
) -> None:
    model = odd[which]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tokenizing, "MANY", many)
        patch.setattr(tokenizing, "SHALLOW", 0)
        try:
            ids = model.tokenize(text, special, add_bos)
        except TextError as error:
            assert "special tokens" in str(error)
            return
    assert ids == bare(model, text, special, add_bos)


def test_special_tokens_of_one_length_that_overlap_are_not_cut_at(tmp_path: Path) -> None:
    path = write_vocabulary(tmp_path / "v.gguf", special=[("abc", 3), ("bcd", 3)])
    with Model(path, vocab_only=True) as model:
        assert len(model.tokenize("abcd" * 900)) == 1800
        with pytest.raises(TextError, match="give at most 1000 at once"):
            model.tokenize("abcd" * 1001)


def test_a_text_without_special_tokens_is_not_searched_for_each_of_thousands(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_vocabulary(tmp_path / "v.gguf", special=[(f"<spare{i}>", 3) for i in range(6000)])
    flags: list[bool] = []
    own = llama_cpp.llama_tokenize

    def tokenize(*arguments: Any) -> int:
        flags.append(arguments[-1])
        return own(*arguments)  # type: ignore[no-any-return]

    with Model(path, vocab_only=True) as model:
        monkeypatch.setattr(llama_cpp, "llama_tokenize", tokenize)
        assert len(model.tokenize("< " * 5000)) == 10_000
        assert flags == [False]
        text = "< " * 5000 + "<spare77>"
        assert model.tokenize(text) == bare(model, text, True, True)


def test_a_prompt_beyond_the_context_is_refused_before_it_is_split(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_vocabulary(tmp_path / "v.gguf")
    with Model(path, vocab_only=True) as model:
        longest = max(len(model.piece(token, special=True)) for token in range(600))
        assert longest == len("<|endoftext|>")
        monkeypatch.setattr(llama_cpp, "llama_tokenize", None)
        n = (2 << 20) // longest + 1
        with pytest.raises(PromptTooLong, match=f"at least {n} tokens, {n - 4096} more than the context of 4096"):
            model.tokenize("A" * (2 << 20), n_ctx=4096)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "rwkv", "plamo2"])
def test_no_prompt_that_fits_is_refused(tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The bound holds for every text: even one that is nothing but the longest token."""
    monkeypatch.setattr(tokenizing, "LARGE", 0)
    monkeypatch.setattr(tokenizing, "SHALLOW", 0)
    with Model(write_vocabulary(tmp_path / "v.gguf", model=kind), vocab_only=True) as model:
        for unit in ("<|endoftext|>", "</s>", "AAAA", "the", "====", "中", "A"):
            ids = model.tokenize(unit * 50, add_bos=False)
            assert model.tokenize(unit * 50, add_bos=False, n_ctx=len(ids)) == ids


@pytest.mark.parametrize(("kind", "byte"), [("llama", 1), ("rwkv", ord("t"))])
def test_a_vocabulary_over_which_llama_cpp_would_end_or_go_on_for_ever(tmp_path: Path, kind: str, byte: int) -> None:
    """One of SentencePiece ends the process at a byte without a token; one of RWKV takes memory without end."""
    path = write_vocabulary(tmp_path / "v.gguf", "default", kind, no_byte=byte)
    with (
        Model(path, vocab_only=True) as model,
        pytest.raises(FileFormatError, match=f"no token for the byte 0x{byte:02X}"),
    ):
        model.tokenize("the \x01 é")


def test_a_surrogate_is_read_as_a_question_mark(files: dict[str, Path]) -> None:
    with Model(files["gpt-2"], vocab_only=True) as model:
        assert model.tokenize("\udc80" * 5000) == model.tokenize("?" * 5000)


@pytest.mark.parametrize("pre", ["tekken", "default"])
def test_counting_a_file_of_long_runs(files: dict[str, Path], tmp_path: Path, pre: str) -> None:
    text = tmp_path / "runs.txt"
    text.write_text("A" * 60_000 + "\n" * 60_000 + "=" * 60_000 + "7" * 60_000)
    command = [sys.executable, "-m", "corpus", "count", str(text), "--tokenizer", str(files[pre]), "-o"]
    done = subprocess.run([*command, str(tmp_path / "counts.npz")], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_a_byte_may_be_several_tokens(files: dict[str, Path]) -> None:
    """Without a token of its own a space is three bytes of its sign."""
    with Model(files["gemma4"], vocab_only=True) as model:
        assert len(model.tokenize(" " * 100, add_bos=False)) == 300
