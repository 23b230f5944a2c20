"""Training: EAGLE-3's training-time test (arXiv 2503.01840), from a head that begins as the best linear guess."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from llamabase.cli.progress import progress, stderr
from llamabase.errors import TrimError
from llamabase.files import CACHED, write_whole
from llamabase.gguf.reader import GGUFFile

from .head import Head, unrolled
from .target import Target
from .texts import Texts

STEPS, PASSES = 3, 2  # steps unrolled; times that each text is read
BATCH = {"cuda": 1 << 14, "cpu": 1 << 11}  # tokens of an update
N_USUAL, N_OTHERS = 4096, 1024  # rows of the head beside those of the batch's tokens
RATE, WARM_UP, WEIGHT_DECAY, NOISE = 1e-3, 40, 0.1, 0.1
FIRST = 24  # places that are the system's turn in most texts
RIDGE, SURE = 0.003, 0.6  # of the first guess: its regularisation, and its logits over the target's
N_GUESSED = 200_000  # tokens that the first guess is made of
N_SHOWN, EVERY = 24, 100  # held texts that progress is shown on; updates between that, and between checkpoints
PIECE = 16_000_000  # bytes of a file of a checkpoint: some ways to carry files take none above 16 MB


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


class Training:
    """A head in training. `usual`: the commonest tokens of the answers, whose logits are always trained."""

    def __init__(self, texts: Texts, file: GGUFFile, target: Target, layers: Sequence[int]) -> None:
        self.texts, self.file, self.target, self.layers = texts, file, target, layers
        answers = np.concatenate([texts.tokens[i][texts.begins[i] :] for i in texts.trained])
        usual = np.argsort(-np.bincount(answers), kind="stable")[:N_USUAL]
        self.usual = torch.from_numpy(usual.copy()).to(target.device)
        self.size = BATCH[target.device.type]
        self.batches = [which for seed in range(PASSES) for which in texts.order(seed, self.size)]

    def states(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """What the head reads, and the target's final states."""
        inputs, final = self.target.states(tokens, self.layers).split([3 * self.target.width, self.target.width], -1)
        return inputs, final

    @torch.no_grad()
    def new_head(self) -> Head:
        """A head that begins as the best linear guess of the target's final state, computed by ridge regression.

        x = A inputs[P] + B embedding[P+1]: A is fc; B goes through the attention, whose queries and keys are one random
        map of the token, so that a pair first attends to itself (and its like): values are B, the output matrix is one.
        """
        torch.manual_seed(0)
        head, target = Head(self.file), self.target
        n = head.width
        head.output_norm.copy_(target.norm)
        for module in head.children():
            nn.init.normal_(module.weight, std=module.in_features**-0.5)
        alike = torch.randn(n, n) * n**-0.5
        head = head.to(target.device)
        gram, moment = (torch.zeros(4 * n, width, device=target.device) for width in (4 * n, n))
        for i, which in enumerate(self.batches[: max(1, N_GUESSED // self.size)]):
            tokens, there, _ = self.texts.batch(which)
            inputs, final = self.states(tokens)
            known = there[:, 2:]  # the state at place 0 is unlike all others
            inputs, final = inputs[:, 1:-1][known], final[:, 2:][known]
            if not i:
                head.scale.copy_(1 / inputs.std(0).clamp(min=1e-3))
            x = torch.cat([inputs * head.scale, head.norm(target.table[tokens[:, 2:][known]], head.attn_norm)], 1)
            gram += x.T @ x
            moment += x.T @ (final / target.norm)
        gram += RIDGE * gram.diagonal().mean() * torch.eye(4 * n, device=target.device)
        both = torch.linalg.solve(gram, moment).T
        head.fc.weight.copy_(both[:, : 3 * n])
        head.attn_v.weight.mul_(0.1)[:, :n] = both[:, 3 * n :]
        head.attn_output.weight.copy_(torch.eye(n))
        for matrix in (head.attn_q.weight, head.attn_k.weight):
            matrix.mul_(0.1)[:, :n] = alike
        head.ffn_down.weight.zero_()
        head.output_norm.mul_(SURE)
        return head

    def loss(self, head: Head, which: Sequence[int], noise: torch.Generator) -> Tensor:
        """Cross entropy, over the tokens of the answers, the usual ones and some others, to the target's own
        distribution and to its first token, half and half, at every place, prompts included; step s weighs 0.8^s, as in
        the paper.
        """
        tokens, there, answer = self.texts.batch(which)
        inputs, final = self.states(tokens)
        device, (n_texts, n) = tokens.device, tokens.shape
        jitter = torch.randn(inputs.shape, generator=noise, device=device)  # against learning texts by heart
        others = torch.randint(len(self.target.head), (N_OTHERS,), generator=noise, device=device)
        rows = self.target.head[torch.cat([tokens[answer], self.usual, others]).unique()]
        known = there.clone()
        known[:, :FIRST] = False
        soft = (final[known] @ rows.T).softmax(-1)  # final state P predicts token P+1
        labels = soft.argmax(-1)
        places = torch.arange(len(labels), device=device)
        soft.mul_(0.5)[places, labels] += 0.5
        index = torch.full((n_texts, n + STEPS), -1, device=device)
        index[:, :n][known] = places
        total = torch.zeros((), device=device)
        inputs = inputs + NOISE / head.scale * jitter
        for step, made in enumerate(unrolled(head, self.target, tokens, inputs, STEPS)):
            teacher = index[:, 1 + step : 1 + step + n]  # of the state P+1+s, which predicts token P+2+s
            valid = teacher >= 0
            logits = head.norm(made[valid], head.output_norm) @ rows.T
            total = total + 0.8**step * nn.functional.cross_entropy(logits, soft[teacher[valid]])
        return total

    @torch.no_grad()
    def acceptance(self, head: Head, which: Sequence[int]) -> list[float]:
        """Of places of the answers, the share of right first drafts; of those, of right seconds; and so on."""
        right, asked = [0] * STEPS, [0] * STEPS
        for start in range(0, len(which), 8):
            tokens, _, answer = self.texts.batch(which[start : start + 8])
            n, alive = tokens.shape[1], torch.ones_like(answer)
            later, answered = (nn.functional.pad(values, (0, 1 + STEPS)) for values in (tokens, answer))
            for step, made in enumerate(unrolled(head, self.target, tokens, self.states(tokens)[0], STEPS)):
                alive &= answered[:, 2 + step : 2 + step + n]
                best = self.target.logits(head.norm(made[alive], head.output_norm)).argmax(-1)
                same = best == later[:, 2 + step : 2 + step + n][alive]
                asked[step] += len(same)
                right[step] += int(same.sum())
                alive[alive.clone()] = same
        return [r / max(a, 1) for r, a in zip(right, asked, strict=True)]

    def run(self, folder: Path, time_is_up: Callable[[], bool]) -> tuple[Head, bool]:
        """The head and whether it is done, which it is after PASSES over the texts. Goes on from the folder's
        checkpoint.
        """
        n, texts = len(self.batches), self.texts
        n_tokens = sum(len(texts.tokens[i]) for i in texts.trained)
        stderr.print(f"{len(texts.trained)} texts of {n_tokens} tokens, {n} updates")
        state = load(folder)
        if state is not None and state["of"] != n:
            raise TrimError(
                f"{folder}: its checkpoint is of other texts ({state['of']} updates, not {n}); remove its head-*.pt"
            )
        head = self.new_head() if state is None else Head(self.file).to(self.target.device)
        optimizers, done = Optimizers(head, n), 0
        if state is not None:
            head.load_state_dict(state["head"])
            for optimizer, saved in zip(optimizers.all, state["optimizers"], strict=True):
                optimizer.load_state_dict(saved)
            done = state["update"]
        losses, noise = [], torch.Generator(self.target.device)
        with progress("training", n, "updates") as advance:
            advance(done)
            while done < n and not time_is_up():
                loss = self.loss(head, self.batches[done], noise.manual_seed(done))
                loss.backward()
                optimizers.step(done)
                done += 1
                losses.append(loss.detach())
                advance(1)
                if done % EVERY == 0 or done == n:
                    shares = ", ".join(f"{a:.3f}" for a in self.acceptance(head, texts.held[:N_SHOWN]))
                    stderr.print(f"update {done}: loss {torch.stack(losses).mean().item():.3f}; held out: {shares}")
                    losses = []
                if done % EVERY == 0 and done < n:
                    save(folder, head, optimizers.all, done, n)
        save(folder, head, [] if done == n else optimizers.all, done, n)
        return head, done == n


def finished(folder: Path, file: GGUFFile, device: torch.device) -> Head | None:
    """The head of a folder whose training is done."""
    state = load(folder)
    if state is None or state["update"] < state["of"]:
        return None
    head = Head(file).to(device)
    head.load_state_dict(state["head"])
    return head


def save(folder: Path, head: Head, optimizers: Sequence[torch.optim.Optimizer], update: int, of: int) -> None:
    """Write a checkpoint, in pieces of PIECE bytes, and remove older ones."""
    buffer = io.BytesIO()
    states = [optimizer.state_dict() for optimizer in optimizers]
    torch.save({"head": head.state_dict(), "optimizers": states, "update": update, "of": of}, buffer)
    data = buffer.getbuffer()
    n = -(-len(data) // PIECE)
    names = [f"head-{update:06}-{i + 1:02}of{n:02}.pt" for i in range(n)]
    for i, name in enumerate(names):
        with write_whole(folder / name, CACHED) as file:
            file.write(data[i * PIECE : (i + 1) * PIECE])
    for path in folder.glob("head-*.pt"):
        if path.name not in names:
            path.unlink()


def load(folder: Path) -> dict[str, Any] | None:
    """The newest whole checkpoint; None if there is none. Raises TrimError if there are only pieces of one."""
    found: dict[tuple[int, int], list[Path]] = {}
    for path in sorted(folder.glob("head-*.pt")):
        if match := re.fullmatch(r"head-(\d+)-\d+of(\d+)\.pt", path.name):
            found.setdefault((int(match[1]), int(match[2])), []).append(path)
    whole = [key for key, paths in found.items() if len(paths) == key[1]]
    if found and not whole:
        (_, n), paths = min(found.items())
        raise TrimError(f"{folder}: has {len(paths)} of {n} pieces of a checkpoint; bring the others, or remove these")
    if not whole:
        return None
    data = b"".join(path.read_bytes() for path in found[max(whole)])
    state: dict[str, Any] = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    return state
