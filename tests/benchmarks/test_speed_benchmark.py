"""benchmarks/speed.py: who races is told what its row says, all of a race stand together, and it ends in time."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import peft
import pytest
import torch
import torch._dynamo.testing
import torch._functorch.config
import torch._inductor.config
from conftest import ROOT
from figures import assert_readable_on_a_phone, assert_whole
from torch import nn

from qlora_kit import plots, schemas
from qlora_kit.config.quantization import Quantization
from qlora_kit.kernels.fused_lora import fuse_
from qlora_kit.quantization.bitsandbytes import quantize_with_bitsandbytes_
from qlora_kit.system.files import write_json
from qlora_kit.system.parsing import read_json

sys.path.insert(0, str(ROOT / "benchmarks"))
import ceilings
import contenders
import speed
from common import recording
from contenders import CONTENDERS, Entry

LENGTHS = [5, 9, 14, 16, 17, 30, 33, 70, 94]


def benchmark(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "benchmarks" / "speed.py"), *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


def entry(contender: str, **changes) -> Entry:
    told = {"model": "minilm:1", "method": "qlora", "precision": "fp32", "batch": 4, "steps": 50, "widths": (16, 64)}
    return Entry(**{**told, "contender": contender, **changes})


@pytest.fixture
def as_it_was():
    """Puts back what a contender that compiles sets for its whole process."""
    from accelerate.state import AcceleratorState
    from torch.fx.experimental import _config as symbols

    dynamo = torch._dynamo.config
    places = [
        *((dynamo, name) for name in ("assume_static_by_default", "automatic_dynamic_shapes", "recompile_limit")),
        (symbols, "use_duck_shape"),
        (torch._functorch.config, "autograd_cache_allow_custom_autograd_functions"),
        (torch._inductor.config, "unsafe_marked_cacheable_functions"),
    ]
    kept = [(config, name, getattr(config, name)) for config, name in places if hasattr(config, name)]
    environment = dict(os.environ)
    torch._dynamo.reset()
    yield
    for config, name, value in kept:
        setattr(config, name, value)
    os.environ.clear()
    os.environ.update(environment)
    AcceleratorState._reset_state(reset_partial_state=True)
    torch._dynamo.reset()


# --- what a contender is told -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["recipe_fp16_reentrant", "padded_longest", "grouped", "compiled", "compiled_graphs", "ours"]
)
def test_batches_are_padded_and_the_trainer_is_set_as_the_row_says(name, as_it_was):
    told = entry(name)
    spec, trainer = told.spec, contenders.trainer_of(told)
    loader = iter(trainer.get_train_dataloader())
    warming = getattr(trainer, "warming", -1) + 1
    batches = [next(loader) for _ in range(warming + 12)]
    widths = [batch["input_ids"].shape[1] for batch in batches]
    longest = [int(batch["attention_mask"].sum(dim=1).max()) for batch in batches]
    expected = {
        "max_length": [128] * len(batches),
        "longest": longest,
        "grouped": longest,
        "grouped_multiples_of_8": [-(-n // 8) * 8 for n in longest],
        "grouped_fixed_widths": [next(width for width in (16, 64, 128) if width >= n) for n in longest],
        "buckets": longest,  # the kit's own widths are for CUDA graphs
    }
    assert widths == expected[spec.padding]
    # Rows of a batch are of like length where they are said to be grouped, and of any where they are not.
    spread = statistics.fmean(
        float(batch["attention_mask"].sum(dim=1).float().std()) for batch in batches[warming + 1 :]
    )
    assert (spread < 1.5) == (spec.padding.startswith("grouped") or spec.padding == "buckets")
    assert trainer.args.torch_compile is (spec.compiled is not None)
    assert trainer.args.torch_compile_mode == spec.mode
    assert trainer.args.logging_nan_inf_filter is spec.waits
    if spec.compiled:
        assert trainer.args.dataloader_drop_last
        # Every width that a batch can have comes first, so often that nothing is left to make.
        met = widths[:warming]
        assert met == [width for width in reversed(trainer.raced_widths) for _ in range(contenders.PASSES)]
        assert set(trainer.raced_widths) == set(expected[spec.padding]) | set(met)
        assert contenders.about(told, trainer)["widths"] == trainer.raced_widths
    functions = [
        module._gradient_checkpointing_func
        for module in trainer.model.modules()
        if getattr(module, "gradient_checkpointing", False)
    ]
    kinds = {None: set(), "reentrant": {True}, "not reentrant": {False}}
    assert {function.keywords["use_reentrant"] for function in functions} == kinds[spec.checkpointing]
    if spec.optimizer == "paged_adamw_8bit":
        assert trainer.args.optim == "adamw_8bit"  # there are no pages without CUDA


def test_the_recipe_as_explained_is_a_contender_of_its_own():
    spec = CONTENDERS["recipe_fp16_reentrant"]
    assert (spec.precision, spec.checkpointing, spec.kbit, spec.padding) == ("fp16", "reentrant", True, "max_length")
    assert spec.precision_in("bf16", cuda=True) == "fp16"
    assert spec.precision_in("bf16", cuda=False) == "fp32"  # nothing trains in fp16 without a GPU
    assert CONTENDERS["recipe"].precision_in("bf16", cuda=True) == "bf16"
    assert not spec.variant and not CONTENDERS["compiled_graphs"].variant
    assert CONTENDERS["unsloth"].padding == "grouped" and not CONTENDERS["unsloth"].dropout
    assert contenders.settings(entry("unsloth"))["train_sampling_strategy"] == "group_by_length"


def test_only_widths_that_a_row_needs_are_compiled_for():
    graphs = entry("compiled_graphs", widths=(16, 24, 32, 48))
    assert contenders.widths_of(graphs, LENGTHS, 128) == [16, 24, 32, 48, 128]
    assert contenders.widths_of(graphs, [5, 30, 94], 128) == [16, 32, 128]
    assert contenders.widths_of(entry("compiled"), LENGTHS, 128) == [8, 16, 24, 32, 40, 72, 96]
    assert contenders.widths_of(entry("grouped"), LENGTHS, 128) is None


def test_rows_that_come_first_make_every_width_and_whole_batches():
    for batch in (1, 4, 20):
        rows = contenders.first_rows(LENGTHS, [16, 24, 128], batch)
        batches = np.array(rows).reshape(-1, batch)
        longest = [max(LENGTHS[row] for row in rows) for rows in batches.tolist()]
        assert longest == [94] * contenders.PASSES + [17] * contenders.PASSES + [16] * contenders.PASSES


def test_entries_travel_to_their_process_unchanged():
    told = entry("compiled_graphs", only=16, cache="/somewhere")
    assert Entry.from_json(told.to_json()) == told
    assert entry("recipe").raced_steps == 5 and entry("grouped").raced_steps == 50
    # group_by_length sorts 50 batches at a time: any 50 steps in a row have all widths among them.
    assert entry("grouped").profiled_steps == 50 and entry("recipe").profiled_steps == 20


@pytest.mark.parametrize(("shapes", "compilations"), [("dynamic", 1), ("static", 4)])
def test_nothing_is_compiled_for_a_width_that_was_met(shapes, compilations, as_it_was):
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.config = argparse.Namespace(problem_type=None)
            self.embedding, self.head = nn.Embedding(50, 6), nn.Linear(6, 3)

        def forward(self, ids, mask):
            return self.head((self.embedding(ids) * mask[..., None]).sum(dim=1))

    counter, model = torch._dynamo.testing.CompileCounter(), Model()
    contenders.ready_to_compile(model, shapes)
    compiled = torch.compile(model, backend=counter)
    for width in [8, 24, 16, 40, 8, 40, 16, 24]:  # one of them is the number of rows
        compiled(torch.ones(8, width, dtype=torch.long), torch.ones(8, width)).sum().backward()
    assert counter.frame_count == compilations
    assert model.config.problem_type == "single_label_classification"


# --- the race ---------------------------------------------------------------------------------------------------

TOY = """
import json, sys, time
start, step, stops = map(float, sys.argv[1:])
time.sleep(start)
print(json.dumps({"start_seconds": start, "environment": None, "optimizer": "toy"}), flush=True)
turns = 0
for line in sys.stdin:
    if line.strip() == "end":
        kernels = {"device_seconds": 0.001, "device_steps": 20}
        print(json.dumps({**kernels, "peak_bytes": 7, "reserved_bytes": 8}), flush=True)
        break
    turns += 1
    if turns > stops:
        time.sleep(600)
    time.sleep(step)
    made = {"seconds": step, "steps": 10, "samples": 40, "tokens": 400 * turns}
    print(json.dumps({**made, "ready_seconds": 1.0}), flush=True)
"""


def toy(contender: str, start: float = 0.0, step: float = 0.05, stops: float = 100, **changes) -> speed.Racer:
    command = [sys.executable, "-c", TOY, str(start), str(step), str(stops)]
    racer = speed.Racer(entry(contender, steps=10, **changes), command)
    racer.begin(time.monotonic() + 30 if start < 100 else time.monotonic() + 0.2)
    return racer


def raced(racers, repeats: int = 5, seconds: float = 30.0, cuda: bool = False) -> list[list[dict]]:
    race = speed.Race("a race", "minilm:1", "fp32", 4, tuple(racer.entry for racer in racers))
    options = argparse.Namespace(repeats=repeats, cuda=cuda)
    return list(speed.run(race, racers, options, "a device", time.monotonic() + seconds))


def test_a_row_has_every_repeat_and_what_can_be_computed_from_them():
    told = raced([toy("grouped"), toy("compiled_graphs", start=600.0), toy("ours", method="lora")])
    # Written as they come: before the first repeat, after each, and after each that told its kernels' time.
    assert [len(rows) for rows in told] == [3] * (1 + 5 + 2)
    assert [rows[0]["repeats"] for rows in told] == [0, 1, 2, 3, 4, 5, 5, 5]
    grouped, late, ours = told[-1]
    assert {row["race"] for row in told[-1]} == {"a race"}
    assert grouped["repeats_seconds"] == [0.05] * 5 and grouped["repeats_samples"] == [40] * 5
    assert grouped["repeats_tokens"] == [800, 1200, 1600, 2000, 2400]  # the first turn does not count
    rates = [n / s for n, s in zip(grouped["repeats_samples"], grouped["repeats_seconds"], strict=True)]
    assert grouped["samples_per_second"] == statistics.median(rates)
    assert grouped["step_seconds"] == pytest.approx(0.005) and grouped["steps"] == 10
    assert (grouped["device_seconds"], grouped["device_seconds_means"], grouped["device_steps"]) == (0.001, "busy", 20)
    assert (grouped["peak_bytes"], grouped["reserved_bytes"]) == (7, 8)
    assert (ours["method"], ours["scheme"], ours["padding"]) == ("lora", "none", "buckets")
    assert late["problem"].startswith("not ready after") and late["samples_per_second"] is None
    assert late["device_seconds_means"] is None and late["repeats_seconds"] == []


def test_a_race_ends_in_time_and_says_who_did_not(monkeypatch):
    monkeypatch.setattr(speed, "PROFILER", 0.3)
    began = time.monotonic()
    rows = raced([toy("grouped"), toy("padded_longest", stops=3)], repeats=20, seconds=4.0, cuda=True)[-1]
    assert time.monotonic() - began < 20
    # Who stands still is left behind, and the other's kernels are timed all the same.
    assert rows[0]["repeats"] in (2, 3)  # whether it was before or after the other in the third
    assert rows[0]["device_seconds"] == 0.001 and rows[0]["problem"] is None
    assert rows[1]["repeats"] == 2 and rows[1]["problem"].startswith("out of time before repeat 3 was through")

    rows = raced([toy("grouped", step=0.5)], repeats=20, seconds=4.0, cuda=True)[-1]
    assert 1 <= rows[0]["repeats"] < 20 and rows[0]["problem"] is None and rows[0]["device_seconds"] == 0.001


def test_who_starts_late_is_waited_for_as_long_as_the_others_can_still_race(monkeypatch):
    asked = {}
    monkeypatch.setattr(speed.Racer, "begin", lambda racer, until: asked.update({racer.entry.contender: until}))
    monkeypatch.setattr(speed.Racer, "__init__", _without_process)
    told = [entry(name, model="dialogpt-medium", batch=8) for name in ("compiled", "grouped", "ours")]
    options = argparse.Namespace(cuda=True, patience=1800.0, out="nothing.json", work="runs/speed")
    now = time.monotonic()
    speed.start(options, [speed.Race("a race", "dialogpt-medium", "bf16", 8, tuple(told))], now + 580)
    # Three repeats of all of them and their kernels take well over a minute.
    assert list(asked) == ["grouped", "ours", "compiled"]
    assert 300 < asked["compiled"] - now < 540 < asked["ours"] - now < 580


def _without_process(racer, told, command=None):
    racer.entry, racer.born, racer.problem, racer.warm = told, time.monotonic(), None, {}


# --- rows of a race ---------------------------------------------------------------------------------------------


def some_race(name: str, contender_names: list[str], batch: int = 8) -> tuple[speed.Race, list[dict]]:
    told = tuple(
        entry(
            name.removeprefix("lora/"), model="dialogpt-medium", batch=batch, method="lora" if "/" in name else "qlora"
        )
        for name in contender_names
    )
    race = speed.Race(name, "dialogpt-medium", "fp32", batch, told)
    rows = []
    for number, one in enumerate(told):
        racer = argparse.Namespace(entry=one, start={}, warm={}, times=[], problem=f"nothing {number}")
        rows.append(speed.row_of(race, racer, {}, "NVIDIA H100 80GB HBM3"))
    return race, rows


def record(path: Path, race: speed.Race, rows: list[dict], command: str, all_races: tuple | list = ()) -> None:
    provenance = recording.Provenance("a" * 40, from_changes=True)
    recording.write(
        path,
        [provenance.stamped(row, {"device": row["device"]}) for row in rows],
        provenance=provenance,
        command=command,
        makes=[
            speed.key_of(race, one, "NVIDIA H100 80GB HBM3") for race in all_races or [race] for one in race.entries
        ],
        key=speed.KEY,
        append=True,
        limit=[],
    )


def test_a_race_takes_the_place_of_one_whose_contenders_it_has_all(tmp_path):
    path = tmp_path / "speed.json"
    small, large = ["grouped", "ours", "lora/ours"], ["grouped", "compiled_graphs", "ours", "lora/ours"]
    for number, (name, who, batch) in enumerate(
        [("one", small, 8), ("other batch", small, 32), ("two", large, 8), ("three", small, 8)]
    ):
        race, rows = some_race(name, who, batch)
        command = f"python benchmarks/speed.py --number {number}"
        record(path, race, rows, command)
        write_json(path, speed.superseded(read_json(path), race.name, command, [race.name]))
    told = read_json(path)
    # "three" lacks a contender of "two": both stand. "one" has gone with its command.
    assert list(plots.races(told["rows"])) == ["other batch", "two", "three"]
    assert "--number 0" not in told["command"] and len(told["commands"]) == 3
    expected = [tuple(made.items()) for part in told["commands"] for made in recording.expand(part["makes"])]
    assert sorted(map(str, expected)) == sorted(
        str(tuple((name, row[name]) for name in speed.KEY)) for row in told["rows"]
    )
    assert not list(schemas.problems(told, schemas.of_results("speed")))


def test_what_a_call_that_was_cut_off_never_made_is_not_missed_once_the_next_is_through(tmp_path):
    path, command = tmp_path / "speed.json", "python benchmarks/speed.py --batches 8 32"

    def call(day: str, through: list[int]) -> None:
        made = {batch: some_race(f"{batch}, {day}", ["grouped", "ours"], batch) for batch in (8, 32)}
        for batch in through:
            record(path, made[batch][0], made[batch][1], command, [race for race, _ in made.values()])
            names = [race.name for race, _ in made.values()]
            write_json(path, speed.superseded(read_json(path), made[batch][0].name, command, names))

    def missing() -> list[str]:
        told = read_json(path)
        made = [key for part in told["commands"] for key in recording.expand(part["makes"])]
        return sorted({key["race"] for key in made if not any(key.items() <= row.items() for row in told["rows"])})

    call("Monday", [8])
    assert missing() == ["32, Monday"]
    call("Tuesday", [8])
    assert missing() == ["32, Tuesday"]
    call("Wednesday", [8, 32])
    assert missing() == [] and list(plots.races(read_json(path)["rows"])) == ["8, Wednesday", "32, Wednesday"]


def test_races_from_before_they_had_names_are_those_of_a_command_and_give_way_too(tmp_path):
    before = read_json(ROOT / "results" / "speed.json")
    old = [row for row in before["rows"] if not row.get("race")]
    if not old:
        pytest.skip("results/speed.json has named races alone")
    together = plots.races(before["rows"])
    assert sum(map(len, together.values())) == len(before["rows"])
    for rows in together.values():
        for name in ("command", "model", "batch", "device"):
            assert len({row[name] for row in rows}) == 1
        assert len({(row["contender"], row["method"]) for row in rows}) == len(rows)
    path = tmp_path / "speed.json"
    write_json(path, before)
    mine = [row for row in old if row["model"] == "dialogpt-medium" and row["batch"] == 8 and row["method"] == "qlora"]
    race, rows = some_race("new", [*dict.fromkeys(row["contender"] for row in mine), "lora/ours"])
    for row in rows:
        row["precision"] = "bf16"
    race = dataclasses.replace(race, entries=tuple(dataclasses.replace(one, precision="bf16") for one in race.entries))
    record(path, race, rows, "python benchmarks/speed.py --new")
    # As when records are merged.
    left = speed.derived(read_json(path))["rows"]
    # The race of LoRA's own contenders at batch 8 is another, and stays.
    gone = [row for row in before["rows"] if row not in mine and row not in left]
    assert not any(row in left for row in mine) and len(gone) == 1 and gone[0]["command"] == mine[0]["command"]


def test_both_kinds_of_time_are_drawn_and_the_host_is_named():
    _, rows = some_race("new", ["recipe", "recipe_fp16_reentrant", "compiled", "compiled_graphs", "ours", "lora/ours"])
    for number, row in enumerate(rows):
        if row["contender"] != "compiled_graphs":
            rate = 20.0 * (number + 1)
            row |= {"samples_per_second": rate, "samples_per_second_range": [rate, rate], "problem": None}
            row |= {"device_seconds": 0.03 / (number + 1), "device_seconds_means": "busy"}
        row["environment"] = {"host": {"cpu": "Intel(R) Xeon(R) Platinum 8481C CPU", "cores": 16, "threads": 1}}

    def texts(rows) -> str:
        figure = plots.speed(rows)
        assert_whole(figure, "speed")
        assert_readable_on_a_phone(figure, "speed")
        return "\n".join(
            [text.get_text() for axes in figure.axes for text in (*axes.texts, *axes.get_yticklabels())]
            + [axes.get_title(loc="left") for axes in figure.axes]
            + [axes.get_xlabel() for axes in figure.axes]
            + [text.get_text() for legend in figure.legends for text in legend.get_texts()]
        )

    shown = texts(rows)
    assert "host: Intel Xeon Platinum 8481C CPU, 16 cores, 1 thread" in shown.replace("\n", " ")
    assert "qlora_kit, LoRA" in shown and "could not run" in shown
    assert "by its kernels" in shown
    assert "100 (5x)" in shown and "1,333 (5x)" in shown  # as trained, and by kernels
    assert "counted twice" not in shown
    for row in rows:
        del row["device_seconds_means"]
    assert "counted twice" in texts(rows)
    for row in rows:
        row["device_seconds"] = None
    assert "by its kernels" not in texts(rows)


# --- its command ------------------------------------------------------------------------------------------------


def test_the_time_a_race_takes_is_told_beforehand(monkeypatch, capsys, tmp_path):
    who = ["recipe", "grouped", "compiled", "compiled_graphs", "ours", "lora/ours"]
    arguments = ["--list", "cuda", "--batches", "8", "--methods", "qlora", "--contenders", *who, "--seconds", "580"]
    monkeypatch.setattr(sys, "argv", ["speed.py", *arguments, "--work", str(tmp_path)])
    assert speed.main() == 0
    told = capsys.readouterr().out
    assert "dialogpt-medium, bf16, batch 8" in told and " of 580" in told and "--prepare first" in told
    assert "left behind: compiled_graphs, batch 8\n" in told  # nothing is compiled for it beforehand
    for name in ("recipe", "compiled_graphs", "ours, LoRA"):
        assert f"  {name} " in told
    known = read_json(ROOT / "results" / "speed.json")["rows"]
    mine = [row for row in known if (row["contender"], row["model"], row["batch"]) == ("grouped", "dialogpt-medium", 8)]
    step = statistics.median(row["step_seconds"] for row in mine if row["method"] == "qlora")
    its = speed.takes(entry("grouped", model="dialogpt-medium", batch=8), known, cuda=True, prepared=False)
    assert its.repeat == pytest.approx(50 * step) and not its.guessed
    assert speed.takes(entry("compiled_graphs"), [], cuda=True, prepared=False).guessed


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["--steps", "0"], "--steps must be 1 or more"),
        (["--widths", "16", "-3"], "--widths must be 1 or more"),
        (["--prepare", "--contenders", "ours"], "--prepare compiles for fixed widths"),
    ],
)
def test_what_cannot_be_raced_is_refused_in_one_line(arguments, line, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["speed.py", *arguments])
    assert speed.main() == 2
    said = capsys.readouterr().err
    assert line in said and said.count("\n") == 1


# --- the limit --------------------------------------------------------------------------------------------------


def test_every_product_of_an_adapted_layer_is_counted():
    rows, wide, narrow, rank = 5, 64, 128, 4
    model = nn.Sequential(nn.Linear(wide, narrow))
    quantize_with_bitsandbytes_(model, Quantization(scheme="nf4"), [], torch.float32)
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=rank, target_modules=["0"], lora_dropout=0.1))
    fuse_(adapted)
    x = torch.randn(rows, wide, requires_grad=True)
    with ceilings.operations() as counter:
        adapted(x).sum().backward()
    # The base's product and the one that carries its gradient on; A and B, each forward, backward, and for its weights.
    assert counter.total == 2 * rows * (2 * wide * narrow + 3 * rank * (wide + narrow))


def test_products_of_grouped_queries_are_counted():
    import transformers

    layers, batch, length, wide, middle, heads, groups = 2, 3, 5, 32, 48, 4, 2
    config = transformers.LlamaConfig(
        num_hidden_layers=layers, hidden_size=wide, intermediate_size=middle, vocab_size=11, num_labels=7,
        num_attention_heads=heads, num_key_value_heads=groups, pad_token_id=0, attn_implementation="eager",
    )  # fmt: skip
    model = transformers.LlamaForSequenceClassification(config)
    ids = torch.ones((batch, length), dtype=torch.long)
    with ceilings.operations() as counter:
        model(input_ids=ids, labels=torch.zeros(batch, dtype=torch.long)).loss.backward()
    narrow = wide // heads * groups
    weights = layers * (2 * wide * wide + 2 * wide * narrow + 3 * wide * middle) + wide * 7
    attention = layers * 2 * length * wide  # queries times keys, and probabilities times values
    # Each forward, and in the backward pass for both of its factors; the positions' angles are a product as well.
    angles = 2 * batch * length * (wide // heads // 2)
    assert counter.total - 6 * batch * length * (weights + attention) in (0, angles, angles // batch)


def test_a_product_that_nobody_can_count_is_an_error():
    with pytest.raises(NotImplementedError, match="mv"), ceilings.operations():
        torch.ones(3, 3) @ torch.ones(3)


def test_what_runs_side_by_side_is_counted_once_and_over_enough_steps():
    assert contenders.covered([(0, 4), (2, 6), (3, 5), (9, 10)]) == 7
    assert contenders.covered([]) == 0
    assert all(entry(name).profiled_steps >= 20 for name in CONTENDERS)


# --- whole ------------------------------------------------------------------------------------------------------


@pytest.mark.long
def test_races_stand_beside_each_other_and_who_is_late_is_left_behind(tmp_path: Path):
    out = tmp_path / "speed.json"
    race = ["--models", "minilm:1", "--batches", "2", "--precisions", "fp32", "--methods", "qlora", "--steps", "1"]
    race += ["--out", str(out), "--append", "--from-changes"]
    done = benchmark(*race, "--repeats", "2", "--contenders", "grouped", "ours", "lora/ours", "unsloth")
    assert done.returncode == 0, done.stderr
    first = read_json(out)
    assert {(row["contender"], row["method"], row["repeats"]) for row in first["rows"]} == {
        ("grouped", "qlora", 2),
        ("ours", "qlora", 2),
        ("ours", "lora", 2),
        ("unsloth", "qlora", 0),
    }
    assert len({row["race"] for row in first["rows"]}) == len({row["commit"] for row in first["rows"]}) == 1
    for row in first["rows"]:
        assert row["model"] == "minilm:1" and set(speed.KEY) <= set(row)
        if row["contender"] == "unsloth":
            assert row["problem"] == "ValueError: unsloth has no minilm:1" and row["padding"] == "grouped"
        else:
            assert row["samples_per_second"] > 0 and len(row["repeats_seconds"]) == 2
            assert row["environment"]["host"]["threads"] >= 1 and row["peak_bytes"] > 0
    assert [(row["method"], row["batch"]) for row in first["limit"]] == [("qlora", 2), ("lora", 2)]
    assert out.with_suffix(".png").is_file()
    assert not list(schemas.problems(first, schemas.of_results("speed")))

    done = benchmark(*race, "--repeats", "1", "--contenders", "grouped", "--patience", "0")
    assert done.returncode == 0, done.stderr
    both = read_json(out)
    assert both["rows"][:4] == first["rows"]
    late = both["rows"][4]
    assert (late["contender"], late["repeats"], late["samples_per_second"]) == ("grouped", 0, None)
    assert late["problem"].startswith("not ready after")
    assert both["command"].count("python benchmarks/speed.py") == 2

    done = benchmark("--models", "minlm")
    assert done.returncode == 2 and "minlm: allowed is one of minilm" in done.stderr


@pytest.mark.long
def test_what_was_compiled_beforehand_is_found_by_the_race(tmp_path: Path):
    out = tmp_path / "speed.json"
    race = ["--models", "minilm:1", "--batches", "4", "--precisions", "fp32", "--methods", "qlora", "--steps", "2"]
    race += ["--contenders", "compiled_graphs", "--widths", "16", "--work", str(tmp_path / "work")]
    done = benchmark(*race, "--prepare")
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("compiled after") == 2 and "width 16" in done.stdout and "width 128" in done.stdout
    done = benchmark(*race, "--repeats", "1", "--out", str(out), "--from-changes")
    assert done.returncode == 0, done.stderr
    (row,) = json.loads(out.read_text())["rows"]
    assert row["widths"] == [16, 128] and row["padding"] == "grouped_fixed_widths" and row["compiled"] == "static"
    assert row["from_cache"] is True and row["compiled_while_raced"] == 0 and row["samples_per_second"] > 0
