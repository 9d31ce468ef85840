"""Label sets: what a judge said of the answers of a configuration, beside the dataset's shards and never in them.

    labels/<config>/<set>.jsonl     a Label a line; by key once the judge is through, as they came until then
    labels/<config>/<set>.json      a LabelSummary: who judged, by which prompts, and the rates; written last

A set is named for its judge and eight hex digits of whatever shapes its labels: `rules-1a2b3c4d`. Another judge, or
other prompts, make another set. A line that a crash cut short counts as not written. Neither file holds a clock or a
path, so judging again gives the same bytes where the judge says the same.
"""

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

import msgspec

from tracekit.errors import UNREADABLE, DatasetError
from tracekit.format.layout import Layout, cut_torn_line, files_inside, inside, read_whole, write_atomic
from tracekit.format.manifest import check_known, read_struct, to_bytes

__all__ = [
    "Label",
    "LabelSummary",
    "Rate",
    "Verdict",
    "append_labels",
    "label_sets",
    "mend_labels",
    "rate_lines",
    "read_labels",
    "read_summaries",
    "read_summary",
    "summary_path",
    "write_labels",
    "write_summary",
]

Verdict = Literal["correct", "incorrect", "unverifiable", "accepted", "rejected"]
"""Of an answer with a gold answer: correct, incorrect or unverifiable. Of one about an invented thing: accepted, where
the model takes it for real, or rejected."""


class Label(msgspec.Struct, frozen=True, kw_only=True):
    """What a judge said of one sample."""

    key: str
    """Key of the sample."""
    judged_sha256: str
    """SHA-256 of what was judged (question, gold answers, answer): a label of another answer does not count."""
    is_abstention: bool | None
    """Whether the answer declines to answer; null where that was not asked, or could not be read."""
    verdict: Verdict | None
    """What the answer is; null for an abstention, and where the judge's reply could not be read."""
    judge: str
    """Who judged: `rules`, or the model and what runs it."""
    prompt_sha256: str
    """SHA-256 of the judge's prompts, or of its rules."""
    raw_outputs: list[str]
    """Everything that the judge replied, in order; empty for rules, and where nothing had to be asked."""
    failure: str | None
    """Why there is no label: the reply could not be read, or there was none. Null where there is one."""
    is_final: bool = True
    """False where the judge gave no reply, as when a request failed: the next run asks it again."""


class Rate(msgspec.Struct, frozen=True, kw_only=True):
    """A share of the samples that a judge labelled."""

    name: str
    """What it is the share of; `definitions` of the summary say it exactly."""
    group: str | None
    """Samples it is over, as `domain=plants`; null over all."""
    count: int
    """Samples that count."""
    num: int
    """Samples that it is over."""
    value: float | None
    """count / num; null where num is 0."""
    low: float | None
    """Lower end of its 95 % interval; null likewise."""
    high: float | None
    """Upper end."""


class LabelSummary(msgspec.Struct, frozen=True, kw_only=True):
    """A label set, summed up."""

    name: str
    """Name of the set."""
    config: str
    """The configuration whose samples it labels."""
    judge: str
    """Who judged."""
    prompt_sha256: str
    """SHA-256 of the judge's prompts, or of its rules."""
    settings: dict[str, Any]
    """What else shapes the labels."""
    labels_sha256: str
    """SHA-256 of the file of labels."""
    num_samples: int
    """Samples labelled, failures among them."""
    num_failures: int
    """Samples without a label, because the judge's reply could not be read."""
    is_open: bool
    """True where the run was not finished: samples may have been added since."""
    rates: list[Rate]
    """The rates: over all, then by group."""
    definitions: dict[str, str]
    """What each rate is, and how its interval is made."""
    command: str = ""
    """What to type to judge the answers again, without `--out`. Empty in sets of older versions."""


def label_sets(layout: Layout) -> list[str]:
    """Names of the label sets of a configuration, sorted."""
    return [path.stem for path in files_inside(layout.root, f"labels/{layout.config}", "*.jsonl")]


def summary_path(layout: Layout, name: str) -> Path:
    """Where the summary of a set lies."""
    return inside(layout.root, f"labels/{layout.config}/{name}.json")


def read_labels(path: Path, *, to_continue: bool = False) -> list[Label]:
    """Labels of a set in the order of the file; of a key that stands twice, the last one.

    Raises:
        DatasetError: the file cannot be read, a whole line is no label, or with `to_continue` a later version wrote it.
    """
    decoder = msgspec.json.Decoder(Label)
    found: dict[str, Label] = {}
    lines = read_whole(path).split(b"\n")
    for number, line in enumerate(lines[:-1], start=1):  # what follows the last line feed was cut by a crash
        try:
            label = decoder.decode(line)
        except UNREADABLE as error:
            raise DatasetError(
                f"{path} line {number} is no label: {error}. Delete the file and judge again; what a model said before "
                "is in its cache"
            ) from error
        if to_continue:
            check_known(line, label, where=f"{path} line {number}")
        found[label.key] = label
    return list(found.values())


def mend_labels(path: Path) -> None:
    """Cut off a last line that a crash left unfinished."""
    if not path.exists():
        return
    with path.open("r+b") as file:
        cut_torn_line(file.fileno())


def append_labels(path: Path, labels: Iterable[Label]) -> None:
    """Add labels to a set, on the disk when this returns."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab") as file:
        file.writelines(msgspec.json.encode(label) + b"\n" for label in labels)
        file.flush()
        os.fsync(file.fileno())


def write_labels(path: Path, labels: Iterable[Label]) -> None:
    """Write a whole set; it is there as it was, or as it is to be."""
    write_atomic(path, b"".join(msgspec.json.encode(label) + b"\n" for label in labels))


def write_summary(layout: Layout, summary: LabelSummary) -> None:
    """Write the summary of a set."""
    write_atomic(summary_path(layout, summary.name), to_bytes(summary))


def read_summary(layout: Layout, name: str) -> LabelSummary:
    """The summary of a set.

    Raises:
        DatasetError: there is none, or it is not what it should be.
    """
    path = summary_path(layout, name)
    summary = read_struct(path, LabelSummary)
    if (summary.name, summary.config) != (name, layout.config):
        raise DatasetError(
            f"{path}: its summary is of {summary.name!r} of {summary.config!r}, expected {name!r} of {layout.config!r}"
        )
    return summary


def read_summaries(layout: Layout) -> list[LabelSummary]:
    """Summaries of all sets of a configuration that are judged to the end, by name.

    Raises:
        DatasetError: one is not what it should be.
    """
    paths = files_inside(layout.root, f"labels/{layout.config}", "*.json")
    return [read_summary(layout, path.stem) for path in paths]


def rate_lines(summary: LabelSummary) -> list[str]:
    """A summary as aligned text: a line a rate."""
    failures = f", {summary.num_failures} without a label" if summary.num_failures else ""
    lines = [
        f"judged by {summary.judge} ({summary.name}): {summary.num_samples} samples{failures}"
        + ", of a run that is not finished" * summary.is_open
    ]
    width = max((len(_rate_name(rate)) for rate in summary.rates), default=0)
    for rate in summary.rates:
        text = "    -  of 0"
        if rate.value is not None:
            text = f"{rate.value:5.3f}  [{rate.low:.3f}, {rate.high:.3f}]  {rate.count} of {rate.num}"
        lines.append(f"  {_rate_name(rate):{width}s}  {text}")
    return lines


def _rate_name(rate: Rate) -> str:
    return rate.name if rate.group is None else f"  {rate.name}, {rate.group}"
