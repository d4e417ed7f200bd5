"""Run README's ten lines as they stand, and keep what they print for README: docs/ten_lines.json.

    python docs/ten_lines.py    # then `make figures`

Their file is a part of Banking77, with the columns of somebody's own file: its questions about cards. A test runs the
same lines on the same rows and holds what they print to what is kept.
"""

from __future__ import annotations

import csv
import json
import os
import re
import resource
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import qlora_kit as qk  # noqa: E402
from qlora_kit.system.environment import environment  # noqa: E402

KEPT = ROOT / "docs" / "ten_lines.json"


def code() -> str:
    """Return the ten lines as README has them."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    (found,) = re.findall(r"<!-- ten lines.*?-->\n```python\n(.*?)```", text, re.DOTALL)
    return str(found)


def write_questions(folder: Path, topics: int | None = None) -> tuple[int, int]:
    """Write questions.csv, as somebody has it: other column names than the kit's, and one column more.

    Args:
        folder: Where to.
        topics: How many topics; None for all about cards.

    Returns:
        The numbers of its rows and of its topics.
    """
    full = qk.banking77()
    names = [name for name in full.label_names if "card" in name][:topics]
    pairs = zip(full.train.texts, full.train.labels, strict=True)
    rows = [(number, text, full.label_names[label]) for number, (text, label) in enumerate(pairs) if number % 2 == 0]
    rows = [row for row in rows if row[2] in names]
    with open(folder / "questions.csv", "w", newline="", encoding="utf-8") as stream:
        csv.writer(stream).writerows([("id", "question", "topic"), *rows])
    return len(rows), len(names)


def run(folder: Path) -> str:
    """Run the ten lines in a folder and return what their two calls of print show.

    Args:
        folder: Where questions.csv is.

    Raises:
        RuntimeError: They failed; with what they said.
    """
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "WANDB_MODE": "offline"}
    done = subprocess.run([sys.executable, "-c", code()], cwd=folder, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stderr)
    return "\n".join(done.stdout.strip().splitlines()[-2:])


def main() -> None:
    """Run them, and keep what they print."""
    with tempfile.TemporaryDirectory() as folder:
        rows, labels = write_questions(Path(folder))
        output = run(Path(folder))
    # Of the processor, on which others work, too.
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    seconds = used.ru_utime + used.ru_stime
    kept = {"rows": rows, "labels": labels, "output": output, "cpu_seconds": seconds, "environment": environment()}
    KEPT.write_text(json.dumps(kept, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    print(output)


if __name__ == "__main__":
    main()
