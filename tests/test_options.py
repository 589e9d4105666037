"""What is refused before any work is done."""

from pathlib import Path

import pytest

from fxfuse.errors import ArgumentError
from fxfuse.options import chosen, require_file, require_fusing, shares


def test_what_is_good_passes(tmp_path):
    assert chosen("a", {"a": 1}) == 1
    assert shares(None) is None and shares("0.7,0.3") == [0.7, 0.3] and shares("auto") == "auto"
    require_file(None, "--picture")
    require_file(tmp_path / "new" / "deep" / "a.svg", "--picture", [".svg"])
    (tmp_path / "old.svg").write_text("x")
    require_file(tmp_path / "old.svg", "--picture", [".svg"])
    require_fusing("copy", ["mix"], {"--weights": None})
    require_fusing("mix", ["mix"], {"--weights": [1.0]})


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
    ],
)
def test_paths_that_cannot_be_written_are_refused(tmp_path, monkeypatch, path, fault):
    monkeypatch.chdir(tmp_path)
    Path("file").write_text("x")
    Path("loop").symlink_to("loop")
    with pytest.raises(ArgumentError, match=fault):
        require_file(Path(path), "--output", [".svg"])


def test_a_method_that_copies_takes_no_shares():
    with pytest.raises(ArgumentError, match="--weights with the method 'copy'"):
        require_fusing("copy", ["mix"], {"--weights": [1.0], "--anchor": None})


@pytest.mark.parametrize("text", ["", "a,b", "0.5;0.5", ","])
def test_what_is_no_number_is_refused(text):
    with pytest.raises(ArgumentError, match="weights"):
        shares(text)
