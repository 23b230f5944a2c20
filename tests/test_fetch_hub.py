"""Fetching through huggingface_hub, from a hub on loopback. HF_ENDPOINT is read at import: each run is a process."""

from __future__ import annotations

import hashlib
import json
import os
import random
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from gguf import GGUFValueType as Kind
from hypothesis import given
from hypothesis import strategies as st

from gguf_trim.__main__ import main
from gguf_trim.format.companion import companion_path
from gguf_trim.pairs.hub import HubModel
from llamabase.errors import FetchError
from llamabase.gguf.reader import GGUFFile
from llamabase.gguf.writer import Output, Piece
from runner.chat.__main__ import main as chat

from .encode import field
from .servers import Hub, running

ROOT = Path(__file__).parent.parent
DATA = random.Random(0).randbytes(300_000)
TOKEN = "hf_secretsecretsecret"

# huggingface_hub waits 1 to 8 seconds between retries; nothing here is worth waiting for.
FETCH = """
import json, sys, time
time.sleep = lambda seconds: None
from llamabase.errors import TrimError
from gguf_trim.pairs.catalog import Entry
from gguf_trim.pairs.fetch import fetch
try:
    print(fetch(Entry("toy", "toy.gguf", **json.loads(sys.argv[1]))))
except TrimError as error:
    sys.exit(f"Error: {error}")
"""


@pytest.fixture
def hub() -> Iterator[Hub]:
    with running(Hub(DATA)) as hub:
        yield hub


def environment(hub: Hub, folder: Path) -> dict[str, str]:
    return {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "HUGGING"))} | {
        "HF_ENDPOINT": hub.url,
        "HF_HOME": str(folder / "hf"),
        "HF_TOKEN": TOKEN,
        "HF_HUB_DISABLE_XET": "1",
        "GGUF_TRIM_CACHE": str(folder / "cache"),
        "NO_PROXY": "127.0.0.1",
        "PYTHONWARNINGS": "default",
    }


def run(hub: Hub, folder: Path, revision: str | None = None, **fields: Any) -> subprocess.CompletedProcess[str]:
    place = {"repo": "me/toy", "file": "sub/toy.gguf"} | ({"revision": revision} if revision else {})
    return subprocess.run(
        [sys.executable, "-c", FETCH, json.dumps({"sources": [{"hub": place}], **fields})],
        env=environment(hub, folder), capture_output=True, text=True, check=False, timeout=60,
    )  # fmt: skip


def refused(done: subprocess.CompletedProcess[str], folder: Path) -> str:
    """The one sentence of a fetch that fails; nothing that could be taken for the file may be left."""
    assert done.returncode == 1 and done.stdout == "" and "Traceback" not in done.stderr, done.stderr
    (sentence,) = (line for line in done.stderr.splitlines() if line.startswith("Error: "))
    assert sentence.startswith("Error: toy: me/toy/sub/toy.gguf on the Hugging Face Hub ")
    assert done.stderr.endswith(sentence + "\n") and "give its path" in sentence
    assert TOKEN not in done.stderr
    assert not list(folder.rglob("*.gguf")) and not list(folder.rglob("*.part"))
    return sentence


def test_downloads_once_and_then_works_without_the_hub(hub: Hub, tmp_path: Path) -> None:
    done = run(hub, tmp_path, size=len(DATA), sha256=hashlib.sha256(DATA).hexdigest())
    assert done.returncode == 0, done.stderr
    path = Path(done.stdout.strip())
    assert path.read_bytes() == DATA and path.is_relative_to(tmp_path / "hf")
    assert [request.partition(" ")[0] for request in hub.requests] == ["HEAD", "GET"], hub.others
    assert all("/me/toy/resolve/main/sub/toy.gguf" in request for request in hub.requests)
    assert [headers.get("authorization") for headers in hub.headers] == [f"Bearer {TOKEN}"] * 2
    assert TOKEN not in done.stderr
    again = run(hub, tmp_path, size=len(DATA), sha256=hashlib.sha256(DATA).hexdigest())
    assert again.stdout == done.stdout
    assert "checking" in done.stderr and "checking" not in again.stderr
    assert [request.partition(" ")[0] for request in hub.requests] == ["HEAD", "GET", "HEAD"]
    hub.stop()
    assert run(hub, tmp_path).stdout == done.stdout


def test_a_revision_is_asked_for(hub: Hub, tmp_path: Path) -> None:
    assert run(hub, tmp_path, revision=hub.COMMIT).returncode == 0
    assert all(f"/resolve/{hub.COMMIT}/" in request for request in hub.requests)


def test_a_broken_connection_is_resumed_where_it_broke(hub: Hub, tmp_path: Path) -> None:
    """Within one run, and by pieces of 10 MB, as huggingface_hub does; a later run begins again."""
    hub.data = DATA * 90
    hub.drops, hub.drop_after = 2, 11 << 20
    done = run(hub, tmp_path, sha256=hashlib.sha256(hub.data).hexdigest())
    assert done.returncode == 0, done.stderr
    assert Path(done.stdout.strip()).read_bytes() == hub.data
    ranges = [headers["range"] for headers in hub.headers if "range" in headers]
    assert ranges == [f"bytes={10 << 20}-", f"bytes={20 << 20}-"]


def test_a_connection_that_breaks_for_good(hub: Hub, tmp_path: Path) -> None:
    hub.drops, hub.drop_after = 1000, 0
    assert "could not be fetched" in refused(run(hub, tmp_path), tmp_path)
    hub.drops = 0
    assert run(hub, tmp_path).returncode == 0, "a later run starts afresh"


@pytest.mark.parametrize(
    ("status", "code", "reason"),
    [
        (404, "EntryNotFound", "does not exist"),
        (404, "RepoNotFound", "does not exist"),
        (404, "RevisionNotFound", "could not be fetched"),
        (401, "RepoNotFound", "does not exist"),
        (403, "GatedRepo", "needs its licence accepted there, then `hf auth login`"),
        (500, "", "cannot be reached: check the network"),
    ],
)
def test_a_refusal_of_the_hub_is_one_sentence(hub: Hub, tmp_path: Path, status: int, code: str, reason: str) -> None:
    hub.error = (status, code)
    assert reason in refused(run(hub, tmp_path), tmp_path)


def test_a_hub_that_is_down(hub: Hub, tmp_path: Path) -> None:
    hub.stop()
    assert "cannot be reached: check the network, then run this again" in refused(run(hub, tmp_path), tmp_path)


def test_a_hub_that_hangs_up_before_it_answers(hub: Hub, tmp_path: Path) -> None:
    hub.error = (0, "")
    refused(run(hub, tmp_path), tmp_path)


def test_other_bytes_than_the_catalog_promises(hub: Hub, tmp_path: Path) -> None:
    done = run(hub, tmp_path, sha256="0" * 64)
    assert done.returncode == 1 and done.stdout == "" and "Traceback" not in done.stderr
    assert "and should have 000000000000...: not used" in done.stderr
    assert not (tmp_path / "cache" / "models").exists()


@pytest.mark.parametrize("repo", ["no repo!", ""])
def test_a_repository_that_cannot_be(hub: Hub, tmp_path: Path, repo: str) -> None:
    done = run(hub, tmp_path, sources=[{"hub": {"repo": repo, "file": "x.gguf"}}])
    assert done.returncode == 1 and "Traceback" not in done.stderr, done.stderr
    assert done.stderr.splitlines()[-1].startswith("Error: toy: ") and not hub.requests


# What -hf fetches, and -hfd: a line for each argument, the path or the one sentence.
MODEL = """
import sys, time
time.sleep = lambda seconds: None
from llamabase.errors import TrimError
from gguf_trim.pairs.hub import HubModel
for named in sys.argv[1:]:
    try:
        print(HubModel.of(named).fetch())
    except TrimError as error:
        print(error)
"""
FILES = {
    "README.md": b"---\nlicense: mit\n---\n",
    "model-F16.gguf": b"f16",
    "model-Q4_K_M.gguf": b"q4_k_m",
    "model-Q8_0.gguf": b"q8_0",
    "split/model-BF16-00002-of-00002.gguf": b"second",
    "split/model-BF16-00001-of-00002.gguf": b"first",
    "trimmed-Q4_0.gguf": b"q4_0",
    "trimmed-Q4_0.vocab.gguf": b"companion",
}


def fetched(hub: Hub, folder: Path, *named: str, **more: str) -> list[str]:
    done = subprocess.run(
        [sys.executable, "-c", MODEL, *named],
        env=environment(hub, folder) | more, capture_output=True, text=True, check=True, timeout=60,
    )  # fmt: skip
    lines = done.stdout.splitlines()
    assert TOKEN not in done.stdout + done.stderr and len(lines) == len(named)
    return lines


def test_a_quant_is_fetched_and_then_found_without_the_hub(hub: Hub, tmp_path: Path) -> None:
    hub.files = {"me/toy": FILES}
    (line,) = fetched(hub, tmp_path, "me/toy:q8_0")
    path = Path(line)
    assert path.read_bytes() == b"q8_0" and path.name == "model-Q8_0.gguf" and path.is_relative_to(tmp_path / "hf")
    assert {headers.get("authorization") for headers in hub.headers} == {f"Bearer {TOKEN}"}
    hub.stop()
    here = "the cache of me/toy (the Hub cannot be reached) has no file of the quant F16; it has Q8_0"
    for more in ({}, {"HF_HUB_OFFLINE": "1"}):
        again, other, nothing = fetched(hub, tmp_path, "me/toy:Q8_0", "me/toy:F16", "me/other", **more)
        assert again == line and other.startswith(here)
        assert nothing == "me/other on the Hugging Face Hub cannot be reached: check the network, then run this again"


def test_all_parts_of_a_file_come(hub: Hub, tmp_path: Path) -> None:
    """A trimmed drafter with its companion, and a split file."""
    hub.files = {"me/toy": FILES}
    trimmed, first = map(Path, fetched(hub, tmp_path, "me/toy:Q4_0", "me/toy:BF16"))
    assert trimmed.read_bytes() == b"q4_0" and companion_path(trimmed).read_bytes() == b"companion"
    second = first.with_name("model-BF16-00002-of-00002.gguf")
    assert (first.read_bytes(), second.read_bytes()) == (b"first", b"second")


def test_what_is_not_there_is_one_sentence(hub: Hub, tmp_path: Path) -> None:
    first = "split/model-BF16-00001-of-00002.gguf"
    hub.files = {"me/toy": {first: b"first"}, "me/empty": {"README.md": b""}}
    part, other, empty = fetched(hub, tmp_path, "me/toy:BF16", "me/other", "me/empty")
    lacking = f"me/toy on the Hugging Face Hub lacks split/model-BF16-00002-of-00002.gguf, a part of {first}; choose"
    assert part.startswith(lacking)
    assert other.startswith("me/other on the Hugging Face Hub does not exist, or is private: check the name, or log in")
    assert empty.startswith("me/empty on the Hugging Face Hub has no GGUF file; choose a repository that has")


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        ((403, "GatedRepo"), "needs its licence accepted there, then `hf auth login`"),
        ((500, ""), "cannot be reached: "),
    ],
)
def test_a_closed_or_broken_repository_is_one_sentence(
    hub: Hub, tmp_path: Path, error: tuple[int, str], reason: str
) -> None:
    hub.files, hub.error = {"me/toy": FILES}, error
    assert fetched(hub, tmp_path, "me/toy")[0].startswith(f"me/toy on the Hugging Face Hub {reason}")


@pytest.mark.parametrize(
    ("quant", "names", "chosen"),
    [
        ("", ["a-F16.gguf", "a-Q4_K_M.gguf", "a-Q8_0.gguf"], "a-Q4_K_M.gguf"),
        ("", ["a-F16.gguf", "a-q8_0.gguf", "b.gguf"], "a-q8_0.gguf"),
        ("", ["b.gguf", "a.gguf", "mmproj-a.gguf", "a.vocab.gguf"], "a.gguf"),
        ("f16", ["a-BF16.gguf", "a-F16.gguf"], "a-F16.gguf"),
        ("Q4_K_M", ["a-Q4_K_M.gguf", "0/mmproj-Q4_K_M.gguf", "0/eagle3-Q4_K_M.gguf"], "a-Q4_K_M.gguf"),
        ("eagle3-Q4_K_M", ["a-Q4_K_M.gguf", "0/eagle3-Q4_K_M.gguf"], "0/eagle3-Q4_K_M.gguf"),
        ("Q2_K", ["Q2_K/a-Q2_K-00002-of-00002.gguf", "Q2_K/a-Q2_K-00001-of-00002.gguf"],
         "Q2_K/a-Q2_K-00001-of-00002.gguf"),
        ("Q4_0+HEAD", ["a-Q4_0.gguf", "a-Q4_0+HEAD.gguf"], "a-Q4_0+HEAD.gguf"),
    ],
)  # fmt: skip
def test_the_file_that_llama_cpp_would_take(quant: str, names: list[str], chosen: str) -> None:
    assert HubModel("me/toy", quant).choose(names, "me/toy") == chosen
    assert HubModel("me/toy", quant).choose(names[::-1], "me/toy") == chosen
    assert HubModel("me/toy", file=chosen.upper()).choose(names, "me/toy") == chosen


@pytest.mark.parametrize(
    ("model", "names", "reason"),
    [
        (HubModel("a/b", "Q9"), ["x-Q4_0.gguf", "y/x-F16-00001-of-00003.gguf"], "of the quant Q9; it has F16, Q4_0:"),
        (HubModel("a/b"), ["mmproj-F16.gguf"], "has no model; it has F16: name one"),
        (HubModel("a/b", file="y.gguf"), ["x.gguf", "z.gguf"], "has no y.gguf; it has x.gguf, z.gguf"),
        (HubModel("a/b"), ["x.safetensors", "x.vocab.gguf"], "has no GGUF file"),
    ],
)
def test_a_file_that_is_not_there_is_one_sentence(model: HubModel, names: list[str], reason: str) -> None:
    with pytest.raises(FetchError) as caught:
        model.choose(names, "a/b")
    assert reason in str(caught.value) and "\n" not in str(caught.value)


@given(st.permutations(["a-Q4_0.gguf", "b/a-Q5_K_S.gguf", "a.Q8_0.gguf", "mmproj-F16.gguf"]), st.data())
def test_neither_order_nor_case_matters(names: list[str], data: st.DataObject) -> None:
    quant = data.draw(st.sampled_from(["Q4_0", "Q5_K_S", "Q8_0"]))
    chosen = HubModel("a/b", quant).choose(names, "a/b")
    assert quant in chosen and HubModel("a/b", quant.lower()).choose(sorted(names), "a/b") == chosen


def parts_of(path: Path) -> dict[str, bytes]:
    """A model split into two files, the head in the second, as llama-gguf-split makes them."""
    file = GGUFFile(path)
    tensors, parts = [*file.tensors.values()], {}
    for number, pieces in enumerate((tensors[:1], tensors[1:])):
        fields = [file.raw(key) for key in file.fields] if number == 0 else []
        fields += [
            field("split.no", Kind.UINT16, number),
            field("split.count", Kind.UINT16, 2),
            field("split.tensors.count", Kind.INT32, len(tensors)),
        ]
        header = Output(fields, [Piece(tensor) for tensor in pieces], file.alignment).header
        data = b"".join(file.read(tensor) for tensor in pieces)  # F32, so that none of them needs padding
        parts[f"target-F32-{number + 1:05d}-of-00002.gguf"] = header + data
    return parts


def test_chat_with_target_and_trimmed_drafter_from_the_hub(hub: Hub, tmp_path: Path, toys: dict[str, Path]) -> None:
    """The names of llama.cpp's flags. The target is split; the drafter is a cut that somebody shared."""
    trimmed = toys["good-trimmed"]
    hub.files = {
        "me/target": parts_of(toys["target"]),
        "you/cut": {path.name: path.read_bytes() for path in (trimmed, companion_path(trimmed))},
    }
    command = [sys.executable, "-m", "runner.chat", "--prompt", "the", "-n", "8", "--draft-max", "3", "--json"]
    texts = []
    for pair in (["-hf", "me/target:f32", "-hfd", "you/cut"], ["--target", toys["target"], "--draft", trimmed]):
        done = subprocess.run(
            [*command, "--temp", "0", *map(str, pair)], cwd=ROOT, env=environment(hub, tmp_path),
            capture_output=True, text=True, check=False, timeout=120,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        texts.append(done.stdout.splitlines()[0])
        assert json.loads(done.stdout.splitlines()[-1])["accepted"] > 0
    assert texts[0] == texts[1] and "good-trimmed.vocab.gguf" not in done.stderr


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["-hf", "no repo"], "'no repo' is not user/repo or user/repo:quant"),
        (["-hf", "a/b:"], "is not user/repo or user/repo:quant"),
        (["-hff", "x.gguf"], "--hf-file needs --hf-repo"),
        (["-hf", "a/b", "--target", "x.gguf"], "give --target or --hf-repo, not both"),
        (["-hf", "a/b", "-hfd", "c/d", "--draft", "x.gguf"], "give --draft or --hf-repo-draft, not both"),
    ],
)
@pytest.mark.parametrize("command", [[chat, "--prompt", "x"], [main, "prepare"], [main, "plan"]])
def test_what_cannot_be_meant_is_wrong_usage(command: list[Any], arguments: list[str], reason: str) -> None:
    done = CliRunner().invoke(command[0], [*command[1:], *arguments])
    assert done.exit_code == 2 and reason in done.stderr, done.output


def test_what_make_trim_asks_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The drafter is fetched first: a wrong name of it is told before the target, which is large, is fetched."""
    asked: list[HubModel] = []
    monkeypatch.setattr(HubModel, "fetch", lambda self: asked.append(self) or tmp_path / "nowhere.gguf")
    done = CliRunner().invoke(main, ["prepare", "-hfr", "a/b", "-hff", "x.gguf", "--hf-repo-draft", "c/d:Q4_0"])
    assert done.exit_code == 1 and "nowhere.gguf: cannot be read" in done.stderr
    assert asked == [HubModel("c/d", "Q4_0"), HubModel("a/b", file="x.gguf")]
