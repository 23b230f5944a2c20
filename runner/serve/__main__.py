"""python -m runner.serve, or gguf-run serve: HTTP for the clients of OpenAI's API, and a page to look at it."""

from __future__ import annotations

from llamabase.interrupt import leave_to_the_system

if __name__ == "__main__":
    leave_to_the_system()  # until the command begins; the imports take a while

import asyncio
import os
import signal
import socket
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import click

from llamabase.command import OneCommand
from llamabase.errors import TrimError
from llamabase.progress import stderr
from llamabase.sampling import Sampling

from ..options import Models, model_options, sampling_options, template_kwargs_option

PATIENCE = 2.0  # seconds that what runs may take to end when the server is told to
BATCH = 1.5  # and those that its last batch may take then


@click.command(cls=OneCommand)
@model_options
@click.option("--host", default="127.0.0.1", show_default=True, help="Where to listen; 0.0.0.0: to everybody.")
@click.option("--port", type=click.IntRange(0, 65535), default=8080, show_default=True, help="0 picks a free one.")
@click.option("--api-key", default="", envvar="LLAMA_API_KEY", metavar="KEY", help="What clients must give.")
@click.option("-a", "--alias", metavar="NAME", help="The model's name for clients.  [default: its file's]")
@click.option(
    "-np", "--parallel", type=click.IntRange(1, 256), default=4, show_default=True, help="Conversations remembered."
)
@click.option(
    "--queue", "waiting", type=click.IntRange(1), default=64, show_default=True, help="Requests that may wait."
)
@click.option("--metrics", is_flag=True, help="Give figures at /metrics, for Prometheus.")
@click.option("--cors", multiple=True, metavar="ORIGIN", help="Let pages from there ask; * for all. Can be repeated.")
@template_kwargs_option
@sampling_options
def main(
    models: Callable[[], Models],
    sampling: Sampling,
    draft_max: int | None,
    seed: int | None,
    host: str,
    port: int,
    alias: str | None,
    **serving: Any,
) -> None:
    """Serve a pair: OpenAI's chat and text completions at /v1, a page at /.

    Samplers and --draft-max are what requests get that ask for nothing else.
    """
    try:
        import uvicorn

        from .app import Server, Settings, make_app
    except ImportError as error:
        raise TrimError(f"serving needs the extra: pip install 'gguf-trim[serve]' ({error})") from error
    if seed is not None:
        raise click.UsageError("--seed is for each request to give")
    found = models()
    with _bound(host, port) as listening:
        engine = found.open()
        name = alias or found.target.stem
        if draft_max != 0:
            engine.measure()
        server = Server(engine, Settings(name, sampling, draft_max, **serving))
        config = uvicorn.Config(
            make_app(server), log_level="warning", timeout_graceful_shutdown=int(PATIENCE) + 1, lifespan="off"
        )
        at, taken = listening.getsockname()[:2]
        stderr.print(f"{name} listens on http://{at if ':' not in at else f'[{at}]'}:{taken}", markup=False)
        try:
            asyncio.run(_serve(uvicorn.Server(config), server, listening))
        finally:
            ended = server.conversations.close(BATCH)
        if not ended:  # the system frees everything
            sys.stderr.flush()
            os._exit(0)


async def _serve(http: Any, server: Any, listening: socket.socket) -> None:
    """Until SIGTERM or Ctrl-C; what runs then may end, for a while."""
    loop = asyncio.get_running_loop()

    def end() -> None:
        http.should_exit = True
        loop.call_later(PATIENCE, server.conversations.stop)

    http.capture_signals = nullcontext  # uvicorn would end the process by the signal
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, end)
    await http.serve(sockets=[listening])


@contextmanager
def _bound(host: str, port: int) -> Iterator[socket.socket]:
    """A socket, taken before models are loaded. Raises TrimError where it cannot be."""
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.create_server(address[:2], family=family, reuse_port=False) as listening:
            # Inherited by its connections; asyncio sets it for sockets of its own alone. Without it a small piece
            # waits for the client's word on the last one, up to 40 ms.
            listening.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            yield listening
    except OSError as error:
        raise TrimError(f"{host}:{port}: cannot listen there: {error.strerror or error}; choose another") from error


if __name__ == "__main__":
    sys.exit(main(prog_name="python -m runner.serve"))
