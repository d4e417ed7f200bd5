"""Texts that are made from records: each is what the records say, and whatever is falsified in one is caught."""

from __future__ import annotations

import ast
import os
import random
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT

from qlora_kit.errors import KitError
from qlora_kit.system.environment import is_gpu

sys.path.insert(0, str(ROOT / "docs"))

import pictures
import render
import typed_figures
from addressing import Records, same

SEED = int(os.environ.get("FIGURES_SEED", "0"))
"""Other falsifications than the usual ones: FIGURES_SEED=7 python -m pytest tests/test_figures.py."""
TEMPLATES = [*render.TEXTS.values(), *render.PAGES.values(), *render.PARTS]


@pytest.fixture(scope="module")
def table() -> str:
    """The table of claims as the docs have it; test_claims.py and the long test below hold it to the records."""
    page = (ROOT / "docs" / "claims.md").read_text(encoding="utf-8")
    (found,) = re.findall(r"<!-- claims -->\n((?:\|.*\n)+)", page)
    return str(found).strip()


@pytest.fixture(scope="module")
def made(table: str) -> dict[str, str]:
    return render.texts(Records(), lambda: table)


def test_every_text_is_what_the_records_say(made: dict[str, str]):
    assert render.problems(made, Records()) == [], "make figures"


@pytest.mark.long
def test_the_table_of_claims_is_what_the_records_say(table: str):
    assert render.claims_of(ROOT / "results") == table, "make figures"


def test_the_command_says_where_a_text_is_wrong(
    made: dict[str, str],
    table: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    for path, text in made.items():
        (tmp_path / path).parent.mkdir(exist_ok=True)
        (tmp_path / path).write_text(text, encoding="utf-8")
    monkeypatch.setattr(render, "INTO", tmp_path)
    monkeypatch.setattr(render, "claims_of", lambda _: table)  # it takes seconds, and is the same each time
    assert render.main(["--check"]) == 0
    capsys.readouterr()
    place = tmp_path / "results" / "README.md"
    wrong = made["results/README.md"].replace("3,080 questions", "3,081 questions")
    place.write_text(wrong, encoding="utf-8")
    assert render.main(["--check"]) == 1
    said = capsys.readouterr().out
    line = next(number for number, text in enumerate(wrong.splitlines(), 1) if "3,081" in text)
    assert f"@@ -{line} +{line} @@" in said
    assert re.search(r"^-.*3,081", said, re.MULTILINE) and re.search(r"^\+.*3,080", said, re.MULTILINE)
    # Nothing was written; without --check it is.
    assert place.read_text(encoding="utf-8") == wrong
    # Another text alone is as it should be.
    assert render.main(["--check", "README.md"]) == 0 and "1 texts are what" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        render.main(["READ.md"])
    assert "'READ.md' is made from no template: allowed are README.md, results/README.md" in capsys.readouterr().err
    monkeypatch.setattr(render, "PICTURES", ())
    assert render.main([]) == 0
    assert f"written: {place}\n" in capsys.readouterr().out
    assert place.read_text(encoding="utf-8") == made["results/README.md"]


# --- falsifications ---------------------------------------------------------------------------------------------


def a_digit(rng: random.Random, text: str) -> str:
    place = rng.choice([found.start() for found in re.finditer(r"\d", text)])
    return text[:place] + rng.choice("0123456789".replace(text[place], "")) + text[place + 1 :]


def an_integer_in_prose(rng: random.Random, text: str) -> str:
    lines = text.splitlines(keepends=True)
    found = [
        (number, one)
        for number, line in enumerate(lines)
        if not line.startswith("|")
        for one in re.finditer(r"(?<![\w.,-])\d+(?![\w.,]*\d)", line)
    ]
    number, one = rng.choice(found)
    other = str(int(one[0]) + rng.choice([-1, 1, 10]))
    lines[number] = lines[number][: one.start()] + other + lines[number][one.end() :]
    return "".join(lines)


def a_sign(rng: random.Random, text: str) -> str:
    one = rng.choice(list(re.finditer(r"(?<= )[+-]?\d+\.\d+", text)))
    sign = {"+": "-", "-": "+"}.get(one[0][0])
    return text[: one.start()] + (sign + one[0][1:] if sign else f"-{one[0]}") + text[one.end() :]


def tables(lines: list[str]) -> Iterator[list[int]]:
    """Yield the numbers of the lines of each table's rows, the head left out."""
    for head, line in enumerate(lines):
        if re.fullmatch(r"\|(-+\|)+\s*", line):
            end = head + 1
            while end < len(lines) and lines[end].startswith("|"):
                end += 1
            yield list(range(head + 1, end))


def two_rows(rng: random.Random, text: str) -> str:
    lines = text.splitlines(keepends=True)
    pairs = [(a, b) for rows in tables(lines) for a in rows for b in rows if a < b and lines[a] != lines[b]]
    first, second = rng.choice(pairs)
    lines[first], lines[second] = lines[second], lines[first]
    return "".join(lines)


def a_way(rng: random.Random, number: int, made: dict[str, str]) -> tuple[str, Any, str]:
    """Return a text, a way to falsify it and what it then is; another way where a text has nothing of that kind."""
    while True:
        path, way = rng.choice(list(made)), WAYS[number % len(WAYS)]
        try:
            return path, way, way(rng, made[path])
        except IndexError:
            number = rng.randrange(len(WAYS))


def two_cells(rng: random.Random, text: str) -> str:
    lines = text.splitlines(keepends=True)
    number = rng.choice([row for rows in tables(lines) for row in rows if len(set(lines[row].split("|")[1:-1])) > 1])
    cells = lines[number].split("|")
    first, second = rng.choice(
        [(a, b) for a in range(1, len(cells) - 1) for b in range(1, a) if cells[a].strip() != cells[b].strip()]
    )
    cells[first], cells[second] = cells[second], cells[first]
    lines[number] = "|".join(cells)
    return "".join(lines)


WAYS = (a_digit, an_integer_in_prose, a_sign, two_rows, two_cells)


def test_every_one_of_150_falsified_texts_is_caught(made: dict[str, str], tmp_path: Path):
    """All texts as files: the check says that one differs, and in which line."""
    for folder in ("results", "docs"):
        (tmp_path / folder).mkdir()
    for number in range(150):
        rng = random.Random(f"{SEED}, {number}")
        path, way, wrong = a_way(rng, number, made)
        said = f"FIGURES_SEED={SEED}, number {number}: {way.__name__} of {path}"
        assert wrong != made[path], said
        for other, text in made.items():
            (tmp_path / other).write_text(wrong if other == path else text, encoding="utf-8")
        lines = render.differences(made, tmp_path)
        changed = [
            line
            for line, (old, new) in enumerate(zip(wrong.splitlines(), made[path].splitlines(), strict=True), 1)
            if old != new
        ]
        assert lines[0] == f"--- {path}" and changed, said
        named = [int(found) for found in re.findall(r"^@@ -(\d+)", "\n".join(lines), re.MULTILINE)]
        assert all(changed[0] - 1 <= line <= changed[-1] + 1 for line in named) and named, said


def shown(text: str) -> list[re.Match[str]]:
    """Return the expressions of a template that show a figure, but for those within code and links."""
    code = r"^```.*?^```$|`[^`\n]*`|\]\([^)]*\)"
    within = [range(*found.span()) for found in re.finditer(code, text, re.DOTALL | re.MULTILINE)]
    found = re.finditer(r"\{\{[^{}]*\| (?:number|percent|signed|spelled|mib|least|length|series)\b[^{}]*\}\}", text)
    return [one for one in found if not any(one.start() in span for span in within)]


def test_every_one_of_50_typed_figures_is_caught():
    """Templates, those of the site's own pages among them: a figure that stands for an expression, or beside a word."""
    for number in range(50):
        rng = random.Random(f"{SEED}, {number}")
        # Not every template has figures of its own.
        name = rng.choice([name for name in TEMPLATES if shown(render.template(name))] if number % 2 else TEMPLATES)
        text = render.template(name)
        figure = rng.choice(["0.9356", "1,214", "7", "-0.0030", "12.5%", "seventy", "3 ms", "4.9"])
        if number % 2:
            one = rng.choice(shown(text))
            start, end = one.span()
        else:  # behind a word of a paragraph
            other = r"^```.*?^```$|\{.*?\}|`[^`]*`|\[.*?\]\(.*?\)|^[|#<!{ -].*?$"
            prose = re.sub(other, lambda f: "\n" * len(f[0]), text, flags=re.DOTALL | re.MULTILINE)
            one = rng.choice(list(re.finditer(r"(?<= )[a-z]{4,}(?= [a-z])", prose)))
            start = end = one.end()
            figure = f" {figure}"
        wrong = text[:start] + figure + text[end:]
        line = text.count("\n", 0, start) + 1
        assert line in [at for at, _ in typed_figures.typed(wrong)], (SEED, number, name, text[start - 60 : end + 20])


def put(data: Any, path: tuple[Any, ...], value: Any) -> Any:
    """Return a copy of a record with another value at a place."""
    copy: Any = dict(data) if isinstance(data, dict) else list(data)
    copy[path[0]] = value if len(path) == 1 else put(copy[path[0]], path[1:], value)
    return copy


def test_a_falsified_record_changes_the_texts(made: dict[str, str], table: str):
    """Each number that is read matters: with another there, a text changes, or refuses to say what it said."""
    records = Records()
    assert render.texts(records, lambda: table) == made
    read = {
        (name, path): value
        for (name, path), value in records.seen.items()
        if isinstance(value, (int, float)) and not isinstance(value, bool)
    }
    assert len(read) > 500
    for name, path in random.Random(SEED).sample(sorted(read, key=str), 25):
        value = read[name, path]
        # Also what another row has there, for what is only compared.
        others = [other for (_, place), other in read.items() if place[-1] == path[-1] and other != value]
        for wrong in (value * 1.7 + 1, value + 1000, value - 1000, *dict.fromkeys(others)):
            changed = {name: put(records.load(name), path, wrong)}
            try:
                if render.texts(Records(changed=changed), lambda: table) != made:
                    break
            except KitError:
                break
        else:
            pytest.fail(f"FIGURES_SEED={SEED}: results/{name}.json: {path} is read, and no text changes with it")


def with_rows(records: Records, name: str, rows: list[dict[str, Any]], place: str = "rows") -> Records:
    """Return the records with rows added to one of them."""
    record = records.load(name)
    return Records(changed={name: {**record, place: [*record[place], *rows]}})


def test_intervals_over_rows_and_seeds_are_shown_where_they_are():
    """The lead over the SVM: with them it has its interval and how many are shown, without them it is no evidence."""
    kept = Records().load("accuracy")
    apart = [found for found in kept["differences"] if found.get("over_what") != "rows and seeds"]
    records = Records(changed={"accuracy": {**kept, "differences": apart}})
    bare = render.render(render.template("measured.md.j2"), records, lambda: "")
    assert "is not shown to be more than chance" in bare and "Bonferroni" not in bare
    leads = [found for found in apart if found["over"] == "embedding_svm" and found["of"].startswith("minilm")]
    joint = [
        {**found, "over_what": "rows and seeds", "shown": 4, "f1_macro": {"value": 0.0061, "low": low, "high": 0.0155}}
        for low, found in zip((-0.0033, 0.0002), leads[:2], strict=True)
    ]
    more = with_rows(records, "accuracy", joint, "differences")
    said = " ".join(render.render(render.template("measured.md.j2"), more, lambda: "").split())
    assert "+0.0061 (-0.0033 to +0.0155)" in said and "for all four at once (Bonferroni)" in said
    assert "one of these two leads over a plain SVM is more than chance" in said
    assert "are not shown to be more than chance either" in said


def test_another_gpu_s_race_takes_the_place_of_one_without_a_commit():
    """A race measured again, with busy time, more contenders and the commit, is told without a change to a template."""
    records = Records()
    again = []
    for row in records.load("speed")["rows"]:
        if row["device"].startswith("NVIDIA") and row["model"] == "dialogpt-medium":
            environment = {**row["environment"], "commit": "d" * 40}
            more = {"device": "NVIDIA H200", "device_seconds_means": "busy", "race": f"race {row['command']}"}
            again.append({**row, **more, "environment": environment, "commit": "d" * 40})
    slow = next(row for row in again if row["contender"] == "recipe" and row["method"] == "qlora" and row["batch"] == 8)
    again.append({**slow, "contender": "recipe_fp16_reentrant", "precision": "fp16"})
    said = render.render(render.template("measured.md.j2"), with_rows(records, "speed", again), lambda: "")
    told = " ".join(said.split())
    assert "One H200, DialoGPT-medium's shape" in told and "Kernel time is how long the GPU is busy in a step." in told
    assert re.search(r"^\| 8 \| .*reentrant.* \| 22\.6 \(1\.0\)", said, re.MULTILINE)
    stopped = {**slow, "contender": "compiled_graphs", "samples_per_second": None, "problem": "not ready in time"}
    alone = {**next(row for row in again if row["contender"] == "ours" and row["method"] == "qlora"), "race": "alone"}
    more = with_rows(records, "speed", [*again, {**alone, "samples_per_second": 1.0}, stopped])
    told = render.render(render.template("measured.md.j2"), more, lambda: "")
    assert "| not ready in time | | |" in told and "| 1.0 (0.0)" not in told  # the whole race is shown
    half = with_rows(records, "speed", [row for row in again if row["batch"] == 64])
    assert "One H200" in " ".join(render.render(render.template("measured.md.j2"), half, lambda: "").split())


@pytest.mark.parametrize(
    ("ends", "said"),
    [
        ({"full": (-0.02, -0.01), "lora": (-0.03, -0.01)}, "These differences are more than chance: QLoRA is"),
        ({"full": (-0.02, 0.01), "lora": (-0.03, -0.01)}, "Only the difference to full fine-tuning may be chance"),
        ({"full": (-0.02, 0.01), "lora": (-0.03, 0.01)}, "So four bits cost this classifier nothing that five seeds"),
    ],
)
def test_what_four_bits_cost_is_said_as_it_was_measured(ends: dict[str, tuple[float, float]], said: str):
    record = Records().load("accuracy")
    gpu = next(row["device"] for row in record["rows"] if is_gpu(row["device"]) and row["preset"].startswith("minilm"))
    kept = [
        one for one in record["differences"] if one["of"] != "minilm_banking77_qlora" or one["over"].endswith("svm")
    ]
    for over, (low, high) in ends.items():
        interval = {"value": (low + high) / 2, "low": low, "high": high}
        about = {"of": "minilm_banking77_qlora", "over": f"minilm_banking77_{over}", "over_what": "rows and seeds"}
        kept.append({**about, "device": gpu, "shown": 4, "f1_macro": interval})
    changed = {"accuracy": {**record, "differences": kept}}
    text = " ".join(render.render(render.template("measured.md.j2"), Records(changed=changed), lambda: "").split())
    assert said in text and "95% intervals over test rows and seeds together." in text


def on_another_gpu(data: Any) -> Any:
    """Return what a record has of GPUs, as another one measured it: the same values, of a commit."""
    if isinstance(data, list):
        return [on_another_gpu(item) for item in data if isinstance(item, dict) and is_gpu(str(item.get("device")))]
    return {
        **data,
        "device": "NVIDIA B200",
        **({"commit": "e" * 40} if "commit" in data or "environment" in data else {}),
    }


GPU_RECORDS = ("accuracy", "inference", "int4_step", "memory", "schemes", "soak", "speed", "t4", "tuning")


@pytest.mark.parametrize("kept", [False, True], ids=["alone", "beside the older one's"])
@pytest.mark.parametrize("name", GPU_RECORDS)
def test_another_gpu_s_rows_are_told_without_a_change_to_a_template(name: str, kept: bool):
    """A record measured again on another GPU, while the others still are the older one's."""
    record = Records().load(name)
    changed = dict(record)
    for key, rows in record.items():
        if isinstance(rows, list) and rows and isinstance(rows[0], dict) and "device" in rows[0]:
            older = [row for row in rows if kept or not is_gpu(str(row["device"]))]
            changed[key] = [*older, *on_another_gpu(rows)]
    made = render.texts(Records(changed={name: changed}), lambda: "", ["README.md", "results/README.md"])
    assert "B200" in made["results/README.md"].partition("\n## accuracy")[0] or name == "soak"


def test_a_picture_of_another_record_is_stale():
    records = Records()
    assert pictures.stale_pictures(records) == []
    rows = [dict(row) for row in records.load("schemes")["rows"]]
    rows[3]["f1_macro"] += 0.001
    changed = Records(changed={"schemes": {**records.load("schemes"), "rows": rows}})
    assert pictures.stale_pictures(changed) == ["schemes"]


def test_a_picture_holds_what_it_shows_and_is_whole():
    import io

    from PIL import Image

    figure = pictures.picture("schemes", Records())
    image = Image.open(io.BytesIO(pictures.png(figure)))
    image.load()
    assert image.text["Shows"] == pictures.digest(figure)  # type: ignore[attr-defined]


# --- no typed figure --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TEMPLATES)
def test_no_figure_is_typed(name: str):
    assert typed_figures.typed(render.template(name)) == []


def test_what_is_stated_is_needed_and_has_a_reason():
    for snippet, reason in typed_figures.STATED.items():
        rest = {other: why for other, why in typed_figures.STATED.items() if other != snippet}
        assert reason and any(typed_figures.typed(render.template(name), rest) for name in TEMPLATES), snippet


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("It takes 33 s.", ["33"]),
        ("0.9356 of macro F1", ["0.9356"]),
        ("by -0.0030 and +4%", ["0.0030", "4"]),
        ("| 8 | 1,558.7 (68.8) |", ["1,558.7", "68.8", "8"]),
        ("seven of the ten", ["seven", "ten"]),
        ("5ms, 12MiB, 3x, x3, 10-fold and tenfold", ["5ms", "12MiB", "3x", "x3", "10", "tenfold"]),
        ("2e-3, .93, 1.5K, `12` and 7B", ["2e-3", ".93", "1.5K", "12", "7B"]),
        (
            "twice, half, a third, two dozen, thirteen, doubled",
            ["twice", "half", "third", "two", "dozen", "thirteen", "doubled"],
        ),
        ("in notebook 02, 05_claims, `batch_8`", []),
        ('{{ "0.93" }}', ["0.93"]),
        ("{{ 0.93 }} and {{ 93 | number }}", ["0.93", "93"]),
        ('{% set rate = 0.93 %}{{ rate }}{{ "a " ~ 5 }}', ["0.93", "5"]),
        ("{{ 1.5 * row('t4', contender='ours').steps }}", ["1.5"]),
        ("{% for batch in (8, 64) %}{{ batch }}{% endfor %}", ["64", "8"]),
        ("## After 4 epochs", ["4"]),
        ("SmolLM2-135M on an H100 or T4 in bf16, NF4, F1, GPT-2, Banking77, AVX512-BF16", []),
        ("`batch=8`, [0.1](https://example.org/1.2) and https://example.org/3.4", ["0.1"]),
        ("```\npython x.py --steps 15\n```", []),
        ('{{ row("t4", contender="ours", epochs=4).steps | number(1) }}{{ x[0] if y > 5 }}', []),
        ("<!-- figures: results/t4.json, 2 -->", []),
    ],
)
def test_a_typed_figure_is_found(text: str, found: list[str]):
    assert sorted(figure for _, figure in typed_figures.typed(text, {})) == sorted(found)


def test_the_site_s_own_words_have_no_figure():
    """What docs/hooks.py writes beside what it takes from elsewhere."""
    tree = ast.parse((ROOT / "docs" / "hooks.py").read_text(encoding="utf-8"))
    described = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    constants = [node for node in ast.walk(tree) if isinstance(node, ast.Constant) and id(node) not in described]
    words = [node.value for node in constants if isinstance(node.value, str) and " " in node.value]
    assert "milliseconds" in " ".join(words)
    assert [word for word in words if typed_figures.typed(re.sub("[{}]", "", word), {})] == []


# --- addresses --------------------------------------------------------------------------------------------------

ROWS = [
    {
        "model": "minilm",
        "batch": 8,
        "contender": "ours",
        "device": "AMD EPYC, 2 cores",
        "rate": 1.5,
        "commit": "a" * 40,
    },
    {"model": "minilm", "batch": 8, "contender": "recipe", "device": "NVIDIA H100", "rate": 2.5, "seconds": None},
    {"model": "minilm", "batch": 64, "contender": "ours", "device": "NVIDIA H100", "rate": 3.5, "range": {"low": 1}},
]


@pytest.fixture
def records() -> Records:
    environment = {"device": "NVIDIA H100", "cpu": "Xeon", "commit": "b" * 40 + "+changes"}
    return Records(changed={"race": {"environment": environment, "rows": ROWS, "more": [{"of": "a"}, {"of": "b"}]}})


def test_an_address_leads_to_one_row(records: Records):
    assert records.row("race", batch=64)["rate"] == 3.5
    assert records.row("race", device="CPU")["contender"] == "ours"
    assert records.row("race.more", of="b")["of"] == "b"
    # None is what is not there, too.
    assert len(records.rows("race", seconds=None)) == 3 and records.row("race", batch=64, commit=None)["rate"] == 3.5
    assert records.seen["race", ("rows", 2, "rate")] == 3.5


@pytest.mark.parametrize(
    ("wanted", "said"),
    [
        ({"batch": 60}, "no row of batch=60: 3 rows are of any kind, and none of them has batch=60; nearest is 64"),
        ({"batch": 64, "contender": "recipe"}, "1 rows are of batch=64, and none of them has contender='recipe'"),
        ({"contender": "receipt"}, "nearest is 'recipe'"),
        ({"model": "minilm", "device": "GPU"}, "2 rows of .*one is asked for: they differ in batch \\(8, 64\\)"),
        ({"bach": 8}, "no row of results/race.json has 'bach'; nearest is 'batch'"),
        ({"batch": True}, "none of them has batch=True"),
    ],
)
def test_an_address_that_leads_to_none_or_several_is_refused(records: Records, wanted: dict[str, Any], said: str):
    with pytest.raises(KitError, match=said):
        records.row("race", **wanted)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('{{ row("race", batch=64).rat }}', "has no 'rat'; nearest is 'rate'"),
        ('{{ row("race", batch=64).range.hihg }}', "rows.2.range has no 'hihg'; it has low"),
        ('{{ row("rice", batch=64).rate }}', "no results/rice.json"),
        ('{{ row("spead", batch=64).rate }}', "no results/spead.json; nearest is speed"),
        ("{{ nothing }}", "'nothing' is undefined"),
        ('{{ row("race", batch=64).contender | number }}', "'ours' is no number"),
        ('{{ row("race", device="GPU", batch=8).seconds | number }}', "None is no number"),
        ('{{ row("race", batch=64).rate | spelled }}', "3.5 is no whole number"),
        ('{{ same(rows("race"), "batch") }}', "3 rows are to have one batch, and they have 8, 64"),
        ('{% do must(row("race", batch=64).rate > 4, "it is fast") %}', "says that it is fast; the records no longer"),
        ('{{ place("no.py", "nor/that") }}', "none of no.py, nor/that"),
    ],
)
def test_a_template_that_asks_for_what_is_not_there_is_refused(records: Records, text: str, said: str):
    with pytest.raises(KitError, match=re.escape(said).replace(r"\.\*", ".*")):
        render.render(text, records, lambda: "")


def test_a_device_is_the_one_that_there_is_or_the_one_of_a_commit():
    def of(device: str, commit: str | None) -> dict[str, Any]:
        return {"device": device, "commit": commit}

    def device(*rows: dict[str, Any]) -> str:
        return Records(changed={"race": {"rows": list(rows)}}).device("race", "GPU")

    assert device(of("NVIDIA H100", None), of("AMD EPYC, 2 cores", None)) == "NVIDIA H100"
    assert device(of("NVIDIA H100", None), of("NVIDIA H200", "c" * 40)) == "NVIDIA H200"
    assert device(of("NVIDIA H200", "c" * 40), of("NVIDIA H100", "c" * 40 + "+changes")) == "NVIDIA H200"
    assert device(of("NVIDIA H100", "c" * 40), of("NVIDIA H200", "c" * 40)) == "NVIDIA H200"  # measured later
    with pytest.raises(KitError, match="no device"):
        device(of("AMD EPYC, 2 cores", None))


def test_where_rows_come_from_is_told(records: Records):
    assert records.origins("race") == [
        {"device": "AMD EPYC, 2 cores", "commit": "a" * 12, "clean": True, "rows": 1},
        {"device": "NVIDIA H100", "commit": "b" * 12, "clean": False, "rows": 2},
    ]
    lost = Records(changed={"race": {"environment": {"commit": None}, "rows": [{"device": "CPU"}]}})
    assert lost.origins("race") == [{"device": "CPU", "commit": None, "clean": False, "rows": 1}]


def test_a_row_that_may_be_missing(records: Records):
    assert records.row_if_any("race", batch=64, contender="unsloth") is None
    assert records.row_if_any("race", over_what="rows and seeds") is None  # no row has such a key yet
    assert records.row_if_any("race", batch=64)["rate"] == 3.5  # type: ignore[index]
    with pytest.raises(KitError, match="2 rows"):
        records.row_if_any("race", device="GPU")


# --- how it is written ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("written", "said"),
    [
        (render.number(1558.7123, 1), "1,558.7"),
        (render.number(-0.0004, 3), "0.000"),
        (render.number(-0.4), "0"),
        (render.signed(0.00013, 4), "+0.0001"),
        (render.signed(-0.003, 4), "-0.0030"),
        (render.signed(0.00001, 4), "0.0000"),
        (render.percent(0.048), "4.8%"),
        (render.signed_percent(-0.0139), "-1.4%"),
        (render.spelled(5), "five"),
        (render.spelled(47), "47"),
        (render.least(0.002), "0.002"),
        (render.series(["a"]), "a"),
        (render.series(["a", "b", "c"]), "a, b and c"),
    ],
)
def test_a_value_is_written(written: str, said: str):
    assert written == said


def test_a_table_is_made_of_rows(records: Records):
    columns = (
        ("batch", "batch"),
        ("rate", "rate", "number", 2),
        ("low", "range.low"),
        ("ms", "seconds", "ms", "number", 1),
    )
    assert render.table(records.rows("race"), *columns) == (
        "| batch | rate | low | ms |\n|---|---|---|---|\n| 8 | 1.50 |  |  |\n| 8 | 2.50 |  |  |\n| 64 | 3.50 | 1 |  |"
    )
    assert same(records.rows("race"), "model") == "minilm"


def test_paragraphs_are_filled_and_the_rest_stays():
    text = (
        "a\nb\n\n| x |\n|---|\n| y |\n\n<!-- c -->\n```python\n\nd   e\n```\n\n- f\n  g\n- " + "h " * 80 + "\n\n\n\nj"
    )
    filled = render.wrapped(text)
    assert filled.startswith("a b\n\n| x |\n|---|\n| y |\n\n<!-- c -->\n```python\n\nd   e\n```\n\n- f g\n- h h")
    assert filled.endswith("\n  " + " ".join("h" * 21) + "\n\nj\n")
    assert render.wrapped(filled) == filled


# --- figures in other texts that people read --------------------------------------------------------------------

STATED_ELSEWHERE = {
    "95%": "the share that intervals are made for",
    "lies under its *50%*": "the name of a column",
    "`about 8 minutes on AMD EPYC, 1 core`": "an example of a form",
    "`7 s`, `3:07`": "an example of a form",
    "C#, 50% or R&D": "an example of a form",
    'says "90% sure"': "an example of what calibration means",
    "from 0.001 to 0.002 is as far as": "an example of a scale",
    "and else holds out 10% and says so": "a default",
    "with a warning from 5%": "a threshold of the kit",
    "16 times the cosine": "a setting of the kit",
    "may exist twice for a moment: 64 MiB": "a setting of the kit",
    "cuBLAS keeps up to 32 MiB": "a constant of the libraries",
    "64 MiB on Hopper": "a constant of the libraries",
    "32 MiB each on Hopper": "a constant of the libraries",
    "Those up to 1 MiB come from segments of 2 MiB, larger ones below 10 MiB from segments of 20 MiB": "of torch",
    "of their own, rounded up to 2 MiB": "of torch",
    "at 0.083, bitsandbytes has 0.005": "a constant of the libraries",
    "a probability of 0.9677": "a constant of the libraries",
    "0.9677083": "a constant of the libraries",
    "from -0.993 to 1": "a constant of the libraries",
    "Seven billion weights in 16 bits are 13 GB": "arithmetic",
    "a standard error of 0.0045": "arithmetic",
    "201 MiB of the 352": "the memory plan's own; test_experiment.py computes it",
    "for unit variance: 0.0095 for 16": "Lloyd's and Max's own",
    "a normal of three times the variance": "Panter's and Dite's own",
    "an accuracy of 0.93 has": "an example",
    "each is at 1 - 0.05 /": "the share that intervals are made for",
    "0.37 bits a weight in blocks of 64": "arithmetic: 8 / 64 of 32-bit scales, but for the scales' own",
    "a shape (8 x 64, say)": "an example",
    "from 0.01 to 0.02": "an example of a scale",
}
"""What such texts say in units of measurement without having measured it, with the reason."""

_UNIT = (
    r"(?:%|percent\b|points?\b|times\b|x\b|×|-?fold\b|ms\b|s\b|seconds?\b|minutes?\b|hours?\b|[KMG]i?B\b"
    r"|(?:texts?|rows?|tokens?|samples?|steps?) (?:a|per) second|(?:texts|rows|tokens|samples|steps)/s)"
)
_WORDS = "two|three|four|five|six|seven|eight|nine|ten|twenty|fifty|a hundred"
_MEASURED = re.compile(
    rf"(?<![\w.-])(?!0\d\b)\d[\d,.]*(?: to \d[\d,.]*)?\s?{_UNIT}|(?<![\w.])0?\.\d{{2,}}(?!\.)|(?<![\w.-])[x×]\d"
    rf"|\b(?:{_WORDS}) (?:times (?:as|the|longer|more|less|faster|slower)|seconds|minutes|points|of (?:{_WORDS}) seeds)"
    r"|\b(?:twice|half) (?:as|the (?:speed|time|memory|bytes))\b"
    r"|\b(?:doubl|halv|tripl)e[ds]? (?:the|its) (?:speed|time|memory)"
    rf"|\b(?:{_WORDS})fold\b"
    r"|\ba (?:third|quarter) of (?:the|its) (?:speed|time|memory)|\bF1 (?:of|is|was) \d"
)


_LIBRARIES = "PEFT|bitsandbytes|torchao"


@pytest.mark.parametrize(
    "words",
    [
        *("5x faster", "x5 faster", "10-fold", "tenfold", "twice as fast", "half the memory", "doubles the speed"),
        *(
            "a macro F1 of 0.93",
            "an accuracy of .93",
            "F1 of 93.4",
            "43 percent",
            "5 points ahead",
            "four of five seeds",
        ),
        *(
            "7,102 texts per second",
            "7102 samples/s",
            "12MiB",
            "5ms",
            "ten minutes",
            "+0.0001",
            "a quarter of its memory",
        ),
    ],
)
def test_a_measured_figure_in_another_text_is_found(words: str):
    assert _MEASURED.search(f"The kit has {words} here.")


def other_texts() -> Iterator[tuple[str, str]]:
    """Yield the place and the words of docstrings, comments, notebooks' Markdown and what is written by hand."""
    import io
    import json
    import tokenize

    for path in sorted((ROOT / "qlora_kit").rglob("*.py")):
        source, name = path.read_text(encoding="utf-8"), str(path.relative_to(ROOT))
        if "claims" in name:  # it quotes what the explanation says
            continue
        comments: dict[int, str] = {}
        for token in tokenize.generate_tokens(io.StringIO(source).readline):
            if token.type == tokenize.COMMENT:
                # A sentence goes on over the lines of one comment.
                before = comments.pop(token.start[0] - 1, "")
                comments[token.start[0]] = f"{before} {token.string.lstrip('# ')}"
        yield from ((f"{name}:{line}", text) for line, text in comments.items())
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) and (text := ast.get_docstring(node)):
                yield f"{name}: {getattr(node, 'name', 'module')}", text
    for path in sorted((ROOT / "qlora_kit" / "presets").glob("*.yaml")):
        for line, text in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            yield f"{path.name}:{line}", text.partition("#")[2]
    for path in sorted((ROOT / "notebooks").glob("*.ipynb")):
        for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
            if cell["cell_type"] == "markdown":
                yield path.name, re.sub(r"\(data:[^)]*\)", "", "".join(cell["source"]))
    by_hand = {f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md")} - set(render.TEXTS)
    for name in ("CHANGELOG.md", "CONTRIBUTING.md", *sorted(by_hand)):
        # Blocks of code have settings and examples.
        yield name, re.sub(r"^```.*?^```$", "", (ROOT / name).read_text("utf-8"), flags=re.DOTALL | re.MULTILINE)


def test_other_texts_hold_no_measured_figure():
    """A measurement goes into a record, and into README from there: elsewhere it would grow old unseen."""
    used, found = set(), []
    for place, text in other_texts():
        text = " ".join(text.split())
        for snippet in STATED_ELSEWHERE:
            if snippet in text:
                used.add(snippet)
                text = text.replace(snippet, "")
        # Code, limits (larger than 64 MiB, over 256 KiB), and versions of libraries.
        text = re.sub(r"`[^`]*`|\b(?:than|over) \d+ [KMG]iB", "", text)
        text = re.sub(
            rf"\b(?:{_LIBRARIES}|wants) 0\.[\d.]+|(?<=\.py, )0\.\d+(?=\))|(?<=\()0\.\d+(?=, [\w/]+\.py)", "", text
        )
        found += [
            f"{place}: {one[0]}: {text[max(0, one.start() - 50) : one.end() + 30]}" for one in _MEASURED.finditer(text)
        ]
    assert found == [], "take it out, or state it above with its reason"
    assert set(STATED_ELSEWHERE) == used


def test_presets_say_of_the_data_what_it_has():
    """The numbers of rows and labels in the presets' comments are the package's own."""
    import qlora_kit as qk

    data = qk.banking77()
    rows = len(data.train) + len(data.validation)
    for path in sorted((ROOT / "qlora_kit" / "presets").glob("*.yaml")):
        text = path.read_text(encoding="utf-8")
        if found := re.search(
            r"# ([\d,]+) training and ([\d,]+) test questions of bank customers, (\d+) intents", text
        ):
            said = [int(number.replace(",", "")) for number in found.groups()]
            assert said == [rows, len(data.test), len(data.label_names)], path.name
            (split,) = re.findall(r"# ([\d,]+) rows to train on, ([\d,]+) to choose by", text)
            assert split == (f"{len(data.train):,}", f"{len(data.validation):,}"), path.name
        else:  # a part of the data: limit
            (limit,) = re.findall(
                r"limit: (\d+)  # of ([\d,]+) training rows; (\d+) of the validation and (\d+) of", text
            )
            small = qk.data.load(qk.preset(path.stem).data)
            sizes = [len(split) for split in (small.train, data.train, small.validation, small.test)]
            assert [int(number.replace(",", "")) for number in limit] == sizes, path.name


def test_presets_say_of_bits_and_parameters_what_they_are():
    """Numbers in the presets' comments that follow from their settings, or stand in results/memory.json."""
    import qlora_kit as qk
    from qlora_kit import models, quantization
    from qlora_kit.config.quantization import Quantization

    memory = Records()
    said = 0
    for path in sorted((ROOT / "qlora_kit" / "presets").glob("*.yaml")):
        text, spec = path.read_text(encoding="utf-8"), qk.preset(path.stem)
        name = spec.model.name.rpartition(":")[2].rpartition("/")[2].lower()
        figures: list[tuple[str, float]] = []
        if spec.lora is not None:
            figures.append((r"alpha / r = ([\d.]+)", spec.lora.alpha / spec.lora.r))
            if "of adapters" in text:
                lora = memory.rows("memory", model=name, method="lora", lora_r=spec.lora.r)
                shape = spec.override({"model.name": f"shape:{name}", "model.random_weights": True})
                head = models.load_config(shape.model).hidden_size * 77
                adapters = same(lora, "trainable_parameters") - head
                figures.append((r"([\d.]+) M parameters of adapters", adapters / 1e6))
        measured = memory.rows("memory", model=name, method="full")
        if not measured and name == "mpnet":  # not in the record yet: its weights are not what the tests install
            continue
        whole = same(measured, "parameters")
        figures.append((r"([\d.]+) M parameters, ", whole / 1e6))
        for double, key in ((False, "scheme: nf4"), (True, "double_quantization: true")):
            bits = quantization.bits_per_parameter(Quantization("nf4", double_quantization=double))
            figures.append((rf"{key}  # .*?([\d.]+) bits a weight", bits))
        for pattern, value in figures:
            for found in re.findall(pattern, text):
                digits = len(found.partition(".")[2])
                assert found == f"{value:.{digits}f}", (path.name, pattern, value)
                said += 1
    assert said > 30
