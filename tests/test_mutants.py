"""Every reader over files that were damaged by chance: nothing comes out of it but the project's own errors.

And no read takes a second, and memory stays flat.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from multiprocessing import get_context
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest

from corpus.answers import answered, read_answers
from corpus.counts import Counts
from corpus.prompts import load_prompts
from gguf_trim.cut import lay_out
from gguf_trim.describe import describe
from gguf_trim.exchange.checkpoint import Checkpoint
from gguf_trim.exchange.token_ids import read_token_ids
from gguf_trim.format.companion import Trimmed, companion_path
from gguf_trim.format.mtp import OWN_BLOCK, MtpBlock
from gguf_trim.format.speculator import Speculator
from gguf_trim.format.state_fed import Eagle3Head
from gguf_trim.pairs.catalog import load_catalog
from llamabase import store
from llamabase.errors import TrimError
from llamabase.gguf.reader import GGUFFile
from llamabase.gguf.vocabulary import Vocabulary
from llamabase.llama.context import F32
from llamabase.llama.ggml import release_threads
from llamabase.llama.model import Model
from llamabase.llama.template import ChatTemplate
from llamabase.sampling.settings import Sampling
from llamabase.store import recall, remember
from runner.bench.runs import read_record
from runner.bench.steps import acceptance_in
from runner.chat.conversation import load
from runner.loop.engine import Engine
from runner.loop.weights import LoadOptions

from .conftest import copy_trimmed, keep_first
from .test_export import checkpoint, write_list
from .test_soak import own_memory
from .toy import write_head, write_model, write_mtp

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="forks, and reads /proc/self")

ROOT = Path(__file__).parent.parent
LONGEST = 1.0  # seconds of a read
NUMBERS = [0, 1, 0x7F, 0xFF, 0xFFFF, 0x7FFFFFFF, 0xFFFFFFFF, 1 << 63, (1 << 64) - 1, 32, 4, 600, 601]
PIECES = [b"[" * 5000, b"9" * 5000, b"1e999", b"NaN", b'"\\ud800"', b"null", b"[]", b"{}", b"-1", b'"', b"\xff", b"\0",
          b"true", b"1e-400", b",", b"{", b"}", b"9223372036854775808", b"\n", b"=", b"."]  # fmt: skip


@dataclass(frozen=True)
class Sample:
    """A good file and what reads it; damage goes into its first `head` bytes for the most part."""

    path: Path
    head: int
    read: Callable[[Path], object]
    text: bool = False


def read_model(path: Path) -> None:
    file = GGUFFile(path)
    for key in file.fields:
        file.get(key)
    describe(path)
    vocabulary = Vocabulary(file)
    vocabulary.forced  # noqa: B018
    vocabulary.fingerprint  # noqa: B018
    file.require_loadable()
    ChatTemplate(file, vocabulary)
    lay_out(path, keep_first(400))


def read_trimmed(path: Path) -> None:
    trimmed = Trimmed.open(path)
    trimmed.file.require_loadable()
    Speculator.of(trimmed)
    trimmed.vocabulary.fingerprint  # noqa: B018


def read_companion(path: Path) -> None:
    read_trimmed(path.with_name(path.name.replace(".vocab.gguf", ".gguf")))


def read_head(path: Path) -> None:
    file = GGUFFile(path)
    Eagle3Head.of(file)
    lay_out(path, keep_first(64))
    Vocabulary(file)
    with Model(path, vocab_only=True) as model:  # as counting does
        model.tokenize("the king")


def read_block(path: Path) -> None:
    MtpBlock.of(GGUFFile(path))
    lay_out(OWN_BLOCK, keep_first(64), path)


def read_checkpoint(path: Path) -> None:
    opened = Checkpoint.open(path)
    assert opened.cut(opened.ids[:5]).header
    read_token_ids(path)


def read_memory(path: Path) -> None:
    with patch.object(store, "memory_file", lambda: path):
        recall("costs", "key")


def make_samples(folder: Path, toys: dict[str, Path]) -> dict[str, Sample]:
    model = write_model(folder / "model.gguf", n_layer=1, head_bias=True)
    trimmed, other = (copy_trimmed(toys["spec-trimmed"], folder / name) for name in ("t.gguf", "u.gguf"))
    ids = np.unique(np.random.default_rng(3).permutation(600)[:300])
    head = write_head(folder / "eagle3.gguf", ids=ids, tokens=True)
    block = write_mtp(folder / "mtp.gguf")
    vocabulary = Vocabulary(GGUFFile(model))
    Counts.of(np.arange(600), vocabulary, "x").save(folder / "c.npz")
    answer = {"id": "a", "label": "x", "messages": [], "prompt_ids": [1, 2], "answer_ids": [3], "finish": "stop"}
    record = json.loads((ROOT / "docs/results/2026-11-21-bench.json").read_text())
    short = [found | {name: found[name][:2] for name in ("rounds", "token_ids")} for found in record["answers"][:8]]
    record = {name: record[name] for name in ("machine", "files", "settings", "modes", "target_step")}
    record |= {"answers": short}
    memory = folder / "remembered.sqlite"
    with patch.object(store, "memory_file", lambda: memory):
        remember("costs", "key", {"verify": {"1": 0.1}, "draft": {"1": 0.1}})
    saved = write_list(folder / "map.pt", "int64.pt", [5, 599])
    whole = checkpoint(folder / "checkpoint", ids[:20], config=False)
    texts: dict[str, tuple[str, Callable[[Path], object]]] = {
        "answers.jsonl": (json.dumps(answer) + "\n" + json.dumps(answer) + "\n", answered),
        "ids.json": (json.dumps({"a": [[5, 6], [8, 9]], "b": [[1], [2]]}), read_answers),
        "answers2.jsonl": (json.dumps(answer) + "\n", read_answers),
        "prompts.jsonl": (
            json.dumps({"id": 1, "turns": ["a", "b"], "category": "x"}) + '\n{"messages": [{"role": "user", '
            '"content": "é"}]}\n',
            load_prompts,
        ),
        "keep.txt": ("# ids\n1\n2 # two\n599\n", lambda path: read_token_ids(path, 600)),
        "map.json": (json.dumps({"0": 5, "1": 599}), lambda path: read_token_ids(path, 600)),
        "record.json": (json.dumps(record), lambda path: read_record(path, "make one")),
        "catalog.toml": (
            '[models.x]\nfile = "x.gguf"\nsize = 5\n'
            'sources = [{ pypi = { package = "a{}", parts = 2, version = "1" } }]\n'
            '[models.y]\nsources = [{ hub = { repo = "a/b", file = "y.gguf" } }, { path = "~/y.gguf" }]\n'
            '[pairs.p]\ntarget = "x"\ndrafter = "y"\n',
            load_catalog,
        ),
        "talk.json": (json.dumps([{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]), load),
        "tau.json": (json.dumps({"draft_max": 2, "tau": {"draft full": 2.0}}), acceptance_in),
    }
    found = {
        "model": Sample(model, len(GGUFFile(model).header), read_model),
        "trimmed": Sample(trimmed, len(GGUFFile(trimmed).header), read_trimmed),
        "companion": Sample(companion_path(other), len(GGUFFile(companion_path(other)).header), read_companion),
        "eagle3": Sample(head, len(GGUFFile(head).header), read_head),
        "mtp": Sample(block, len(GGUFFile(block).header), read_block),
        "counts": Sample(folder / "c.npz", (folder / "c.npz").stat().st_size, Counts.load),
        "memory": Sample(memory, memory.stat().st_size, read_memory),
        "pt": Sample(saved, saved.stat().st_size, lambda path: read_token_ids(path, 600)),
        "checkpoint": Sample(whole, whole.stat().st_size, read_checkpoint),
    }
    for name, (text, read) in texts.items():
        (folder / name).write_text(text)
        found[name] = Sample(folder / name, len(text.encode()), read, text=True)
    return found


def damaged(rng: random.Random, data: bytes, sample: Sample) -> tuple[int, bytes, int] | bytes:
    """(where, what is there instead, the new size) or, of a text, all of it."""
    if sample.text:
        found = data
        for _ in range(rng.choice((1, 1, 1, 2, 4))):
            at, end = sorted((rng.randrange(len(found) + 1), rng.randrange(len(found) + 1)))
            match rng.randrange(5):
                case 0:
                    found = found[:at] + bytes([rng.randrange(256)]) + found[at + 1 :]
                case 1:
                    found = found[:at] + found[at : at + rng.randrange(40)] * 2 + found[at + 40 :]
                case 2:
                    found = found[:at] + found[min(end, at + 30) :]
                case 3:
                    found = found[:at] + rng.choice(PIECES) + found[at:]
                case 4:  # in place of a value
                    found = found[:at] + rng.choice(PIECES) + found[min(end, at + rng.randrange(12)) :]
        return found
    at = rng.randrange(sample.head if rng.random() < 0.95 else len(data))
    size = len(data)
    match rng.randrange(4):
        case 0:
            new = bytes([data[at] ^ 1 << rng.randrange(8)])
        case 1:
            new = rng.choice(NUMBERS).to_bytes(8, "little")[: rng.choice((1, 2, 4, 8))]
        case 2:
            there = rng.randrange(sample.head)
            new = data[there : there + rng.randrange(1, 24)]
        case _:
            new, size = bytes(rng.randrange(256) for _ in range(rng.randrange(1, 5))), size
            if rng.random() < 0.3:
                size = rng.randrange(len(data))
    return at, new[: max(0, len(data) - at)], size


def reads(sample: Sample, seed: int, n: int) -> tuple[Counter[str], float, list[str]]:
    """Of n mutants: how many were read and refused, the seconds of the slowest, and what should not have been."""
    rng, data = random.Random(seed), sample.path.read_bytes()
    seen, slowest, wrong = Counter[str](), 0.0, list[str]()
    with open(sample.path, "r+b", buffering=0) as file:
        for i in range(n):
            change = damaged(rng, data, sample)
            if isinstance(change, bytes):
                os.ftruncate(file.fileno(), 0)
                os.pwrite(file.fileno(), change, 0)
            else:
                at, new, size = change
                os.pwrite(file.fileno(), new, at)
                if size < len(data):
                    os.ftruncate(file.fileno(), size)
            began = time.perf_counter()
            try:
                sample.read(sample.path)
                seen["read"] += 1
            except TrimError as error:
                seen["refused"] += 1
                if "\n" in str(error):
                    wrong.append(f"seed {seed}, mutant {i}: says {error}")
            except BaseException:
                wrong.append(f"seed {seed}, mutant {i}: {traceback.format_exc(limit=-3)}")
            slowest = max(slowest, time.perf_counter() - began)
            if isinstance(change, bytes) or change[2] < len(data):
                os.ftruncate(file.fileno(), 0)
                os.pwrite(file.fileno(), data, 0)
            else:
                os.pwrite(file.fileno(), data[at : at + len(new)], at)
    assert sample.path.read_bytes() == data
    return seen, slowest, wrong


@pytest.fixture(scope="module")
def samples(toys: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Sample]:
    return make_samples(tmp_path_factory.mktemp("samples"), toys)


NAMES = ["model", "trimmed", "companion", "eagle3", "mtp", "counts", "memory", "pt", "checkpoint", "answers.jsonl",
         "ids.json", "answers2.jsonl", "prompts.jsonl", "keep.txt", "map.json", "record.json", "catalog.toml",
         "talk.json", "tau.json"]  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_some_mutants(name: str, samples: dict[str, Sample], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GGUF_TRIM_CACHE", "nowhere")
    samples[name].read(samples[name].path)
    seen, slowest, wrong = reads(samples[name], 1, 150 if "." not in name else 600)
    assert not wrong, wrong[0]
    assert slowest < LONGEST
    assert seen["refused"] or name == "memory"  # which is done without


def _share(
    folder: Path, toys: dict[str, Path], name: str, seed: int, n: int
) -> tuple[str, Counter[str], float, int, list[str]]:
    """One process's part: of one reader, on files of its own."""
    folder.mkdir()
    sample = make_samples(folder, toys)[name]
    warm = reads(sample, seed, n // 10)
    before = own_memory()
    seen, slowest, wrong = reads(sample, seed + 1, n - n // 10)
    return name, seen + warm[0], max(slowest, warm[1]), own_memory() - before, warm[2] + wrong


@pytest.mark.slow
def test_a_million_mutants(toys: dict[str, Path], tmp_path: Path) -> None:
    """On all cores; MUTANTS and SEED of the environment decide otherwise."""
    total, first = int(os.environ.get("MUTANTS", "1000000")), int(os.environ.get("SEED", "1"))
    each = total // (4 * len(NAMES))
    wrong: list[str] = []
    slowest, most, seen = 0.0, 0, Counter[str]()
    with ProcessPoolExecutor(mp_context=get_context("spawn")) as pool:
        tasks = [
            pool.submit(_share, tmp_path / f"{name}-{part}", toys, name, first + 1000 * part + 10 * i, each)
            for part in range(4)
            for i, name in enumerate(NAMES)
        ]
        for task in tasks:
            name, found, longest, grown, faults = task.result()
            print(
                f"MUTANTS {name}: {dict(found)}, slowest {longest:.3f} s, grown {grown >> 10} kB", *faults, flush=True
            )
            slowest, most, seen = max(slowest, longest), max(most, grown), seen + found
            wrong += faults
    print(f"MUTANTS in all {seen}, seeds from {first}, slowest {slowest:.3f} s, grown {most >> 10} kB at most")
    assert not wrong, (len(wrong), wrong[:3])
    assert slowest < LONGEST
    assert most < 16 << 20


GREEDY, N = Sampling(temp=0), 8


def plain_text(target: Path) -> list[int]:
    with Engine(LoadOptions(target, n_ctx=128, n_threads=1, cache=F32)) as engine:
        rounds = list(engine.rounds([65, 66, 67], GREEDY, max_tokens=N, draft_max=0))
    return [token for round_ in rounds for token in round_.tokens]


def drafts(target: Path, drafter: Path, wanted: list[int]) -> None:
    """Open the pair and answer; SystemExit with 0 for the target's own text, 3 for a refusal, 4 for another text."""
    try:
        with Engine(LoadOptions(target, drafter, n_ctx=128, n_threads=1, cache=F32, cache_draft=F32)) as engine:
            rounds = list(engine.rounds([65, 66, 67], GREEDY, max_tokens=N, draft_max=3))
    except TrimError:
        raise SystemExit(3) from None
    raise SystemExit(0 if [token for round_ in rounds for token in round_.tokens] == wanted else 4)


def children(folder: Path, toys: dict[str, Path], seed: int, n: int) -> tuple[Counter[str], list[str]]:
    """n forked processes, each with a pair that was damaged; how they ended, and what should not have been."""
    folder.mkdir()
    samples = make_samples(folder, toys)
    shutil.copy(toys["wrong"], folder / "wrong.gguf")
    head = len(GGUFFile(folder / "wrong.gguf").header)
    samples["uncut"] = Sample(folder / "wrong.gguf", head, read_model)
    target = folder / "target.gguf"
    write_model(target, seed=1, n_layer=4)
    wanted = plain_text(target)
    release_threads()
    rng, seen, wrong, said = random.Random(seed), Counter[str](), list[str](), folder / "said"
    opened = {"trimmed": "t.gguf", "companion": "u.gguf", "uncut": "wrong.gguf", "eagle3": "eagle3.gguf"}
    good = {name: samples[name].path.read_bytes() for name in opened}
    for i in range(n):
        name = rng.choice(list(opened))
        sample = samples[name]
        if rng.random() < 0.3:  # in the weights
            sample = replace(sample, head=len(good[name]))
        change = damaged(rng, good[name], sample)
        assert not isinstance(change, bytes)
        at, new, size = change
        with open(sample.path, "r+b", buffering=0) as file:
            os.pwrite(file.fileno(), new, at)
            os.ftruncate(file.fileno(), size)
        if (child := os.fork()) == 0:
            code = 5
            try:
                signal.signal(signal.SIGALRM, signal.SIG_DFL)
                signal.alarm(60)
                os.environ["GGML_NO_BACKTRACE"] = "1"  # or a debugger takes a second for each
                os.dup2(os.open(said, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 2)
                drafts(target, folder / opened[name], wanted)
            except SystemExit as end:
                code = int(str(end.code))
            finally:
                os._exit(code)
        ended = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        seen[{0: "same text", 3: "refused"}.get(ended, "wrong")] += 1
        if ended not in (0, 3):
            wrong.append(f"seed {seed}, child {i}: {name} ended with {ended}: {said.read_bytes()[-300:]!r}")
        with open(sample.path, "r+b", buffering=0) as file:
            os.pwrite(file.fileno(), good[name], 0)
    return seen, wrong


def test_some_children_that_draft(toys: dict[str, Path], tmp_path: Path) -> None:
    seen, wrong = children(tmp_path / "x", toys, 1, 60)
    assert not wrong, wrong
    assert seen["same text"] and seen["refused"]


@pytest.mark.slow
def test_ten_thousand_children_that_draft(toys: dict[str, Path], tmp_path: Path) -> None:
    total, first = int(os.environ.get("CHILDREN", "10000")), int(os.environ.get("SEED", "1"))
    seen, wrong = Counter[str](), list[str]()
    with ProcessPoolExecutor(mp_context=get_context("spawn")) as pool:
        tasks = [pool.submit(children, tmp_path / f"{i}", toys, first + i, total // 4) for i in range(4)]
        for task in tasks:
            found, faults = task.result()
            seen, wrong = seen + found, wrong + faults
            print(f"CHILDREN {dict(seen)}, seeds from {first}, {len(wrong)} wrong", *faults, flush=True)
    assert not wrong, wrong[:20]
