"""What every test shares: checks on, seeds fixed, few threads."""

import socket
import sys

import pytest
import torch
from hypothesis import HealthCheck, settings

import fxfuse
from fxfuse.cli import commands

settings.register_profile(
    "fxfuse",
    deadline=None,
    max_examples=8,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
settings.load_profile("fxfuse")


@pytest.fixture(autouse=True)
def checks_are_on():
    with fxfuse.debug(2):
        yield


@pytest.fixture(autouse=True)
def seeded_and_single_threaded():
    threads = torch.get_num_threads()
    torch.manual_seed(0)
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def no_network(monkeypatch):
    """Refuse every connection and every name that is looked up."""

    def refuse(*args, **kwargs):
        raise AssertionError(f"the network is asked for: {args[-1]}")

    for name in ("connect", "connect_ex"):
        monkeypatch.setattr(socket.socket, name, refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


@pytest.fixture
def call(monkeypatch, capsys):
    """Call the command line: arguments in; status, output and errors out."""

    def called(*arguments):
        monkeypatch.setattr(sys, "argv", ["fxfuse", *arguments])
        with pytest.raises(SystemExit) as stopped:
            commands.main()
        shown = capsys.readouterr()
        return stopped.value.code or 0, shown.out, shown.err

    return called
