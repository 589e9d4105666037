"""Federated clients with data of their own: one server round, by several ways to aggregate.

Each of K clients trains on its part of scikit-learn's digits; of each class, the parts are drawn
from a Dirichlet distribution, so that clients know some digits well and others not at all. *Alike*:
all clients start from one network, as in federated averaging. *Unlike*: networks of three depths
and widths, each from a start of its own. The server fuses once, by sample counts, with 200
unlabelled images; nothing is chosen on the test images.

    python examples/federated.py [FOLDER] [--seeds 3] [--clients 5 16]
"""

from __future__ import annotations

import argparse
import copy
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from records import write_record
from torch import Tensor, nn

from fxfuse.cli.demo import TEST, digits, percent_right, train
from fxfuse.errors import FusionWarning
from fxfuse.fusion.federated import Aggregation, arrays_of

SAMPLES, EVENNESS, EPOCHS = 200, 0.3, 20
KINDS = ((32, 32), (48, 24), (24, 24, 24))  # widths of the hidden layers


def mlp(*widths: int) -> nn.Module:
    parts: list[nn.Module] = [nn.Flatten()]
    for inner, outer in zip((64, *widths), widths):
        parts += [nn.Linear(inner, outer), nn.ReLU()]
    return nn.Sequential(*parts, nn.Linear(widths[-1], 10))


def parts(labels: Tensor, clients: int, seed: int) -> list[Tensor]:
    """Return the images of each client; of each class, shares are drawn at random."""
    rng = np.random.default_rng(seed)
    owners = np.empty(len(labels), dtype=int)
    for label in range(10):
        at = rng.permutation(np.flatnonzero(labels.numpy() == label))
        shares = rng.dirichlet(np.full(clients, EVENNESS)).cumsum()[:-1]
        for client, chosen in enumerate(np.split(at, (shares * len(at)).astype(int))):
            owners[chosen] = client
    found = [torch.from_numpy(np.flatnonzero(owners == k)) for k in range(clients)]
    return [own for own in found if len(own) >= 10]  # fewer are no data to train on


def clients_of(
    alike: bool, owned: Sequence[Tensor], x: Tensor, y: Tensor, seed: int
) -> list[nn.Module]:
    """Train a network on the images of each client."""
    torch.manual_seed(seed)
    start, nets = mlp(*KINDS[0]), []
    for k, own in enumerate(owned):
        torch.manual_seed(1000 * seed + k)
        net = copy.deepcopy(start) if alike else mlp(*KINDS[k % len(KINDS)])
        nets.append(train(net, x[own], y[own], EPOCHS))
    return nets


def rows(alike: bool, clients: int, seed: int) -> list[dict[str, Any]]:
    """Return the accuracies of clients, of their ensembles, and of what servers make of them."""
    images, labels = digits(seed)
    x, y, data = images[TEST + SAMPLES :], labels[TEST + SAMPLES :], images[TEST:][:SAMPLES]
    test = images[:TEST], labels[:TEST]
    owned = parts(y, clients, seed)
    nets, counts = clients_of(alike, owned, x, y, seed), [len(own) for own in owned]
    with torch.no_grad():
        outputs = torch.stack([net(test[0]) for net in nets])
    alone = [percent_right(out, test[1]) for out in outputs]
    share = torch.tensor(counts) / sum(counts)
    weighed = (share[:, None, None] * outputs.softmax(2)).sum(0)
    found = [
        {"name": "client, mean", "accuracy": round(sum(alone) / len(alone), 2)},
        {"name": "client, best", "accuracy": round(max(alone), 2)},
        {"name": "ensemble", "accuracy": round(percent_right(weighed, test[1]), 2)},
    ]
    sent = [(arrays_of(net), count) for net, count in zip(nets, counts)]
    for name in ("average", "fedma", "best") if alike else ("fedma", "best"):
        start = time.perf_counter()
        fused = Aggregation(nets, data, method=name).fused(sent)
        row: dict[str, Any] = {"name": "average (FedAvg)" if name == "average" else name}
        with torch.no_grad():
            row["accuracy"] = round(percent_right(fused(test[0]), test[1]), 2)
        row["parameters"] = sum(p.numel() for p in fused.parameters())
        found.append(row | {"seconds": round(time.perf_counter() - start, 1)})
    return found


def write(folder: Path, clients: int, alike: bool, seed: int, tell: Callable[[str], None]) -> None:
    """Measure one setting, and write its record."""
    name = f"federated-{'alike' if alike else 'unlike'}-{clients}"
    found, facts = rows(alike, clients, seed), {"test_images": TEST, "samples": SAMPLES}
    write_record(folder / f"{name}-seed{seed}.json", name, found, seed=seed, **facts)
    for row in found:
        tell(f"{name}  seed {seed}  " + "  ".join(f"{k} {v}" for k, v in row.items()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    results = Path(__file__).parent / "results"
    parser.add_argument("folder", type=Path, nargs="?", default=results)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--clients", type=int, nargs="+", default=[5, 16])
    args = parser.parse_args()
    warnings.simplefilter("ignore", FusionWarning)
    torch.set_num_threads(1)
    for seed in range(args.seeds):
        for clients in args.clients:
            for alike in (True, False):
                write(args.folder, clients, alike, seed, lambda line: print(line, flush=True))


if __name__ == "__main__":
    main()
