"""Recipes: fusions written down."""

import sys

import pytest
from safetensors.torch import load_file, save_file

import fxfuse
from fxfuse.cli import demo
from fxfuse.cli.recipe import EXAMPLE, HeadsChoice, Recipe
from fxfuse.errors import ArgumentError
from fxfuse.fusion import Separate, Union
from tests.support.nets import mlp, randomise

MODULE = """
import torch
from tests.support.nets import mlp

def deep(outputs=3):
    return mlp(6, 8, 7, outputs)

def shallow():
    return mlp(6, 5, 3)

x = torch.randn(60, 6, generator=torch.Generator().manual_seed(0))
data = [(x, torch.arange(60) % 3)]
"""
RECIPE = """
models: [recipe_nets:deep@deep.safetensors, recipe_nets:shallow@shallow.safetensors]
data: recipe_nets:data
output: fused.safetensors
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    there = tmp_path / "there"
    there.mkdir()
    (there / "recipe_nets.py").write_text(MODULE)
    for seed, (name, widths) in enumerate({"deep": (8, 7), "shallow": (5,)}.items()):
        weights = randomise(mlp(6, *widths, 3), seed).state_dict()
        save_file(weights, there / f"{name}.safetensors")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(there))
    yield there
    sys.modules.pop("recipe_nets", None)


@pytest.fixture
def run(folder, call):
    return call


def test_a_recipe_is_carried_out_in_its_own_folder(run, folder, monkeypatch):
    more = "weights: [0.7, 0.3]\nsamples: 40\nseed: 2\n"
    more += "report: r.html\npicture: a.svg\ncard: README.md\n"
    (folder / "recipe.yaml").write_text(RECIPE + more)
    monkeypatch.setattr("fxfuse.cli.recipe.LONG", 0.0)
    status, out, err = run("run", "there/recipe.yaml")
    assert (status, err) == (0, "") or "warning" in err
    assert "faster: fewer --samples" in out
    report = fxfuse.load(folder / "fused.safetensors").meta["fxfuse"]
    assert report.weights == (0.7, 0.3) and report.seeds["data"] == 2 and "40 samples" in out
    assert (folder / "a.svg").stat().st_size and "ensemble" in out
    page, card = (folder / "r.html").read_text(), (folder / "README.md").read_text()
    assert "deep@deep.safetensors" in page and report.files["deep.safetensors"] in card


def test_the_recipe_in_a_report_repeats_the_run(run, folder, monkeypatch):
    monkeypatch.chdir(folder)
    models = ["recipe_nets:deep@deep.safetensors", "recipe_nets:shallow@shallow.safetensors"]
    options = ["--data", "recipe_nets:data", "--samples", "50", "--width", "1.5", "--seed", "3"]
    files = ["--output", "fused.safetensors", "--card", "card.md"]
    assert run("fuse", *models, *options, *files)[0] == 0
    written = (folder / "fused.safetensors").read_bytes()
    text = (folder / "card.md").read_text().split("```yaml\n")[1].split("```")[0]
    assert "method: best" in text
    (folder / "again.yaml").write_text(text)
    (folder / "fused.safetensors").unlink()
    assert run("run", "again.yaml")[0] == 0
    assert (folder / "fused.safetensors").read_bytes() == written


def test_included_keys_hold_where_the_recipe_has_none(folder):
    (folder / "base.yaml").write_text(RECIPE + "samples: 7\nseed: 1\n")
    (folder / "recipe.yaml").write_text("include: base.yaml\nsamples: 9\n")
    recipe = Recipe.load(folder / "recipe.yaml")
    assert (recipe.samples, recipe.seed, recipe.output) == (9, 1, "fused.safetensors")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("- a\n", "holds a list"),
        ("models: [a", "cannot be read"),
        ("include: gone.yaml\n", "cannot be read"),
        ("include: recipe.yaml\n", "includes itself"),
        ("include: 3\n", "an include of 3"),
        (RECIPE + "sample: 4\n", "unknown key 'sample'"),
        (RECIPE + "samples: many\n", "a whole number"),
        ("models: [a]\ndata: b\n", "no key 'output'"),
        (RECIPE + "heads: {kind: both}\n", "heads of the kind 'both'"),
        (RECIPE + "heads: {kind: separate, labels: [[1], [2]]}\n", "with labels"),
        (RECIPE + "method: magic\n", "the method 'magic'"),
        (RECIPE.replace(".safetensors\n", ".pt\n"), "the ending '.pt'"),
        (RECIPE + "weights: half\n", "weights 'half'"),
    ],
)
def test_what_is_wrong_in_a_recipe_is_named_before_any_work(run, folder, text, said):
    (folder / "recipe.yaml").write_text(text)
    status, _, err = run("run", "there/recipe.yaml")
    assert status == 2 and said in err and "to do:" in err and "Traceback" not in err


def test_the_example_is_a_recipe(run, folder):
    status, out, _ = run("recipe", "--example")
    (folder / "example.yaml").write_text(out)
    assert status == 0 and Recipe.load(folder / "example.yaml").card == "card.md"
    mentioned = {line.lstrip("# ").split(":")[0] for line in EXAMPLE.splitlines() if ":" in line}
    assert {*Recipe.__dataclass_fields__} <= mentioned, "every key is in it"
    assert run("recipe", "--check", "there/example.yaml")[0] == 0
    assert run("recipe")[0] == 2


def test_the_example_runs_as_it_stands(run, folder, monkeypatch):
    monkeypatch.setattr(demo, "EPOCHS", 1)
    monkeypatch.setattr(demo, "digits", lambda real=demo.digits: [part[:857] for part in real()])
    (folder / "example.yaml").write_text(
        EXAMPLE.replace("width=1", "width=").replace(" 1000", " 100")
    )
    status, out, err = run("run", "there/example.yaml")
    assert status == 0 and "fused 2 models on 100 samples" in out and "error" not in err
    made = ["fused.safetensors", "report.html", "alignment.svg", "card.md"]
    assert all((folder / name).stat().st_size for name in made)


def test_models_of_other_kinds_are_targets_if_the_recipe_says_so(run, folder):
    other = "\n\ndef smooth():\n    return mlp(6, 5, 3, act=torch.nn.Tanh)\n"
    (folder / "recipe_nets.py").write_text(MODULE + other)
    text = RECIPE.replace("recipe_nets:shallow@shallow.safetensors", "recipe_nets:smooth")
    (folder / "recipe.yaml").write_text(text + "anchor: 0\n")
    status, _, err = run("run", "there/recipe.yaml")
    assert status == 2 and "--across" in err
    (folder / "recipe.yaml").write_text(text + "anchor: 0\nacross: true\n")
    status, _, err = run("run", "recipe.yaml")  # the first call went into the folder
    assert status == 0, err
    assert fxfuse.load(folder / "fused.safetensors").meta["fxfuse"].guests


def test_heads_are_those_of_fuse(run, folder):
    assert HeadsChoice("separate", "0").heads() == Separate(after="0")
    chosen = HeadsChoice("separate", "auto", multiply_adds=1.3, parameters=2.0).heads()
    assert chosen == Separate(after="auto", multiply_adds=1.3, parameters=2.0)
    labels = ((0, 1, 2), (2, 3, 4))
    assert HeadsChoice("union", labels=labels).heads() == Union(labels=labels)
    with pytest.raises(ArgumentError, match="heads of the kind"):
        HeadsChoice("other").heads()
    (folder / "recipe.yaml").write_text(RECIPE + "heads: {kind: separate}\n")
    assert run("run", "there/recipe.yaml")[0] == 0
    assert any(name.startswith("heads.1") for name in load_file(folder / "fused.safetensors"))
