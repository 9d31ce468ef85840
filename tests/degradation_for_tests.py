"""Small degradation datasets: answers of a model that was damaged to a level, with activations."""

import hashlib
from typing import Any

import msgspec

from tests.datasets_for_tests import Made, make_sample
from tests.sample_records import degradation_record
from tracekit.records import Record


def make_damaged(prompt: str, *, group: str = "mlp", level: float = 0.0, repeat: int = 0, **changes: Any) -> Made:
    """An answer to a prompt, with the key that the builder gives it."""
    key = f"{group}_{level:g}_{repeat:03d}_{prompt}".replace(".", "p")
    made = make_sample(key, sites=("hidden_states",), question_id=prompt)
    shared = {name: getattr(made.record, name) for name in Record.__struct_fields__}
    shared |= {"config": "degradation", "input_sha256": hashlib.sha256(prompt.encode()).hexdigest()}
    damage = msgspec.structs.replace(degradation_record().damage, group=group, level=level, seed=repeat)
    record = degradation_record(**(shared | {"damage": damage, "repeat": repeat, "prompt_text": prompt} | changes))
    return made._replace(record=record)  # pyright: ignore[reportArgumentType] - any record is written alike
