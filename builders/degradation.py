"""Degradation: what a model writes, and what goes on inside it, while its weights are damaged step by step.

The grid is groups of weights x levels x repeats x prompts; every point is a sample, level 0 in every group too. What is
done to the weights stands in tracekit/model/damage.py, the groups in tracekit/model/weights.py, the prompts in
builders/degradation_prompts.py, named configurations in builders/degradation_configs.py.

    python -m builders.degradation --config dreams_it --model google/gemma-3-4b-it --out traces/dreams

Weights are restored, bit by bit, before every level and repeat. A batch is of one level and repeat. Draws of an answer
depend on the prompt and the repeat alone: at another level of the same repeat only the weights differ.
"""

from builders.degradation_configs import CONFIGS, DegradationConfig
from tracekit.cli import run_builder

if __name__ == "__main__":  # flags are read before torch is imported: what follows imports it
    run_builder("builders.degradation", DegradationConfig, configs=CONFIGS)

import re
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeAlias

import numpy as np

from builders.cells import Cells, Columns
from builders.degradation_configs import check_grid
from builders.degradation_prompts import DREAMS, IQ, PICTURE, DegradationPrompt
from builders.sources import HubSource, Row, read_examples
from tracekit.config import SourceConfig
from tracekit.errors import ConfigError, SourceError
from tracekit.format.manifest import SourceInfo
from tracekit.format.shards import sha256_file
from tracekit.model.answers import parse_answer
from tracekit.model.capture import Text, Trace, capture
from tracekit.model.damage import Damaged, DamageStats
from tracekit.model.generation import Generated, answer_once, settings_of
from tracekit.model.memory import MemoryWatch, memory_reader
from tracekit.model.models import load_processor, max_positions
from tracekit.model.pictures import Illustrated, illustrate, read_picture, with_picture
from tracekit.model.prompts import Prompter, sha256_text
from tracekit.model.traced import TracedModel
from tracekit.model.weights import Group, find_group
from tracekit.records import DamageInfo, DegradationRecord
from tracekit.run.perplexity import TextPerplexity, text_perplexity
from tracekit.run.plan import Example
from tracekit.run.task import Overhead, Place, Sample, Task, answered_fields
from tracekit.talk import say

__all__ = ["BUILDER", "DamagedPrompt", "DegradationBuilder", "gives", "parse_row"]

_PROMPTS: Mapping[str, Sequence[DegradationPrompt]] = {"dreams": DREAMS, "iq": IQ, "picture": PICTURE}
COLUMNS: Columns = {"text": ("prompt", "text"), "answer": ("answer",), "id": ("id",), "kind": ("kind",)}
"""The columns of a file with prompts."""
_NO_HUB = HubSource("", None)
_Once: TypeAlias = Literal["group", "damage", "perplexity"]
"""What is done once a group, once a level and repeat, once a level."""
_ROOM = 10**7
"""Room for prompt numbers in an index."""
_NUM_CELLS = 2**63 // _ROOM
"""Room for cells in an index: among a thousand two are alike with a probability of 5e-7."""
_PERPLEXITY_WINDOW = 512


class DamagedPrompt(Example, frozen=True, kw_only=True):
    """One point of the grid. Its index is made of group, level, repeat and prompt alone, so that a grid may grow."""

    row: int
    """Number of the prompt in its source."""
    prompt: DegradationPrompt
    """The prompt."""
    group: str
    """Weights that are damaged."""
    level: float
    """How much."""
    repeat: int
    """Which draw."""

    @property
    def cell(self) -> int:
        """A number for group, level and repeat."""
        return self.index // _ROOM

    @property
    def key(self) -> str:
        """Key of its sample: the same whatever `--offset`, `--limit` and the rest of the grid are."""
        group = re.sub(r"(?<=\d)-", "to", self.group).replace(":", "_").replace("-", "m")
        level = repr(self.level).removesuffix(".0").replace(".", "p").replace("-", "m").replace("+", "")
        return f"{group}_{level}_{self.repeat:03d}_{self.row:06d}"

    @property
    def source_row(self) -> int:
        """Number of the prompt in its source."""
        return self.row

    @property
    def text(self) -> str:
        """The prompt."""
        return self.prompt.text


class _Numbered(NamedTuple):
    """A prompt of a file."""

    row: int
    prompt: DegradationPrompt


def parse_row(row: Row) -> _Numbered:
    """A row of a file as a prompt.

    Raises:
        SourceError: no prompt.
    """
    cells = Cells(row, COLUMNS)
    text = cells.text("text", what="prompt")
    kind = cells.scalar(*cells.first("kind")) or "other"
    name, answer = cells.first("answer")
    answer = cells.scalar(name, cells.structure(name, answer))
    return _Numbered(row.index, DegradationPrompt(cells.identity(), kind, text.strip(), answer))  # pyright: ignore[reportArgumentType]


class DegradationBuilder:
    """Prompts in, answers of damaged models out."""

    name = "degradation"

    def examples(self, config: DegradationConfig) -> tuple[Sequence[DamagedPrompt], SourceInfo]:
        """The grid over the prompts of the source: group by group, level by level, repeat by repeat."""
        check_grid(config)
        _check(config)
        if config.source.source == "picture" and config.image is None:
            say("WARNING: the prompts ask for a picture, and none is shown; give --image FILE")
        if config.method == "uni_quant" and config.n_rep > 1 and not config.do_sample:
            say("WARNING: uni_quant draws nothing, and nothing is sampled: all repeats will be alike")
        prompts, info = _prompts(config.source)
        grid = [
            (group, float(level), repeat)
            for group in config.groups
            for level in config.all_levels
            for repeat in range(config.n_rep)
        ]
        cells = {point: _cell(*point) for point in grid}
        assert len(set(cells.values())) == len(grid), "two cells of one number"
        examples = [
            DamagedPrompt(
                index=cells[group, level, repeat] * _ROOM + row,
                row=row,
                prompt=prompt,
                group=group,
                level=level,
                repeat=repeat,
            )
            for group, level, repeat in grid
            for row, prompt in prompts
        ]
        return examples, info

    def open(self, config: DegradationConfig, tokenizer: Any, examples: Sequence[DamagedPrompt]) -> "DegradationTask":
        """Render every prompt."""
        return DegradationTask(config, tokenizer, examples)


def _cell(group: str, level: float, repeat: int) -> int:
    """A number for a cell that is the same in every grid."""
    return int(sha256_text(f"{group} {level!r} {repeat}"), 16) % _NUM_CELLS


def _check(config: DegradationConfig) -> None:
    """Refuse settings that have no meaning here."""
    generation = config.generation
    if generation.num_samples > 1 or generation.trace_samples:
        raise ConfigError("--num-samples and --trace-samples - at `$.generation`; --n-rep repeats, with other damage")
    if generation.num_beams > 1 and config.do_sample:
        raise ConfigError(f"--num-beams {generation.num_beams} with --do-sample - at `$.generation.num_beams`; give 1")
    if config.prompt.num_shots:
        raise ConfigError(f"--num-shots {config.prompt.num_shots} - at `$.prompt.num_shots`; these prompts have none")
    if config.capture.is_quantized or config.capture.attention_top_p < 1:
        raise ConfigError(
            "--store-dtype int8 and float8 and --attention-top-p - at `$.capture`; damaged models give values that are "
            "not finite, which these forms do not know; use --store-dtype bfloat16 or float16"
        )
    if config.model.quantize != "none":
        raise ConfigError(
            f"--quantize {config.model.quantize} - at `$.model.quantize`; quantised weights cannot be damaged like "
            "others; load the model without"
        )


def _prompts(source: SourceConfig) -> tuple[list[_Numbered], SourceInfo]:
    """The prompts and what the manifest says of them."""
    if source.source not in _PROMPTS:
        if source.source in ("default", "sample"):
            raise SourceError(f"source {source.source!r}; expected {', '.join(_PROMPTS)}, or a file with prompts")
        found = read_examples(source, default=_NO_HUB, sample=Path(), columns=COLUMNS, parse=parse_row)
        names = [one.prompt.id for one in found.examples]
        if repeated := [name for name in names if names.count(name) > 1]:
            raise SourceError(
                f"{found.info.id}: id {repeated[0]!r} stands twice; samples are found by it, so give each its own"
            )
        return found.examples, found.info
    whole = _PROMPTS[source.source]
    stop = len(whole) if source.limit is None else source.offset + source.limit
    chosen = [_Numbered(row, prompt) for row, prompt in enumerate(whole)][source.offset : stop]
    if not chosen:
        raise SourceError(f"{source.source} has {len(whole)} prompts, so --offset {source.offset} leaves none")
    texts = sha256_text("\n".join(prompt.text for prompt in whole))
    info = SourceInfo(
        id=f"tracekit:{source.source}",
        revision=f"sha256:{texts}",
        subset=None,
        split=source.split,
        num_rows=len(whole),
        num_used=len(chosen),
        skipped=[],
    )
    return chosen, info


class DegradationTask(Task[DamagedPrompt]):
    """One grid at work: damages the model when a batch is of another point, and restores it at the end."""

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

    def trace(self, traced: TracedModel, examples: Sequence[DamagedPrompt], place: Place) -> list[Sample]:
        """Damage the model as these examples want it, generate, and capture."""
        self._bring(traced, examples[0])
        ids = [self._prompts[example.row].token_ids for example in examples]
        seeds = [f"{self._config.output.seed} {example.prompt.id} {example.repeat}" for example in examples]
        shown = [self._illustrated[example.row] for example in examples] if self._illustrated else []
        outputs = answer_once(
            traced,
            ids,
            self._config.generation,
            seeds if self._config.do_sample else None,
            inputs=[one.inputs for one in shown],
            segments=[one.token_type_ids for one in shown if one.token_type_ids is not None],
        )
        texts = [
            with_picture(Text(prompt + output.token_ids, len(prompt)), shown[i] if shown else None)
            for i, (prompt, output) in enumerate(zip(ids, outputs, strict=True))
        ]
        is_damaged = examples[0].level != 0
        traces = capture(traced, texts, self._config.capture, allow_nonfinite=True, allow_overflow=is_damaged)
        return [
            Sample(
                self._record(traced, example, output, trace, place),
                text,
                trace,
                allow_nonfinite=True,
            )
            for example, output, text, trace in zip(examples, outputs, texts, traces, strict=True)
        ]

    def close(self) -> None:
        """Restore the model."""
        self._open.close()
        self._group = self._damaged = self._cell = None

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
        perplexity = self._perplexity
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
            generated_text=parsed.whole_text[len(prompt.text) :],
            generated_answer=parsed.text,
            generated_token_ids=output.token_ids,
            is_truncated=not parsed.has_ended,
            token_logprobs=_finite(trace.logprobs),
            token_entropies=_finite(trace.entropies),
            expected_answer=wanted,
            is_correct=None if wanted is None else gives(parsed.text, wanted),
            perplexity=perplexity.perplexity if perplexity is not None and is_known else None,
            is_perplexity_finite=None if perplexity is None else is_known,
            num_nonfinite_values=sum(int((~np.isfinite(array)).sum()) for array in trace.tensors.values()),
            num_overflowed_values=trace.num_overflowed,
            num_nonfinite_tokens=int((~(np.isfinite(trace.logprobs) & np.isfinite(trace.entropies))).sum()),
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


def gives(answer: str, wanted: str) -> bool:
    """Whether an answer gives what was expected: the same words, whatever their case, not inside other words or
    numbers. A single letter counts alone, in quotes, or called a letter: "a" is an article too."""
    if len(wanted) == 1 and wanted.isalpha():
        form = rf"\W*{wanted}\W*|.*(?:\bletter\W+|[\"'“‘]){wanted}(?!\w).*"
        return re.fullmatch(form, answer, re.IGNORECASE | re.DOTALL) is not None
    return re.search(rf"(?<![\w.,]){re.escape(wanted)}(?![\w]|[.,]\d)", answer, re.IGNORECASE) is not None


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


BUILDER = DegradationBuilder()
