"""A model card for a trimmed drafter, in the form of a README.md of the Hugging Face Hub.

X.md lies beside X.gguf, so that several trimmed files may share a folder; in a repository it is called README.md. Every
figure is read from the files that are given, and what they do not say is left out.
"""

from __future__ import annotations

import hashlib
import re
import shlex
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from corpus.count import name_of
from corpus.counts import Counts
from corpus.show import rows
from gguf_trim.format.companion import Trimmed, companion_path
from gguf_trim.format.memory_bound import draft_weights
from gguf_trim.format.mtp import MTP
from gguf_trim.format.speculator import Speculator
from gguf_trim.format.state_fed import DFLASH, EAGLE3
from gguf_trim.pairs.catalog import load_catalog
from gguf_trim.pairs.fetch import known_sha256
from llamabase import __version__
from llamabase.errors import FileFormatError, TrimError
from llamabase.files import Kind, write_whole
from llamabase.gguf.reader import GGUFFile
from llamabase.gguf.tensors import ASSISTANT, head_tensor

from .cut import source_identity
from .keep import keep_order
from .prove import Proof

TAGS = ["gguf", "speculative-decoding", "drafter", "gguf-trim"]
MOST = 1 << 20  # bytes of a card
_MARK = "\n<!-- gguf-trim {} -->\n"
# Where a GGUF names the repository of its own model; general.base_model.* names what that model was made of.
_OWN_REPO = ("source.huggingface.repository", "source.repo_url", "source.url", "repo_url", "url")
_REPO = re.compile(r"(?:(?:https?://)?(?:huggingface|hf)\.co/)?(?!(?:huggingface|hf)\.co/)([\w.-]+/[\w.-]+)/?")
_CACHED_REPO = re.compile(r"models--(.+?)--(.+)")  # a folder of huggingface_hub's cache

WITH_RUNNER = (
    "gguf-trim runs it, with any target of the same vocabulary. Keep the companion `{companion}`, which has the full "
    "tables, in the same folder:\n\n"
    "    gguf-run chat --target TARGET.gguf --draft {file}\n"
    "    gguf-run chat -hf TARGET/REPOSITORY -hfd THIS/REPOSITORY\n\n"
)
# By architecture: how a cut is run, and what stock llama.cpp does with it.
HOW = {
    EAGLE3: WITH_RUNNER.replace("any target of the same vocabulary", "the target that it was made for")
    + "Stock llama.cpp runs the file, too, and needs no companion:\n\n"
    "    llama-server -m TARGET.gguf -md {file} --spec-type draft-eagle3",
    DFLASH: "Stock llama.cpp's llama-server runs the file and needs no companion. gguf-trim cuts such drafters and "
    "does not run them.",
    MTP: WITH_RUNNER.replace("any target of the same vocabulary", "the target that it was cut from")
    + "The file is no model: it has the rows that the target's own MTP block drafts from. Stock llama.cpp does not "
    "load it.",
    ASSISTANT: WITH_RUNNER
    + "Stock llama.cpp loads the file, but would draft nonsense with it: some of its matrices are in the companion.",
}
OTHERWISE = (
    WITH_RUNNER
    + "Stock llama.cpp loads the file, but llama-server cannot draft with it: row i of the head is the token "
    "`gguf_trim.d2t[i]`, and llama.cpp does not map it back."
)


def card_path(trimmed: Path) -> Path:
    """X.gguf -> X.md, in the same folder."""
    return trimmed.with_name(f"{trimmed.name.removesuffix('.gguf')}.md")


def _marked(text: str) -> bytes:
    """A card with its mark, by which an edited one is told from one that is still as it was written."""
    digest = hashlib.sha256(text.encode()).hexdigest()[:16]
    return (text + _MARK.format(digest)).encode()


def _as_written(path: Path) -> bool:
    with open(path, "rb") as file:
        data = file.read(MOST)
    text = data.decode("utf-8", "replace")[: -len(_MARK.format("0" * 16))]
    return not data or data == _marked(text)


CARD = Kind("is not a card as this program wrote it", _as_written)


def write_card(path: Path, text: str) -> None:
    """Raises TrimError if a file that is not ours has the name, or a card that was edited."""
    with write_whole(path, CARD) as file:
        file.write(_marked(text))


def model_card(
    path: Path,
    source: Path | None = None,
    counts: Counts | None = None,
    keep_list: Path | None = None,
    proof: Proof | None = None,
) -> str:
    """The card of a trimmed drafter.

    `source`: what it was cut from. `counts`: those that ranked its rows, if they did; of others nothing is said.
    `keep_list`: the file that lists its rows, instead. `proof`: what `prove` showed. Raises TrimError if the file was
    cut from another source.
    """
    trimmed = Trimmed.open(path)
    original = None if source is None else require_source(trimmed, source)
    parts = [
        f"---\n{_metadata(trimmed, original)}\n---",
        f"# {_plain(path.stem)}",
        f"A drafter for speculative decoding with a smaller output head: {len(trimmed.d2t):,} of "
        f"{head_tensor(trimmed.companion).n_rows:,} rows were kept. The target checks every draft, so the text stays "
        "the target's.",
        "## Source",
        _table(_described(trimmed, original)),
        "## Cut",
        _table(_cut(trimmed, original)),
        *_chosen(trimmed, counts, keep_list),
        "## Proof",
        _proven(trimmed, proof),
        "## How to run it",
        HOW.get(trimmed.file.architecture, OTHERWISE).format(
            file=shlex.quote(path.name), companion=companion_path(path).name
        ),
        *_brought(trimmed),
        f"Written by gguf-trim {__version__}.",
    ]
    return "\n\n".join(parts) + "\n"


def require_source(trimmed: Trimmed, source: Path) -> GGUFFile:
    """The source, opened. Raises TrimError if the file was cut from another one."""
    original = GGUFFile(source)
    if source_identity(original) != trimmed.file.get("gguf_trim.source_id"):
        raise TrimError(
            f"{trimmed.file.path}: was not cut from {source}; give the drafter that it was cut from "
            f"({_named(trimmed)}) as --source"
        )
    return original


def chosen_by(trimmed: Trimmed, counts: Counts) -> bool:
    """Whether the kept rows are the first ones by these counts. Raises VocabularyMismatch for those of another one."""
    order = keep_order(trimmed.vocabulary, trimmed.row_of >= 0, counts)
    return np.array_equal(np.sort(order[: len(trimmed.d2t)]), trimmed.d2t)


def is_requantised(trimmed: Trimmed) -> bool:
    """Whether the file has been quantised since it was cut, which its companion has not."""
    type_, before = (file.get("general.file_type") for file in (trimmed.file, trimmed.companion))
    return type_ is not None and type_ != before


def _named(trimmed: Trimmed) -> str:
    return _line(trimmed.file.get("gguf_trim.source"))


def _line(value: object) -> str:
    """A text of a file's metadata, which may hold anything, as a line."""
    return " ".join("".join(letter if letter.isprintable() else " " for letter in str(value)[:200]).split())


def _plain(value: object) -> str:
    """The same in Markdown."""
    return re.sub(r"([\\`*\[\]<>|])", r"\\\1", _line(value))


def _general(trimmed: Trimmed, key: str) -> str | None:
    """A text that the source says of itself; the companion has all of them."""
    value = trimmed.companion.get(f"general.{key}")
    return _line(value) or None if isinstance(value, str) else None


def _metadata(trimmed: Trimmed, original: GGUFFile | None) -> str:
    """What the Hub reads, in YAML."""
    from huggingface_hub import ModelCardData

    languages = trimmed.companion.get("general.languages")
    return ModelCardData(
        **_base(trimmed, original),
        license=_general(trimmed, "license"),
        license_name=_general(trimmed, "license.name"),
        license_link=_general(trimmed, "license.link"),
        language=[_line(language) for language in languages] if isinstance(languages, list) else None,
        library_name="gguf",
        pipeline_tag="text-generation",
        tags=TAGS,
    ).to_yaml()


def _base(trimmed: Trimmed, original: GGUFFile | None) -> dict[str, Any]:
    """base_model: the repository of the source, as its metadata, its place or the catalog names it."""
    named = [match[1] for key in _OWN_REPO if (match := _REPO.fullmatch(_general(trimmed, key) or ""))]
    if original is not None:
        folders = (match for part in original.path.parts if (match := _CACHED_REPO.fullmatch(part)))
        named += [f"{match[1]}/{match[2]}" for match in folders]
        sha256 = known_sha256(original.path)
        sources = [s for model in load_catalog().models.values() if model.sha256 == sha256 for s in model.sources]
        named += [source["hub"]["repo"] for source in sources if "hub" in source]
    if named:
        return {"base_model": named[0], "base_model_relation": "quantized"}
    match = _REPO.fullmatch(_general(trimmed, "base_model.0.repo_url") or "")
    return {} if match is None else {"base_model": match[1]}


def _described(trimmed: Trimmed, original: GGUFFile | None) -> Iterator[tuple[str, str]]:
    if (name := _general(trimmed, "name")) is not None:
        yield "name", _plain(name)
    yield "file", _plain(_named(trimmed))
    if original is not None:
        yield "size", f"{original.size:,} bytes"
        yield "SHA-256", f"`{known_sha256(original.path)}`"
    yield "architecture", _plain(trimmed.companion.architecture)
    licence = [text for key in ("license", "license.name", "license.link") if (text := _general(trimmed, key))]
    yield "licence", _plain(", ".join(licence)) or "not named in the file: look it up before you share the cut"
    yield "vocabulary", f"{len(trimmed.vocabulary):,} tokens, fingerprint `{trimmed.vocabulary.fingerprint}`"


def _cut(trimmed: Trimmed, original: GGUFFile | None) -> Iterator[tuple[str, str]]:
    file, whole, k = trimmed.file, head_tensor(trimmed.companion).n_rows, len(trimmed.d2t)
    yield "rows kept", f"{k:,} of {whole:,} ({k / whole:.1%})"
    if (forced := file.integer("gguf_trim.forced")) is not None:
        yield "kept whatever was counted", f"{forced:,} (ends, control tokens, single bytes)"
    coverage = file.get("gguf_trim.coverage")
    if isinstance(coverage, float):
        yield "share of the counts", f"{coverage:.2%}"
    yield "files", f"{file.size / 1e6:.1f} MB, and the companion {trimmed.companion.size / 1e6:.1f} MB"
    sizes: Counter[str] = Counter()
    for tensor in file.tensors.values():
        sizes[tensor.type.name] += tensor.n_bytes
    yield "types, by bytes", ", ".join(f"{name} {size / sizes.total():.1%}" for name, size in sizes.most_common())
    if file.architecture != MTP or original is not None:
        weights = draft_weights(file.path, file.path if original is None else original.path)
        after, before = weights.bytes_at(k), weights.bytes_at(whole)
        yield (
            "read per draft step",
            f"{after / 1e6:.1f} MB; with the whole head in the same type {before / 1e6:.1f} MB "
            f"({after / before:.2f} x)",
        )


def _chosen(trimmed: Trimmed, counts: Counts | None, keep_list: Path | None) -> Iterator[str]:
    """By what the rows were chosen, and the share of each language and source that they cover."""
    if keep_list is not None:
        yield f"The rows are those that {_plain(keep_list.name)} lists, filled up by counts if need be."
    elif counts is not None and chosen_by(trimmed, counts):
        yield "## Counts"
        # Parts are named without their folders; what else the counts were made of may be paths of somebody's machine.
        sources = (name_of(part) if Path(part).is_absolute() else part for part in counts.made_from.split(", "))
        made_from = "" if counts.parts else f", made from {', '.join(sources)}"
        yield (
            f"The rows are the most frequent ones of {_plain(counts.name)}: {counts.total:,} tokens, "
            f"{len(counts.ids):,} different ones{_plain(made_from)}."
        )
        lines = [
            (_plain(name), f"{table.total:,}", f"{table.coverage(trimmed.d2t):.2%}")
            for name, table in rows(counts)
            if table.total
        ]
        yield _table([("counted", "tokens", "covered"), ("---", "--:", "--:"), *lines], head=False)


def _proven(trimmed: Trimmed, proof: Proof | None) -> str:
    if is_requantised(trimmed):
        return (
            "The file was requantised after the cut, so its logits are close to the source's and not equal to them. "
            "The cut itself copied rows as bytes."
        )
    if proof is None or proof.max_logit_difference is None:
        name, source = (shlex.quote(text) for text in (trimmed.file.path.name, _named(trimmed)))
        target = " --target TARGET.gguf" if trimmed.reads_states and trimmed.file.architecture != MTP else ""
        return (
            "The kept rows were copied as bytes. This proves it, on any machine:\n\n"
            f"    gguf-trim verify {name} --source {source}{target}"
        )
    exact = " (bit for bit)" if proof.max_logit_difference == 0 else ""
    text = (
        f"`gguf-trim verify` read the file beside its source: {proof.kept:,} rows are equal as bytes, all other "
        f"tensors are untouched, and the logits of the kept rows differ by {proof.max_logit_difference:g} at "
        f"most{exact} over {proof.positions} positions."
    )
    if proof.gpu is not None:
        text += (
            f" On {_plain(', '.join(proof.gpu.names))} they differ by {proof.gpu.max_logit_difference:g} at most; the "
            f"source's own logits there differ by up to {proof.gpu.allowed:g} from those on the CPU."
        )
    return text


def _brought(trimmed: Trimmed) -> Iterator[str]:
    """How often the drafter was right, if the companion says so."""
    try:
        speculator = Speculator.of(trimmed)
    except FileFormatError:  # of another head: it says nothing about this one
        return
    if speculator is None or not speculator.acceptance:
        return
    words = {
        "full": "the whole head",
        "trim": "the kept rows",
        "context": "those and the tokens of the text",
        "spec": "those and the rows that the speculator picks",
    }
    yield "## What it drafts"
    yield (
        f"The companion has a speculator of rank {speculator.rank}. On answers that it was not fitted to, the first "
        "draft was accepted this often:"
    )
    lines = [(words[vocab], f"{rate:.3f}") for vocab, rate in speculator.acceptance.items()]
    yield _table([("drafts from", "accepted"), ("---", "--:"), *lines], head=False)


def _table(lines: Iterator[tuple[str, ...]] | list[tuple[str, ...]], head: bool = True) -> str:
    """A Markdown table; without a head of its own it gets an empty one."""
    found = [*([("", ""), ("---", "---")] if head else []), *lines]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in found)
