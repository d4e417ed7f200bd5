"""Check the arguments of public calls: a wrong kind is refused in one line that shows the right call.

Without the check, Python would fail somewhere deep inside, or train something else.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import numbers
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ParamSpec, TypeVar

from ..errors import KitError, described
from ..public import EXPORTS, module_named

_Arguments = ParamSpec("_Arguments")
_Result = TypeVar("_Result")


@dataclasses.dataclass(frozen=True)
class Kind:
    """A kind of argument.

    Args:
        words: Its name in messages, e.g. `an Experiment`.
        accepts: Whether a value is of this kind.
        instead: The Python code to write instead of a wrong value; empty for no advice.
    """

    words: str
    accepts: Callable[[Any], bool]
    instead: Callable[[Any], str] = lambda value: ""


def takes(**kinds: Kind) -> Callable[[Callable[_Arguments, _Result]], Callable[_Arguments, _Result]]:
    """Return a decorator that checks arguments by name before a call.

    Args:
        **kinds: The kind of each checked argument. An argument whose default is None accepts None too.

    Returns:
        The decorator. The decorated call raises KitError for an argument of another kind.
    """

    def decorate(call: Callable[_Arguments, _Result]) -> Callable[_Arguments, _Result]:
        signature = inspect.signature(call)
        assert set(kinds) <= set(signature.parameters), kinds

        @functools.wraps(call)
        def checked(*arguments: _Arguments.args, **more: _Arguments.kwargs) -> _Result:
            try:
                given = signature.bind(*arguments, **more).arguments
            except TypeError:
                # Python itself says which argument is missing or unknown, but of the class that defines the method.
                try:
                    return call(*arguments, **more)
                except TypeError as error:
                    owner = arguments[0] if "self" in signature.parameters and arguments else None
                    raise TypeError(str(error).replace(call.__qualname__, _spoken(call, owner))) from None
            for name, kind in kinds.items():
                if name not in given or kind.accepts(given[name]):
                    continue
                if given[name] is not None or signature.parameters[name].default is not None:
                    raise _refused(
                        _name_of(call, given.get("self")), list(signature.parameters), name, kind, given[name]
                    )
            return call(*arguments, **more)

        return checked

    return decorate


def _refused(spoken: str, names: list[str], name: str, kind: Kind, value: Any) -> KitError:
    first = next(each for each in names if each != "self")
    instead = kind.instead(value)
    advice = f": write {spoken}({instead if name == first else f'..., {name}={instead}'})" if instead else ""
    return KitError(f"{spoken} takes {kind.words} as {name}, not {described(value)}{advice}")


def _spoken(call: Callable[..., Any], owner: object) -> str:
    return call.__qualname__ if owner is None else f"{type(owner).__name__}.{call.__name__}"


def _name_of(call: Callable[..., Any], owner: object = None) -> str:
    """Return a call's name as a user writes it: `finetune`, `memory.plan`, `Run.predict`.

    Args:
        call: The function.
        owner: The object whose method it is. `predict` of a `Run` is `Run.predict`, whichever class defines it.
    """
    name = _spoken(call, owner).removesuffix(".__init__")
    return name if "." in name or name in EXPORTS else f"{module_named(call)}.{name}"


def is_a(*names: str) -> Callable[[Any], bool]:
    """Return a check for instances of the kit's classes (`module.Class`) that does not import their modules."""

    def check(value: Any) -> bool:
        for name in names:
            module, _, kind = name.rpartition(".")
            # If there is an instance, the module is already imported.
            loaded = sys.modules.get(f"qlora_kit.{module}")
            if loaded is not None and isinstance(value, getattr(loaded, kind)):
                return True
        return False

    return check


# --- the kinds --------------------------------------------------------------------------------------------------


def _is_path(value: Any) -> bool:
    if not isinstance(value, (str, os.PathLike)):
        return False
    try:
        # Tokenizers and YAML files need names in UTF-8; file systems allow at most 255 bytes.
        encoded = os.fspath(value).encode()
        return b"\0" not in encoded and max(map(len, encoded.split(b"/"))) < 256
    except (UnicodeEncodeError, AttributeError):
        return False


def _is_texts(value: Any) -> bool:
    return isinstance(value, (list, tuple, set, Mapping)) and all(isinstance(item, str) for item in value)


def _is_whole(value: Any) -> bool:
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)


def _experiment_instead(value: Any) -> str:
    if isinstance(value, (str, os.PathLike)):
        return f"preset({os.fspath(value)!r})"
    if isinstance(value, Mapping):
        return "Experiment.from_dict(values)"
    return "run.experiment" if is_a("runs.predictor.Predictor")(value) else "preset('minilm_banking77_qlora')"


def _spec_instead(section: str, value: Any) -> str:
    return f"{'' if is_a('config.experiment.Experiment')(value) else 'run.'}experiment.{section}"


def _run_instead(value: Any) -> str:
    return "finetune(experiment)" if is_a("config.experiment.Experiment")(value) else "load_run('runs/NAME')"


def _data_instead(value: Any) -> str:
    if isinstance(value, (str, os.PathLike)):
        return f"text_classification({os.fspath(value)!r})"
    if is_a("config.sections.DataSpec")(value):
        return "data.load(spec)"
    return "text_classification(rows)"


def _is_callbacks(value: Any) -> bool:
    if not isinstance(value, Sequence) or isinstance(value, str):
        return False
    # transformers' Trainer accepts classes too, but creates them without arguments.
    return all(hasattr(item, "on_step_end") and not isinstance(item, type) for item in value)


def a_path(example: str) -> Kind:
    """Return the kind for a path of a file or folder, with an example for the advice."""
    return Kind("a path", _is_path, lambda value: repr(example))


TEXT = Kind("a text", lambda value: isinstance(value, str))
WHOLE = Kind("a whole number", _is_whole)
COUNT = Kind("a whole number of 1 or more", lambda value: _is_whole(value) and value > 0)
NUMBER = Kind("a number", lambda value: isinstance(value, numbers.Real) and not isinstance(value, bool))
SHARE = Kind("a number from 0 to 1", lambda value: NUMBER.accepts(value) and 0 <= value <= 1)  # NaN is none
# numpy's True is not Python's True.
FLAG = Kind("True or False", lambda value: type(value).__name__ in ("bool", "bool_"))
LIST = Kind("a list of texts", lambda value: _is_texts(value))
TEXTS = Kind("a text or a list of texts", lambda value: isinstance(value, str) or _is_texts(value))
TEXTS_OR_NONE = Kind("a text, a list of texts or None", lambda value: value is None or TEXTS.accepts(value))
MAPPING = Kind("a mapping of names", lambda value: isinstance(value, Mapping) and _is_texts(tuple(value)))
# A name that is not text is refused later, with the list of fields.
CHANGES = Kind("a mapping of names", lambda value: isinstance(value, Mapping), lambda value: "{'training.epochs': 2}")
PARAMS = Kind(
    "a text or a mapping of names",
    lambda value: isinstance(value, str) or MAPPING.accepts(value),
    lambda value: "'epochs=2'",
)
ROWS = Kind(
    "a list of mappings",
    lambda value: isinstance(value, (list, tuple)) and all(isinstance(row, Mapping) for row in value),
)
MODULE = Kind("a torch model", lambda value: hasattr(value, "named_modules"), lambda value: "model")
TENSOR = Kind("a torch tensor", lambda value: hasattr(value, "numel"))
EXPERIMENT = Kind("an Experiment", is_a("config.experiment.Experiment"), _experiment_instead)
PATH_OR_YAML = Kind(
    "a path or YAML text",
    lambda value: _is_path(value) or (isinstance(value, str) and "\n" in value),
    lambda value: "'my_experiment.yaml'",
)
PRESET = Kind("a preset's name or the path of a YAML file", _is_path, lambda value: "'minilm_banking77_qlora'")
MODEL = Kind(
    "an Experiment or a model's name",
    lambda value: isinstance(value, str) or EXPERIMENT.accepts(value),
    _experiment_instead,
)
MODEL_SPEC = Kind("a ModelSpec", is_a("config.sections.ModelSpec"), lambda value: _spec_instead("model", value))
DATA_SPEC = Kind("a DataSpec", is_a("config.sections.DataSpec"), lambda value: _spec_instead("data", value))
QUANTIZATION = Kind(
    "a Quantization", is_a("config.quantization.Quantization"), lambda value: _spec_instead("quantization", value)
)
RUN = Kind("a Run", is_a("runs.predictor.Predictor"), _run_instead)
RUN_OR_FOLDER = Kind("a Run or its folder", lambda value: RUN.accepts(value) or _is_path(value), _run_instead)
DATA = Kind("a TextData", is_a("data.rows.TextData"), _data_instead)
CALLBACKS = Kind("a list of callbacks", _is_callbacks, lambda value: "[EpochLines()]")
DEVICE = Kind(
    "a device's name",
    lambda value: isinstance(value, str) or is_a("memory.devices.Device")(value),
    lambda value: "'T4'",
)
FOLDER = a_path("runs")
RUN_FOLDER = a_path("runs/NAME")
