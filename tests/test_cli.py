"""The command line as a user meets it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from nets import mlp, outputs, randomise
from safetensors.torch import load_file, save_file

from fxfuse import cli

MODULE = """
import torch
from torch import nn

def net(*hidden):
    pairs = zip((6, *hidden), hidden)
    layers = [m for i, o in pairs for m in (nn.Linear(i, o), nn.ReLU())]
    return nn.Sequential(*layers, nn.Linear(hidden[-1], 3))

def deep():
    return net(8, 7, 5)

def shallow():
    return net(6, 4)

def data():
    return torch.randn(60, 6, generator=torch.Generator().manual_seed(0))
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    (tmp_path / "my_nets.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    for seed, (name, widths) in enumerate({"deep": (8, 7, 5), "shallow": (6, 4)}.items()):
        save_file(randomise(mlp(6, *widths, 3), seed).state_dict(), f"{name}.safetensors")
    yield tmp_path
    sys.modules.pop("my_nets", None)


def run(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["fxfuse", *arguments])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    return stopped.value.code or 0


MODELS = ["my_nets:deep@deep.safetensors", "my_nets:shallow@shallow.safetensors"]
OPTIONS = ["--data", "my_nets:data", "--output", "out/fused.safetensors"]


def test_fuse_writes_weights_that_load_into_the_deeper_model(folder, monkeypatch, capsys):
    assert run(monkeypatch, "fuse", *MODELS, *OPTIONS, "--picture", "a.svg") == 0
    net = mlp(6, 8, 7, 5, 3)
    net.load_state_dict(load_file("out/fused.safetensors"))
    assert torch.isfinite(outputs(net.eval(), torch.randn(4, 6))).all()
    assert (folder / "a.svg").read_text().lstrip().startswith("<?xml")
    shown = capsys.readouterr()
    assert "60 samples" in shown.out and "+" in shown.out and not shown.err


def test_weights_and_samples_reach_the_fusion(folder, monkeypatch):
    found = []
    for extra in ([], ["--weights", "0.9,0.1"], ["--samples", "10"], ["--method", "clafusion"]):
        assert run(monkeypatch, "fuse", *MODELS, *OPTIONS, *extra) == 0
        found.append(load_file("out/fused.safetensors")["0.weight"].clone())
    assert all(x.shape != found[0].shape or not torch.equal(x, found[0]) for x in found[1:])


@pytest.mark.parametrize(
    "extra",
    [
        ["--weights", "a,b"],
        ["--weights", "0.5"],
        ["--anchor", "7"],
        ["--method", "magic"],
        ["--output", "."],
        ["--data", "imagefolder:/nowhere"],
        ["--data", "my_nets:nothing"],
    ],
)
def test_bad_options_end_with_status_2_one_message_and_no_file(folder, monkeypatch, capsys, extra):
    assert run(monkeypatch, "fuse", *MODELS, *OPTIONS, *extra) == 2
    shown = capsys.readouterr().err
    assert "error:" in shown and "to do:" in shown and "Traceback" not in shown
    assert not (folder / "out").exists()


def test_python_dash_m_is_the_same(folder):
    done = subprocess.run(
        [sys.executable, "-m", "fxfuse", "fuse", "my_nets:gone", *OPTIONS],
        capture_output=True,
        text=True,
        timeout=100,
        env=os.environ | {"PYTHONPATH": str(Path(cli.__file__).parents[1])},
    )
    assert done.returncode == 2 and "cannot be resolved" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_report_tells_references_hashes_and_accuracies_where_there_are_labels(
    folder, monkeypatch, capsys
):
    labelled = "import torch\nx = torch.randn(40, 6)\ndata = [(x, torch.arange(40) % 3)]\n"
    (folder / "labelled.py").write_text(labelled)
    pages = []
    for data in ("my_nets:data", "labelled:data"):
        chosen = ["--data", data, "--output", "out/f.safetensors", "--report", "out/r.html"]
        assert run(monkeypatch, "fuse", *MODELS, *chosen, "--seed", "7") == 0
        pages.append((folder / "out" / "r.html").read_text())
    assert "report written in out/r.html" in capsys.readouterr().out
    assert ["<h2>Accuracy</h2>" in page for page in pages] == [False, True]
    assert all(MODELS[0] in page and "SHA-256 of deep.safetensors" in page for page in pages)


def test_a_report_that_cannot_be_written_is_refused_before_any_work(folder, monkeypatch, capsys):
    assert run(monkeypatch, "fuse", *MODELS, *OPTIONS, "--report", ".") == 2
    assert "--report" in capsys.readouterr().err and not (folder / "out").exists()
