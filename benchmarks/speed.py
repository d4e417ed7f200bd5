r"""Race ways of training against each other: results/speed.json and results/speed.png.

    python benchmarks/speed.py                          # this machine's default model; on a GPU DialoGPT-medium's shape
    python benchmarks/speed.py --models minilm --batches 32 --precisions fp32 bf16 --contenders grouped ours
    python benchmarks/speed.py --batches 8 --list       # what that would race, and how long it takes; nothing starts

`--help` ends with the contenders, and contenders.py has what each is told. All but `recipe_lean` and `ours` have PEFT's
own layers and transformers' own attention. A race is one model, precision and batch: its contenders are processes of
their own that are started together (on a GPU; one after the other without), and then take turns. Each trains `--steps`
steps (where every batch is as wide as the next, a tenth of them) while the others wait, `--repeats` times over, so that
what the machine does besides falls on all alike (a GPU's host varies by two). The first such repeat is not counted.
What torch.compile makes is made before: a compiled contender first trains on three batches of each width that its
batches can have.

A row has every repeat (`repeats_seconds`, `repeats_samples`, `repeats_tokens`); `step_seconds` and `samples_per_second`
are medians over them, data loading, clipping and optimizer included. `start_seconds` is from the process's start to its
first finished step, `ready_seconds` to the end of the repeat that is not counted, `from_cache` whether torch.compile
found there what it had made before. On CUDA `device_seconds` is how long the GPU is busy in a step, kernels that run
side by side counted once (`device_seconds_means: busy`; rows without that added them up): from the profiler, a mean
over `device_steps` steps after the last repeat. `peak_bytes` is the most bytes allocated. On a CPU the former does not
exist and the latter is the resident set. `compiled_while_raced` counts what torch.compile made while the clock ran.
`environment` has the `host`: its CPU, cores and threads. Rows of one race have one `race`, and only those raced each
other (`qlora_kit.plots.races` puts them together). A row has a `problem` where a contender could not go on, or was not
ready in time. Weights are random where the model's own are not on this machine: speed and memory do not depend on them.

Time. torch.compile takes about 290 s for DialoGPT-medium's shape, and `compiled_graphs` as long for each of its widths.
`--prepare` compiles those beforehand, a process a width, side by side, and keeps what is compiled in `--work`; the race
then finds it there, and only traces the model anew. With `--seconds` the whole command ends by then: who compiles and
would be ready too late for three repeats is left behind, and there are fewer repeats where five do not fit. Rows are
written after each repeat. On a GPU machine that runs a command for ten minutes at most, a batch is two commands, one
after the other on the same machine (`--list` says what each takes; `python benchmarks/all.py --device cuda` calls
them), and SmolLM2's is one:

    python benchmarks/speed.py --batches 8 --methods qlora --contenders compiled_graphs --prepare --seconds 580
    python benchmarks/speed.py --batches 8 --methods qlora --contenders recipe recipe_fp16_reentrant padded_longest \
        grouped compiled compiled_graphs compiled_graphs_dynamic ours_eager ours lora/ours --seconds 580 --append
    python benchmarks/speed.py --models smollm2-135m --methods qlora --contenders padded_longest grouped unsloth \
        ours_eager ours --append --batches 8 --seconds 580

A race replaces an earlier one of the same model, batch and device once it is through, if it has all contenders of that.

`limit` is what a step cannot do without, over what this device reaches (see ceilings.py).
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import statistics
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ceilings import limit
from common import ROOT, recording
from common.processes import Worker
from common.refusals import told_in_a_line
from contenders import CONTENDERS, MODELS, WIDTHS, Entry, compete, widths_of

from qlora_kit.errors import KitError
from qlora_kit.system.environment import environment, is_gpu
from qlora_kit.system.files import write_json
from qlora_kit.system.parsing import read_json

FOREVER = 1e7
FEWEST_REPEATS = 3
"""Fewest repeats of a race: contenders that are ready too late for them are dropped."""
KEY = ("model", "precision", "batch", "device", "race", "method", "contender")
"""The names that identify a row."""


@told_in_a_line
def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__,
        epilog="\n".join(["contenders:", *(f"  {name:24}{who.says}" for name, who in CONTENDERS.items())]),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--models",
        nargs="+",
        type=known_model,
        default=None,
        metavar="MODEL",
        help=f"of {', '.join(MODELS)}; MODEL:6 is its first six layers, which torch.compile is through with sooner",
    )
    parser.add_argument("--methods", nargs="+", choices=["qlora", "lora"], default=["qlora", "lora"])
    parser.add_argument(
        "--contenders",
        nargs="+",
        choices=[*CONTENDERS, *(f"lora/{name}" for name in CONTENDERS)],
        default=None,
        metavar="CONTENDER",
        help=f"of {', '.join(CONTENDERS)}; lora/CONTENDER races with LoRA whatever --methods says",
    )
    parser.add_argument("--batches", nargs="+", type=int, default=None)
    parser.add_argument("--precisions", nargs="+", choices=["fp32", "fp16", "bf16"], default=None)
    parser.add_argument("--steps", type=int, default=50, help="a repeat; group_by_length sorts 50 batches at a time")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument(
        "--widths", nargs="+", type=int, default=list(WIDTHS), help="tokens that compiled_graphs compiles for"
    )
    parser.add_argument(
        "--at-once", action="store_true", help="start all batches' contenders together, to compile at once"
    )
    parser.add_argument(
        "--patience", type=float, default=1800, help="seconds until a contender has started and warmed up"
    )
    parser.add_argument("--seconds", type=float, default=FOREVER, help="end the whole command by then")
    parser.add_argument("--prepare", action="store_true", help="compile for the fixed widths, and race nobody")
    parser.add_argument(
        "--list",
        nargs="?",
        choices=["here", "cpu", "cuda"],
        const="here",
        help="say what would race and what it takes, here or on the device named, and start nothing",
    )
    parser.add_argument("--out", default="results/speed.json")
    parser.add_argument("--work", default="runs/speed", help="folder of what torch.compile makes")
    recording.add_options(parser)
    parser.add_argument("--one", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        compete(Entry.from_json(options.one))
        return 0
    options.deadline = time.monotonic() + options.seconds
    settle(options)
    if options.list:
        print(budget(options))
        return 0
    return prepare(options) if options.prepare else race_all(options)


def known_model(text: str) -> str:
    """Return a model's name, which may include a number of layers, or refuse an unknown one."""
    name, _, layers = text.partition(":")
    if name not in MODELS or (layers or "1").strip("0123456789"):
        raise argparse.ArgumentTypeError(f"{text}: allowed is one of {', '.join(MODELS)}, or MODEL:LAYERS")
    return text


# --- what races -------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Race:
    """Contenders of one model, precision and batch that take turns."""

    name: str
    model: str
    precision: str
    batch: int
    entries: tuple[Entry, ...]


def settle(options: argparse.Namespace) -> None:
    """Fill in missing options with defaults for this machine.

    Raises:
        KitError: For numbers below 1, and for --prepare without a contender with fixed widths.
    """
    import torch

    from qlora_kit import models

    for name in ("steps", "repeats", "batches", "widths"):
        values = getattr(options, name)
        if values is not None and min(values if isinstance(values, list) else [values]) < 1:
            raise KitError(f"--{name} must be 1 or more")
    options.cuda = torch.cuda.is_available() if options.list in (None, "here") else options.list == "cuda"
    options.models = options.models or (["dialogpt-medium"] if options.cuda else ["minilm"])
    options.batches = list(dict.fromkeys(options.batches or ([8, 32, 64] if options.cuda else [32])))
    if options.precisions is None:
        native = models.resolve_precision("auto", models.default_device())
        options.precisions = ["bf16" if options.list == "cuda" else native]
        if not options.cuda:
            options.precisions = sorted({"fp32", native})
    # On a CPU, compiling takes minutes for each shape, and the kit captures no graphs: `ours` equals `ours_eager`.
    options.contenders = options.contenders or (
        list(CONTENDERS) if options.cuda else ["recipe", "padded_longest", "grouped", "ours"]
    )
    if options.prepare and not fixed_widths(options):
        raise KitError("--prepare compiles for fixed widths: name compiled_graphs among --contenders")


def races(options: argparse.Namespace) -> list[Race]:
    """Return all races of a command, in their order."""
    now = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
    plain = [(method, name) for method in options.methods for name in options.contenders if "/" not in name]
    told = plain + [("lora", name.removeprefix("lora/")) for name in options.contenders if "/" in name]
    return [
        Race(
            f"{model}, {precision}, batch {batch}, {now}",
            model,
            precision,
            batch,
            # QLoRA and LoRA of a contender race together: their ratio is a claim too.
            tuple(
                Entry(
                    model,
                    method,
                    name,
                    CONTENDERS[name].precision_in(precision, options.cuda),
                    batch,
                    options.steps,
                    tuple(sorted(set(options.widths))),
                    str(cache(options)),
                )
                for method, name in dict.fromkeys(told)
            ),
        )
        for model in options.models
        for precision in options.precisions
        for batch in options.batches
    ]


def fixed_widths(options: argparse.Namespace) -> bool:
    """Return whether there is a contender that is compiled for each width."""
    return any(entry.spec.compiled == "static" for race in races(options) for entry in race.entries)


def groups_of(options: argparse.Namespace) -> list[list[Race]]:
    """Return the races that start together: one by one, or with --at-once all batches of a model and precision."""
    found: dict[Any, list[Race]] = {}
    for race in races(options):
        found.setdefault((race.model, race.precision) if options.at_once else race.name, []).append(race)
    return list(found.values())


# --- how long it takes ------------------------------------------------------------------------------------------

LIMITS = 20.0
"""Seconds that counting the limits of a race takes."""
PROFILER = 3.0
"""Seconds that starting and reading the profiler takes."""


@dataclasses.dataclass(frozen=True)
class Takes:
    """How long one contender takes, in seconds: until it is ready, for a repeat, and for timing its kernels."""

    ready: float
    repeat: float
    kernels: float
    guessed: bool


def takes(entry: Entry, known: Sequence[Mapping[str, Any]], cuda: bool, prepared: bool) -> Takes:
    """Estimate how long a contender takes, from existing rows, or else by a guess.

    Args:
        entry: The contender.
        known: Rows of results/speed.json.
        cuda: Whether it races on a GPU; rows of the other kind of device are ignored.
        prepared: Whether its widths have been compiled beforehand.
    """
    mine = [
        row
        for row in known
        if (row["model"].partition(":")[0], row["contender"]) == (entry.model.partition(":")[0], entry.contender)
        and row.get("step_seconds")
        and is_gpu(row["device"]) == cuda
    ]
    near = [row for row in mine if (row["method"], row["batch"]) == (entry.method, entry.batch)] or mine
    step = statistics.median(row["step_seconds"] for row in near) if near else (0.3 if cuda else 1.0)
    if entry.contender.startswith("compiled_graphs") and not near:
        step = 0.05 if cuda else step
    starts = [row["start_seconds"] for row in near if row["start_seconds"] and not row.get("from_cache")]
    start = statistics.median(starts) if starts else (40.0 if cuda else 15.0)
    if entry.spec.compiled and not starts:
        start = 300.0 if cuda else 90.0
        if entry.spec.compiled == "static":
            # Code from the cache still has to be traced for each width: a tenth of the time, on a CPU.
            start = 40 + start * len(entry.widths) / 10 if prepared else start * len(entry.widths)
    # On a GPU, the uncounted repeat runs while other contenders are still starting.
    return Takes(
        start + entry.raced_steps * step,
        entry.raced_steps * step,
        entry.profiled_steps * step + PROFILER if cuda else 0.0,
        not (near and starts),
    )


def known_rows(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Return the rows for estimating times."""
    files = dict.fromkeys(path.resolve() for path in (Path(options.out), ROOT / "results" / "speed.json"))
    return [row for path in files if path.is_file() for row in read_json(path)["rows"]]


def is_prepared(options: argparse.Namespace) -> bool:
    """Return whether something was compiled beforehand."""
    return any(cache(options).glob("*"))


def cache(options: argparse.Namespace) -> Path:
    """Return the folder of torch.compile's cache."""
    return Path(options.work).resolve() / "compiled"


def budget(options: argparse.Namespace) -> str:
    """Return a table of what would race, and how long each part of the command takes."""
    known, lines, whole = known_rows(options), [], 0.0
    prepared = is_prepared(options)
    for group in groups_of(options):
        ready: dict[str, tuple[float, bool]] = {}
        rest = fewest = 0.0
        for race in group:
            lines.append(f"{race.model}, {race.precision}, batch {race.batch}")
            lines.append(f"  {'contender':30} {'in':5} {'batches padded to':24}  ready, s  repeat, s  kernels, s")
            repeats = kernels = 0.0
            for entry in race.entries:
                its = takes(entry, known, options.cuda, prepared or options.prepare)
                name = entry.contender + (", LoRA" if entry.method == "lora" else "")
                guess = " (a guess)" if its.guessed else ""
                lines.append(
                    f"  {name:30} {entry.precision:5} {entry.spec.padding:24} {its.ready:9.0f} {its.repeat:10.1f} "
                    f"{its.kernels:11.1f}{guess}"
                )
                ready[f"{name}, batch {race.batch}"] = its.ready, entry.spec.compiled is not None
                repeats += its.repeat
                kernels += its.kernels
            lines.append(
                f"  {options.repeats} repeats {options.repeats * repeats:.0f} s, kernels {kernels:.0f} s, "
                f"limit {LIMITS:.0f} s"
            )
            rest += options.repeats * repeats + kernels + LIMITS
            fewest += FEWEST_REPEATS * repeats + kernels + LIMITS
        together = max if options.cuda else sum
        start = together(seconds for seconds, _ in ready.values())
        how = "side by side" if options.cuda else "one after the other"
        lines.append(f"  started {how}: all ready after {start:.0f} s, through after {start + rest:.0f} s")
        whole += start + rest
        left = options.seconds - fewest
        late = [name for name, (seconds, compiles) in ready.items() if compiles and seconds > left]
        if late:
            lines.append(f"  too late for {FEWEST_REPEATS} repeats of all, and left behind: {', '.join(late)}")
        if together([0.0, *(seconds for name, (seconds, _) in ready.items() if name not in late)]) > left:
            lines.append(f"  too many for {FEWEST_REPEATS} repeats in that time: race fewer batches at once")
    most = f" of {options.seconds:.0f}" if options.seconds < FOREVER else ""
    lines.append(f"the whole command: {whole:.0f} s{most}")
    if fixed_widths(options) and not prepared:
        lines.append("nothing is compiled beforehand for compiled_graphs: run the same with --prepare first")
    return "\n".join(lines)


# --- the race ---------------------------------------------------------------------------------------------------


class Racer(Worker):
    """A contender's process: it trains the steps of one repeat on each command."""

    def __init__(self, entry: Entry, command: Sequence[str] | None = None) -> None:
        self.entry = entry
        self.name = f"{entry.contender}{', LoRA' if entry.method == 'lora' else ''}"
        self.times: list[dict[str, Any]] = []
        self.start: dict[str, Any] = {}
        self.warm: dict[str, Any] = {}
        super().__init__(command or [sys.executable, str(Path(__file__).resolve()), "--one", entry.to_json()])
        self.tell("go")

    def begin(self, until: float) -> None:
        """Wait for its first step and the repeat that does not count."""
        self.start = self.hear(until)
        if self.problem is None:
            self.warm = self.hear(until)
        ready = f"ready after {self.warm['ready_seconds']:.1f} s" if self.problem is None else self.problem
        print(f"{self.entry.model} {self.name}, batch {self.entry.batch}: {ready}", flush=True)

    def turn(self, word: str, until: float) -> dict[str, Any]:
        """Send a word and return its report; a process that does not report in time is killed."""
        self.tell(word)
        asked = time.monotonic()
        found = self.hear(until)
        if self.problem and self.problem.startswith("not ready"):
            doing = "its kernels were timed" if word == "end" else f"repeat {len(self.times) + 1} was through"
            self.problem = f"out of time before {doing}, {time.monotonic() - asked:.0f} s after it had begun"
        if self.problem:
            print(f"{self.name} stopped: {self.problem}", flush=True)
        return found


def reserve(racers: Sequence[Racer], known: Sequence[Mapping[str, Any]], cuda: bool) -> float:
    """Return the seconds that these contenders need for the fewest repeats and everything after them."""
    total = 0.0
    for racer in racers:
        if racer.problem is not None:
            continue
        its = takes(racer.entry, known, cuda, True)
        repeat, kernels = its.repeat, its.kernels
        # The first repeat's time is an upper bound, because others were starting meanwhile; a record of another machine
        # may be too high as well. For compiled contenders the first repeat includes compiling, so it is not used.
        if racer.warm and not racer.entry.spec.compiled and (its.guessed or racer.warm["seconds"] < repeat):
            repeat, kernels = racer.warm["seconds"], _kernels(racer) if cuda else 0.0
        total += FEWEST_REPEATS * repeat + kernels
    return total + LIMITS


def start(options: argparse.Namespace, group: Sequence[Race], deadline: float) -> list[list[Racer]]:
    """Start a process for each contender of races that start together, and wait until each is ready or too late."""
    known = known_rows(options)
    fields: list[list[Racer]] = [[] for _ in group]
    everyone: list[Racer] = []

    def wait(racer: Racer) -> None:
        # Wait for a compiling contender at most until only the time for the others' turns is left.
        left = reserve(everyone, known, options.cuda) if racer.entry.spec.compiled else LIMITS
        racer.begin(min(racer.born + options.patience, deadline - left))

    for race, field in zip(group, fields, strict=True):
        for entry in race.entries:
            field.append(Racer(entry))
            everyone.append(field[-1])
            if not options.cuda:
                wait(field[-1])
    if options.cuda:
        # Wait for compiling contenders last: by then the length of the others' turns is known.
        for racer in sorted(everyone, key=lambda racer: (racer.entry.spec.compiled or "").replace("static", "z")):
            wait(racer)
    return fields


def race_all(options: argparse.Namespace) -> int:
    from qlora_kit import models, plots

    provenance = recording.begin(options)
    print(budget(options), flush=True)
    here = environment(models.default_device())
    command = recording.command_line("speed.py")
    groups = groups_of(options)
    everything = [race for group in groups for race in group]
    out = Path(options.out)
    variants = out.with_name(f"{out.stem}_variants.json")
    known_before = {path: options.append for path in (out, variants)}
    done: list[Race] = []
    limits: list[dict[str, Any]] = []
    missing: list[str] = []

    def write(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
        # The rows of all races, so that a check finds those missing after a kill.
        told = [
            key_of(race, entry, here["device"])
            for race in everything
            for entry in race.entries
            if not entry.spec.variant or (path == variants and has_variants(race))
        ]
        recording.write(
            path,
            [provenance.stamped(row, row["environment"] or here) for row in rows],
            provenance=provenance,
            command=command,
            makes=told,
            key=KEY,
            append=known_before[path],
            **({"limit": limits} if path == out else {}),
        )
        known_before[path] = True

    for number, group in enumerate(groups):
        # The remaining time is shared equally with the later groups.
        deadline = time.monotonic() + (options.deadline - time.monotonic()) / (len(groups) - number)
        fields = start(options, group, deadline)
        for place, (race, racers) in enumerate(zip(group, fields, strict=True)):
            # Later races of the group need their time too.
            later = sum(reserve(field, known_rows(options), options.cuda) for field in fields[place + 1 :])
            until = deadline - later - LIMITS * len(group)
            for rows in run(race, racers, options, here["device"], until):
                write(out, [row for row in rows if not CONTENDERS[row["contender"]].variant])
                if has_variants(race):
                    write(variants, rows)
            done.append(race)
            for path in (out, variants):
                if path.is_file():
                    names = [race.name for race in everything]
                    write_json(path, superseded(read_json(path), race.name, command, names))
    for race in done:
        for method in dict.fromkeys(entry.method for entry in race.entries):
            if time.monotonic() > options.deadline:
                missing.append(f"no limit of {race.name}, {method}: out of time")
                continue
            try:
                limits.append(limit(race.model, method, race.precision, race.batch))
            except Exception as error:  # keep the race even if its limit fails
                missing.append(f"no limit of {race.name}, {method}: {type(error).__name__}: {error}")
    record = read_json(out)
    record["limit"] = with_limits(record.get("limit", []), limits)
    write_json(out, record)
    plots.save(plots.speed(record["rows"], record["limit"]), out.parent, out.stem)
    print(f"written: {options.out}")
    print("\n".join(missing), file=sys.stderr, end="\n" if missing else "")
    return 1 if missing else 0


def with_limits(old: Sequence[Mapping[str, Any]], new: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Return limits; those of `new` replace older ones of the same step and device."""
    names = recording.SECTIONS["limit"]
    fresh = {tuple(line[name] for name in names) for line in new}
    return [line for line in old if tuple(line[name] for name in names) not in fresh] + list(new)


def key_of(race: Race, entry: Entry, device: str) -> dict[str, Any]:
    """Return the key of a contender's row."""
    return {
        "model": race.model,
        "precision": entry.precision,
        "batch": race.batch,
        "device": device,
        "race": race.name,
        "method": entry.method,
        "contender": entry.contender,
    }


def has_variants(race: Race) -> bool:
    """Return whether a race is also written to speed_variants.json."""
    return any(entry.spec.variant for entry in race.entries)


def superseded(record: dict[str, Any], name: str, command: str = "", names: Sequence[str] = ()) -> dict[str, Any]:
    """Return a record without earlier races that a complete one replaces: same device, and it has all their contenders.

    Args:
        record: The record.
        name: The complete race.
        command: Its command. Rows that an earlier call of it should have made, but did not, no longer count as missing.
        names: The names of all races of this call.
    """
    from qlora_kit import plots

    def who(row: Mapping[str, Any]) -> tuple[Any, ...]:
        return (row["method"], row["contender"], row["precision"])

    new = [row for row in record["rows"] if row.get("race") == name]
    here = [{row[key] for row in new} for key in ("model", "batch", "device")]
    gone = []
    for rows in plots.races(record["rows"]).values():
        same = all(
            {row[key] for row in rows} == mine for key, mine in zip(("model", "batch", "device"), here, strict=True)
        )
        if same and _began(rows[0].get("race")) < _began(name) and set(map(who, rows)) <= set(map(who, new)):
            gone += rows
    kept = [row for row in record["rows"] if row not in gone]
    commands = []
    for entry in record["commands"]:
        dropped, there = ([row for row in rows if row["command"] == entry["command"]] for rows in (gone, kept))
        made = [
            made
            for made in recording.expand(entry["makes"])
            if _among(made, there)
            or (not _among(made, dropped) and (entry["command"] != command or made.get("race") in names))
        ]
        if made:
            commands.append({**entry, "makes": recording.products(made)})
    told = "; ".join(dict.fromkeys(entry["command"] for entry in commands))
    return record | {"command": told, "commands": commands, "rows": kept}


def derived(record: dict[str, Any]) -> dict[str, Any]:
    """Return a merged record without the races that others in it replace."""
    from qlora_kit import plots

    for name, rows in plots.races(record["rows"]).items():
        if all(row.get("race") and (row["problem"] or row["repeats"] >= FEWEST_REPEATS) for row in rows):
            record = superseded(record, name)
    return record


def _began(race: str | None) -> str:
    """Return a race's start time from its name; older races have no name, and sort first."""
    return (race or "").rpartition(", ")[2]


def _among(made: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> bool:
    """Return whether one of these rows has the values of a key."""
    return any(all(row.get(name) == value for name, value in made.items()) for row in rows)


def run(
    race: Race, racers: Sequence[Racer], options: argparse.Namespace, device: str, until: float
) -> Iterator[list[dict[str, Any]]]:
    """Let all contenders of one race take turns; after each repeat, yield the rows so far.

    Args:
        race: The race.
        racers: Its contenders, started.
        options: The command's options; `repeats` and `cuda` are read.
        device: Name of the device, for rows of contenders that never reported it.
        until: Time of `time.monotonic()` by which the race has to end.
    """

    def rows() -> list[dict[str, Any]]:
        return [row_of(race, racer, ends.get(racer, {}), device) for racer in racers]

    ends: dict[Racer, dict[str, Any]] = {}
    able = [racer for racer in racers if racer.problem is None]
    last = 0.0
    yield rows()
    for repeat in range(options.repeats):
        kernels = sum(_kernels(racer) for racer in able) if options.cuda else 0.0
        if repeat and time.monotonic() + last + kernels > until:
            print(f"out of time after {repeat} of {options.repeats} repeats", flush=True)
            break
        began = time.monotonic()
        for racer in able if repeat % 2 else list(reversed(able)):
            if repeat and time.monotonic() > until - kernels:
                break  # another contender hung until now
            # A contender that hangs must not use up the time for the others' kernels.
            found = racer.turn("go", until - kernels)
            if racer.problem is None:
                racer.times.append(found)
        last = time.monotonic() - began
        able = [racer for racer in able if racer.problem is None]
        print(f"repeat {repeat + 1} of {options.repeats}: {last:.0f} s", flush=True)
        yield rows()
    for place, racer in enumerate(able):
        later = sum(_kernels(other) for other in able[place + 1 :]) if options.cuda else 0.0
        ends[racer] = racer.turn("end", until - later)
        if racer.problem is None:
            print(f"{racer.name}: {row_of(race, racer, ends[racer], device)['samples_per_second']:.1f} samples/s")
        yield rows()
    for racer in racers:
        racer.stop()


def _kernels(racer: Racer) -> float:
    """Estimate the seconds for timing a contender's kernels, from its last repeat."""
    made = (racer.times or [racer.warm])[-1]
    return float(made["seconds"] / made["steps"] * racer.entry.profiled_steps + PROFILER)


def row_of(race: Race, racer: Racer, end: Mapping[str, Any], device: str) -> dict[str, Any]:
    """Build a contender's row: every repeat, medians over them, and the facts that its process reported."""
    entry, spec, made = racer.entry, racer.entry.spec, racer.times
    rates = [time["samples"] / time["seconds"] for time in made]
    median = statistics.median
    compiled = made and made[-1].get("compiled_graphs") is not None
    return {
        **key_of(race, entry, device),
        "scheme": "nf4" if entry.method == "qlora" else "none",
        "double_quantization": entry.method == "qlora",
        "padding": spec.padding,
        "widths": racer.start.get("widths"),
        "checkpointing": spec.checkpointing,
        "dropout": spec.dropout,
        "compiled": spec.compiled,
        "samples_per_second": median(rates) if rates else None,
        "samples_per_second_range": [min(rates), max(rates)] if rates else None,
        "tokens_per_second": median(t["tokens"] / t["seconds"] for t in made) if rates else None,
        "step_seconds": median(t["seconds"] / t["steps"] for t in made) if rates else None,
        "steps": entry.raced_steps,
        "repeats_seconds": [time["seconds"] for time in made],
        "repeats_samples": [time["samples"] for time in made],
        "repeats_tokens": [time["tokens"] for time in made],
        "device_seconds": end.get("device_seconds"),
        "device_seconds_means": "busy" if end.get("device_seconds") is not None else None,
        "device_steps": end.get("device_steps"),
        "peak_bytes": end.get("peak_bytes"),
        "reserved_bytes": end.get("reserved_bytes"),
        "start_seconds": racer.start.get("start_seconds"),
        "ready_seconds": racer.warm.get("ready_seconds"),
        "from_cache": racer.start.get("from_cache") if spec.compiled else None,
        "compiled_while_raced": made[-1]["compiled_graphs"] - racer.warm["compiled_graphs"] if compiled else None,
        "optimizer": racer.start.get("optimizer"),
        "problem": racer.problem,
        "repeats": len(made),
        "environment": racer.start.get("environment"),
    }


# --- compiling beforehand ---------------------------------------------------------------------------------------


def prepare(options: argparse.Namespace) -> int:
    """Compile for each width in a separate process, in parallel, and keep the compiled code for the race."""
    from qlora_kit import data, models
    from qlora_kit.config.preset import preset

    racers: list[Racer] = []
    for race in races(options):
        for entry in race.entries:
            if entry.spec.compiled != "static":
                continue
            experiment = preset(f"{MODELS[entry.model.partition(':')[0]]}_{entry.method}")
            shape = {"model.name": "shape:dialogpt-medium"} if entry.model.startswith("dialogpt-medium") else {}
            texts = data.banking77().train.texts
            lengths = data.token_lengths(models.load_tokenizer(experiment.override(shape).model), texts)
            for width in widths_of(entry, lengths, experiment.data.max_length) or []:
                racers.append(Racer(dataclasses.replace(entry, only=width)))
    failed = 0
    for racer in racers:
        made = racer.hear(options.deadline)
        told = f"compiled after {made['start_seconds']:.0f} s" if racer.problem is None else racer.problem
        failed += racer.problem is not None
        print(f"{racer.name}, batch {racer.entry.batch}, width {racer.entry.only}: {told}", flush=True)
        racer.stop()
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
