"""Makes the folder of today's schema in tests/data: python tests/make_released_data.py FOLDER

One small dataset a kind of record, all of tiny random models. Run it once, when a schema is released, and commit what
it writes; that is never written again.
"""

import json
import os
import shutil
import sys
import tempfile
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"

import pytest
import torch
from transformers import BertConfig, BertModel

from tests.serving_for_tests import ask, serving
from tests.tasks_for_tests import TASKS
from tests.test_csqa_mcq import tokenizer_for
from tests.tiny_checkpoint import save_tiny_checkpoint
from tracekit.cli import run_task

THREE = [
    {"question": "Capital of France?", "answers": ["Paris"]},
    {"question": "Who wrote Hamlet?", "answers": ["Shakespeare"]},
    {"question": "2 + 2?", "answers": ["4"]},
]
ONE = ["--sites", "hidden_states", "--layers", "1", "--num-replays", "1", "--limit", "1"]
LAST = ["--tokens", "last"]
SHORT = ["--max-new-tokens", "4"]


def main(out: Path) -> None:
    """Write every dataset into one folder."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)  # local files are written down by their names
        save_tiny_checkpoint(Path("tiny"), chat=True)
        _save_encoder(Path("encoder"))
        Path("three.jsonl").write_text("".join(json.dumps(one) + "\n" for one in THREE))
        three = ["--source", "three.jsonl", "--tokens", "answer", "--samples-per-shard", "2", *SHORT]
        _run("trivia_qa", out, *three, "--sites", "hidden", "attn", "topk")
        small = ["--dataset-config", "small", "--store-dtype", "int8", "--attention-top-p", "0.9", "--limit", "2"]
        _run("trivia_qa", out, *three, *small, "--sites", "hidden", "attn")
        _run("csqa_mcq", out, "--source", "sample", *ONE, model="encoder")
        _run("next_token", out, "--source", "sample:ud_ewt", *ONE, *LAST)
        _run("introspection", out, "--source", "sample", "--passes", "mcq", *ONE, *LAST, *SHORT)
        damage = ["--groups", "mlp", "--levels", "0", "0.5", "--no-do-sample", "--samples-per-shard", "2"]
        _run("degradation", out, "--source", "iq", *damage, *ONE, *LAST, *SHORT)
        _run("nonsense_entities", out, "--num-names", "1", "--num-wordings", "1", *ONE, *LAST, *SHORT)
        with serving(out, Path("tiny")) as server:
            ask(server.url)
    for folder in ("logs", "output"):  # not part of the dataset
        shutil.rmtree(out / folder)


def _run(task: str, out: Path, *flags: str, model: str = "tiny") -> None:
    arguments = ["--model", model, "--device", "cpu", "--out", str(out), "--batch-size", "2", *flags]
    with pytest.raises(SystemExit) as ended:
        run_task(TASKS[task], arguments)
    assert not ended.value.code, (task, ended.value.code)


def _save_encoder(folder: Path) -> None:
    tokenizer = tokenizer_for([json.dumps(one) for one in THREE])
    torch.manual_seed(0)
    config = BertConfig(vocab_size=len(tokenizer), hidden_size=32, num_hidden_layers=2, num_attention_heads=4)
    BertModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


if __name__ == "__main__":
    main(Path(sys.argv[1]).absolute())
