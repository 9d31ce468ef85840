"""Replay of a stored dataset: load its model again, run some samples alone, and compare."""

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeVar, cast

import msgspec
import numpy as np

from tracekit.config import CaptureConfig, DeviceMap, ModelConfig, PromptConfig, RunConfig, check
from tracekit.errors import DatasetError, ModelError
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
from tracekit.model.references import resolve
from tracekit.model.traced import TracedModel
from tracekit.model.weights import find_group
from tracekit.read.store import Sample, TraceStore
from tracekit.records import (
    RECORD_TYPES,
    CsqaMcqRecord,
    CsqaRecord,
    DegradationRecord,
    IntrospectionRecord,
    ModelInfo,
    NextTokenRecord,
    Record,
)
from tracekit.sites import resolve_sites

__all__ = ["replay_stored", "scored_of"]

PartT = TypeVar("PartT", ModelConfig, CaptureConfig, PromptConfig)

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
    image: str | None = None,
    chat_template: str | None = None,
    trust_remote_code: bool = False,
) -> Verification:
    """Run `count` samples, spread over the dataset, again, on devices as in ModelConfig.

    The dataset says which model made it, and grants nothing: what lies in a file is named here, code runs only where
    it is allowed here, and the model is compared with the manifest before anything of it is loaded. `image` and
    `chat_template` are the picture and the template file of the run, if it had them.

    Raises:
        ModelError: the model is not the one that made the dataset, lies in the dataset, or has to be named.
        DatasetError: the manifest holds no configuration of a model.
        CaptureError: an error is past the tolerance.
    """
    manifest = read_manifest(layout)
    settings = msgspec.structs.replace(
        _stored_part(manifest, "model", ModelConfig),
        device=device,
        device_map=device_map,
        max_memory=max_memory,
        offload_folder=offload_folder,
        trust_remote_code=trust_remote_code,
    )
    settings = _with_names(manifest, settings, layout.root, model=model, model_path=model_path, adapter=adapter)
    check(RunConfig(model=settings))
    info = _identified(manifest, settings)
    capture_config = _stored_part(manifest, "capture", CaptureConfig)
    tokenizer = load_tokenizer(settings)
    traced = _loaded(manifest, settings, info, capture_config, tokenizer)
    show = _shown_again(manifest, settings, tokenizer, image, chat_template)
    result = Verification.nothing()
    with TraceStore(str(layout.root), config=layout.config) as store:
        for position in sorted({round(i) for i in np.linspace(0, len(store) - 1, count)}):
            result = result.with_more(_replayed(traced, store[position], capture_config, show))
    return result


def _stored_part(manifest: Manifest, name: str, part: type[PartT]) -> PartT:
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


def _loaded(
    manifest: Manifest, settings: ModelConfig, info: ModelInfo, capture: CaptureConfig, tokenizer: Any
) -> TracedModel:
    """The model of a dataset."""
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
    manifest: Manifest, settings: ModelConfig, tokenizer: Any, image: str | None, chat_template: str | None
) -> Callable[[Text, Record], Text]:
    """Puts the picture of a run, if it had one, beside the texts of its records.

    Raises:
        ModelError: the picture or the chat template is not given, or is another one.
    """
    wanted = manifest.run.get("image")
    if wanted is None:
        return lambda text, record: text
    _check_same(manifest, "picture", "--image", wanted, image)
    prompt = _stored_part(manifest, "prompt", PromptConfig)
    if prompt.chat_template not in (None, "none"):
        _check_same(manifest, "chat template", "--chat-template", prompt.chat_template, chat_template)
        prompt = msgspec.structs.replace(prompt, chat_template=chat_template)
    assert image is not None, manifest.config
    processor, picture = load_processor(settings), read_picture(image)
    prompter = Prompter(tokenizer, prompt, default_system="")

    def show(text: Text, record: Record) -> Text:
        assert isinstance(record, DegradationRecord), type(record)
        shown = illustrate(processor, prompter, record.prompt_text, picture)
        if shown.prompt.token_ids != record.token_ids[: record.prompt_length]:
            raise ModelError(f"sample {record.key}: the processor makes other tokens of prompt and picture than it did")
        return with_picture(text, shown)

    return show


def _check_same(manifest: Manifest, what: str, flag: str, wanted: object, given: str | None) -> None:
    """See that a file that is given is the one that a manifest names, by its SHA-256."""
    if given is None or not str(wanted).endswith(f"@sha256:{sha256_file(Path(given).expanduser())}"):
        fault = "is another one" if given else "is not given"
        raise ModelError(
            f"{manifest.config} was made with the {what} {wanted}, which {fault}; say where it is: {flag} PATH"
        )


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
