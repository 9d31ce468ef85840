"""Makes the folder of today's schema in tests/data: python tests/make_released_data.py FOLDER

One small dataset of every task, all of tiny random models. Run it once, when a schema is released, and commit what it
writes; it is never written again.
"""

import json
import os
import sys
import tempfile
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"

import pytest
import torch
from transformers import BertConfig, BertModel

from tests.judges_for_tests import FakeClient, install
from tests.serving_for_tests import ask, serving
from tests.tasks_for_tests import TASKS
from tests.test_csqa_mcq import tokenizer_for
from tests.test_wiki_qa import writer
from tests.tiny_checkpoint import save_tiny_checkpoint
from tracekit.cli import run_task

THREE = [
    {"question": "Capital of France?", "answers": ["Paris"]},
    {"question": "Who wrote Hamlet?", "answers": ["Shakespeare"]},
    {"question": "2 + 2?", "answers": ["4"]},
]
LITTLE = ["--sites", "hidden_states", "--layers", "1", "--tokens", "last", "--num-replays", "1", "--limit", "1"]
SHORT = ["--max-new-tokens", "4"]


def main(out: Path) -> None:
    """Write every dataset into one folder."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)  # local files are written down by their names
        save_tiny_checkpoint(Path("tiny"), chat=True)
        _save_encoder(Path("encoder"))
        Path("three.jsonl").write_text("".join(json.dumps(one) + "\n" for one in THREE))
        _run(
            "trivia_qa",
            out,
            "--source",
            "three.jsonl",
            "--sites",
            "hidden",
            "attn",
            "topk",
            *SHORT,
            "--samples-per-shard",
            "2",
        )
        small = ["--dataset-config", "small", "--tokens", "answer", "--store-dtype", "int8", "--attention-top-p", "0.9"]
        _run(
            "trivia_qa",
            out,
            "--source",
            "three.jsonl",
            "--sites",
            "hidden",
            "attn",
            *SHORT,
            *small,
            "--samples-per-shard",
            "2",
        )
        for task in ("csqa", "replay"):
            _run(task, out, "--source", "sample", *LITTLE)
        _run("csqa_mcq", out, "--source", "sample", *LITTLE[:4], *LITTLE[6:], model="encoder")
        _run("next_token", out, "--source", "sample:ud_ewt", *LITTLE)
        _run("introspection", out, "--source", "sample", "--passes", "mcq", *LITTLE, *SHORT)
        damage = ["--groups", "mlp", "--levels", "0", "0.5", "--no-do-sample", "--samples-per-shard", "2"]
        _run("degradation", out, "--source", "iq", *damage, *LITTLE, *SHORT)
        _run("nonsense_entities", out, "--num-names", "1", "--num-wordings", "1", *LITTLE, *SHORT)
        with pytest.MonkeyPatch.context() as patch:
            install(patch, FakeClient(writer, name="org/writer@abc"), where="builders.wiki_qa.stages")
            asked = ["--min-section-tokens", "100", "--max-section-tokens", "4000", "--num-questions", "1"]
            _run("wiki_qa", out, "--source", "sample", *asked, *LITTLE, *SHORT)
        with serving(out, Path("tiny")) as server:
            ask(server.url)


def _run(task: str, out: Path, *flags: str, model: str = "tiny") -> None:
    arguments = ["--model", model, "--device", "cpu", "--out", str(out), "--batch-size", "2", *flags]
    try:
        run_task(TASKS[task], arguments)
    except SystemExit as ended:
        if ended.code:
            raise


def _save_encoder(folder: Path) -> None:
    tokenizer = tokenizer_for([json.dumps(one) for one in THREE])
    torch.manual_seed(0)
    config = BertConfig(vocab_size=len(tokenizer), hidden_size=32, num_hidden_layers=2, num_attention_heads=4)
    BertModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


if __name__ == "__main__":
    main(Path(sys.argv[1]).absolute())
