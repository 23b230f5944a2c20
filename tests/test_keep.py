"""Which rows are kept: laws of the choice by counts, and keep lists."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from corpus.counts import Counts
from gguf_trim.exchange.token_ids import read_token_ids
from gguf_trim.keep import DEFAULT_K, choose_rows, keep_listed
from llamabase.errors import FileFormatError, TrimError, VocabularyMismatch
from llamabase.gguf.reader import GGUFFile
from llamabase.gguf.vocabulary import Vocabulary

from .encode import vocabulary
from .toy import write_model

NORMAL, CONTROL = 1, 3


def small_vocabulary(folder: Path, kinds: list[bool]) -> Vocabulary:
    """Words of two letters, those marked as control tokens."""
    types = [CONTROL if control else NORMAL for control in kinds]
    return vocabulary(folder / "v.gguf", [f"w{i}" for i in range(len(kinds))], types)


tables = st.lists(st.tuples(st.booleans(), st.integers(0, 3)), min_size=1, max_size=14)


@given(tables)
@settings(max_examples=60)
def test_laws_of_the_choice_by_counts(tmp_path_factory: pytest.TempPathFactory, table: list[tuple[bool, int]]) -> None:
    """For every k: k ids, ascending, unique, in range; forced first, then (-count, id); keep(k) within keep(k + 1)."""
    known = small_vocabulary(tmp_path_factory.getbasetemp(), [control for control, _ in table])
    dense = np.array([n for _, n in table])
    counts = Counts.of(dense, known, "x")
    n = len(table)
    counts.save(saved := tmp_path_factory.getbasetemp() / "c.npz")
    forced = [i for i in range(n) if table[i][0]]
    order = forced + sorted(set(range(n)) - set(forced), key=lambda i: (-table[i][1], i))
    for k in range(1, n + 1):
        keep = choose_rows(known, np.ones(n, bool), 1, k=k, counts=saved)
        assert keep.ids.dtype == np.int32
        assert keep.k == k and keep.ids.tolist() == sorted(order[:k])
        assert (keep.n_forced, keep.n_forced_left_out) == (min(k, len(forced)), max(0, len(forced) - k))
        assert keep.coverage == (dense[keep.ids].sum() / dense.sum() if dense.any() else 0.0)


@given(tables, st.lists(st.integers(0, 13), min_size=1, max_size=20), st.data())
@settings(max_examples=60)
def test_laws_of_a_keep_list(
    tmp_path_factory: pytest.TempPathFactory, table: list[tuple[bool, int]], listed: list[int], data: st.DataObject
) -> None:
    """Everything listed and everything forced; with k, forced tokens come first and the list fills up the rest.

    Ids that the head has no row of count as if they were neither listed nor forced.
    """
    known = small_vocabulary(tmp_path_factory.getbasetemp(), [control for control, _ in table])
    n = len(table)
    listed = [i % n for i in listed]
    forced = {i for i in range(n) if table[i][0]}
    keep = keep_listed(known, np.ones(n, bool), listed)
    assert keep.ids.tolist() == sorted({*listed, *forced}) and keep.n_forced == len(forced)
    k = data.draw(st.integers(1, n))
    first = list(dict.fromkeys([*sorted(forced), *listed]))[:k]
    keep = keep_listed(known, np.ones(n, bool), listed, k)
    assert keep.ids.tolist() == sorted(first) and keep.k <= k
    assert (keep.n_forced, keep.n_forced_left_out) == (min(k, len(forced)), max(0, len(forced) - k))
    had = data.draw(st.sets(st.integers(0, n - 1), min_size=1))
    has_row = np.isin(np.arange(n), list(had))
    order = [i for i in dict.fromkeys([*sorted(forced), *listed]) if i in had]
    keep = keep_listed(known, has_row, listed, k)
    assert keep.ids.tolist() == sorted(order[:k]) and keep.k == min(k, len(order))
    assert keep.n_forced == min(k, len(forced & had)) and keep.n_forced_left_out == len(forced & had) - keep.n_forced


@pytest.mark.parametrize("k", [0, -1, 4])
def test_k_outside_the_table_is_refused(tmp_path: Path, k: int) -> None:
    known = small_vocabulary(tmp_path, [False] * 3)
    Counts.of(np.array([1, 1, 1]), known, "x").save(tmp_path / "c.npz")
    with pytest.raises(TrimError, match=f"k must be between 1 and its 3 rows, and is {k}"):
        choose_rows(known, np.ones(3, bool), k=k, counts=tmp_path / "c.npz")
    with pytest.raises(TrimError, match="k must be between 1 and its 3 rows"):
        keep_listed(known, np.ones(3, bool), [1], k)


@pytest.mark.parametrize("n", [DEFAULT_K - 1, DEFAULT_K, DEFAULT_K + 1])
def test_without_k_a_small_head_keeps_all_its_rows(tmp_path: Path, n: int) -> None:
    known = small_vocabulary(tmp_path, [False] * 3)
    Counts.of(np.array([1, 1, 1]), known, "x").save(tmp_path / "c.npz")
    assert choose_rows(known, np.ones(n, bool), counts=tmp_path / "c.npz").k == min(n, DEFAULT_K)


def test_counts_of_another_vocabulary_are_refused(tmp_path: Path) -> None:
    Counts.of(np.array([1, 1, 1]), small_vocabulary(tmp_path, [False] * 3), "x").save(tmp_path / "c.npz")
    other = small_vocabulary(tmp_path, [True] * 3)
    with pytest.raises(VocabularyMismatch, match="counts another vocabulary"):
        choose_rows(other, np.ones(3, bool), k=1, counts=tmp_path / "c.npz")


def test_a_head_with_fewer_or_more_rows_than_tokens(tmp_path: Path) -> None:
    """Tables are padded differently; a row that is not there cannot be kept, a row without a token can."""
    known = small_vocabulary(tmp_path, [False, False, False, True])
    Counts.of(np.array([0, 1, 2, 3]), known, "x").save(tmp_path / "c.npz")

    def kept(n_rows: int, k: int) -> list[int]:
        return choose_rows(known, np.ones(n_rows, bool), 1, k=k, counts=tmp_path / "c.npz").ids.tolist()

    assert kept(2, 2) == [0, 1]
    assert kept(6, 6) == [0, 1, 2, 3, 4, 5]
    assert kept(6, 3) == [1, 2, 3]


def test_the_rows_chosen_from_the_ready_counts_reach_k(tmp_path: Path) -> None:
    """No counts given: those that ship; asked for all rows, all are kept."""
    known = Vocabulary(GGUFFile(write_model(tmp_path / "m.gguf")))
    assert choose_rows(known, np.ones(600, bool), k=600).ids.tolist() == list(range(600))
    keep = choose_rows(known, np.ones(600, bool), k=320)
    assert keep.k == 320 and set(known.forced) <= set(keep.ids.tolist())
    assert keep.coverage is not None and 0.5 < keep.coverage < 1


@pytest.mark.parametrize(("k", "kept"), [(100, 112), (96, 96), (None, 256)])
def test_k_of_a_keep_list_counts_the_rows_that_the_head_has(tmp_path: Path, k: int | None, kept: int) -> None:
    """A list of all ids, backwards, for a head of 256 of them: the first k that it has, filled up to a multiple."""
    known = Vocabulary(GGUFFile(write_model(tmp_path / "m.gguf")))
    had = np.sort(np.random.default_rng(1).permutation(600)[:256])
    path = tmp_path / "keep.txt"
    path.write_text("\n".join(map(str, range(599, -1, -1))))
    keep = choose_rows(known, np.isin(np.arange(600), had), k=k, keep_file=path)
    order = [i for i in dict.fromkeys([*known.forced, *range(599, -1, -1)]) if i in had]
    assert keep.k == kept and set(order[:k]) <= set(keep.ids.tolist()) <= set(had.tolist())
    assert keep.n_forced == min(kept, len(set(known.forced) & set(had.tolist())))
    path.write_text("\n".join(str(i) for i in range(600) if i not in had))
    with pytest.raises(TrimError, match=r"keep\.txt: the head to be cut has a row for none of these ids"):
        choose_rows(known, np.isin(np.arange(600), had), k=k, keep_file=path)


def test_forced_tokens_that_a_head_lacks_leave_no_room_to_others(tmp_path: Path) -> None:
    """Where nothing was counted often enough, the rows are the forced ones that the head has."""
    known = Vocabulary(GGUFFile(write_model(tmp_path / "m.gguf")))
    had = np.array([*known.forced[:64], *range(300, 500)])
    Counts.of(np.ones(600, np.int64), known, "x").save(tmp_path / "c.npz")
    has_row = np.isin(np.arange(600), had)
    keep = choose_rows(known, has_row, counts=tmp_path / "c.npz", min_count=2)
    assert keep.ids.tolist() == sorted(known.forced[:64]) and keep.n_forced == 64
    keep = choose_rows(known, has_row, counts=tmp_path / "c.npz", top_p=1)
    assert set(keep.ids.tolist()) >= {i for i in had if i < known.n_real}  # and no padding


def test_a_keep_list_with_comments_and_empty_lines(tmp_path: Path) -> None:
    path = tmp_path / "keep.txt"
    path.write_text("# the first\n3\n\n  1  # one\r\n3\n0\n", "utf-8")
    assert read_token_ids(path, 4) == [3, 1, 3, 0]


@pytest.mark.parametrize("line", ["x", "-1", "4", "1 2", "1.0", "²", "0x1", "9" * 5000])
def test_a_bad_line_of_a_keep_list_is_named(tmp_path: Path, line: str) -> None:
    path = tmp_path / "keep.txt"
    path.write_text(f"# ids\n0\n{line}\n", "utf-8")
    with pytest.raises(FileFormatError) as caught:
        read_token_ids(path, 4)
    message = str(caught.value)
    assert message.startswith(f"{path}, line 3: ") and "is not a token id from 0 to 3" in message
    assert len(message) < 300 and "\n" not in message


def test_keep_lists_that_cannot_be_used(tmp_path: Path) -> None:
    (tmp_path / "empty.txt").write_text("# nothing\n")
    (tmp_path / "binary.txt").write_bytes(b"\xff\xfe\0")
    for name, reason in (("empty.txt", "no token ids"), ("binary.txt", "cannot be read"), ("none", "cannot be read")):
        with pytest.raises(FileFormatError, match=reason) as caught:
            read_token_ids(tmp_path / name, 4)
        assert name in str(caught.value)
