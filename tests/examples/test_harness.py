"""What experiments share: resuming, time limits, seeds."""

import math
from dataclasses import replace

import pytest
import torch
from harness import OutOfTime, Recipe, Teacher, Trainer, state_digest
from images import Images, Split
from torch import nn

from fxfuse.errors import ArgumentError, DataError

RECIPE = Recipe(4, 0.05, batch=16)


def split(count, seed):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, 2, (count,), generator=generator)
    images = torch.randint(0, 100, (count, 3, 8, 8), generator=generator)
    return Split((images + 100 * labels[:, None, None, None]).to(torch.uint8), labels)


@pytest.fixture
def trainer(tmp_path):
    data = Images(split(64, 0), split(16, 1), split(32, 2), 2, "drawn")
    return Trainer(data, tmp_path, "cpu")


def net():
    torch.manual_seed(0)
    layers = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(0.2)
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2))


def figures(run):
    return [{k: v for k, v in epoch.items() if k != "seconds"} for epoch in run.epochs]


def test_training_learns_and_leaves_its_start_alone(trainer):
    start = net()
    before = state_digest(start)
    run = trainer.fit("a", start, RECIPE, 0)
    assert state_digest(start) == before
    assert len(run.epochs) == 4
    assert run.after > 90 > run.before


def test_a_run_that_stops_goes_on_as_if_it_had_not(trainer, tmp_path):
    whole = trainer.fit("a", net(), RECIPE, 0)

    def stop(name, done, of):
        if done == 2:
            raise KeyboardInterrupt

    other = replace(trainer, folder=tmp_path / "other", watch=stop)
    with pytest.raises(KeyboardInterrupt):
        other.fit("a", net(), RECIPE, 0)
    run = replace(other, watch=lambda name, done, of: None).fit("a", net(), RECIPE, 0)
    assert figures(run) == figures(whole)
    assert run.before == whole.before
    assert state_digest(run.network) == state_digest(whole.network)


def test_what_else_is_measured_is_kept_beside_the_accuracies(trainer):
    def measure(network):
        assert not network.training
        return {"size": float(network[0].weight.detach().double().square().sum())}

    run = trainer.fit("a", net(), RECIPE, 0, measure=measure)
    assert run.start["size"] == pytest.approx(measure(net().eval())["size"])
    assert run.epochs[-1]["size"] == pytest.approx(measure(run.network)["size"])
    assert run.epochs[-1]["size"] != pytest.approx(run.start["size"])
    again = replace(trainer, deadline=-math.inf).fit("a", net(), RECIPE, 0, measure=measure)
    assert (again.start, again.epochs) == (run.start, run.epochs)
    plain = trainer.fit("a", net(), RECIPE, 0)
    assert state_digest(plain.network) == state_digest(run.network)


def test_without_a_curve_a_run_ends_the_same(trainer):
    whole = trainer.fit("a", net(), RECIPE, 0)
    run = trainer.fit("a", net(), RECIPE, 0, curve=False)
    assert ["test" in epoch for epoch in run.epochs] == [False, False, False, True]
    assert figures(run)[-1] == figures(whole)[-1]
    assert state_digest(run.network) == state_digest(whole.network)


def test_a_finished_run_is_not_done_again(trainer):
    first = trainer.fit("a", net(), RECIPE, 0)
    again = replace(trainer, deadline=-math.inf).fit("a", net(), RECIPE, 0)
    assert again.epochs == first.epochs
    assert state_digest(again.network) == state_digest(first.network)


@pytest.mark.parametrize("change", ["start", "recipe", "seed", "teacher", "temperature", "data"])
def test_what_a_run_depends_on_makes_another_run(change, trainer):
    teacher = Teacher(net().eval(), 4.0, 0.5)
    known = trainer.fingerprint(net(), RECIPE, 0, teacher)
    start, recipe, seed = net(), RECIPE, 0
    if change == "start":
        start[0].weight.data[0, 0, 0, 0] += 1
    elif change == "recipe":
        recipe = replace(RECIPE, rate=0.01)
    elif change == "seed":
        seed = 1
    elif change == "teacher":
        teacher.network[0].weight.data[0, 0, 0, 0] += 1
    elif change == "temperature":
        teacher = replace(teacher, temperature=2.0)
    else:
        data = replace(trainer.data, train=split(64, 5))
        trainer = replace(trainer, data=data)
    assert trainer.fingerprint(start, recipe, seed, teacher) != known


def test_the_deadline_stops_between_epochs(trainer):
    with pytest.raises(OutOfTime):
        replace(trainer, deadline=-math.inf).fit("a", net(), RECIPE, 0)


def test_a_broken_file_is_refused(trainer):
    trainer.fit("a", net(), RECIPE, 0)
    path = next(trainer.folder.glob("*.pt"))
    path.write_bytes(b"not a run")
    with pytest.raises(DataError, match="cannot be read"):
        trainer.fit("a", net(), RECIPE, 0)


def test_a_device_that_is_not_there_is_refused(trainer, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(ArgumentError, match="no CUDA device"):
        replace(trainer, device="cuda")


def test_distillation_with_all_of_its_weight_ignores_labels():
    torch.manual_seed(0)
    teacher, student = net().eval(), net().eval()
    x, labels = torch.randn(5, 3, 8, 8), torch.tensor([0, 1, 0, 1, 0])
    only = Teacher(teacher, 3.0, 1.0)
    assert only.loss(student(x), x, labels).item() == pytest.approx(0.0, abs=1e-6)
    none = Teacher(teacher, 3.0, 0.0)
    expected = nn.functional.cross_entropy(student(x), labels).item()
    assert none.loss(student(x), x, labels).item() == pytest.approx(expected)


def test_rates_of_a_cycle_and_of_cuts():
    cycle = Recipe(10, 1.0)
    rates = [cycle.rate_at(p / 10) for p in range(100)]
    assert max(rates) == pytest.approx(1.0)
    assert rates.index(max(rates)) == 10
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert rates[-1] < 0.001
    cuts = Recipe(6, 1.0, cuts=(2, 4), factor=2)
    assert [cuts.rate_at(p) for p in (0, 2, 3.9, 4)] == [1.0, 0.5, 0.5, 0.25]
