"""Images read from folders and from torchvision's files."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from images import Images, Split, augmented, load

from fxfuse.errors import DataError
from tests.support.folders import folder


def test_a_folder_is_parted_without_overlap(tmp_path):
    data = load(f"folder:{folder(tmp_path)}", 8, tmp_path, (0, 3, 0))
    assert (len(data.train), len(data.valid), len(data.test), data.classes) == (9, 3, 12, 2)
    seen = torch.cat([data.train.images, data.valid.images]).flatten(1)
    assert len(torch.unique(seen, dim=0)) == 12


def test_what_is_drawn_is_drawn_again(tmp_path):
    folder(tmp_path)
    first, again = (load(f"folder:{tmp_path}", 8, tmp_path, (4, 2, 5)) for _ in range(2))
    assert first.described() == again.described()
    assert len(first.train) == 4
    fewer = load(f"folder:{tmp_path}", 8, tmp_path, (3, 2, 5))
    assert fewer.described()["sha256"] != first.described()["sha256"]


def test_images_of_another_size_are_resized(tmp_path):
    data = load(f"folder:{folder(tmp_path)}", 4, tmp_path, (0, 2, 0))
    assert data.train.images.shape[1:] == (3, 4, 4)


def test_areas_become_their_means(tmp_path):
    source = f"folder:{folder(tmp_path)}"
    whole, small = (load(source, size, tmp_path, (0, 2, 0), area=True) for size in (8, 4))
    means = torch.nn.functional.avg_pool2d(whole.train.images.float(), 2)
    assert (small.train.images - means).abs().max() <= 0.5
    other = load(source, 4, tmp_path, (0, 2, 0))
    assert not torch.equal(other.train.images, small.train.images)


def test_inputs_have_mean_zero_and_deviation_one(tmp_path):
    data = load(f"folder:{folder(tmp_path)}", 8, tmp_path, (0, 2, 0))
    x = data.inputs(data.train.images)
    assert x.mean((0, 2, 3)).abs().max() < 1e-4
    assert (x.std((0, 2, 3)) - 1).abs().max() < 1e-2


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("folder:nowhere", "train/CLASS"),
        ("zip:nowhere", "folder:PATH"),
        ("cifar10:nowhere", "cifar10"),
        ("cifar100:nowhere", "cifar100"),
        ("", "folder:PATH"),
    ],
)
def test_what_is_not_there_is_refused(source, said, tmp_path, monkeypatch):
    monkeypatch.setattr("images.SHARED", tmp_path / "none")
    with pytest.raises(DataError, match=said):
        load(source, 8, tmp_path, (0, 0, 0))


def test_too_few_images_are_refused(tmp_path):
    source = f"folder:{folder(tmp_path)}"
    with pytest.raises(DataError, match="to choose on"):
        load(source, 8, tmp_path, (4, 1000, 4))


def test_folders_of_different_classes_are_refused(tmp_path):
    folder(tmp_path, splits=["train"])
    folder(tmp_path, ("a", "c"), ["test"])
    with pytest.raises(DataError, match="same classes"):
        load(f"folder:{tmp_path}", 8, tmp_path, (0, 0, 0))


def test_empty_folders_are_refused(tmp_path):
    for split in ("train", "test"):
        (tmp_path / split / "a").mkdir(parents=True)
    with pytest.raises(DataError, match="images in them"):
        load(f"folder:{tmp_path}", 8, tmp_path, (0, 0, 0))


@given(st.integers(0, 2**31), st.integers(1, 5))
def test_an_augmented_image_is_a_window_of_the_padded_one(seed, count):
    images = torch.randint(0, 256, (count, 3, 16, 16), dtype=torch.uint8)
    moved = augmented(images, torch.Generator().manual_seed(seed))
    assert moved.shape == images.shape
    assert moved.dtype == torch.uint8
    padded = torch.nn.functional.pad(images, [2] * 4)
    windows = padded.unfold(2, 16, 1).unfold(3, 16, 1)
    for i in range(count):
        options = windows[i].permute(1, 2, 0, 3, 4).reshape(-1, 3, 16, 16)
        options = torch.cat([options, options.flip(-1)])
        assert (options == moved[i]).flatten(1).all(1).any()


def test_calibration_images_are_training_images():
    train = Split(torch.randint(0, 256, (20, 3, 8, 8), dtype=torch.uint8), torch.zeros(20))
    data = Images(train, train, train, 2, "drawn")
    drawn = data.calibration(5, 3)
    distance = (drawn[:, None] - data.inputs(train.images)[None]).flatten(2).abs().amax(2)
    assert (distance.amin(1) == 0).all()
    assert torch.equal(drawn, data.calibration(5, 3))
