"""The web page about a fusion."""

import re
import shutil
import subprocess
from dataclasses import replace
from html.parser import HTMLParser

import pytest
import torch
from hypothesis import given, settings

import fxfuse
from fxfuse.depth.shorten import Shorten
from fxfuse.ir import Frozen, LayerFit
from fxfuse.report._shared import CostMatrix, clean, shades
from fxfuse.report.html import _cells
from fxfuse.report.report import CouplingReport, Report, SpaceReport
from tests.support.alignments import NASTY, alignments, layers_of
from tests.support.nets import mlp, randomise

BROWSER = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))),
    None,
)


EMPTY = {"meta", "link", "rect", "line", "br"}  # tags that need not close
X = torch.randn(80, 6, generator=torch.Generator().manual_seed(1))


class Reader(HTMLParser):
    """Reads a page strictly: tags close in order, and nothing is fetched."""

    def __init__(self, page):
        super().__init__()
        self.open, self.tags, self.texts, self.fetched = [], [], [], []
        self.feed(page)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self.fetched += [v for k, v in attrs if k in ("src", "href", "xlink:href", "srcset")]
        assert not [k for k, _ in attrs if k.startswith("on")]
        if tag not in EMPTY:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append(data)


def report_of(alignment, word):
    """A report in which the word stands wherever a text can stand."""
    count = len(alignment.names)
    coupling = CouplingReport("soft", 1.0, 0.5)
    space = SpaceReport(word, 4, *((x,) * count for x in (None, 1.0, 4, coupling)))
    return Report(
        alignment,
        anchor=0,
        weights=(1 / count,) * count,
        spaces=(space,),
        frozen=(Frozen(word, 0, 3, word, word),),
        errors=(0.1,) * count,
        seconds={word: 1.0},
        heads=(word,),
        layers=(LayerFit(word, 0.25, float("inf"), 0.5),),
        divergence=0.5,
    )


@pytest.fixture(scope="module")
def report():
    nets = [randomise(mlp(6, 8, 7, 3), 0).eval(), randomise(mlp(6, 5, 3), 1).eval()]
    return fxfuse.fuse(nets, X, alignment=fxfuse.align(nets, X)).meta["fxfuse"]


@given(alignments())
@settings(max_examples=10)
def test_any_names_are_escaped(tmp_path_factory, alignment):
    path = tmp_path_factory.mktemp("page") / "a.html"
    word = "".join(NASTY)
    report_of(alignment, word).save_html(path, {word: 50.0, "b": (1.0, 2.0)}, {word: word})
    page = Reader(path.read_text())
    assert page.fetched == ["data:,"]
    assert clean(word) in page.texts
    shown = "\n".join(page.texts)
    assert all(clean(name) in shown for _, name in layers_of(alignment))
    assert [tag for tag, _ in page.tags].count("script") == 1


def test_it_shows_every_fact_of_the_report(report, tmp_path):
    report.save_html(tmp_path / "a.html", {"fused": (91.25, 0.31)}, {"seed": "17"})
    page = (tmp_path / "a.html").read_text()
    shown = " ".join(Reader(page).texts)
    heads = re.findall(r"<h2>(.*?)</h2>", page)
    assert heads == [
        "Accuracy",
        "Alignment",
        "Layer costs",
        "Refit",
        "Spaces and couplings",
        "Frozen",
        "Time and memory",
        "Where it comes from",
    ]
    assert "91.25 %" in shown and "17" in shown and report.versions["torch"] in shown
    assert all(stage in shown for stage in report.seconds)
    assert all(layer.node in shown for layer in report.layers)
    assert all(f.reason in shown for f in report.frozen)
    assert "MiB" in shown and "identity" in shown and "units, " in shown
    assert "http" not in page.replace("http://www.w3.org/2000/svg", "").replace("http-equiv", "")


def test_maps_of_costs_have_the_colours_of_the_picture():
    costs = [((0.1, 0.3), (0.2, 0.3)), ((0.3, 0.9), (float("inf"), 2.0))]
    maps = [_cells(CostMatrix("", ["a", "b"], ["c", "d"], c, [0, 1]), 1.0) for c in costs]
    fills = {(cell.exact, cell.fill) for rows in maps for row in rows for cell in row}
    assert {(f"{c:g}", shades(c)[0]) for c in (0.1, 0.2, 0.3, 0.9, 2.0)} | {("", "")} == fills


def test_tables_that_are_wider_than_a_phone_name_their_cells(report, tmp_path):
    report.save_html(tmp_path / "a.html")
    cells, inside = [], 0
    for tag, attributes in Reader((tmp_path / "a.html").read_text()).tags:
        if tag == "table":
            inside = "cards" in attributes.get("class", "")
        if tag == "tr":
            cells.append([])
        if tag == "td" and inside:
            cells[-1].append("data-name" in attributes)
    rows = [row for row in cells if row]
    assert len(rows) == len(report.rows) + len(report.spaces)
    assert all(not row[0] and all(row[1:]) for row in rows)


def test_sections_without_facts_are_left_out(report, tmp_path):
    bare = replace(report, layers=(), frozen=(), memory={}, versions={}, maps={})
    bare.save_html(tmp_path / "a.html")
    page = (tmp_path / "a.html").read_text()
    Reader(page)
    assert "<h2>Accuracy" not in page and "<h2>Refit" not in page and "every unit could" in page


def test_merged_layers_are_drawn_as_such(tmp_path):
    nets = [randomise(mlp(6, 8, 7, 3), 0).eval(), randomise(mlp(6, 5, 3), 1).eval()]
    method = fxfuse.Method(balancing=Shorten())
    fxfuse.fuse(nets, X, method=method).meta["fxfuse"].save_html(tmp_path / "a.html")
    page = (tmp_path / "a.html").read_text()
    assert page.count('class="fx-merged"') == 2 and 'class="fx-inserted"' not in page


def browse(page, folder):
    """Show a page; return the console's lines, what was requested, and the page afterwards."""
    requested = "performance.getEntriesByType('resource').map((e) => e.name).join(' ')"
    script = f"<script>document.title = 'requested: ' + {requested};</script>"
    (folder / "a.html").write_text(page.replace("</body>", script + "</body>"))
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking"]
    options += ["--disable-component-update", "--disable-sync", "--disable-extensions"]
    options += ["--no-first-run", f"--user-data-dir={folder / 'profile'}"]
    options += ["--enable-logging=stderr", "--dump-dom", (folder / "a.html").as_uri()]
    done = subprocess.run([BROWSER, *options], capture_output=True, text=True, timeout=100)
    console = [line for line in done.stderr.split("\n") if "CONSOLE" in line]
    return console, re.search("<title>requested: (.*?)</title>", done.stdout)[1], done.stdout


@pytest.mark.skipif(BROWSER is None, reason="no Chromium is installed")
@pytest.mark.sweep
def test_a_browser_shows_it_without_complaint_or_request(report, tmp_path):
    report.save_html(tmp_path / "page.html", {"fused": 91.0})
    page = (tmp_path / "page.html").read_text()
    console, requested, shown = browse(page, tmp_path)
    assert (console, requested) == ([], "")
    picture = shown[shown.index('<div id="picture"') :]
    assert "<svg" in picture and "8 units" in picture
    assert "<title>" not in picture, "the script did not run"
    planted = page.replace("</main>", '<img src="https://elsewhere.invalid/a.png"></main>')
    assert "elsewhere.invalid" in browse(planted, tmp_path)[0][0]
