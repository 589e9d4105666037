"""The demo, at a fraction of its training."""

import pytest
import torch

from fxfuse.cli import demo

pytestmark = pytest.mark.usefixtures("no_network")


def test_the_demo_reports_six_networks_and_draws(tmp_path, monkeypatch):
    monkeypatch.setattr(demo, "EPOCHS", 2)
    monkeypatch.setattr(demo, "TUNING", 1)
    monkeypatch.setattr(demo, "PARENTS", ((2, 8), (1, 6)))
    shares = {}
    result = demo.run_demo(tmp_path / "a.png", 0, shares.__setitem__)
    names = [row[0] for row in result.rows]
    assert len(names) == 6 and names[3] == "fused, no training"
    assert all(0 <= accuracy <= 100 for _, _, accuracy in result.rows)
    assert result.rows[3][1] == result.rows[0][1], "the fused network has the deeper one's size"
    assert result.test_images == 597 and result.picture.stat().st_size > 5000
    assert len(shares) == 5 and set(shares.values()) == {1.0}, "every stage ends"
    twin = demo.DigitNet(2, 8)
    twin.load_state_dict(result.fused.state_dict())


def test_the_split_keeps_test_images_apart():
    images, labels = demo.digits(0)
    assert len(images) == len(labels) == 1797 and demo.TEST + demo.CHOICE < 1797
    assert not torch.equal(demo.digits(1)[1], labels), "the seed does not reach the split"
