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

from .servers import Hub, running

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


def run(hub: Hub, folder: Path, revision: str | None = None, **fields: Any) -> subprocess.CompletedProcess[str]:
    place = {"repo": "me/toy", "file": "sub/toy.gguf"} | ({"revision": revision} if revision else {})
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "HUGGING"))} | {
        "HF_ENDPOINT": hub.url,
        "HF_HOME": str(folder / "hf"),
        "HF_TOKEN": TOKEN,
        "HF_HUB_DISABLE_XET": "1",
        "GGUF_TRIM_CACHE": str(folder / "cache"),
        "NO_PROXY": "127.0.0.1",
        "PYTHONWARNINGS": "default",
    }
    return subprocess.run(
        [sys.executable, "-c", FETCH, json.dumps({"sources": [{"hub": place}], **fields})],
        env=environment, capture_output=True, text=True, check=False, timeout=60,
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
