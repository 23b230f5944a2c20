"""What a GGUF is to this project: its head, what a draft step reads, and whether it can be trimmed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from gguf_trim.format.companion import Trimmed
from gguf_trim.format.speculator import UP
from gguf_trim.format.state_fed import STATE_FED, StateFedHead
from gguf_trim.format.weights import step_bytes
from llamabase.gguf.reader import GGUFFile, Tensor
from llamabase.gguf.tensors import EMBEDDING, HEAD, HEAD_BIAS, head_tensor
from llamabase.gguf.vocabulary import Vocabulary

from .cut import why_not


def _table(tensor: Tensor) -> dict[str, Any]:
    return {"rows": tensor.n_rows, "n_embd": tensor.shape[0], "type": tensor.type.name}


def describe(path: Path) -> dict[str, Any]:
    """Facts about one file, ready for JSON. Raises FileFormatError where it cannot be read."""
    file = GGUFFile(path)
    facts: dict[str, Any] = {
        "file": str(file.path),
        "architecture": file.architecture,
        "name": file.get("general.name"),
        "bytes": file.size,
        "tensors": len(file.tensors),
    }
    if "gguf_trim.companion" in file.fields:
        vocabulary = Vocabulary(file)
        return facts | {
            "kind": "companion",
            "source": file.get("gguf_trim.source"),
            "fingerprint": vocabulary.fingerprint,
            "vocabulary": len(vocabulary),
            "speculator_rank": file.tensors[UP].shape[0] if UP in file.tensors else None,
            "trimmable": False,
            "why": why_not(file),
        }
    if {HEAD, EMBEDDING} & file.tensors.keys():
        head, embedding = head_tensor(file), file.tensors.get(EMBEDDING)
        step = step_bytes(file)
        facts |= {
            "tied": HEAD not in file.tensors,
            "head": {"tensor": head.name, **_table(head)},
            "embedding": None if embedding is None else _table(embedding),
            "head_bias": HEAD_BIAS in file.tensors,
            "bytes_per_draft_step": step,
            "head_bytes": head.n_bytes,
            "head_share": head.n_bytes / step,
        }
    if "gguf_trim.d2t" in file.fields:
        trimmed = Trimmed.open(path)
        coverage = file.get("gguf_trim.coverage")
        return facts | {
            "kind": "trimmed",
            "k": file.get("gguf_trim.k"),
            "vocabulary": file.get("gguf_trim.vocab_size"),
            "coverage": coverage,
            "forced": file.get("gguf_trim.forced"),
            "source": file.get("gguf_trim.source"),
            "fingerprint": file.get("gguf_trim.vocab_fingerprint"),
            "companion": str(trimmed.companion.path),
            "trimmable": False,
            "why": why_not(file),
        }
    reason = why_not(file)
    if reason is None and file.architecture in STATE_FED:
        state_fed = StateFedHead.of(file)
        facts |= {
            "target_layers": list(state_fed.layers),
            "target_width": state_fed.width,
            "vocabulary": state_fed.n_vocab,
        }
    facts |= {"kind": "model", "trimmable": reason is None, "why": reason}
    if file.integer(f"{file.architecture}.nextn_predict_layers", 0):
        facts |= {"mtp": why_not(file, mtp=True) or "its rows can be chosen: trim --mtp"}
    if "tokenizer.ggml.tokens" in file.fields:
        vocabulary = Vocabulary(file)
        facts |= {"vocabulary": len(vocabulary), "fingerprint": vocabulary.fingerprint}
        facts["forced"] = len(vocabulary.forced)
    return facts
