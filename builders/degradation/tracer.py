"""degradation at work: damages the model when a batch is of another point of the grid, and restores it at the end."""

import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Literal, TypeAlias

import numpy as np

from builders.degradation.configs import DegradationConfig
from builders.degradation.damage import Damaged, DamageStats
from builders.degradation.memory_watch import MemoryWatch
from builders.degradation.perplexity import TextPerplexity, text_perplexity
from builders.degradation.record import DamageInfo, DegradationRecord
from builders.degradation.task import DamagedPrompt, gives
from builders.degradation.weight_groups import Group, find_group
from tracekit.answering import answered_fields
from tracekit.console import say
from tracekit.errors import ConfigError
from tracekit.format.shards import sha256_file
from tracekit.model.answers import parse_answer
from tracekit.model.capture import Trace
from tracekit.model.decoding import ToAnswer, answer_traced
from tracekit.model.generation import Generated, settings_of
from tracekit.model.memory import memory_reader
from tracekit.model.models import load_processor, max_positions
from tracekit.model.pictures import Illustrated, illustrate, read_picture
from tracekit.model.prompts import Prompter, sha256_text
from tracekit.model.traced import TracedModel
from tracekit.model.values import ValuePolicy
from tracekit.task import Overhead, Place, TracedSample, Tracer

__all__ = ["DegradationTracer"]

_Once: TypeAlias = Literal["group", "damage", "perplexity"]
"""What is done once a group, once a level and repeat, once a level."""
_PERPLEXITY_WINDOW = 512


class DegradationTracer(Tracer[DamagedPrompt]):
    """One grid at work: damages the model when a batch is of another point, and restores it at the end."""

    answers = True

    def __init__(self, config: DegradationConfig, tokenizer: Any, examples: Sequence[DamagedPrompt]) -> None:
        self._config, self._tokenizer = config, tokenizer
        prompter = Prompter(tokenizer, config.prompt, default_system="")
        self.variant = prompter.variant
        texts = {example.row: example.prompt.text for example in examples}
        self._illustrated: dict[int, Illustrated] = {}
        if config.image is not None:
            self.loads = "image_lm"
            processor, picture = load_processor(config.model), read_picture(config.image)
            self._illustrated = {row: illustrate(processor, prompter, text, picture) for row, text in texts.items()}
        self._prompts = {
            row: self._illustrated[row].prompt if self._illustrated else prompter.prompt(text)
            for row, text in texts.items()
        }
        self.max_positions = config.sequence_limit
        self.batch_size = config.batch_size(len(self._prompts))
        asked, most = config.output.batch_size, config.max_batch_size
        self.at_once = most if asked == "auto" else min(asked, most)
        self._image_sha256 = None if config.image is None else sha256_file(Path(config.image).expanduser())
        self._text = _read_text(config.perplexity_text)
        self._watch: MemoryWatch | None = None
        self._level: tuple[str, float] | None = None
        self._groups: dict[str, Group] = {}
        self._group: Group | None = None
        self._open = ExitStack()
        self._damaged: Damaged | None = None
        self._cell: tuple[str, float, int] | None = None
        self._stats: DamageStats | None = None
        self._perplexity: TextPerplexity | None = None
        self._seconds: dict[_Once, list[float]] = {"group": [], "damage": [], "perplexity": []}

    def length(self, example: DamagedPrompt) -> int:
        """Prompt tokens."""
        return len(self._prompts[example.row].token_ids)

    def num_positions(self, example: DamagedPrompt) -> int:
        """Prompt and longest answer."""
        return self.length(example) + self._config.generation.max_new_tokens

    def check_memory(self, traced: TracedModel, examples: Sequence[DamagedPrompt]) -> None:
        """Pause where memory is short.

        Raises:
            MemoryPressureError: memory is nearly full.
        """
        if self._watch is None:
            self._watch = MemoryWatch(memory_reader(*traced.devices), max_batch_size=self._config.max_batch_size)
            say(self._watch.note)
        if (level := _level(examples)) != self._level:
            self._watch.start_level()
        self._level = level
        self._watch.check()

    def next_size(self, size: int, done: Sequence[DamagedPrompt], following: Sequence[DamagedPrompt]) -> int:
        """More at once, up to a whole batch, where another level follows and memory is plentiful."""
        if self._watch is None or _level(done) == _level(following):
            return size
        return self._watch.grown(size)

    def overhead(self, examples: Sequence[DamagedPrompt]) -> Overhead:
        """Damage is once a repeat of a level, perplexity once a level, and its damage once more."""
        cells = {(example.group, example.level, example.repeat) for example in examples}
        levels = {cell[:2] for cell in cells} if self._text is not None else set()
        times = {
            "group": len({cell[0] for cell in cells}),
            "damage": len(cells) + len(levels),
            "perplexity": len(levels),
        }
        means = {name: sum(spent) / len(spent) if spent else 0.0 for name, spent in self._seconds.items()}
        return Overhead(
            spent=sum(sum(spent) for spent in self._seconds.values()),
            expected=sum(means[name] * times[name] for name in means),
            what=f"damage x {times['damage']}" + f", perplexity x {len(levels)}" * bool(levels),
        )

    def trace(self, traced: TracedModel, examples: Sequence[DamagedPrompt], place: Place) -> list[TracedSample]:
        """Damage the model as these examples want it, generate, and capture."""
        self._bring(traced, examples[0])
        made = answer_traced(
            traced,
            [self._asked(example) for example in examples],
            self._config.generation,
            self._config.capture,
            from_decoding=place.from_decoding,
            policy=ValuePolicy(may_be_nonfinite=True, may_overflow=examples[0].level != 0),
        )
        return [
            TracedSample(self._record(traced, example, output, trace, place), text, trace)
            for example, (output, text, trace) in zip(examples, made, strict=True)
        ]

    def close(self) -> None:
        """Restore the model."""
        self._open.close()
        self._group = self._damaged = self._cell = None

    def _asked(self, example: DamagedPrompt) -> ToAnswer:
        seed = f"{self._config.output.seed} {example.prompt.id} {example.repeat}" if self._config.do_sample else None
        shown = self._illustrated.get(example.row)
        return ToAnswer(self._prompts[example.row].token_ids, seed) if shown is None else shown.to_answer(seed)

    def _bring(self, traced: TracedModel, example: DamagedPrompt) -> None:
        """Damage the model to a point of the grid, unless it is there; perplexity once a level."""
        cell = (example.group, example.level, example.repeat)
        if cell == self._cell:
            return
        if not self._groups:  # all of them at once: a wrong one is found before anything is computed
            self._groups = {name: find_group(traced.model, traced.anatomy, name) for name in self._config.groups}
        if self._group is None or self._group.name != example.group:
            self.close()
            self._group = self._groups[example.group]
            if self._group.note:
                say(self._group.note)
            with self._timed("group"):
                self._damaged = self._open.enter_context(Damaged(self._group))
        assert self._damaged is not None
        method, seed = self._config.method, self._config.seed_base
        is_other_level = self._cell is None or self._cell[:2] != cell[:2]
        self._cell = None
        if self._text is not None and is_other_level:
            with self._timed("damage"):
                self._damaged.apply(method, level=example.level, seed=seed)
            window = min(_PERPLEXITY_WINDOW, max_positions(self._config.model) or _PERPLEXITY_WINDOW)
            stride = min(window, self._config.perplexity_stride)
            with self._timed("perplexity"):
                self._perplexity = text_perplexity(traced, self._text, max_length=window, stride=stride)
        with self._timed("damage"):
            self._stats = self._damaged.apply(method, level=example.level, seed=seed + example.repeat)
        self._cell = cell

    @contextmanager
    def _timed(self, what: _Once) -> Iterator[None]:
        started = time.monotonic()
        yield
        self._seconds[what].append(time.monotonic() - started)

    def _record(
        self,
        traced: TracedModel,
        example: DamagedPrompt,
        output: Generated,
        trace: Trace,
        place: Place,
    ) -> DegradationRecord:
        prompt, wanted = self._prompts[example.row], example.prompt.answer
        parsed = parse_answer(
            self._tokenizer, prompt, output.token_ids, eos_included=output.eos_included, is_one_line=False
        )
        perplexity, own = self._perplexity, trace.next_tokens
        is_known = perplexity is not None and bool(np.isfinite(perplexity.perplexity))
        return DegradationRecord(
            **answered_fields(traced, prompt, parsed, output, trace, place),
            key=example.key,
            example_id=example.prompt.id,
            question_id=example.prompt.id,
            sample_index=0,
            split=self._config.source.split,
            input_sha256=sha256_text(prompt.input_text),
            generation=settings_of(self._config.generation, do_sample=self._config.do_sample),
            seed=self._config.output.seed,
            prompt_id=example.prompt.id,
            prompt_group=Path(self._config.source.source).stem,
            prompt_kind=example.prompt.kind,
            prompt_text=prompt.input_text,
            image_filename=None if self._config.image is None else Path(self._config.image).name,
            image_sha256=self._image_sha256,
            config_name=self._config.name,
            damage=self._damage(example),
            level_index=self._config.all_levels.index(example.level),
            repeat=example.repeat,
            generated_text=parsed.whole_text,
            generated_answer=parsed.text,
            generated_token_ids=output.token_ids,
            is_truncated=not parsed.has_ended,
            token_logprobs=_finite(own.logprobs),
            token_entropies=_finite(own.entropies),
            expected_answer=wanted,
            is_correct=None if wanted is None else gives(parsed.text, wanted),
            perplexity=perplexity.perplexity if perplexity is not None and is_known else None,
            is_perplexity_finite=None if perplexity is None else is_known,
            num_nonfinite_values=sum(int((~np.isfinite(array)).sum()) for array in trace.tensors.values()),
            num_overflowed_values=trace.num_overflowed,
            num_nonfinite_tokens=int((~(np.isfinite(own.logprobs) & np.isfinite(own.entropies))).sum()),
        )

    def _damage(self, example: DamagedPrompt) -> DamageInfo:
        assert self._stats is not None
        assert self._group is not None
        return DamageInfo(
            method=self._config.method,
            group=example.group,
            level=example.level,
            seed=self._config.seed_base + example.repeat,
            num_weights=self._stats.num_weights,
            share_changed=self._stats.share_changed,
            relative_change=self._stats.relative_change,
            num_nonfinite=self._stats.num_nonfinite,
            note=self._group.note,
        )


def _level(examples: Sequence[DamagedPrompt]) -> tuple[str, float]:
    """Group and level of a batch."""
    return examples[0].group, examples[0].level


def _finite(values: np.ndarray) -> list[float | None]:
    """Values, None for those that are not finite."""
    return [float(value) if np.isfinite(value) else None for value in values]


def _read_text(path: str | None) -> str | None:
    """The text whose perplexity is wanted.

    Raises:
        ConfigError: it cannot be read.
    """
    if path is None:
        return None
    try:
        text = Path(path).expanduser().read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"perplexity text {path!r} - at `$.perplexity_text`; cannot be read: {error}") from error
    if len(text.split()) < 2:
        raise ConfigError(f"perplexity text {path!r} - at `$.perplexity_text`; it has no two words; give a longer one")
    return text
