"""The experiments' command line, records and refusals."""

import json
from dataclasses import replace

import experiment
import pytest
import torch
from distillation import chosen
from distillation import table as distilled
from experiment import SCALES, Lab, Question, row
from results import starts_beside
from safetensors.torch import save_file

import fxfuse
from fxfuse import presets
from fxfuse.errors import ArgumentError


@pytest.fixture
def small(tmp_path, monkeypatch):
    """A scale of seconds, and a folder of images."""
    from tests.support.folders import folder

    def one(recipes):
        return {k: replace(r, epochs=2, batch=8) for k, r in recipes.items()}

    tiny = SCALES["tiny"]
    scale = replace(
        tiny, divisor=16, small_images=8, counts=(24, 8, 8), train=one(tiny.train),
        tune=one(tiny.tune), distil_epochs=1, temperatures=(4.0,), shares=(0.5,),
    )  # fmt: skip
    monkeypatch.setitem(SCALES, "tiny", scale)
    return folder(tmp_path / "images", count=20)


def tuned(lab: Lab):
    a, b = lab.first.network, lab.second.network
    fused = lab.fuse(presets.best, [a, b], 16)
    return [
        {"name": "both", "before": lab.ensemble([a, b])},
        row("A", lab.tune("A", a)),
        row("fused", lab.tune("fused", fused)),
    ]


QUESTION = Question("asked", ["resnet"], tuned, "What?", starts_beside({}))


def run(tmp_path, *more, question=QUESTION):
    folders = ["--work", str(tmp_path / "work"), "--results", str(tmp_path / "results")]
    options = ["--data", f"folder:{tmp_path / 'images'}", "--device", "cpu", "--seeds", "0"]
    experiment.main(question, [*folders, *options, *more])


def refused(tmp_path, capsys, *more, question=QUESTION):
    with pytest.raises(SystemExit) as stopped:
        run(tmp_path, *more, question=question)
    assert not list((tmp_path / "results").glob("*"))
    return stopped.value.code, capsys.readouterr().err


def test_a_record_and_a_table_are_written(small, tmp_path, capsys):
    run(tmp_path)
    record = json.loads((tmp_path / "results/asked-resnet-tiny-seed0.json").read_text())
    assert [r["name"] for r in record["rows"]] == ["both", "A", "fused"]
    assert all(len(r["epochs"]) == 2 for r in record["rows"][1:])
    assert record["versions"] == {"fxfuse": fxfuse.__version__, "torch": torch.__version__}
    assert record["data"]["train"] == 24
    assert "| fused |" in capsys.readouterr().out
    before = (tmp_path / "results/asked-resnet-tiny-seed0.json").read_text()
    run(tmp_path)  # from what was kept, to the same figures
    after = json.loads((tmp_path / "results/asked-resnet-tiny-seed0.json").read_text())
    assert json.loads(before)["rows"] == after["rows"]


def test_out_of_time_and_interrupted_say_that_the_command_goes_on(small, tmp_path, capsys):
    code, said = refused(tmp_path, capsys, "--minutes", "0")
    assert code == 3
    assert "goes on" in said

    def interrupt(lab):
        raise KeyboardInterrupt

    stopped = replace(QUESTION, rows=interrupt)
    code, said = refused(tmp_path, capsys, question=stopped)
    assert code == 130
    assert "goes on" in said


def test_bad_input_is_refused(small, tmp_path, capsys, monkeypatch):
    code, said = refused(tmp_path, capsys, "--data", "folder:nowhere")
    assert (code, "train/CLASS" in said) == (2, True)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    code, said = refused(tmp_path, capsys, "--device", "cuda")
    assert (code, "no CUDA device" in said) == (2, True)
    path = tmp_path / "foreign.safetensors"
    save_file({"weight": torch.ones(2)}, path)
    code, said = refused(tmp_path, capsys, "--parents", str(path), str(path))
    assert (code, "does not fit" in said) == (2, True)
    code, said = refused(tmp_path, capsys, "--pairs", "nothing")
    assert code == 2


def test_parents_come_from_files(small, tmp_path):
    data = experiment.load(f"folder:{small}", 8, tmp_path, SCALES["tiny"].counts)
    trainer = experiment.Trainer(data, tmp_path / "work", "cpu")
    lab = Lab(experiment.PAIRS["resnet"], SCALES["tiny"], 0, trainer)
    paths = [tmp_path / f"{name}.safetensors" for name in "ab"]
    for path, parent in zip(paths, (lab.first, lab.second)):
        save_file(parent.network.state_dict(), path)
    given = replace(lab, checkpoints=paths)
    assert given.first.before == lab.first.after
    with pytest.raises(ArgumentError, match="one A and one B"):
        given.parent(0, 1)


def untrained(name, images, tmp_path) -> Lab:
    pair = experiment.PAIRS[name]
    data = experiment.load(f"folder:{images}", pair.size(SCALES["tiny"]), tmp_path, (24, 8, 8))
    lab = Lab(pair, SCALES["tiny"], 0, experiment.Trainer(data, tmp_path / "work", "cpu"))
    lab.first, lab.second = (experiment.Run(lab.untrained(i, 0).eval()) for i in (0, 1))
    return lab


def shapes(network):
    return sorted(tuple(p.shape) for p in network.parameters())


@pytest.mark.sweep
@pytest.mark.parametrize("name", ["vgg", "resnet-half"])
def test_students_keep_their_widths(name, small, tmp_path):
    from teacher_student import students

    lab = untrained(name, small, tmp_path)
    fused = students(lab)
    deeper = fused["B, as deep as A"]
    assert shapes(fused["`best`"]) == shapes(fused["`clafusion`"]) == shapes(deeper)
    x = lab.data.inputs(lab.data.test.images)
    torch.testing.assert_close(deeper(x), lab.second.network(x), rtol=1e-4, atol=1e-4)


@pytest.mark.sweep
def test_a_network_made_wider_has_the_widths_of_what_is_fused_with_room(small, tmp_path):
    from wider import starts

    lab = untrained("resnet-half", small, tmp_path)
    found = starts(lab)
    fused, wider = (found[k] for k in ("`best`, `width=1.5`", "A, as wide"))
    assert shapes(fused) == shapes(wider) != shapes(found["`best`"])
    x = lab.data.inputs(lab.data.test.images)
    aim = lab.first.network(x)
    assert 0 < (wider(x) - aim).std() < 0.1 * aim.std()  # the same but for a little noise


def test_the_share_is_chosen_on_images_held_out():
    rows = [
        {"name": "B", "temperature": 4, "share": 0.1, "valid": 60, "after": 10, "before": 5},
        {"name": "B", "temperature": 4, "share": 0.9, "valid": 50, "after": 90, "before": 5},
    ]
    record = {"rows": rows, "data": {"classes": 7}}
    assert chosen(record, "B", 4)["share"] == 0.1
    assert "| 4 | 10.0 (0.1) |" in distilled([record])
