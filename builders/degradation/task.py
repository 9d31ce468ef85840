"""Degradation: what a model writes, and what goes on inside it, while its weights are damaged step by step.

The grid is groups of weights x levels x repeats x prompts; every point is a sample, level 0 in every group too. What is
done to the weights stands in builders/degradation/damage.py, the groups in builders/degradation/weight_groups.py, the
prompts in builders/degradation/prompts.py, named configurations in builders/degradation/configs.py.

    python -m builders.degradation --config dreams_it --model google/gemma-3-4b-it --out traces/dreams

Weights are restored, bit by bit, before every level and repeat. A batch is of one level and repeat. Draws of an answer
depend on the prompt and the repeat alone: at another level of the same repeat only the weights differ.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import msgspec

from builders.degradation.configs import CONFIGS, DegradationConfig, check_grid
from builders.degradation.prompts import DREAMS, IQ, PICTURE, DegradationPrompt
from builders.degradation.record import DegradationRecord
from builders.kit.cells import Cells, Columns
from builders.kit.columns import PromptSource
from builders.kit.sources import HubSource, SourceRow, read_examples
from tracekit.console import say
from tracekit.errors import ConfigError, SourceError
from tracekit.format.manifest import Metric, SourceInfo, TaskReport
from tracekit.model.prompts import sha256_text
from tracekit.records import Number, answered
from tracekit.task import Example, Examples, Task, lazy

__all__ = ["TASK", "DamagedPrompt", "gives", "parse_row"]

_PROMPTS: Mapping[str, Sequence[DegradationPrompt]] = {"dreams": DREAMS, "iq": IQ, "picture": PICTURE}
COLUMNS: Columns = {"text": ("prompt", "text"), "answer": ("answer",), "id": ("id",), "kind": ("kind",)}
"""The columns of a file with prompts."""
_NO_HUB = HubSource("", None)
_ROOM = 10**7
"""Room for prompt numbers in an index."""
_NUM_CELLS = 2**63 // _ROOM
"""Room for cells in an index: among a thousand two are alike with a probability of 5e-7."""


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


def parse_row(row: SourceRow) -> _Numbered:
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


def examples(config: DegradationConfig) -> Examples[DamagedPrompt]:
    """The grid over the prompts of the source: group by group, level by level, repeat by repeat."""
    check_grid(config)
    if config.generation.num_beams > 1 and config.do_sample:
        beams = config.generation.num_beams
        raise ConfigError(f"--num-beams {beams} with --do-sample - at `$.generation.num_beams`; give 1")
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
    grid_points = [
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
    return Examples(grid_points, info)


def _cell(group: str, level: float, repeat: int) -> int:
    """A number for a cell that is the same in every grid."""
    return int(sha256_text(f"{group} {level!r} {repeat}"), 16) % _NUM_CELLS


def _prompts(source: PromptSource) -> tuple[Sequence[_Numbered], SourceInfo]:
    """The prompts and what the manifest says of them."""
    if source.source not in _PROMPTS:
        if source.source in ("default", "sample"):
            raise SourceError(f"source {source.source!r}; expected {', '.join(_PROMPTS)}, or a file with prompts")
        found = read_examples(source, default=_NO_HUB, sample=Path(), columns=COLUMNS, parse=parse_row)
        names = [one.prompt.id for one in found.examples]
        if repeated := [name for name in names if names.count(name) > 1]:
            raise SourceError(
                f"{found.source.id}: id {repeated[0]!r} stands twice; samples are found by it, so give each its own"
            )
        return found.examples, found.source
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


def gives(answer: str, wanted: str) -> bool:
    """Whether an answer gives what was expected: the same words, whatever their case, not inside other words or
    numbers. A single letter counts alone, in quotes, or called a letter: "a" is an article too."""
    if len(wanted) == 1 and wanted.isalpha():
        form = rf"\W*{wanted}\W*|.*(?:\bletter\W+|[\"'“‘]){wanted}(?!\w).*"
        return re.fullmatch(form, answer, re.IGNORECASE | re.DOTALL) is not None
    return re.search(rf"(?<![\w.,]){re.escape(wanted)}(?![\w]|[.,]\d)", answer, re.IGNORECASE) is not None


def _report(records: Iterable[DegradationRecord]) -> TaskReport:
    from builders.degradation.levels import level_lines, level_pictures, level_stats

    levels = level_stats(records)
    num_samples = sum(one.num_samples for one in levels)
    nonfinite = Metric(
        name="nonfinite_share",
        value=sum((one.nonfinite_share or 0.0) * one.num_samples for one in levels) / num_samples,
        definition="Share of the samples in which the model gave values that are not finite.",
    )
    return TaskReport(
        data=msgspec.to_builtins(levels),
        lines=level_lines(levels),
        pictures=level_pictures(levels),
        metrics=[nonfinite],
    )


TASK = Task(
    name="degradation",
    title="What a model writes when a group of its weights is damaged to a level.",
    category="text-generation",
    config=DegradationConfig,
    configs=CONFIGS,
    record=DegradationRecord,
    examples=examples,
    tracer=lazy("builders.degradation.tracer:DegradationTracer"),
    replay=lazy("builders.degradation.replaying:DegradationReplay"),
    report=_report,
    exports={"degradation-json": lazy("builders.degradation.export:export_degradation")},
    are_values_finite=False,
    card="degradation.md.j2",
    outcome=answered(
        asked="prompt_text",
        gold="expected_answer",
        correct="is_correct",
        numbers=[
            *answered().numbers,
            Number(name="perplexity", field="perplexity"),
            Number(name="truncated_share", field="is_truncated"),
        ],
        same=["prompt_text", "image_sha256", "expected_answer"],
        occasions=["damage.level", "damage.group", "repeat"],
        conditions=["damage.method", "damage.group", "damage.level", "damage.seed"],
    ),
)
