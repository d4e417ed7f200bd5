"""Figures in a template that somebody typed, where they are to be made from a record."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping

import jinja2
from jinja2 import nodes

STATED = {
    "Python 3.11 or newer": "the oldest version that pyproject.toml takes",
    "4 bits": "the width of a format",
    "4-bit": "the width of a format",
    "8 bits": "the width of a format",
    "8-bit": "the width of a format",
    "16 bits": "the width of a format",
    "four bits": "the width of a format",
    "one of 16 values": "what four bits can tell apart",
    "64 of them share": "QLoRA's size of a block",
    "multiples of 8": "a setting of the benchmark",
    "CC BY 4.0": "a licence's name",
    "bitsandbytes 0.50 ": "a library's version",
    "in July 2025": "a date",
    "up to 1,024 products": "oneDNN's own limit",
    "4bit": "the name of a variant",
    "double quantization": "the name of a method",
    "two SVMs": "the baselines, by their names",
    "two CPU cores": "the least machine that the notebooks are made for",
    "count twice": "how a sum counts",
    "half written": "a way of speaking",
    "a tiny model, ten steps": "what another project's CI does",
    "dozens of methods": "another project's, roughly",
    "95% interval": "the share that intervals are made for",
    "95% intervals": "the share that intervals are made for",
}
"""What a template says in numbers that is stated, not measured, with the reason."""

# Not a part of a name: H100, SmolLM2-135M, bf16, F1, GPT-2, 05_claims, batch_8. With its unit, as 5ms, 12MiB and 3x.
_NUMBER = re.compile(
    r"(?<![\w.])(?<!\w-)(?!0\d(?:_|\b))\.?\d[\d,.]*(?<![,.])(?:e[+-]?\d+)?[A-Za-zµ]*(?![\w])|(?<![\w])[x×]\d[\d.]*(?![\w])"
    r"|[½⅓¼¾⅔]"
)
_TENS = "twenty|thirty|forty|fifty|sixty|seventy|eighty|ninety"
_SPELLED = re.compile(
    r"\b((?:two|three|four|five|six|seven|eight|nine|ten|eleven|twelve|thirteen|fourteen|fifteen|sixteen|seventeen"
    rf"|eighteen|nineteen|{_TENS}|hundred|thousand|million|billion|dozen)(?:s|fold)?"
    r"|half|halves|halved|thirds?|quarters?|twice|thrice|doubled?|doubles|tripled?|quadrupled?)\b",
    re.IGNORECASE,
)


def typed(text: str, stated: Mapping[str, str] = STATED) -> list[tuple[int, str]]:
    """Return the figures that a template's text has typed instead of made: (line, number).

    Numbers in expressions, code, links and names are none; neither are those of `stated`.
    """

    def blank(found: re.Match[str]) -> str:
        if re.fullmatch(r"`[\d.,%+-]+`", found[0]):
            return found[0]  # a number alone is no code
        return re.sub(r"[^\n]", " ", found[0])

    lines = []
    for line, words in _typed_in_expressions(text):
        lines += [(line, found) for found in _standalone(words, stated)]
    for pattern in (
        r"\{#.*?#\}",
        r"\{%.*?%\}",
        r"\{\{.*?\}\}",
        r"^```.*?^```$",
        r"`[^`]*`",
        r"<!--.*?-->",
        r"\]\([^)]*\)",
        r"\bwidth=\"\d+\"",
        r"^\d+\. ",
        r"https?://\S+",
    ):
        text = re.sub(pattern, blank, text, flags=re.MULTILINE | re.DOTALL)
    for snippet in sorted(stated, key=len, reverse=True):
        text = re.sub(r"\s+".join(map(re.escape, snippet.split())) + r"(?![\w])", blank, text, flags=re.IGNORECASE)
    for place, line in enumerate(text.splitlines(), 1):
        lines += [(place, found) for found in _standalone(line, {})]
    return sorted(lines)


def _standalone(text: str, stated: Mapping[str, str]) -> Iterator[str]:
    for snippet in sorted(stated, key=len, reverse=True):
        text = text.replace(snippet.strip(), "")
    for pattern in (_NUMBER, _SPELLED):
        yield from (found[0] for found in pattern.finditer(text))


def _typed_in_expressions(text: str) -> Iterator[tuple[int, str]]:
    """Yield what an expression would show as it stands: a number, or a text; not what selects a row."""
    tree = jinja2.Environment(extensions=["jinja2.ext.do"]).parse(text)
    # What selects a row, says how many digits are shown, or is compared with.
    used: set[int] = set()
    for node in tree.find_all((nodes.Call, nodes.Filter, nodes.Test, nodes.Operand, nodes.Compare, nodes.Getitem)):
        if isinstance(node, nodes.Call):
            used |= {id(part) for part in node.args if isinstance(part, nodes.Const) and isinstance(part.value, str)}
            parts: list[nodes.Node] = [*node.kwargs, *(part for part in node.args if isinstance(part, nodes.Tuple))]
        elif isinstance(node, (nodes.Filter, nodes.Test)):
            parts = [*node.args, *node.kwargs]  # what a filter is put on is shown
        elif isinstance(node, nodes.Getitem):
            parts = [node.arg]
        else:
            parts = [node.expr]
        for part in parts:
            used |= {id(part)} | {id(const) for const in part.find_all(nodes.Const)}
    for node in tree.find_all(nodes.Const):
        if id(node) not in used and not isinstance(node.value, bool) and node.value is not None:
            yield node.lineno, str(node.value)
