"""The README and the page of results say what the records say."""

import re

import figures
import pytest


@pytest.mark.parametrize("template", figures.PAGES)
def test_a_page_is_what_its_template_and_the_records_give(template):
    """If this fails, run `python docs/figures.py`."""
    assert figures.PAGES[template].read_text() == figures.rendered(template)


def test_no_measured_number_stands_in_the_template_of_the_readme():
    text = (figures.HERE / "README.md.jinja").read_text()
    prose = re.sub(r"```.*?```|\{[{%].*?[}%]\}|`[^`]*`", "", text, flags=re.DOTALL)
    assert not re.findall(r"\d+\.\d+ ?%|\d ?%|\d{2,3},\d{3}", prose)


def test_a_changed_record_changes_the_page(tmp_path, monkeypatch):
    for path in figures.RESULTS.glob("*"):
        text = path.read_text() if path.suffix == ".json" else None
        if text is not None and path.name.startswith("one_shot-cifar"):
            text = text.replace("83.", "12.")
        if text is not None:
            (tmp_path / path.name).write_text(text)
    before = figures.rendered("README.md.jinja")
    monkeypatch.setattr(figures, "RESULTS", tmp_path)
    after = figures.rendered("README.md.jinja")
    assert before != after and "12." in after


def test_the_readme_fits_two_screens():
    assert len((figures.ROOT / "README.md").read_text().splitlines()) <= 120


def test_a_record_that_is_not_there_and_a_row_that_is_not_there_are_errors():
    with pytest.raises(LookupError, match="no record"):
        figures.mean("asked-of-nobody", "best")
    with pytest.raises(LookupError, match="0 rows"):
        figures.mean("digits-demo-", "nobody")


@pytest.mark.parametrize("name", ["README.md", "CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md"])
def test_links_between_the_files_of_the_project_lead_somewhere(name):
    links = re.findall(r"\]\(([^)#]+)[^)]*\)", (figures.ROOT / name).read_text())
    own = [link for link in links if "://" not in link]
    assert all((figures.ROOT / link).exists() for link in own)
    assert own or name != "README.md"
