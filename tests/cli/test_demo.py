"""The demo, at a fraction of its training."""

import pytest
import torch

from fxfuse.cli import demo

pytestmark = pytest.mark.usefixtures("no_network")


def test_the_demo_reports_six_networks_and_draws(tmp_path, monkeypatch):
    monkeypatch.setattr(demo, "EPOCHS", 2)
    monkeypatch.setattr(demo, "TUNING", 1)
    monkeypatch.setattr(demo, "PARENTS", ((2, 8), (1, 6)))
    seen = []
    result = demo.run_demo(tmp_path / "a.png", 0, lambda *step: seen.append(step))
    names = [row[0] for row in result.rows]
    assert len(names) == 6 and names[3] == "fused, no training"
    assert all(0 <= accuracy <= 100 for _, _, accuracy in result.rows)
    assert result.rows[3][1] == result.rows[0][1], "the fused network has the deeper one's size"
    assert result.test_images == 597 and result.picture.stat().st_size > 5000
    assert seen[-1][1] == seen[-1][2]
    twin = demo.DigitNet(2, 8)
    twin.load_state_dict(result.fused.state_dict())


def test_the_split_keeps_test_images_apart():
    images, labels = demo._digits(0)
    parts = images.flatten(1).split([demo.TEST, demo.CHOICE, 1797 - demo.TEST - demo.CHOICE])
    assert len(images) == len(labels) == 1797 and len(parts[0]) == 597
    assert not torch.equal(demo._digits(1)[1], labels)
