"""Trains an EAGLE-3 head (arXiv 2503.01840) for a small llama-type target, on its own answers and on a CPU.

    pip install -e .[corpus,train]
    python tools/train_eagle3.py W TARGET.gguf --prompts QUESTIONS.parquet

W is a folder to work in. What it holds is not made again, so each step can be interrupted and goes on. On two cores,
two processes make the texts, `--part 1/2 --threads 1` and `--part 2/2 --threads 1`, and `--no-texts` then trains on
them. Three million tokens need 16 GB of memory and of disk; docs/eagle3.md says how long they took. The steps:

    texts   the target answers greedily the prompts in corpus/, the questions of --prompts and user's turns that it
            makes up itself from their beginning; its states are kept with the tokens (W/texts-*.npz)
    train   the head, unrolled as in EAGLE-3's training-time test (W/head.pt, replaced every 100 updates)
    export  W/eagle3-f32.gguf and W/eagle3-f16.gguf
    check   compares the logits of PyTorch and llama.cpp, and prints the acceptance on texts never trained on

Conventions are llama.cpp's: the decoder's position P takes (token[P+1], g[P]) and predicts token P+2.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow.parquet
import torch
from gguf.constants import GGMLQuantizationType
from torch import Tensor, nn

from corpus.answers import TargetAnswer, read_answers
from corpus.prompts import load_prompts, split
from gguf_trim.fit.closed_form import blocks
from gguf_trim.format.state_fed import EAGLE3, NORM, Eagle3Head
from llamabase.cli.progress import progress
from llamabase.files import CACHED, write_whole
from llamabase.gguf import reader, writer
from llamabase.gguf.reader import GGUFFile
from llamabase.gguf.tensors import EMBEDDING, HEAD
from llamabase.gguf.vocabulary import Vocabulary
from llamabase.llama.context import Context, ContextParams, Part, read_parts
from llamabase.llama.model import Model
from llamabase.llama.quantize import quantize
from llamabase.llama.states import PairContext, Recorded
from llamabase.llama.template import ChatTemplate
from runner.draft.reading import StateFedReading

# Beginnings of a user's turn that the target completes; most are empty.
OPENINGS = [
    *[""] * 10,
    *("What", "How", "Write", "Explain", "Who", "Can you", "I", "Translate", "Summarize", "Read the following"),
    *("Article:", "Context:", "Given the text", "A", "Compare", "If"),
]
LONG_OPENINGS = [
    *("Summarize: ", "Read this and answer the question after it.\n\n", "Article:\n\n", "Translate: ", "Context: "),
]
N_QUESTIONS, N_MADE_UP, N_LONG = 1500, 8000, 1200  # texts: of --prompts, and of made-up turns, short and long
MOST_PROMPT, MOST_MADE_UP, MOST_LONG, MOST_ANSWER = 400, 100, 350, 200  # tokens
N_PARALLEL, SHARD = 64, 64  # texts: answered at a time, and of a file
BATCH, STEPS, N_SECOND = 2048, 3, 600  # tokens of a batch; steps unrolled in the second pass, and its updates
WIDER = 2  # the head's feed-forward part, over that of the target's layers
N_USUAL, N_OTHERS = 2048, 1024  # rows of the head beside those of the batch's tokens
RATE, WARM_UP, WEIGHT_DECAY, NOISE = 1e-3, 40, 0.1, 0.1
FIRST = 24  # places that are the system's turn in most texts
RIDGE, SURE = 0.003, 0.6  # of the first guess: its regularisation, and its logits over the target's
N_JUDGED, N_COMPARED = 24, 2  # texts of the check: drafted for, and compared logit by logit

log = partial(print, file=sys.stderr, flush=True)


# ---- texts ----


@dataclass
class Text:
    """A text as it grows: its next tokens are `forced`, then drawn in a user's turn that is made up, then greedy."""

    name: str
    forced: deque[int]
    n_drawn: int = 0  # tokens of the user's turn that may still be drawn
    tokens: list[int] = field(default_factory=list)  # that were read
    states: list[np.ndarray] = field(default_factory=list)  # float16: layer inputs, then the final state
    begins: int = -1  # place of the answer's first token

    def __post_init__(self) -> None:
        self.noise = np.random.default_rng([1, *self.name.encode()])

    def go_on(self, logits: np.ndarray, model: Model, tail: Sequence[int]) -> bool:
        """Choose the next token, or end the user's turn by `tail`; False once the answer has its last token."""
        if self.forced:
            return True
        if self.n_drawn:
            weights = np.exp(logits - logits.max()).cumsum()
            token = int(np.searchsorted(weights, self.noise.random(dtype=np.float32) * weights[-1]))
            self.n_drawn = 0 if model.is_end(token) else self.n_drawn - 1
            self.forced.extend([token] if self.n_drawn else tail)
            return True
        token = int(logits.argmax())
        if self.begins < 0:
            self.begins = len(self.tokens)
        self.forced.append(token)
        return not model.is_end(token) and len(self.tokens) - self.begins < MOST_ANSWER


def beginnings(template: ChatTemplate, model: Model, questions: Path | None) -> list[Text]:
    """The texts to be made, in a mixed order."""
    asked = {f"ready-{prompt.id}": prompt.messages for prompt in split(load_prompts(), "calibrate")}
    if questions is not None:
        column = pyarrow.parquet.read_table(questions, columns=["question"])["question"].to_pylist()
        asked |= {f"question-{i}": [{"role": "user", "content": text}] for i, text in enumerate(column[:N_QUESTIONS])}
    texts = [Text(name, deque(template.ids(model, messages))) for name, messages in asked.items()]
    head, _, _ = template.text([{"role": "user", "content": "\0"}]).partition("\0")
    for kind, openings, n, most in (
        ("own", OPENINGS, N_MADE_UP, MOST_MADE_UP),
        ("long", LONG_OPENINGS, N_LONG, MOST_LONG),
    ):
        for i in range(n):
            ids = model.tokenize(head + openings[i % len(openings)], add_bos=False)
            texts.append(Text(f"{kind}-{i}", deque(ids), most))
    texts = [text for text in texts if len(text.forced) <= MOST_PROMPT]
    return [texts[i] for i in np.random.default_rng(0).permutation(len(texts))]


def make_texts(
    folder: Path, file: GGUFFile, layers: list[int], questions: Path | None, part: str, threads: int
) -> None:
    """Make the texts of this part that the folder lacks, many at a time, a token of each in every batch."""
    made = {name for path in folder.glob("texts-*.npz") for name in np.load(path)["names"].tolist()}
    template = ChatTemplate(file, Vocabulary(file))
    tail = template.text([{"role": "user", "content": "\0"}]).partition("\0")[2]
    fast = folder / "target-bf16.gguf"  # the same weights, in a type whose kernels are three times as fast
    if not fast.exists():
        quantize(file.path, fast, "BF16")
    number, of = map(int, part.split("/"))
    n_ctx = N_PARALLEL * (MOST_PROMPT + MOST_MADE_UP + MOST_ANSWER + 32)
    running: dict[int, Text] = {}
    done: list[Text] = []
    with (
        Model(fast) as model,
        Context(model, n_ctx, ContextParams(threads), N_PARALLEL, n_parallel=N_PARALLEL, unified=False) as context,
    ):
        waiting = deque(
            text for text in beginnings(template, model, questions)[number - 1 :: of] if text.name not in made
        )
        end = model.tokenize(tail, add_bos=False)
        inputs = Recorded(context, file.architecture, layers)
        context.recorders.clear()  # states are taken batch by batch
        own = [context, *map(context.beside, range(1, N_PARALLEL))]
        with progress("answering", len(waiting), "texts") as advance:
            while waiting or running:
                for i in set(range(N_PARALLEL)) - running.keys():
                    if waiting:
                        own[i].rewind(0)
                        running[i] = waiting.popleft()
                for text in running.values():
                    text.tokens.append(text.forced.popleft())
                logits = read_parts([Part(own[i], text.tokens[-1:], 1, True) for i, text in running.items()])
                final = [own[i].hidden_states(1) for i in running]
                states = np.concatenate([inputs.of_batch(len(running)), np.concatenate(final)], axis=1).astype(
                    np.float16
                )
                for row, (i, text) in enumerate(list(running.items())):
                    text.states.append(states[row])
                    if not text.go_on(logits[row][0], model, end):
                        done.append(running.pop(i))
                        advance(1)
                if len(done) >= SHARD or not (waiting or running):
                    write_shard(folder, number, done)
                    done = []


def write_shard(folder: Path, part: int, texts: list[Text]) -> None:
    n = len(list(folder.glob(f"texts-{part}-*.npz")))
    tokens = [[*text.tokens, *text.forced] for text in texts]
    with write_whole(folder / f"texts-{part}-{n:03}.npz", CACHED) as file:
        np.savez(
            file,
            names=np.array([text.name for text in texts]),
            tokens=np.concatenate(tokens).astype(np.int32),
            lengths=np.array([len(ids) for ids in tokens]),
            begins=np.array([text.begins for text in texts]),
            states=np.concatenate([np.stack(text.states) for text in texts]),  # of all tokens but each text's last
        )


class Texts:
    """All texts of the shards; `held` are those never trained on. `width`: numbers of a token's states."""

    def __init__(self, folder: Path, width: int) -> None:
        shards = [np.load(path) for path in sorted(folder.glob("texts-*.npz"))]
        self.tokens = [t for d in shards for t in np.split(d["tokens"], d["lengths"].cumsum()[:-1])]
        self.begins = [int(b) for d in shards for b in d["begins"]]
        names = [str(name) for d in shards for name in d["names"]]
        self.first = np.cumsum([0, *(len(t) - 1 for t in self.tokens)])
        self.states = torch.empty(int(self.first[-1]), width, dtype=torch.float16)
        filled = 0
        for shard in shards:  # one at a time: they are most of the memory
            part = shard["states"]
            self.states[filled : filled + len(part)] = torch.from_numpy(part)
            filled += len(part)
        self.held = [i for i, name in enumerate(names) if name.startswith("own-") and int(name[4:]) % 40 == 7]
        self.trained = sorted(set(range(len(names))) - set(self.held))

    def batch(self, which: Sequence[int]) -> tuple[Tensor, Tensor, Tensor]:
        """Padded: tokens (b x n + 1), states (b x n), and whether a token is of the answer."""
        n = max(len(self.tokens[i]) for i in which) - 1
        tokens = torch.zeros(len(which), n + 1, dtype=torch.long)
        answer = torch.zeros(len(which), n + 1, dtype=torch.bool)
        states = torch.zeros(len(which), n, self.states.shape[1])
        for row, i in enumerate(which):
            length = len(self.tokens[i])
            tokens[row, :length] = torch.from_numpy(self.tokens[i])
            answer[row, self.begins[i] : length] = True
            states[row, : length - 1] = self.states[self.first[i] : self.first[i + 1]]
        return tokens, states, answer

    def order(self, seed: int, size: int) -> list[list[int]]:
        """Batches of about `size` tokens, of texts of about one length, in a random order."""
        rng = np.random.default_rng([2, seed])
        lengths = np.array([len(self.tokens[i]) for i in self.trained])
        batches: list[list[int]] = [[]]
        for place in np.argsort(lengths + rng.uniform(0, 20, len(lengths))):
            if (len(batches[-1]) + 1) * lengths[place] > size:
                batches.append([])
            batches[-1].append(self.trained[place])
        return [batches[i] for i in rng.permutation(len(batches))]


# ---- the head, as llama.cpp's src/models/eagle3.cpp computes it ----


class Target:
    """What is used of the target: its table of embeddings, its last norm, and its head."""

    def __init__(self, file: GGUFFile) -> None:
        def values(name: str) -> Tensor:
            return torch.from_numpy(np.concatenate([block for _, block in blocks(file, file.tensors[name])]))

        self.table, self.norm = values(EMBEDDING), values(NORM)[0]
        self.head = values(HEAD) if HEAD in file.tensors else self.table


class Head(nn.Module):
    """One decoder layer over (token, state) pairs. Matrices have the target's shapes, its heads and its RoPE."""

    def __init__(self, target: GGUFFile) -> None:
        super().__init__()

        def value(key: str) -> float:
            return float(target.get(f"llama.{key}"))

        n = self.width = int(value("embedding_length"))
        self.n_ff = WIDER * int(value("feed_forward_length"))
        self.n_head = int(value("attention.head_count"))  # of keys and values too: the values carry the whole token
        self.epsilon, self.base = value("attention.layer_norm_rms_epsilon"), value("rope.freq_base")
        self.size = n // self.n_head
        shapes = {
            "fc": (3 * n, n),
            "attn_q": (2 * n, n),
            "attn_output": (n, n),
            "attn_k": (2 * n, n),
            "attn_v": (2 * n, n),
        }
        shapes |= {"ffn_gate": (n, self.n_ff), "ffn_up": (n, self.n_ff), "ffn_down": (self.n_ff, n)}
        for name, (columns, rows) in shapes.items():
            setattr(self, name, nn.Linear(columns, rows, bias=False))
        for name in ("attn_norm", "attn_norm_2", "ffn_norm", "output_norm"):
            setattr(self, name, nn.Parameter(torch.ones(n)))
        self.register_buffer("scale", torch.ones(3 * n))  # of the layer inputs, folded into fc in the file

    def norm(self, x: Tensor, weight: Tensor) -> Tensor:
        x = x.float()
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.epsilon) * weight

    def encode(self, inputs: Tensor) -> Tensor:
        """g of layer inputs (... x 3 n_embd)."""
        return self.fc(inputs * self.scale).float()

    def rope(self, x: Tensor, first: int) -> Tensor:
        """Rotate neighbouring pairs (llama.cpp's NORM type) of (batch, heads, place, size)."""
        places = torch.arange(first, first + x.shape[2])
        angles = places[:, None] * self.base ** (-torch.arange(0, self.size, 2) / self.size)
        a, b = x.float().unflatten(-1, (-1, 2)).unbind(-1)
        cos, sin = angles.cos(), angles.sin()
        return torch.stack([a * cos - b * sin, a * sin + b * cos], -1).flatten(-2)

    def forward(self, embeddings: Tensor, states: Tensor, cache: list[tuple[Tensor, Tensor]]) -> Tensor:
        """The next states (before output_norm) of pairs at places s, s+1, ..., s being the number of earlier calls.

        `cache` holds keys and values of those calls, the first of which read the target's states: a pair attends to the
        first call's up to its own row, to its own row of later calls, and to itself. So row a is what drafting from
        place a on computes.
        """
        n, step = embeddings.shape[1], len(cache)
        both = torch.cat([self.norm(embeddings, self.attn_norm), self.norm(states, self.attn_norm_2)], -1)

        def heads(matrix: nn.Linear) -> Tensor:
            return matrix(both).unflatten(-1, (self.n_head, self.size)).transpose(1, 2)

        q, k, v = self.rope(heads(self.attn_q), step), self.rope(heads(self.attn_k), step), heads(self.attn_v).float()
        cache.append((k, v))
        scores = q @ cache[0][0].transpose(-1, -2)
        scores = scores.float() + torch.full((n, n), -torch.inf).triu(1)
        own = [(q * key).sum(-1, keepdim=True) for key, _ in cache[1:]]
        weights = (torch.cat([scores, *own], -1) / self.size**0.5).softmax(-1)
        mixed = (weights[..., :n] @ cache[0][1]).float()
        for i, (_, value) in enumerate(cache[1:]):
            mixed = mixed + weights[..., n + i, None] * value
        x = states + self.attn_output(mixed.transpose(1, 2).flatten(-2))
        y = self.norm(x, self.ffn_norm)
        return x + self.ffn_down(nn.functional.silu(self.ffn_gate(y)) * self.ffn_up(y))


@torch.no_grad()
def new_head(file: GGUFFile, target: Target, texts: Texts) -> Head:
    """A head that begins as the best linear guess of the target's final state, computed by ridge regression.

    x = A inputs[P] + B embedding[P+1]: A is fc; B goes through the attention, whose queries and keys are one random map
    of the token, so that a pair first attends to itself (and its like): values are B, the output matrix is one.
    """
    head = Head(file)
    n = head.width
    head.output_norm.copy_(target.norm)
    places = np.concatenate([np.arange(texts.first[i] + 1, texts.first[i + 1] - 1) for i in texts.trained])
    following = torch.from_numpy(np.concatenate([texts.tokens[i][2:-1] for i in texts.trained])).long()
    sample = texts.states[places[:: max(1, len(places) // 20000)], : 3 * n].float()
    head.scale.copy_(1 / sample.std(0).clamp(min=1e-3))
    gram, moment = torch.zeros(4 * n, 4 * n), torch.zeros(4 * n, n)
    for start in range(0, len(places), 8192):
        at = torch.from_numpy(places[start : start + 8192])
        tokens = head.norm(target.table[following[start : start + 8192]], head.attn_norm)
        x = torch.cat([texts.states[at, : 3 * n].float() * head.scale, tokens], 1)
        gram += x.T @ x
        moment += x.T @ (texts.states[at + 1, 3 * n :].float() / target.norm)
    gram += RIDGE * gram.diagonal().mean() * torch.eye(4 * n)
    both = torch.linalg.solve(gram, moment).T
    for module in head.children():
        nn.init.normal_(module.weight, std=module.in_features**-0.5)
    head.fc.weight.copy_(both[:, : 3 * n])
    head.attn_v.weight.mul_(0.1)[:, :n] = both[:, 3 * n :]
    head.attn_output.weight.copy_(torch.eye(n))
    alike = torch.randn(n, n) * n**-0.5
    for matrix in (head.attn_q.weight, head.attn_k.weight):
        matrix.mul_(0.1)[:, :n] = alike
    head.ffn_down.weight.zero_()
    head.output_norm.mul_(SURE)
    return head


def unrolled(head: Head, target: Target, tokens: Tensor, inputs: Tensor, steps: int) -> Iterator[Tensor]:
    """States after each drafted step at every place: step s at place P has read token P+1+s and predicts P+2+s."""
    n = inputs.shape[1]
    embeddings = target.table[nn.functional.pad(tokens, (0, steps))]
    states = head.encode(inputs)
    cache: list[tuple[Tensor, Tensor]] = []
    for step in range(steps):
        states = head(embeddings[:, 1 + step : 1 + step + n], states, cache)
        yield states


def shifted(values: Tensor, by: int) -> Tensor:
    """values[:, P + by] at P, zeros beyond the end."""
    return nn.functional.pad(values[:, by:], (0, 0) * (values.dim() - 2) + (0, by))


# ---- training ----


class Optimizers:
    """Muon for the matrices, which need fewer updates with it, and Adam for the rest; one schedule for both."""

    def __init__(self, head: Head, n_updates: int) -> None:
        matrices = [parameter for parameter in head.parameters() if parameter.dim() == 2]
        vectors = [parameter for parameter in head.parameters() if parameter.dim() == 1]
        self.parameters, self.n_updates = [*matrices, *vectors], n_updates
        muon = torch.optim.Muon(matrices, RATE, weight_decay=WEIGHT_DECAY, adjust_lr_fn="match_rms_adamw")
        self.all = [muon, torch.optim.AdamW(vectors, 3 * RATE, betas=(0.9, 0.98), weight_decay=0.0)]

    def step(self, update: int) -> None:
        """Linear warm-up, then half a cosine down to a fiftieth."""
        share = min((update + 1) / WARM_UP, 0.51 + 0.49 * math.cos(math.pi * update / self.n_updates))
        nn.utils.clip_grad_norm_(self.parameters, 1.0)
        for optimizer in self.all:
            optimizer.param_groups[0]["lr"] = optimizer.defaults["lr"] * share
            optimizer.step()
            optimizer.zero_grad()


def loss_of(
    head: Head, target: Target, batch: tuple[Tensor, Tensor, Tensor], steps: int, usual: Tensor, rng: torch.Generator
) -> Tensor:
    """Cross entropy, over the tokens of the answers, the usual ones and some others, to the target's own distribution
    and to its first token, half and half, at every place, prompts included; step s weighs 0.8^s, as in the paper."""
    tokens, states, answer = batch
    inputs, finals = states[..., : 3 * head.width], states[..., 3 * head.width :]
    inputs = inputs + NOISE / head.scale * torch.randn(inputs.shape, generator=rng)  # against learning texts by heart
    others = torch.randint(len(target.head), (N_OTHERS,), generator=rng)
    ids = torch.cat([tokens[:, 1:][answer[:, 1:]], usual, others]).unique()
    rows = target.head[ids].to(torch.bfloat16)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        known = states[..., -1] != 0  # not padding
        known[:, :FIRST] = False
        soft = (finals[known] @ rows.T).float().softmax(-1)  # final state P predicts token P+1
        labels = soft.argmax(-1)
        soft.mul_(0.5)[torch.arange(len(labels)), labels] += 0.5
        index = torch.full(known.shape, -1)
        index[known] = torch.arange(len(labels))
    total = torch.zeros(())
    with torch.autocast("cpu", torch.bfloat16):
        for step, made in enumerate(unrolled(head, target, tokens, inputs, steps)):
            teacher = shifted(index + 1, 1 + step) - 1  # of the state P+1+s, which predicts token P+2+s
            valid = teacher >= 0
            logits = (head.norm(made[valid], head.output_norm) @ rows.T).float()
            total = total + 0.8**step * nn.functional.cross_entropy(logits, soft[teacher[valid]])
    return total


@torch.no_grad()
def acceptance(head: Head, target: Target, texts: Texts, which: Sequence[int]) -> list[float]:
    """Of places of the answers, the share of right first drafts; of those, of right seconds; and so on."""
    right, asked = [0] * STEPS, [0] * STEPS
    for start in range(0, len(which), 8):
        tokens, states, answer = texts.batch(which[start : start + 8])
        alive = torch.ones(states.shape[:2], dtype=torch.bool)
        with torch.autocast("cpu", torch.bfloat16):
            for step, made in enumerate(unrolled(head, target, tokens, states[..., : 3 * head.width], STEPS)):
                alive &= shifted(answer, 2 + step)[:, : alive.shape[1]]
                best = (head.norm(made[alive], head.output_norm) @ target.head.T).argmax(-1)
                same = best == shifted(tokens, 2 + step)[:, : alive.shape[1]][alive]
                asked[step] += len(same)
                right[step] += int(same.sum())
                alive[alive.clone()] = same
    return [r / max(a, 1) for r, a in zip(right, asked, strict=True)]


def train(saved: Path, texts: Texts, file: GGUFFile, target: Target) -> Head:
    """A pass over the texts with one step a place, then N_SECOND updates with STEPS. Goes on from `saved`."""
    torch.manual_seed(0)
    rng = torch.Generator().manual_seed(0)
    labels = np.concatenate([texts.tokens[i][texts.begins[i] :] for i in texts.trained])
    usual = torch.from_numpy(np.argsort(-np.bincount(labels), kind="stable")[:N_USUAL].copy())
    batches = [(1, which) for which in texts.order(0, 2 * BATCH)]
    batches += [(STEPS, which) for which in texts.order(1, BATCH)[:N_SECOND]]
    n = len(batches)
    total = sum(map(len, texts.tokens))
    log(f"{len(texts.trained)} texts, {len(labels)} tokens of answers, {total} in all, {n} updates")
    head = Head(file) if saved.exists() else new_head(file, target, texts)
    optimizers, done = Optimizers(head, n), 0
    if saved.exists():
        state = torch.load(saved, weights_only=False)
        head.load_state_dict(state["head"])
        for optimizer, saved_state in zip(optimizers.all, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved_state)
        done = state["update"]
        rng.set_state(state["rng"])
    started, losses = time.perf_counter(), []
    for update, (steps, which) in enumerate(batches[done:], done + 1):
        loss = loss_of(head, target, texts.batch(which), steps, usual, rng)
        loss.backward()
        optimizers.step(update - 1)
        losses.append(loss.item())
        if update % 100 == 0 or update == n:
            state = {"head": head.state_dict(), "update": update, "rng": rng.get_state()}
            state["optimizers"] = [optimizer.state_dict() for optimizer in optimizers.all]
            with write_whole(saved, CACHED) as out:
                torch.save(state, out)
            shares = ", ".join(f"{a:.3f}" for a in acceptance(head, target, texts, texts.held[:24]))
            seconds = time.perf_counter() - started
            log(f"update {update} ({steps} steps): loss {np.mean(losses):.3f}; held out: {shares}; {seconds:.0f} s")
            losses = []
    return head


# ---- the file, and whether llama.cpp computes the same ----


def export(path: Path, head: Head, file: GGUFFile, target: Target, layers: Sequence[int], type_: str) -> None:
    """An EAGLE-3 GGUF: all rows of the head, no d2t, token embeddings left to the target, its tokenizer copied."""
    values = {
        "context_length": file.integer("llama.context_length"),
        "embedding_length": head.width,
        "block_count": 1,
        "feed_forward_length": head.n_ff,
        "attention.head_count": head.n_head,
        "attention.head_count_kv": head.n_head,
        "attention.layer_norm_rms_epsilon": head.epsilon,
        "rope.freq_base": head.base,
        "rope.dimension_count": head.size,
        "vocab_size": len(target.head),
        "target_layers": np.array(layers),
        "target_hidden_size": head.width,
        "norm_before_residual": False,
    }
    copied = [
        key for key in file.fields if key.startswith("tokenizer.") or key in ("general.license", "general.basename")
    ]
    fields = [
        writer.field("general.architecture", EAGLE3),
        writer.field("general.name", f"{file.get('general.name')} EAGLE-3"),
        *(writer.field(f"{EAGLE3}.{key}", value) for key, value in values.items()),
        *(file.raw(key) for key in copied),
    ]
    matrices = {name.removesuffix(".weight"): parameter.detach() for name, parameter in head.named_parameters()}
    matrices |= {"fc": matrices["fc"] * head.scale, "output": target.head}
    pieces = []
    for name, matrix in matrices.items():
        kind = GGMLQuantizationType[type_ if matrix.dim() > 1 else "F32"]
        data = matrix.float().numpy().astype("<f2" if kind == GGMLQuantizationType.F16 else "<f4").tobytes()
        prefix = "" if name in ("fc", "output", "output_norm") else "blk.0."
        tensor = reader.Tensor(f"{prefix}{name}.weight", tuple(matrix.shape[::-1]), kind, 0, len(data))
        pieces.append(writer.Piece(tensor, data=data))
    with write_whole(path, CACHED) as out:
        writer.Output(fields, pieces, reader.DEFAULT_ALIGNMENT).write(out, out)


@torch.no_grad()
def check(path: Path, head: Head, target: Target, file: GGUFFile, answers: list[TargetAnswer], n_compared: int) -> None:
    """Draft from every place of the answers in llama.cpp, over the target's own states; compare the logits of the first
    answers with PyTorch's."""
    n_ctx = max(len(answer.prompt) + len(answer.answer) for answer in answers) + 8
    tally: dict[str, np.ndarray] = {}  # by label: right drafts and drafts of each step
    gaps, spreads, agree = [], [], 0
    with Model(file.path) as judge, Model(path) as model, Context(judge, n_ctx) as context:
        exported = Eagle3Head.of(GGUFFile(path))
        recorded = Recorded.of(context, file.architecture, exported.layers)
        with PairContext(model, n_ctx, other=context) as pairs:
            for number, answer in enumerate(answers):
                tokens = [*answer.prompt, *answer.answer]
                context.truncate(0)
                context.decode(tokens[:-1], 0)
                reading = StateFedReading(pairs, recorded, exported)
                if number < n_compared:
                    given = torch.from_numpy(recorded.rows[: len(tokens) - 1]).clone()[None]
                    steps = unrolled(head, target, torch.tensor([tokens]), given, STEPS)
                    made = [head.norm(states, head.output_norm)[0] for states in steps]
                counts = tally.setdefault(answer.label, np.zeros((STEPS, 2), int))
                for place in range(max(len(answer.prompt) - 2, 0), len(tokens) - 2):
                    logits, _ = reading.begin(tokens[: place + 2])
                    for step, token in enumerate(tokens[place + 2 : place + 2 + STEPS]):
                        best = int(logits.argmax())
                        if number < n_compared:
                            mine = (target.head @ made[step][place]).numpy()
                            gaps.append(np.abs(mine - logits).max())
                            spreads.append(logits.std())
                            agree += int(mine.argmax()) == best
                        counts[step] += best == token, 1
                        if best != token:
                            break
                        logits, _ = reading.follow(token)
    if gaps:
        log(f"{path.name}: {len(gaps)} rows of logits, greatest difference {max(gaps):.2g} (they spread by "
            f"{np.mean(spreads):.2g}), the same first token in {agree}")  # fmt: skip
    for label, counts in {"all": sum(tally.values()), **tally}.items():
        shares = ", ".join(f"{right / max(drafts, 1):.3f}" for right, drafts in counts)
        print(f"{label}: {counts[0, 1]} places; right first, second, third drafts: {shares}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("target", type=Path)
    parser.add_argument("--prompts", type=Path, help="a parquet file with a column of questions")
    parser.add_argument("--layers", type=int, nargs=3, default=[2, 15, 27], help="of the target, whose inputs are read")
    parser.add_argument("--part", default="1/1", help="the part of the texts to make: 1/2 and 2/2 on two cores")
    parser.add_argument("--no-texts", action="store_true", help="train on those that are there")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--judge", type=Path, help="answers of `python -m corpus generate` never trained on, to check")
    options = parser.parse_args()
    folder, file = options.folder, GGUFFile(options.target)
    folder.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(options.threads)
    if not options.no_texts:
        make_texts(folder, file, options.layers, options.prompts, options.part, options.threads)
    target, texts = Target(file), Texts(folder, 4 * file.integer("llama.embedding_length"))
    head = train(folder / "head.pt", texts, file, target)
    for type_ in ("F32", "F16"):
        export(folder / f"eagle3-{type_.lower()}.gguf", head, file, target, options.layers, type_)
    cuts = [(texts.tokens[i].tolist(), texts.begins[i]) for i in texts.held[:N_JUDGED]]
    own = [TargetAnswer("", "own", tokens[:begins], tokens[begins:]) for tokens, begins in cuts]
    check(folder / "eagle3-f32.gguf", head, target, file, own[:N_COMPARED], N_COMPARED)
    check(folder / "eagle3-f16.gguf", head, target, file, own, N_COMPARED)
    if options.judge is not None:
        check(folder / "eagle3-f16.gguf", head, target, file, read_answers(options.judge, len(target.head)), 0)


if __name__ == "__main__":
    main()
