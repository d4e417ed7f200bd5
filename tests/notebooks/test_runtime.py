"""What the set-up cell says of the machine, and where results go that outlive it."""

from __future__ import annotations

import os
import sys
import types
from pathlib import Path

import pytest
import torch

from qlora_kit.errors import KitError
from qlora_kit.notebooks.runtime import place, ready
from qlora_kit.system import host as system_host
from qlora_kit.system.host import OWN, Host, on_drive


@pytest.fixture(params=["Colab", "Kaggle", ""])
def host(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Host:
    """Each machine that a notebook may run on, known by what it leaves in a process."""
    monkeypatch.delenv("KAGGLE_KERNEL_RUN_TYPE", raising=False)
    monkeypatch.delitem(sys.modules, "google.colab", raising=False)
    if request.param == "Colab":
        be_colab(monkeypatch)
    if request.param == "Kaggle":
        be_colab(monkeypatch)  # its image is made of Colab's
        monkeypatch.setenv("KAGGLE_KERNEL_RUN_TYPE", "Interactive")
    assert system_host.host().name == request.param
    return system_host.host()


def be_colab(monkeypatch: pytest.MonkeyPatch, **modules: object) -> None:
    """Put stand-ins in the place of Colab's modules, which are in no package."""
    monkeypatch.setitem(sys.modules, "google.colab", types.ModuleType("google.colab"))
    for name, function in modules.items():
        module = types.ModuleType(f"google.colab.{name}")
        for called in ("get", "mount"):
            setattr(module, called, function)
        monkeypatch.setitem(sys.modules, f"google.colab.{name}", module)


def test_without_a_gpu_the_first_lines_say_how_to_get_one(host, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    ready()
    version, *more = capsys.readouterr().out.splitlines()
    assert version.startswith("qlora_kit ")
    if host is OWN:
        assert more == []
        return
    (line,) = more
    way = {"Colab": "Runtime > Change runtime type > T4 GPU", "Kaggle": "Settings > Accelerator > GPU T4 x2"}[host.name]
    assert line.startswith(f"No GPU. For one: {way}, then run all cells. Without it the notebooks fine-tune MiniLM")
    # The median of the three seeds that the project measured.
    assert line.endswith("on the CPU, which took about 8 minutes on AMD EPYC, 1 core.")


@pytest.mark.parametrize("count", [1, 2])
def test_of_two_gpus_it_is_said_that_one_is_used(host, count, monkeypatch, capsys):
    # Kaggle's two cards are not here.
    card = types.SimpleNamespace(name="Tesla T4", total_memory=15_828_320_256)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: card)
    ready()
    others = " There are 2 GPUs; the kit trains on the first." if count == 2 else ""
    assert capsys.readouterr().out.splitlines()[1:] == [f"GPU: Tesla T4, 15 GiB.{others}"]


def test_the_key_of_wandb_comes_from_colabs_secrets_where_it_may(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.delenv("WANDB_API_KEY", raising=False)

    def refuse(name: str) -> str:
        raise PermissionError(f"this notebook may not read {name}")  # userdata's errors are classes of Colab's own

    for get in (refuse, lambda name: None):
        be_colab(monkeypatch, userdata=get)
        ready()
        assert "WANDB_API_KEY" not in os.environ and "W&B" not in capsys.readouterr().out
    be_colab(monkeypatch, userdata={"WANDB_API_KEY": "k" * 40}.get)
    try:
        ready()
        assert os.environ["WANDB_API_KEY"] == "k" * 40
        assert "logged online" in (said := capsys.readouterr().out) and "k" * 40 not in said
        be_colab(monkeypatch, userdata=refuse)  # one that is set is not asked for
        ready()
        assert os.environ["WANDB_API_KEY"] == "k" * 40 and "W&B" not in capsys.readouterr().out
    finally:
        os.environ.pop("WANDB_API_KEY")


def test_results_are_kept_on_drive_where_that_is_asked_for(monkeypatch):
    mounted: list[str] = []
    be_colab(monkeypatch, drive=mounted.append)
    assert place("runs/latest") == "runs/latest" and mounted == []
    kept = place("runs/latest", in_drive=True)
    assert kept == "/content/drive/MyDrive/qlora_kit/runs/latest" and mounted == ["/content/drive"]
    assert on_drive(kept) and not on_drive("runs/latest")
    # The cell run again; and a folder on Drive that the user has named.
    assert place(kept, in_drive=True) == kept
    assert place(Path("/content/drive/MyDrive/mine"), in_drive=True) == "/content/drive/MyDrive/mine"
    with pytest.raises(KitError, match=r"'/content/runs', which is not on Drive: .* a relative path"):
        place("/content/runs", in_drive=True)


def test_a_drive_that_is_not_to_be_had_is_one_line(monkeypatch):
    def refuse(place: str) -> None:
        raise ValueError("mount failed")

    be_colab(monkeypatch, drive=refuse)
    with pytest.raises(KitError, match=r"Drive cannot be mounted \(mount failed\): .* keep_in_drive = False"):
        place("runs/latest", in_drive=True)
    monkeypatch.delitem(sys.modules, "google.colab")
    with pytest.raises(KitError, match="keep_in_drive is for Colab"):
        place("runs/latest", in_drive=True)
