"""The target's own answers, many at a time: the text that is best to count by VocabTrim (arXiv 2506.22694, section 4).

Answers share one cache, and each batch holds the last tokens of all that run and pieces of waiting prompts, so each
weight is read once for all of them.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from llamabase.cli.progress import progress
from llamabase.errors import TrimError
from llamabase.gguf.reader import GGUFFile
from llamabase.gguf.vocabulary import Vocabulary
from llamabase.llama.context import Context, ContextParams
from llamabase.llama.meeting import Meeting
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
    tokens: list[int] = field(default_factory=list)
    finish: str = ""


def answers(
    model: Model,
    context: Context,
    prompts: Iterable[tuple[str, list[int]]],
    *,
    max_tokens: int,
    sampling: Sampling,
    seed: int = 0,
) -> Iterator[Answer]:
    """Answer the prompts, as many at a time as the context has sequences, in the order in which they finish.

    Every answer draws with noise of its own, seeded by its prompt's id. So the text does not depend on other answers,
    except that quantised kernels round by the shape of the batch.
    """
    meeting, finished, waiting = Meeting(math.inf), list[Answer](), deque(prompts)
    free = [context, *map(context.beside, range(1, context.n_parallel))]
    context.meet(meeting, last=True)

    def run(answer: Answer, own: Context) -> None:
        noise = Noise([seed, *answer.id.encode()])
        chain = Chain(sampling, answer.prompt, model, noise)
        logits = own.decode(answer.prompt)
        while not answer.finish:
            token = chain.distribution(logits[0]).draw(noise, len(answer.prompt) + len(answer.tokens))
            chain.accept(token)
            answer.tokens.append(token)
            ended = model.is_end(token)
            if ended or len(answer.tokens) == max_tokens:
                answer.finish = "stop" if ended else "length"
            else:
                logits = own.decode([token])
        own.rewind(0)
        free.append(own)
        finished.append(answer)

    try:
        while waiting or len(meeting):
            while free and waiting:
                meeting.begin(partial(run, Answer(*waiting.popleft()), free.pop()))
            meeting.go_on()
            yield from finished
            finished.clear()
    finally:
        meeting.close()


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
            Context(model, n_ctx, ContextParams(n_threads), n_outputs=n_parallel, n_parallel=n_parallel) as context,
            open(out, "a", encoding="utf-8") as lines,
            progress("answering", len(prompts), "prompts") as advance,
        ):
            advance(len(prompts) - len(todo))
            for answer in answers(model, context, asked.items(), max_tokens=max_tokens, sampling=sampling, seed=seed):
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
