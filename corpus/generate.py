"""The target's own answers, many at a time: the text that is best to count by VocabTrim (arXiv 2506.22694, section 4).

Sequences share one llama.cpp batch: each step feeds every running answer its last token, and fills the rest of the
batch with waiting prompts. So each weight is read once for all of them.
"""

from __future__ import annotations

import json
import os
import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from llamabase.cli.progress import progress
from llamabase.errors import TrimError
from llamabase.gguf.reader import GGUFFile
from llamabase.gguf.vocabulary import Vocabulary
from llamabase.llama.context import ContextParams, ParallelContext
from llamabase.llama.model import Model
from llamabase.llama.template import ChatTemplate
from llamabase.sampling.chain import Chain
from llamabase.sampling.noise import Noise
from llamabase.sampling.settings import Sampling

from .answers import answered
from .prompts import Prompt


@dataclass
class Answer:
    """One prompt and the target's answer to it, as token ids."""

    id: str
    prompt: list[int]
    noise: Noise = field(repr=False)
    chain: Chain = field(repr=False)
    tokens: list[int] = field(default_factory=list)
    finish: str = ""
    read: int = 0  # tokens in the cache


def answers(
    model: Model,
    context: ParallelContext,
    prompts: Iterable[tuple[str, list[int]]],
    *,
    n_parallel: int,
    max_tokens: int,
    sampling: Sampling,
    seed: int = 0,
) -> Iterator[Answer]:
    """Answer the prompts, n_parallel at a time, in the order in which they finish.

    Every answer draws with noise of its own, seeded by its prompt's id. So the text does not depend on other answers,
    except that quantised kernels round by the shape of the batch.
    """
    waiting = deque(prompts)
    free = list(range(n_parallel))
    running: dict[int, Answer] = {}
    while waiting or running:
        while free and waiting:
            name, ids = waiting.popleft()
            noise = Noise([seed, *name.encode()])
            running[free.pop()] = Answer(name, ids, noise, Chain(sampling, ids, model, noise))
        tokens: list[int] = []
        sequences: list[int] = []
        positions: list[int] = []
        outputs: list[bool] = []
        speaking: list[int] = []
        # Running answers come first, with one token each; the rest of the batch goes to prompts.
        for sequence, answer in sorted(running.items(), key=lambda item: not item[1].tokens):
            room = context.n_batch - len(tokens)
            pending = [answer.tokens[-1]] if answer.tokens else answer.prompt[answer.read : answer.read + room]
            if not pending:
                continue
            start = answer.read
            answer.read += len(pending)
            whole = bool(answer.tokens) or answer.read == len(answer.prompt)
            tokens += pending
            sequences += [sequence] * len(pending)
            positions += range(start, answer.read)
            outputs += [False] * (len(pending) - 1) + [whole]
            if whole:
                speaking.append(sequence)
        logits = context.decode_each(tokens, sequences, positions, outputs)
        for row, sequence in zip(logits, speaking, strict=True):
            answer = running[sequence]
            token = answer.chain.distribution(row).draw(answer.noise, answer.read)
            answer.chain.accept(token)
            answer.tokens.append(token)
            ended = model.is_end(token)
            if ended or len(answer.tokens) >= max_tokens:
                answer.finish = "stop" if ended else "length"
                context.drop(sequence)
                free.append(sequence)
                yield running.pop(sequence)


def generate(
    prompts: Sequence[Prompt],
    model: Model,
    out: Path,
    *,
    n_parallel: int = 16,
    max_tokens: int = 256,
    sampling: Sampling,
    seed: int = 0,
    n_threads: int | None = None,
) -> int:
    """Append the target's answer to every prompt that `out` lacks, with a bar; the number of tokens generated.

    Each line is on disk before the next answer is waited for: a kill loses only unfinished answers, and another run
    continues from there.
    """
    done = answered(out)
    todo = {prompt.id: prompt for prompt in prompts if prompt.id not in done}
    if not todo:
        return 0
    file = GGUFFile(model.path)
    template = ChatTemplate(file, Vocabulary(file))
    asked = {name: template.ids(model, prompt.messages) for name, prompt in todo.items()}
    longest = max(map(len, asked.values()))
    n_parallel = min(n_parallel, len(todo))
    n_ctx = n_parallel * -(-(longest + max_tokens) // 32) * 32
    total, started = 0, time.perf_counter()
    try:
        with (
            ParallelContext(model, n_ctx, n_parallel, ContextParams(n_threads)) as context,
            open(out, "a", encoding="utf-8") as lines,
            progress("answering", len(prompts), "prompts") as advance,
        ):
            advance(len(prompts) - len(todo))
            for answer in answers(
                model,
                context,
                asked.items(),
                n_parallel=n_parallel,
                max_tokens=max_tokens,
                sampling=sampling,
                seed=seed,
            ):
                shown = answer.tokens[:-1] if answer.finish == "stop" else answer.tokens
                text = b"".join(map(model.piece, shown)).decode("utf-8", "replace")
                prompt = todo[answer.id]
                line = {
                    "id": prompt.id,
                    "label": prompt.label,
                    "messages": [*prompt.messages, {"role": "assistant", "content": text}],
                    "prompt_ids": answer.prompt,
                    "answer_ids": answer.tokens,
                    "finish": answer.finish,
                }
                lines.write(json.dumps(line, ensure_ascii=False) + "\n")
                lines.flush()
                os.fsync(lines.fileno())
                total += len(answer.tokens)
                advance(1, f"{total / (time.perf_counter() - started):.1f} tok/s")
    except OSError as error:
        raise TrimError(f"{out}: cannot be written: {error.strerror or error}; answers so far are kept") from error
    return total
