import importlib
import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest

import fxfuse

NAMES = [
    "Alignment",
    "FuseError",
    "FusionWarning",
    "Inspection",
    "Method",
    "Report",
    "Space",
    "Spaces",
    "__version__",
    "align",
    "balance",
    "barrier",
    "compare",
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
    member = getattr(fxfuse, name)
    if name == "__version__":
        assert member.count(".") == 2 and all(part.isdigit() for part in member.split("."))
    else:
        assert member.__doc__ and member.__doc__.strip().split("\n")[0].rstrip().endswith(
            (".", ":")
        )


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


PLACES = [fxfuse] + [
    importlib.import_module(f"fxfuse.{name}")
    for name in (
        *("alignment", "calibration", "coupling", "depth", "errors", "fusion", "graph", "io", "ir"),
        *("mixers", "presets", "refit", "report", "solvers", "spaces", "width"),
    )
]
PUBLIC = {name for place in PLACES for name in vars(place) if not name.startswith("_")}
ROOT = Path(__file__).parents[1]
TEXTS = {
    str(path.relative_to(ROOT)): path.read_text()
    for path in [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("examples/*.[mp][dy]")]
}
DOCUMENTED = {
    f"{place.__name__}.{name}": inspect.getdoc(member) or ""
    for place in PLACES
    for name in getattr(place, "__all__", ())
    for member in [getattr(place, name)]
    if inspect.isfunction(member) or inspect.isclass(member)
}


def imported(dotted):
    """Return what a dotted name stands for; import the modules on its way."""
    place, path = fxfuse, "fxfuse"
    for name in dotted.split(".")[1:]:
        path = f"{path}.{name}"
        place = getattr(place, name) if hasattr(place, name) else importlib.import_module(path)
    return place


@pytest.mark.parametrize("text", [*TEXTS.values(), *DOCUMENTED.values()], ids=[*TEXTS, *DOCUMENTED])
def test_names_that_are_mentioned_can_be_imported(text):
    for dotted in set(re.findall(r"\bfxfuse(?:\.[A-Za-z_]\w*)+", text)):
        assert imported(dotted) is not None


def test_names_that_cannot_be_imported_would_be_seen():
    assert imported("fxfuse.coupling.Transport") is fxfuse.coupling.Transport
    for dotted in ("fxfuse.transport", "fxfuse.coupling.Teleport"):
        with pytest.raises(ImportError):
            imported(dotted)


def test_classes_that_a_page_names_as_arguments_are_in_a_package():
    """Arguments of calls in backquotes, such as `Method(refit=LeastSquares())`."""
    pages = [text for name, text in TEXTS.items() if name.startswith(("docs", "README"))]
    called = {name for text in pages for name in re.findall(r"=([A-Z]\w*)\(", text)}
    assert {"Zip", "MatchMoments"} <= called and called <= PUBLIC


@pytest.mark.parametrize("name", DOCUMENTED)
def test_classes_that_a_docstring_mentions_are_in_a_package(name):
    """Torch's own are known by the names that everybody uses."""
    mentioned = set(re.findall(r"`([A-Z][a-z]\w*)[`.(]", DOCUMENTED[name]))
    assert mentioned - {"GraphModule", "DataLoader"} <= PUBLIC


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
