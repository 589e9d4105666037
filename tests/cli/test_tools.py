"""The smaller commands."""

import sys

import pytest
import torch
from safetensors.torch import save_file

import fxfuse
from fxfuse.cli.references import load_model
from tests.support.nets import mlp, randomise

MODULE = """
import torch
from tests.support.nets import mlp

def net():
    return mlp(6, 8, 7, 3)

x = torch.randn(60, 6, generator=torch.Generator().manual_seed(0))
data = [(part, torch.arange(len(part)) % 3) for part in x.split(25)]
"""
A, B = "some_nets:net@a.safetensors", "some_nets:net@b.safetensors"
SHAPE = ["--input", "6"]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    (tmp_path / "some_nets.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    for seed, name in enumerate("ab"):
        save_file(randomise(mlp(6, 8, 7, 3), seed).state_dict(), f"{name}.safetensors")
    yield tmp_path
    sys.modules.pop("some_nets", None)


@pytest.fixture
def run(folder, call):
    return call


def test_permuted_networks_are_files_that_every_command_takes(run):
    status, out, _ = run("permute", A, "--output", "c.safetensors", *SHAPE, "--seed", "1")
    assert status == 0 and "computes the same: c.safetensors" in out
    weights = [load_model(reference).state_dict()["0.weight"] for reference in (A, "c.safetensors")]
    assert not torch.equal(*weights)
    assert run("verify", A, "c.safetensors", *SHAPE)[:2] == (0, "both compute the same\n")
    assert run("inspect", "c.safetensors", *SHAPE)[0] == 0
    fused = ["fuse", A, "c.safetensors", "--data", "some_nets:data", "--output", "f.safetensors"]
    assert run(*fused)[0] == 0
    files = fxfuse.load("f.safetensors").meta["fxfuse"].files
    assert list(files) == ["a.safetensors", "c.safetensors"]


def test_networks_that_differ_are_told(run):
    status, out, err = run("verify", A, B, *SHAPE)
    assert (status, out) == (2, "") and "error:" in err


def test_narrow_says_how_many_units_are_left(run):
    status, out, _ = run("narrow", A, "--output", "n.safetensors", *SHAPE, "--to", "0.5")
    assert status == 0 and "units instead of 15: n.safetensors" in out
    assert load_model("n.safetensors").state_dict()["0.weight"].shape == (4, 6)


def test_narrow_refits_on_data(run):
    options = ["--output", "n.safetensors", "--of", "parameters", "--to", "60"]
    status, out, _ = run("narrow", A, *options, "--data", "some_nets:data")
    assert status == 0 and "units instead of 15" in out
    small = load_model("n.safetensors")
    assert sum(p.numel() for p in small.parameters()) <= 60


@pytest.mark.parametrize("command", ["narrow", "permute"])
def test_a_file_that_holds_no_network_is_refused_where_one_is_to_be_written(run, command):
    status, _, err = run(command, A, "--output", "n.pt", *SHAPE)
    assert status == 2 and "the ending '.pt'" in err


def test_barrier_prints_what_the_function_returns_and_draws(run, folder):
    chosen = ["--weights", "0,0.5,1", "--samples", "40", "--picture", "curve.svg"]
    status, out, _ = run("barrier", A, B, "--data", "some_nets:data", *chosen)
    x = torch.randn(60, 6, generator=torch.Generator().manual_seed(0))[:40]
    y = torch.cat([torch.arange(25) % 3, torch.arange(15) % 3])
    nets = [load_model(A), load_model(B)]
    curve = fxfuse.barrier(nets, x, (x, y), weights=[0, 0.5, 1])
    assert status == 0 and out == f"{curve}\ndrawn in curve.svg\n"
    assert (folder / "curve.svg").stat().st_size


def test_barrier_needs_labels(run):
    status, _, err = run("barrier", A, B, "--data", "torch:ones?size=(5,6)")
    assert status == 2 and "the labelled data" in err
