"""Change the library's own code one place at a time and see which tests notice: results/mutation.json.

    python benchmarks/mutation.py                            # a seeded sample of each module's mutants
    python benchmarks/mutation.py --modules data --sample 0  # every mutant of data.py
    python benchmarks/mutation.py --show                     # the survivors' changes, after a run

mutmut (https://mutmut.readthedocs.io) makes the mutants and runs the tests that reach each, in a copy of the
repository below `--work`. A mutant that makes a test fail is killed; one that no test reaches counts as surviving. The
same command again goes on with the mutants that are left; rows of modules that it is not about stay.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import random
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from qlora_kit import records  # noqa: E402

TESTS = {
    "data": ("test_data",),
    "quantization": ("test_quantization", "test_quantization_bitsandbytes"),
    "memory": ("test_memory",),
    "records": ("test_records",),
}
COPIED = ("qlora_kit", "tests", "benchmarks", "notebooks", "results", "README.md")
CONFIG = """
[tool.mutmut]
source_paths = ["qlora_kit"]
only_mutate = {modules}
pytest_add_cli_args_test_selection = {tests}
also_copy = {copied}
# torch does not like to be forked once it has computed.
process_isolation = "forkserver"
track_dependencies = false
use_git_change_detection = false
timeout_multiplier = 4.0
timeout_constant = 20.0
"""
# What mutmut writes for a mutant: pytest's exit code, or its own for a mutant that no test reaches.
KILLED, SURVIVED, UNREACHED = (1, 3), 0, 33
TIMED_OUT = (-24, 24, 36, 152, 255)


def prepare(work: Path, module: str) -> None:
    """Copy the repository to `work`, with mutmut's settings for a module in its pyproject.toml."""
    work.mkdir(parents=True, exist_ok=True)
    for name in COPIED:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, work / name, dirs_exist_ok=True, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source, work / name)
    settings = CONFIG.format(
        modules=json.dumps([f"qlora_kit/{module}.py"]),
        tests=json.dumps([f"tests/{name}.py" for name in TESTS[module]]),
        copied=json.dumps(list(COPIED)),
    )
    (work / "pyproject.toml").write_text((ROOT / "pyproject.toml").read_text(encoding="utf-8") + settings)


def mutmut(work: Path, *arguments: str, quiet: bool = False) -> str:
    """Run mutmut in the copy; return what it says."""
    # The copy is to be tested, wherever this library is installed.
    paths = [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path and Path(path) != ROOT]
    env = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(paths),
        "OMP_NUM_THREADS": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    done = subprocess.run(
        [sys.executable, "-m", "mutmut", *arguments],
        cwd=work,
        env=env,
        text=True,
        stdout=subprocess.PIPE if quiet else None,
        stderr=subprocess.STDOUT if quiet else None,
    )
    return done.stdout or ""


def exit_codes(work: Path, module: str) -> dict[str, int | None]:
    """Return the exit code of each of a module's mutants, by name; None for those not tried."""
    file = work / "mutants" / "qlora_kit" / f"{module}.py.meta"
    codes: dict[str, int | None] = records.read_json(file)["exit_code_by_key"] if file.is_file() else {}
    return codes


def mutate(module: str, work: Path, sample: int, seed: int, jobs: int) -> dict[str, Any]:
    """Try a module's mutants; return its row."""
    prepare(work, module)
    if not exit_codes(work, module):
        print(f"{module}: making the mutants, and finding out which test reaches which", flush=True)
        said = mutmut(work, "run", "--max-children", "1", "none.of.them", quiet=True)
        if not exit_codes(work, module):
            raise RuntimeError(f"mutmut made no mutants:\n{said[-2000:]}")
    names = sorted(exit_codes(work, module))
    chosen = random.Random(f"{seed} {module}").sample(names, min(len(names), sample)) if sample else names
    left = [name for name in chosen if exit_codes(work, module)[name] is None]
    if left:
        mutmut(work, "run", "--max-children", str(jobs), *left)
        if all(exit_codes(work, module)[name] is None for name in left):
            raise RuntimeError(f"mutmut tried none of the mutants of {module}: see above")
    return row(module, exit_codes(work, module), chosen)


def row(module: str, codes: dict[str, int | None], chosen: list[str]) -> dict[str, Any]:
    """Put a module's row together."""
    kinds = Counter(
        "killed"
        if codes[name] in KILLED
        else "timed_out"
        if codes[name] in TIMED_OUT
        else {SURVIVED: "survived", UNREACHED: "unreached", None: "not_tried"}.get(codes[name], "other")
        for name in chosen
    )
    tried = len(chosen) - kinds["not_tried"]
    noticed = kinds["killed"] + kinds["timed_out"]
    return {
        "module": f"qlora_kit/{module}.py",
        "mutants": len(codes),
        "tried": tried,
        **{kind: kinds[kind] for kind in ("killed", "timed_out", "survived", "unreached", "other")},
        "score": noticed / tried if tried else None,
        "survivors": sorted(name for name in chosen if codes[name] in (SURVIVED, UNREACHED)),
        "tests": [f"tests/{name}.py" for name in TESTS[module]],
    }


def main() -> int:
    """Run it and write the record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--modules", nargs="+", choices=TESTS, default=list(TESTS))
    parser.add_argument("--sample", type=int, default=60, help="mutants a module (60); 0 for all")
    parser.add_argument("--seed", type=int, default=0, help="seed of the sample")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="mutants at once")
    parser.add_argument("--work", type=Path, default=ROOT / "runs" / "mutation", help="folder of the copies")
    parser.add_argument("--out", type=Path, default=ROOT / "results" / "mutation.json")
    parser.add_argument("--show", action="store_true", help="print the changes of the survivors in the record")
    options = parser.parse_args()
    before = records.read_json(options.out)["rows"] if options.out.is_file() else []
    if options.show:
        for found in before:
            for name in found["survivors"]:
                print(mutmut(options.work / Path(found["module"]).stem, "show", name, quiet=True))
        return 0
    environment = {**records.environment(), "mutmut": importlib.metadata.version("mutmut")}
    rows = {Path(found["module"]).stem: found for found in before}
    for module in options.modules:
        found = mutate(module, options.work / module, options.sample, options.seed, options.jobs)
        rows[module] = {**found, "sample": options.sample, "seed": options.seed, "environment": environment}
        command = f"python benchmarks/mutation.py --sample {options.sample} --seed {options.seed}"
        ordered = [rows[name] for name in TESTS if name in rows]
        records.write_json(options.out, {"schema": 1, "environment": environment, "command": command, "rows": ordered})
        score = "none tried" if found["score"] is None else f"{found['score']:.1%} noticed"
        print(f"{module}: {found['tried']} of {found['mutants']} mutants tried, {score}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
