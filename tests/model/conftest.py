"""The command line on the small model, in a folder of the test's own."""

import pytest
import torch
from echo_infinity import cli
from small import save_small


@pytest.fixture(scope="session")
def small_folder(tmp_path_factory):
    return str(save_small(tmp_path_factory.mktemp("models") / "small"))


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A working folder of the test's own; the threads are afterwards as they were."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "home").mkdir()
    threads = torch.get_num_threads()
    yield tmp_path
    torch.set_num_threads(threads)


@pytest.fixture
def echo(small_folder, folder, capsys):
    """Run ``echo-infinity generate`` with these words on the small model: (exit code, stdout, stderr)."""

    def run(*words):
        capsys.readouterr()
        resumed = "--resume" in words
        code = cli.main(["generate", *map(str, words), *([] if resumed else ["--model", small_folder])])
        return code, *capsys.readouterr()

    return run
