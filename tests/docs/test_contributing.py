"""CONTRIBUTING is held to what it says: the floors are the linter's, what it names is there."""

from __future__ import annotations

import re
import tomllib

from conftest import ROOT

TEXT = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
LINK = re.compile(r"\]\(([^)#]+)\)")


def rows(heading: str) -> list[list[str]]:
    """Return the cells of the table below a heading of a table."""
    (table,) = re.findall(rf"^\| {heading} \|.*\n\|---.*\n((?:\|.*\n)+)", TEXT, re.MULTILINE)
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in table.splitlines()]


def test_the_floors_are_the_linter_s():
    (picture,) = re.findall(r"```text\n(.*?)```", TEXT, re.DOTALL)
    drawn = [re.split(r" {2,}", line)[0].split(", ") for line in picture.splitlines()]
    linter = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["importlinter"]
    (layers,) = (contract["layers"] for contract in linter["contracts"] if contract["type"] == "layers")
    assert drawn == [layer.split(" : ") for layer in layers]


def test_every_place_has_what_is_said_to_be_there():
    for what, where in rows("to add"):
        places = [ROOT / target for target in LINK.findall(where)]
        assert places, what
        for place in places:
            assert place.exists(), (what, place)
        files = [file for place in places for file in (place.glob("*.*") if place.is_dir() else [place])]
        content = "\n".join(file.read_text(encoding="utf-8") for file in files)
        for name in re.findall(r"`(\w+)`", where):
            assert re.search(rf"\b{name}", content), (what, name)


def test_every_command_is_there():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    commands = [command for cell, _ in rows("command") for command in re.findall(r"`([^`]+)`", cell)]
    assert len(commands) > 10
    for command in [*commands, *re.findall(r"`(make [\w-]+)`", TEXT)]:
        if command.startswith("make "):
            assert f"\n{command.removeprefix('make ')}:" in makefile, command
        for file in re.findall(r"[\w./]+/[\w.]+", command.replace(".venv/bin/python", "")):
            assert (ROOT / file).exists(), command


def test_every_link_leads_somewhere():
    for target in LINK.findall(TEXT):
        assert (ROOT / target).exists(), target
