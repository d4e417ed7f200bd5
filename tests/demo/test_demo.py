"""The page of `qlora-kit demo`: what it answers, what it refuses, and that nothing that it shows can run."""

import asyncio
import csv
import os
import re
import signal
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from browser import Page, browser
from conftest import ROOT

import qlora_kit as qk
from qlora_kit.cli.main import main
from qlora_kit.config.experiment import Experiment
from qlora_kit.config.sections import LoraSpec, ModelSpec, TrainingSpec
from qlora_kit.data.whole import Whole, read_whole
from qlora_kit.demo import answers
from qlora_kit.demo.guard import Guard
from qlora_kit.demo.labelling import harmless_cell, labelled, likely_column, write_csv
from qlora_kit.demo.model import SharedRun, TrainingTexts
from qlora_kit.demo.serve import listening

LABELS = [
    '<img src=x onerror="window.hit=1">',
    "<script>window.hit=1</script>",
    "[link](javascript:window.hit=1)",
    "{{value}} ${window.hit=1} `",
    "=1+1",
]
ALL_OF_IT = " ".join(LABELS)


@pytest.fixture(scope="module")
def run(tiny, tmp_path_factory) -> qk.Run:
    """Return a run of a tiny model whose labels and texts hold markup, scripts, templates and formulas."""
    rows = [{"text": f"{word} {word} {label}", "label": label} for label in LABELS for word in "abcdefghijkl"]
    experiment = Experiment(
        name="tiny_hostile",
        model=ModelSpec(str(tiny("bert"))),
        lora=LoraSpec(r=4, alpha=8),
        training=TrainingSpec(epochs=1, batch_size=16, learning_rate=5e-3, precision="fp32", threads=1),
    )
    data = qk.text_classification(rows, test=0.2, validation=0.2)
    return qk.finetune(experiment, data=data, out=tmp_path_factory.mktemp("demo"), progress=False)


@pytest.fixture(scope="module")
def shared(run: qk.Run) -> SharedRun:
    return SharedRun(run)


# ---- without Gradio ----


def test_the_nearest_training_text_of_a_training_text_is_itself(shared: SharedRun):
    training = TrainingTexts(shared)
    assert training.nearest("a", 5) == []
    training.read(threading.Event())
    assert training.done == training.of == len(training.texts) == shared.run.training["rows"]["train"]
    text = training.texts[3]
    near = training.nearest(text, 5)
    assert near[0].cosine == pytest.approx(1, abs=1e-4)
    assert text in [item.text for item in near if item.cosine > 1 - 1e-4]
    assert [item.cosine for item in near] == sorted((item.cosine for item in near), reverse=True)
    assert all(item.label in LABELS for item in near)
    norms = np.linalg.norm(shared.directions(["a", "b c"]), axis=1)
    np.testing.assert_allclose(norms, 1, rtol=1e-5)


def test_before_all_are_read_a_text_is_compared_with_those_that_are(shared: SharedRun, monkeypatch):
    monkeypatch.setattr("qlora_kit.demo.model.CHUNK", 10)
    training, stop = TrainingTexts(shared), threading.Event()
    monkeypatch.setattr(shared, "give_way", lambda: stop.set() if training.done == 20 else None)
    training.read(stop)
    near = training.nearest("a b", 30)
    assert training.done == 20 and len(near) == 20 and {item.text for item in near} <= set(training.texts[:20])
    html = answers.answer(shared.predict(["a b"]), near, training)
    assert f"Of 20 of the {training.of} texts" in html and "The others are still being read." in html
    monkeypatch.setattr("qlora_kit.demo.model.MOST_TRAINING_TEXTS", 7)
    few = TrainingTexts(shared)
    few.read(threading.Event())
    assert few.done == len(few.texts) == 7 and few.of == training.of


def test_a_question_goes_before_the_next_chunk(shared: SharedRun, monkeypatch):
    monkeypatch.setattr("qlora_kit.demo.model.CHUNK", 1)
    training = TrainingTexts(shared)
    reading = threading.Thread(target=training.read, args=[threading.Event()])
    with shared.first():
        reading.start()
        while training.done == 0:
            time.sleep(0.001)
        for _ in range(3):
            shared.predict(["a b"])
        assert training.done == 1
    reading.join()
    assert training.done == len(training.texts)


def test_where_the_data_is_not_what_it_was_the_page_says_so_and_answers(shared: SharedRun, monkeypatch):
    from qlora_kit.demo import model

    def gone(run):
        raise qk.KitError("the rows are <b>gone</b>")

    monkeypatch.setattr(model, "data_of", gone)
    training = TrainingTexts(shared)
    training.read(threading.Event())
    assert training.nearest("a", 5) == []
    html = answers.answer(shared.predict(["a b"]), [], training)
    assert "They cannot be shown: the rows are &lt;b&gt;gone&lt;/b&gt;" in html
    assert html.count("<dt>") == 5


def test_a_text_under_the_limit_gets_no_label(shared: SharedRun):
    html = answers.answer(shared.predict(["a b"], 1.0), [], TrainingTexts(shared))
    assert "No label" in html and "under the limit of 100%" in html


def test_nothing_shown_is_markup_or_a_template():
    html = answers.shown(ALL_OF_IT + "\\ \x1b[2J & 'q'")
    assert not set(html) & set("<>{}$`\\\x1b\"'")


def table_of(*texts: str, **more: str) -> Whole:
    rows = [[text, *more.values()] for text in texts]
    return Whole(["text", *more], rows, [f"rows.csv, line {i}" for i in range(2, 2 + len(rows))])


def test_a_table_comes_back_with_labels_as_predict_gives_them(shared: SharedRun, monkeypatch):
    monkeypatch.setattr("qlora_kit.demo.labelling.CHUNK", 2)
    texts, steps = ["a b", "c d", "e"], []
    found = labelled(shared, table_of(*texts, id="5"), "text", source="rows.csv", step=lambda *done: steps.append(done))
    expected = shared.run.predict(texts)
    assert found.columns == [
        "text",
        "id",
        "label",
        "probability",
        "label_2",
        "probability_2",
        "label_3",
        "probability_3",
    ]
    assert [row[2] for row in found.rows] == [harmless_cell(label) for label in expected.labels]
    np.testing.assert_allclose([float(row[3]) for row in found.rows], expected.to_frame().probability, atol=2e-5)
    assert [row[:2] for row in found.rows] == [[text, "5"] for text in texts]
    assert steps == [(2, 3), (3, 3)]
    rejected = labelled(shared, table_of(*texts), "text", source="rows.csv", reject_below=1.0)
    assert rejected.rejected == 3 and rejected.columns[1:4] == ["label", "probability", "rejected"]
    assert {(row[1], row[3]) for row in rejected.rows} == {("", "True")}


def test_no_column_of_the_file_is_written_over(shared: SharedRun):
    found = labelled(shared, table_of("a", label="mine"), "text", source="rows.csv")
    assert found.columns[:4] == ["text", "label", "predicted_label", "predicted_probability"]
    assert found.rows[0][1] == "mine"


def test_a_bad_table_is_refused_with_its_line(shared: SharedRun):
    with pytest.raises(qk.KitError, match=r"rows\.csv, line 3: the text in column 'text' is empty"):
        labelled(shared, table_of("a", " "), "text", source="rows.csv")
    with pytest.raises(qk.KitError, match=r"there is no column 'txt'\. Did you mean 'text'"):
        labelled(shared, table_of("a"), "txt", source="rows.csv")


def test_the_likely_column_is_that_of_training_or_the_one_with_most_words():
    assert likely_column(table_of("a", body="b c d"), "text") == "text"
    assert likely_column(table_of("a", body="b c d"), "question") == "body"


@pytest.mark.parametrize(
    "cell", ["=1+1", "+cmd|' /C calc'!A0", "-2+3", "@SUM(A1)", "\t=1", " =1+1", "＝1+1", "\r=1", "-a"]
)
def test_a_cell_that_begins_like_a_formula_stands_behind_a_mark(cell: str):
    assert harmless_cell(cell) == f"'{cell}"


@pytest.mark.parametrize("cell", ["-5", "+49", "-1,234.5", "-1e-3", "-5%", "a=b", "", "a@b.org", "'=1"])
def test_numbers_and_plain_texts_stay_as_they_are(cell: str):
    assert harmless_cell(cell) == cell


def test_formulas_are_counted_and_the_file_can_be_read_again(shared: SharedRun, tmp_path: Path):
    found = labelled(shared, table_of("=1+1", 'a\nb, "c"', **{"=x": "-5"}), "text", source="rows.csv")
    labels = sum(cell == "'=1+1" for row in found.rows for cell in row[2:])
    assert found.defused == 2 + labels  # the text, the column's name, and where the label itself is one
    write_csv(found, tmp_path / "out.csv", marked=True)
    again = read_whole(tmp_path / "out.csv")
    assert again.marked and again.columns == found.columns and again.rows == found.rows
    assert found.columns[1] == "'=x" and found.rows[0][:2] == ["'=1+1", "-5"]
    with pytest.raises(FileExistsError):
        write_csv(found, tmp_path / "out.csv", marked=False)


@pytest.mark.long
@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_a_decoder_has_nearest_texts_too(tiny_experiment, topics: qk.TextData, tmp_path: Path, name: str):
    run = qk.finetune(tiny_experiment(name, training__epochs=1), data=topics, out=tmp_path, progress=False)
    training = TrainingTexts(SharedRun(run))
    training.read(threading.Event())
    assert training.problem == "" and training.done == len(training.texts) > 100
    near = training.nearest(training.texts[5], 5)
    assert training.texts[5] in [item.text for item in near] and near[0].cosine == pytest.approx(1, abs=1e-4)


def test_without_gradio_a_line_says_how_to_get_it(run: qk.Run, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "gradio", None)
    monkeypatch.setattr(os, "environ", dict(os.environ))
    assert main(["demo", str(run.path)]) == 2
    assert capsys.readouterr().err == "qlora_kit: the page needs the package gradio: pip install 'qlora_kit[demo]'\n"
    assert main(["demo", str(run.path), "--reject-below", "50"]) == 2
    assert capsys.readouterr().err == "qlora_kit: --reject-below is 50.0: allowed is 0 to 1\n"


def asked(folder: Path, path: str, only_here: bool = True, **headers: str) -> int:
    """Return the status of a request that the guard hands on to an application that says 200."""
    said: list[dict] = []

    async def app(scope, receive, send):
        await send({"type": "http.response.start", "status": 200, "headers": []})

    async def send(message):
        said.append(message)

    given = {"host": "127.0.0.1:7860", **headers}
    scope = {"type": "http", "path": path, "headers": [(k.encode(), v.encode()) for k, v in given.items()]}
    asyncio.run(Guard(app, folder, only_here=only_here)(scope, None, send))
    if said[0]["status"] == 200:
        assert b"default-src 'self'" in dict(said[0]["headers"])[b"content-security-policy"]
    return said[0]["status"]


def test_the_guard_hands_out_files_of_its_folder_alone(tmp_path: Path):
    inside = tmp_path / "files"
    inside.mkdir()
    (inside / "out.csv").touch()
    (tmp_path / "secret").touch()
    (inside / "link").symlink_to(tmp_path / "secret")
    for file, status in (
        (inside / "out.csv", 200),
        (inside / ".." / "secret", 403),
        (inside / "link", 403),
        ("/etc/passwd", 403),
        ("files/out.csv", 403),
        ("https://example.org/", 403),
        ("\0", 403),
    ):
        assert asked(inside, f"/gradio_api/file={file}") == status, file
    assert asked(inside, "/gradio_api/proxy=https://example.org/") == 403


@pytest.mark.parametrize(
    ("headers", "here", "elsewhere"),
    [
        ({"host": "localhost:9000"}, 200, 200),
        ({"host": "[::1]:7860"}, 200, 200),
        ({"host": "evil.example"}, 403, 200),  # a page elsewhere whose name points to this machine
        ({"host": "[evil"}, 403, 200),
        ({"origin": "http://127.0.0.1:7860"}, 200, 200),
        ({"origin": "https://evil.example"}, 403, 403),
        ({"origin": "null"}, 403, 403),
    ],
)
def test_the_guard_refuses_other_pages(tmp_path: Path, headers: dict, here: int, elsewhere: int):
    assert asked(tmp_path, "/", **headers) == here
    assert asked(tmp_path, "/", only_here=False, **headers) == elsewhere


def test_a_taken_port_is_passed_over_or_said():
    with listening("127.0.0.1", 0) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(qk.KitError, match=f"cannot listen on 127.0.0.1, port {port} .*--port"):
            listening("127.0.0.1", port)
    with listening("127.0.0.1", None) as first, listening("127.0.0.1", None) as second:
        assert first.getsockname()[1] < second.getsockname()[1]
    with pytest.raises(qk.KitError, match="--port is 70000: allowed is 0 to 65535"):
        listening("127.0.0.1", 70_000)
    with pytest.raises(qk.KitError, match=r"cannot listen on 192\.0\.2\.1"):
        listening("192.0.2.1", 0)


# ---- with Gradio, in a browser ----


@pytest.fixture(scope="module")
def served(run: qk.Run, tmp_path_factory) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    """Serve the page in a process of its own; yield its address and the process."""
    pytest.importorskip("gradio", reason="no gradio (make test-demo has it)")
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "GRADIO_SHARE": "True", "GRADIO_ALLOWED_PATHS": "/"}
    command = [sys.executable, "-m", "qlora_kit", "demo", str(run.path), "--port", "0", "--reject-below", "0.05"]
    with subprocess.Popen(
        command, env=environment, cwd=tmp_path_factory.mktemp("cwd"), text=True, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    ) as process:  # fmt: skip
        assert process.stdout is not None
        line = process.stdout.readline()
        assert line.startswith("http://127.0.0.1:"), line
        yield line.split()[0], process
        process.kill()


@pytest.fixture(scope="module")
def page(served, tmp_path_factory) -> Iterator[Page]:
    with browser(tmp_path_factory.mktemp("browser")) as opened:
        yield opened


def until(page: Page, expression: str) -> None:
    for _ in range(300):
        if page.evaluate(expression):
            return
        time.sleep(0.1)
    raise AssertionError(f"{expression} did not become true: {page.evaluate('document.body.innerText')[:2000]}")


def ask(page: Page, url: str, text: str, width: int = 1280) -> str:
    """Open the page, ask about a text, and return what it answers."""
    page.open(url, width)
    until(page, "!!document.querySelector('#text textarea')")
    page.evaluate(
        f"(() => {{const area = document.querySelector('#text textarea'); area.value = {text!r};"
        "area.dispatchEvent(new Event('input', {bubbles: true}))})()"
    )
    time.sleep(0.3)  # Gradio takes the value over a moment later
    page.evaluate("document.querySelector('#ask').click()")
    until(page, "!!document.querySelector('#answer .qk')")
    return page.evaluate("document.querySelector('#answer').innerText")


def drop(page: Page, file: Path) -> None:
    """Give the page a file; it is open on its first tab."""
    page.evaluate("[...document.querySelectorAll('[role=tab]')].find(tab => tab.innerText == 'A file').click()")
    until(page, "!!document.querySelector('#file input[type=file]')")
    root = page.do("DOM.getDocument")["root"]["nodeId"]
    node = page.do("DOM.querySelector", nodeId=root, selector="#file input[type=file]")["nodeId"]
    page.do("DOM.setFileInputFiles", nodeId=node, files=[str(file)])


@pytest.mark.long
@pytest.mark.parametrize("width", [1280, 400])
def test_hostile_labels_and_texts_are_shown_and_do_not_run(served, page: Page, width: int):
    url, _ = served
    for _ in range(100):
        said = ask(page, url, ALL_OF_IT, width)
        if "similarity" in said and "being read" not in said:
            break
        time.sleep(0.2)
    assert all(label in said for label in LABELS)  # five labels, so all of them are among the first five
    assert "that it was trained on" in said and said.count("similarity") == 5
    inside = "document.querySelectorAll('.qk img, .qk script, .qk a, .qk iframe').length"
    assert page.evaluate(inside) == 0
    assert page.evaluate("window.hit === undefined")
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    # Gradio's own page complains of itself in these words, which are about no file and no address.
    assert set(page.complaints) <= {"Method not implemented."}
    others = "performance.getEntriesByType('resource').filter(one => !one.name.startsWith(location.origin)).length"
    assert page.evaluate(others) == 0
    head = page.evaluate("document.body.innerText")
    assert "The texts that you enter do not leave it." in head and "tiny_hostile" in head and "Not tested yet" in head


@pytest.mark.long
def test_a_file_comes_back_with_labels(served, page: Page, tmp_path: Path, run: qk.Run):
    url, _ = served
    texts = [ALL_OF_IT, "=1+1", "a b"]
    with open(tmp_path / "rows.csv", "w", newline="") as stream:
        csv.writer(stream).writerows([["<b>id</b>", "text"], *([str(i), text] for i, text in enumerate(texts))])
    assert ask(page, url, " ") == "There is no text yet: write one, then ask."
    drop(page, tmp_path / "rows.csv")
    until(page, "document.querySelector('#column input')?.value == 'text'")
    page.evaluate("document.querySelector('#ask-file').click()")
    until(page, "!!document.querySelector('#result a[href]')")
    said = page.evaluate("document.querySelector('#file-answer').innerText")
    assert "3 rows have labels: rows_labelled.csv has them all." in said and "begin like a formula" in said
    assert page.evaluate("window.hit === undefined")
    with urllib.request.urlopen(page.evaluate("document.querySelector('#result a[href]').href")) as answer:
        rows = list(csv.reader(answer.read().decode().splitlines()))
    assert rows[0][:4] == ["<b>id</b>", "text", "label", "probability"]
    assert [row[1] for row in rows[1:]] == [ALL_OF_IT, "'=1+1", "a b"]
    assert [row[2] for row in rows[1:]] == [harmless_cell(label) for label in run.predict(texts).labels]


@pytest.mark.long
def test_a_bad_file_gets_one_line(served, page: Page, tmp_path: Path):
    url, _ = served
    (tmp_path / "bad.csv").write_text("a,b\n1,2\n<img src=x onerror=window.hit=1>\n")
    ask(page, url, "a")
    drop(page, tmp_path / "bad.csv")
    until(page, "!!document.querySelector('#file-answer .problem')")
    said = page.evaluate("document.querySelector('#file-answer').innerText.trim()")
    assert said.startswith("bad.csv, line 3: 1 columns where the header has 2") and "\n" not in said


@pytest.mark.long
def test_no_other_file_is_handed_out(served, run: qk.Run):
    url, _ = served
    for path in (
        "file=/etc/passwd", f"file={run.path}/experiment.yaml", "file=../../../../etc/passwd", "file=C:/x",
        "file=%2e%2e/%2e%2e/etc/passwd", "file=.gradio/cached_examples", "file=https://example.org", "proxy=https://a.hf.space",
    ):  # fmt: skip
        with pytest.raises(urllib.error.HTTPError) as error:
            urllib.request.urlopen(f"{url}/gradio_api/{path}")
        assert error.value.code == 403, path


@pytest.mark.long
def test_no_address_that_a_request_names_is_fetched(shared: SharedRun, tmp_path: Path, monkeypatch):
    gradio = pytest.importorskip("gradio", reason="no gradio (make test-demo has it)")
    from qlora_kit.demo.page import make_page

    async def fetched(address: str, **more: object) -> str:
        raise AssertionError(f"{address} would be fetched")

    monkeypatch.setattr("gradio.processing_utils.async_ssrf_protected_download", fetched)
    page = make_page(shared, TrainingTexts(shared), tmp_path)
    field = next(
        block for block in page.blocks.values() if isinstance(block, gradio.File) and block.interactive is None
    )
    assert asyncio.run(field.async_move_resource_to_block_cache("https://example.org/rows.csv")) is None


@pytest.mark.long
def test_ctrl_c_ends_it_in_one_line(served):
    url, process = served
    port = int(re.findall(r":(\d+)", url)[0])
    process.send_signal(signal.SIGINT)
    out, said = process.communicate()
    assert process.returncode == 130
    assert out == "" and said.splitlines()[1:] == ["qlora_kit: stopped; the same command again goes on where it can"]
    assert said.startswith("loading ")
    listening("127.0.0.1", port).close()


@pytest.mark.long
def test_another_host_is_warned_of(run: qk.Run):
    pytest.importorskip("gradio", reason="no gradio (make test-demo has it)")
    command = [sys.executable, "-m", "qlora_kit", "demo", str(run.path), "--port", "0", "--host", "0.0.0.0"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(
        command, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        url = process.stdout.readline()
        process.terminate()
        _, said = process.communicate()
    assert url.startswith("http://0.0.0.0:")
    assert "warning: whoever reaches 0.0.0.0 can use this page; nobody is asked who they are" in said
    assert process.returncode == 128 + signal.SIGTERM
