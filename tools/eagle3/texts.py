"""The texts that a head is trained on: prompts, and what the target itself answers to them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from corpus.prompts import load_prompts, split
from corpus.sources import SourceReader
from llamabase.cli.progress import progress
from llamabase.errors import TrimError
from llamabase.files import CACHED, write_whole
from llamabase.gguf.reader import GGUFFile
from llamabase.gguf.vocabulary import Vocabulary
from llamabase.llama.model import Model
from llamabase.llama.template import ChatTemplate

from .target import Target

# Beginnings of a user's turn that the target completes; most are empty.
OPENINGS = [
    *[""] * 10,
    *("What", "How", "Write", "Explain", "Who", "Can you", "I", "Translate", "Summarize", "Read the following"),
    *("Article:", "Context:", "Given the text", "A", "Compare", "If"),
]
LONG_OPENINGS = [
    *("Summarize: ", "Read this and answer the question after it.\n\n", "Article:\n\n", "Translate: ", "Context: "),
]
MOST_PROMPT, MOST_SHORT, MOST_LONG, MOST_ANSWER = 400, 100, 800, 200  # tokens
# Tokens of texts that are answered together. A token of SmolLM2-135M's cache takes 23 kB on a GPU and twice that on a
# CPU, so these are 24 GB and 0.8 GB.
CELLS = {"cuda": 1 << 20, "cpu": 1 << 14}
EVERY = 16  # steps after which it is asked whether all answers are done, which waits for the GPU
HELD = 16  # of so many short texts with a made-up turn, one is held back


@dataclass(frozen=True)
class Prompts:
    """Token ids of what texts begin with, as the target's chat template writes it: whole prompts, and user's turns up
    to the openings. `tail` ends a turn and begins the answer. `ends`: tokens that end an answer.
    """

    asked: list[list[int]]
    short: list[list[int]]
    long: list[list[int]]
    tail: list[int]
    ends: list[int]

    @classmethod
    def of(cls, file: GGUFFile, questions: Path | None = None) -> Prompts:
        """The bundled ones that are counted, and those of a Parquet file's column `question`."""
        asked = [prompt.messages for prompt in split(load_prompts(), "calibrate")]
        if questions is not None:
            reader = SourceReader("question")
            asked += [[{"role": "user", "content": found.text}] for found in reader.documents(str(questions))]
        template = ChatTemplate(file, Vocabulary(file))
        before, _, after = template.text([{"role": "user", "content": "\0"}]).partition("\0")
        with Model(file.path, vocab_only=True) as model:
            ids = [template.ids(model, messages) for messages in asked]
            short, long = (
                [template.tokens(model, before + opening) for opening in openings]
                for openings in (OPENINGS, LONG_OPENINGS)
            )
            tail = model.tokenize(after, add_bos=False)
            ends = [token for token in range(model.n_vocab) if model.is_end(token)]
        return cls([prompt for prompt in ids if len(prompt) <= MOST_PROMPT], short, long, tail, ends)

    def beginnings(self, n: int) -> list[Beginning]:
        """At most a quarter of n texts are asked; an eighth have a long made-up turn, the others a short one."""
        order = np.random.default_rng(0).permutation(len(self.asked))[: n // 4].tolist()
        texts = [Beginning(f"asked-{i}", self.asked[i], 0) for i in order]
        for kind, openings, count, most in (
            ("long", self.long, n // 8, MOST_LONG),
            ("short", self.short, n - n // 8 - len(texts), MOST_SHORT),
        ):
            texts += [Beginning(f"{kind}-{i}", openings[i % len(openings)], most) for i in range(count)]
        return texts


@dataclass(frozen=True)
class Beginning:
    """A text of `ids`, after which at most n_drawn tokens of a user's turn are drawn, and then the answer is greedy."""

    name: str
    ids: list[int]
    n_drawn: int

    @property
    def most(self) -> int:
        """Tokens of the text, without its tail."""
        return len(self.ids) + self.n_drawn + MOST_ANSWER


@torch.no_grad()
def generate(
    target: Target, prompts: Prompts, texts: Sequence[Beginning], seed: int
) -> tuple[list[np.ndarray], list[int]]:
    """The tokens of the texts, and the place where each answer begins.

    All are read in step, a token of each at a time: at every place it is the text's own, or it is chosen.
    """
    device, n_tail = target.device, len(prompts.tail)
    n_places = max(text.most for text in texts) + n_tail
    rows = np.zeros((len(texts), n_places + n_tail), np.int64)
    for row, text in zip(rows, texts, strict=True):
        row[: len(text.ids)] = text.ids

    def column(values: list[int]) -> Tensor:
        return torch.tensor(values, device=device)

    tokens, tail = torch.from_numpy(rows).to(device), column(prompts.tail)
    known = column([len(text.ids) for text in texts])  # tokens that need not be chosen
    left = column([text.n_drawn for text in texts])  # tokens that may still be drawn
    begins, lengths = known.clone(), torch.zeros_like(known)  # of a turn that is made up, once it is over
    is_end = torch.zeros(len(target.head), dtype=torch.bool, device=device)
    is_end[column(prompts.ends)] = True
    last_drawn = max((len(text.ids) + text.n_drawn for text in texts if text.n_drawn), default=0)
    noise = torch.Generator(device).manual_seed(seed)
    cache = target.cache(len(texts), n_places)
    first = min(len(text.ids) for text in texts)
    final = target.states(tokens[:, :first], (), cache)[:, -1]
    for place in range(first, n_places):
        logits = target.logits(final)
        token, choosing = logits.argmax(-1), known <= place
        drawing = choosing & (left > 0)
        if place <= last_drawn:
            race = torch.empty_like(logits).exponential_(generator=noise)
            token = torch.where(drawing, (logits - race.log()).argmax(-1), token)
        over = is_end[token]
        left = torch.where(drawing, (left - 1) * ~over, left)
        told = drawing & (left == 0)  # the user's turn is over: the tail takes the token's place
        tokens[:, place] = torch.where(choosing, token, tokens[:, place])
        tokens[:, place : place + n_tail] = torch.where(told[:, None], tail, tokens[:, place : place + n_tail])
        known, begins = torch.where(told, place + n_tail, known), torch.where(told, place + n_tail, begins)
        full = choosing & ~drawing & (over | (place + 1 - begins >= MOST_ANSWER))
        lengths = torch.where(full & (lengths == 0), place + 1, lengths)
        if place % EVERY == 0 and bool(lengths.all()):
            break
        final = target.states(tokens[:, place : place + 1], (), cache, place)[:, -1]
    made = tokens.cpu().numpy()
    return [row[:length] for row, length in zip(made, lengths.tolist(), strict=True)], begins.tolist()


def make_texts(folder: Path, target: Target, prompts: Prompts, n: int, time_is_up: Callable[[], bool]) -> bool:
    """Make those of n texts that the folder lacks, batch by batch, each in a file; whether all are there now."""
    made = {name for path in folder.glob("texts-*.npz") for name in np.load(path)["names"].tolist()}
    waiting = [text for text in prompts.beginnings(n) if text.name not in made]
    waiting.sort(key=lambda text: (-text.n_drawn, -text.most))  # a batch is of one kind, and its first is its longest
    with progress("answering", n, "texts") as advance:
        advance(n - len(waiting))
        while waiting and not time_is_up():
            size = max(1, CELLS[target.device.type] // (waiting[0].most + len(prompts.tail)))
            kind = waiting[0].n_drawn
            batch = [text for text in waiting[:size] if text.n_drawn == kind]
            waiting = waiting[len(batch) :]
            number = len(list(folder.glob("texts-*.npz")))
            tokens, begins = generate(target, prompts, batch, number)
            with write_whole(folder / f"texts-{number:04}.npz", CACHED) as file:
                np.savez_compressed(
                    file,
                    names=np.array([text.name for text in batch]),
                    tokens=np.concatenate(tokens).astype(np.int32),
                    lengths=np.array(list(map(len, tokens))),
                    begins=np.array(begins),
                )
            advance(len(batch))
    return not waiting


class Texts:
    """All texts of a folder. `held`: those never trained on, nor is any other with the prompt of one of them."""

    def __init__(self, folder: Path, device: torch.device) -> None:
        shards = [np.load(path) for path in sorted(folder.glob("texts-*.npz"))]
        self.tokens = [t for d in shards for t in np.split(d["tokens"], d["lengths"].cumsum()[:-1])]
        self.begins = [int(b) for d in shards for b in d["begins"]]
        self._device = device
        asked = [bytes(tokens[:begins]) for tokens, begins in zip(self.tokens, self.begins, strict=True)]
        names = [name.partition("-") for d in shards for name in d["names"].tolist()]
        self.held = [i for i, (kind, _, n) in enumerate(names) if kind == "short" and int(n) % HELD == HELD - 1]
        held = {asked[i] for i in self.held}
        self.trained = [i for i in range(len(names)) if asked[i] not in held]
        if not self.held or not self.trained:
            raise TrimError(f"{folder}: has texts to train on or to judge by, and needs both; make more (--texts)")

    def answers(self, n: int) -> dict[str, list[list[int]]]:
        """The first n that are held: {id: [prompt_ids, answer_ids]}, as read_answers takes them."""
        parts = {i: np.split(self.tokens[i], [self.begins[i]]) for i in self.held[:n]}
        return {str(i): [part.tolist() for part in both] for i, both in parts.items()}

    def batch(self, which: Sequence[int]) -> tuple[Tensor, Tensor, Tensor]:
        """Padded (b x n): tokens, whether there is one, and whether it is of the answer."""
        shape = len(which), max(len(self.tokens[i]) for i in which)
        tokens, there, answer = np.zeros(shape, np.int64), np.zeros(shape, bool), np.zeros(shape, bool)
        for row, i in enumerate(which):
            length = len(self.tokens[i])
            tokens[row, :length], there[row, :length] = self.tokens[i], True
            answer[row, self.begins[i] : length] = True
        batch = [torch.from_numpy(values).to(self._device) for values in (tokens, there, answer)]
        return batch[0], batch[1], batch[2]

    def order(self, seed: int, size: int) -> list[list[int]]:
        """Batches of about `size` tokens, of texts of about one length, in a random order."""
        rng = np.random.default_rng([2, seed])
        lengths = np.array([len(self.tokens[i]) for i in self.trained])
        batches: list[list[int]] = [[]]
        for place in np.argsort(lengths + rng.uniform(0, 20, len(lengths))):
            if batches[-1] and (len(batches[-1]) + 1) * lengths[place] > size:
                batches.append([])
            batches[-1].append(self.trained[place])
        return [batches[i] for i in rng.permutation(len(batches))]
