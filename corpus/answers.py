"""A target's answers as token ids: the text that a drafter is judged by and fitted to. `generate` writes them."""

from __future__ import annotations

import gzip
import importlib.resources
import json
from dataclasses import dataclass
from pathlib import Path

from llamabase.errors import FileFormatError
from llamabase.files import CHUNK, Kind, read_text
from llamabase.gguf.reader import GGUFFile
from llamabase.gguf.vocabulary import MOST_TOKENS, Vocabulary
from llamabase.llama.model import Model
from llamabase.llama.template import ChatTemplate

from .prompts import spread


@dataclass(frozen=True)
class TargetAnswer:
    """Token ids of a prompt and of the target's answer, and a label to group by."""

    id: str
    label: str
    prompt: list[int]
    answer: list[int]


def _holds_answers(path: Path) -> bool:
    """Whether the first line is an answer, or the beginning of one that a kill cut off."""
    with open(path, "rb") as file:
        line = file.readline(CHUNK)
    try:
        return "answer_ids" in json.loads(line)
    except (ValueError, TypeError, RecursionError):
        begin = b'{"id": '
        return begin.startswith(line[: len(begin)]) and not line.endswith(b"\n")


ANSWERS = Kind("does not hold answers", _holds_answers)


def answered(path: Path) -> set[str]:
    """Ids of the answers in a file; a last line that a kill cut off is removed from it.

    Raises FileFormatError naming file and line for any other line that is not an answer.
    """
    done: set[str] = set()
    if not path.exists():
        return done
    with open(path, "r+b") as file:
        end = 0
        for number, line in enumerate(file, 1):
            if not line.endswith(b"\n"):
                file.truncate(end)
                break
            try:
                done.add(json.loads(line)["id"])
            except (ValueError, KeyError, TypeError, RecursionError) as error:
                raise FileFormatError(
                    f"{path}, line {number}: is not an answer ({error}); choose another -o"
                ) from error
            end += len(line)
    return done


def read_answers(path: Path, n_tokens: int = MOST_TOKENS) -> list[TargetAnswer]:
    """Answers from lines of `python -m corpus generate`, or from one JSON object `{id: [prompt_ids, answer_ids]}`.

    Raises FileFormatError for anything else, and for ids outside a vocabulary of n_tokens.
    """
    text = read_text(path, "answers")
    try:
        if path.suffix == ".jsonl":
            lines = [json.loads(line) for line in text.split("\n") if line.strip()]
            pairs = {line["id"]: (line["prompt_ids"], line["answer_ids"], line.get("label", "all")) for line in lines}
        else:
            pairs = {name: (prompt, answer, "all") for name, (prompt, answer) in json.loads(text).items()}
        answers = [
            TargetAnswer(str(name), str(label), [int(i) for i in prompt], [int(i) for i in answer])
            for name, (prompt, answer, label) in pairs.items()
        ]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, OverflowError) as error:
        raise FileFormatError(f"{path}: should hold {{id: [prompt_ids, answer_ids]}} ({error})") from error
    answers = [answer for answer in answers if answer.prompt and answer.answer]
    if not answers:
        raise FileFormatError(f"{path}: holds no answers")
    for answer in answers:
        for token in (*answer.prompt, *answer.answer):
            if not 0 <= token < n_tokens:
                raise FileFormatError(
                    f"{path}: answer {answer.id} has token {token}; the vocabulary has {n_tokens} tokens"
                )
    return answers


def ready_answers(file: GGUFFile, n: int, name: str = "answers") -> list[TargetAnswer]:
    """n of the bundled answers, evenly spread: a target's, to the calibration prompts, or those named "judged", to
    prompts of which nothing was counted (docs/counts.md).

    As `file`, the drafter or its companion, tokenizes them.
    """
    packed = (importlib.resources.files("corpus") / "ready" / f"{name}.jsonl.gz").read_bytes()
    template = ChatTemplate(file, Vocabulary(file))
    answers = []
    with Model(file.path, vocab_only=True) as model:
        for i, line in enumerate(spread(gzip.decompress(packed).splitlines(), n)):
            *asked, message = json.loads(line)
            answer = model.tokenize(message["content"], special=False, add_bos=False)
            answers.append(TargetAnswer(str(i), "all", template.ids(model, asked), answer))
    return answers
