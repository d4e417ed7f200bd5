"""The command `demo`."""

from __future__ import annotations

import argparse

from ..errors import KitError

NAME = "demo"
SUMMARY = "a page in the browser to try a run: a text, or a file of texts"
EXAMPLES = """\
examples:
  qlora-kit demo runs/tickets
  qlora-kit demo runs/tickets --reject-below 0.5          no label under 50%; the page has a slider for it
  qlora-kit demo runs/tickets --port 8080

It needs Gradio: pip install 'qlora_kit[demo]'. The page listens on 127.0.0.1, so that nobody else reaches it, and loads
nothing from elsewhere. With --host 0.0.0.0 everybody in the network can use it. Ctrl-C ends it.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments to its parser."""
    parser.add_argument("folder", metavar="RUN", help="a run folder")
    parser.add_argument("--port", type=int, help="where the page listens (the first free one from 7860 on)")
    parser.add_argument("--host", default="127.0.0.1", help="the address that it listens on (127.0.0.1: this machine)")
    parser.add_argument(
        "--reject-below", type=float, metavar="SHARE", help="give no label to a text whose best one is less probable"
    )


def run(options: argparse.Namespace) -> int:
    """Run the command; return the exit code."""
    from ..demo.serve import serve
    from ..run import load_run

    if options.reject_below is not None and not 0 <= options.reject_below <= 1:
        raise KitError(f"--reject-below is {options.reject_below}: allowed is 0 to 1")
    opened = load_run(options.folder)
    serve(opened, host=options.host, port=options.port, reject_below=options.reject_below or 0.0)
    return 0
