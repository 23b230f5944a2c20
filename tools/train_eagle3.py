"""Trains an EAGLE-3 head (arXiv 2503.01840) for a small llama-type target, on its own answers: see docs/eagle3.md."""

from __future__ import annotations

import time
from functools import partial
from pathlib import Path

import click
import torch
from gguf.constants import GGMLQuantizationType

from corpus.answers import TargetAnswer, read_answers
from llamabase.cli.command import FILE, OneCommand
from llamabase.gguf.reader import GGUFFile

from .eagle3.check import check
from .eagle3.head import export
from .eagle3.target import Target
from .eagle3.texts import Prompts, Texts, make_texts
from .eagle3.training import Training

N_JUDGED, N_COMPARED = 24, 2  # texts of the check: drafted for, and compared logit by logit

log = partial(click.echo, err=True)


@click.command(cls=OneCommand)
@click.argument("folder", type=click.Path(path_type=Path, file_okay=False))
@click.argument("target", type=FILE)
@click.option("--prompts", type=FILE, help="Parquet file with a column `question`, to ask beside the bundled prompts.")
@click.option("--texts", type=click.IntRange(32), default=100_000, show_default=True, help="Texts to train on.")
@click.option("--minutes", type=click.FloatRange(0), help="Stop after about this time; the same command goes on.")
@click.option("--judge", type=FILE, help="Answers of `python -m corpus generate` never trained on, to check.")
def main(
    folder: Path, target: Path, prompts: Path | None, texts: int, minutes: float | None, judge: Path | None
) -> None:
    """Train an EAGLE-3 head for TARGET, a GGUF of the architecture llama, on its own answers, on a GPU if there is one.

    FOLDER holds all that is made, in files of at most 16 MB but for the heads, and nothing is made twice: an
    interrupted run goes on. The steps:

    \b
    texts   greedy answers to prompts, and to user's turns that the target makes up
    train   the head, unrolled as in EAGLE-3's training-time test
    export  eagle3-f16.gguf with a head of its own, eagle3-q8_0.gguf with the target's
    check   PyTorch's logits and llama.cpp's, and the share of right drafts on texts
            never trained on
    """
    started = time.monotonic()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")  # TF32: logits with more digits than bfloat16 has, as fast
    file = GGUFFile(target)
    model = Target(file, device)
    layers = (2, model.n_layer // 2, model.n_layer - 3)  # low, middle and high, as in the paper

    def time_is_up() -> bool:
        return minutes is not None and time.monotonic() - started > 60 * minutes

    folder.mkdir(parents=True, exist_ok=True)
    going_on = f"{folder}: stopped after {minutes} minutes; the same command goes on"
    if not make_texts(folder, model, Prompts.of(file, prompts), texts, time_is_up):
        log(going_on)
        return
    made = Texts(folder, device)
    head, is_done = Training(made, file, model, layers).run(folder, time_is_up)
    if not is_done:
        log(going_on)
        return
    f16, q8_0 = folder / "eagle3-f16.gguf", folder / "eagle3-q8_0.gguf"
    export(f16, head, file, layers, GGMLQuantizationType.F16, model.head)
    export(q8_0, head, file, layers, GGMLQuantizationType.Q8_0, None)
    cuts = [(made.tokens[i].tolist(), made.begins[i]) for i in made.held[:N_JUDGED]]
    own = [TargetAnswer("", "own", tokens[:begins], tokens[begins:]) for tokens, begins in cuts]
    judged = [(f16, own), (q8_0, own)]
    if judge is not None:
        judged.append((f16, read_answers(judge, len(model.head))))
    for path, answers in judged:
        for line in check(path, head, model, file, answers, N_COMPARED).lines():
            print(f"{path.name}: {line}", flush=True)


if __name__ == "__main__":
    main()
