"""The code of the pages runs as a reader would run it, and prints what they say."""

from pathlib import Path

import pytest
import run_pages

import fxfuse

ROOT = Path(__file__).parents[2]
PAGES = sorted(
    path.relative_to(ROOT)
    for path in [ROOT / "README.md", *(ROOT / "docs").rglob("*.md")]
    if path.name != "index.md" and run_pages.BLOCK.search(path.read_text())
)


@pytest.mark.parametrize("page", PAGES, ids=str)
def test_a_page_runs_and_prints_what_it_says(page):
    def heard(printed, said):
        if said is not None:
            assert run_pages.without_numbers(printed) == run_pages.without_numbers(said)

    if page.name == "huggingface.md":
        pytest.importorskip("transformers")
    with fxfuse.debug(1):  # as for a reader
        run_pages.run((ROOT / page).read_text(), str(page), heard)


def test_the_pages_are_found():
    assert {"README.md", "first.md", "data.md"} <= {path.name for path in PAGES}


PAGE = "# Page\n\n```python\nx = 2\nprint(x)\n```\n\n```text\n1\n```\n\n```python\nx += 1\n```\n"


def test_what_a_block_prints_is_written_behind_it():
    heard = []
    text = run_pages.run(PAGE, "page", lambda *both: heard.append(both))
    assert text == PAGE.replace("text\n1\n", "text\n2\n")
    assert heard == [("2\n", "1\n"), ("", None)]


def test_an_error_names_the_line_of_the_page():
    with pytest.raises(ZeroDivisionError) as error:
        run_pages.run("one\n\n```python\n1 / 0\n```\n", "the page", print)
    last = error.traceback[-1]
    assert (last.path.name if isinstance(last.path, Path) else last.path) == "the page"
    assert last.lineno + 1 == 4


def test_numbers_and_spaces_differ_between_machines():
    same = run_pages.without_numbers
    assert same("a   1,234 --- -0.5e-3") == same("a 7 ----- 8")
    assert same("a 1 b") != same("a 1 c")
