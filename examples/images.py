"""Labelled images in memory, as bytes: read from folders or torchvision's files, crops and flips.

A source is `folder:PATH` with `train/CLASS/*` and `test/CLASS/*` (or `val/`), `cifar10:PATH` or
`cifar100:PATH` with the files that torchvision reads. Nothing is downloaded.
"""

from __future__ import annotations

import hashlib
import tarfile
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path

import torch
import torch.nn.functional as F
from networks import SHARED
from torch import Tensor
from torchvision import datasets
from torchvision.transforms import v2

from fxfuse.errors import DataError


@dataclass(frozen=True, eq=False)
class Split:
    """Images `(n, c, h, w)` as bytes with their labels `(n,)`."""

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def part(self, rows: Tensor) -> Split:
        return Split(self.images[rows], self.labels[rows])


@dataclass(frozen=True, eq=False)
class Images:
    """Images to train on, to choose settings on, and to report on; normalised by the first's mean.

    Attributes:
        train: What networks are trained on and fused with.
        valid: Training images that no network sees; what is chosen is chosen on them.
        test: What is reported.
        classes: Number of labels.
        source: Where they come from.
    """

    train: Split
    valid: Split
    test: Split
    classes: int
    source: str

    @property
    def size(self) -> int:
        return self.train.images.shape[-1]

    def inputs(self, images: Tensor) -> Tensor:
        """Return bytes `(n, c, h, w)` as network inputs: mean 0 and deviation 1 per channel."""
        mean, deviation = (t.to(images.device) for t in self._moments)
        return (images.float() - mean) / deviation

    @cached_property
    def _moments(self) -> tuple[Tensor, Tensor]:
        """Mean and deviation `(c, 1, 1)` of the first training images."""
        channels = self.train.images[:2000].float().flatten(2)
        return channels.mean((0, 2))[:, None, None], channels.std((0, 2))[:, None, None]

    def calibration(self, count: int, seed: int) -> Tensor:
        """Draw training images as they are, without labels: `(count, c, h, w)`."""
        generator = torch.Generator().manual_seed(seed)
        rows = torch.randperm(len(self.train), generator=generator)[:count]
        return self.inputs(self.train.images[rows])

    def described(self) -> dict:
        """Return what a record says of the data, with a digest of all bytes."""
        digest = hashlib.sha256()
        for split in (self.train, self.valid, self.test):
            digest.update(split.images.numpy().tobytes() + split.labels.numpy().tobytes())
        counts = {name: len(getattr(self, name)) for name in ("train", "valid", "test")}
        facts = {"source": self.source, "size": self.size, "classes": self.classes}
        return facts | counts | {"sha256": digest.hexdigest()}


def augmented(images: Tensor, generator: torch.Generator) -> Tensor:
    """Return images `(n, c, h, w)`, each moved by up to an eighth of its size, half mirrored."""
    n, _, height, width = images.shape
    pad = height // 8
    shifts = torch.randint(0, 2 * pad + 1, (2, n), generator=generator)
    mirrored = torch.rand(n, generator=generator) < 0.5
    rows = torch.arange(height) + shifts[0][:, None]
    columns = torch.arange(width) + shifts[1][:, None]
    columns = torch.where(mirrored[:, None], columns.flip(1), columns)
    padded = F.pad(images, [pad] * 4)
    device = images.device
    at = torch.arange(n)[:, None, None], rows[:, :, None], columns[:, None, :]
    # The channel axis ends last when indices stand on both of its sides.
    moved = padded[at[0].to(device), :, at[1].to(device), at[2].to(device)]
    return moved.permute(0, 3, 1, 2).contiguous()


# --- sources ----------------------------------------------------------------------------------


def load(
    source: str | None, size: int, cache: Path, counts: tuple[int, int, int], area: bool = False
) -> Images:
    """Read images, resized if their size is another.

    Args:
        source: See above; the images of ../shared, unpacked into the cache, if not given.
        size: Height and width.
        cache: A folder for what is unpacked.
        counts: How many to train on, to choose on and to test on, drawn with seed 0; fewer where
            there are fewer, all (but those to choose on) for a count of 0.
        area: Make images smaller by the means of the areas that become a pixel, not by a filter
            that reaches over their edges.

    Raises:
        DataError: If there is nothing of that kind.
    """
    source = source or f"folder:{_shared(cache)}"
    kind, _, path = source.partition(":")
    if kind == "folder":
        train, test = _folders(Path(path).expanduser())
    elif kind in ("cifar10", "cifar100"):
        train, test = _cifar(kind, Path(path).expanduser())
    else:
        raise _nothing(source, "folder:PATH, cifar10:PATH or cifar100:PATH")
    drawn = torch.randperm(len(train), generator=torch.Generator().manual_seed(0))
    chosen, rest = drawn[: counts[1]], drawn[counts[1] :]
    if not len(rest):
        raise _nothing(f"{len(train)} training images", f"more than {counts[1]} to choose on")
    rows = torch.randperm(len(test), generator=torch.Generator().manual_seed(0))
    return Images(
        _read(train, rest[: counts[0] or None], size, area),
        _read(train, chosen, size, area),
        _read(test, rows[: counts[2] or None], size, area),
        len(train.classes),
        kind if "shared" not in source else "the JPEG copy of CIFAR-10",
    )


def _shared(cache: Path) -> Path:
    folder = cache / "cifar10-jpeg-shared"
    for split in ("train", "test"):
        archive = SHARED / f"data/cifar10-jpeg-{split}.tar.gz"
        if not (folder / split).is_dir():
            if not archive.is_file():
                raise _nothing(str(archive), "images: give --data folder:PATH or cifar10:PATH")
            with tarfile.open(archive) as packed:
                packed.extractall(folder, filter="data")
    return folder


def _folders(path: Path) -> list[datasets.VisionDataset]:
    tests = [path / name for name in ("test", "val") if (path / name).is_dir()]
    if not (path / "train").is_dir() or not tests:
        raise _nothing(str(path), "a folder with train/CLASS/* and test/CLASS/* (or val/)")
    found = []
    for folder in (path / "train", tests[0]):
        try:
            found.append(datasets.ImageFolder(str(folder)))
        except FileNotFoundError as error:
            raise _nothing(f"{folder}: {error}", "folders of classes with images in them") from None
    if found[0].classes != found[1].classes:
        raise _nothing(str(path), "the same classes in both folders")
    return found


def _cifar(kind: str, path: Path) -> list[datasets.VisionDataset]:
    dataset = {"cifar10": datasets.CIFAR10, "cifar100": datasets.CIFAR100}[kind]
    try:
        return [dataset(str(path), train=part) for part in (True, False)]
    except RuntimeError as error:
        raise _nothing(
            f"{path}: {error}", f"the files of {kind} as torchvision reads them"
        ) from None


def _read(dataset: datasets.VisionDataset, rows: Tensor, size: int, area: bool) -> Split:
    """Return some images as bytes; a size that is smaller than theirs averages pixels."""
    fit = v2.Compose(
        [v2.ToImage(), partial(_averaged, size=size) if area else v2.Resize([size] * 2)]
    )
    pairs = [dataset[row] for row in rows.tolist()]
    images = torch.stack([fit(image.convert("RGB")) for image, _ in pairs])
    return Split(images.as_subclass(Tensor), torch.tensor([label for _, label in pairs]))


def _averaged(image: Tensor, size: int) -> Tensor:
    """Return an image `(c, h, w)` of bytes whose pixels are the means of equal areas."""
    means = F.adaptive_avg_pool2d(image.as_subclass(Tensor).float(), size)
    return means.round().to(torch.uint8)


def _nothing(met: str, expected: str) -> DataError:
    return DataError(met, where="the images", expected=expected, do="see --help")
