"""python -m runner.serve, or gguf-run serve: HTTP for clients of OpenAI's API, and a page."""

from __future__ import annotations

from llamabase.cli.interrupt import leave_to_the_system

if __name__ == "__main__":
    leave_to_the_system()  # until the command begins; the imports take a while

import asyncio
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import click

from llamabase.cli.command import OneCommand, more
from llamabase.cli.progress import doing, stderr
from llamabase.errors import TrimError
from llamabase.sampling.settings import Sampling
from runner.options import Models, model_options, open_measured, sampling_options, template_kwargs_option

PATIENCE = 2.0  # seconds that running answers get to end when the server is told to end
BATCH = 1.5  # seconds that the last batch gets after that


@click.command(cls=OneCommand)
@model_options
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on; 0.0.0.0: all.")
@click.option("--port", type=click.IntRange(0, 65535), default=8080, show_default=True, help="0 picks a free one.")
@click.option("--api-key", default="", envvar="LLAMA_API_KEY", metavar="KEY", help="The key that clients must send.")
@more("-a", "--alias", metavar="NAME", help="The model's name for clients.  [default: its file's]")
@click.option(
    "-np",
    "--parallel",
    type=click.IntRange(1, 256),
    default=4,
    show_default=True,
    help="Conversations at once, and remembered.",
)
@more("--queue", "waiting", type=click.IntRange(1), default=64, show_default=True, help="Requests that may wait.")
@click.option(
    "--share-answers",
    is_flag=True,
    help="Draft from the answers of all conversations; timing may tell them of others'.",
)
@click.option("--metrics", is_flag=True, help="Serve figures at /metrics, for Prometheus.")
@more("--cors", multiple=True, metavar="ORIGIN", help="Accept pages from there; * for all. Can be repeated.")
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

    Samplers and --draft-max are the defaults of requests.
    """
    try:
        import uvicorn

        from .app import make_app
        from .loading import Door
        from .server import Server, Settings
    except ImportError as error:
        raise TrimError(f"serving needs the extra: pip install 'gguf-trim[serve]' ({error})") from error
    if seed is not None:
        raise click.UsageError("--seed: each request gives its own; leave it out")
    with _bound(host, port) as listening:
        at, taken = listening.getsockname()[:2]
        url = f"http://{at if ':' not in at else f'[{at}]'}:{taken}"
        door = Door(doing)
        with _Signals() as signals, _Http(uvicorn.Config(door, log_level="warning", lifespan="off"), listening) as http:
            stderr.print(f"{url} says what is being done until the model is ready", markup=False)
            engine = open_measured(models, draft_max != 0, serving["parallel"])
            name = alias or engine.model.path.stem
            server = Server(engine, Settings(name, sampling, draft_max, **serving))
            try:
                door.open(make_app(server))
                stderr.print(f"{name} listens on {url}", markup=False)
                with suppress(KeyboardInterrupt):  # raised by a signal that came before the wait
                    signals.wait_for_one()
                if server.conversations.busy:
                    stderr.print(f"ends once running answers have, in {PATIENCE:.0f} seconds at most", markup=False)
                http.end(server.conversations.stop)
            finally:
                ended = server.conversations.close(BATCH)
            if not ended:  # the system frees the memory
                sys.stderr.flush()
                os._exit(0)


class _Signals:
    """SIGTERM and Ctrl-C, the latter even if the shell made the process ignore it.

    Both raise KeyboardInterrupt, so that unfinished files are removed; the process then ends with 130 for Ctrl-C and
    with 0 for SIGTERM. Once `wait_for_one` is called they raise nothing.
    """

    def __init__(self) -> None:
        self._terminated = False

    def __enter__(self) -> _Signals:
        # SIGINT gets Python's own handler, by which `interruptible` ends the loading of a model.
        handlers: dict[int, Any] = {signal.SIGTERM: self._terminate, signal.SIGINT: signal.default_int_handler}
        self._before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        if kind is KeyboardInterrupt and self._terminated:
            sys.exit(0)

    def _terminate(self, *_: object) -> None:
        self._terminated = True
        signal.raise_signal(signal.SIGINT)

    def wait_for_one(self) -> None:
        came = threading.Event()
        signal.signal(signal.SIGINT, lambda *_: came.set())
        came.wait()


class _Http:
    """uvicorn in a thread of its own, because the main thread loads models and receives signals."""

    def __init__(self, config: Any, listening: socket.socket) -> None:
        import uvicorn

        config.timeout_graceful_shutdown = int(PATIENCE) + 1
        self._http, self._listening = uvicorn.Server(config), listening
        self._thread = threading.Thread(target=self._run, name="http", daemon=True)

    def _run(self) -> None:
        asyncio.run(self._http.serve(sockets=[self._listening]))

    def end(self, stop: Callable[[], object]) -> None:
        """Take no more requests; running answers get PATIENCE seconds to end before `stop` is called."""
        later = threading.Timer(PATIENCE, stop)
        later.daemon = True
        later.start()
        self.__exit__()
        later.cancel()

    def __enter__(self) -> _Http:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._http.should_exit = True
        self._thread.join()


@contextmanager
def _bound(host: str, port: int) -> Iterator[socket.socket]:
    """A socket, bound before models are loaded. Raises TrimError if it cannot be bound."""
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.create_server(address[:2], family=family, reuse_port=False) as listening:
            # Its connections inherit this; asyncio sets it only for sockets of its own. Without it a small piece waits
            # up to 40 ms until the client acknowledges the last one.
            listening.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            yield listening
    except OSError as error:
        raise TrimError(f"{host}:{port}: cannot listen there: {error.strerror or error}; choose another") from error


if __name__ == "__main__":
    sys.exit(main(prog_name="python -m runner.serve"))
