"""MTP blocks (DeepSeek-V3, arXiv 2412.19437, section 2.2): a drafter inside its target's own file, with its head.

Nothing of the block can be cut away, since the head is its target's. But llama.cpp computes a head only if logits are
asked for, and returns the very state that the head is multiplied by. So the rows that a block drafts from are kept in a
file of their own, and multiplied here.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from llamabase.errors import FileFormatError, VocabularyMismatch
from llamabase.gguf.reader import GGUFFile, Tensor
from llamabase.gguf.tensors import EMBEDDING, HEAD, has_mrope, head_tensor
from llamabase.gguf.vocabulary import Vocabulary, require_same
from llamabase.llama.ggml import Backend, Product, Table

MTP = "mtp"  # how a user names the target's own block as the drafter; the architecture of files that hold rows for it
# Architectures whose graphs, in the llama.cpp of `states.KNOWN`, return the normed state of a single block. Others
# return the state before the norm, or use another block for every draft.
POST_NORM = frozenset(
    {"qwen35", "qwen35moe", "glm4moe", "glm-dsa", "deepseek2", "deepseek32", "hy_v3", "cohere2moe"}
)  # fmt: skip


class OwnBlock:
    """A drafter that has no file: the MTP block inside the target's own."""

    name = stem = MTP

    def __str__(self) -> str:
        return MTP


OWN_BLOCK = OwnBlock()
DrafterSource = Path | OwnBlock


def drafter_source(named: str | Path) -> DrafterSource:
    """The drafter that a user names: a file, or `mtp`."""
    return OWN_BLOCK if str(named) == MTP else Path(named)


@dataclass(frozen=True)
class MtpBlock:
    """An MTP block: a StateFedHead. `file`: the target's own, or one beside it that holds the block alone.

    `head`: the tensor that makes its logits, its own or the target's.
    """

    file: GGUFFile
    head: Tensor
    layer: int
    n_embd: int
    n_vocab: int
    scale: float  # of the logits

    ids = None  # row i of the head is token i

    @classmethod
    def of(cls, file: GGUFFile) -> MtpBlock:
        """Raises FileFormatError if the file has no block, or one that cannot draft here."""
        arch, tensors = file.architecture, file.tensors
        n_blocks = file.integer(f"{arch}.nextn_predict_layers", 0)
        layer = file.integer(f"{arch}.block_count", 0) - n_blocks
        if not n_blocks or f"blk.{layer}.nextn.eh_proj.weight" not in tensors:
            raise FileFormatError(
                f"{file.path}: has no MTP block; give the block's own file (mtp-*.gguf) as the drafter, convert "
                "the model again with its block, or use another drafter"
            )
        if arch not in POST_NORM or n_blocks > 1:
            why = f"it has {n_blocks}" if arch in POST_NORM else f"llama.cpp returns no normed state for {arch}"
            raise FileFormatError(
                f"{file.path}: its MTP block cannot draft here: {why}; that is known to work for one block of "
                f"{', '.join(sorted(POST_NORM))}"
            )
        if arch == "glm4moe" and has_mrope(file):
            raise FileFormatError(
                f"{file.path}: its MTP block cannot draft: llama.cpp ends the process over the M-RoPE of such a block"
            )
        if EMBEDDING not in tensors:
            raise FileFormatError(f"{file.path}: has no {EMBEDDING}: not a language model")
        head = tensors.get(f"blk.{layer}.nextn.shared_head_head.weight") or head_tensor(file)
        n_embd = file.integer(f"{arch}.embedding_length", 0)
        if len(head.shape) != 2 or head.shape[0] != n_embd:
            raise FileFormatError(f"{file.path}: rows of its {head.name} are not {n_embd} wide; convert it again")
        if head.n_rows != file.tensors[EMBEDDING].n_rows:
            raise FileFormatError(
                f"{file.path}: its MTP block has a head of {head.n_rows} rows for {file.tensors[EMBEDDING].n_rows} "
                "tokens, which llama.cpp does not load; choose the rows of these tokens from the target's own block: "
                f"`python -m gguf_trim trim TARGET --mtp --keep {file.path} -o rows.gguf`"
            )
        scale = file.get(f"{arch}.logit_scale", 1.0)
        return cls(file, head, layer, n_embd, head.n_rows, float(scale) if isinstance(scale, float) and scale else 1.0)

    def hidden(self, states: np.ndarray) -> np.ndarray:
        """What the head is multiplied by, for states (float32, ... x n_embd) that the block made."""
        return states if self.scale == 1 else states * np.float32(self.scale)

    @property
    def tensors(self) -> list[Tensor]:
        """The tensors that a step reads beside the head."""
        prefix = f"blk.{self.layer}."
        tables = (f"{prefix}nextn.embed_tokens.weight", self.head.name)
        return [t for name, t in self.file.tensors.items() if name.startswith(prefix) and name not in tables]

    def require_target(self, target: GGUFFile, vocabulary: Vocabulary) -> None:
        """Raise FileFormatError or VocabularyMismatch, naming both files, if it cannot read this target's states."""
        both, arch = f"{self.file.path} does not fit {target.path}", self.file.architecture
        theirs = (target.architecture, target.integer(f"{target.architecture}.embedding_length", 0))
        if theirs != (arch, self.n_embd):
            raise FileFormatError(
                f"{both}: it is the MTP block of a {arch} model with states of {self.n_embd} numbers, and this target "
                f"is a {theirs[0]} model with {theirs[1]}; use the block of this very target"
            )
        own = Vocabulary(self.file)
        if len(own) != len(vocabulary):
            raise VocabularyMismatch(f"{both}: it has {len(own)} tokens, and this target has {len(vocabulary)}")
        require_same(vocabulary, own)

    def require_rows(self, rows: GGUFFile, vocabulary: Vocabulary) -> None:
        """Raise FileFormatError or VocabularyMismatch, naming both files, if `rows` were not cut for this block."""
        both = f"{rows.path} was not cut for {self.file.path}"
        head = rows.tensors.get(HEAD)
        if head is None or head.shape != (self.n_embd, rows.integer("gguf_trim.k", 0)):
            raise FileFormatError(f"{both}: its rows are not {self.n_embd} wide; cut it again with --mtp")
        known = (rows.get("gguf_trim.vocab_fingerprint"), rows.integer("gguf_trim.vocab_size", 0))
        if known != (vocabulary.fingerprint, self.n_vocab):
            raise VocabularyMismatch(f"{both}: it is of another vocabulary; cut it again with --mtp")


def kept_rows(rows: GGUFFile, n_threads: int | None = None) -> Product:
    """The product that makes the logits of a file's rows (float32, k) from a hidden state, as llama.cpp would."""
    return Product(Backend(n_threads), Table.of(rows, head_tensor(rows)))
