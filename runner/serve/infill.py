"""The prompt for filling a gap in a text, for vocabularies that have tokens for it, as llama-server writes it.

Source: llama-server's /infill, and the repository pattern of Qwen2.5-Coder (arXiv 2409.12186).
"""

from __future__ import annotations

from collections.abc import Sequence

import llama_cpp

from llamabase.errors import SettingError
from llamabase.llama.model import Model

AFTER = 4  # the text after the gap gets one in AFTER tokens of the room if both sides are too long


def infill_prompt(
    model: Model,
    before: str,
    after: str,
    begun: str = "",
    files: Sequence[tuple[str, str]] | None = None,
    room: int | None = None,
) -> list[int]:
    """At most `room` token ids, after which the model fills the gap between two texts.

    `begun`: the beginning of the answer. `files`: (name, text) of other known files, the nearest last; an empty list
    still names a repository, None does not. Without enough room, files are dropped first, from the front, then what is
    far from the gap. Raises SettingError for a vocabulary that has no tokens for filling a gap.
    """

    def ids(text: str) -> list[int]:
        return model.tokenize(text, special=False, add_bos=False)

    names = ("pre", "suf", "mid", "rep", "sep")
    prefix, suffix, middle, repository, file = (getattr(llama_cpp, f"llama_vocab_fim_{n}")(model.vocab) for n in names)
    if missing := [n for n, token in (("prefix", prefix), ("suffix", suffix), ("middle", middle)) if token < 0]:
        raise SettingError(
            f"this vocabulary has no token for the {' and the '.join(missing)} of a gap, so nothing can be filled in; "
            "use a model for code that has them, such as Qwen2.5-Coder"
        )
    known: list[int] = []
    if files is not None:
        known += [] if repository < 0 else [repository, *ids("myproject\n")]
        for name, text in files:
            known += ids("\n\n--- snippet ---\n\n") if file < 0 else [file, *ids(f"{name}\n")]
            known += ids(text)
        known += [] if file < 0 else [file, *ids("filename\n")]
    bos = model.tokenize("")
    start, end, begun_ids = ids(before), ids(after), model.tokenize(begun, special=True, add_bos=False)
    if room is not None:
        left = max(room - len(bos) - len(begun_ids) - 3, 0)
        n_end = min(len(end), max(left // AFTER, left - len(start)))
        n_start = min(len(start), left - n_end)
        start, end = start[len(start) - n_start :], end[:n_end]
        known = known[max(len(known) - (left - n_start - n_end), 0) :]
    return [*bos, *known, prefix, *start, *begun_ids, suffix, *end, middle]
