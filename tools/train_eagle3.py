"""Trains an EAGLE-3 head (arXiv 2503.01840) for a small llama-type target, on its own answers: see docs/eagle3.md."""

from __future__ import annotations

import json
import time
from pathlib import Path

import click
import torch
from gguf.constants import GGMLQuantizationType

from corpus.answers import read_answers
from llamabase.cli.command import FILE, OneCommand
from llamabase.errors import TrimError
from llamabase.files import CACHED, read_text, sha256_of, write_whole
from llamabase.gguf.reader import GGUFFile

from .eagle3.check import check
from .eagle3.head import export
from .eagle3.target import Target
from .eagle3.texts import Prompts, Texts, make_texts
from .eagle3.training import Training, finished

N_JUDGED, N_COMPARED = 24, 2  # texts of the check: drafted for, and compared logit by logit


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
        torch.set_float32_matmul_precision("high")  # TF32: logits have more digits than in bfloat16
        torch.backends.cuda.enable_cudnn_sdp(False)  # cuDNN plans anew for every length of the cache
    file = GGUFFile(target)
    model = Target(file, device)
    layers = (2, model.n_layer // 2, model.n_layer - 3)  # low, middle and high, as in the paper

    def time_is_up() -> bool:
        return minutes is not None and time.monotonic() - started > 60 * minutes

    mark, digest = folder / "target.sha256", sha256_of(target)
    if not mark.exists():
        with write_whole(mark, CACHED) as out:
            out.write(digest.encode())
    elif read_text(mark) != digest:
        raise TrimError(f"{folder}: holds the texts of another target than {target}; choose another folder")
    head, held = finished(folder, file, device), folder / "held.json"
    if head is None:
        is_done = make_texts(folder, model, Prompts.of(file, prompts), texts, time_is_up)
        if is_done:
            made = Texts(folder, device)
            with write_whole(held, CACHED) as out:
                out.write(json.dumps(made.answers(N_JUDGED)).encode())
            head, is_done = Training(made, file, model, layers).run(folder, time_is_up)
        if head is None or not is_done:
            click.echo(f"{folder}: stopped after {minutes} minutes; the same command goes on", err=True)
            return
    heads = {
        folder / "eagle3-f16.gguf": (GGMLQuantizationType.F16, model.head),
        folder / "eagle3-q8_0.gguf": (GGMLQuantizationType.Q8_0, None),
    }
    for path, (type_, rows) in heads.items():
        export(path, head, file, layers, type_, rows)
        for judging in filter(None, (held, judge)):
            for line in check(path, head, model, file, read_answers(judging, len(model.head)), N_COMPARED).lines():
                click.echo(f"{path.name}, {judging.name}: {line}")


if __name__ == "__main__":
    main()
