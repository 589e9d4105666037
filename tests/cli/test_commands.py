"""The command line as a user meets it."""

import inspect
import json
import os
import re
import signal
import subprocess
import sys
import time
from contextlib import nullcontext, redirect_stderr, redirect_stdout
from io import StringIO
from pathlib import Path
from unittest import mock

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

import fxfuse
from fxfuse import presets
from fxfuse.calibration import data
from fxfuse.cli import commands as cli
from fxfuse.cli.common import as_options
from fxfuse.cli.references import _PICTURES, _TABLES, _image_folder, load_data, load_model
from fxfuse.cli.tables import Table
from tests.support.nets import mlp, outputs, randomise

pytestmark = pytest.mark.usefixtures("no_network")


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

def broken():
    yield torch.randn(4, 6)
    raise OSError("the disk is gone")

def stopped():
    raise KeyboardInterrupt

def waits():
    import pathlib, time
    pathlib.Path("waiting").touch()
    time.sleep(60)

def quits():
    raise SystemExit(0)

class Matrix(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(6, 3))

    def forward(self, x):
        return x @ self.weight

class Odd(nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.kind, self.layer = kind, nn.Linear(6, 3)

    def forward(self, x):
        if self.kind == "branch":
            return self.layer(x) if x.sum() > 0 else x
        if self.kind == "nothing":
            return None
        if self.kind == "raise":
            raise KeyError("no such key")
        return {"logits": self.layer(x), "kind": self.kind}

shown = net(6, 4)
slowly = [torch.randn(4, 6)]
"""

LABELLED = """
import torch

x = torch.randn(40, 6, generator=torch.Generator().manual_seed(0))
data = [(x, torch.arange(40) % 3)]
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    (tmp_path / "my_nets.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    for seed, (name, widths) in enumerate({"deep": (8, 7, 5), "shallow": (6, 4)}.items()):
        save_file(randomise(mlp(6, *widths, 3), seed).state_dict(), f"{name}.safetensors")
    (tmp_path / "out").mkdir()
    yield tmp_path
    sys.modules.pop("my_nets", None)


def run(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["fxfuse", *arguments])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    return stopped.value.code or 0


MODELS = ["my_nets:deep@deep.safetensors", "my_nets:shallow@shallow.safetensors"]
OPTIONS = ["--data", "my_nets:data", "--output", "out/fused.safetensors"]
ENVIRONMENT = os.environ | {"PYTHONPATH": str(Path(cli.__file__).parents[2])}  # of other processes


def test_fuse_writes_weights_that_load_into_the_deeper_model(folder, monkeypatch, capsys):
    assert run(monkeypatch, "fuse", *MODELS, *OPTIONS, "--picture", "a.svg") == 0
    net = mlp(6, 8, 7, 5, 3)
    net.load_state_dict(load_file("out/fused.safetensors"))
    assert torch.isfinite(outputs(net.eval(), torch.randn(4, 6))).all()
    assert (folder / "a.svg").read_text().lstrip().startswith("<?xml")
    shown = capsys.readouterr()
    assert "60 samples" in shown.out and "+" in shown.out and not shown.err


def test_what_a_fusion_warns_of_is_shown_once(folder, monkeypatch, capsys):
    assert run(monkeypatch, "fuse", *MODELS, *OPTIONS, "--method", "otfusion") == 0
    shown = capsys.readouterr()
    (sentence,) = fxfuse.load("out/fused.safetensors").meta["fxfuse"].warnings
    assert (
        shown.err == f"warning: {as_options(sentence)}\n" and "nats on 60 samples; try" in sentence
    )


def test_the_file_holds_the_network_and_a_report_with_hashes_and_seeds(folder, monkeypatch):
    assert run(monkeypatch, "fuse", *MODELS, *OPTIONS, "--seed", "3") == 0
    report = fxfuse.load("out/fused.safetensors").meta["fxfuse"]
    assert list(report.files) == ["deep.safetensors", "shallow.safetensors"]
    assert report.seeds == {"data": 3} and report.versions["torch"] == torch.__version__


def test_the_same_call_in_another_process_writes_the_same_file(folder, monkeypatch):
    assert run(monkeypatch, "fuse", *MODELS, *OPTIONS) == 0
    written = Path("out/fused.safetensors").read_bytes()
    os.remove("out/fused.safetensors")
    subprocess.run(
        [sys.executable, "-m", "fxfuse", "fuse", *MODELS, *OPTIONS],
        env=ENVIRONMENT | {"OMP_NUM_THREADS": "1", "PYTHONHASHSEED": "7"},
        capture_output=True,
        timeout=100,
        check=True,
    )
    assert Path("out/fused.safetensors").read_bytes() == written


def test_weights_and_samples_reach_the_fusion(folder, monkeypatch):
    heads, saved = [], "out/fused.safetensors"
    options = ["--weights 0.9,0.1", "--width 1.5", "--samples 10", "--method clafusion"]
    for extra in ([], *(o.split() for o in options)):
        assert run(monkeypatch, "fuse", *MODELS, *OPTIONS, *extra) == 0
        heads.append(load_file(saved)["6.weight"].clone())
        assert not fxfuse.load(saved).meta["fxfuse"].candidates
    assert all(x.shape != heads[0].shape or not torch.equal(x, heads[0]) for x in heads[1:])
    assert run(monkeypatch, "fuse", *MODELS, *OPTIONS, "--weights", "auto") == 0
    assert "the fused network" in fxfuse.load(saved).meta["fxfuse"].candidates


@pytest.mark.parametrize(
    "extra",
    [
        ["--weights", "a,b"],
        ["--weights", "0.5"],
        ["--weights", "automatic"],
        ["--width", "0.5"],
        ["--anchor", "7"],
        ["--method", "magic"],
        ["--output", "."],
        ["--output", "out/fused.pt"],
        ["--output", "nowhere/fused.safetensors"],
        ["--picture", "nowhere/a.svg"],
        ["--data", "imagefolder:/nowhere"],
        ["--data", "my_nets:nothing"],
    ],
)
def test_bad_options_end_with_status_2_one_message_and_no_file(folder, monkeypatch, capsys, extra):
    assert run(monkeypatch, "fuse", *MODELS, *OPTIONS, *extra) == 2
    shown = capsys.readouterr().err
    assert "error:" in shown and "to do:" in shown and "Traceback" not in shown
    assert not list((folder / "out").iterdir())


def test_python_dash_m_is_the_same(folder):
    done = subprocess.run(
        [sys.executable, "-m", "fxfuse", "fuse", "my_nets:gone", *OPTIONS],
        capture_output=True,
        text=True,
        timeout=100,
        env=ENVIRONMENT,
    )
    assert done.returncode == 2 and "cannot be resolved" in done.stderr
    assert "Traceback" not in done.stderr


def test_no_module_handles_signals():
    """Whoever imports the library decides himself what an interrupt does."""
    sources = Path(fxfuse.__file__).parent.rglob("*.py")
    assert not [p for p in sources if re.search(r"^\s*(import|from) signal\b", p.read_text(), re.M)]


def test_every_preset_is_a_method():
    kinds = (fxfuse.Method, type(presets.hmt))
    public = {name: value for name, value in vars(presets).items() if not name.startswith("_")}
    named = {name: preset for name, preset in public.items() if isinstance(preset, kinds)}
    assert named == cli.NAMED


def test_methods_that_transfer_take_no_options_of_fusing(folder, monkeypatch, capsys):
    extra = ["--method", "hmt", "--alignment", "a.json", "--report", "a.html"]
    assert run(monkeypatch, "fuse", *MODELS, *OPTIONS, *extra) == 2
    assert "--alignment, --report with the method 'hmt'" in capsys.readouterr().err


@pytest.mark.parametrize("method", ["hmt", "zipit"])
def test_other_methods_run(folder, monkeypatch, capsys, method):
    assert run(monkeypatch, "fuse", *MODELS, *OPTIONS, "--method", method) == 0
    assert load_file("out/fused.safetensors")["0.weight"].shape == (8, 6)
    assert ("transferred" in capsys.readouterr().out) == (method == "hmt")


def test_align_prints_text_or_json_and_draws(folder, monkeypatch, capsys):
    arguments = ["align", *MODELS, "--data", "my_nets:data"]
    assert run(monkeypatch, *arguments) == 0
    shown = capsys.readouterr()
    nets = [load_model(m) for m in MODELS]
    alignment = fxfuse.align(nets, load_data("my_nets:data"))
    assert shown.out == f"{alignment}\n" and not shown.err
    assert run(monkeypatch, *arguments, "--json", "--picture", "a.svg") == 0
    facts = json.loads(capsys.readouterr().out, parse_constant=pytest.fail)
    assert facts["networks"] == list(alignment.names) and (folder / "a.svg").stat().st_size
    for printed, segment in zip(facts["segments"], alignment.segments):
        assert printed["layers"] == [list(row) for row in zip(*segment.slots)]


def test_an_alignment_that_was_printed_and_edited_is_fused_along(folder, monkeypatch, capsys):
    arguments = [*MODELS, "--data", "my_nets:data"]
    assert run(monkeypatch, "align", *arguments, "--json") == 0
    facts = json.loads(capsys.readouterr().out)
    (rows,) = (s["layers"] for s in facts["segments"] if any(None in row for row in s["layers"]))
    named = [row[1] for row in rows]
    at = named.index(None)
    other = at + 1 if at + 1 < len(named) else at - 1
    named[at], named[other] = named[other], None
    for row, name in zip(rows, named):
        row[1] = name
    (folder / "edited.json").write_text(json.dumps(facts))
    assert run(monkeypatch, "fuse", *MODELS, *OPTIONS, "--alignment", "edited.json") == 0
    report = fxfuse.load("out/fused.safetensors").meta["fxfuse"]
    assert report.alignment == fxfuse.Alignment.load("edited.json")


@pytest.mark.parametrize("text", [None, "{}", "[1]"])
def test_a_file_without_an_alignment_is_refused_before_any_work(folder, monkeypatch, capsys, text):
    if text is not None:
        (folder / "a.json").write_text(text)
    assert run(monkeypatch, "fuse", "my_nets:stopped", *OPTIONS, "--alignment", "a.json") == 2
    assert "error:" in capsys.readouterr().err


@pytest.mark.parametrize("inputs", [["--input", "6"], ["--data", "my_nets:data"]])
def test_inspect_prints_text_or_json(folder, monkeypatch, capsys, inputs):
    assert run(monkeypatch, "inspect", MODELS[0], *inputs) == 0
    shown = capsys.readouterr()
    inspection = fxfuse.inspect(load_model(MODELS[0]), torch.zeros(2, 6))
    assert shown.out == f"{inspection}\n" and not shown.err
    assert run(monkeypatch, "inspect", MODELS[0], *inputs, "--json") == 0
    assert capsys.readouterr().out == inspection.to_json() + "\n"


def test_inputs_of_several_types_may_be_given_by_shape(folder, monkeypatch, capsys):
    reference = "torch.nn:Embedding?num_embeddings=9&embedding_dim=4"
    assert run(monkeypatch, "inspect", reference, "--input", "5:int64") == 0
    bilinear = "torch.nn:Bilinear?in1_features=3&in2_features=4&out_features=2"
    assert run(monkeypatch, "inspect", bilinear, "--input", "3", "--input", "4") == 0
    assert "Bilinear" in capsys.readouterr().out


def test_a_report_shows_references_hashes_and_with_labels_accuracies(folder, monkeypatch, capsys):
    (folder / "labelled.py").write_text(LABELLED)
    pages = []
    for samples in ("my_nets:data", "labelled:data"):
        chosen = ["--data", samples, "--output", "out/f.safetensors", "--report", "out/r.html"]
        assert run(monkeypatch, "fuse", *MODELS, *chosen, "--seed", "7") == 0
        pages.append((folder / "out" / "r.html").read_text())
    assert "report written in out/r.html" in capsys.readouterr().out
    assert ["<h2>Accuracy</h2>" in page for page in pages] == [False, True]
    assert all(MODELS[0] in page and "SHA-256 of deep.safetensors" in page for page in pages)


def test_a_report_that_cannot_be_written_is_refused_before_any_work(folder, monkeypatch, capsys):
    assert run(monkeypatch, "fuse", *MODELS, *OPTIONS, "--report", ".") == 2
    assert "--report" in capsys.readouterr().err and not list((folder / "out").iterdir())


def test_with_labels_accuracies_are_printed_and_the_ensemble_too(folder, monkeypatch, capsys):
    (folder / "labelled.py").write_text(LABELLED)
    chosen = ["--data", "labelled:data", *OPTIONS[2:]]
    assert run(monkeypatch, "fuse", *MODELS, *chosen) == 0
    lines = capsys.readouterr().out.splitlines()
    nets = dict(zip(["Sequential 0", "Sequential 1"], map(load_model, MODELS)))
    nets["fused"] = fxfuse.load("out/fused.safetensors").eval()
    scores = fxfuse.compare(nets, load_data("labelled:data"), ensemble=list(nets)[:2])
    assert list(scores)[-1] == "ensemble"
    for name, (accuracy, loss) in scores.items():
        assert f"{name:12}  {accuracy:6.2f} %  loss {loss:.4f}" in lines


def test_the_alignment_of_a_fusion_has_the_costs_that_align_prints(folder, monkeypatch, capsys):
    same = [MODELS[0], MODELS[0], "--data", "my_nets:data"]
    assert run(monkeypatch, "align", *same) == 0
    aligned = capsys.readouterr().out
    assert run(monkeypatch, "fuse", *same, *OPTIONS[2:]) == 0
    assert aligned.count("0.0000") > 1 and aligned in capsys.readouterr().out


def test_models_are_traced_once(folder, monkeypatch):
    traced, real = [], data.trace_alike
    monkeypatch.setattr(data, "trace_alike", lambda *a: traced.append(a) or real(*a))
    assert run(monkeypatch, "fuse", *MODELS, *OPTIONS) == 0
    assert len(traced) == 1


def test_one_model_is_one_model(folder, monkeypatch, capsys):
    assert run(monkeypatch, "fuse", MODELS[0], *OPTIONS) == 0
    assert "fused 1 model on 60 samples in" in capsys.readouterr().out


def test_the_version_is_that_of_everything(monkeypatch, capsys):
    assert run(monkeypatch, "--version") == 0
    shown = capsys.readouterr().out
    assert shown.startswith(f"fxfuse {fxfuse.__version__}\n") and torch.__version__ in shown


def test_a_traceback_is_shown_if_asked_for(folder, monkeypatch, capsys):
    for flags in ([], ["--traceback"]):
        assert run(monkeypatch, *flags, "fuse", "my_nets:gone", *OPTIONS) == 2
        shown = capsys.readouterr().err
        assert ("in load_model" in shown) == bool(flags) and "to do:" in shown


def test_help_has_every_key_of_the_data(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "400")
    of = inspect.signature
    keys = {*list(of(_image_folder).parameters)[1:], *list(of(Table).parameters)[3:]}
    for command in ("fuse", "align", "inspect", "barrier", "narrow", "permute", "verify"):
        assert run(monkeypatch, command, "--help") == 0
        shown = capsys.readouterr().out
        shown = " ".join(shown.split())
        assert all(f"{kind}:" in shown for kind in (*_PICTURES, *_TABLES))
        assert all(f"{key}=" in shown for key in (*keys, "split", "key", "class"))
    assert run(monkeypatch, "--help") == 0 and "--install-completion" in capsys.readouterr().out


# --- interrupted ----------------------------------------------------------------------------------


@pytest.fixture
def old(folder):
    path = folder / "out" / "fused.safetensors"
    save_file({"old": torch.ones(2)}, path)
    yield path
    assert [p.name for p in path.parent.iterdir()] == [path.name], "something is left beside it"


@pytest.mark.sweep
def test_an_interrupt_while_it_works_ends_with_130_and_the_old_file(old):
    before = old.read_bytes()
    options = [*OPTIONS[2:], "--data", "my_nets:waits"]
    process = subprocess.Popen(
        [sys.executable, "-m", "fxfuse", "fuse", *MODELS, *options],
        stderr=subprocess.PIPE,
        text=True,
        env=ENVIRONMENT,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # as in the foreground
    )
    while process.poll() is None and not Path("waiting").exists():
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    try:
        _, err = process.communicate(timeout=50)
    finally:
        process.kill()
    assert process.returncode == 130 and err.split() == ["stopped"]
    assert old.read_bytes() == before


def test_an_interrupt_while_it_writes_leaves_the_old_file(old, monkeypatch):
    before = old.read_bytes()

    def half(tensors, path, metadata):
        Path(path).write_bytes(b"half of")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("fxfuse.io.checkpoints.save_file", half)
        assert run(monkeypatch, "fuse", *MODELS, *OPTIONS) == 130
    assert old.read_bytes() == before
    assert run(monkeypatch, "fuse", *MODELS, *OPTIONS) == 0
    assert "old" not in load_file(old)


@pytest.mark.parametrize("stage", ["load models", "trace and find spaces", "refit", "save weights"])
def test_an_interrupt_between_stages_leaves_the_old_file(old, monkeypatch, capsys, stage):
    before = old.read_bytes()

    def interrupt(console):
        def report(name, share):
            if name == stage:
                raise KeyboardInterrupt

        return nullcontext(report)

    monkeypatch.setattr("fxfuse.cli.recipe.stages", interrupt)
    assert run(monkeypatch, "fuse", *MODELS, *OPTIONS) == 130
    assert old.read_bytes() == before and capsys.readouterr().err == "stopped\n"


# --- bad input, tried -----------------------------------------------------------------------------


def call(*arguments):
    """Run a command line in this process; return its status and what it printed."""
    out, err = StringIO(), StringIO()
    with (
        mock.patch.object(sys, "argv", ["fxfuse", *arguments]),
        redirect_stdout(out),
        redirect_stderr(err),
        pytest.raises(SystemExit) as stopped,
    ):
        cli.main()
    return stopped.value.code or 0, out.getvalue(), err.getvalue()


MODELS_WITHOUT = ["my_nets:deep", "my_nets:shallow"]
MODULES = ["my_nets", "torch", "torch.nn", "os", "nothing", ".a", "a..b", "", "\n", "Ä", "sys"]
NAMES = [
    *("deep", "net", "Linear", "Identity", "stopped.x", "quits", "exit", "path"),
    *("a b", "", "é", "."),
]
KEYS = ["in_features", "out_features", "hidden", "a b", "", "1", "%ff", "x"]
VALUES = ["4", "-1", "1e999", "[]", "{[]: 1}", "(" * 300, "'", "\\d", "None", "9" * 5000, "%00", ""]


queries = st.lists(st.tuples(st.sampled_from(KEYS), st.sampled_from(VALUES)), max_size=2).map(
    lambda pairs: "".join(f"&{k}={v}" for k, v in pairs)
)


files = st.sampled_from(["", "@", "@/", "@.", "@none.safetensors", "@my_nets.py", "@" + "x" * 300])


references = st.one_of(
    st.builds(
        "{}:{}{}{}{}".format,
        st.sampled_from(MODULES),
        st.sampled_from(NAMES),
        st.sampled_from(["", "?"]),
        queries,
        files,
    ),
    st.text(st.characters(blacklist_characters="\0", blacklist_categories=["Cs"]), max_size=12),
)


@example("my_nets:quits")
@example("torch.nn:Linear?in_features=-1&out_features=3")
@example("my_nets:deep?x=1")
@example("my_nets:Odd?kind=branch")
@example("my_nets:Odd?kind=nothing")
@example("my_nets:Odd?kind=raise")
@example("my_nets:shown?x=1")
@given(references)
def test_no_model_reference_ends_in_a_traceback(folder_of_all, reference):
    """Some references are good; the others end with one message and status 2."""
    status, out, err = call("inspect", "--input", "6", "--", reference)
    assert status in (0, 2) and "Traceback" not in err
    assert out if status == 0 else not out and "rror:" in err


ODD = ["my_nets:Odd?kind=branch", "my_nets:Odd?kind=raise", "my_nets:deep@none", "torch.nn:Flatten"]


BAD = {
    "models": [
        [],
        MODELS_WITHOUT[:1],
        [*MODELS_WITHOUT, *ODD[:1]],
        *([m] for m in ODD),
        ["my_nets:deep"] * 2,
    ],
    "data": [
        *("", ":", "my_nets:broken", "my_nets:slowly", "my_nets:quits", "torch:float32"),
        *("torch:zeros?size=(0,6)", "torch:zeros?size=()", "torch:zeros?size=(4,7)", "torch:pi"),
        *("torch:full?size=(4,6)&fill_value=inf", "torch:zeros?size=(4,6)&dtype=int", "mnist:"),
        *("imagefolder:.", "imagefolder:?size=4", "imagefolder:.?size=x", "imagefolder:.?mean"),
        *("mnist:/", "os:environ"),
    ],
    "output": ["", ".", "my_nets.py/x", "x" * 300, "x" * 250, "out", "new/deeper/out.safetensors"],
    "picture": ["", ".", "a.gif", "a", "my_nets.py/x.svg", "x" * 250 + ".svg", "a.svg"],
    "weights": ["", "1", "nan,1", "inf,1", "1e308,1e308", "-1,2", "0,0", "1,2,3", "0,1", "٣,1"],
    "anchor": ["-1", "2", "1", "x", "", "1.0", "9" * 30],
    "alignment": ["", ".", "none.json", "my_nets.py"],
    "report": ["", ".", "a.gif", "my_nets.py/x.html", "x" * 250 + ".html", "a.html"],
    "method": ["", "BEST", "zipit", "hmt", "average", "c2m3", "git_rebasin"],
    "samples": ["0", "-1", "1", "x", "1e9", "9" * 30],
    "seed": ["-1", "9" * 30, "0", "x"],
    "unknown": ["1"],
}


@example({"output": "x" * 250})
@example({"picture": "x" * 250 + ".svg"})
@example({"data": "my_nets:broken"})
@example({"models": ["my_nets:Matrix"], "data": "torch:zeros?size=(4,7)"})
@example({"data": "my_nets:slowly"})
@example({"weights": "1e308,1e308"})
@given(st.lists(st.sampled_from([(k, x) for k, v in BAD.items() for x in v]), max_size=3).map(dict))
def test_no_command_line_ends_in_a_traceback_or_half_a_file(folder_of_all, changed):
    """Whatever is wrong, either a whole file is there or none."""
    given = {"data": "my_nets:data", "output": "fused.safetensors"} | changed
    models = given.pop("models", MODELS_WITHOUT)
    before = set(folder_of_all.rglob("*"))
    status, _, err = call("fuse", *models, *(x for k, v in given.items() for x in (f"--{k}", v)))
    made = {p for p in set(folder_of_all.rglob("*")) - before if "__pycache__" not in str(p)}
    written = [p for p in made if p.is_file()]
    assert status in (0, 2) and "Traceback" not in err and ("rror" in err) == (status == 2)
    if status == 0:
        assert all(x.isfinite().all() for x in load_file(given["output"]).values())
    else:
        whole = {given["output"], given.get("report")}
        assert {p.name for p in written} <= whole, "a picture that could not be drawn"
    for path in sorted(made, reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()


@pytest.fixture(scope="module")
def folder_of_all(tmp_path_factory):
    folder = tmp_path_factory.mktemp("fuzz")
    (folder / "my_nets.py").write_text(MODULE)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.syspath_prepend(str(folder))
        yield folder
    sys.modules.pop("my_nets", None)
