"""What a target said, as token ids: the text that a drafter is judged and fitted on."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from llamabase.errors import FileFormatError


@dataclass(frozen=True)
class TargetAnswer:
    """What the target said: token ids of prompt and answer, and a label to group by."""

    id: str
    label: str
    prompt: list[int]
    answer: list[int]


def read_answers_file(path: Path) -> list[TargetAnswer]:
    """Answers as `{id: [prompt_ids, answer_ids]}` in one JSON object, or as lines of `python -m corpus generate`."""
    try:
        text = path.read_text("utf-8")
        if path.suffix == ".jsonl":
            lines = [json.loads(line) for line in text.splitlines() if line.strip()]
            pairs = {line["id"]: (line["prompt_ids"], line["answer_ids"], line.get("label", "all")) for line in lines}
        else:
            pairs = {name: (prompt, answer, "all") for name, (prompt, answer) in json.loads(text).items()}
        found = [
            TargetAnswer(str(name), str(label), [int(i) for i in prompt], [int(i) for i in answer])
            for name, (prompt, answer, label) in pairs.items()
        ]
    except OSError as error:
        raise FileFormatError(f"{path}: cannot be read: {error.strerror or error}") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise FileFormatError(f"{path}: should hold {{id: [prompt_ids, answer_ids]}} ({error})") from error
    found = [answer for answer in found if answer.prompt and answer.answer]
    if not found:
        raise FileFormatError(f"{path}: holds no answers")
    return found
