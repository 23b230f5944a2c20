"""python -m corpus: count tokens. Data on stdout, everything else on stderr."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from .command import Commands
from .count import count
from .progress import progress, stderr
from .sources import files_of


@click.group(cls=Commands)
def main() -> None:
    """Count which tokens a target really emits."""


@main.command("count")
@click.argument("sources", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--tokenizer", type=click.Path(path_type=Path), required=True, help="A GGUF of the target's family.")
@click.option("-o", "--output", type=click.Path(path_type=Path), required=True, help="The counts file (.npz).")
@click.option("--field", default="text", show_default=True, help="The field of .jsonl lines that holds the text.")
def count_command(sources: tuple[Path, ...], tokenizer: Path, output: Path, field: str) -> None:
    """Count the tokens of SOURCES: text files, folders of them, .jsonl files."""
    total = sum(path.stat().st_size for path in files_of(list(sources)))
    with progress("counting", total, "B") as advance:
        counts = count(list(sources), tokenizer, field, advance)
    counts.save(output)
    stderr.print(f"{counts.total} tokens, {len(counts.ids)} different ones")
    click.echo(str(output))


if __name__ == "__main__":
    sys.exit(main(prog_name="python -m corpus"))
