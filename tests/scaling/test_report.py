"""The files of a report: a self-contained page, and the same content as CSV, PNG and JSON."""

import csv
import json
import math
from html.parser import HTMLParser

import numpy as np
import pytest
from matplotlib.figure import Figure

from genai_jax.scaling.report import read_numbers, write_report
from genai_jax.scaling.report_page import shown
from genai_jax.scaling.report_types import Section, Table

# Elements without an end tag.
VOID = {"meta", "br", "hr", "img", "link", "input"}


class Page(HTMLParser):
    """Elements, identifiers, links and text of a page; checks the nesting."""

    def __init__(self, text: str):
        super().__init__()
        self.open, self.tags, self.ids, self.addresses, self.text = [], [], [], [], ""
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        values = dict(attributes)
        self.ids += [values["id"]] if "id" in values else []
        self.addresses += [v for k, v in attributes if k in ("src", "href", "xlink:href")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


def line_figure(title: str) -> Figure:
    figure = Figure(figsize=(4, 3))
    axes = figure.subplots()
    axes.plot([1, 2, 3], [3, 1, 2], marker="o", label="a line")
    axes.set(xlabel="compute (FLOPs)", ylabel="loss (nats per token)", title=title)
    axes.legend()
    return figure


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    folder = tmp_path_factory.mktemp("report") / "new"
    rows = [("small", 1_234, 2.5e13, 3.25), ("a, <b>", np.int64(7), math.inf, None)]
    table = Table("runs", ("run", "parameters", "compute (FLOPs)", "loss (nats)"), rows)
    sections = [
        Section("First", ["1 < 2 & 3"], [table], {"one": line_figure("one")}, {"law/alpha": 0.5}),
        Section("Second", [], [], {"two": line_figure("two")}, {"lost": math.nan}),
    ]
    record = {
        "question": "Is it so?",
        "warnings": ["run x is missing"],
        "commands": ["python -m genai_jax.study --study=a --workdir=b"],
        "environment": {"python": "3.11", "versions": {"jax": "0.10"}},
        "flags": {"small": "--seed=<3>\n"},
    }
    write_report(folder, "A title & more", sections, record=record)
    return folder


@pytest.mark.smoke
def test_the_page_is_self_contained(written):
    text = (written / "index.html").read_text()
    page = Page(text)
    assert page.tags.count("svg") == 2 and "script" not in page.tags and "link" not in page.tags
    assert page.addresses and all(a.startswith("#") for a in page.addresses)
    assert {a[1:] for a in page.addresses} <= set(page.ids)
    assert "@import" not in text and "url(http" not in text and "file:" not in text
    assert 'name="viewport"' in text and "prefers-color-scheme: dark" in text
    assert "@media print" in text


def test_figures_do_not_share_identifiers(written):
    page = Page((written / "index.html").read_text())
    glyph = lambda name: name.startswith("DejaVu")  # the same in both figures
    clips = [name for name in page.ids if not glyph(name)]
    assert len(clips) == len(set(clips)) >= 2


def test_the_page_has_all_of_the_content(written):
    text = Page((written / "index.html").read_text()).text
    for words in (
        "A title & more",
        "Is it so?",
        "run x is missing",
        "First",
        "1 < 2 & 3",
        "a, <b>",
    ):
        assert words in text
    for words in ("1,234", "2.5e+13", "versions jax", "--study=a", "--seed=<3>", "inf"):
        assert words in text


def test_figures_use_the_colors_of_the_page(written):
    text = (written / "index.html").read_text()
    assert "currentColor" in text and "#000000" not in text and "var(--paper)" in text


def test_csv_png_and_json(written):
    with open(written / "runs.csv", newline="") as file:
        rows = list(csv.reader(file))
    assert rows[0] == ["run", "parameters", "compute (FLOPs)", "loss (nats)"]
    assert rows[1:] == [["small", "1234", "25000000000000.0", "3.25"], ["a, <b>", "7", "inf", ""]]
    for name in ("one", "two"):
        assert (written / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    results = json.loads((written / "results.json").read_text())
    assert results["numbers"] == {"law/alpha": 0.5, "lost": None}
    assert results["record"]["flags"] == {"small": "--seed=<3>\n"}
    numbers = read_numbers(written / "results.json")
    assert numbers["law/alpha"] == 0.5 and math.isnan(numbers["lost"])


@pytest.mark.parametrize(
    ("sections", "words"),
    [
        ([Section("a"), Section("a")], "two sections of the report are named 'a'"),
        ([Section("a", numbers={"x": 1}), Section("b", numbers={"x": 1})], "two numbers .* 'x'"),
        ([Section("a", tables=[Table("t", ("c",), [(1, 2)])])], "'t' has 1 columns, but a row"),
    ],
)
def test_inconsistent_sections_are_refused(sections, words, tmp_path):
    with pytest.raises(ValueError, match=words):
        write_report(tmp_path, "t", sections, record={})


def test_how_cells_are_displayed():
    cells = [None, "x", 12, 1234567, 10**13, 0.5, 3.0, 2.345678, 123456.7, 1e-9, math.nan]
    words = ["", "x", "12", "1,234,567", "1e+13", "0.5", "3", "2.3457", "123,457", "1e-09", "nan"]
    assert [shown(cell) for cell in cells] == words
