"""Answers made many at a time are the answers made one at a time, and a kill loses or repeats none."""

from __future__ import annotations

import json

import pytest

from corpus.answers import read_answers
from corpus.generate import answers, generate
from corpus.prompts import Prompt
from llamabase.errors import FileFormatError
from llamabase.llama.context import Context, ContextParams
from llamabase.llama.model import Model
from llamabase.sampling.settings import Sampling

GREEDY = Sampling(temp=0)
HOT = Sampling(temp=1.5, top_k=0, top_p=1, min_p=0)
TEXTS = ["the king", "a", "once more into the house of tea", "sea", "and then there is the end of it all " * 6, "one"]


@pytest.fixture(scope="module")
def model(toys):
    with Model(toys["target"]) as model:
        yield model


PROMPTS = [Prompt(f"p{i}", f"task{i % 2}", [{"role": "user", "content": text}]) for i, text in enumerate(TEXTS)]


def alone(model, ids: list[int], n: int) -> list[int]:
    """One token at a time, in a context of its own."""
    out: list[int] = []
    with Context(model, 256) as context:
        logits = context.decode(ids)
        while len(out) < n:
            out.append(int(logits[0].argmax()))
            if model.is_end(out[-1]):
                break
            logits = context.decode(out[-1:])
    return out


@pytest.mark.parametrize("n_parallel", [1, 2, 4, 16])
@pytest.mark.parametrize("n_batch", [16, 256])
def test_same_answers_in_any_company(model, n_parallel: int, n_batch: int) -> None:
    """However many run together and however prompts are cut to fit a batch."""
    prompts = [(f"p{i}", model.tokenize(text)) for i, text in enumerate(TEXTS)]
    how = ContextParams(n_batch=n_batch)
    with Context(model, 1024, how, n_outputs=n_parallel, n_parallel=n_parallel) as context:
        found = list(answers(model, context, prompts, max_tokens=24, sampling=GREEDY))
    assert sorted(answer.id for answer in found) == sorted(name for name, _ in prompts)
    for answer in found:
        assert answer.tokens == alone(model, dict(prompts)[answer.id], 24)
        assert answer.finish == ("stop" if model.is_end(answer.tokens[-1]) else "length")


def test_sampled_answers_depend_on_the_seed_alone(model, tmp_path) -> None:
    texts = []
    for n_parallel, seed in ((1, 3), (4, 3), (4, 4)):
        out = tmp_path / f"{n_parallel}-{seed}.jsonl"
        generate(PROMPTS, model, out, n_parallel=n_parallel, max_tokens=12, sampling=HOT, seed=seed)
        texts.append({found.id: found.answer for found in read_answers(out)})
    assert texts[0] == texts[1] != texts[2]


@pytest.mark.parametrize("sampling", [GREEDY, HOT])
def test_a_kill_at_any_byte_neither_loses_nor_repeats_an_answer(model, tmp_path, sampling) -> None:
    """A resumed run adds what an uninterrupted one writes, sampled text too; a plan can group it by task."""
    whole = tmp_path / "whole.jsonl"
    generate(PROMPTS, model, whole, n_parallel=3, max_tokens=8, sampling=sampling)
    assert {found.id: found.label for found in read_answers(whole)} == {f"p{i}": f"task{i % 2}" for i in range(6)}
    data = whole.read_bytes()
    wanted = {line["id"]: line for line in map(json.loads, data.splitlines())}
    for cut in {0, 1, len(data) // 3, data.index(b"\n"), data.index(b"\n") + 1, len(data) - 1, len(data)}:
        out = tmp_path / f"cut{cut}.jsonl"
        out.write_bytes(data[:cut])
        kept = data[: data[:cut].rfind(b"\n") + 1]
        generate(PROMPTS, model, out, n_parallel=3, max_tokens=8, sampling=sampling)
        assert out.read_bytes().startswith(kept)
        lines = [json.loads(line) for line in out.read_bytes().splitlines()]
        assert len(lines) == len(wanted)
        assert {line["id"]: line for line in lines} == wanted


def test_a_file_of_something_else_is_refused(model, tmp_path) -> None:
    out = tmp_path / "notes.jsonl"
    out.write_text('{"id": "p0"}\nmy notes\n')
    with pytest.raises(FileFormatError, match=r"notes\.jsonl, line 2"):
        generate(PROMPTS, model, out, max_tokens=4, sampling=GREEDY)
    assert out.read_text() == '{"id": "p0"}\nmy notes\n'
