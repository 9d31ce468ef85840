"""What every test has: no network, one thread a worker, and the folder of shared material where there is one."""

import os
from pathlib import Path

# read when the libraries are imported
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import pytest
import torch

torch.set_num_threads(1)

SHARED = Path(__file__).parents[2] / "shared"


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder beside the repository with small real models, tokenizers and data."""
    if not SHARED.is_dir():
        pytest.skip(f"no folder {SHARED}: its models, tokenizers and data are not part of the repository")
    return SHARED
