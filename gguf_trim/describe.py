"""What a GGUF is to this project: its head, what a draft step reads, and whether it can be trimmed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from gguf_trim.format.companion import Trimmed
from gguf_trim.format.memory_bound import step_bytes
from gguf_trim.format.speculator import ACCEPTANCE, UP
from gguf_trim.format.state_fed import EAGLE3, MARKOV, SELECTOR, STATE_FED, Eagle3Head
from llamabase.gguf.reader import GGUFFile, Tensor
from llamabase.gguf.tensors import ASSISTANT, EMBEDDING, HEAD, HEAD_BIAS, head_tensor, is_block_alone
from llamabase.gguf.vocabulary import Vocabulary

from .cut import why_not


def describe(path: Path) -> dict[str, Any]:
    """Facts about one file, ready for JSON. Raises FileFormatError if it cannot be read."""
    file = GGUFFile(path)
    facts: dict[str, Any] = {
        "file": str(file.path),
        "architecture": file.architecture,
        "name": file.get("general.name"),
        "bytes": file.size,
        "tensors": len(file.tensors),
    }
    reason = why_not(file)
    if "gguf_trim.companion" in file.fields:
        vocabulary = Vocabulary(file)
        return facts | {
            "kind": "companion",
            "source": file.get("gguf_trim.source"),
            "fingerprint": vocabulary.fingerprint,
            "vocabulary": len(vocabulary),
            "speculator_rank": file.tensors[UP].shape[0] if UP in file.tensors else None,
            "acceptance": _acceptance(file) or None,
            "trimmable": False,
            "why": reason,
        }
    if {HEAD, EMBEDDING} & file.tensors.keys():
        facts |= _head(file)
    if "gguf_trim.d2t" in file.fields:
        return facts | {
            "kind": "trimmed",
            "k": file.get("gguf_trim.k"),
            "vocabulary": file.get("gguf_trim.vocab_size"),
            "coverage": file.get("gguf_trim.coverage"),
            "forced": file.get("gguf_trim.forced"),
            "source": file.get("gguf_trim.source"),
            "fingerprint": file.get("gguf_trim.vocab_fingerprint"),
            "companion": str(Trimmed.open(path).companion.path),
            "trimmable": False,
            "why": reason,
        }
    if reason is None and file.architecture in STATE_FED:
        head = Eagle3Head.of(file)
        facts |= {"target_layers": list(head.layers), "target_width": head.width, "vocabulary": head.n_vocab}
    facts |= {"kind": _kind(file), "trimmable": reason is None, "why": reason}
    has_block = file.integer(f"{file.architecture}.nextn_predict_layers", 0) and file.architecture != ASSISTANT
    if has_block and not is_block_alone(file):
        facts["mtp"] = why_not(file, mtp=True) or "its rows can be chosen: trim --mtp"
    if "tokenizer.ggml.tokens" in file.fields:
        vocabulary = Vocabulary(file)
        facts |= {"vocabulary": len(vocabulary), "fingerprint": vocabulary.fingerprint}
        facts["forced"] = len(vocabulary.forced)
    return facts


def _acceptance(file: GGUFFile) -> dict[str, float]:
    rates = {vocab: file.get(key) for vocab, key in ACCEPTANCE.items()}
    return {vocab: round(rate, 4) for vocab, rate in rates.items() if isinstance(rate, float)}


def _kind(file: GGUFFile) -> str:
    if is_block_alone(file):
        return "MTP block without its model"
    if file.architecture == ASSISTANT:
        return "Gemma 4 assistant"
    if file.architecture not in STATE_FED:
        return "model"
    if file.architecture == EAGLE3:
        return "EAGLE-3 head"
    return "DSpark drafter" if MARKOV in file.tensors else f"DFlash{'2' if SELECTOR in file.tensors else ''} drafter"


def _head(file: GGUFFile) -> dict[str, Any]:
    def table(tensor: Tensor) -> dict[str, Any]:
        return {"rows": tensor.n_rows, "n_embd": tensor.shape[0], "type": tensor.type.name}

    head, embedding, step = head_tensor(file), file.tensors.get(EMBEDDING), step_bytes(file)
    return {
        "tied": HEAD not in file.tensors,
        "head": {"tensor": head.name, **table(head)},
        "embedding": None if embedding is None else table(embedding),
        "head_bias": HEAD_BIAS in file.tensors,
        "bytes_per_draft_step": step,
        "head_bytes": head.n_bytes,
        "head_share": head.n_bytes / step,
    }
