"""Replay of a stored dataset: load its model again, run some samples alone, and compare."""

import re
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from types import MappingProxyType
from typing import Any, Generic, NamedTuple, TypeVar

import msgspec
import numpy as np

from tracekit.config import AnswerCaptureConfig, CaptureConfig, DeviceMap, ModelConfig, RunConfig, check
from tracekit.errors import DatasetError, ModelError
from tracekit.format.layout import Layout
from tracekit.format.manifest import Manifest, Verification, read_manifest
from tracekit.model.capture import NextTokens, Text, Trace
from tracekit.model.choices import Choices, ChoiceTrace
from tracekit.model.models import load_model, load_tokenizer, model_info
from tracekit.model.proof import Scored, replay, replay_scored
from tracekit.model.references import resolve
from tracekit.model.traced import Loads, TracedModel
from tracekit.read.store import Sample, TraceStore
from tracekit.records import ModelInfo, Record, ResponseRecord
from tracekit.sites import resolve_sites
from tracekit.task import the_task

__all__ = ["Replay", "Shown", "replay_stored", "stored_part"]

PartT = TypeVar("PartT", bound=msgspec.Struct)
RecordT = TypeVar("RecordT", bound=Record)

_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*(@[\w][\w./-]*)?", re.ASCII)
_COMMIT = re.compile(r"[0-9a-f]{40}")


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
    files: Mapping[str, str] = MappingProxyType({}),
    trust_remote_code: bool = False,
) -> Verification:
    """Run `count` samples, spread over the dataset, again, on devices as in ModelConfig.

    The dataset says which model made it, and grants nothing: what lies in a file is named here, code runs only where
    it is allowed here, and the model is compared with the manifest before anything of it is loaded. `files` are
    those that the run was made with and its task needs again, by their flags, as `--image`.

    Raises:
        ModelError: the model is not the one that made the dataset, lies in the dataset, or has to be named.
        DatasetError: the manifest holds no configuration of a model, or its task is not installed.
        CaptureError: an error is past the tolerance.
    """
    manifest = read_manifest(layout)
    task = the_task(manifest.task, where=layout.manifest, to_do="--replay")
    again: Replay[Any] = Replay() if task.replay is None else task.call("replay")
    settings = msgspec.structs.replace(
        stored_part(manifest, "model", ModelConfig),
        device=device,
        device_map=device_map,
        max_memory=max_memory,
        offload_folder=offload_folder,
        trust_remote_code=trust_remote_code,
    )
    settings = _with_names(manifest, settings, layout.root, model=model, model_path=model_path, adapter=adapter)
    check(RunConfig(model=settings))
    info = _identified(manifest, settings)
    capture_config = stored_part(manifest, "capture", AnswerCaptureConfig)
    tokenizer = load_tokenizer(settings)
    again.begin(Shown(manifest, settings, tokenizer, files))
    traced = load_model(settings, info, tokenizer, resolve_sites(capture_config.sites), loads=again.loads)
    result = Verification.nothing()
    with TraceStore(str(layout.root), config=layout.config) as store:
        for position in sorted({round(i) for i in np.linspace(0, len(store) - 1, count)}):
            result = result.with_more(_replayed(traced, store[position], capture_config, again))
    return result


class Shown(NamedTuple):
    """What there is beside a stored sample when it is run again."""

    manifest: Manifest
    settings: ModelConfig
    tokenizer: Any
    files: Mapping[str, str]
    """Files that the run was made with, by their flags."""


class Replay(Generic[RecordT]):
    """How a task's stored samples are run again: by their token ids. A task for which that is not enough inherits
    from it."""

    loads: Loads = "lm"
    """As what the model is loaded."""

    def begin(self, shown: Shown) -> None:
        """Get ready, before the model is loaded."""

    def text(self, record: RecordT) -> Text | Choices:
        """The text of a record, as it was captured."""
        return Text(record.token_ids, record.prompt_length)

    def trace(self, sample: Sample, record: RecordT) -> Trace | ChoiceTrace:
        """What is stored of it."""
        if isinstance(record, ResponseRecord):
            numbers = [np.array(values, np.float64) for values in (record.token_logprobs, record.token_entropies)]
            return Trace(sample.tensors(), record.tensors, NextTokens(*numbers))  # null is nan
        return Trace(sample.tensors(), record.tensors)

    def scored(self, record: RecordT) -> list[Scored]:
        """The continuations of its prompt that it has scores of."""
        return []

    def as_it_was(self, traced: TracedModel, record: RecordT) -> AbstractContextManager[object]:
        """The model as it made the record."""
        return nullcontext()


def stored_part(manifest: Manifest, name: str, part: type[PartT]) -> PartT:
    """A part of the configuration that a manifest holds.

    Raises:
        DatasetError: it holds none.
    """
    try:
        return msgspec.convert(manifest.run.get(name), part)
    except msgspec.ValidationError as error:
        raise DatasetError(
            f"manifest of {manifest.config!r}: no `{name}` in its `run` to replay with: {error}"
        ) from error


def _with_names(
    manifest: Manifest,
    settings: ModelConfig,
    root: Path,
    *,
    model: str | None,
    model_path: str | None,
    adapter: str | None,
) -> ModelConfig:
    """Settings with the model that was given, or the one of the manifest where that is `demo` or on the Hub.

    A model on the Hub is taken at the commit that made the dataset.

    Raises:
        ModelError: a model lies in the dataset, the manifest names a file, or code would run of an unnamed model.
    """
    made = manifest.model
    if settings.trust_remote_code and (model_path or model) is None:
        raise ModelError(
            f"--trust-remote-code: name the model too, with --model. The dataset says that {made.id!r} made it, but "
            "does not choose whose code runs here"
        )
    names = {  # a checkpoint stands for its base where that is not here
        "model": model or model_path or settings.model,
        "model_path": model_path or settings.model_path,
        "adapter": adapter or settings.adapter,
    }
    given = {"model": model or model_path, "model_path": model_path, "adapter": adapter}
    for field, name in names.items():
        flag = f"--{field.replace('_', '-')}"
        if name is None or (name == "demo" and field == "model"):
            continue
        here = Path(name).expanduser()
        if here.exists() and root.resolve() in (here.resolve(), *here.resolve().parents):
            raise ModelError(
                f"{flag} {name!r} lies in the dataset itself, which is not to be trusted; it was not loaded"
            )
        is_local = (made.adapter or "").partition("@")[2] if field == "adapter" else made.revision
        if given[field] is None and (is_local.startswith("sha256:") or not _HUB_ID.fullmatch(name) or here.exists()):
            raise ModelError(
                f"{manifest.config} was made with the local {name!r}; say where it is: {flag} PATH. A dataset names no "
                "files to load"
            )
    weights = "model" if names["model_path"] is None else "model_path"
    repository = str(names[weights]).partition("@")[0]
    if _COMMIT.fullmatch(made.revision) and repository == made.id and not Path(repository).exists():
        names[weights] = f"{repository}@{made.revision}"
    return msgspec.structs.replace(settings, **names)


def _identified(manifest: Manifest, settings: ModelConfig) -> ModelInfo:
    """What is known of the model; nothing of it but its configuration is read, and no code of it runs unless it has
    the name that the dataset gives.

    Raises:
        ModelError: it is not the model that made the dataset.
    """
    made, named = manifest.model, resolve(settings.model_path or settings.model)
    found = (named.id, named.revision or made.revision)
    info = None
    if found == (made.id, made.revision):
        info = model_info(settings, variant=made.variant)
        found = (info.id, info.revision)
    if info is None or (*found, info.adapter) != (made.id, made.revision, made.adapter):
        this = f"{found[0]} at {found[1]}, adapter {info.adapter if info else settings.adapter}"
        raise ModelError(
            f"{manifest.config} was made by {made.id} at {made.revision}, adapter {made.adapter}; this is {this}. Give "
            "the right one with --model and --adapter"
        )
    return info


def _replayed(traced: TracedModel, sample: Sample, capture: CaptureConfig, again: Replay[Any]) -> Verification:
    """One sample, run again."""
    record = sample.record
    result = Verification.nothing()
    if scored := again.scored(record):
        result = replay_scored(traced, record.key, record.token_ids[: record.prompt_length], scored)
    trace = again.trace(sample, record)
    if isinstance(trace, Trace):
        trace = trace._replace(captured_from=record.captured_from)
    with again.as_it_was(traced, record):
        return result.with_more(replay(traced, record.key, again.text(record), trace, capture))
