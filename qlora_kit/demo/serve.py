"""Serve the page: on this machine alone unless told otherwise, without a word to anybody else."""

from __future__ import annotations

import os
import socket
import sys
import tempfile
import threading
from pathlib import Path
from typing import Any

from ..errors import KitError
from ..run import Run
from ..system.showing import harmless
from .guard import HERE, Guard

PORT = 7860
"""The first port that is tried where none is asked for."""
TRIED = 20
"""Ports that are tried, one after the other, where none is asked for."""
MOST_BYTES = 200 * 1024**2
"""The largest file that can be dropped in."""


def listening(host: str, port: int | None) -> socket.socket:
    """Return a socket that listens.

    Args:
        host: An address or name of this machine.
        port: The port, 0 for any that is free; None for the first free one from `PORT` on.

    Raises:
        KitError: When the port or all that are tried are taken, may not be used, or the host is not of this machine.
    """
    if port is not None and not 0 <= port <= 65_535:
        raise KitError(f"--port is {port}: allowed is 0 to 65535; 0 takes any that is free")
    problem: OSError | None = None
    for tried in range(PORT, PORT + TRIED) if port is None else [port]:
        try:
            family = socket.getaddrinfo(host, tried, type=socket.SOCK_STREAM)[0][0]
            return socket.create_server((host, tried), family=family)
        except OSError as error:
            problem = error
        except UnicodeError as error:
            raise KitError(f"--host {host!r:.60} is no address") from error
    said = problem.strerror if problem is not None else ""
    where = f"{PORT} to {PORT + TRIED - 1}" if port is None else f"{port}"
    raise KitError(f"the page cannot listen on {host}, port {where} ({said}): choose others with --host and --port")


def serve(run: Run, *, host: str = "127.0.0.1", port: int | None = None, reject_below: float = 0.0) -> None:
    """Load a run and serve its page until the process is told to end.

    Args:
        run: The run.
        host: Where to listen. Whoever reaches an address other than 127.0.0.1 can use the page.
        port: As in `listening`.
        reject_below: The limit that the page starts with, 0 to 1.

    Raises:
        KitError: When Gradio is not installed, the run cannot be loaded, or nothing can listen there.
    """
    _silence_gradio()
    try:
        import gradio  # noqa: F401  before anything is loaded
        import uvicorn
    except ImportError as error:
        raise KitError("the page needs the package gradio: pip install 'qlora_kit[demo]'") from error
    from .model import SharedRun, TrainingTexts
    from .page import make_page

    with listening(host, port) as channel, tempfile.TemporaryDirectory(prefix="qlora_kit_demo_") as name:
        os.environ["GRADIO_TEMP_DIR"] = name
        only_here = host in HERE
        _say(f"loading {run.path} …")
        shared = SharedRun(run)
        training, stop = TrainingTexts(shared), threading.Event()
        page = make_page(shared, training, Path(name), reject_below=reject_below, host=None if only_here else host)
        app = Guard(_application(page), Path(name), only_here=only_here)
        settings = uvicorn.Config(app, log_level="critical", timeout_graceful_shutdown=1, ws="none")
        reading = threading.Thread(target=training.read, args=[stop], daemon=True)
        reading.start()
        if not only_here:
            _say(f"warning: whoever reaches {host} can use this page; nobody is asked who they are")
        bound = channel.getsockname()[1]
        print(f"http://{f'[{host}]' if ':' in host else host}:{bound}    (Ctrl-C ends it)", flush=True)
        try:
            uvicorn.Server(settings).run(sockets=[channel])
        finally:
            stop.set()
            reading.join()


def _silence_gradio() -> None:
    """Set what Gradio reads from the environment: settings of the user's (to share, say) are for other pages."""
    for name in [name for name in os.environ if name.startswith("GRADIO_")]:
        del os.environ[name]
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"


def _application(page: Any) -> Any:
    """Return the page as an ASGI application: nothing shared, recorded or fetched, no file handed out but its own.

    Args:
        page: Gradio's `Blocks`.
    """
    import gradio as gr
    from fastapi import FastAPI

    from .answers import CSS

    font = gr.themes.Font
    # Fonts of the machine's own; greys and a blue that can be read on their grounds.
    theme = gr.themes.Base(font=[font("system-ui"), font("sans-serif")], font_mono=[font("monospace")]).set(
        body_text_color_subdued="*neutral_500",
        block_info_text_color="*neutral_500",
        button_primary_background_fill="*primary_600",
    )
    return gr.mount_gradio_app(
        FastAPI(openapi_url=None),
        page,
        path="/",
        footer_links=[],
        run_history=False,
        allowed_paths=[],
        show_error=False,
        max_file_size=MOST_BYTES,
        ssr_mode=False,
        pwa=False,
        mcp_server=False,
        enable_monitoring=False,
        theme=theme,
        css=CSS,
    )


def _say(text: str) -> None:
    print(harmless(text), file=sys.stderr, flush=True)
