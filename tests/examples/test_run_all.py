"""What is missing is run, whole tables first, and goes on where it stopped."""

import json
from dataclasses import replace

import pytest
import run_all
from experiment import SCALES, Question, row
from results import starts_beside

from tests.support.folders import folder


def tuned(lab):
    return [row("A", lab.tune("A", lab.first.network))]


@pytest.fixture
def small(tmp_path, monkeypatch):
    """The scale of one thread in seconds, and one question left of its plan."""
    own = SCALES["cpu"]
    short = {
        part: {k: replace(r, epochs=1, batch=8) for k, r in getattr(own, part).items()}
        for part in ("train", "tune")
    }
    scale = replace(own, counts=(16, 8, 8), rates=(0.01,), small_images=8, **short)
    monkeypatch.setitem(SCALES, "cpu", scale)
    monkeypatch.setattr(run_all, "plan", lambda scale, seeds: [("asked", "vgg8", "cpu", 0)])
    asked = Question("asked", ["vgg8"], tuned, "What?", starts_beside({}))
    monkeypatch.setattr(run_all, "question", lambda name: asked)
    folder(tmp_path / "images", count=20)
    kept = ["--work", str(tmp_path / "work"), "--results", str(tmp_path / "results")]
    # The arithmetic of one process cannot be changed, and other tests have used it.
    options = ["--device", "cpu", "--precision", "no", "--seeds", "0"]
    return ["--scale", "cpu", *options, "--data", f"folder:{tmp_path / 'images'}", *kept]


def ran(arguments, *more):
    with pytest.raises(SystemExit) as stopped:
        run_all.main([*arguments, *more])
    return stopped.value.code


def test_what_has_no_record_is_run_and_not_again(small, tmp_path, capsys):
    assert ran(small, "--hours", "0") == 3
    assert not list((tmp_path / "results").glob("*.json"))
    assert ran(small) == 0
    (path,) = (tmp_path / "results").glob("*.json")
    record = json.loads(path.read_text())
    assert record["recipes"]["tune"]["rate"] == 0.01  # of those to choose from
    capsys.readouterr()
    run_all.main([*small, "--list"])
    assert capsys.readouterr().out.strip() == ""
    path.write_text(json.dumps(record | {"recipes": record["recipes"] | {"train": {}}}))
    run_all.main([*small, "--list"])
    assert capsys.readouterr().out.strip() == "asked vgg8 cpu 0"


def test_the_first_table_is_whole_before_another_begins():
    steps = list(run_all.plan("cpu", [0, 1, 2]))
    assert len(steps) == len(set(steps))
    first = [("headline", pair, "cpu", seed) for seed in range(3) for pair in run_all.SLIM]
    assert steps[: len(first)] == first


def test_every_question_of_another_scale_is_asked_of_its_pairs():
    asked = {name for name, *_ in run_all.plan("tiny", [0])}
    assert asked == set(run_all.results.QUESTIONS)
