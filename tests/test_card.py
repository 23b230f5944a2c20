"""A model card: its metadata is what the Hub reads, and every figure in it is one of the files."""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result
from gguf import GGMLQuantizationType as Quant
from gguf import GGUFValueType as Kind
from huggingface_hub import ModelCard
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from corpus.counts import Counts, Group, Part
from gguf_trim.__main__ import main
from gguf_trim.cut import lay_out, write
from gguf_trim.fit.closed_form import attach
from gguf_trim.format.companion import Trimmed, companion_path
from gguf_trim.format.mtp import OWN_BLOCK
from gguf_trim.format.speculator import Speculator
from gguf_trim.keep import choose_rows
from gguf_trim.model_card import card_path, model_card
from llamabase.files import sha256_of
from llamabase.gguf.reader import GGUFFile
from llamabase.gguf.vocabulary import Vocabulary
from llamabase.gguf.writer import Output, Piece, field

from .conftest import copy_trimmed, keep_first, keep_spread
from .encode import field as array
from .toy import write_head, write_model, write_mtp
from .toy_gemma import write_assistant, write_gemma4

SOURCE = "https://huggingface.co/me/toy-1B"


def run(*args: object, code: int = 0) -> Result:
    done = CliRunner().invoke(main, [str(arg) for arg in args])
    assert done.exit_code == code, done.output
    return done


def labelled(path: Path, to: Path, **general: Any) -> Path:
    """The same model with more under general.*."""
    file = GGUFFile(path)
    new = {f"general.{key}": value for key, value in general.items()}
    fields = [file.raw(key) for key in file.fields if key not in new]
    fields += [
        array(key, Kind.ARRAY, value, Kind.STRING) if isinstance(value, list) else field(key, value)
        for key, value in new.items()
    ]
    with open(path, "rb") as source, open(to, "wb") as out:
        Output(fields, [Piece(tensor) for tensor in file.tensors.values()], file.alignment).write(source, out)
    return to


@pytest.fixture
def drafter(tmp_path: Path) -> Path:
    plain = write_model(tmp_path / "plain.gguf", head_type=Quant.Q8_0)
    general = {"name": "Toy 1B", "license": "apache-2.0", "source.repo_url": SOURCE, "languages": ["de", "en"]}
    return labelled(plain, tmp_path / "toy.gguf", **general)


@pytest.fixture
def counts(tmp_path: Path, drafter: Path) -> Path:
    """Of two sources in two languages, and of something held out."""
    rng, vocabulary = np.random.default_rng(0), Vocabulary(GGUFFile(drafter))

    def part(source: str, label: str, held_out: bool, first: int, last: int) -> Part:
        ids = np.arange(first, last, dtype=np.int32)
        return Part(ids, rng.integers(1, 1000, len(ids)), Group(source, label, held_out))

    parts = [
        part("chats", "de", False, 0, 350), part("chats", "en", False, 150, 410),
        part("web", "en", False, 80, 250), part("web", "en", True, 250, 400),
    ]  # fmt: skip
    Counts.of_parts(parts, vocabulary, "/home/me/secret/chats, /home/me/secret/web").save(tmp_path / "mine.npz")
    return tmp_path / "mine.npz"


def split(card: Path) -> tuple[dict[str, Any], str]:
    """Metadata, and what a reader sees: as the Hub's own client reads a README.md."""
    found = ModelCard.load(card)
    return found.data.to_dict(), found.text


def tables(body: str) -> list[list[list[str]]]:
    """The tables of a card, without the line below their heads."""
    blocks = [block for block in body.split("\n\n") if block.startswith("|")]
    found = [[line[2:-2].split(" | ") for line in block.splitlines()] for block in blocks]
    return [[table[0], *table[2:]] for table in found]


def numbers(body: str) -> set[str]:
    """Every number that is no part of a word, a name or a hash."""
    return {text.rstrip(",.") for text in re.findall(r"(?<![\w.-])\d[\d,.]*(?![\w-])", body)}


def test_trim_writes_one_of_which_every_figure_is_in_the_files(tmp_path: Path, drafter: Path, counts: Path) -> None:
    run("trim", drafter, "-o", tmp_path / "t.gguf", "--counts", counts, "-k", 320)
    metadata, body = split(tmp_path / "t.md")
    assert metadata == {
        "base_model": "me/toy-1B", "base_model_relation": "quantized", "license": "apache-2.0", "library_name": "gguf",
        "language": ["de", "en"], "pipeline_tag": "text-generation",
        "tags": ["gguf", "speculative-decoding", "drafter", "gguf-trim"],
    }  # fmt: skip
    trimmed, original, counted = Trimmed.open(tmp_path / "t.gguf"), GGUFFile(drafter), Counts.load(counts)
    sha256 = hashlib.sha256(drafter.read_bytes()).hexdigest()
    source, cut, covered = tables(body)
    assert dict(source[1:]) == {
        "name": "Toy 1B",
        "file": "toy.gguf",
        "size": f"{drafter.stat().st_size:,} bytes",
        "SHA-256": f"`{sha256}`",
        "architecture": "llama",
        "licence": "apache-2.0",
        "vocabulary": f"600 tokens, fingerprint `{Vocabulary(original).fingerprint}`",
    }
    sizes: Counter[str] = Counter()
    for tensor in trimmed.file.tensors.values():
        sizes[tensor.type.name] += tensor.n_bytes
    kept = np.isin(counted.ids, trimmed.d2t)
    mb = [path.stat().st_size / 1e6 for path in (tmp_path / "t.gguf", tmp_path / "t.vocab.gguf")]
    read = [
        sum(tensor.n_bytes for name, tensor in file.tensors.items() if name != "token_embd.weight") / 1e6
        for file in (trimmed.file, original)
    ]
    assert dict(cut[1:]) == {
        "rows kept": "320 of 600 (53.3%)",
        "kept whatever was counted": f"{len(Vocabulary(original).forced)} (ends, control tokens, single bytes)",
        "share of the counts": f"{counted.counts[kept].sum() / counted.counts.sum():.2%}",
        "files": f"{mb[0]:.1f} MB, and the companion {mb[1]:.1f} MB",
        "types, by bytes": ", ".join(f"{name} {n / sizes.total():.1%}" for name, n in sizes.most_common()),
        "read per draft step": f"{read[0]:.1f} MB; with the whole head in the same type {read[1]:.1f} MB "
        f"({read[0] / read[1]:.2f} x)",
    }
    dense = {part.group: np.bincount(part.ids, part.counts, 600) for part in counted.parts}

    def line(name: str, *groups: Group) -> list[str]:
        total = np.sum([dense[group] for group in groups], axis=0)
        return [name, f"{total.sum():,.0f}", f"{total[trimmed.d2t].sum() / total.sum():.2%}"]

    de, en, web, held = (
        Group("chats", "de", False),
        Group("chats", "en", False),
        *(Group("web", "en", h) for h in (0, 1)),
    )
    assert covered == [
        ["counted", "tokens", "covered"],
        line("everything", de, en, web),
        line("held out", held),
        line("chats", de, en),
        line("web", web),
        line("de", de),
        line("en", en, web),
    ]
    prose = {"320", "600", f"{counted.total:,}", str(len(counted.ids)), "0.1.0", "256"}  # the last of SHA-256
    in_tables = numbers("\n".join(" ".join(row) for table in (source, cut, covered) for row in table))
    assert numbers(body) <= prose | in_tables
    assert "The rows are the most frequent ones of mine.npz" in body
    assert "/home" not in body and str(tmp_path) not in body, "a card is for strangers"
    assert "gguf-trim verify t.gguf --source toy.gguf" in body
    assert "gguf-run chat --target TARGET.gguf --draft t.gguf" in body and "llama-server cannot draft with it" in body


def test_a_file_without_one_gets_it_with_the_proof(tmp_path: Path, drafter: Path, counts: Path) -> None:
    write(lay_out(drafter, lambda *a: choose_rows(*a, k=320, counts=counts)), tmp_path / "t.gguf")
    assert run("card", tmp_path / "t.gguf").stdout == f"{tmp_path / 't.md'}\n"
    _, body = split(tmp_path / "t.md")
    assert "## Counts" not in body and "SHA-256" not in body and "share of the counts" in body
    run("card", tmp_path / "t.gguf", "--source", drafter, "--counts", counts, "-o", tmp_path / "README.md")
    _, body = split(tmp_path / "README.md")
    said = json.loads(run("verify", tmp_path / "t.gguf", "--source", drafter, "--json").stdout)
    assert said["max_logit_difference"] == 0, "as `verify` found it"
    assert "320 rows are equal as bytes, all other tensors are untouched" in body
    assert f"differ by 0 at most (bit for bit) over {said['positions']} positions" in body
    assert "mine.npz" in body and sha256_of(drafter) in body


def test_the_counts_that_ship_are_recognised(tmp_path: Path, drafter: Path) -> None:
    run("trim", drafter, "-o", tmp_path / "t.gguf", "-k", 320)
    _, body = split(tmp_path / "t.md")
    assert "the most frequent ones of the counts that ship with gguf-trim: " in body
    (tmp_path / "t.md").unlink()
    run("card", tmp_path / "t.gguf", "--source", drafter)
    assert "the most frequent ones of the counts that ship with gguf-trim: " in split(tmp_path / "t.md")[1]


def test_rows_from_a_list_are_not_said_to_be_counted(tmp_path: Path, drafter: Path, counts: Path) -> None:
    (tmp_path / "ids.txt").write_text("\n".join(map(str, range(0, 600, 2))))
    run("trim", drafter, "-o", tmp_path / "t.gguf", "--keep", tmp_path / "ids.txt")
    _, body = split(tmp_path / "t.md")
    assert "those that ids.txt lists" in body and "## Counts" not in body
    said = run("card", tmp_path / "t.gguf", "--counts", counts, code=1).stderr
    assert said.startswith(f"Error: {counts}: did not rank the rows of {tmp_path / 't.gguf'}; give the counts that did")


def test_a_requantised_file_claims_no_equal_logits(tmp_path: Path, drafter: Path, counts: Path) -> None:
    run("trim", drafter, "-o", tmp_path / "t.gguf", "-k", 320, "--requant", "Q4_0", "--counts", counts)
    for more in (None, [], ["--source", drafter]):
        if more is not None:
            run("card", tmp_path / "t.gguf", "--counts", counts, *more)
        _, body = split(tmp_path / "t.md")
        assert "requantised after the cut" in body and "bit for bit" not in body and "gguf-trim verify" not in body
        assert "Q4_0 " in dict(tables(body)[1][1:])["types, by bytes"]


def test_acceptance_is_told_if_the_companion_has_it(tmp_path: Path, toys: dict[str, Path]) -> None:
    path = copy_trimmed(toys["spec-trimmed"], tmp_path / "t.gguf")
    assert "## What it drafts" not in model_card(path), "rates are not known of this speculator"
    trimmed, speculator = Trimmed.open(path), Speculator.of(Trimmed.open(path))
    assert speculator is not None
    attach(trimmed, replace(speculator, acceptance={"full": 0.71, "trim": 0.52, "spec": 0.6}))
    said = tables(ModelCard(model_card(path)).text)[-1]
    assert [row[1] for row in said] == ["accepted", "0.520", "0.600", "0.710"] and said[3][0] == "the whole head"


def test_a_card_that_was_edited_and_a_file_of_yours_stay(tmp_path: Path, drafter: Path, counts: Path) -> None:
    out, card, trim = tmp_path / "t.gguf", tmp_path / "t.md", ("trim", drafter, "--counts", counts)
    card.write_text("my notes\n")
    said = run(*trim, "-o", out, "-k", 320)
    assert card.read_text() == "my notes\n" and said.stdout == f"{out}\n"
    assert f"{card}: is not a card as this program wrote it, and is left as it is" in said.stderr
    assert "choose another name" in run("card", out, code=1).stderr and card.read_text() == "my notes\n"
    card.unlink()
    run("card", out)
    before = card.read_bytes()
    run(*trim, "-o", out, "-k", 336)
    assert card.read_bytes() != before and b"336 of 600" in card.read_bytes(), "one of ours is replaced"
    card.unlink(), card.mkdir()
    assert "and is left as it is" in run(*trim, "-o", out, "-k", 320).stderr and not list(card.iterdir())
    card.rmdir()
    run(*trim, "-o", out, "-k", 320)
    edited = card.read_bytes().replace(b"A drafter for", b"My drafter for")
    card.write_bytes(edited)
    run(*trim, "-o", out, "-k", 320)
    assert "not a card as this program wrote it" in run("card", out, code=1).stderr and card.read_bytes() == edited
    assert not list(tmp_path.glob(".*.part"))


def test_what_is_no_cut_or_of_another_source_is_one_sentence(tmp_path: Path, drafter: Path) -> None:
    write(lay_out(drafter, keep_first(400)), tmp_path / "t.gguf")
    other = write_model(tmp_path / "other.gguf", seed=5, head_type=Quant.Q8_0)
    assert "is not a trimmed drafter" in run("card", drafter, code=1).stderr
    for source in (other, drafter):
        done = CliRunner().invoke(main, ["card", str(tmp_path / "t.gguf"), "--source", str(source)])
        assert (done.exit_code == 0) == (source == drafter), done.output
        if source == other:
            assert done.stderr.startswith("Error: ") and "was not cut from" in done.stderr
            assert done.stderr.count("\n") == 1 and not (tmp_path / "t.md").exists()


def cases(folder: Path) -> dict[str, tuple[Path, Path | None, str]]:
    """By kind of drafter: the source, its target, and what its card says of stock llama.cpp."""
    target, gemma = write_model(folder / "target.gguf", seed=1, n_layer=4), write_gemma4(folder / "gemma.gguf")
    mtp = write_mtp(folder / "mtp.gguf", "qwen35", seed=1)
    return {
        "eagle3": (
            write_head(folder / "h.gguf"),
            target,
            "llama-server -m TARGET.gguf -md t.gguf --spec-type draft-eagle3",
        ),
        "dflash": (
            write_head(folder / "d.gguf", architecture="dflash"),
            target,
            "llama-server runs the file and needs no",
        ),
        "mtp": (mtp, mtp, "Stock llama.cpp does not load it"),
        "gemma4-assistant": (
            write_assistant(folder / "a.gguf", type_=Quant.Q8_0),
            gemma,
            "would draft nonsense with it",
        ),
    }


@pytest.mark.parametrize("kind", ["eagle3", "dflash", "mtp", "gemma4-assistant"])
def test_every_kind_of_drafter_says_how_it_is_run_and_proven(tmp_path: Path, kind: str) -> None:
    source, target, how = cases(tmp_path)[kind]
    write(lay_out(OWN_BLOCK if kind == "mtp" else source, keep_spread(304), target), tmp_path / "t.gguf")
    body = ModelCard(model_card(tmp_path / "t.gguf")).text
    assert how in body and ("gguf-run chat" in body) == (kind != "dflash")
    target_named = " --target TARGET.gguf" if kind != "mtp" else ""
    assert f"    gguf-trim verify t.gguf --source {source.name}{target_named}\n" in body
    run("card", tmp_path / "t.gguf", "--source", source, *([] if kind == "mtp" else ["--target", target]))
    assert "(bit for bit)" in split(tmp_path / "t.md")[1]


def test_the_repository_is_that_of_the_metadata_or_of_the_place(tmp_path: Path, drafter: Path) -> None:
    def base(path: Path) -> tuple[str | None, str | None]:
        write(lay_out(path, keep_first(300)), tmp_path / "t.gguf")
        metadata = ModelCard(model_card(tmp_path / "t.gguf", path)).data
        return metadata.get("base_model"), metadata.get("base_model_relation")

    plain = tmp_path / "plain.gguf"
    assert base(plain) == (None, None)
    cached = tmp_path / "models--you--toy-GGUF" / "snapshots" / "0" / "toy.gguf"
    cached.parent.mkdir(parents=True)
    cached.write_bytes(plain.read_bytes())
    assert base(cached) == ("you/toy-GGUF", "quantized")
    ancestor = labelled(plain, tmp_path / "b.gguf", **{"base_model.0.repo_url": "https://huggingface.co/me/base"})
    assert base(ancestor) == ("me/base", None), "what the source was made of, which is not a cut of it"
    for url in ("https://example.com/a/b", "https://huggingface.co/me", "huggingface.co/me"):
        assert base(labelled(plain, tmp_path / "c.gguf", url=url)) == (None, None)


TEXTS = st.text(max_size=60) | st.sampled_from(["a | b", "---\nlicense: mit", "<!-- -->", "`x`", "[x](y)", "no", "1.0"])


@settings(max_examples=50, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(name=TEXTS, licence=TEXTS, link=TEXTS)
def test_metadata_of_a_file_breaks_no_card(
    toys: dict[str, Path], tmp_path: Path, name: str, licence: str, link: str
) -> None:
    """A file may say anything of itself."""
    path = copy_trimmed(toys["tiny-trimmed"], tmp_path / "t.gguf")
    general = {"name": name, "license": licence, "license.link": link}
    labelled(companion_path(toys["tiny-trimmed"]), companion_path(path), **general)
    card = ModelCard(model_card(path))
    assert card.data.library_name == "gguf"
    for key, value in (("license", licence), ("license_link", link)):
        line = " ".join("".join(letter if letter.isprintable() else " " for letter in value).split())
        assert card.data.get(key) == (line or None)
    body = card.text
    source, cut = tables(body)
    assert all(len(row) == 2 for row in (*source, *cut)) and len(cut) == 6
    assert body.count("\n## ") == 4


def test_the_card_lies_beside_its_file() -> None:
    assert card_path(Path("a/x-Q4_0.gguf")) == Path("a/x-Q4_0.md") and card_path(Path("x.y.gguf")) == Path("x.y.md")
