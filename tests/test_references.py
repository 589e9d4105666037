"""References of the command line, and weights read and written safely."""

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from fxfuse.errors import CheckpointError, DataError, ReferenceFormatError, WriteError
from fxfuse.references import load_data, load_model, save_weights


def test_a_reference_builds_a_model_with_options_and_weights(tmp_path):
    net = nn.Linear(4, 3, bias=False)
    save_file(net.state_dict(), tmp_path / "w.safetensors")
    reference = f"torch.nn:Linear?in_features=4&out_features=3&bias=False@{tmp_path}/w.safetensors"
    loaded = load_model(reference)
    assert torch.equal(loaded.weight, net.weight) and loaded.bias is None and not loaded.training


@pytest.mark.parametrize(
    "reference",
    [
        "torch.nn",
        ":Linear",
        "no_such_package:Net",
        "torch.nn:NoSuchLayer",
        "torch.nn:Linear",
        "torch.nn:Linear?in_features",
        "torch.nn:Linear?in_features=4&out_features=3&colour=red",
        "torch:__version__",
        "torch.nn.functional:relu",
        "",
    ],
)
def test_references_that_lead_nowhere_are_refused(reference):
    with pytest.raises(ReferenceFormatError) as caught:
        load_model(reference)
    assert repr(reference) in str(caught.value) and "to do" in str(caught.value)


SPEC = "torch.nn:Linear?in_features=4&out_features=3"


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({"weight": torch.zeros(3, 4)}, 'Missing.*"bias"'),
        ({"weight": torch.zeros(3, 5), "bias": torch.zeros(3)}, "size mismatch for weight"),
        ({"weight": torch.zeros(3, 4), "bias": torch.zeros(3), "x": torch.zeros(1)}, "Unexpected"),
    ],
)
def test_checkpoints_that_do_not_fit_say_what_differs(tmp_path, state, message):
    save_file(state, tmp_path / "w.safetensors")
    with pytest.raises(CheckpointError, match=message):
        load_model(f"{SPEC}@{tmp_path}/w.safetensors")


def test_checkpoints_older_than_the_batch_counter_of_norms_load(tmp_path):
    state = nn.BatchNorm1d(3).state_dict()
    del state["num_batches_tracked"]
    save_file(state, tmp_path / "w.safetensors")
    assert load_model(f"torch.nn:BatchNorm1d?num_features=3@{tmp_path}/w.safetensors")


def test_a_missing_or_foreign_checkpoint_is_refused_without_unpickling(tmp_path):
    torch.save(nn.Linear(4, 3).state_dict(), tmp_path / "w.pt")
    for name in ("w.pt", "none.safetensors"):
        with pytest.raises(CheckpointError, match="cannot be read"):
            load_model(f"{SPEC}@{tmp_path}/{name}")


def make_images(folder, sizes=(8, 8)):
    from PIL import Image

    for i, size in enumerate(sizes):
        (folder / f"class{i}").mkdir(parents=True)
        Image.new("RGB", (size, size), (i * 50, 0, 0)).save(folder / f"class{i}" / "a.png")


def test_image_folders_load_normalised_and_resized(tmp_path):
    make_images(tmp_path, (8, 12))
    batch, labels = next(iter(load_data(f"imagefolder:{tmp_path}?size=6&mean=0,0,0&std=1,1,1")))
    assert batch.shape == (2, 3, 6, 6) and 0 <= float(batch.min()) <= float(batch.max()) <= 1
    assert sorted(labels.tolist()) == [0, 1]


def test_images_of_several_sizes_ask_for_a_size(tmp_path):
    make_images(tmp_path, (8, 12))
    with pytest.raises(DataError, match="different sizes"):
        list(load_data(f"imagefolder:{tmp_path}"))


@pytest.mark.parametrize("kind", ["imagefolder", "mnist"])
def test_missing_folders_are_data_errors(tmp_path, kind):
    with pytest.raises(DataError, match="cannot be read"):
        load_data(f"{kind}:{tmp_path}/nothing")


def test_data_may_come_from_a_factory():
    assert load_data("torch:zeros?size=(3,2)").shape == (3, 2)


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "w.safetensors"
    save_weights({"a": torch.ones(2)}, path)

    def fail(*args):
        raise OSError("disk full")

    monkeypatch.setattr("fxfuse.references.save_file", fail)
    with pytest.raises(WriteError, match="disk full"):
        save_weights({"a": torch.zeros(2)}, path)
    assert torch.equal(load_file(path)["a"], torch.ones(2))
    assert [p.name for p in tmp_path.iterdir()] == ["w.safetensors"]
