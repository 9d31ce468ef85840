"""How a stored answer of a damaged model is run again: with the same damage, and the picture of the run."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import cast

import msgspec

from builders.degradation.damage import Damaged, Method
from builders.degradation.record import DegradationRecord
from builders.degradation.weight_groups import find_group
from tracekit.config import PromptConfig
from tracekit.errors import ModelError
from tracekit.format.manifest import Manifest
from tracekit.format.shards import sha256_file
from tracekit.model.capture import Text, Trace
from tracekit.model.generation import Generated
from tracekit.model.models import load_processor
from tracekit.model.pictures import illustrate, read_picture
from tracekit.model.prompts import Prompter
from tracekit.model.traced import Loads, TracedModel
from tracekit.model.values import ValuePolicy
from tracekit.read.store import Sample
from tracekit.run.recheck import Replay, Shown, stored_part

__all__ = ["DegradationReplay"]


class DegradationReplay(Replay[DegradationRecord]):
    """A stored answer, run again by a model with the same damage."""

    loads: Loads = "lm"

    def begin(self, shown: Shown) -> None:
        """Open the picture of the run, if it had one.

        Raises:
            ModelError: the picture or the chat template is not given, or is another one.
        """
        self._shown = None
        wanted = shown.manifest.run.get("image")
        if wanted is None:
            return
        self.loads = "image_lm"
        image = _same(shown.manifest, "picture", "--image", wanted, shown.files)
        prompt = stored_part(shown.manifest, "prompt", PromptConfig)
        if prompt.chat_template not in (None, "none"):
            template = _same(shown.manifest, "chat template", "--chat-template", prompt.chat_template, shown.files)
            prompt = msgspec.structs.replace(prompt, chat_template=template)
        prompter = Prompter(shown.tokenizer, prompt, default_system="")
        self._shown = load_processor(shown.settings), prompter, read_picture(image)

    def text(self, record: DegradationRecord) -> Text:
        """The text of a record, with the picture beside it.

        Raises:
            ModelError: the processor makes other tokens than it did.
        """
        if self._shown is None:
            return Text(record.token_ids, record.prompt_length)
        processor, prompter, picture = self._shown
        shown = illustrate(processor, prompter, record.prompt_text, picture)
        if shown.prompt.token_ids != record.token_ids[: record.prompt_length]:
            raise ModelError(f"sample {record.key}: the processor makes other tokens of prompt and picture than it did")
        return shown.to_answer().text(Generated(record.token_ids[record.prompt_length :], record.finish_reason))

    def trace(self, sample: Sample, record: DegradationRecord) -> Trace:
        """What is stored of it."""
        stored = super().trace(sample, record)
        assert isinstance(stored, Trace), record.key
        return stored._replace(policy=ValuePolicy(may_be_nonfinite=True, may_overflow=True))

    @contextmanager
    def as_it_was(self, traced: TracedModel, record: DegradationRecord) -> Iterator[None]:
        """The model with the record's damage."""
        damage = record.damage
        with Damaged(find_group(traced.model, traced.anatomy, damage.group)) as damaged:
            damaged.apply(cast(Method, damage.method), level=damage.level, seed=damage.seed)
            yield


def _same(manifest: Manifest, what: str, flag: str, wanted: object, files: Mapping[str, str]) -> str:
    """A file that is given, seen to be the one that a manifest names, by its SHA-256."""
    given = files.get(flag)
    if given is None or not str(wanted).endswith(f"@sha256:{sha256_file(Path(given).expanduser())}"):
        fault = "is another one" if given else "is not given"
        raise ModelError(
            f"{manifest.config} was made with the {what} {wanted}, which {fault}; say where it is: {flag} PATH"
        )
    return given
