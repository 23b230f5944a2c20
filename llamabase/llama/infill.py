"""The prompt of a gap in a text, for vocabularies that have tokens to fill one in with, as llama-server writes it.

Source: llama-server's /infill, and the repository pattern of Qwen2.5-Coder (arXiv 2409.12186).
"""

from __future__ import annotations

from collections.abc import Sequence

import llama_cpp

from llamabase.errors import SettingError

from .model import Model

AFTER = 4  # the text after the gap gets one token in so many where both sides are too long


def infill_prompt(
    model: Model,
    before: str,
    after: str,
    begun: str = "",
    files: Sequence[tuple[str, str]] | None = None,
    room: int | None = None,
) -> list[int]:
    """Token ids, at most `room` of them, after which the model fills the gap between two texts.

    `begun`: what the answer begins with. `files`: (name, text) of what else is known, the nearest last; an empty list
    still names a repository, None does not. Where it is too much, files go first, from the front, then what is far from
    the gap. Raises SettingError for a vocabulary that has no tokens to fill in with.
    """

    def token(name: str) -> int | None:
        found = getattr(llama_cpp, f"llama_vocab_fim_{name}")(model.vocab)
        return int(found) if found >= 0 else None

    def ids(text: str) -> list[int]:
        return model.tokenize(text, special=False, add_bos=False)

    prefix, suffix, middle = token("pre"), token("suf"), token("mid")
    if prefix is None or suffix is None or middle is None:
        missing = [
            name for name, found in (("prefix", prefix), ("suffix", suffix), ("middle", middle)) if found is None
        ]
        raise SettingError(
            f"this vocabulary has no token for the {' and the '.join(missing)} of a gap, so nothing can be filled in; "
            "use a model for code that has them, such as Qwen2.5-Coder"
        )
    known: list[int] = []
    if files is not None:
        repository, file = token("rep"), token("sep")
        known += [] if repository is None else [repository, *ids("myproject\n")]
        for name, text in files:
            known += ids("\n\n--- snippet ---\n\n") if file is None else [file, *ids(f"{name}\n")]
            known += ids(text)
        known += [] if file is None else [file, *ids("filename\n")]
    bos = model.tokenize("")
    start, end, begun_ids = ids(before), ids(after), model.tokenize(begun, special=True, add_bos=False)
    if room is not None:
        left = max(room - len(bos) - len(begun_ids) - 3, 0)
        n_end = min(len(end), max(left // AFTER, left - len(start)))
        n_start = min(len(start), left - n_end)
        start, end = start[len(start) - n_start :], end[:n_end]
        known = known[max(len(known) - (left - n_start - n_end), 0) :]
    return [*bos, *known, prefix, *start, *begun_ids, suffix, *end, middle]
