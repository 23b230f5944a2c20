"""Counting on a Dask cluster gives the bytes of the local run, also when a worker dies in the middle."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from pathlib import Path

import pytest
from click.testing import CliRunner

from corpus.__main__ import main

distributed = pytest.importorskip("distributed")


def corpus_in(folder: Path) -> Path:
    folder.mkdir()
    for i in range(12):
        lines = [json.dumps({"text": f"the king {i} and the sea {j} of naïve tea"}) for j in range(400)]
        (folder / f"{i:02d}.jsonl").write_text("\n".join(lines))
    (folder / "note.txt").write_text("one more text\n" * 50)
    (folder / "data.bin").write_bytes(bytes(range(256)))
    return folder


def count(*arguments: object):
    return CliRunner().invoke(main, ["count", *map(str, arguments)])


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kill", [False, True])
def test_same_bytes_as_the_local_run(tmp_path: Path, toys, kill: bool) -> None:
    folder = corpus_in(tmp_path / "corpus")
    common = [folder, "--tokenizer", toys["target"]]
    assert count(*common, "-o", tmp_path / "local.npz").exit_code == 0
    with distributed.LocalCluster(n_workers=2, threads_per_worker=1, processes=True, dashboard_address=None) as cluster:
        if kill:
            worker = next(iter(cluster.workers.values())).process.pid

            def stop() -> None:
                time.sleep(0.4)
                os.kill(worker, signal.SIGKILL)

            threading.Thread(target=stop).start()
        done = count(*common, "-o", tmp_path / "dask.npz", "--dask", cluster.scheduler_address)
    assert done.exit_code == 0, done.output
    assert (tmp_path / "dask.npz").read_bytes() == (tmp_path / "local.npz").read_bytes()


@pytest.mark.filterwarnings("ignore")
def test_no_cluster_is_one_sentence(tmp_path: Path, toys, monkeypatch) -> None:
    monkeypatch.setattr("corpus.cluster.PATIENCE", 0.5)
    folder = corpus_in(tmp_path / "corpus")
    done = count(folder, "--tokenizer", toys["target"], "-o", tmp_path / "c.npz", "--dask", "tcp://127.0.0.1:9")
    assert done.exit_code == 1
    assert "no Dask scheduler answers there" in done.stderr
    done = count(folder, "--tokenizer", toys["target"], "-o", tmp_path / "c.npz", "--dask", "x", "--max-tokens", 5)
    assert done.exit_code == 2
