"""Folders of small images."""

import torch
from PIL import Image


def folder(path, classes=("a", "b"), splits=("train", "test"), count=6):
    generator = torch.Generator().manual_seed(0)
    for split in splits:
        for name in classes:
            (path / split / name).mkdir(parents=True)
            for i in range(count):
                pixels = torch.randint(0, 256, (8, 8, 3), generator=generator, dtype=torch.uint8)
                Image.fromarray(pixels.numpy()).save(path / split / name / f"{i}.png")
    return path
