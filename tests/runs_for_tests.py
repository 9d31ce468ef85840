"""Running the TriviaQA builder on a tiny checkpoint, from code."""

import hashlib
import json
from pathlib import Path
from typing import Any

import msgspec

from builders.kit.columns import QuestionSource
from builders.trivia_qa.task import TASK as TRIVIA_QA
from builders.trivia_qa.task import TriviaQAConfig
from tracekit.config import CaptureConfig, ModelConfig, OutputConfig, SamplesConfig
from tracekit.run.runner import Ended, execute


def trivia_config(checkpoint: Path, /, **changes: Any) -> TriviaQAConfig:
    """A small, fast configuration, with changes: `generation={"num_beams": 2}`, `correctness="alias_in_answer"`."""
    small = TriviaQAConfig(
        model=ModelConfig(model=str(checkpoint), device="cpu"),
        source=QuestionSource(source="sample", limit=12),
        generation=SamplesConfig(num_beams=1, max_new_tokens=6),
        capture=CaptureConfig(num_replays=1),
        output=OutputConfig(samples_per_shard=5, batch_size=2),
    )
    changed = {
        name: msgspec.structs.replace(getattr(small, name), **change) if isinstance(change, dict) else change
        for name, change in changes.items()
    }
    return msgspec.structs.replace(small, **changed)


def run_trivia(out: Path, checkpoint: Path, /, **changes: Any) -> Ended:
    """Run the builder into a folder."""
    return execute(TRIVIA_QA, trivia_config(checkpoint, **changes), out)


def hashes(folder: Path) -> dict[str, str]:
    """SHA-256 of every file of a dataset, logs left out."""
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.relative_to(folder).parts[0] != "logs"
    }


def log_lines(folder: Path, config: str = "trivia_qa") -> list[dict[str, Any]]:
    """The run log: one entry a computed batch."""
    path = folder / "logs" / f"{config}.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
