"""A cut appears whole or not at all, whatever stops it; and it costs little memory and little more time than cp."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from gguf import GGUFValueType as Kind

from gguf_trim.cut import lay_out, write
from gguf_trim.format.companion import companion_path
from gguf_trim.prove import prove
from llamabase.errors import TrimError
from llamabase.files import sha256_of

from .conftest import keep_first
from .encode import Table, field, gguf
from .toy import write_model

resource = pytest.importorskip("resource", reason="limits of a process are a matter of POSIX")


@contextlib.contextmanager
def file_size_limit(n_bytes: int) -> Iterator[None]:
    """Let no file of this process grow beyond n_bytes; Python ignores SIGXFSZ, so a write fails with EFBIG."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (n_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def python(code: str, *args: object, timeout: float = 60) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", code, *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=timeout)


def test_a_write_that_fails_anywhere_leaves_nothing(tmp_path: Path) -> None:
    """At every size the greater output could be stopped at: in the head, in rows, in copied tensors, at the end."""
    source, folder = write_model(tmp_path / "m.gguf"), tmp_path / "out"
    before, cut = sha256_of(source), lay_out(source, keep_first(400))
    full = max(cut.trimmed.n_bytes, cut.companion.n_bytes)
    for limit in (0, 100, 30_000, full // 2, full - 5000, full - 8, full - 1):
        with file_size_limit(limit), pytest.raises(TrimError, match="cannot be written: File too large") as caught:
            write(cut, folder / "t.gguf")
        assert "\n" not in str(caught.value)
        assert not folder.exists() or not list(folder.iterdir()), limit
    with file_size_limit(full):
        write(cut, folder / "t.gguf")
    assert sha256_of(source) == before


@pytest.mark.parametrize("tail", [0, 1, 8, 200])
def test_neither_output_takes_its_name_before_both_are_whole(tmp_path: Path, tail: int) -> None:
    """Where the head is the last tensor, its last bytes are still buffered when the companion is already complete."""
    fields = [
        field("general.architecture", Kind.STRING, "llama"),
        field("tokenizer.ggml.tokens", Kind.ARRAY, ["aa", "bb", "cc", "dd"], Kind.STRING),
    ]
    source = tmp_path / "m.gguf"
    source.write_bytes(gguf(fields, [Table("norm", (9000,)), Table("token_embd.weight", (32, 4))]))
    cut = lay_out(source, keep_first(2))
    assert cut.companion.n_bytes < cut.trimmed.n_bytes - tail
    with file_size_limit(cut.trimmed.n_bytes - 1 - tail), pytest.raises(TrimError, match="File too large"):
        write(cut, tmp_path / "t.gguf")
    assert [path.name for path in tmp_path.iterdir()] == ["m.gguf"]


def test_the_command_on_a_write_that_fails(tmp_path: Path) -> None:
    source = write_model(tmp_path / "m.gguf")
    (tmp_path / "keep.txt").write_text("\n".join(map(str, range(400))))
    code = """
import resource, sys
resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, 1_000_000))
from gguf_trim.__main__ import main
main(sys.argv[1:])
"""
    done = python(code, "trim", source, "-o", tmp_path / "t.gguf", "--keep", tmp_path / "keep.txt")
    assert (done.returncode, done.stdout) == (1, "")
    message = done.stderr.splitlines()[-1]
    assert message.startswith(f"Error: {tmp_path / 't.'}") and message.endswith("cannot be written: File too large")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["keep.txt", "m.gguf"]


def test_a_disk_without_room_is_refused_before_the_work(tmp_path: Path, small_disk: Path) -> None:
    cut = lay_out(write_model(tmp_path / "m.gguf"), keep_first(400))
    (small_disk / "other").write_bytes(bytes(3 << 20))
    told: list[int] = []
    with pytest.raises(TrimError, match=r"t\.gguf: needs 4 MB and the disk has 1 MB free"):
        write(cut, small_disk / "new" / "t.gguf", told.append)
    assert [path.name for path in small_disk.iterdir()] == ["other"] and not told


def test_a_disk_that_fills_up_under_the_cut(tmp_path: Path, small_disk: Path) -> None:
    """Another program takes the room between the check and the end."""
    cut = lay_out(write_model(tmp_path / "m.gguf"), keep_first(400))

    def fill(_: int) -> None:
        with contextlib.suppress(OSError), open(small_disk / "other", "ab", buffering=0) as file:
            while file.write(bytes(65536)):
                pass

    with pytest.raises(TrimError, match=r"the disk is full; free some room or write elsewhere"):
        write(cut, small_disk / "t.gguf", fill)
    assert [path.name for path in small_disk.iterdir()] == ["other"]


@pytest.mark.parametrize("stop", [KeyboardInterrupt, MemoryError])
def test_an_interrupt_at_any_step_leaves_nothing(tmp_path: Path, stop: type[BaseException]) -> None:
    source, folder = write_model(tmp_path / "m.gguf"), tmp_path / "out"
    cut = lay_out(source, keep_first(400))
    steps: list[int] = []
    write(cut, folder / "whole.gguf", steps.append)
    assert len(steps) > 20
    for last in range(len(steps)):
        left = iter(range(last))

        def interrupt(_: int, left: Iterator[int] = left) -> None:
            if next(left, None) is None:
                raise stop

        with pytest.raises(stop):
            write(cut, folder / "t.gguf", interrupt)
        assert sorted(path.name for path in folder.iterdir()) == ["whole.gguf", "whole.vocab.gguf"]


def test_a_failed_cut_leaves_the_old_one(tmp_path: Path) -> None:
    source, out = write_model(tmp_path / "m.gguf"), tmp_path / "t.gguf"
    write(lay_out(source, keep_first(320)), out)
    before = sha256_of(out), sha256_of(companion_path(out))
    with file_size_limit(1_000_000), pytest.raises(TrimError):
        write(lay_out(source, keep_first(400)), out)
    assert (sha256_of(out), sha256_of(companion_path(out))) == before
    write(lay_out(source, keep_first(400)), out)
    assert prove(out, source).kept == 405


SLOW = """
import sys, time
from pathlib import Path
from gguf_trim.cut import lay_out, write
from gguf_trim.keep import keep_listed
def advance(n):
    print(n, flush=True)
    time.sleep(0.2)
write(lay_out(sys.argv[1], lambda v, has_row, _: keep_listed(v, has_row, list(range(320)))), Path(sys.argv[2]), advance)
"""


def test_a_killed_cut_leaves_no_output_and_the_next_run_sweeps(tmp_path: Path) -> None:
    """SIGKILL lets nothing be tidied up; a run that is still alive keeps its temporary files."""
    source, folder = write_model(tmp_path / "m.gguf"), tmp_path / "out"
    out = folder / "t.gguf"
    with subprocess.Popen([sys.executable, "-c", SLOW, source, out], stdout=subprocess.PIPE) as running:
        assert running.stdout is not None
        for _ in range(3):
            assert running.stdout.readline()
        left = sorted(path.name for path in folder.iterdir())
        assert left == [f".t.gguf.{running.pid}.part", f".t.vocab.gguf.{running.pid}.part"]
        write(lay_out(source, keep_first(320)), out)  # beside a run that is alive
        assert sorted(path.name for path in folder.iterdir()) == sorted([*left, "t.gguf", "t.vocab.gguf"])
        out.unlink(), companion_path(out).unlink()
        running.kill()
    assert sorted(path.name for path in folder.iterdir()) == left
    stranger = folder / f".other.gguf.{running.pid}.part"
    stranger.touch()
    write(lay_out(source, keep_first(320)), out)
    assert sorted(path.name for path in folder.iterdir()) == [stranger.name, "t.gguf", "t.vocab.gguf"]
    assert prove(out, source).ok


@pytest.fixture(scope="module")
def big(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """300 MB, untied, two tables of 128 MB over 32,768 tokens; real bytes, as a file with holes copies too fast."""
    tokens = [f"token{i}" for i in range(32768)]
    fields = [
        field("general.architecture", Kind.STRING, "llama"),
        field("tokenizer.ggml.tokens", Kind.ARRAY, tokens, Kind.STRING),
    ]
    tables = [Table("token_embd.weight", (1024, 32768)), Table("output.weight", (1024, 32768))]
    tables += [Table(f"blk.{i}.ffn_up.weight", (1024, 1024)) for i in range(8)]
    path = tmp_path_factory.mktemp("big") / "big.gguf"
    block = bytes(range(1, 256)) * 4112
    head = gguf(fields, [Table(t.name, t.shape, t.type, b"", 4096 * 32768 * min(i, 2) + (max(i - 2, 0) << 22))
                         for i, t in enumerate(tables)])  # fmt: skip
    with open(path, "wb") as file:
        file.write(head)
        for _ in range(sum(t.n_bytes for t in tables) // len(block) + 1):
            file.write(block)
    (path.parent / "keep.txt").write_text("\n".join(map(str, range(0, 32768, 2))))
    yield path
    path.unlink()  # pytest keeps the folders of three runs


PEAK = """
import json, sys
from gguf_trim.__main__ import main
def peak():
    return next(int(line.split()[1]) << 10 for line in open("/proc/self/status") if line.startswith("VmHWM"))
before = peak()
main(["trim", sys.argv[1], "-o", sys.argv[2], "--keep", sys.argv[3]], standalone_mode=False)
print(json.dumps(peak() - before))
"""
SECONDS = """
import json, sys, time
from functools import partial
from pathlib import Path
from gguf_trim.cut import lay_out, write
from gguf_trim.keep import choose_rows
source, out, listed = map(Path, sys.argv[1:])
started = time.perf_counter()
write(lay_out(source, partial(choose_rows, keep_file=listed)), out)
print(json.dumps(time.perf_counter() - started))
"""


def trim_big(code: str, big: Path, out: Path) -> float:
    """What the code measures of a cut."""
    done = python(code, big, out, big.parent / "keep.txt")
    assert done.returncode == 0, done.stderr
    said: float = json.loads(done.stdout.splitlines()[-1])
    return said


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_a_large_drafter_is_never_held_in_memory(big: Path, tmp_path: Path) -> None:
    """VmHWM, not ru_maxrss: the latter counts what the parent of a new process held before it."""
    assert trim_big(PEAK, big, tmp_path / "t.gguf") < 100e6
    assert (tmp_path / "t.gguf").stat().st_size > 150e6
    for path in tmp_path.iterdir():
        path.unlink()


@pytest.mark.slow
def test_a_cut_writes_at_half_the_speed_of_cp_at_least(big: Path, tmp_path: Path) -> None:
    """Bytes written per second, best of five each, alternating. Both sides wait for the disk, as a cut's fsync does."""
    copies, cuts = [0.0], [0.0]
    for _ in range(5):
        os.sync()
        started = time.perf_counter()
        subprocess.run(["cp", big, tmp_path / "copy.gguf"], check=True)
        subprocess.run(["sync", tmp_path / "copy.gguf"], check=True)
        copies.append(big.stat().st_size / (time.perf_counter() - started))
        seconds = trim_big(SECONDS, big, tmp_path / "t.gguf")
        written = sum((tmp_path / name).stat().st_size for name in ("t.gguf", "t.vocab.gguf"))
        cuts.append(written / seconds)
        for path in tmp_path.iterdir():
            path.unlink()
    assert max(cuts) > max(copies) / 2, (cuts, copies)
