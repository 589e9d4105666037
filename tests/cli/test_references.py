"""References of the command line."""

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from fxfuse.cli.references import file_hashes, load_data, load_model
from fxfuse.errors import CheckpointError, DataError, ReferenceFormatError


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


def test_checkpoints_older_than_the_batch_counter_of_norms_load(tmp_path):
    state = nn.BatchNorm1d(3).state_dict()
    del state["num_batches_tracked"]
    save_file(state, tmp_path / "w.safetensors")
    assert load_model(f"torch.nn:BatchNorm1d?num_features=3@{tmp_path}/w.safetensors")


@pytest.mark.parametrize("name", ["w.pt", "none.safetensors"])
def test_checkpoints_that_do_not_fit_or_exist_are_refused(tmp_path, name):
    torch.save(nn.Linear(4, 2).state_dict(), tmp_path / "w.pt")
    with pytest.raises(CheckpointError):
        load_model(f"{SPEC}@{tmp_path}/{name}")


def test_files_of_torch_save_load_too_and_hashes_tell_files_apart(tmp_path):
    nets = [nn.Linear(4, 3), nn.Linear(4, 3)]
    references = [f"{SPEC}@{tmp_path}/{i}.pt" for i in range(2)]
    for i, net in enumerate(nets):
        torch.save({"state_dict": net.state_dict()}, tmp_path / f"{i}.pt")
        assert torch.equal(load_model(references[i]).weight, net.weight)
    hashes = file_hashes([*references, SPEC])
    assert list(hashes) == [f"{tmp_path}/0.pt", f"{tmp_path}/1.pt"]
    assert len(set(hashes.values())) == 2 and all(len(h) == 64 for h in hashes.values())


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
