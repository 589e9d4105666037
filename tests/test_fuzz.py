"""No public function raises anything but the library's errors, for any model, data or argument."""

import traceback

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tests.support.fuzz import FUNCTIONS, MODULES, violations

QUICK, LONG = 15, 3000


def require_none(seed, folder):
    found = violations(seed, folder)
    for name, error in found:
        print(f"seed {seed}, {name}:")
        traceback.print_exception(error)
    assert not found


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        path = tmp_path_factory.mktemp("fuzz")
        patch.chdir(path)  # where functions write that are given any name
        yield path


@pytest.mark.filterwarnings("ignore")
@settings(max_examples=QUICK)
@given(st.integers(0, 10**6))
@example(23)  # no layers at all
@example(579)  # one network alone
@example(747)  # a layer that reads no values
def test_only_errors_of_the_family_are_raised(folder, seed):
    require_none(seed, folder)


@pytest.mark.sweep
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("part", range(10))
def test_only_errors_of_the_family_are_raised_on_thousands_of_models(folder, part):
    for seed in range(part * LONG, (part + 1) * LONG):
        require_none(seed, folder)


def test_networks_are_drawn_from_all_of_torch():
    assert len(MODULES) > 140 and len(FUNCTIONS) > 120
