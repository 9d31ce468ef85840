"""Replay of a stored dataset: load its model again, run some samples alone, and compare."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any, cast

import msgspec
import numpy as np

from tracekit.config import CaptureConfig, DeviceMap, ModelConfig, PromptConfig, RunConfig, check
from tracekit.errors import ModelError
from tracekit.format.layout import Layout
from tracekit.format.manifest import Manifest, Verification, read_manifest
from tracekit.format.shards import sha256_file
from tracekit.model.capture import Text, Trace
from tracekit.model.choices import Choices, ChoiceTrace
from tracekit.model.damage import Damaged, Method
from tracekit.model.models import load_model, load_processor, load_tokenizer, model_info
from tracekit.model.pictures import illustrate, read_picture, with_picture
from tracekit.model.prompts import Prompter
from tracekit.model.proof import Scored, replay, replay_scored
from tracekit.model.traced import TracedModel
from tracekit.model.weights import find_group
from tracekit.read.store import Sample, TraceStore
from tracekit.records import (
    RECORD_TYPES,
    CsqaMcqRecord,
    CsqaRecord,
    DegradationRecord,
    IntrospectionRecord,
    NextTokenRecord,
    Record,
)
from tracekit.sites import resolve_sites

__all__ = ["replay_stored", "scored_of"]


def replay_stored(
    layout: Layout,
    count: int,
    *,
    model: str | None,
    adapter: str | None,
    device: str,
    device_map: DeviceMap = "none",
    max_memory: tuple[str, ...] = (),
    offload_folder: str | None = None,
    model_path: str | None = None,
    image: str | None = None,
) -> Verification:
    """Run `count` samples, spread over the dataset, again, on devices as in ModelConfig. `image` is the picture that
    was shown, if one was.

    Raises:
        ModelError: the model is not the one that made the dataset.
        CaptureError: an error is past the tolerance.
    """
    manifest = read_manifest(layout)
    settings = msgspec.convert(manifest.run["model"], ModelConfig)
    settings = msgspec.structs.replace(
        settings,
        model=model or model_path or settings.model,  # a checkpoint stands for its base where that is not here
        model_path=model_path or settings.model_path,
        adapter=adapter or settings.adapter,
        device=device,
        device_map=device_map,
        max_memory=max_memory,
        offload_folder=offload_folder,
    )
    check(RunConfig(model=settings))
    weights = ("--model", model) if settings.model_path is None else ("--model-path", model_path)
    for flag, given, name, revision in (
        (*weights, manifest.model.id, manifest.model.revision),
        ("--adapter", adapter, manifest.model.adapter or "", (manifest.model.adapter or "").partition("@")[2]),
    ):
        if given is None and revision.startswith("sha256:"):
            raise ModelError(
                f"{layout.config} was made with the local {name!r} ({revision[:23]}); say where it is: {flag} PATH"
            )
    capture_config = msgspec.convert(manifest.run["capture"], CaptureConfig)
    tokenizer = load_tokenizer(settings)
    traced = _loaded(manifest, settings, capture_config, tokenizer)
    show = _shown_again(manifest, settings, tokenizer, image)
    result = Verification.nothing()
    with TraceStore(str(layout.root), config=layout.config) as store:
        for position in sorted({round(i) for i in np.linspace(0, len(store) - 1, count)}):
            result = result.with_more(_replayed(traced, store[position], capture_config, show))
    return result


def _loaded(manifest: Manifest, settings: ModelConfig, capture: CaptureConfig, tokenizer: Any) -> TracedModel:
    """The model of a dataset.

    Raises:
        ModelError: the settings name another one.
    """
    info = model_info(settings, variant=manifest.model.variant)
    if (info.id, info.revision, info.adapter) != (manifest.model.id, manifest.model.revision, manifest.model.adapter):
        raise ModelError(
            f"{manifest.config} was made by {manifest.model.id} at {manifest.model.revision}, adapter "
            f"{manifest.model.adapter}; this is {info.id} at {info.revision}, adapter {info.adapter}. Give the right "
            "one with --model and --adapter"
        )
    has_choices = "choice_offsets" in RECORD_TYPES[manifest.task].__struct_fields__
    loads = "choices" if has_choices else "image_lm" if manifest.run.get("image") else "lm"
    return load_model(settings, info, tokenizer, resolve_sites(capture.sites), loads=loads)


def _replayed(
    traced: TracedModel, sample: Sample, capture: CaptureConfig, show: Callable[[Text, Record], Text]
) -> Verification:
    """One sample, run again."""
    record = sample.record
    if isinstance(record, CsqaMcqRecord):
        options = ChoiceTrace(sample.tensors(), record.tensors, np.array(record.choice_logits, np.float32))
        return replay(traced, record.key, _choices(record), options, capture)
    result = Verification.nothing()
    if scored := scored_of(record):
        result = replay_scored(traced, record.key, record.token_ids[: record.prompt_length], scored)
    is_damaged = isinstance(record, DegradationRecord)
    with _as_it_was(traced, record):
        text = show(_text(record), record)
        return result.with_more(replay(traced, record.key, text, _trace(sample), capture, allow_nonfinite=is_damaged))


def _shown_again(
    manifest: Manifest, settings: ModelConfig, tokenizer: Any, image: str | None
) -> Callable[[Text, Record], Text]:
    """Puts the picture of a run, if it had one, beside the texts of its records.

    Raises:
        ModelError: the picture is not given, or is another one.
    """
    wanted = manifest.run.get("image")
    if wanted is None:
        return lambda text, record: text
    if image is None or not wanted.endswith(sha256_file(Path(image))):
        given = "is another one" if image else "is not given"
        raise ModelError(
            f"{manifest.config} was made with the picture {wanted}, which {given}; say where it is: --image PATH"
        )
    processor, picture = load_processor(settings), read_picture(image)
    prompter = Prompter(tokenizer, msgspec.convert(manifest.run["prompt"], PromptConfig), default_system="")

    def show(text: Text, record: Record) -> Text:
        assert isinstance(record, DegradationRecord), type(record)
        shown = illustrate(processor, prompter, record.prompt_text, picture)
        if shown.prompt.token_ids != record.token_ids[: record.prompt_length]:
            raise ModelError(f"sample {record.key}: the processor makes other tokens of prompt and picture than it did")
        return with_picture(text, shown)

    return show


@contextmanager
def _as_it_was(traced: TracedModel, record: Record) -> Iterator[None]:
    """The model as it made the record: damaged, if it was."""
    if not isinstance(record, DegradationRecord):
        yield
        return
    damage = record.damage
    with Damaged(find_group(traced.model, traced.anatomy, damage.group)) as damaged:
        damaged.apply(cast(Method, damage.method), level=damage.level, seed=damage.seed)
        yield


def _text(record: Record) -> Text:
    """The text of a record, as it was captured."""
    return Text(record.token_ids, record.prompt_length, scored_from=1 if isinstance(record, NextTokenRecord) else None)


def _trace(sample: Sample) -> Trace:
    """What is stored of a text."""
    record, none = sample.record, np.zeros(0)
    names = ("token_logprobs", "token_entropies")
    if isinstance(record, NextTokenRecord):
        names = ("next_true_logprob", "next_entropy")
    logprobs, entropies = (np.array(getattr(record, name, []), np.float64) for name in names)  # null is nan
    predicted = np.array(record.next_pred_id) if isinstance(record, NextTokenRecord) else none
    return Trace(sample.tensors(), record.tensors, logprobs, entropies, predicted, none, none, none, none)


def scored_of(record: Record) -> list[Scored]:
    """The continuations of its prompt that a record has scores of."""
    if isinstance(record, IntrospectionRecord):
        return [Scored("logprobs", *pair) for pair in zip(record.answer_token_ids, record.logprobs, strict=True)]
    if isinstance(record, CsqaRecord):
        letters = zip(record.letter_token_ids, record.letter_logprobs, strict=True)
        texts = zip(record.text_token_ids, record.text_logprobs, strict=True)
        return [Scored("letter_logprobs", *p) for p in letters] + [Scored("text_logprobs", *p) for p in texts]
    return []


def _choices(record: CsqaMcqRecord) -> Choices:
    """The options of a stored question."""
    kinds = record.token_type_ids
    return Choices(
        [
            Text(record.token_ids[a:b], b - a, token_type_ids=None if kinds is None else kinds[a:b])
            for a, b in pairwise(record.choice_offsets)
        ]
    )
