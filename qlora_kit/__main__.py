"""The command line: the same calls as the library's, in a terminal.

Exit code 0; 2 for bad input, with one line on standard error that says what to do; 1 for a failure.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import sys
import warnings
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from . import __version__
from .errors import KitError, unknown

if TYPE_CHECKING:
    from .experiment import Experiment

COMMANDS = ("presets", "plan", "finetune", "evaluate", "predict", "search", "rerun", "run-notebooks", "check")

EXAMPLES = """\
examples, from nothing to a prediction:
  python -m qlora_kit presets                                 what there is to run
  python -m qlora_kit finetune minilm_banking77_qlora         train; ends with the run's folder
  python -m qlora_kit evaluate runs/minilm_banking77_qlora_seed0
  python -m qlora_kit predict runs/minilm_banking77_qlora_seed0 "My card has not arrived yet"

your own texts, with a column of texts and one of labels:
  python -m qlora_kit finetune minilm_banking77_qlora --name tickets \\
      --data tickets.csv --text message --label team --test 0.2

better settings, by their score on validation rows alone:
  python -m qlora_kit search minilm_banking77_qlora --trials 20

everything at once, with figures and one page of results:
  python -m qlora_kit run-notebooks --preset minilm_banking77_smoke --out runs/smoke

before it trains, what it will take; and whether an old run comes out the same here:
  python -m qlora_kit plan minilm_banking77_qlora --device T4
  python -m qlora_kit rerun runs/minilm_banking77_qlora_seed0

`python -m qlora_kit COMMAND --help` shows more of each.
Exit code: 0; 2 for bad input, with one line that says what to do; 1 for a failure.
"""

PRESETS_EXAMPLES = """\
examples:
  python -m qlora_kit presets                                 their names, one a line, with what each is
  python -m qlora_kit presets minilm_banking77_qlora          all its fields
  python -m qlora_kit presets minilm_banking77_qlora > mine.yaml
  python -m qlora_kit finetune mine.yaml                      after changing it

A preset's name is MODEL_DATA_METHOD; `presets auto` prints the one that this machine would take.
"""

FINETUNE_EXAMPLES = """\
examples:
  python -m qlora_kit finetune minilm_banking77_qlora
  python -m qlora_kit finetune minilm_banking77_qlora --set training.epochs=2 --set lora.r=8
  python -m qlora_kit finetune minilm_banking77_qlora --set training.seed=1 --out runs/seeds
  python -m qlora_kit finetune my_experiment.yaml
  python -m qlora_kit finetune minilm_banking77_qlora --name tickets --data train.csv --test test.csv

`presets NAME` prints every field that --set takes. The same command again goes on with a run that was cut off.
"""

PLAN_EXAMPLES = """\
examples:
  python -m qlora_kit plan minilm_banking77_qlora
  python -m qlora_kit plan dialogpt-medium_banking77_qlora --batch 8 --length 128 --device T4
  python -m qlora_kit plan shape:llama-7b --device T4 --length 512 --set training.gradient_checkpointing=true
  python -m qlora_kit plan shape:llama-7b --device T4 --length 512 --fits

Nothing is downloaded but a model's configuration, and no GPU is needed. Shapes without weights: shape:dialogpt-medium,
smollm2-135m, llama-1.1b, llama-3b, llama-7b, llama-13b, llama-30b, llama-65b.
"""

EVALUATE_EXAMPLES = """\
examples:
  python -m qlora_kit evaluate runs/minilm_banking77_qlora_seed0
  python -m qlora_kit evaluate runs/tickets --no-baselines    quicker: the baselines are trained for it

Prints each metric with its 95% interval, and writes evaluation.json into the run folder, which has more: every
label's, the confusions, the calibration. A row is printed for each baseline: fine-tuning has to be ahead of them.
"""

PREDICT_EXAMPLES = """\
examples:
  python -m qlora_kit predict runs/tickets "My card has not arrived yet" "Why was I charged twice?"
  python -m qlora_kit predict runs/tickets --json < texts.txt        one text a line, one JSON object a line
"""

SEARCH_EXAMPLES = """\
examples:
  python -m qlora_kit search minilm_banking77_qlora           20 trials on all rows: hours on a CPU
  python -m qlora_kit search minilm_banking77_qlora --trials 10 --set data.limit=1000 --set training.epochs=2
  python -m qlora_kit search minilm_banking77_qlora --space training.learning_rate=1e-4:1e-2:log --space lora.r=4,8,16
  python -m qlora_kit search minilm_banking77_qlora --storage drive/study.db
  python -m qlora_kit finetune runs/minilm_banking77_qlora_search/best.yaml --name searched --set data.limit=null

LOW:HIGH is a range (with :log on a logarithmic scale), A,B,C are choices. Each trial trains a model anew; the first one
is the experiment as it is. Validation rows decide. Test rows are not looked at: they are for the run that you train
with best.yaml, whose path is the last line. The same command again goes on with a search that was cut off, and with a
larger --trials it goes on with one that was not.
"""

RERUN_EXAMPLES = """\
examples:
  python -m qlora_kit rerun runs/minilm_banking77_qlora_seed0
  python -m qlora_kit rerun runs/latest/02_finetune.json --out runs/again
  python -m qlora_kit rerun runs/tickets --json

RECORD is a finished run folder, a file in it, or the record of a notebook that trained or tested. The experiment runs
again into OUT; then each difference is told: device, threads, versions, commit, data, base weights, and every result
(times and memory aside), to the last bit or by how much. Exit code 0: the same results; 1: others; 2: no such record.
"""

CHECK_EXAMPLES = """\
examples:
  python -m qlora_kit check runs/latest                       every record below it
  python -m qlora_kit check results/accuracy.json

Exit code 0: all records are what the schemas in qlora_kit/schemas say; 1: the first line says which one is not, and
why; also where there is no record at all.
"""

NOTEBOOK_EXAMPLES = """\
examples:
  python -m qlora_kit run-notebooks
  python -m qlora_kit run-notebooks --notebooks "02 03" --preset minilm_banking77_smoke --out runs/smoke
  python -m qlora_kit run-notebooks --params "epochs=2 03_evaluate.resamples=500"

A value for one notebook is written 03_evaluate.name=value; without a notebook it goes to every one that has the
name. Unknown names are refused before anything runs. The same command again goes on with a run that was cut off;
a finished OUT is renamed to OUT-DATE first.
"""


class _Parser(argparse.ArgumentParser):
    """A parser whose complaints take one line and name what was probably meant."""

    def error(self, message: str) -> NoReturn:
        found = re.match("argument COMMAND: invalid choice: '(.+?)'", message)
        if found:
            raise unknown("command", found[1], COMMANDS)
        raise KitError(f"{message} (see {self.prog} --help)")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        arguments: What stands behind `python -m qlora_kit`; None for the process's own.

    Returns:
        The exit code.
    """
    if not sys.warnoptions:
        # Libraries' notes to programmers; a terminal shows a table here.
        warnings.simplefilter("ignore", FutureWarning)
    try:
        parser = make_parser()
        options = parser.parse_args(arguments)
        if options.command is None:
            parser.print_help()
            return 0
        code: int = options.run(options)
        sys.stdout.flush()
        return code
    except KitError as error:
        return _say(" ".join(str(error).split()), 2)
    except KeyboardInterrupt:
        return _say("stopped; the same command again goes on where it can", 1)
    except BrokenPipeError:
        # Whoever read the output (head, less) has enough; there is nobody left to tell.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except RuntimeError as error:
        from .notebooks import NotebookFailed

        if isinstance(error, NotebookFailed):
            return _say(str(error), 1)
        if "torch" in sys.modules:
            from .training import TrainingError

            if isinstance(error, TrainingError):
                return _say(str(error), 1)
        raise


def _say(text: str, code: int) -> int:
    with contextlib.suppress(BrokenPipeError):
        sys.stdout.flush()
    text = _harmless(text if code == 1 and "\n" in text else f"qlora_kit: {text}")
    print(text, file=sys.stderr, flush=True)
    return code


def _harmless(text: str) -> str:
    """Return text with what would steer a terminal (escape sequences in somebody's label, say) spelled out."""
    return re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]", lambda found: ascii(found[0])[1:-1], text)


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of all commands, with their help."""
    parser = _Parser(
        prog="python -m qlora_kit",
        description="4-bit fine-tuning: an experiment goes in, a run folder comes out.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", parser_class=_Parser)

    def command(name: str, words: str, run: Any, examples: str) -> argparse.ArgumentParser:
        added = commands.add_parser(
            name,
            help=words,
            description=words[0].upper() + words[1:] + ".",
            epilog=examples,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        added.set_defaults(run=run)
        return added

    presets = command(
        "presets", "list the presets, or print one as YAML with all its fields", _presets, PRESETS_EXAMPLES
    )
    presets.add_argument("name", nargs="?", help="a preset, auto, or an experiment's YAML file")

    plan = command("plan", "say what a training step will take, and how far a GPU reaches", _plan, PLAN_EXAMPLES)
    plan.add_argument("model", help="a preset, an experiment's YAML file, a model's folder or hub name, or shape:NAME")
    plan.add_argument("--batch", type=int, help="rows a step (the experiment's)")
    plan.add_argument("--length", type=int, help="tokens a row (the experiment's longest)")
    plan.add_argument("--device", help="T4, L4, 3090, 4090, A100-40, A100-80, H100 or cpu (this machine's)")
    plan.add_argument("--fits", action="store_true", help="the largest batch and length for each method instead")
    plan.add_argument("--json", action="store_true", help="as JSON, in bytes")
    plan.add_argument(
        "--set", action="append", default=[], metavar="FIELD=VALUE", help="change a field, as quantization.scheme=int8"
    )

    finetune = command("finetune", "train an experiment into a run folder", _finetune, FINETUNE_EXAMPLES)
    _take_experiment(finetune)
    finetune.add_argument("--out", default="runs", help="folder of the run folders (runs)")
    finetune.add_argument("--name", help="name of the run folder (the experiment's name and the seed)")
    finetune.add_argument("--quiet", action="store_true", help="no progress bars")

    evaluate = command("evaluate", "test a finished run and write its evaluation.json", _evaluate, EVALUATE_EXAMPLES)
    evaluate.add_argument("folder", metavar="RUN", help="a run folder")
    evaluate.add_argument("--no-baselines", action="store_true", help="leave the baselines out")
    evaluate.add_argument("--quiet", action="store_true", help="no progress bars")

    predict = command("predict", "classify texts with a finished run", _predict, PREDICT_EXAMPLES)
    predict.add_argument("folder", metavar="RUN", help="a run folder")
    predict.add_argument("texts", nargs="*", metavar="TEXT", help="texts; without any, lines of standard input")
    predict.add_argument("--top", type=int, default=3, help="how many labels a text (3)")
    predict.add_argument("--json", action="store_true", help="one JSON object a text")

    search = command("search", "search for better settings, on validation rows alone", _search, SEARCH_EXAMPLES)
    _take_experiment(search)
    search.add_argument(
        "--space",
        action="append",
        default=[],
        metavar="FIELD=VALUES",
        help="what to search: a range LOW:HIGH[:log] or choices A,B,C (learning rate and LoRA's rank)",
    )
    search.add_argument("--trials", type=int, default=20, help="trials to have in the end (20)")
    search.add_argument("--storage", metavar="FILE", help="Optuna's SQLite file (study.db in the search's folder)")
    search.add_argument("--no-pruning", action="store_true", help="train every trial to its end")
    search.add_argument("--out", default="runs", help="folder of the search's folder (runs)")
    search.add_argument("--name", help="name of the search's folder (the experiment's name and _search)")
    search.add_argument("--quiet", action="store_true", help="no progress bar")

    rerun = command("rerun", "run a record again and tell each difference", _rerun, RERUN_EXAMPLES)
    rerun.add_argument("record", metavar="RECORD", help="a run folder, a file in it, or 02_finetune.json")
    rerun.add_argument("--out", default="runs/reruns", help="folder of the new run folder (runs/reruns)")
    rerun.add_argument("--json", action="store_true", help="the comparison as JSON")
    rerun.add_argument("--quiet", action="store_true", help="no progress bars")

    books = command(
        "run-notebooks", "run the notebooks into one folder with one page of results", _run_notebooks, NOTEBOOK_EXAMPLES
    )
    books.add_argument("--preset", default="auto", help="a preset or an experiment's YAML file (auto)")
    books.add_argument("--out", default="runs/latest", help="the folder OUT (runs/latest)")
    books.add_argument("--notebooks", default="", help='names or numbers, as "02 03" (all)')
    books.add_argument(
        "--params", action="append", default=[], metavar="NAME=VALUE", help="parameters, several in one text if wished"
    )

    check = command("check", "check records against the JSON Schemas of the contracts", _check, CHECK_EXAMPLES)
    check.add_argument("paths", nargs="+", metavar="PATH", help="record files, or folders with records in them")
    return parser


def _take_experiment(parser: argparse.ArgumentParser) -> None:
    """Let a command take an experiment, the user's own data, and changes."""
    parser.add_argument("experiment", help="a preset, auto, or an experiment's YAML file")
    parser.add_argument("--data", metavar="FILE", help="your own data: CSV, Parquet or a hub data set's name")
    parser.add_argument("--test", metavar="FILE|FRACTION", help="its test data: a file, a split, or a share of it")
    parser.add_argument("--text", metavar="COLUMN", help="its column of texts (text)")
    parser.add_argument("--label", metavar="COLUMN", help="its column of labels (label)")
    parser.add_argument(
        "--set", action="append", default=[], metavar="FIELD=VALUE", help="change a field, as training.epochs=2"
    )


def _presets(options: argparse.Namespace) -> int:
    from . import experiment

    if options.name:
        print(experiment.preset(options.name).to_yaml(), end="")
        return 0
    names = experiment.presets()
    width = max(map(len, names))
    folder = resources.files("qlora_kit") / "presets"
    for name in names:
        # Each file's first line is a comment that says what the preset is.
        title = (folder / f"{name}.yaml").read_text("utf-8").partition("\n")[0]
        print(f"{name:{width}}  {title.removeprefix('# ')}")
    return 0


def _finetune(options: argparse.Namespace) -> int:
    from . import experiment

    spec = _experiment(options)
    if options.name is not None:
        experiment.safe_name("run", options.name)
    from .training import EpochLines, finetune

    lines = [] if options.quiet else [EpochLines()]
    run = finetune(spec, out=options.out, name=options.name, progress=not options.quiet, callbacks=lines)
    print(run.path)
    return 0


def _experiment(options: argparse.Namespace) -> Experiment:
    """Return the experiment that a command line describes."""
    from . import experiment

    name, why = experiment.resolve_preset(options.experiment)
    if options.experiment == "auto":
        print(f"auto: {name} ({why})")
    changes = _changes(options.set)
    for option in ("text", "label"):
        if getattr(options, option) is not None:
            changes[f"data.{option}"] = getattr(options, option)
    if options.test is not None:
        changes["data.test"] = _number_or_text(options.test)
    if options.data is not None:
        changes["data.name"] = options.data
    return experiment.preset(name).override(changes)


def _changes(pieces: Sequence[str]) -> dict[str, Any]:
    import yaml

    changes: dict[str, Any] = {}
    for piece in pieces:
        field, equals, value = piece.partition("=")
        if not equals:
            raise KitError(f"--set {piece!r} has no value: write --set training.epochs=2")
        try:
            changes[field] = yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise KitError(f"--set {piece!r}: the value is no YAML: {error}") from error
    return changes


def _plan(options: argparse.Namespace) -> int:
    from . import memory

    spec = memory.of_model(options.model).override(_changes(options.set))
    if options.fits:
        batchless = options.length or spec.data.max_length
        rows = memory.fits(spec, device=options.device or memory.find_device(), length=batchless)
        if options.json:
            print(json.dumps(rows))
            return 0
        print(f"{spec.model.name} on {options.device or memory.find_device().name}, length {rows[0]['length']}")
        for row in rows:
            method = {"full": "full fine-tuning", "lora": "LoRA, 16 bits"}.get(row["method"], f"QLoRA, {row['scheme']}")
            how = "checkpointing" if row["checkpointing"] else ""
            room = (
                f"batch up to {row['batch']}, or one row of {row['longest']} tokens" if row["batch"] else "does not fit"
            )
            print(f"  {method:18} {how:14} {row['planned_bytes'] / 2**20:>10,.0f} MiB at batch 1   {room}")
        return 0
    plan = memory.plan(spec, batch=options.batch, length=options.length, device=options.device)
    print(json.dumps(plan.to_dict()) if options.json else plan)
    return 0


def _number_or_text(text: str) -> float | str:
    try:
        return float(text)
    except ValueError:
        return text


def _evaluate(options: argparse.Namespace) -> int:
    from .records import load_run

    run = load_run(options.folder)
    from .evaluation import evaluate

    result = evaluate(run, baselines=not options.no_baselines, progress=not options.quiet)
    metrics = result["metrics"]
    rows = {name: metrics[name] for name in ("test", "test_without_leaked", "validation") if metrics.get(name)}
    rows.update(metrics.get("baselines") or {})
    names = ("accuracy", "f1_macro", "f1_weighted", "loss")
    width = max(map(len, rows))
    print(f"{'':{width}}  " + "  ".join(f"{name:>24}" for name in names))
    for row, values in rows.items():
        print(f"{row:{width}}  " + "  ".join(f"{_interval(values.get(name)):>24}" for name in names))
    print(run.path / "evaluation.json")
    return 0


def _interval(metric: Any) -> str:
    if isinstance(metric, dict):
        return f"{metric['value']:.4f} ({metric['low']:.4f}-{metric['high']:.4f})"
    return "" if metric is None else f"{metric:.4f}"


def _predict(options: argparse.Namespace) -> int:
    from .records import load_run

    if options.top < 1:
        raise KitError(f"--top is {options.top}: allowed is 1 or more")
    run = load_run(options.folder)
    texts = options.texts
    if not texts:
        try:
            texts = [line.rstrip("\r\n") for line in sys.stdin if line.strip()]
        except UnicodeDecodeError as error:
            raise KitError(f"standard input is no UTF-8 text: {error}") from error
    if not texts:
        raise KitError('no text was given: write predict RUN "a text", or pipe texts in, one a line')
    predictions = run.predict(texts)
    names = run.label_names
    for text, row in zip(texts, predictions.probabilities, strict=True):
        best = [(names[index], float(row[index])) for index in row.argsort()[::-1][: options.top]]
        if options.json:
            print(json.dumps({"text": text, "label": best[0][0], "probabilities": dict(best)}, ensure_ascii=False))
        else:
            print(_harmless(f"{text}\n    " + "   ".join(f"{label} {share:.1%}" for label, share in best)))
    return 0


def _search(options: argparse.Namespace) -> int:
    spec = _experiment(options)
    from .searching import parse_space, search

    found = search(
        spec,
        parse_space(options.space) or None,
        trials=options.trials,
        out=options.out,
        name=options.name,
        storage=options.storage,
        prune=not options.no_pruning,
        progress=not options.quiet,
    )
    for trial in found.trials:
        print(_harmless(f"trial {trial['number']:3}  {_reached(trial)}  {_settings(trial)}"))
    try:
        best = found.best_trial
    except KitError as error:
        return _say(str(error), 1)
    rows = found.record["rows"]["validation"]
    print(f"best: trial {best['number']}, macro F1 {best['f1_macro']:.4f} on {rows} validation rows")
    print(found.path / "best.yaml")
    return 0


def _reached(trial: Mapping[str, Any]) -> str:
    if trial["state"] == "complete":
        return f"macro F1 {trial['f1_macro']:.4f}"
    return f"could not go on ({trial['error']})" if trial["error"] else f"stopped after epoch {len(trial['epochs'])}"


def _settings(trial: Mapping[str, Any]) -> str:
    values = trial["parameters"].items()
    return "  ".join(f"{name}={value:g}" if isinstance(value, float) else f"{name}={value}" for name, value in values)


def _rerun(options: argparse.Namespace) -> int:
    from .rerun import run_again

    comparison = run_again(options.record, options.out, progress=not options.quiet)
    print(json.dumps(comparison.to_dict(), ensure_ascii=False) if options.json else comparison)
    return 0 if comparison.same else 1


def _run_notebooks(options: argparse.Namespace) -> int:
    from .notebooks import run_notebooks, split_params

    run_notebooks(options.preset, options.out, options.notebooks, split_params(options.params))
    return 0


def _check(options: argparse.Namespace) -> int:
    from .schemas import check

    checked, problems = check([Path(path) for path in options.paths])
    for problem in problems:
        print(problem)
    print(f"{len(checked)} records checked, {len(problems)} problems")
    return 1 if problems or not checked else 0


if __name__ == "__main__":
    sys.exit(main())
