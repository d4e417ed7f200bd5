"""The page itself: what stands on it, and what its buttons do."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import gradio as gr

from ..data.formats import SUFFIXES
from ..data.whole import read_whole
from ..errors import KitError
from . import answers
from .labelling import labelled, likely_column, write_csv
from .model import SharedRun, TrainingTexts

MOST_CHARACTERS = 20_000
"""The longest text that the field takes; the model reads `data.max_length` tokens of it."""


class _Buttons:
    """What the page does when it is used; see `make_page` for the arguments."""

    def __init__(self, shared: SharedRun, training: TrainingTexts, folder: Path) -> None:
        self._shared, self._training, self._folder = shared, training, folder

    def classify(self, text: str, limit: float) -> str:
        """Answer the button of the first tab."""
        if not (text or "").strip():
            return answers.problem("There is no text yet: write one, then ask.")
        try:
            with self._shared.first():
                found = self._shared.predict([text], limit or None)
                near = self._training.nearest(text, answers.TOP)
        except KitError as error:
            return answers.problem(str(error))
        return answers.answer(found, near, self._training)

    def choose(self, file: str | None) -> tuple[Any, str, Any]:
        """Read a file that was dropped in: offer its columns, and take away what was there of another."""
        nothing = gr.update(choices=[], value=None, visible=False)
        if file is None:
            return nothing, "", gr.update(value=None, visible=False)
        try:
            expected = self._shared.run.experiment.data.text
            table = read_whole(Path(file), expected)
        except (KitError, OSError) as error:
            return nothing, answers.problem(_told(error, file)), gr.update(value=None, visible=False)
        column = gr.update(choices=table.columns, value=likely_column(table, expected), visible=True)
        return column, "", gr.update(value=None, visible=False)

    def label_file(
        self,
        file: str | None,
        column: str | None,
        limit: float,
        progress: Any = gr.Progress(),  # noqa: B008  Gradio finds it here, and nowhere else
    ) -> tuple[str, Any]:
        """Answer the button of the second tab."""
        if file is None:
            return answers.problem("There is no file yet: drop one in, then ask."), gr.update(visible=False)
        path = Path(file)
        try:
            table = read_whole(path, column)
            done = labelled(
                self._shared,
                table,
                column or likely_column(table, self._shared.run.experiment.data.text),
                source=path.name,
                reject_below=limit or None,
                step=lambda rows, of: progress((rows, of), desc="Labels", unit="rows"),
            )
        except (KitError, OSError) as error:
            return answers.problem(_told(error, file)), gr.update(value=None, visible=False)
        target = Path(tempfile.mkdtemp(dir=self._folder)) / f"{path.name.split('.')[0] or 'rows'}_labelled.csv"
        write_csv(done, target, marked=table.marked)
        return answers.file_answer(done, target.name), gr.update(value=str(target), visible=True)


def make_page(
    shared: SharedRun, training: TrainingTexts, folder: Path, *, reject_below: float = 0.0, host: str | None = None
) -> Any:
    """Return the page as Gradio's `Blocks`.

    Args:
        shared: The run.
        training: Its training texts.
        folder: Where files come and go; the only folder of which files are handed out.
        reject_below: The limit that the page starts with, a probability; 0 gives every text a label.
        host: The address under which others reach the page; None where nobody else does.
    """
    does = _Buttons(shared, training, folder)
    hidden: dict[str, Any] = {"api_visibility": "private"}
    with gr.Blocks(title="Try a run", analytics_enabled=False) as page:
        gr.HTML(answers.head(shared.run, host))
        limit = gr.Slider(
            *(0, 1, reject_below),
            step=0.01,
            label="No label under this probability",
            info="0 gives every text a label",
            elem_id="limit",
        )
        with gr.Tab("A text"):
            text = gr.Textbox(label="Text", lines=3, max_length=MOST_CHARACTERS, elem_id="text")
            ask = gr.Button("Classify", variant="primary", elem_id="ask")
            answer = gr.HTML(elem_id="answer")
        with gr.Tab("A file"):
            file = gr.File(
                label="A file with a column of texts: CSV, TSV, JSON, Parquet or Excel",
                file_types=[*SUFFIXES, ".gz"],
                elem_id="file",
                height=140,
            )
            _refuse_addresses(file)
            # A name that is not there is refused in the kit's own words, so any is let through.
            column = gr.Dropdown(label="Column of the texts", visible=False, allow_custom_value=True, elem_id="column")
            ask_file = gr.Button("Label its rows", variant="primary", elem_id="ask-file")
            file_answer = gr.HTML(elem_id="file-answer")
            result = gr.File(label="The file with labels", visible=False, interactive=False, elem_id="result")
        ask.click(does.classify, [text, limit], answer, **hidden)
        text.submit(does.classify, [text, limit], answer, **hidden)
        file.change(does.choose, file, [column, file_answer, result], **hidden)
        ask_file.click(does.label_file, [file, column, limit], [file_answer, result], **hidden)
    return page


def _refuse_addresses(file: Any) -> None:
    """Keep a file field from downloading: Gradio fetches a file that a request names by an address of the web."""
    moved = file.async_move_resource_to_block_cache

    async def from_here(path: Any) -> Any:
        # Gradio refuses the request where there is no path.
        return None if "://" in str(path) else await moved(path)

    file.async_move_resource_to_block_cache = from_here


def _told(error: Exception, file: str) -> str:
    """Return an error about a file without the folder, which the visitor does not know."""
    return str(error).replace(f"{Path(file).parent}/", "")
