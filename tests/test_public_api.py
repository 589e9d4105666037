import inspect
import subprocess
import sys

import pytest

import fxfuse

NAMES = [
    "Alignment",
    "FuseError",
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
    "narrow",
    "net2deeper",
    "net2wider",
    "permute",
    "presets",
    "transfer",
]
FUNCTIONS = [n for n in NAMES if inspect.isfunction(getattr(fxfuse, n, None))]


def test_the_public_names_are_these():
    assert sorted(fxfuse.__all__) == NAMES
    assert len(set(fxfuse.__all__)) == len(fxfuse.__all__)


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


@pytest.mark.parametrize("name", ["Alignment", "Method", "Report", "Space", "Spaces"])
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


def test_importing_is_quiet_and_leaves_torch_as_it_was():
    program = (
        "import torch; before = torch.get_num_threads(), torch.random.get_rng_state().sum();"
        "import fxfuse;"
        "assert before == (torch.get_num_threads(), torch.random.get_rng_state().sum())"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
