"""Slow and plain versions of what the package computes."""

import numpy as np


def direct_cka(x, y):
    """The textbook formula: |Y'X|^2 / (|X'X| |Y'Y|) of columns without their means."""
    x, y = (t.flatten(1).double().numpy() for t in (x, y))
    x, y = x - x.mean(0), y - y.mean(0)
    norm = np.linalg.norm
    return 1 - norm(y.T @ x) ** 2 / (norm(x.T @ x) * norm(y.T @ y))
