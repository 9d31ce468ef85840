"""Evaluation: the stage in which a judge labels the answers of a dataset; for any builder.

    labels/<config>/<set>.jsonl, .json           the label set and its summary: tracekit.format.labels
    output/<config>/<model>/generation.jsonl     a line a sample: key, prompt, generation, model, timestamp, settings
    output/<config>/<model>/raw_eval_res.jsonl   a line a sample: its label, with what the judge replied
    output/<config>/<model>/eval_results.json    the summary: the rates, and what each of them is
    output/<config>/cache/<judge>.jsonl          what a judge that is a model replied, so that it is asked once

What lies under `output/` is of the judge that judged last; label sets of others stay. Shards and manifests are read and
never touched. A dataset that is not finished is judged as far as it goes; later the same command judges the rest.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
from tqdm import tqdm

from builders.judging.config import JudgeConfig, answers_layout
from builders.judging.judges import Judge, Judged, What, open_judge, set_name
from builders.judging.rates import GROUP_FIELDS, Rated, definitions, rates_of
from tracekit.clients.client import ClientConfig
from tracekit.config import RunConfig
from tracekit.console import say
from tracekit.errors import DatasetError
from tracekit.format.labels import (
    Label,
    LabelSummary,
    append_labels,
    mend_labels,
    rate_lines,
    read_labels,
    summary_path,
    write_labels,
    write_summary,
)
from tracekit.format.layout import Layout, inside, sweep, write_atomic
from tracekit.format.manifest import read_growth, read_plan, to_bytes
from tracekit.format.shards import sha256_file
from tracekit.model.prompts import sha256_text
from tracekit.read.store import TraceStore
from tracekit.records import Record
from tracekit.run.command import stage_line
from tracekit.run.run_log import batch_times
from tracekit.task import check_settings

__all__ = ["Evaluation", "answers_layout", "evaluate", "export_generation", "output_folder"]


class Evaluation(NamedTuple):
    """What a builder says of its records, so that they can be judged."""

    task: str
    """Name of the builder."""
    what: What
    """What is judged."""
    judged: Callable[[Any], Judged]
    """The answer of a record, and what is needed to judge it."""
    generation: Callable[[Any], str] = lambda record: record.generated_answer
    """The text of the answer, for `generation.jsonl`."""
    is_invented: Callable[[Any], bool] = lambda record: True
    """Whether a record is about an invented thing; False for controls."""

    @property
    def command(self) -> str:
        """What runs the builder, without flags."""
        return f"python -m builders.{self.task}"


class _Sample(NamedTuple):
    """What is kept of a record while it is judged."""

    judged: Judged
    question_id: str
    groups: Mapping[str, str]
    is_invented: bool


def output_folder(layout: Layout) -> Path:
    """Folder of the exports of a configuration: `output/<config>/<model>`, the model's id with `__` for `/`.

    Raises:
        DatasetError: the configuration was not begun.
    """
    name = re.sub(r"[^\w.-]+", "_", read_plan(layout).model.id.replace("/", "__"), flags=re.ASCII)
    return inside(layout.root, f"output/{layout.config}/{name.lstrip('.') or 'model'}", is_folder=True)


def evaluate(config: RunConfig, evaluation: Evaluation, *, judge: JudgeConfig, client: ClientConfig) -> int:
    """Judge the answers of a dataset; the exit code, 0.

    Labels are written as they come, so after Ctrl-C or a crash the same command goes on; with every answer labelled it
    asks nothing. A label counts for the answer that it was given for: of an answer made anew, a new one is made.

    Raises:
        DatasetError: there are no answers; the message names the command that makes them.
        ClientError: the judge cannot be asked; what it said so far is kept.
    """
    layout = answers_layout(config, evaluation.task)
    if config.output.dry_run:
        _say_what_would_be(layout, evaluation, judge)
        return 0
    sweep(layout.root)
    samples, is_open = _read_samples(layout, evaluation)
    cache = inside(layout.root, f"output/{layout.config}/cache/{_file_name(judge.judge)}.jsonl")
    with open_judge(judge, evaluation.what, model=config.model, client=client, cache=cache) as opened:
        name = set_name(opened)
        labels = _judge(layout, name, opened, samples)
        command = stage_line(evaluation.command, config, "evaluate")
        summary = _sum_up(layout, name, opened, evaluation, samples, labels, is_open=is_open, command=command)
        if opened.summary is not None:
            say(f"{opened.name}: {opened.summary}")
    write_summary(layout, summary)
    folder = output_folder(layout)
    write_atomic(folder / "raw_eval_res.jsonl", b"".join(msgspec.json.encode(labels[key]) + b"\n" for key in samples))
    write_atomic(folder / "eval_results.json", to_bytes(summary))
    export_generation(layout, evaluation)
    print("\n".join(rate_lines(summary)))
    verdicts = [label.verdict for label in labels.values() if label.verdict is not None]
    if len(verdicts) > 1 and len(set(verdicts)) == 1:
        say(
            f"warning: all {len(verdicts)} verdicts are {verdicts[0]!r}. A probe needs several classes: raise --limit, "
            "or choose another model"
        )
    print(f"labels          {layout.labels(name)}")
    print(f"exports         {folder}")
    return 0


def export_generation(layout: Layout, evaluation: Evaluation) -> Path:
    """Write `generation.jsonl`: a line a sample, in row order; the path of the file.

    `timestamp` is from the run log, and null where the log is gone.
    """
    times = batch_times(layout)
    lines: list[bytes] = []
    with TraceStore(str(layout.root), config=layout.config) as store:
        for sample in store:
            record = sample.record
            line = {
                "key": record.key,
                "prompt": record.prompt,
                "generation": evaluation.generation(record),
                "model": record.model.id,
                "timestamp": times.get(record.key),
                "settings": {**msgspec.to_builtins(record.generation), "seed": record.seed},
                "prompt_sha256": record.prompt_sha256,
            }
            lines.append(msgspec.json.encode(line) + b"\n")
    path = output_folder(layout) / "generation.jsonl"
    write_atomic(path, b"".join(lines))
    return path


def _read_samples(layout: Layout, evaluation: Evaluation) -> tuple[dict[str, _Sample], bool]:
    """Every answer there is, by key in row order; and whether more may come.

    Raises:
        DatasetError: there is none, or a later version planned them.
    """
    again = f"{evaluation.command} --stages answers --out {layout.root}"
    if not layout.plan.exists():
        raise DatasetError(
            f"{str(layout.root)!r} holds no answers of the configuration {layout.config!r} to judge; make them first: "
            f"{again}"
        )
    check_settings(read_plan(layout, to_continue=True), where=layout.plan)
    read_growth(layout, to_continue=True)
    with TraceStore(str(layout.root), config=layout.config) as store:
        samples = {sample.key: _sample_of(sample.record, evaluation) for sample in store}
        is_open = store.is_open
    if not samples:
        raise DatasetError(
            f"{str(layout.root)!r} has no finished shard of {layout.config!r} yet; go on with the answers first: "
            f"{again}"
        )
    return samples, is_open


def _sample_of(record: Record, evaluation: Evaluation) -> _Sample:
    values = {field: getattr(record, field, None) for field in GROUP_FIELDS}
    groups = {field: str(value) for field, value in values.items() if value is not None}
    return _Sample(evaluation.judged(record), record.question_id, groups, evaluation.is_invented(record))


def _judge(layout: Layout, name: str, judge: Judge, samples: Mapping[str, _Sample]) -> dict[str, Label]:
    """Labels of all samples, by key: those that are there already, and new ones for the rest."""
    path = layout.labels(name)
    mend_labels(path)
    known = {label.key: label for label in read_labels(path, to_continue=True)} if path.exists() else {}
    labels = {
        key: known[key]
        for key, sample in samples.items()
        if key in known and known[key].is_final and known[key].judged_sha256 == sample.judged.sha256()
    }
    left = [sample.judged for key, sample in samples.items() if key not in labels]
    if not left and len(known) == len(labels):
        print(f"nothing to judge: {judge.name} has labelled all {len(labels)} answers ({path})")
        return labels
    with tqdm(total=len(samples), initial=len(labels), unit="q", desc="judge", disable=None) as bar:

        def keep(new: Sequence[Label]) -> None:
            append_labels(path, new)
            labels.update((label.key, label) for label in new)
            bar.update(len(new))

        judge.judge(left, keep)
    assert labels.keys() == samples.keys(), f"{len(labels)} labels of {len(samples)} samples"
    write_labels(path, (labels[key] for key in samples))
    return labels


def _sum_up(
    layout: Layout,
    name: str,
    judge: Judge,
    evaluation: Evaluation,
    samples: Mapping[str, _Sample],
    labels: Mapping[str, Label],
    *,
    is_open: bool,
    command: str,
) -> LabelSummary:
    rated = [Rated(labels[key], one.question_id, one.groups, one.is_invented) for key, one in samples.items()]
    return LabelSummary(
        name=name,
        config=layout.config,
        judge=judge.name,
        prompt_sha256=judge.prompt_sha256,
        settings=judge.settings,
        labels_sha256=sha256_file(layout.labels(name)),
        num_samples=len(labels),
        num_failures=sum(label.failure is not None for label in labels.values()),
        is_open=is_open,
        rates=rates_of(rated, evaluation.what),
        definitions=definitions(evaluation.what),
        command=command,
    )


def _say_what_would_be(layout: Layout, evaluation: Evaluation, judge: JudgeConfig) -> None:
    """A dry run: what would be judged, by whom."""
    if layout.plan.exists():
        samples, is_open = _read_samples(layout, evaluation)
        there = f"{len(samples)} answers of {layout.config}{', which is not finished,' if is_open else ''}"
    else:
        there = f"the answers of {layout.config}, of which there are none yet,"
    print(f"would judge     {there} by {judge.judge}")
    print(f"labels          {summary_path(layout, '*').parent} (nothing was written)")


def _file_name(text: str) -> str:
    """A judge as the name of a file: the last part of its name, and a hash of the whole."""
    last = re.sub(r"[^A-Za-z0-9.]+", "-", text.rstrip("/").rpartition("/")[2]).strip("-.")[-60:] or "judge"
    return f"{last}-{sha256_text(text)[:8]}"
