"""Arguments that several commands share, and what is refused of them."""

from pathlib import Path

import pytest

from fxfuse.cli.common import (
    example_of,
    parsed_weights,
    require_no_options,
    require_writable,
)
from fxfuse.errors import ArgumentError


def test_weights_are_numbers_or_auto_or_left_out():
    assert parsed_weights("0.7,0.3") == [0.7, 0.3]
    assert parsed_weights("auto") == "auto" and parsed_weights(None) is None


@pytest.mark.parametrize("text", ["", "a,b", "0.5;0.5", ","])
def test_weights_that_are_no_numbers_are_refused(text):
    with pytest.raises(ArgumentError, match="weights"):
        parsed_weights(text)


def test_only_methods_that_align_and_mix_take_options_of_it():
    require_no_options("copy", ["mix"], {"--weights": None})
    require_no_options("mix", ["mix"], {"--weights": [1.0]})
    with pytest.raises(ArgumentError, match="--weights with the method 'copy'"):
        require_no_options("copy", ["mix"], {"--weights": [1.0], "--anchor": None})


def test_new_and_old_files_can_be_written(tmp_path):
    require_writable(None, "--picture", [".svg"])
    require_writable(tmp_path / "a.svg", "--picture", [".svg"])
    (tmp_path / "old.svg").write_text("x")
    require_writable(tmp_path / "old.svg", "--picture", [".svg"])


@pytest.mark.parametrize(
    ("path", "fault"),
    [
        (".", "a folder"),
        ("", "a folder"),
        ("file/below", "a file in the way"),
        ("/dev/null", "a device"),
        ("x" * 300, "cannot be used"),
        ("\0", "cannot be used"),
        ("loop/a", "cannot be used"),
        ("a.gif", "the ending '.gif'"),
        ("new/a.svg", "a folder that is not there"),
    ],
)
def test_paths_that_cannot_be_written_are_refused(tmp_path, monkeypatch, path, fault):
    monkeypatch.chdir(tmp_path)
    Path("file").write_text("x")
    Path("loop").symlink_to("loop")
    with pytest.raises(ArgumentError, match=fault):
        require_writable(Path(path), "--output", [".svg"])


def test_inputs_come_from_shapes_or_from_data_not_from_both():
    (example,) = example_of(None, ["3x4x4"], [], [], print)
    assert example.shape == (2, 3, 4, 4)
    (example,) = example_of("torch:ones?size=(5,6)", None, [], [], lambda *_: None).args
    assert example.shape == (2, 6)
    for both in [(None, None), ("torch:ones?size=(5,6)", ["6"])]:
        with pytest.raises(ArgumentError, match="inputs"):
            example_of(*both, [], [], print)
