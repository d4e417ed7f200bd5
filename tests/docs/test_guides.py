"""The code of README and of docs/*.md: every name in it exists, every command parses, and the guides' code runs."""

from __future__ import annotations

import ast
import builtins
import inspect
import json
import os
import re
import shlex
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT

import qlora_kit as qk
from qlora_kit.cli.main import make_parser
from qlora_kit.metrics.verdict import Report
from qlora_kit.runs.predictor import Predictions

sys.path.insert(0, str(ROOT / "docs"))

import diagrams

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
GUIDES = ("your_data", "read_a_report", "serve")
# What the pages call their things.
KINDS = {
    "data": qk.TextData,
    "run": qk.Run,
    "best": qk.Run,
    "report": Report,
    "predictions": Predictions,
    "found": qk.Search,
    "experiment": qk.Experiment,
}
RUN = "runs/minilm_questions_qlora_seed0"


def blocks(page: Path, language: str) -> list[tuple[str, str]]:
    """Return the comment before each block of code, and its code."""
    pattern = rf"(?:<!-- ([^\n]*) -->\n)?```{language}\n(.*?)^```$"
    return re.findall(pattern, page.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)


def dotted(node: ast.AST) -> list[str]:
    names: list[str] = []
    while isinstance(node, ast.Attribute):
        names.insert(0, node.attr)
        node = node.value
    return [node.id, *names] if isinstance(node, ast.Name) else []


def meant(names: list[str]) -> Any:
    """Return what `qk.memory.plan` or `run.predict` is; None for names that are not the kit's."""
    if names[:1] == ["qk"]:
        thing: Any = qk
    elif names and names[0] in KINDS:
        thing = KINDS[names[0]]
        names = names[:2]
    else:
        return None
    for name in names[1:]:
        if name in getattr(thing, "__annotations__", {}) or name in getattr(thing, "__dataclass_fields__", {}):
            return None  # a value, not a call
        assert hasattr(thing, name), f"{'.'.join(names)}: there is no {name}"
        thing = getattr(thing, name)
    return thing


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.stem)
def test_code_parses_and_its_names_and_arguments_exist(page: Path):
    # Code in words too, as `qk.search(...)`.
    words = re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    inline = [code for code in re.findall(r"`((?:qk|run)\.\w+\([^`]*\))`", words) if "..." not in code]
    trees = [ast.parse(code) for code in [*(code for _, code in blocks(page, "python")), *inline]]
    for node in (node for tree in trees for node in ast.walk(tree)):
        if isinstance(node, ast.Attribute):
            meant(dotted(node))
        elif isinstance(node, ast.Call) and callable(called := meant(dotted(node.func))):
            own = dotted(node.func)[0] != "qk" and inspect.isfunction(called)  # a method, without its self
            given = [None] * (len(node.args) + own)
            inspect.signature(called).bind_partial(*given, **{word.arg: None for word in node.keywords if word.arg})


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.stem)
def test_settings_that_are_named_exist(page: Path):
    fields = qk.preset("minilm_banking77_qlora").to_dict()
    for section, field in re.findall(
        r"[`\"]((?:training|lora|model|data|tracking))\.(\w+)[`\"]", page.read_text("utf-8")
    ):
        assert field in fields[section], f"{section}.{field}"


def commands(page: Path) -> Iterator[str]:
    for _, code in blocks(page, "bash"):
        yield from (line.partition("  #")[0].strip() for line in code.replace("\\\n", " ").splitlines() if line.strip())


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.stem)
def test_commands_parse(page: Path):
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    parser = make_parser()
    for command in commands(page):
        words = shlex.split(re.sub(r" [<>] \S+", "", command))
        if words[0] == "qlora-kit":
            parser.parse_args(words[1:])
        elif words[0] == "make":
            assert re.search(rf"^{words[1]}:", makefile, re.MULTILINE), command
        else:
            assert words[0] in ("pip", "curl"), f"{command}: what is this?"


def test_a_guide_defines_what_it_uses():
    """Whoever pastes a guide from its top needs nothing else."""
    for name in GUIDES:
        known = set(dir(builtins))
        for _, code in blocks(ROOT / "docs" / f"{name}.md", "python"):
            for statement in ast.parse(code).body:
                nodes = list(ast.walk(statement))
                stored = {n.id for n in nodes if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}
                stored |= {
                    (a.asname or a.name) for n in nodes if isinstance(n, ast.Import | ast.ImportFrom) for a in n.names
                }
                stored |= {n.name for n in nodes if isinstance(n, ast.ClassDef | ast.FunctionDef)}
                stored |= {n.arg for n in nodes if isinstance(n, ast.arg)}
                stored |= {n.name for n in nodes if isinstance(n, ast.ExceptHandler) and n.name}
                used = {n.id for n in nodes if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Load)}
                assert used <= known | stored, f"{name}: {used - known - stored}"
                known |= stored


def test_every_diagram_is_drawn_and_every_drawing_is_of_a_diagram():
    wanted = {diagrams.file_of(source) for source in diagrams.sources()}
    assert wanted == set(diagrams.FOLDER.glob("*.svg")) and wanted, "docs/diagrams.py draws them"
    for path in wanted:
        text = path.read_text(encoding="utf-8")
        assert "http" not in re.sub(r'xmlns(:\w+)?="[^"]*"', "", text) and "<foreignObject" not in text


# --- run --------------------------------------------------------------------------------------------------------


def python(code: str, folder: Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "WANDB_MODE": "offline"}
    return subprocess.run([sys.executable, "-c", code], cwd=folder, env=environment, capture_output=True, text=True)


@pytest.mark.long
def test_the_guides_run_one_after_the_other(tmp_path: Path):
    """On a small file: the run of the first guide is what the others read."""
    import csv

    full = qk.banking77()
    names = full.label_names[:4]
    pairs = zip(full.train.texts, full.train.labels, strict=True)
    rows = [(text, full.label_names[label]) for n, (text, label) in enumerate(pairs) if n % 4 == 0]
    with open(tmp_path / "questions.csv", "w", newline="", encoding="utf-8") as stream:
        csv.writer(stream).writerows([("question", "topic"), *(row for row in rows if row[1] in names)])
    for name in GUIDES:
        code = "\n".join(c for comment, c in blocks(ROOT / "docs" / f"{name}.md", "python") if not comment)
        done = python(code, tmp_path)
        assert done.returncode == 0, f"{name}: {done.stderr}"
        if name == "your_data":
            assert (tmp_path / RUN / "evaluation.json").is_file() and (tmp_path / "runs" / "best").is_dir()
            assert "macro f1" in done.stdout.lower()
    assert (tmp_path / "merged" / "README.md").is_file()

    # The small server, on a port that is free: what it answers, and to what is no list of texts.
    ((_, code),) = [block for block in blocks(ROOT / "docs" / "serve.md", "python") if "a test starts this" in block[0]]
    import socket

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    (tmp_path / "serve.py").write_text(code.replace("8000", str(port)))
    with subprocess.Popen(
        [sys.executable, "serve.py"], cwd=tmp_path, env=environment, stderr=subprocess.DEVNULL
    ) as server:
        try:
            assert asked(port, ["My card has not arrived", "I want to top up"], patience=120) == (200, 2)
            assert asked(port, "a text alone")[0] == 400
            assert answered(port, "") == (411, "say how long the texts are, in the header Content-Length")
            assert answered(port, "Content-Length: many\r\n")[0] == 400
            assert answered(port, "Content-Length: -5\r\n")[0] == 411
        finally:
            server.terminate()


def answered(port: int, header: str) -> tuple[int, str]:
    """Return the status and the words that a POST with this header, or none, and without texts is answered with."""
    import socket

    with socket.create_connection(("127.0.0.1", port), timeout=60) as connection:
        connection.sendall(f"POST / HTTP/1.0\r\n{header}\r\n".encode())
        said = b"".join(iter(lambda: connection.recv(4096), b"")).decode()
    head, _, body = said.partition("\r\n\r\n")
    return int(head.split()[1]), json.loads(body)


def asked(port: int, texts: Any, patience: float = 10) -> tuple[int, int]:
    """Return the status of an answer and how many labels it has."""
    request = urllib.request.Request(f"http://127.0.0.1:{port}", json.dumps(texts).encode())
    until = time.monotonic() + patience
    while True:
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                return answer.status, len(json.loads(answer.read()))
        except urllib.error.HTTPError as error:
            return error.code, 0
        except urllib.error.URLError:
            assert time.monotonic() < until, "the server does not answer"
            time.sleep(0.5)
