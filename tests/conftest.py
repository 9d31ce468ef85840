"""What every test has: no network, one thread a worker, and the folder of shared material where there is one."""

import importlib.util
import itertools
import os
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

# read when the libraries are imported
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import pytest
import torch

from tests.hub_for_tests import TestHub
from tests.runs_for_tests import run_trivia
from tests.tiny_checkpoint import save_tiny_checkpoint

torch.set_num_threads(1)
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell ignores it for what it starts behind it

SHARED = Path(__file__).parents[2] / "shared"


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder beside the repository with small real models, tokenizers and data."""
    if not SHARED.is_dir():
        pytest.skip(f"no folder {SHARED}: its models, tokenizers and data are not part of the repository")
    return SHARED


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a tiny random checkpoint without chat template."""
    return save_tiny_checkpoint(tmp_path_factory.mktemp("checkpoint") / "tiny")


@pytest.fixture(scope="session")
def finished(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a finished TriviaQA run of that checkpoint: 12 questions in 3 shards. Not to be changed."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    run_trivia(folder, model)
    return folder


@pytest.fixture(params=["xet", "lfs"])
def hub(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[TestHub]:
    """An empty Hub, once for each way in which clients upload. A request it does not know fails the test."""
    running = TestHub(tmp_path_factory.mktemp("hub"), mode=request.param)
    yield running
    running.close()


@pytest.fixture
def xet_hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TestHub]:
    """An empty Hub whose clients upload as they do by default."""
    running = TestHub(tmp_path_factory.mktemp("hub"), mode="xet")
    yield running
    running.close()


@pytest.fixture
def imported(monkeypatch: pytest.MonkeyPatch) -> Callable[[Path], Any]:
    """Imports the script of a folder: each time anew, always as a module named `load_traces`, as users have it."""
    numbers = itertools.count()

    def import_script(folder: Path) -> Any:
        name = f"imported{next(numbers)}.load_traces"  # datasets looks at the last part alone
        spec = importlib.util.spec_from_file_location(name, folder / "load_traces.py")
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, name, module)
        spec.loader.exec_module(module)
        return module.LoadTraces

    return import_script
