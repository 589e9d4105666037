import inspect
import subprocess
import sys

import pytest

import fxfuse

NAMES = [
    "Alignment",
    "FuseError",
    "Inspection",
    "Method",
    "Report",
    "Space",
    "Spaces",
    "__version__",
    "align",
    "balance",
    "barrier",
    "debug",
    "draw",
    "find_spaces",
    "fuse",
    "heads",
    "inspect",
    "load",
    "narrow",
    "net2deeper",
    "net2wider",
    "permute",
    "presets",
    "save",
    "transfer",
    "verify",
]
FUNCTIONS = [n for n in NAMES if inspect.isfunction(getattr(fxfuse, n, None))]


def test_the_public_names_are_these():
    assert sorted(fxfuse.__all__) == NAMES
    assert len(set(fxfuse.__all__)) == len(fxfuse.__all__)


def test_nothing_else_is_public():
    named = {n for n in vars(fxfuse) if not n.startswith("_")}
    assert {n for n in named if not inspect.ismodule(getattr(fxfuse, n))} <= set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_every_public_name_exists_and_is_documented(name):
    found = getattr(fxfuse, name)
    if name == "__version__":
        assert found.count(".") == 2 and all(part.isdigit() for part in found.split("."))
    else:
        assert found.__doc__ and found.__doc__.strip().split("\n")[0].rstrip().endswith((".", ":"))


@pytest.mark.parametrize("name", FUNCTIONS)
def test_every_argument_of_a_public_function_is_documented(name):
    function = getattr(fxfuse, name)
    arguments = list(inspect.signature(function).parameters)
    if len(arguments) > 1:
        assert all(f"{a}:" in function.__doc__ for a in arguments)


@pytest.mark.parametrize("name", ["Alignment", "Inspection", "Method", "Report", "Space", "Spaces"])
def test_every_field_of_a_public_class_is_documented(name):
    kind = getattr(fxfuse, name)
    assert all(f"{field}:" in kind.__doc__ for field in kind.__dataclass_fields__)


def test_the_fixed_signatures():
    """Users, examples and acceptance checks rely on these."""
    signatures = {n: list(inspect.signature(getattr(fxfuse, n)).parameters) for n in FUNCTIONS}
    assert signatures["find_spaces"][:2] == ["module", "example"]
    assert signatures["permute"][:3] == ["module", "example", "seed"]
    for name in ("fuse", "align", "balance"):
        assert signatures[name][:2] == ["models", "data"]
    assert {"alignment", "weights", "anchor"} <= set(signatures["fuse"])


IMPORT = """
import sys

def refuse(event, args):
    if event in ("socket.connect", "socket.getaddrinfo", "socket.bind", "urllib.Request"):
        raise RuntimeError(f"{event} {args}")

import torch
before, loaded = (torch.get_num_threads(), torch.random.get_rng_state().sum()), set(sys.modules)
sys.addaudithook(refuse)
import fxfuse
assert before == (torch.get_num_threads(), torch.random.get_rng_state().sum())
print(*sorted({name.partition(".")[0] for name in set(sys.modules) - loaded}))
"""
HEAVY = {"matplotlib", "rich", "typer", "ot", "sklearn", "torchvision", "pandas", "IPython", "jax"}


def test_importing_is_quiet_loads_nothing_heavy_and_leaves_torch_and_the_network_alone():
    """What takes long to load is imported where it is used."""
    done = subprocess.run([sys.executable, "-c", IMPORT], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    loaded = set(done.stdout.split())
    assert "fxfuse" in loaded and not loaded & HEAVY
