"""Lists of token ids and EAGLE-3 checkpoints: what others write is read, and what is written passes their rules."""

from __future__ import annotations

import json
import pickle
import struct
import sys
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result
from hypothesis import given, settings
from hypothesis import strategies as st

from corpus.counts import Counts
from gguf_trim.__main__ import main as gguf_trim
from gguf_trim.exchange.checkpoint import Checkpoint
from gguf_trim.exchange.token_ids import TOKEN_IDS, read_token_ids, write_json, write_pt
from gguf_trim.keep import choose_rows
from llamabase import files
from llamabase.errors import FileFormatError, TrimError
from llamabase.gguf.reader import GGUFFile
from llamabase.gguf.vocabulary import Vocabulary
from llamabase.safetensors import SafetensorsFile

from .toy import write_head

EOS = 416  # <|endoftext|> of the toys
lists = st.lists(st.integers(0, 599), min_size=1, max_size=40)


# --- The rules of others, as they are written there -------------------------------------------------------------------


def vllm_ids(path: Path, eos: list[int]) -> list[int]:
    """load_draft_token_ids of vllm/model_executor/layers/draft_vocab.py; a .pt is read by PyTorch there."""
    if path.name.endswith(".json"):
        ids = json.loads(path.read_text("utf-8"))
    else:
        ids = pytest.importorskip("torch").load(path, map_location="cpu", weights_only=True).flatten().tolist()
    assert isinstance(ids, list)
    return sorted({int(i) for i in [*ids, *eos]})


def sglang_ids(path: Path) -> list[int]:
    """load_token_map of sglang/srt/speculative/spec_utils.py; the ids index rows of the head, so each counts."""
    torch = pytest.importorskip("torch")
    ids = torch.load(path, weights_only=True)
    ids = ids.clone() if isinstance(ids, torch.Tensor) else torch.tensor(ids, dtype=torch.int64)
    assert ids.dtype == torch.int64 and ids.ndim == 1
    return ids.tolist()


def target_ids(path: Path) -> list[int]:
    """Of a checkpoint: both engines add a row's number to its entry of d2t."""
    d2t = read_tensors(path)["d2t"]
    assert d2t.dtype == np.int64
    return [i + int(offset) for i, offset in enumerate(d2t)]


# --- Files of others --------------------------------------------------------------------------------------------------

DTYPES = {"I64": "<i8", "I32": "<i4", "BOOL": "?", "F32": "<f4", "F16": "<f2", "BF16": "<u2", "U8": "u1"}


def write_tensors(path: Path, tensors: dict[str, tuple[str, Any]], **metadata: str) -> Path:
    table: dict[str, Any] = {"__metadata__": metadata} if metadata else {}
    body = b""
    for name, (dtype, values) in tensors.items():
        data = np.asarray(values, DTYPES[dtype])
        table[name] = {"dtype": dtype, "shape": list(data.shape), "data_offsets": [len(body), len(body) + data.nbytes]}
        body += data.tobytes()
    head = json.dumps(table).encode()
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(struct.pack("<Q", len(head)) + head + body)
    return path


def read_tensors(path: Path) -> dict[str, np.ndarray]:
    data = path.read_bytes()
    begins = 8 + int.from_bytes(data[:8], "little")
    table = json.loads(data[8:begins])
    table.pop("__metadata__", None)
    found = {}
    for name, entry in table.items():
        first, end = entry["data_offsets"]
        found[name] = np.frombuffer(data[begins + first : begins + end], DTYPES[entry["dtype"]]).reshape(entry["shape"])
    return found


def require_aligned(path: Path) -> None:
    """The package reads no gaps, and writes each tensor at a multiple of the size of its numbers."""
    file = SafetensorsFile(path)
    end = 8 + int.from_bytes(path.read_bytes()[:8], "little")
    assert end % 8 == 0
    for tensor in sorted(file.tensors.values(), key=lambda tensor: tensor.offset):
        assert tensor.offset == end and end % np.dtype(DTYPES[tensor.dtype]).itemsize == 0
        end += tensor.n_bytes
    assert end == path.stat().st_size


def text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value)) + value.encode()


def number(value: int) -> bytes:
    return b"J" + struct.pack("<i", value)


def pickled_tensor(kind: str, n: int, offset: int = 0, size: int | None = None, stride: int = 1) -> bytes:
    """What torch.save pickles of a tensor of one dimension: a call, and its storage by number."""
    storage = b"(" + text("storage") + f"ctorch\n{kind}\n".encode() + text("0") + text("cpu") + number(n) + b"tQ"
    shape = number(offset) + number(n if size is None else size) + b"\x85" + number(stride) + b"\x85"
    hooks = b"\x89ccollections\nOrderedDict\n)R"
    return b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n(" + storage + shape + hooks + b"tR."


def write_torch(path: Path, pickled: bytes, numbers: np.ndarray | None = None, byteorder: str = "little") -> Path:
    """As torch.save writes it: a zip."""
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", pickled)
        archive.writestr("archive/byteorder", byteorder)
        if numbers is not None:
            archive.writestr("archive/data/0", numbers.tobytes())
    return path


def write_list(path: Path, form: str, ids: list[int]) -> Path:
    """A list of ids in each form that is read."""
    match form:
        case "txt":
            path.write_text("# ids\n" + "\n".join(map(str, ids)), "utf-8")
        case "vllm.json":
            path.write_text(json.dumps(ids), "utf-8")
        case "eaglet.json":  # in any order of the rows
            path.write_text(json.dumps({str(row): ids[row] for row in reversed(range(len(ids)))}), "utf-8")
        case "list.pt":
            write_torch(path, pickle.dumps(ids, 2))
        case "int64.pt":
            write_torch(path, pickled_tensor("LongStorage", len(ids)), np.array(ids, "<i8"))
        case "int32.pt":
            write_torch(path, pickled_tensor("IntStorage", len(ids)), np.array(ids, "<i4"))
        case "part.pt":  # of a longer tensor
            pickled = pickled_tensor("LongStorage", len(ids) + 5, 2, len(ids))
            write_torch(path, pickled, np.array([7, 7, *ids, 9, 9, 9], "<i8"))
        case "map.safetensors":
            write_tensors(path, {"vocab_map": ("I32", ids)})
        case "d2t.safetensors":
            write_tensors(path, {"d2t": ("I64", np.array(ids) - np.arange(len(ids)))}, format="pt")
    return path


FORMS = ("txt", "vllm.json", "eaglet.json", "list.pt", "int64.pt", "int32.pt", "part.pt", "map.safetensors",
         "d2t.safetensors")  # fmt: skip


def checkpoint(folder: Path, ids: np.ndarray | None = None, n_vocab: int = 600, config: bool = True) -> Path:
    """An EAGLE-3 checkpoint of random numbers; `ids` are those of its rows, None for all and no tables."""
    rng = np.random.default_rng(5)
    n_rows = n_vocab if ids is None else len(ids)
    tensors: dict[str, tuple[str, Any]] = {
        "norm.weight": ("F16", rng.standard_normal(8)),
        "fc.weight": ("F32", rng.standard_normal((8, 24))),
        "lm_head.weight": ("F32", rng.standard_normal((n_rows, 8))),
        "midlayer.mlp.weight": ("BF16", rng.integers(0, 1 << 16, (5, 8))),
        "odd": ("U8", rng.integers(0, 256, 3)),
    }
    if ids is not None:
        tensors["d2t"] = ("I64", ids - np.arange(n_rows))
        tensors["t2d"] = ("BOOL", np.isin(np.arange(n_vocab), ids))
    path = write_tensors(folder / "model.safetensors", tensors, format="pt")
    if config:
        (folder / "config.json").write_text(json.dumps({"vocab_size": n_vocab, "draft_vocab_size": n_rows}))
    return path


def run(*arguments: str | Path, code: int = 0) -> Result:
    done = CliRunner().invoke(gguf_trim, [str(argument) for argument in arguments])
    assert done.exit_code == code, done.output
    assert code != 1 or done.stderr.strip().splitlines()[-1].startswith("Error: "), done.stderr
    return done


# --- Lists ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", FORMS)
@given(ids=lists)
@settings(max_examples=25)
def test_each_form_of_a_list_is_read_in_its_order(tmp_path_factory: pytest.TempPathFactory, form: str, ids) -> None:
    assert read_token_ids(write_list(tmp_path_factory.getbasetemp() / form, form, ids), 600) == ids


@given(ids=lists)
@settings(max_examples=25)
def test_vllm_reads_what_is_written_for_it(tmp_path_factory: pytest.TempPathFactory, ids: list[int]) -> None:
    path = tmp_path_factory.getbasetemp() / "written.json"
    write_json(ids, path)
    assert vllm_ids(path, [EOS]) == sorted({*ids, EOS})
    assert read_token_ids(path) == ids


@given(ids=lists)
@settings(max_examples=25)
def test_sglang_and_vllm_read_what_is_written_for_sglang(tmp_path_factory: pytest.TempPathFactory, ids) -> None:
    pytest.importorskip("torch")
    path = tmp_path_factory.getbasetemp() / "written.pt"
    write_pt(ids, path)
    assert sglang_ids(path) == read_token_ids(path) == ids
    assert vllm_ids(path, [EOS]) == sorted({*ids, EOS})


def test_what_pytorch_saves_is_read_without_it(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    long = torch.arange(40000)
    values = [long, long.int(), long[5:900], long.tolist(), torch.nn.Parameter(long.float()), long.reshape(2, -1)]
    for value in values:
        torch.save(value, path := tmp_path / "x.pt")
        if isinstance(value, list) or (value.ndim == 1 and not value.is_floating_point()):
            assert read_token_ids(path) == (value if isinstance(value, list) else value.tolist())
        else:
            with pytest.raises(FileFormatError, match=r"x\.pt: not a list of token ids by torch\.save"):
                read_token_ids(path)


class Evil:
    def __reduce__(self) -> tuple[Any, ...]:
        return exec, ("raise SystemExit('a stranger has run code')",)


SAVED = {
    "code": (pickle.dumps(Evil(), 2), "it holds '__builtin__.exec'"),
    "code in protocol 4": (pickle.dumps(Evil(), 4), "its pickle has the opcode"),
    "attributes": (b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n}b.", "its pickle has the opcode EMPTY_DICT"),
    "memory": (b"\x80\x02]r\xff\xff\xff\x7f.", "its pickle has the opcode LONG_BINPUT"),
    "another storage": (pickled_tensor("FloatStorage", 2), "it holds 'torch.FloatStorage'"),
    "longer than its storage": (pickled_tensor("LongStorage", 2, size=9), "its tensor skips numbers"),
    "every second number": (pickled_tensor("LongStorage", 2, size=1, stride=2), "its tensor skips numbers"),
    "a text": (pickle.dumps(["1"], 2), "is not a flat list"),
    "lists": (pickle.dumps([[1]], 2), "is not a flat list"),
    "truth": (b"\x80\x02]q\x00\x89a.", "is not a flat list"),
    "nothing": (b"", "EOFError|ValueError"),
    "an empty list": (pickle.dumps([], 2), "holds no token ids"),
    "too many": (pickle.dumps([600], 2), "names token 600, and there are 600"),
}


@pytest.mark.parametrize("name", SAVED)
def test_a_pt_of_a_stranger_runs_no_code(tmp_path: Path, name: str) -> None:
    pickled, said = SAVED[name]
    path = write_torch(tmp_path / "x.pt", pickled, np.array([1, 2], "<i8"))
    with pytest.raises(FileFormatError, match=said) as caught:
        read_token_ids(path, 600)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


WRONG = {
    "x.json": [("[1, 2", "not a list of token ids in JSON"), ('{"a": 1}', "in JSON"), ("[[1]]", "is not a flat list"),
               ("3", "is not a flat list"), ("[true]", "is not a flat list"), ("[1.0]", "is not a flat list"),
               ("[]", "holds no token ids"), ("[-1]", "names token -1"), ("[600]", "names token 600"),
               ("[" * 10**5, "in JSON"), (f"[{10**50}]", "names token 1000")],
    "x.pt": [("PK", "BadZipFile"), ("1\n2", "BadZipFile")],
    "x.safetensors": [("", "length of a header"), ("\x02" + "\0" * 7 + "[]", "its header is not a table"),
                      ("\x02" + "\0" * 7 + "{}", "has neither a vocab_map nor a d2t"),
                      ("\x02" + "\0" * 7 + "{:", "its header is not JSON"), ("\x7f" * 9, "length of a header")],
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_a_list_that_cannot_be_used_is_named(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    for content, said in WRONG[name]:
        path.write_bytes(content.encode())
        with pytest.raises(FileFormatError, match=said) as caught:
            read_token_ids(path, 600)
        assert str(path) in str(caught.value) and len(str(caught.value)) < 400
    with pytest.raises(FileFormatError, match="cannot be read"):
        read_token_ids(tmp_path / f"none{name}", 600)


@pytest.mark.parametrize("form", FORMS)
def test_trim_keeps_a_list_in_any_form(toys: dict[str, Path], tmp_path: Path, form: str) -> None:
    ids = np.random.default_rng(1).permutation(600)[:40].tolist()
    keep, out = write_list(tmp_path / form, form, ids), tmp_path / "cut.gguf"
    run("trim", toys["target"], "--keep", keep, "-o", out, "--exact-k")
    assert set(read_token_ids(out)) == {*ids, *Vocabulary(GGUFFile(toys["target"])).forced}


def test_a_trimmed_drafter_is_a_list_for_its_own_vocabulary(toys: dict[str, Path], tmp_path: Path) -> None:
    run("trim", toys["wrong"], "--keep", toys["good-trimmed"], "-o", tmp_path / "cut.gguf", "--exact-k")
    assert read_token_ids(tmp_path / "cut.gguf") == read_token_ids(toys["good-trimmed"])
    done = run("trim", toys["foreign"], "--keep", toys["good-trimmed"], "-o", tmp_path / "other.gguf", code=1)
    assert "was trimmed for another vocabulary" in done.stderr


# --- Export -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def counts(toys: dict[str, Path], tmp_path: Path) -> Path:
    vocabulary = Vocabulary(GGUFFile(toys["target"]))
    Counts.of(np.random.default_rng(2).integers(0, 50, 600), vocabulary, "x").save(path := tmp_path / "counts.npz")
    return path


@pytest.mark.parametrize("k", [300, 400])
def test_the_ids_of_counts_are_those_that_trim_keeps(toys, counts: Path, tmp_path: Path, k: int) -> None:
    out, known = tmp_path / "map.json", Vocabulary(GGUFFile(toys["target"]))
    arguments = ("export", counts, "--tokenizer", toys["target"], "--to", "vllm", "-k", str(k), "-o", out)
    assert run(*arguments).stdout == f"{out}\n"
    kept = choose_rows(known, np.ones(600, bool), 1, k=k, counts=counts).ids.tolist()
    assert json.loads(out.read_text()) == vllm_ids(out, []) == kept and {EOS, *known.forced} <= set(kept)
    run("trim", toys["target"], "--counts", counts, "-k", str(k), "--exact-k", "-o", tmp_path / "cut.gguf")
    run("export", tmp_path / "cut.gguf", "--to", "vllm", "-o", tmp_path / "same.json")
    assert json.loads((tmp_path / "same.json").read_text()) == kept
    few = run(*arguments[:-3], "9", "-o", out)
    assert "Warning: k = 9 leaves out" in few.stderr and len(vllm_ids(out, [])) == 9


def test_padding_is_never_exported(toys, counts: Path, tmp_path: Path) -> None:
    known, out = Vocabulary(GGUFFile(toys["target"])), tmp_path / "map.json"
    how = ("export", counts, "--tokenizer", toys["target"], "--to", "vllm", "-o", out, "-k")
    run(*how, str(known.n_real))
    assert vllm_ids(out, []) == list(range(known.n_real))
    assert f"must be between 1 and its {known.n_real} rows" in run(*how, str(known.n_real + 1), code=1).stderr


def test_a_list_becomes_any_other(toys, tmp_path: Path) -> None:
    pytest.importorskip("torch")
    ids = read_token_ids(toys["good-trimmed"])
    run("export", toys["good-trimmed"], "--to", "sglang", "-o", tmp_path / "hot.pt")
    run("export", tmp_path / "hot.pt", "--to", "vllm", "-o", tmp_path / "hot.json")
    assert sglang_ids(tmp_path / "hot.pt") == vllm_ids(tmp_path / "hot.json", []) == ids


def test_a_list_is_exported_ascending_and_each_id_once(tmp_path: Path) -> None:
    (tmp_path / "ids.txt").write_text("5\n3\n5\n0\n")
    run("export", tmp_path / "ids.txt", "--to", "vllm", "-o", tmp_path / "map.json")
    assert json.loads((tmp_path / "map.json").read_text()) == [0, 3, 5]


def test_without_pytorch_a_pt_is_refused(toys, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    done = run("export", toys["good-trimmed"], "--to", "sglang", "-o", tmp_path / "hot.pt", code=1)
    assert "hot.pt: a .pt is written by PyTorch: pip install 'gguf-trim[train]'" in done.stderr
    assert not list(tmp_path.iterdir())


def test_export_refuses_what_it_cannot_do(toys, counts: Path, tmp_path: Path) -> None:
    out, target, mine = tmp_path / "x.json", toys["target"], tmp_path / "mine.json"
    mine.write_text('{"a": "b"}')
    (tmp_path / "part.json").write_text("[1]")
    usage = [
        (["export", counts, "--tokenizer", target, "-o", out], "give one of --to and --checkpoint"),
        (["export", counts, "--to", "vllm", "-o", out], "give a GGUF of the same vocabulary as --tokenizer"),
        (["export", tmp_path / "part.json", "--to", "vllm", "-k", "5", "-o", out], "names its ids"),
    ]
    for arguments, said in usage:
        assert said in run(*arguments, code=2).stderr
    refused = [
        (["export", counts, "--tokenizer", toys["foreign"], "--to", "vllm", "-o", out], "counts another vocabulary"),
        (["export", target, "--to", "vllm", "-o", out], "has no reduced head"),
        (["export", tmp_path / "part.json", "--to", "vllm", "-o", tmp_path / "x.pt"], "must end in .json for vllm"),
        (["export", tmp_path / "part.json", "--to", "sglang", "-o", out], "must end in .pt for sglang"),
        (["export", tmp_path / "part.json", "--to", "vllm", "-o", mine], "is not a list of token ids; choose another"),
        (["export", tmp_path / "none.json", "--to", "vllm", "-o", out], "cannot be read"),
    ]
    for arguments, said in refused:
        assert said in run(*arguments, code=1).stderr
    assert mine.read_text() == '{"a": "b"}' and not out.exists()
    run("export", tmp_path / "part.json", "--to", "vllm", "-o", out)
    run("export", tmp_path / "part.json", "--to", "vllm", "-o", out)  # its own file is replaced


# --- Checkpoints ------------------------------------------------------------------------------------------------------


def logits(path: Path, states: np.ndarray) -> dict[int, bytes]:
    """By target id, each row's products summed in the same order whatever the other rows are."""
    tensors = read_tensors(path)
    rows = (tensors["lm_head.weight"][None] * states[:, None]).sum(-1)
    ids = target_ids(path) if "d2t" in tensors else range(rows.shape[1])
    return {i: rows[:, row].tobytes() for row, i in enumerate(ids)}


@given(
    had=st.none() | st.lists(st.integers(0, 59), min_size=2, max_size=40, unique=True),
    listed=st.sets(st.integers(0, 70), min_size=1),
)
@settings(max_examples=60)
def test_laws_of_a_cut_checkpoint(tmp_path_factory: pytest.TempPathFactory, had, listed: set[int]) -> None:
    """The listed ids that have a row, with equal logits; both tables agree; every other tensor is as it was."""
    folder = tmp_path_factory.getbasetemp()
    source = checkpoint(folder / "whole", None if had is None else np.array(had), 60)
    opened, out = Checkpoint.open(source), folder / "cut" / "model.safetensors"
    kept = listed & set(range(60) if had is None else had)
    if len(kept) in (0, len(opened.ids)):
        with pytest.raises(TrimError, match=r"row for none of these ids|every row of the head is kept"):
            opened.cut(np.array(sorted(listed)))
        return
    opened.write(output := opened.cut(np.array(sorted(listed))), out)
    assert out.stat().st_size == output.n_bytes
    require_aligned(out)
    before, after = read_tensors(source), read_tensors(out)
    states = np.random.default_rng(1).standard_normal((3, 8)).astype(np.float32)
    whole = logits(source, states)
    assert logits(out, states) == {i: whole[i] for i in kept}
    assert np.flatnonzero(after["t2d"]).tolist() == sorted(target_ids(out)) == sorted(kept)
    assert len(after["t2d"]) == 60 and after["t2d"].dtype == bool
    for name in before.keys() - {"d2t", "t2d", "lm_head.weight"}:
        assert (after[name].dtype, after[name].tobytes()) == (before[name].dtype, before[name].tobytes())
    assert json.loads((out.parent / "config.json").read_text()) == {"vocab_size": 60, "draft_vocab_size": len(kept)}
    assert SafetensorsFile(out).metadata == {"format": "pt", "gguf_trim.k": str(len(kept))}
    again = Checkpoint.open(out)
    assert set(again.ids.tolist()) == set(read_token_ids(out)) == kept and again.n_vocab == 60


def test_a_checkpoint_is_cut_by_counts_to_k_of_the_rows_that_it_has(toys, counts: Path, tmp_path: Path) -> None:
    had = np.sort(np.random.default_rng(4).permutation(600)[:400])
    source, out = checkpoint(tmp_path / "whole", had, config=False), tmp_path / "cut" / "model.safetensors"
    how = ("--tokenizer", toys["target"], "--checkpoint", source, "-k", "250", "-o", out)
    done = run("export", counts, *how)
    assert "set draft_vocab_size to 250" in done.stderr
    known = Vocabulary(GGUFFile(toys["target"]))
    has_row = np.isin(np.arange(600), had[had < known.n_real])
    assert target_ids(out) == choose_rows(known, has_row, 1, k=250, counts=counts).ids.tolist()
    more = run("export", counts, *how, "-k", str(has_row.sum() + 1), code=1)
    assert f"k must be between 1 and its {has_row.sum()} rows" in more.stderr  # of which none is padding
    small = checkpoint(tmp_path / "small", n_vocab=60)
    done = run("export", counts, *how[:2], "--checkpoint", small, "-o", out, code=1)
    assert f"has {known.n_real} tokens and the checkpoint's target 60" in done.stderr


def test_a_gguf_head_and_a_checkpoint_are_cut_alike(tmp_path: Path) -> None:
    """There and back: the rows of either are those of the other."""
    ids = np.random.default_rng(3).permutation(600)[:300]
    head, source = write_head(tmp_path / "head.gguf", tokens=True), checkpoint(tmp_path / "whole")
    few, out = checkpoint(tmp_path / "few", ids), tmp_path / "cut" / "model.safetensors"
    run("trim", head, "--keep", few, "-o", tmp_path / "cut.gguf", "--exact-k")
    known = Vocabulary(GGUFFile(head))
    assert set(read_token_ids(tmp_path / "cut.gguf")) == {*ids.tolist(), *known.forced}
    run("export", tmp_path / "cut.gguf", "--checkpoint", source, "-o", out)
    assert sorted(target_ids(out)) == sorted(read_token_ids(tmp_path / "cut.gguf"))
    run("export", out, "--to", "vllm", "-o", tmp_path / "map.json")
    assert vllm_ids(tmp_path / "map.json", []) == sorted(target_ids(out))


def bad_checkpoints(folder: Path) -> dict[Path, str]:
    rows, ids = ("F32", np.ones((4, 8))), np.array([0, 3, 5, 9])
    d2t, t2d = ("I64", ids - np.arange(4)), ("BOOL", np.isin(np.arange(10), ids))
    bad: list[tuple[dict[str, tuple[str, Any]], str]] = [
        ({"fc.weight": rows}, "it has no lm_head.weight"),
        ({"lm_head.weight": ("F32", np.ones(4))}, "it has no lm_head.weight"),
        ({"lm_head.weight": rows, "d2t": d2t}, "it has only one of d2t and t2d"),
        ({"lm_head.weight": rows, "d2t": ("I64", [0, 1]), "t2d": t2d}, "its d2t has 2 entries and its head 4 rows"),
        ({"lm_head.weight": rows, "d2t": ("I64", ids), "t2d": t2d}, "its d2t and t2d name different tokens"),
        ({"lm_head.weight": rows, "d2t": d2t, "t2d": ("I64", t2d[1])}, "name different tokens"),
        ({"lm_head.weight": rows, "d2t": ("F32", ids), "t2d": t2d}, "its d2t is F32"),
        ({"lm_head.weight": ("U8", np.ones((4, 0)))}, "it has no lm_head.weight"),
        ({"lm_head.weight": rows, "lm_head.bias": ("F32", np.ones((4, 0)))}, "the 0 bytes of its lm_head.bias"),
        ({"lm_head.weight": rows, "a\nb": rows}, "its names are not text"),
        ({"lm_head.weight": rows, "d2t": d2t, "t2d": t2d}, "every row of the head is kept"),
        ({"lm_head.weight": rows, "lm_head.scales": ("F32", np.ones(9))}, "give it unquantised"),
        ({"lm_head.weight": rows, "markov_head.weight": rows}, "no way to cut them is known"),
    ]
    return {write_tensors(folder / f"{i}.safetensors", tensors): said for i, (tensors, said) in enumerate(bad)}


def test_checkpoints_that_cannot_be_cut_are_refused(tmp_path: Path) -> None:
    (tmp_path / "ids.json").write_text("[0, 3, 5, 9]")
    for path, said in bad_checkpoints(tmp_path / "bad").items():
        out = tmp_path / "out" / "model.safetensors"
        done = run("export", tmp_path / "ids.json", "--checkpoint", path, "-o", out, code=1)
        assert said in done.stderr and str(path) in done.stderr
    assert not (tmp_path / "out").exists()
    short = checkpoint(tmp_path / "short", n_vocab=9)
    done = run("export", tmp_path / "ids.json", "--checkpoint", short, "-o", out, code=1)
    assert "ids.json: names token 9, and there are 9" in done.stderr
    short.write_bytes(short.read_bytes()[:-1])
    with pytest.raises(FileFormatError, match="lies beyond the end of the file"):
        Checkpoint.open(short)


def test_no_file_of_another_kind_is_replaced(tmp_path: Path) -> None:
    source, ids, other = checkpoint(tmp_path / "whole"), tmp_path / "ids.json", checkpoint(tmp_path / "other")
    ids.write_text("[0, 3]")
    how = ("export", ids, "--checkpoint", source, "-o")
    kept = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert "must end in .safetensors" in run(*how, tmp_path / "cut.gguf", code=1).stderr
    assert "name another folder than the checkpoint's" in run(*how, source, code=1).stderr
    assert "another folder than" in run(*how, source.with_name("cut.safetensors"), code=1).stderr
    assert "was not made by this program" in run(*how, other, code=1).stderr
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "config.json").write_text('{"vocab_size": 5}')
    done = run(*how, tmp_path / "mine" / "cut.safetensors", code=1)
    assert "config.json: is there and is another model's" in done.stderr
    assert all(path.read_bytes() == data for path, data in kept.items())
    for n in (2, 3):  # its own are replaced
        ids.write_text(json.dumps(list(range(n))))
        run(*how, tmp_path / "cut" / "cut.safetensors")
        assert target_ids(tmp_path / "cut" / "cut.safetensors") == list(range(n))


def test_the_safetensors_package_reads_a_cut(tmp_path: Path) -> None:
    safetensors = pytest.importorskip("safetensors")
    ids, source = np.random.default_rng(6).permutation(600)[:300], checkpoint(tmp_path / "whole")
    opened, out = Checkpoint.open(source), tmp_path / "cut" / "model.safetensors"
    opened.write(opened.cut(ids), out)
    with safetensors.safe_open(source, "np") as whole, safetensors.safe_open(out, "np") as cut:
        assert set(cut.keys()) == {*whole.keys(), "d2t", "t2d"}
        ids = cut.get_tensor("d2t") + np.arange(300)
        assert np.array_equal(cut.get_tensor("lm_head.weight"), whole.get_tensor("lm_head.weight")[ids])
        assert np.array_equal(np.flatnonzero(cut.get_tensor("t2d")), np.sort(ids))


def test_rows_are_streamed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A few bytes at a time give the same file as all at once."""
    source, ids = checkpoint(tmp_path / "whole"), np.arange(0, 600, 7)
    opened = Checkpoint.open(source)
    opened.write(opened.cut(ids), tmp_path / "once" / "x.safetensors")
    monkeypatch.setattr(files, "CHUNK", 100)
    opened.write(opened.cut(ids), tmp_path / "parts" / "x.safetensors")
    once, parts = ((tmp_path / name / "x.safetensors").read_bytes() for name in ("once", "parts"))
    assert once == parts


def test_the_kind_of_a_list_is_known_by_reading_it(tmp_path: Path) -> None:
    for name, content in (("a.json", "[1]"), ("b.json", ""), ("c.json", "{}"), ("d.pt", "PK")):
        (tmp_path / name).write_text(content)
    known = {path.name: TOKEN_IDS.known(path) for path in tmp_path.iterdir()}
    assert known == {"a.json": True, "b.json": True, "c.json": False, "d.pt": False}
