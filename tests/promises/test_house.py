"""The house's rules: imports point down, files and functions stay small, and the tests lie where the code does.

The checks read the sources, so each is tried on a copy with a fault in it, too.
"""

from __future__ import annotations

import ast
import os
import re
import runpy
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import qlora_kit as qk
from qlora_kit import public

ROOT = Path(__file__).resolve().parents[2]
LONGEST_FILE, LONGEST_FUNCTION, MOST_PARAMETERS = 500, 80, 7
LONG_BECAUSE = "Long because"
"""Starts the sentence of a docstring that says why a function has more lines."""
TAKES_WHAT = re.compile(r"Takes what `[^`]+` does")
"""What a docstring says of a function that stands in for another and so takes as much."""

HEAVY = {"torch", "transformers", "peft", "bitsandbytes"}
SAFE = ("safe_peft", "safe_bitsandbytes")

Function = ast.FunctionDef | ast.AsyncFunctionDef

# --- reading the sources ----------------------------------------------------------------------------------------


def files(root: Path) -> dict[str, ast.Module]:
    """Return the library's files by path below the package, as `models/build.py`."""
    package = root / "qlora_kit"
    return {
        path.relative_to(package).as_posix(): ast.parse(path.read_text(encoding="utf-8"))
        for path in sorted(package.rglob("*.py"))
    }


def module_of(file: str) -> str:
    return file.removesuffix(".py").removesuffix("/__init__").replace("/", ".")


def room_of(module: str) -> str:
    """Return the package or root file that has a floor: `models` of `models.build`."""
    return module.partition(".")[0]


def imports_of(file: str, tree: ast.AST) -> Iterator[tuple[str, int]]:
    """Yield what of the kit a file imports, as `models.build`, and the line; wherever in the file it stands."""
    package = ["qlora_kit", *Path(file).parts[:-1]]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            start = ".".join([*base, *([node.module] if node.module else [])])
            # `from .. import plots` and `from . import step` name modules, too.
            modules = node.module is None or start == "qlora_kit"
            found = [f"{start}.{alias.name}" for alias in node.names] if modules else [start]
        else:
            continue
        for name in found:
            if name.startswith("qlora_kit."):
                yield name.removeprefix("qlora_kit."), node.lineno


def top_level(tree: ast.Module) -> Iterator[ast.stmt]:
    """Yield the statements that run when a file is imported; those for type checkers do not."""
    waiting: list[ast.stmt] = list(tree.body)
    while waiting:
        node = waiting.pop(0)
        if isinstance(node, ast.If):
            if "TYPE_CHECKING" not in ast.unparse(node.test):
                waiting[:0] = [*node.body, *node.orelse]
        elif isinstance(node, ast.Try):
            waiting[:0] = [*node.body, *(each for handler in node.handlers for each in handler.body), *node.orelse]
        else:
            yield node


# --- imports point down -----------------------------------------------------------------------------------------


def floors(root: Path) -> dict[str, int]:
    """Return how low each package and root file stands: 0 is the top."""
    settings = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["importlinter"]
    (layers,) = [contract["layers"] for contract in settings["contracts"] if contract["type"] == "layers"]
    return {name.strip(): floor for floor, names in enumerate(layers) for name in names.split(":")}


def rising_imports(root: Path) -> list[str]:
    """Return the imports that point up, those inside functions and for type checkers, too."""
    floor, wrong = floors(root), []
    for file, tree in files(root).items():
        room = room_of(module_of(file))
        if file == "__init__.py":  # hands on the public names to type checkers
            continue
        if room not in floor:
            wrong.append(f"{file}: {room} has no floor in pyproject.toml")
            continue
        for name, line in imports_of(file, tree):
            other = room_of(name)
            if other in floor and floor[other] < floor[room]:
                wrong.append(f"{file}:{line} imports {name}, which stands above {room}")
    return wrong


def hidden_imports(root: Path) -> list[str]:
    """Return imports by name that no linter sees: of the kit, or of a name that is put together."""
    wrong = []
    for file, tree in files(root).items():
        if file in ("public.py", "__init__.py"):  # the table of the public names
            continue
        for node in ast.walk(tree):
            if not isinstance(node, ast.Call) or not node.args:
                continue
            called = ast.unparse(node.func)
            if called.rpartition(".")[2] not in ("import_module", "__import__"):
                continue
            name = node.args[0]
            known = isinstance(name, ast.Constant) and isinstance(name.value, str)
            if not known or name.value.startswith((".", "qlora_kit")):
                wrong.append(f"{file}:{node.lineno} imports {ast.unparse(name)} by name")
    return wrong


def broken_contracts(root: Path) -> list[str]:
    """Return what import-linter says where a contract does not hold."""
    program = "from importlinter.cli import lint_imports; raise SystemExit(lint_imports(no_cache=True))"
    command = [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(root)!r}); {program}"]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True)
    return [] if done.returncode == 0 else [done.stdout + done.stderr]


# --- small files and functions ----------------------------------------------------------------------------------


def long_files(root: Path) -> list[str]:
    wrong = []
    for path in sorted((root / "qlora_kit").rglob("*.py")):
        lines = len(path.read_text(encoding="utf-8").splitlines())
        if lines > LONGEST_FILE:
            wrong.append(f"{path.relative_to(root)} has {lines} lines")
    return wrong


def functions(tree: ast.AST, around: tuple[ast.AST, ...] = ()) -> Iterator[tuple[Function, tuple[ast.AST, ...]]]:
    """Yield all functions of a file, each with the classes and functions around it."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, Function):
            yield node, around
        inside = (*around, node) if isinstance(node, Function | ast.ClassDef) else around
        yield from functions(node, inside)


def _name(function: Function, around: tuple[ast.AST, ...]) -> str:
    return ".".join([*(getattr(each, "name", "") for each in around), function.name])


def long_functions(root: Path) -> list[str]:
    """Return the functions that are long and whose docstring does not say why."""
    wrong = []
    for file, tree in files(root).items():
        for function, around in functions(tree):
            lines = (function.end_lineno or 0) - function.lineno + 1
            if lines > LONGEST_FUNCTION and LONG_BECAUSE not in (ast.get_docstring(function) or ""):
                wrong.append(f"{file}: {_name(function, around)} has {lines} lines")
    return wrong


def crowded_functions(root: Path) -> list[str]:
    """Return the functions that take too much, but for signatures that a promise or another library dictates."""
    wrong, promised = [], public_names(root)
    for file, tree in files(root).items():
        for function, around in functions(tree):
            given = function.args
            names = [each.arg for each in (*given.posonlyargs, *given.args, *given.kwonlyargs)]
            if around and isinstance(around[-1], ast.ClassDef):
                names = [name for name in names if name not in ("self", "cls")]
            count = len(names) + (given.vararg is not None) + (given.kwarg is not None)
            path = _name(function, around).removesuffix(".__init__")
            if count <= MOST_PARAMETERS or f"{module_of(file)}.{path}" in promised or is_dictated(function, around):
                continue
            wrong.append(f"{file}: {path} takes {count} parameters")
    return wrong


def is_dictated(function: Function, around: tuple[ast.AST, ...]) -> bool:
    """Whether another library calls it, and so decides what it takes.

    These are methods of torch's `autograd.Function`, a module's `forward` (which takes what transformers hands on),
    Triton's kernels, and what stands in for another function, whose docstring then says so: ``Takes what `NAME` does``.
    """
    within = around[-1] if around else None
    if isinstance(within, ast.ClassDef):
        bases = [ast.unparse(base).rpartition(".")[2] for base in within.bases]
        if "Function" in bases and function.name in ("forward", "backward", "setup_context"):
            return True
        if function.name == "forward":
            return True
    if any(ast.unparse(decorator) == "triton.jit" for decorator in function.decorator_list):
        return True
    return TAKES_WHAT.search(ast.get_docstring(function) or "") is not None


# --- public names -----------------------------------------------------------------------------------------------


def public_names(root: Path) -> set[str]:
    """Return what users call, by where it is defined: `training.finetune.finetune`."""
    table, trees = runpy.run_path(str(root / "qlora_kit" / "public.py")), files(root)
    found = {f"{module}.{name}" for name, module in table["EXPORTS"].items()}
    for names in table["HANDED_ON"].values():
        found |= {f"{module}.{name}" for name, module in names.items()}
    for module in table["MODULES"].values():
        file = f"{module.replace('.', '/')}.py"
        if file in trees:
            defined = [node.name for node in trees[file].body if isinstance(node, Function | ast.ClassDef)]
            found |= {f"{module}.{name}" for name in defined if not name.startswith("_")}
            continue
        file = f"{module.replace('.', '/')}/__init__.py"
        for node in trees[file].body:
            if isinstance(node, ast.ImportFrom) and node.level == 1:
                found |= {f"{module}.{node.module}.{alias.name}" for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.level == 2:
                found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


# --- PEFT and bitsandbytes --------------------------------------------------------------------------------------


def unsafe_imports(root: Path) -> list[str]:
    """Return where PEFT or bitsandbytes could be imported without care (see system/safe_bitsandbytes.py).

    A package whose files import torch, transformers, PEFT or bitsandbytes imports `safe_peft` before anything else;
    a root file imports a safe module. Elsewhere the two are taken from the safe modules, also inside a function.
    """
    wrong, trees = [], files(root)
    for file, tree in trees.items():
        room = room_of(module_of(file))
        if room == "system":  # where the safe modules stand
            continue
        start = f"{room}/__init__.py" if "/" in file else file
        if _is_safe(trees[start], within_package="/" in file):
            continue
        if any(_libraries(node) & HEAVY for node in top_level(tree)):
            wrong.append(f"{start} does not import {' or '.join(SAFE)} first, and {file} needs it")
        for node in ast.walk(tree):
            if bare := _libraries(node) & {"peft", "bitsandbytes"}:
                wrong.append(f"{file}:{getattr(node, 'lineno', 0)} imports {bare.pop()} itself, without a safe module")
    return wrong


def _is_safe(tree: ast.Module, within_package: bool) -> bool:
    """Whether a safe module is imported before all else of the kit, and before a library that loads bitsandbytes."""
    for node in top_level(tree):
        if isinstance(node, ast.ImportFrom) and node.level:
            if {(node.module or "").rpartition(".")[2], *(alias.name for alias in node.names)} & {*SAFE}:
                return True
            if within_package:
                return False
        if _libraries(node) & (HEAVY - {"torch"}):
            return False
    return False


def _libraries(node: ast.AST) -> set[str]:
    """Return the libraries that a statement imports."""
    if isinstance(node, ast.Import):
        return {alias.name.partition(".")[0] for alias in node.names}
    outside = isinstance(node, ast.ImportFrom) and not node.level
    return {(node.module or "").partition(".")[0]} if outside else set()


# --- tests ------------------------------------------------------------------------------------------------------


def misplaced_tests(root: Path) -> list[str]:
    """Return the tests that lie in no folder of the package's name, or beside `tests/` for no root file."""
    rooms = {room_of(module_of(file)) for file in files(root)}
    folders = rooms | {"promises", "benchmarks", "docs", "colab"}
    wrong = []
    for path in sorted((root / "tests").rglob("test_*.py")):
        first, *inside = path.relative_to(root / "tests").parts
        if inside and first not in folders:
            wrong.append(f"tests/{first} is no package's name")
        if not inside and first.removeprefix("test_").removesuffix(".py") not in rooms:
            wrong.append(f"tests/{first} belongs into the folder of a package")
    return wrong


# --- the rules hold, and each check notices a fault -----------------------------------------------------------------


CHECKS = [
    rising_imports, hidden_imports, broken_contracts, long_files, long_functions, crowded_functions, unsafe_imports,
    misplaced_tests,
]  # fmt: skip


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_the_house_keeps_its_rules(check: Callable[[Path], list[str]]):
    assert check(ROOT) == []


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """Return a small house that keeps all rules."""
    sources = {
        "__init__.py": "",
        "errors.py": "",
        "public.py": "EXPORTS = {'build': 'models.build'}\nMODULES = {'models': 'models'}\nHANDED_ON = {}\n",
        "system/__init__.py": "",
        "system/safe_peft.py": "import peft\n",
        "models/__init__.py": "from ..system import safe_peft\nfrom .heads import mean as mean\n",
        "models/build.py": "import torch\n\nfrom ..errors import *\n",
        "models/heads.py": "",
        "training.py": "from .models import build\n",
    }
    for name, text in sources.items():
        path = tmp_path / "qlora_kit" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    (tmp_path / "tests" / "models").mkdir(parents=True)
    (tmp_path / "tests" / "models" / "test_build.py").touch()
    (tmp_path / "tests" / "test_training.py").touch()
    settings = (ROOT / "pyproject.toml").read_text(encoding="utf-8").partition("[tool.importlinter]")[2]
    before, _, rest = settings.partition("layers = [")
    layers = 'layers = ["training", "models", "system", "errors : public"]'
    (tmp_path / "pyproject.toml").write_text(f"[tool.importlinter]{before}{layers}{rest.partition(']')[2]}")
    return tmp_path


WIDE = ", ".join(f"a{number}" for number in range(MOST_PARAMETERS + 1))
LINE = "    pass\n"
BODY = LINE * LONGEST_FUNCTION
RISES = "def f():\n    from ..training import g\n"
FAULTS: list[tuple[Callable[[Path], list[str]], str, str, str | None]] = [
    # Check, file, what is added to it, and what is said; None where nothing is wrong.
    (rising_imports, "models/heads.py", RISES, "imports training, which stands above models"),
    (rising_imports, "models/heads.py", "if TYPE_CHECKING:\n    from .. import training\n", "imports training"),
    (rising_imports, "system/__init__.py", "import qlora_kit.models.heads\n", "imports models.heads"),
    (rising_imports, "attic.py", "", "attic has no floor"),
    (rising_imports, "errors.py", "from . import public\n", None),
    (rising_imports, "models/heads.py", "def f():\n    from . import build\nfrom ..system import safe_peft\n", None),
    (hidden_imports, "errors.py", "import importlib\nimportlib.import_module('qlora_kit.models')\n", "by name"),
    (hidden_imports, "errors.py", "from importlib import import_module\nimport_module(__name__)\n", "by name"),
    (hidden_imports, "errors.py", "__import__('.models')\n", "imports '.models' by name"),
    (hidden_imports, "errors.py", "import importlib\nimportlib.import_module('google.colab')\n", None),
    (broken_contracts, "models/heads.py", RISES, "points down BROKEN"),
    (broken_contracts, "models/heads.py", "from . import build\nimport qlora_kit.system\n", None),
    (broken_contracts, "attic.py", "", "attic"),
    (long_files, "errors.py", "pass\n" * (LONGEST_FILE + 1), "qlora_kit/errors.py has 501 lines"),
    (long_files, "errors.py", "pass\n" * LONGEST_FILE, None),
    (long_functions, "errors.py", f"def f():\n{BODY}", "errors.py: f has 81 lines"),
    (long_functions, "errors.py", f"class A:\n  def f(self):\n{BODY}", "A.f has 81 lines"),
    (long_functions, "errors.py", f'def f():\n    """Do it.\n\n    Long because.\n    """\n{BODY}', None),
    (long_functions, "errors.py", f"def f():\n{LINE * (LONGEST_FUNCTION - 1)}", None),
    (crowded_functions, "errors.py", f"def f({WIDE}): pass\n", "errors.py: f takes 8 parameters"),
    (crowded_functions, "models/build.py", f"def g(*, {WIDE}): pass\n", "g takes 8"),
    (crowded_functions, "models/build.py", f"def build({WIDE}): pass\n", None),
    (crowded_functions, "models/heads.py", f"def mean({WIDE}): pass\n", None),
    (crowded_functions, "errors.py", f"class A:\n    def f(self, {WIDE}): pass\n", "A.f takes 8"),
    (crowded_functions, "errors.py", f"class A:\n    def __init__(self, {WIDE[:-4]}): pass\n", None),
    (crowded_functions, "errors.py", f"class A(torch.autograd.Function):\n    def forward(ctx, {WIDE}): pass\n", None),
    (crowded_functions, "errors.py", f"@triton.jit\ndef f({WIDE}): pass\n", None),
    (crowded_functions, "errors.py", f"def f({WIDE}):\n    \"\"\"Add. Takes what `torch.add` does.\"\"\"\n", None),
    (unsafe_imports, "models/heads.py", "import peft\n", None),
    (unsafe_imports, "errors.py", "def f():\n    from bitsandbytes import nn\n", "errors.py:2 imports bitsandbytes"),
    (unsafe_imports, "training.py", "import torch\n", "training.py does not import safe_peft"),
    (unsafe_imports, "training.py", "import torch\nfrom .system import safe_peft\nimport transformers\n", None),
    (unsafe_imports, "training.py", "import peft\nfrom .system import safe_peft\n", "training.py does not import"),
    (unsafe_imports, "loops/fit.py", "import transformers\n", "loops/__init__.py does not import safe_peft"),
    (unsafe_imports, "loops/fit.py", "def f():\n    import torch\n", None),
    (misplaced_tests, "../tests/attic/test_a.py", "", "tests/attic is no package's name"),
    (misplaced_tests, "../tests/test_build.py", "", "tests/test_build.py belongs into"),
]  # fmt: skip


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_the_copy_has_no_fault_of_its_own(copy: Path, check: Callable[[Path], list[str]]):
    assert check(copy) == []


@pytest.mark.parametrize(("check", "file", "text", "said"), FAULTS)
def test_a_fault_is_found(copy: Path, check: Callable[[Path], list[str]], file: str, text: str, said: str | None):
    path = copy / "qlora_kit" / file
    path.parent.mkdir(parents=True, exist_ok=True)
    if file.startswith("loops/"):
        (path.parent / "__init__.py").touch()
    with path.open("a") as stream:
        stream.write(text)
    wrong = check(copy)
    assert wrong == [] if said is None else re.search(said, "\n".join(wrong)), wrong


# --- names and what importing them loads --------------------------------------------------------------------------


def test_every_public_name_is_there():
    for name in public.EXPORTS:
        assert getattr(qk, name) is not None
    for name in public.MODULES:
        assert hasattr(getattr(qk, name), "__path__") or hasattr(getattr(qk, name), "__file__"), name
    for module, names in public.HANDED_ON.items():
        for name in names:
            assert getattr(getattr(qk, module), name) is not None
        with pytest.raises(AttributeError, match=f"module 'qlora_kit.{module}' has no attribute 'nonsense'"):
            _ = getattr(qk, module).nonsense


SCRIPT = """
import importlib, os, sys
# None of these loads bitsandbytes by itself, and each name below then takes little time.
import datasets, evaluate, matplotlib.figure, scipy.stats, sklearn.metrics, torch, transformers
assert "bitsandbytes" not in sys.modules

class Watch:
    def find_spec(self, name, path=None, target=None):
        if name == "bitsandbytes" and sys.modules.get("kernels", "in sight") is not None:
            print("unsafe:", sys.argv[at], flush=True)

sys.meta_path.insert(0, Watch())
for at in range(1, len(sys.argv)):
    if child := os.fork():
        assert os.waitpid(child, 0)[1] == 0, sys.argv[at]
    else:
        importlib.import_module(sys.argv[at])
        print("imported:", sys.argv[at], flush=True)
        os._exit(0)
"""


@pytest.mark.long
@pytest.mark.skipif(not hasattr(os, "fork"), reason="a process is copied for each module")
def test_whatever_is_imported_first_loads_bitsandbytes_with_care():
    """See system/safe_bitsandbytes.py: while it is imported, it must not find the package `kernels`."""
    rooms = {room_of(module_of(file)) for file in files(ROOT)} - {"__init__", "__main__"}
    names = sorted(f"qlora_kit.{room}" for room in rooms)
    done = subprocess.run([sys.executable, "-c", SCRIPT, *names], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-2000:]
    assert sorted(done.stdout.splitlines()) == [f"imported: {name}" for name in names]


def test_importing_the_kit_loads_no_torch():
    script = "import sys, qlora_kit; print('torch' in sys.modules)"
    said = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=ROOT)
    assert said.stdout.strip() == "False"
