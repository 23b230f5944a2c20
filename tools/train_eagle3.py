"""Trains an EAGLE-3 head (arXiv 2503.01840) for a small llama-type target, on its own answers and on a CPU.

    pip install -e .[corpus,train]
    python tools/train_eagle3.py W TARGET.gguf --prompts QUESTIONS.parquet

W is a folder to work in; what is already there is not made again, and either step can be interrupted and goes on. On
two cores the texts are made by two processes, `--part 1/2 --threads 1` and `--part 2/2 --threads 1`, and trained on
with `--no-texts` (docs/eagle3.md says for how long, and what came of it). Needs 16 GB of memory and of disk for three
million tokens. The steps, each from the files of the one before:

    texts   the target answers greedily what ships in corpus/, the questions of --prompts and what it makes up itself
            when given the beginning of a user's turn; its states are kept as it speaks (W/texts-*.npz)
    train   the head, unrolled as EAGLE-3's training-time test has it (W/head.pt, replaced now and then)
    export  W/eagle3-f32.gguf and W/eagle3-f16.gguf
    check   the same logits from PyTorch and llama.cpp, and the acceptance on texts never trained on

Conventions, which are llama.cpp's: the decoder's position P takes (token[P+1], g[P]) and predicts token P+2.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gguf
import llama_cpp
import numpy as np
import pyarrow.parquet
import torch
from torch import Tensor, nn

from corpus.generate import answers
from corpus.prompts import load_prompts, split, spread
from gguf_trim.format.state_fed import StateFedHead
from llamabase.gguf.reader import GGUFFile
from llamabase.gguf.vocabulary import Vocabulary
from llamabase.llama.context import Context
from llamabase.llama.model import Model
from llamabase.llama.quantize import quantize
from llamabase.llama.states import PairContext, Recorded
from llamabase.llama.template import ChatTemplate
from llamabase.sampling.settings import GREEDY

# How a user's turn may begin that the target makes up the rest of; most begin with nothing.
OPENINGS = [
    *[""] * 10,
    *("What", "How", "Write", "Explain", "Who", "Can you", "I", "Translate", "Summarize", "Read the following"),
    *("Article:", "Context:", "Given the text", "A", "Compare", "If"),
]
LONG_OPENINGS = [
    *("Summarize: ", "Read this and answer the question after it.\n\n", "Article:\n\n", "Translate: ", "Context: "),
]
N_PARALLEL = 64
MOST_LONG = 350  # tokens of a long turn of the user's
MOST_MADE_UP, MOST_ANSWER, MOST_PROMPT = 100, 200, 400  # tokens
SHARD = 64  # texts of a file
Begun = tuple[str, list[int], int]
Judged = tuple[str, list[int], int]  # a label, tokens, and the place of the answer's first
BATCH, STEPS = 2048, 3  # tokens of a batch; steps unrolled in the second pass
WIDER = 2  # the head's feed-forward part, over that of the target's layers
N_USUAL, N_OTHERS = 2048, 1024  # rows of the head beside those of the batch's tokens
WARM_UP, WEIGHT_DECAY, NOISE = 40, 0.1, 0.1
FIRST = 24  # places that are the system's turn in most texts
RIDGE, SURE = 0.003, 0.6  # of the first guess: its regularisation, and how much less sure it is than the target


@dataclass
class Text:
    """A text as it grows: tokens that are yet to be read are `forced`, later ones drawn or greedy."""

    name: str
    forced: deque[int]
    made_up: int  # tokens of the user's turn that may still be drawn
    noise: np.random.Generator
    tokens: list[int] = field(default_factory=list)
    states: list[np.ndarray] = field(default_factory=list)  # float16: layer inputs, then the final state
    begins: int = -1  # place of the answer's first token


def beginnings(
    template: ChatTemplate, model: Model, questions: Path | None, n: int, n_made_up: int, n_long: int
) -> list[Begun]:
    """(name, token ids, how many tokens of a user's turn are still to be made up), in a mixed order."""
    found: list[Begun] = []
    for prompt in split(load_prompts(), "calibrate"):
        found.append((f"ready-{prompt.id}", template.ids(model, prompt.messages), 0))
    if questions is not None:
        column = pyarrow.parquet.read_table(questions, columns=["question"])["question"].to_pylist()
        for i, text in enumerate(column[:n]):
            found.append((f"question-{i}", template.ids(model, [{"role": "user", "content": text}]), 0))
    head, _, _ = template.text([{"role": "user", "content": "\0"}]).partition("\0")
    for i in range(n_made_up):
        opening = OPENINGS[i % len(OPENINGS)]
        found.append((f"own-{i}", model.tokenize(head + opening, add_bos=False), MOST_MADE_UP))
    for i in range(n_long):
        opening = LONG_OPENINGS[i % len(LONG_OPENINGS)]
        found.append((f"long-{i}", model.tokenize(head + opening, add_bos=False), MOST_LONG))
    found = [each for each in found if len(each[1]) <= MOST_PROMPT]
    return [found[i] for i in np.random.default_rng(0).permutation(len(found))]


def drawn(logits: np.ndarray, noise: np.random.Generator) -> int:
    weights = np.exp(logits - logits.max()).cumsum()
    return int(np.searchsorted(weights, noise.random(dtype=np.float32) * weights[-1]))


def speak(
    folder: Path, target: Path, layers: list[int], waiting: deque[Begun], tail: str, threads: int, part: str
) -> None:
    """Answer what is waiting, many at a time, a token of each in every batch, and write shards of whole texts."""
    fast = folder / "target-bf16.gguf"  # the same weights, in a type whose kernels are three times as fast
    if not fast.exists():
        quantize(target, fast, "BF16")
    model = Model(fast)
    end = model.tokenize(tail, add_bos=False)
    n_each = MOST_PROMPT + MOST_MADE_UP + MOST_ANSWER + 32
    context = Context(model, N_PARALLEL * n_each, threads, n_outputs=N_PARALLEL, n_sequences=N_PARALLEL, unified=False)
    inputs = Recorded.of(context, GGUFFile(target).architecture, layers)
    llama_cpp.llama_set_embeddings(context.handle, True)  # the final states, too
    memory = llama_cpp.llama_get_memory(context.handle)
    running: list[Text | None] = [None] * N_PARALLEL
    held: list[list[int]] = [[] for _ in running]  # what each sequence's cache holds
    kept: list[list[np.ndarray]] = [[] for _ in running]
    done: list[Text] = []
    shard = len(list(folder.glob(f"texts-{part}*.npz")))
    started, n_tokens = time.perf_counter(), 0
    while waiting or sum(text is not None for text in running) > N_PARALLEL // 8:
        fed = []
        for i, text in enumerate(running):
            if text is None and waiting:
                name, ids, made_up = waiting.popleft()
                text = running[i] = Text(name, deque(ids), made_up, np.random.default_rng([1, *name.encode()]))
                same = 0  # the system's turn, mostly, is in the cache already
                while same < min(len(ids) - 1, len(held[i])) and ids[same] == held[i][same]:
                    text.tokens.append(text.forced.popleft())
                    same += 1
                text.states = kept[i][:same]
                llama_cpp.llama_memory_seq_rm(memory, i, same, -1)
            if text is None:  # nothing is left to do: a token for a batch of the same shape
                context.drop(i)
                fed.append((0, 0))
            else:
                fed.append((text.forced.popleft(), len(text.tokens)))
                text.tokens.append(fed[-1][0])
        n = len(fed)
        logits = context.decode_each([t for t, _ in fed], range(n), [p for _, p in fed], [True] * n)
        inputs.take(0, n)
        states = np.concatenate([inputs.rows[:n], context.hidden_states(n)], axis=1).astype(np.float16)
        for i, text in enumerate(running):
            if text is None:
                continue
            n_tokens += 1
            text.states.append(states[i])
            if text.forced:
                continue
            if text.made_up:
                token = drawn(logits[i], text.noise)
                text.made_up -= 1
                if model.is_end(token) or not text.made_up:
                    text.forced.extend(end)
                    text.made_up = 0
                else:
                    text.forced.append(token)
                continue
            token = int(logits[i].argmax())
            if text.begins < 0:
                text.begins = len(text.tokens)
            text.forced.append(token)
            if model.is_end(token) or len(text.tokens) - text.begins >= MOST_ANSWER:
                held[i], kept[i], running[i] = text.tokens, text.states, None
                text.tokens = [*text.tokens, token]
                done.append(text)
        if len(done) >= SHARD or not (waiting or any(running)):
            write_shard(folder / f"texts-{part}{shard:03}.npz", done)
            rate = n_tokens / (time.perf_counter() - started)
            print(
                f"shard {shard}: {n_tokens} tokens, {rate:.0f}/s, {len(waiting)} waiting", file=sys.stderr, flush=True
            )
            shard, done = shard + 1, []
    if done:
        write_shard(folder / f"texts-{part}{shard:03}.npz", done)
    context.close()
    model.close()


def write_shard(path: Path, texts: list[Text]) -> None:
    part = path.with_suffix(".part")
    with open(part, "wb") as file:
        np.savez(
            file,
            names=np.array([text.name for text in texts]),
            tokens=np.concatenate([text.tokens for text in texts]).astype(np.int32),
            lengths=np.array([len(text.tokens) for text in texts]),
            begins=np.array([text.begins for text in texts]),
            states=np.concatenate([np.stack(text.states) for text in texts]),  # of all tokens but each text's last
        )
    part.replace(path)


def make_texts(options: argparse.Namespace) -> None:
    """What the folder lacks; what is there, by name, is not made again."""
    done = {name for path in options.folder.glob("texts-*.npz") for name in np.load(path)["names"].tolist()}
    file = GGUFFile(options.target)
    template = ChatTemplate(file, Vocabulary(file))
    with Model(options.target) as model:
        wanted = beginnings(template, model, options.prompts, options.n_prompts, options.n_made_up, options.n_long)
    todo = deque(begun for begun in wanted if begun[0] not in done)
    tail = template.text([{"role": "user", "content": "\0"}]).partition("\0")[2]
    if len(todo) > N_PARALLEL:  # the last few of a run are not waited for
        number, of = map(int, options.part.split("/"))
        todo = deque(list(todo)[number - 1 :: of])
        speak(options.folder, options.target, options.layers, todo, tail, options.threads, f"{options.part[0]}-")


# ---- the head, as llama.cpp's src/models/eagle3.cpp computes it ----


class Head(nn.Module):
    """One decoder layer over (token, state) pairs. Matrices have the target's shapes, its heads and its RoPE."""

    def __init__(self, target: GGUFFile) -> None:
        super().__init__()

        def value(key: str) -> float:
            return float(target.get(f"llama.{key}"))

        self.width, self.n_ff = int(value("embedding_length")), WIDER * int(value("feed_forward_length"))
        self.n_head = self.n_kv = int(value("attention.head_count"))  # the token goes through the values: all of it
        self.epsilon, self.base = value("attention.layer_norm_rms_epsilon"), value("rope.freq_base")
        self.size = self.width // self.n_head
        n, linear = self.width, lambda rows, columns: nn.Linear(columns, rows, bias=False)
        self.fc = linear(n, 3 * n)
        self.attn_q, self.attn_output = linear(n, 2 * n), linear(n, n)
        self.attn_k, self.attn_v = linear(self.n_kv * self.size, 2 * n), linear(self.n_kv * self.size, 2 * n)
        self.ffn_gate, self.ffn_up, self.ffn_down = linear(self.n_ff, n), linear(self.n_ff, n), linear(n, self.n_ff)
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

        `cache` holds keys and values of those calls, the first of which saw the target's states: a pair attends to the
        first call's up to its own row, to its own row of later calls, and to itself. So row a is what drafting from
        place a on computes.
        """
        batch, n, _ = embeddings.shape
        both = torch.cat([self.norm(embeddings, self.attn_norm), self.norm(states, self.attn_norm_2)], -1)

        def heads(x: Tensor, number: int) -> Tensor:
            return x.view(batch, n, number, self.size).transpose(1, 2)

        step, group = len(cache), self.n_head // self.n_kv
        q = self.rope(heads(self.attn_q(both), self.n_head), step).unflatten(1, (self.n_kv, group))
        k = self.rope(heads(self.attn_k(both), self.n_kv), step)[:, :, None]
        v = heads(self.attn_v(both), self.n_kv).float()[:, :, None]
        cache.append((k, v))
        scores = q @ cache[0][0].transpose(-1, -2)
        scores = scores.float() + torch.full((n, n), -torch.inf).triu(1)
        own = [(q * key).sum(-1, keepdim=True) for key, _ in cache[1:]]
        weights = (torch.cat([scores, *own], -1) / self.size**0.5).softmax(-1)
        found = (weights[..., :n] @ cache[0][1]).float()
        for i, (_, value) in enumerate(cache[1:]):
            found = found + weights[..., n + i, None] * value
        x = states + self.attn_output(found.flatten(1, 2).transpose(1, 2).flatten(-2))
        y = self.norm(x, self.ffn_norm)
        return x + self.ffn_down(nn.functional.silu(self.ffn_gate(y)) * self.ffn_up(y))


class Target:
    """What is taken of the target: its table, which is its head too, and its last norm."""

    def __init__(self, path: Path) -> None:
        tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}

        def values(name: str) -> Tensor:
            tensor = tensors[name]
            return torch.from_numpy(gguf.quants.dequantize(tensor.data, tensor.tensor_type).copy())

        self.table, self.norm = values("token_embd.weight"), values("output_norm.weight")
        self.head = values("output.weight") if "output.weight" in tensors else self.table


@torch.no_grad()
def new_head(file: GGUFFile, target: Target, texts: Texts) -> Head:
    """A head that begins as the best linear guess of the target's final state, found by ridge regression.

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


class Optimizers:
    """Muon for the matrices, which need fewer updates with it, and Adam for the rest; one schedule for both."""

    def __init__(self, head: Head, rate: float, n_updates: int) -> None:
        matrices = [parameter for parameter in head.parameters() if parameter.dim() == 2]
        vectors = [parameter for parameter in head.parameters() if parameter.dim() == 1]
        self.parameters, self.n_updates = [*matrices, *vectors], n_updates
        muon = torch.optim.Muon(matrices, rate, weight_decay=WEIGHT_DECAY, adjust_lr_fn="match_rms_adamw")
        self.all = [muon, torch.optim.AdamW(vectors, 3 * rate, betas=(0.9, 0.98), weight_decay=0.0)]
        self.rates = [rate, 3 * rate]

    def step(self, update: int) -> None:
        """Linear warm-up, then half a cosine down to a fiftieth."""
        share = min((update + 1) / WARM_UP, 0.51 + 0.49 * math.cos(math.pi * update / self.n_updates))
        nn.utils.clip_grad_norm_(self.parameters, 1.0)
        for optimizer, rate in zip(self.all, self.rates, strict=True):
            optimizer.param_groups[0]["lr"] = rate * share
            optimizer.step()
            optimizer.zero_grad()


# ---- texts ----


class Texts:
    """All texts of the shards; `held` are those never trained on."""

    def __init__(self, folder: Path, with_states: bool = True) -> None:
        shards = [np.load(path) for path in sorted(folder.glob("texts-*.npz"))]
        self.tokens = [t for d in shards for t in np.split(d["tokens"], d["lengths"].cumsum()[:-1])]
        self.begins = [int(b) for d in shards for b in d["begins"]]
        self.names = [str(name) for d in shards for name in d["names"]]
        states, filled = None, 0  # a shard at a time: they are most of the memory
        for shard in shards if with_states else ():
            part = shard["states"]
            if states is None:
                states = np.empty((sum(len(t) - 1 for t in self.tokens), part.shape[1]), np.float16)
            states[filled : filled + len(part)] = part
            filled += len(part)
        self.states = torch.empty(0) if states is None else torch.from_numpy(states)
        self.first = np.concatenate([[0], np.cumsum([len(t) - 1 for t in self.tokens])])
        own = [i for i, name in enumerate(self.names) if name.startswith("own-")]
        self.held = [i for i in own if int(self.names[i][4:]) % 40 == 7]
        self.trained = sorted(set(range(len(self.tokens))) - set(self.held))

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
        """Batches of about so many tokens, of texts of about one length, in a drawn order."""
        rng = np.random.default_rng([2, seed])
        lengths = np.array([len(self.tokens[i]) for i in self.trained])
        ranked = np.argsort(lengths + rng.uniform(0, 20, len(lengths)))
        batches: list[list[int]] = [[]]
        for place in ranked:
            if (len(batches[-1]) + 1) * lengths[place] > size:
                batches.append([])
            batches[-1].append(self.trained[place])
        return [batches[i] for i in rng.permutation(len(batches))]


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
            hidden = head.norm(made[valid], head.output_norm)
            logits = (hidden @ rows.T).float()
            loss = nn.functional.cross_entropy(logits, soft[teacher[valid]])
            total = total + 0.8**step * loss
    return total


@torch.no_grad()
def acceptance(head: Head, target: Target, texts: Texts, which: Sequence[int], steps: int = 3) -> list[float]:
    """Of places of the answers, the share of right first drafts; of those, of right seconds; and so on."""
    right, asked = [0] * steps, [0] * steps
    for start in range(0, len(which), 8):
        tokens, states, answer = texts.batch(which[start : start + 8])
        alive = torch.ones(states.shape[:2], dtype=torch.bool)
        with torch.autocast("cpu", torch.bfloat16):
            for step, made in enumerate(unrolled(head, target, tokens, states[..., : 3 * head.width], steps)):
                alive &= shifted(answer, 2 + step)[:, : alive.shape[1]]
                hidden = head.norm(made[alive], head.output_norm)
                best = (hidden @ target.head.T).argmax(-1)
                same = best == shifted(tokens, 2 + step)[:, : alive.shape[1]][alive]
                asked[step] += len(same)
                right[step] += int(same.sum())
                alive[alive.clone()] = same
    return [r / max(a, 1) for r, a in zip(right, asked, strict=True)]


def train(folder: Path, file: GGUFFile, target: Target, rate: float, n_second: int) -> Head:
    """A pass over the texts with one step a place, then some updates with STEPS. Goes on from W/head.pt."""
    torch.manual_seed(0)
    rng = torch.Generator().manual_seed(0)
    texts = Texts(folder)
    labels = np.concatenate([texts.tokens[i][texts.begins[i] :] for i in texts.trained])
    usual = torch.from_numpy(np.argsort(-np.bincount(labels), kind="stable")[:N_USUAL].copy())
    batches = [(1, which) for which in texts.order(0, 2 * BATCH)] + [
        (STEPS, which) for which in texts.order(1, BATCH)[:n_second]
    ]
    saved = folder / "head.pt"
    head = Head(file) if saved.exists() else new_head(file, target, texts)
    optimizers = Optimizers(head, rate, len(batches))
    print(
        f"{len(texts.trained)} texts, {len(labels)} tokens of answers, {sum(map(len, texts.tokens))} in all, "
        f"{len(batches)} updates", file=sys.stderr, flush=True
    )  # fmt: skip
    update = 0
    if saved.exists():
        state = torch.load(saved, weights_only=False)
        head.load_state_dict(state["head"])
        for optimizer, saved_state in zip(optimizers.all, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved_state)
        update = state["update"]
        rng.set_state(state["rng"])
    started, seen = time.perf_counter(), []
    while update < len(batches):
        steps, which = batches[update]
        loss = loss_of(head, target, texts.batch(which), steps, usual, rng)
        loss.backward()
        optimizers.step(update)
        update += 1
        seen.append(loss.item())
        if update % 100 == 0 or update == len(batches):
            state = {"head": head.state_dict(), "update": update, "rng": rng.get_state()}
            state["optimizers"] = [optimizer.state_dict() for optimizer in optimizers.all]
            torch.save(state, folder / "head.part")
            (folder / "head.part").replace(saved)
            figures = ", ".join(f"{a:.3f}" for a in acceptance(head, target, texts, texts.held[:24]))
            print(
                f"update {update} ({steps} steps): loss {np.mean(seen):.3f}; held out: {figures}; "
                f"{time.perf_counter() - started:.0f} s", file=sys.stderr, flush=True
            )  # fmt: skip
            seen = []
    return head


# ---- the file, and whether llama.cpp computes the same ----


def export(path: Path, head: Head, file: GGUFFile, target: Target, layers: Sequence[int], type_: Any) -> None:
    """An EAGLE-3 GGUF: all rows of the head, no d2t, token embeddings left to the target, its tokenizer copied."""
    part = path.with_suffix(".part")
    writer = gguf.GGUFWriter(part, "eagle3")
    writer.add_name(f"{file.get('general.name')} EAGLE-3")
    for key in ("general.license", "general.basename"):
        if (text := file.get(key)) is not None:
            writer.add_string(key, text)
    n = head.width
    writer.add_context_length(int(file.get("llama.context_length")))
    writer.add_embedding_length(n)
    writer.add_block_count(1)
    writer.add_feed_forward_length(head.n_ff)
    writer.add_head_count(head.n_head)
    writer.add_head_count_kv(head.n_kv)
    writer.add_layer_norm_rms_eps(head.epsilon)
    writer.add_rope_freq_base(head.base)
    writer.add_rope_dimension_count(head.size)
    writer.add_vocab_size(len(target.head))
    writer.add_array("eagle3.target_layers", list(layers))
    writer.add_uint32("eagle3.target_hidden_size", n)
    writer.add_bool("eagle3.norm_before_residual", False)
    for name, field_ in gguf.GGUFReader(file.path).fields.items():
        if name.startswith("tokenizer."):
            if field_.types[0] == gguf.GGUFValueType.ARRAY:
                writer.add_array(name, field_.contents())
            else:
                writer.add_key_value(name, field_.contents(), field_.types[0])
    matrices = {name: parameter.detach() for name, parameter in head.named_parameters()}
    matrices["fc.weight"] = matrices["fc.weight"] * head.scale
    matrices["output"] = target.head
    for name, values in matrices.items():
        name = name.removesuffix(".weight")
        prefix = "" if name in ("fc", "output", "output_norm") else "blk.0."
        array = values.float().numpy()
        writer.add_tensor(f"{prefix}{name}.weight", array.astype(type_) if array.ndim > 1 else array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    part.replace(path)


@torch.no_grad()
def check(path: Path, head: Head, target: Target, file: GGUFFile, which: list[Judged], compare: int = 0) -> None:
    """Draft from every place of the answers in llama.cpp, over the target's own states; compare the first texts' logits
    with PyTorch's."""
    n_ctx = max(len(tokens) for _, tokens, _ in which) + 8
    judge, model = Model(file.path), Model(path)
    context = Context(judge, n_ctx)
    layers = StateFedHead.of(GGUFFile(path)).layers
    inputs = Recorded.of(context, file.architecture, layers)
    pairs = PairContext(model, n_ctx, None, context)
    tally: dict[str, list[int]] = {}
    worst, agree, n_compared, spread = 0.0, 0, 0, []
    for number, (label, tokens, begins) in enumerate(which):
        context.truncate(0)
        pairs.truncate(0)
        context.decode(tokens[:-1], 0)
        g = pairs.encode(inputs.rows[: len(tokens) - 1])
        fed = 0
        if number < compare:
            given = torch.from_numpy(inputs.rows[: len(tokens) - 1]).clone()[None]
            ids = torch.tensor([tokens])
            torches = [head.norm(s, head.output_norm)[0] for s in unrolled(head, target, ids, given, STEPS)]
        counts = tally.setdefault(label, [0] * 2 * STEPS)
        for place in range(max(begins - 2, 0), len(tokens) - 2):
            if fed < place:
                pairs.truncate(fed)
                pairs.pairs(tokens[fed + 1 : place + 1], g[fed:place], False)
                fed = place
            pairs.truncate(place)
            state = g[place : place + 1]
            for step in range(min(STEPS, len(tokens) - 2 - place)):
                logits, state = pairs.pairs([tokens[place + 1 + step]], state, True)
                best, token = int(logits[0].argmax()), tokens[place + 2 + step]
                if number < compare:
                    mine = (target.head @ torches[step][place]).numpy()
                    worst = max(worst, float(np.abs(mine - logits[0]).max()))
                    spread.append(float(logits[0].std()))
                    agree += int(mine.argmax()) == best
                    n_compared += 1
                counts[2 * step] += best == token
                counts[2 * step + 1] += 1
                if best != token:
                    break
    print(f"{path.name}: {n_compared} rows of logits, greatest difference {worst:.2g} (they spread by "
          f"{np.mean(spread):.2g}), the same first token in {agree}", file=sys.stderr)  # fmt: skip
    groups = {"all": [sum(each) for each in zip(*tally.values(), strict=True)], **tally}
    for label, counts in groups.items():
        shares = ", ".join(f"{counts[2 * s] / max(counts[2 * s + 1], 1):.3f}" for s in range(STEPS))
        print(f"{label}: {counts[1]} places; right first, second, third drafts: {shares}", flush=True)
    pairs.close()
    context.close()
    model.close()
    judge.close()


def judged(path: Path, target: Path, n: int, n_tokens: int) -> list[Judged]:
    """The target's own greedy answers to some prompts of a file that were never trained on: for `check` alone."""
    file = GGUFFile(target)
    template = ChatTemplate(file, Vocabulary(file))
    with Model(target) as model:
        prompts = [
            (f"{i}", p.task, template.ids(model, p.messages)) for i, p in enumerate(spread(load_prompts(path), n))
        ]
        prompts = [(name, task, ids) for name, task, ids in prompts if len(ids) <= 1500]
        tasks = {name: task for name, task, _ in prompts}
        longest = max(len(ids) for *_, ids in prompts) + n_tokens
        with Context(model, 4 * longest, n_outputs=4, n_sequences=4) as context:
            found = answers(context=context, model=model, prompts=[(name, ids) for name, _, ids in prompts],
                            n_parallel=4, max_tokens=n_tokens, sampling=GREEDY)  # fmt: skip
            return [(tasks[a.id], [*a.prompt, *a.tokens], len(a.prompt)) for a in found]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("target", type=Path)
    parser.add_argument("--prompts", type=Path, help="a parquet file with a column of questions")
    parser.add_argument("--n-prompts", type=int, default=1500)
    parser.add_argument("--n-made-up", type=int, default=8000)
    parser.add_argument("--n-long", type=int, default=1200)
    parser.add_argument("--layers", type=int, nargs=3, default=[2, 15, 27])
    parser.add_argument("--part", default="1/1", help="The part of the texts to make: 1/2 and 2/2 on two cores.")
    parser.add_argument("--second", type=int, default=600, help="Updates with several steps unrolled.")
    parser.add_argument("--no-texts", action="store_true", help="train on those that are there")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rate", type=float, default=1e-3)
    parser.add_argument("--judge", type=Path, help="prompts never trained on, for the check")
    parser.add_argument("--n-judged", type=int, default=24)
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(options.threads)
    if not options.no_texts:
        make_texts(options)
    file, target = GGUFFile(options.target), Target(options.target)
    head = train(options.folder, file, target, options.rate, options.second)
    paths = {type_: options.folder / f"eagle3-{type_}.gguf" for type_ in ("f32", "f16")}
    for type_, path in paths.items():
        export(path, head, file, target, options.layers, {"f32": np.float32, "f16": np.float16}[type_])
    texts = Texts(options.folder, with_states=False)
    own = [("own", texts.tokens[i].tolist(), texts.begins[i]) for i in texts.held[: options.n_judged]]
    check(paths["f32"], head, target, file, own[:2], 2)
    check(paths["f16"], head, target, file, own, 2)
    if options.judge is not None:
        others = judged(options.judge, options.target, options.n_judged, 128)
        check(paths["f16"], head, target, file, others)


if __name__ == "__main__":
    main()
