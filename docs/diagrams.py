"""Diagrams of the docs, drawn once into docs/diagrams/, so that the site shows them without a script from the network.

    npm pack mermaid@11 && tar xzf mermaid-11.*.tgz package/dist/mermaid.min.js
    python docs/diagrams.py package/dist/mermaid.min.js    # draws those that are new; needs Chromium

Their sources are the Mermaid blocks of docs/*.md, which GitHub draws by itself. A drawing is named by its source's
checksum: whoever changes a source draws it anew, and a test says so. Its colours are the page's own, light or dark.
"""

from __future__ import annotations

import hashlib
import html
import json
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "docs" / "diagrams"
_BLOCK = re.compile(r"^```mermaid\n(.*?)^```$", re.DOTALL | re.MULTILINE)
# Colours by which Mermaid is told to draw, and what stands in their place in the drawing.
_COLOURS = {
    "#010203": "currentColor",
    "#040506": "var(--diagram-box)",
    "#070809": "var(--diagram-group)",
    "#0a0b0c": "var(--diagram-page)",
    "#0d0e0f": "var(--diagram-line)",
}


def sources() -> list[str]:
    """Return the sources of the diagrams in docs/*.md."""
    return [text for path in sorted((ROOT / "docs").glob("*.md")) for text in _BLOCK.findall(path.read_text("utf-8"))]


def file_of(source: str) -> Path:
    """Return where the drawing of a source is."""
    return FOLDER / f"{hashlib.sha256(source.encode()).hexdigest()[:12]}.svg"


def inline(markdown: str) -> str:
    """Return a page with its diagrams' drawings in the place of their sources.

    Raises:
        FileNotFoundError: A source was changed and not drawn anew.
    """

    def drawing(found: re.Match[str]) -> str:
        svg = file_of(found[1]).read_text(encoding="utf-8").strip()
        (width,) = re.findall(r"max-width: ([\d.]+)px", svg)
        # A wide one stays readable on a phone: it scrolls.
        return f'<div class="diagram{" wide" if float(width) > 600 else ""}">{svg}</div>'

    return _BLOCK.sub(drawing, markdown)


def draw(source: str, mermaid: Path) -> str:
    """Draw a source by Mermaid in Chromium.

    Args:
        source: The diagram.
        mermaid: The file mermaid.min.js.

    Returns:
        The drawing, an SVG whose words are text.

    Raises:
        RuntimeError: Mermaid does not understand it.
    """
    text, box, group, page, line = _COLOURS
    theme = {
        **dict.fromkeys(("primaryColor", "mainBkg"), box),
        **dict.fromkeys(("primaryTextColor", "textColor", "nodeTextColor", "titleColor"), text),
        **dict.fromkeys(("primaryBorderColor", "nodeBorder", "lineColor", "clusterBorder"), line),
        **dict.fromkeys(("tertiaryColor", "clusterBkg"), group),
        "edgeLabelBackground": page,
        "fontFamily": "sans-serif",
    }
    asked = {"startOnLoad": False, "theme": "base", "themeVariables": theme, "htmlLabels": False}
    name = f"diagram-{file_of(source).stem}"
    script = f"""
        mermaid.initialize({json.dumps({**asked, "flowchart": {"htmlLabels": False, "useMaxWidth": True}})});
        mermaid.render({json.dumps(name)}, {json.dumps(source)}).then(
            ({{svg}}) => {{
                document.body.innerHTML = "<textarea></textarea>";
                document.body.firstChild.textContent = svg;
            }},
            error => {{ document.body.innerText = "no drawing: " + error; }});
    """
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "mermaid.min.js").write_bytes(mermaid.read_bytes())
        file = Path(folder) / "page.html"
        file.write_text(f'<meta charset="utf-8"><body><script src="mermaid.min.js"></script><script>{script}</script>')
        chromium = shutil.which("chromium") or shutil.which("google-chrome") or "chromium"
        command = [chromium, "--headless", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=20000", "--dump-dom"]
        said = subprocess.run([*command, f"file://{file}"], capture_output=True, text=True, check=True).stdout
    found = re.search(r"<textarea>(.*?)</textarea>", said, re.DOTALL)
    if found is None:
        raise RuntimeError(f"{name}: {re.sub('<[^>]+>', '', said)[-500:]}")
    svg = html.unescape(found[1])
    for colour, by in _COLOURS.items():
        red, green, blue = (int(colour[at : at + 2], 16) for at in (1, 3, 5))
        svg = re.sub(rf"{colour}\b|rgba?\({red}, ?{green}, ?{blue}(?:, ?[\d.]+)?\)", by, svg, flags=re.IGNORECASE)
    return svg


def main(arguments: Sequence[str]) -> None:
    """Draw what is new, and remove what has no source any more."""
    FOLDER.mkdir(exist_ok=True)
    wanted = {file_of(source): source for source in sources()}
    for path in set(FOLDER.glob("*.svg")) - set(wanted):
        path.unlink()
    for path, source in wanted.items():
        if not path.is_file():
            path.write_text(draw(source, Path(arguments[0])) + "\n", encoding="utf-8")
            print(f"drawn: {path}")


if __name__ == "__main__":
    main(sys.argv[1:])
