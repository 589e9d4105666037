"""Files written in one step: the old file or the whole new one."""

import hashlib
import multiprocessing
import os
import signal
import time
from errno import ENOSPC

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from fxfuse._files import sha256_of, write_atomically
from fxfuse.errors import WriteError

FORK = "fork" in multiprocessing.get_all_start_methods()


def test_a_file_is_written_into_a_new_folder_with_the_usual_rights(tmp_path):
    write_atomically(tmp_path / "new" / "a.txt", lambda path: path.write_text("whole"))
    (file,) = (tmp_path / "new").iterdir()
    (tmp_path / "plain").write_text("")
    assert file.name == "a.txt" and file.read_text() == "whole"
    assert file.stat().st_mode == (tmp_path / "plain").stat().st_mode


@pytest.mark.parametrize("error", [OSError(ENOSPC, "No space left"), SafetensorError("No space")])
def test_a_full_disk_leaves_the_old_file_and_nothing_else(tmp_path, error):
    path = tmp_path / "a.txt"
    path.write_text("old")

    def fill(temporary):
        temporary.write_text("half of")
        raise error

    with pytest.raises(WriteError, match="No space") as caught:
        write_atomically(path, fill)
    assert caught.value.where == str(path)
    assert [p.name for p in tmp_path.iterdir()] == ["a.txt"] and path.read_text() == "old"


def test_other_errors_of_the_writing_function_are_passed_on(tmp_path):
    with pytest.raises(ZeroDivisionError):
        write_atomically(tmp_path / "a.txt", lambda path: 1 / 0)
    assert not list(tmp_path.iterdir())


def test_paths_that_cannot_be_files_are_refused(tmp_path):
    (tmp_path / "file").write_text("")
    for path in (tmp_path, tmp_path / "file" / "a.txt", tmp_path / ("x" * 300)):
        with pytest.raises(WriteError):
            write_atomically(path, lambda temporary: temporary.write_text("whole"))
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_a_limit_on_file_sizes_acts_as_a_full_disk(tmp_path):
    resource = pytest.importorskip("resource")
    path, before = tmp_path / "a.safetensors", resource.getrlimit(resource.RLIMIT_FSIZE)
    save_file({"a": torch.ones(2)}, path)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
    try:
        with pytest.raises(WriteError):
            write_atomically(path, lambda temporary: save_file({"a": torch.ones(9999)}, temporary))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert torch.equal(load_file(path)["a"], torch.ones(2)) and len(list(tmp_path.iterdir())) == 1


def _write_again_and_again(path):
    signal.signal(signal.SIGINT, signal.default_int_handler)  # jobs in the background ignore it
    number = 0
    while True:
        number = 1 - number
        tensors = {"a": torch.full((200_000,), float(number))}
        write_atomically(path, lambda temporary, t=tensors: save_file(t, temporary))


@pytest.mark.skipif(not FORK, reason="the processes are forked")
@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_a_process_that_is_stopped_leaves_a_whole_file(tmp_path, how):
    path, context = tmp_path / "a.safetensors", multiprocessing.get_context("fork")
    for wait in (0.0005, 0.001, 0.002, 0.003, 0.005):
        write_atomically(path, lambda temporary: save_file({"a": torch.zeros(8)}, temporary))
        process = context.Process(target=_write_again_and_again, args=(path,))
        process.start()
        while path.stat().st_size < 800_000 and process.is_alive():
            time.sleep(0.0002)  # until it writes
        time.sleep(wait)
        os.kill(process.pid, how)
        process.join(20)
        status = process.exitcode
        process.kill()  # if it is still there
        assert status not in (None, 0)
        numbers = load_file(path)["a"]
        assert len(numbers) == 200_000 and (numbers == numbers[0]).all()
        if how == signal.SIGINT:
            assert [p.name for p in tmp_path.iterdir()] == ["a.safetensors"]


def test_the_hash_of_a_file_is_that_of_its_bytes(tmp_path):
    (tmp_path / "a").write_bytes(b"x" * 3_000_000)
    assert sha256_of(tmp_path / "a") == hashlib.sha256(b"x" * 3_000_000).hexdigest()
