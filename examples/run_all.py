"""Run what a scale has no record of yet, whole tables first; unattended, on one thread.

    python examples/run_all.py --scale cpu --hours 2 [--list] [options of experiment.py]

A record counts if it was made by the scale's recipes as they are now. What is stopped, by the hours
or otherwise, goes on with the same command. A question that fails is named and passed by.
"""

from __future__ import annotations

import argparse
import importlib
import json
import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path

import experiment
import results
import torch
from experiment import PAIRS, SCALES, Question, Scale
from harness import OutOfTime

from fxfuse.errors import FuseError

Step = tuple[str, str, str, int]  # question, pair, scale, seed

#: For one thread: table 1 first, for all of its seeds, then the other tables, most telling first.
SLIM = ("resnet14", "resnet14-plain")
CPU_TABLES = (
    ("why", SLIM),
    ("many", SLIM[1:]),
    ("transfer", SLIM[1:]),
    ("teacher_student", ("vgg8",)),
    ("headline", ("vgg8",)),
    ("distillation", ("vgg8",)),
    ("longer", SLIM),
)


def plan(scale: str, seeds: Sequence[int]) -> Iterator[Step]:
    """Yield every question of a scale, in the order in which they are worth the time."""
    if scale != "cpu":
        for seed in seeds:
            for name in results.QUESTIONS:
                yield from ((name, pair, scale, seed) for pair in question(name).pairs)
        return
    for seed in seeds:
        yield from (("headline", pair, scale, seed) for pair in SLIM)
    for seed in seeds:
        for name, pairs in CPU_TABLES:
            yield from ((name, pair, scale, seed) for pair in pairs)
        yield from (("headline", pair, "cpu-constant", seed) for pair in SLIM)


def question(name: str) -> Question:
    return importlib.import_module(name).QUESTION


def is_recorded(step: Step, folder: Path) -> bool:
    """Tell whether a step has a record that was made by its scale's recipes of today."""
    name, pair, scale, seed = step
    path = folder / experiment.record_name(question(name), pair, scale, seed)
    if not path.is_file():
        return False
    recipes = json.loads(path.read_text())["recipes"]
    return json.dumps(_fixed(recipes, SCALES[scale])) == json.dumps(
        _fixed(_own(pair, SCALES[scale]), SCALES[scale])
    )


def _own(pair: str, scale: Scale) -> dict[str, dict]:
    kind = PAIRS[pair].recipe
    return {"train": asdict(scale.train[kind]), "tune": asdict(scale.tune[kind])}


def _fixed(recipes: dict[str, dict], scale: Scale) -> dict[str, dict]:
    """Return recipes without what is chosen anew."""
    tune = {k: v for k, v in recipes["tune"].items() if k != "rate" or not scale.rates}
    return {"train": recipes["train"], "tune": tune}


def main(arguments: Sequence[str] | None = None) -> None:
    """Run what is missing; exit with 3 if time ran out, with 2 if a question failed."""
    parser = experiment.options(__doc__.split("\n")[0])
    parser.add_argument("--hours", type=float, default=math.inf, help="stop after as many")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--list", action="store_true", help="say what is missing, and run nothing")
    args = parser.parse_args(arguments)
    args.minutes = min(args.minutes, 60 * args.hours)
    torch.set_num_threads(args.threads)
    missing = [step for step in plan(args.scale, args.seeds) if not is_recorded(step, args.results)]
    if args.list:
        print("\n".join(" ".join(map(str, step)) for step in missing))
        return
    sys.exit(_run(missing, args))


def _run(missing: Sequence[Step], args: argparse.Namespace) -> int:
    trainer_of, failed = experiment.trainers(args, lambda name, done, of: None), 0
    for step in missing:
        name, pair, scale, seed = step
        print("run", *step, flush=True)
        asked = argparse.Namespace(**vars(args) | {"scale": scale})
        try:
            experiment.answer(question(name), pair, seed, trainer_of(pair), asked)
        except FuseError as error:
            print(f"error: {error}", file=sys.stderr)
            failed = 2
            continue
        except OutOfTime:
            print("out of time; the same command goes on", file=sys.stderr)
            return 3
        experiment.show(question(name), args.results)
    return failed


if __name__ == "__main__":
    main()
