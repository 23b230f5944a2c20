"""The cut: plan which bytes of a drafter go where, then write the trimmed file and its companion.

llama.cpp builds embedding and head with the same number of rows, so both are cut in the trimmed file, and the full
tables move to the companion X.vocab.gguf beside X.gguf; the runner feeds input embeddings from there. A row of a ggml
tensor is a whole number of quantisation blocks: rows move as bytes and nothing is dequantised, so the kept logits are
the source's, bit for bit (VocabTrim, arXiv 2506.22694, section 3; `verify` proves it on any file).
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from gguf.constants import GGMLQuantizationType

from gguf_trim.format.assistant import POST, PRE, Assistant
from gguf_trim.format.companion import COMPANION, FORMAT_VERSION, TRIMMED, companion_path
from gguf_trim.format.memory_bound import unread
from gguf_trim.format.mtp import MTP, DrafterSource, MtpBlock, OwnBlock
from gguf_trim.format.state_fed import D2T, MARKOV, STATE_FED, Eagle3Head, row_by_id
from llamabase.errors import FileFormatError, TrimError
from llamabase.files import require_room, write_whole
from llamabase.gguf.reader import GGUFFile, Tensor
from llamabase.gguf.tensors import ASSISTANT, EMBEDDING, HEAD, HEAD_BIAS, has_mrope, head_tensor, is_block_alone
from llamabase.gguf.vocabulary import Vocabulary
from llamabase.gguf.writer import Output, Piece, field

from .keep import MULTIPLE, ChooseRows, Keep

# Architectures whose graphs scale token inputs by sqrt(n_embd) and leave vectors as they are.
SCALED_TOKEN_INPUTS = {"gemma3"}
# Architectures whose graphs use token ids beyond the embedding table, or take embeddings for those of an image.
NEEDS_TOKEN_IDS = {
    "cogvlm": "it reads embeddings with the weights for images",
    "deepseek4": "it chooses experts by token id",
    "gemma3n": "it looks up per-layer embeddings by token id",
    "gemma4": "it looks up per-layer embeddings by token id",
    "graniteswitch": "it chooses adapters by token id",
    "t5": "it is an encoder-decoder",
    "t5encoder": "it is an encoder",
}
ALONE = (
    "it holds an MTP block without its model: draft with it whole (--draft), or choose rows of the block in a file of "
    "the target (trim --mtp)"
)
EMBEDDINGS_NEED_MROPE = {"glm4", "glm4moe"}


def why_not(file: GGUFFile, mtp: bool = False) -> str | None:
    """The reason why this file's head, or the one of its MTP block, cannot be cut; None if it can."""
    if "gguf_trim.k" in file.fields:
        return "it is already trimmed; trim the original drafter"
    if "gguf_trim.companion" in file.fields:
        return "it is the companion of a trimmed drafter; trim the original drafter"
    if file.integer("split.count", 1) > 1:
        return "it is one part of a split GGUF; join the parts with `llama-gguf-split --merge` first"
    alone = is_block_alone(file)
    if mtp or alone or file.architecture in (*STATE_FED, ASSISTANT):
        try:
            (MtpBlock if mtp or alone else Assistant if file.architecture == ASSISTANT else Eagle3Head).of(file)
        except FileFormatError as error:
            return str(error).removeprefix(f"{file.path}: ")
        return ALONE if alone else None
    if EMBEDDING not in file.tensors:
        return f"it has no {EMBEDDING}: not a language model"
    refused = f"architecture {file.architecture} cannot be trimmed: "
    if (reason := NEEDS_TOKEN_IDS.get(file.architecture)) is not None:
        return refused + reason
    if file.architecture in EMBEDDINGS_NEED_MROPE and not has_mrope(file):
        return f"{refused}llama.cpp ends the process if it is given embeddings without M-RoPE"
    n_rows, head = file.tensors[EMBEDDING].n_rows, file.tensors.get(HEAD)
    if head is not None and (len(head.shape) != 2 or head.n_rows != n_rows):
        return f"its head has {head.n_rows} rows and its embedding {n_rows}: llama.cpp would not load it either"
    for tensor in file.tensors.values():
        if tensor.name not in (EMBEDDING, HEAD, HEAD_BIAS) and _per_token(tensor, n_rows):
            return f"tensor {tensor.name} has one row per token, and no way to cut it is known"
    return None


def _per_token(tensor: Tensor, n_rows: int) -> bool:
    """Whether a tensor is a table over the vocabulary, by its name or by a shape that nothing else has."""
    named = any(part in tensor.name for part in ("per_layer_token_embd", "embed_tokens", "shared_head_head"))
    return named or (tensor.name.startswith("output.") and n_rows in tensor.shape)


@dataclass(frozen=True)
class Cut:
    """A planned cut of `source` to the rows of `keep`: both outputs carry the source's `identity`."""

    source: GGUFFile
    identity: str
    keep: Keep
    trimmed: Output
    companion: Output

    @property
    def n_bytes(self) -> int:
        return self.trimmed.n_bytes + self.companion.n_bytes

    @property
    def tied(self) -> bool:
        return HEAD not in self.source.tensors

    @property
    def step_bytes(self) -> int:
        """Weight bytes that one draft step of the trimmed file reads."""
        skipped = unread(self.source)
        pieces = [piece for piece in self.trimmed.pieces if piece.tensor.name not in skipped]
        # An assistant's projections are read, too.
        pieces += [piece for piece in self.companion.pieces if piece.tensor.name in (PRE, POST)]
        return sum(piece.n_bytes for piece in pieces)


def lay_out(drafter: DrafterSource, choose: ChooseRows, target: Path | None = None, multiple: int = MULTIPLE) -> Cut:
    """What a cut of a drafter would write: pure, nothing is touched.

    `choose` is asked once the file is read; the number of rows is rounded up to a `multiple`. A
    state-fed head may need its `target`, for tokens or rows that it lacks itself, and a block is its target's. Raises
    FileFormatError naming the reason if the file cannot be cut.
    """
    source = target if isinstance(drafter, OwnBlock) else drafter
    if source is None:
        raise ValueError("rows of an MTP block are cut from its target")
    file = GGUFFile(source)
    if (reason := why_not(file, isinstance(drafter, OwnBlock))) is not None:
        raise FileFormatError(f"{file.path}: {reason}")
    if isinstance(drafter, OwnBlock):
        return _lay_out_mtp(MtpBlock.of(file), choose, multiple)
    if file.architecture in STATE_FED:
        return _lay_out_state_fed(Eagle3Head.of(file), choose, target, multiple)
    assistant = Assistant.of(file) if file.architecture == ASSISTANT else None
    if assistant is not None and target is not None:
        target_file = GGUFFile(target)
        assistant.require_target(target_file, Vocabulary(target_file))
    vocabulary, arch, n_rows = Vocabulary(file), file.architecture, file.tensors[EMBEDDING].n_rows
    keep = choose(vocabulary, np.ones(n_rows, bool), multiple)
    cut_names = {EMBEDDING, HEAD, HEAD_BIAS} & file.tensors.keys()
    fields = [
        *(file.raw(key) for key in file.fields if not key.startswith("tokenizer.") and key != f"{arch}.vocab_size"),
        field(f"{arch}.vocab_size", keep.k),
        field("tokenizer.ggml.model", "none"),
    ]
    copying = {} if assistant is None else assistant.copying
    kept = {name: tensor for name, tensor in file.tensors.items() if name not in copying}
    pieces = [Piece(tensor, keep.ids if name in cut_names else None) for name, tensor in kept.items()]
    pieces += [_data_piece(name, values, GGMLQuantizationType.F32) for name, values in copying.items()]
    whole = [Piece(file.tensors[name]) for name in sorted(cut_names | copying.keys())]
    return _cut(file, keep, vocabulary, n_rows, fields, pieces, whole, scale=_embedding_scale(file))


def _embedding_scale(file: GGUFFile) -> float:
    """What the runner multiplies embeddings by, as llama.cpp does with those of token ids only."""
    arch = file.architecture
    if arch in SCALED_TOKEN_INPUTS or arch == ASSISTANT:
        width = Assistant.of(file).width if arch == ASSISTANT else file.tensors[EMBEDDING].shape[0]
        return float(np.float32(math.sqrt(width)))
    layers = file.integers(f"{arch}.deepstack_mapping")  # of Granite: -1 for a layer that takes no features of an image
    scale = file.get(f"{arch}.embedding_scale")
    deepstack = layers is not None and bool((layers >= 0).any())
    return scale if deepstack and isinstance(scale, float) and scale else 1.0


def _lay_out_state_fed(head: Eagle3Head, choose: ChooseRows, target: Path | None, multiple: int) -> Cut:
    """The cut of an EAGLE-3 head: rows of the head and entries of its d2t, nothing else (llama.cpp reads both).

    Of a DSpark drafter also the rows of MARKOV, which belong to those of the head.

    The trimmed file needs no companion to be run; the companion has the whole head, for rows beyond the kept ones.
    """
    file = head.file
    target_file = None if target is None else GGUFFile(target)
    source = target_file if head.own is None else file
    named = file if "tokenizer.ggml.tokens" in file.fields else target_file
    if source is None or named is None:
        lacks = "head of its own" if source is None else "tokenizer"
        raise FileFormatError(f"{file.path}: has no {lacks}; give the model it was made for as --target")
    vocabulary = Vocabulary(named)
    if target_file is not None:
        head.require_target(target_file, Vocabulary(target_file))
    cut_head = replace(head_tensor(source), name=HEAD)
    order = np.arange(cut_head.n_rows) if head.ids is None else head.ids
    row_of = row_by_id(order, head.n_vocab)
    keep = choose(vocabulary, row_of >= 0, multiple)
    size_key = f"{file.architecture}.vocab_size"
    fields = [*(file.raw(key) for key in file.fields if key != size_key), field(size_key, head.n_vocab)]
    rows = np.sort(row_of[keep.ids])
    others = [tensor for name, tensor in file.tensors.items() if name not in (HEAD, D2T)]
    pieces = [Piece(tensor, rows if tensor.name == MARKOV else None) for tensor in others]
    pieces += [Piece(cut_head, rows, source.path), _d2t_piece(order[rows])]
    whole = [Piece(cut_head, file=source.path)] + ([] if head.ids is None else [_d2t_piece(head.ids)])
    return _cut(file, keep, vocabulary, head.n_vocab, fields, pieces, whole, named)


def _d2t_piece(ids: np.ndarray) -> Piece:
    return _data_piece(D2T, ids.astype("<i8"), GGMLQuantizationType.I64)


def _data_piece(name: str, values: np.ndarray, type_: GGMLQuantizationType) -> Piece:
    data = values.tobytes()
    return Piece(Tensor(name, values.shape[::-1], type_, 0, len(data)), data=data)


def _lay_out_mtp(block: MtpBlock, choose: ChooseRows, multiple: int) -> Cut:
    """Rows for an MTP block, in a file that is no model; the companion has the whole head, for rows beyond them."""
    file = block.file
    vocabulary = Vocabulary(file)
    keep = choose(vocabulary, np.ones(block.n_vocab, bool), multiple)
    named = [file.raw(key) for key in file.fields if key in ("general.name", "general.license")]
    fields = [field("general.architecture", MTP), *named]
    head = replace(block.head, name=HEAD)
    return _cut(file, keep, vocabulary, block.n_vocab, fields, [Piece(head, keep.ids)], [Piece(head)])


def _cut(
    file: GGUFFile,
    keep: Keep,
    vocabulary: Vocabulary,
    n_vocab: int,
    fields: list[bytes],
    pieces: list[Piece],
    whole: list[Piece],
    named: GGUFFile | None = None,
    scale: float = 1.0,
) -> Cut:
    """Both outputs: the trimmed file of `fields` and `pieces`, the companion of `whole` tensors.

    The companion gets the tokenizer of `named` (None: of the file itself); `scale` is that of embeddings.
    """
    identity = source_identity(file)
    common = [
        field("gguf_trim.version", FORMAT_VERSION),
        field("gguf_trim.source", file.path.name),
        field("gguf_trim.source_id", identity),
        field("gguf_trim.vocab_size", n_vocab),
        field("gguf_trim.vocab_fingerprint", vocabulary.fingerprint),
        field("gguf_trim.embedding_scale", scale),
    ]
    kept = [field("gguf_trim.k", keep.k), field("gguf_trim.forced", keep.n_forced), field("gguf_trim.d2t", keep.ids)]
    if keep.coverage is not None:
        kept.append(field("gguf_trim.coverage", float(keep.coverage)))
    named = named or file
    words = [
        *(file.raw(key) for key in file.fields if key.startswith("general.")),
        *(named.raw(key) for key in named.fields if key.startswith("tokenizer.")),
    ]
    trimmed = Output([*fields, *common, *kept], pieces, file.alignment)
    companion = Output([*words, *common, field("gguf_trim.companion", True)], whole, file.alignment)
    return Cut(file, identity, keep, trimmed, companion)


def source_identity(file: GGUFFile) -> str:
    """SHA-256 over the header of a drafter and the beginning of every tensor: tells checkpoints of one model apart.

    A whole hash would take seconds; what differs between two files of one name differs everywhere.
    """
    digest = hashlib.sha256(file.header)
    with open(file.path, "rb") as handle:
        for tensor in file.tensors.values():
            handle.seek(tensor.offset)
            digest.update(handle.read(min(4096, tensor.n_bytes)))
    return digest.hexdigest()


def require_outputs(source: Path, out: Path) -> None:
    """Raise TrimError if a cut of `source` may not be written to `out` and its companion."""
    named = out.name.removesuffix(".gguf")
    if named == out.name or not named or named.endswith(".vocab"):
        raise TrimError(f"{out}: the output's name must end in .gguf (and not in .vocab.gguf, its companion's ending)")
    for path, kind in ((out, TRIMMED), (companion_path(out), COMPANION)):
        if path.exists() and source.exists() and path.samefile(source):
            raise TrimError(f"{path}: is the drafter itself; choose another output name")
        kind.require(path)


def move(trimmed: Path, to: Path) -> None:
    """Rename a trimmed drafter and its companion: first the companion, before the file that needs it.

    Raises TrimError if a file of another kind has one of the names.
    """
    TRIMMED.require_own(to)
    COMPANION.require_own(companion_path(to))
    companion_path(trimmed).replace(companion_path(to))
    trimmed.replace(to)


def remove(trimmed: Path) -> None:
    """Delete a trimmed drafter and its companion."""
    trimmed.unlink()
    companion_path(trimmed).unlink()


def write(cut: Cut, out: Path, advance: Callable[[int], object] = lambda _: None) -> None:
    """Write `out` and its companion; both appear whole or not at all, the companion first.

    Raises TrimError as `require_outputs` does, and if the disk is full. Holds CHUNK bytes at a time.
    """
    require_outputs(cut.source.path, out)
    require_room(out, cut.n_bytes)
    try:
        # Left in reverse order: the companion takes its name before the file that needs it does.
        with (
            open(cut.source.path, "rb") as source,
            write_whole(out, TRIMMED) as trimmed_file,
            write_whole(companion_path(out), COMPANION) as companion_file,
        ):
            cut.trimmed.write(source, trimmed_file, advance)
            cut.companion.write(source, companion_file, advance)
            trimmed_file.flush()  # what may fail fails before the companion takes its name
    except FileNotFoundError as error:
        raise TrimError(f"{cut.source.path}: was deleted after it was read") from error
