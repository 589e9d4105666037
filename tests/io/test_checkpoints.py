"""Weights from files of strangers: read without running anything, or refused."""

import io
import os
import pickle
import zipfile
from collections import OrderedDict
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save, save_file
from torch import nn

from fxfuse.errors import CheckpointError, FuseError, WriteError
from fxfuse.io.checkpoints import KEYS, load_weights, read_safetensors, read_state, save_weights
from tests.support.files import broken
from tests.support.nets import mlp


def net():
    return nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3))


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def write(state, path):
    save_file(state, path) if path.suffix == ".safetensors" else torch.save(state, path)


@pytest.mark.parametrize("name", ["w.pt", "w.pth", "w.th", "w.bin", "w", "w.safetensors"])
def test_weights_of_every_format_load(tmp_path, name):
    source, model = net(), net()
    write(source.state_dict(), tmp_path / name)
    load_weights(model, tmp_path / name)
    assert same(model.state_dict(), source.state_dict())


@pytest.mark.parametrize("key", KEYS)
def test_weights_may_be_nested_beside_other_things(tmp_path, key):
    state = net().state_dict()
    torch.save({"epoch": 3, key: state, "optimizer": {"lr": 0.1}, "loss": []}, tmp_path / "w.pt")
    assert same(read_state(tmp_path / "w.pt"), state)


def test_weights_may_be_nested_twice(tmp_path):
    state = net().state_dict()
    torch.save({"model": {"state_dict": state, "step": 1}}, tmp_path / "w.pt")
    assert same(read_state(tmp_path / "w.pt"), state)


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod.", "model."])
@pytest.mark.parametrize("ending", ["pt", "safetensors"])
def test_prefixes_of_wrappers_are_taken_off(tmp_path, prefix, ending):
    source, model = net(), net()
    state = {prefix + name: tensor for name, tensor in source.state_dict().items()}
    write(state, tmp_path / f"w.{ending}")
    load_weights(model, tmp_path / f"w.{ending}")
    assert same(model.state_dict(), source.state_dict())


def test_names_that_are_the_models_own_are_left_alone(tmp_path):
    source, model = nn.ModuleDict({"module": net()}), nn.ModuleDict({"module": net()})
    torch.save(source.state_dict(), tmp_path / "w.pt")
    load_weights(model, tmp_path / "w.pt")
    assert same(model.state_dict(), source.state_dict())


def test_old_files_of_torch_load(tmp_path):
    state = net().state_dict()
    torch.save(state, tmp_path / "w.pt", _use_new_zipfile_serialization=False)
    assert same(read_state(tmp_path / "w.pt"), state)


class Harmful:
    def __reduce__(self):
        return os.system, ("touch executed",)


@pytest.mark.parametrize(
    "content", [Harmful(), {"state_dict": Harmful()}, net(), {"model": net()}, {"w": Path("x")}]
)
@pytest.mark.parametrize("zipped", [True, False])
def test_a_file_that_runs_code_is_refused_and_does_not(tmp_path, monkeypatch, content, zipped):
    monkeypatch.chdir(tmp_path)
    torch.save(content, "w.pt", _use_new_zipfile_serialization=zipped)
    with pytest.raises(CheckpointError, match="runs code when it is read: ") as caught:
        read_state("w.pt")
    assert "load it where its code is" in caught.value.do and not Path("executed").exists()


def test_a_plain_pickle_is_refused_without_running_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("w.pkl").write_bytes(pickle.dumps(Harmful()))
    with pytest.raises(CheckpointError, match="is not a file of torch.save") as caught:
        read_state("w.pkl")
    assert not Path("executed").exists() and "weights_only" not in str(caught.value)


@pytest.mark.parametrize(
    "content", [{}, [], {"epoch": 3}, {"state_dict": {"a": 1}}, torch.ones(2), {1: torch.ones(2)}]
)
def test_files_without_weights_say_what_they_hold(tmp_path, content):
    torch.save(content, tmp_path / "w.pt")
    with pytest.raises(CheckpointError, match="without weights"):
        read_state(tmp_path / "w.pt")


def test_compiled_programs_and_other_archives_are_refused(tmp_path):
    program = torch.jit.trace(nn.Linear(2, 2), torch.ones(1, 2))
    torch.jit.save(program, tmp_path / "program.pt")
    with zipfile.ZipFile(tmp_path / "other.pt", "w") as archive:
        archive.writestr("a.txt", "text")
    (tmp_path / "text.pt").write_text("text")
    (tmp_path / "empty.pt").write_bytes(b"")
    (tmp_path / "empty.safetensors").write_bytes(b"")
    missing = [tmp_path / "none.pt", tmp_path / "none.safetensors"]
    for path in [*tmp_path.iterdir(), *missing, tmp_path]:
        with pytest.raises(CheckpointError) as caught:
            read_state(path)
        assert caught.value.where == str(path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("0.bias"), 'Missing.*"0.bias"'),
        (lambda s: s.update({"0.weight": torch.zeros(3, 5)}), "size mismatch for 0.weight"),
        (lambda s: s.update(extra=torch.zeros(1)), "Unexpected.*extra"),
        (lambda s: s.clear(), "Missing|without"),
    ],
)
def test_weights_that_do_not_fit_say_what_differs(tmp_path, change, message):
    state = OrderedDict(net().state_dict())
    change(state)
    save_file(dict(state), tmp_path / "w.safetensors")
    with pytest.raises(CheckpointError, match=message):
        load_weights(net(), tmp_path / "w.safetensors")


# --- writing --------------------------------------------------------------------------------------


def test_tied_sliced_and_transposed_tensors_are_written_as_they_are(tmp_path):
    whole = torch.arange(12.0).view(3, 4)
    tensors = {"a": whole, "b": whole, "row": whole[1], "t": whole.T, "none": torch.ones(0, 2)}
    tensors |= {"other": whole.clone().requires_grad_(), "half": whole.bfloat16()}
    save_weights(tensors, tmp_path / "w.safetensors", {"key": "value"})
    state, metadata = read_safetensors(tmp_path / "w.safetensors")
    assert same(state, tensors) and metadata == {"key": "value"}


@given(st.dictionaries(st.text(min_size=1), st.text(), max_size=5))
def test_the_same_tensors_and_metadata_are_the_same_bytes(metadata):
    tensors, contents = {"b": torch.ones(3), 'Ä\n"': torch.zeros(2, 2)}, []
    with TemporaryDirectory() as folder:
        path = Path(folder, "w.safetensors")
        for items in (metadata.items(), reversed(metadata.items())):
            save_weights(tensors, path, dict(items))
            contents.append(path.read_bytes())
            assert read_safetensors(path)[1] == metadata
        assert contents[0] == contents[1] and same(read_safetensors(path)[0], tensors)


def test_tensors_outlive_a_change_of_the_file_that_they_were_read_from(tmp_path):
    path = tmp_path / "w.safetensors"
    save_weights({"a": torch.ones(1000)}, path)
    state, _ = read_safetensors(path)
    with open(path, "r+b") as file:
        file.truncate(10)
    assert bool((state["a"] == 1).all())


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "w.safetensors"
    save_weights({"a": torch.ones(2)}, path)

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr("fxfuse.io.checkpoints.save_file", fail)
    with pytest.raises(WriteError, match="disk full"):
        save_weights({"a": torch.zeros(2)}, path)
    assert torch.equal(load_file(path)["a"], torch.ones(2))
    assert [p.name for p in tmp_path.iterdir()] == ["w.safetensors"]


# --- broken files ---------------------------------------------------------------------------------


def _bytes(ending):
    state = nn.Linear(2, 2).state_dict()
    if ending == "safetensors":
        return save(state)
    buffer = io.BytesIO()
    torch.save(state, buffer, _use_new_zipfile_serialization=ending == "pt")
    return buffer.getvalue()


FILES = {ending: _bytes(ending) for ending in ("pt", "th", "safetensors")}
BROKEN = st.tuples(
    st.sampled_from(sorted(FILES)),
    st.floats(0, 1),
    st.sampled_from(["cut", "flip", "drop", "insert"]),
    st.binary(min_size=1, max_size=4),
)


@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(BROKEN)
def test_broken_files_are_read_or_refused(tmp_path, case):
    ending, share, how, new = case
    path = tmp_path / f"w.{ending}"
    path.write_bytes(broken(FILES[ending], share, how, new))
    try:
        state = read_state(path)
    except FuseError as error:
        assert str(path) in error.where
    else:
        assert all(isinstance(t, torch.Tensor) for t in state.values())


def averaged(net):
    return torch.optim.swa_utils.AveragedModel(net).state_dict()


def averaged_over_devices(net):
    return {
        "n_averaged": torch.tensor(3),
        **{f"module.module.{k}": t for k, t in net.state_dict().items()},
    }


def with_empty_extra_state(net):
    return {**net.state_dict(), "_extra_state": None, "0._extra_state": None}


def with_weights_of_the_loss(net):
    inside = {f"model.{k}": t for k, t in net.state_dict().items()}
    return {"state_dict": {**inside, "criterion.weight": torch.ones(3)}}


WRAPPED = [averaged, averaged_over_devices, with_empty_extra_state, with_weights_of_the_loss]


@pytest.mark.parametrize("wrap", WRAPPED)
def test_what_lies_beside_the_weights_is_left_out(tmp_path, wrap):
    net, other = mlp(6, 8, 3), mlp(6, 8, 3)
    torch.save(wrap(net), tmp_path / "state.pt")
    load_weights(other, tmp_path / "state.pt")
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), other.parameters()))


@pytest.mark.parametrize("wrap", [averaged, with_weights_of_the_loss])
def test_nothing_is_left_out_if_weights_are_missing(tmp_path, wrap):
    torch.save(wrap(mlp(6, 8, 3)), tmp_path / "state.pt")
    with pytest.raises(CheckpointError, match="does not fit"):
        load_weights(mlp(6, 8, 8, 3), tmp_path / "state.pt")
