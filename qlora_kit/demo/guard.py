"""What stands before Gradio: who may ask, which files are handed out, and what the browser may load."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

HEADERS = {
    # Nothing is loaded from, or sent to, anywhere else. Gradio's page needs scripts within it, and compiles templates.
    "Content-Security-Policy": (
        "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval'; style-src 'self' 'unsafe-inline'; "
        "img-src 'self' data: blob:; font-src 'self' data:; worker-src 'self' blob:; object-src 'none'; "
        "base-uri 'self'; form-action 'self'; frame-ancestors 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
}
HERE = ("127.0.0.1", "localhost", "::1")
"""The names of this machine for itself."""

_Send = Callable[[Mapping[str, Any]], Awaitable[None]]


class Guard:
    """An ASGI application before another one.

    Args:
        app: The other one.
        folder: The only folder of which files are handed out.
        only_here: Whether the page is asked for by a name of this machine alone. A web page elsewhere can give its own
            name the address 127.0.0.1, and would else read the answers.
    """

    def __init__(self, app: Any, folder: Path, *, only_here: bool) -> None:
        self._app, self._folder, self._only_here = app, folder.resolve(), only_here

    async def __call__(self, scope: Mapping[str, Any], receive: Any, send: _Send) -> None:
        """Answer 403 to what is refused; hand on the rest, and add `HEADERS` to what comes back."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        why = self._refused(scope)
        if why is not None:
            headers = [(b"content-type", b"text/plain; charset=utf-8")]
            await send({"type": "http.response.start", "status": 403, "headers": headers})
            await send({"type": "http.response.body", "body": why.encode()})
            return

        async def with_headers(message: Mapping[str, Any]) -> None:
            if message["type"] == "http.response.start":
                added = [(name.lower().encode(), value.encode()) for name, value in HEADERS.items()]
                message = {**message, "headers": [*message.get("headers", []), *added]}
            await send(message)

        await self._app(scope, receive, with_headers)

    def _refused(self, scope: Mapping[str, Any]) -> str | None:
        """Return why a request is refused, or None."""
        headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
        host, origin = headers.get("host", ""), headers.get("origin")
        if self._only_here and _name(f"//{host}") not in HERE:
            return "this page answers under the names of its own machine only\n"
        if origin is not None and urlsplit(origin).netloc != host:
            return "this page takes no requests from other pages\n"
        # Gradio would also fetch addresses of the web for whoever asks.
        path = str(scope["path"])
        if "proxy=" in path:
            return "nothing is fetched from elsewhere\n"
        _, asked, file = path.partition("file=")
        if asked and not _within(file, self._folder):
            return "there is no such file\n"
        return None


def _name(address: str) -> str | None:
    try:
        return urlsplit(address).hostname
    except ValueError:
        return None


def _within(file: str, folder: Path) -> bool:
    """Return whether a path is of a file in a folder, with links and `..` followed."""
    try:
        return Path(file).is_absolute() and Path(file).resolve().is_relative_to(folder)
    except (OSError, ValueError, RuntimeError):
        return False
