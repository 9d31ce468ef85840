"""Small introspection datasets, one configuration a pass, with records and activations whose truth is known.

questions = [Question(...), ...]
write_passes(tmp_path, questions)                             # mcq, self_confidence, other_confidence
write_passes(tmp_path, questions, noise=Noise(layer=2))       # hidden_states moved from layer 2 on
"""

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import numpy as np

from builders.introspection.record import ConfidenceBin, IntrospectionRecord
from builders.kit.choices import Choice
from tests.datasets_for_tests import D_MODEL, MODEL, NUM_LAYERS, Made, write_dataset
from tests.sample_records import confidence_record, introspection_record
from tracekit.sites import SITES
from tracekit.tensors import TensorSpec

LETTERS = "ABCD"
MIDPOINTS = (2.5, 7.5, 15.0, 30.0, 50.0, 70.0, 85.0, 95.0)
EDGES = (0.0, 5.0, 10.0, 20.0, 40.0, 60.0, 80.0, 90.0, 100.0)
BINS = [
    ConfidenceBin(label="ABCDEFGH"[i], low=EDGES[i], high=EDGES[i + 1], midpoint=MIDPOINTS[i])
    for i in range(len(MIDPOINTS))
]
FIELDS = set(IntrospectionRecord.__struct_fields__)


class Question(NamedTuple):
    """A question and what a model made of it."""

    probs: Sequence[float] = (0.7, 0.1, 0.1, 0.1)
    """Distribution over A to D."""
    right: str = "A"
    parsed: str | None = "A"
    confident: float = 70.0
    """Midpoint of the bin that holds all probability in the confidence passes."""
    subject: str | None = "history"
    answer_tokens: int = 2


class Noise(NamedTuple):
    """What is added to the activations."""

    layer: int
    """Layer of hidden_states from which on they are moved."""
    scale: float = 0.1


def entropy(probs: Sequence[float]) -> float:
    """Entropy in nats."""
    return float(-sum(p * np.log(p) for p in probs if p))


def make_pass(
    number: int,
    question: Question,
    prompt_type: str = "mcq",
    *,
    config: str | None = None,
    noise: Noise | None = None,
    sites: Sequence[str] = ("hidden_states", "resid_embed", "resid_post_mlp"),
    prompt_ids: Sequence[int] = (1, 2, 3, 4, 5),
    kept: Sequence[int] | None = None,
    d_model: int = D_MODEL,
    num_layers: int = NUM_LAYERS,
    **changes: Any,
) -> Made:
    """One sample; the activations of its prompt depend on its number, its pass and `noise` alone."""
    key, length = f"{number:06d}", len(prompt_ids)
    total = length + question.answer_tokens
    span = list(kept) if kept else [0, total]
    seed = int(hashlib.sha256(f"{key} {prompt_type}".encode()).hexdigest()[:8], 16)
    stored: dict[str, np.ndarray] = {}
    specs: list[TensorSpec] = []
    for site in sites:
        rng = np.random.default_rng(seed)
        layers = list(range(num_layers + (site == "hidden_states"))) if "L" in SITES[site].axes else []
        array = rng.normal(size=(max(len(layers), 1), total, d_model)).astype(np.float32)
        if noise is not None:
            moved = rng.normal(size=array.shape).astype(np.float32) * noise.scale
            first = noise.layer - (site == "resid_post_mlp")
            array[first:] += moved[first:] if layers else 0
        array = array[:, span[0] : span[1]]
        stored[site] = array if layers else array[0]
        axes = list(SITES[site].axes)
        specs.append(
            TensorSpec(
                name=site,
                dtype="float32",
                shape=list(stored[site].shape),
                axes=axes,
                layers=layers,
                positions=[span],
                layout="dense",
                num_keys=0,
                choice_offsets=[],
            )
        )
    fields = _fields(number, question, prompt_type, key, length, list(prompt_ids), total)
    fields |= {"tensors": specs, "config": config or prompt_type, "num_layers": num_layers, "model": MODEL}
    make = introspection_record if prompt_type == "mcq" else confidence_record
    record = msgspec.structs.replace(make(), **{**fields, **changes})
    return Made(record, stored, {})  # pyright: ignore[reportArgumentType] - any record is written alike


def _fields(
    number: int, question: Question, prompt_type: str, key: str, length: int, prompt_ids: list[int], total: int
) -> dict[str, Any]:
    """What the record of a sample says."""
    shared: dict[str, Any] = {
        "key": key,
        "question_id": f"q{number}",
        "example_id": f"q{number}",
        "prompt_type": prompt_type,
        "input_sha256": hashlib.sha256(key.encode()).hexdigest(),
        "token_ids": [*prompt_ids, *range(90, 90 + total - length)],
        "tokens": ["t"] * total,
        "token_offsets": [[i, i + 1] for i in range(total)],
        "prompt_length": length,
        "last_prompt_index": length - 1,
        "question_text": f"Which of these is number {number}?",
        "subject": question.subject,
        "options": [Choice(label=letter, text=f"thing {letter.lower()} of {number}") for letter in LETTERS],
        "option_order": [0, 1, 2, 3],
        "correct_answer_letter": question.right,
    }
    if prompt_type != "mcq":
        sure = MIDPOINTS.index(question.confident)
        probs = [float(i == sure) for i in range(len(MIDPOINTS))]
        return shared | {
            "bins": BINS,
            "probs": probs,
            "parsed_answer": BINS[sure].label,
            "pred_letter": BINS[sure].label,
            "output_text": BINS[sure].label,
            "entropy": 0.0,
            "self_confidence": question.confident if prompt_type == "self_confidence" else None,
            "other_confidence": question.confident if prompt_type == "other_confidence" else None,
        }
    best = LETTERS[int(np.argmax(question.probs))]
    return shared | {
        "probs": list(question.probs),
        "entropy": entropy(question.probs),
        "pred_letter": best,
        "is_pred_correct": best == question.right,
        "parsed_answer": question.parsed,
        "parse_failure": None if question.parsed else "no letter in the output",
        "output_text": f"{question.parsed}." if question.parsed else "I cannot say",
        "is_correct": None if question.parsed is None else question.parsed == question.right,
        "answer_token_index": None if question.parsed is None else length,
    }


def write_passes(
    root: Path,
    questions: Sequence[Question],
    passes: Sequence[str] = ("mcq", "self_confidence", "other_confidence"),
    **options: Any,
) -> Path:
    """Write a dataset of these passes; options as `make_pass` has."""
    for prompt_type in passes:
        made = [make_pass(number, one, prompt_type, **options) for number, one in enumerate(questions)]
        write_dataset(root, {"train-00000": made}, config=prompt_type)
    return root
