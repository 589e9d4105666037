"""What the small networks' experiments measure."""

import copy
from dataclasses import replace

import torch
from experiment import PAIRS, SCALES, Lab
from harness import Recipe, Trainer
from headline import Probe
from images import Images, Split
from torch import nn
from why import with_own_statistics


def test_a_probe_measures_divergence_agreement_and_distance():
    torch.manual_seed(0)
    a, b = nn.Linear(4, 3), nn.Linear(4, 3)
    x = torch.randn(50, 4)
    probe = Probe((a, b), x)
    own, other = probe(a), probe(b)
    assert (own["agree_a"], own["weights_a"]) == (100.0, 0.0)
    assert abs(own["kl_a"]) < 1e-6 < own["kl_b"]
    logs = [net(x).log_softmax(1) for net in (a, b)]
    divergence = (logs[0].exp() * (logs[0] - logs[1])).sum(1).mean().item()
    torch.testing.assert_close(other["kl_a"], divergence, rtol=1e-4, atol=1e-6)
    same = 100 * (logs[0].argmax(1) == logs[1].argmax(1)).float().mean().item()
    torch.testing.assert_close(other["agree_a"], same)
    doubled = copy.deepcopy(a)
    for weight in doubled.parameters():
        weight.data *= 2
    assert abs(probe(doubled)["weights_a"] - 1) < 1e-6
    assert "weights_a" not in probe(nn.Linear(4, 3, bias=False))


def test_statistics_are_those_of_the_inputs():
    net = nn.Sequential(nn.BatchNorm2d(3))
    net[0].running_mean.fill_(9.0)
    x = 2 + torch.randn(20, 3, 4, 4)
    with_own_statistics(net, x)
    torch.testing.assert_close(net[0].running_mean, x.mean((0, 2, 3)))
    assert not net.training
    assert not net[0].training


def test_the_rate_is_the_one_that_is_best_on_images_held_out(tmp_path):
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(0, 2, (64,), generator=generator)
    images = (60 + 120 * labels[:, None, None, None] + torch.zeros(64, 3, 8, 8)).to(torch.uint8)
    split = Split(images, labels)
    recipe = Recipe(2, 0.0, 16, clip=1.0)
    one = {"vgg": recipe}
    scale = replace(SCALES["cpu"], train=one, tune=one, rates=(0.0, 0.05))
    trainer = Trainer(Images(split, split, split, 2, "drawn"), tmp_path, "cpu")
    assert Lab(PAIRS["vgg8"], scale, 1, trainer).recipe.rate == 0.05
