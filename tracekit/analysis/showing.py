"""Showing: what `tracekit show` prints of a dataset, of its samples and of its stats."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec

from tracekit.analysis.outcomes import number_label
from tracekit.analysis.stats import Bar, ConfigStats, NumberStats, range_text
from tracekit.console import out, printable, printable_json
from tracekit.format.labels import rate_lines
from tracekit.format.layout import Layout
from tracekit.format.manifest import Manifest, read_struct
from tracekit.hub import HubPath
from tracekit.read.remote import open_remote
from tracekit.read.store import TraceStore
from tracekit.records import Outcome, Record
from tracekit.sizes import bar, filesize
from tracekit.task import about_of

__all__ = [
    "metric_lines",
    "record_lines",
    "show_config",
    "show_samples",
    "stats_lines",
    "verification_lines",
    "warning_lines",
]

_WIDTH = 100
_LABEL = 42
_MAX_CHARS = 70  # of a text in a line
_OPTION = 48  # of an option or of an output in a line


def metric_lines(manifest: Manifest) -> list[str]:
    """The task's numbers, a line each, accuracy with the rule behind it; and what storing in smaller forms has cost."""
    outcome = about_of(manifest).outcome
    of_correct = {mean.name for mean in outcome.means if mean.field == outcome.correct}
    lines = []
    for metric in manifest.metrics:
        rule = manifest.run.get(outcome.rule or "") if metric.name in of_correct else None
        note = f"  (by {rule})" if rule else ""
        if metric.warn_above is not None and metric.value > metric.warn_above:
            note = f"  ({metric.value:.0%} {metric.warning})"
        lines.append(f"{metric.name:18s} {metric.value:.4g}{note}")
    return lines + [f"{loss.name:18s} stored as {loss.form}: {loss.in_words()}" for loss in manifest.losses]


def warning_lines(manifest: Manifest) -> list[str]:
    """What a person should know before they use the labels: what the task warns of, and labels of one class."""
    lines = [
        f"warning: {metric.value:.0%} {metric.warning}"
        for metric in manifest.metrics
        if metric.warn_above is not None and metric.value > metric.warn_above
    ]
    counts = (manifest.figures.num_right, manifest.figures.num_wrong)
    if sum(counts) > 1 and 0 in counts:
        setting = about_of(manifest).outcome.rule
        rule = manifest.run.get(setting or "")
        other = f", or try another --{setting} than {rule}" if rule else ""
        lines.append(
            f"warning: all {sum(counts)} judged answers are {'wrong' if counts[0] == 0 else 'right'}. A probe needs "
            f"both classes: raise --limit, choose another model{other}"
        )
    return lines


def record_lines(record: Record, outcome: Outcome) -> list[str]:
    """A sample as text for people. Where the answer is a letter that was read from an output: every allowed letter with
    its probability, and what was read. Else a line: key, verdict, what was asked, answer."""
    if outcome.has_letters and outcome.failure is not None:
        return _letter_record_lines(record, outcome)
    is_correct = _field(record, outcome.correct)
    verdict = "" if is_correct is None else "right" if is_correct else "wrong"
    occasions = ", ".join(f"{path.rpartition('.')[2]} {_field(record, path)}" for path in outcome.occasions)
    asked = (f"[{occasions}] " if occasions else "") + " ".join(_asked(record, outcome))
    gold = _text(_labelled(record, outcome, outcome.gold)) if is_correct is not True else ""
    accepted = f"  (accepted: {gold})" if gold else ""
    return [f"{record.key}  {verdict:5s}  {_short(asked)}  ->  {_short(_outcome_text(record, outcome))}{accepted}"]


def _letter_record_lines(record: Record, outcome: Outcome) -> list[str]:
    """Question, every allowed letter with its probability, and what was read from the output."""
    is_correct, answer, gold = (_field(record, path) for path in (outcome.correct, outcome.answer, outcome.gold))
    verdict = "" if is_correct is None else "  right" if is_correct else "  wrong"
    kind, group = (_text(_field(record, path)) for path in (outcome.kind, outcome.group))
    bins = _field(record, outcome.bins) or []
    allowed = [(one.label, range_text(one.low, one.high)) for one in bins]
    allowed = allowed or [(one.label, _short(str(one.text), _OPTION)) for one in _field(record, outcome.options) or []]
    width = max((len(text) for _, text in allowed), default=0)
    lines = [f"{record.key}  {kind}{verdict}" + f"  ({group})" * bool(group), f"  {' '.join(_asked(record, outcome))}"]
    for (label, text), given in zip(allowed, _field(record, outcome.probs) or [], strict=False):
        marks = ", ".join(["answered"] * (label == answer) + ["right"] * (label == gold and not bins))
        prob = given or 0.0
        lines.append(f"    {label}  {text:{width}s}  {bar(prob)} {100 * prob:5.1f} %  {marks}".rstrip())
    read = f"nothing parsed, {_field(record, outcome.failure)}" if answer is None else f"read as {answer}"
    stated = [value for path in outcome.confidences if (value := _field(record, path)) is not None]
    said = [read, *(f"expects {value:.1f} %" for value in stated), *_number_texts(record, outcome)]
    output = "" if not outcome.output else f" {_short(repr(_field(record, outcome.output)), _OPTION)}"
    return [*lines, f"  output{output}: {'; '.join(said)}"]


def _asked(record: Record, outcome: Outcome) -> list[str]:
    """The words of what was asked."""
    return (_text(_field(record, outcome.asked)) or record.prompt).split()


def _number_texts(record: Record, outcome: Outcome) -> Iterator[str]:
    """Its numbers, each with its name and unit."""
    for number in outcome.numbers:
        value = _field(record, number.field)
        if isinstance(value, int | float):
            yield f"{number.name} {value:.4g}{number.unit and ' ' + number.unit}"


def _outcome_text(record: Record, outcome: Outcome) -> str:
    """The answer; of a task without, its first number."""
    if outcome.answer is not None:
        return _text(_labelled(record, outcome, outcome.answer)) or "(no answer)"
    return next(_number_texts(record, outcome), "")


def _labelled(record: Record, outcome: Outcome, path: str | None) -> Any:
    """A field; of a letter also what it stands for."""
    value = _field(record, path)
    options = msgspec.to_builtins(_field(record, outcome.options)) if outcome.options else []
    texts = {one.get("label"): one.get("text") for one in options or []}
    return f"{value} {texts[value]}" if outcome.has_letters and value in texts else value


def _field(record: Record, path: str | None) -> Any:
    """What a record says at a dotted path; None where there is none."""
    value: Any = record
    for name in path.split(".") if path else ():
        value = getattr(value, name, None)
    return None if path is None else value


def _text(value: Any) -> str:
    """A value as text: of a list its first, of a conversation the last message."""
    if isinstance(value, list):
        last = getattr(value[-1], "content", None) if value else ""
        return last if last is not None else _text(value[0])
    return "" if value is None else str(value)


def _short(text: str, width: int = _MAX_CHARS) -> str:
    line = " ".join(text.split())
    return line if len(line) <= width else line[: width - 3] + "..."


def verification_lines(verification: Any) -> list[str]:
    """What replays showed, a line a site."""
    agreed = verification.agreement()
    lines = [
        f"replayed {verification.num_replayed} samples alone in plain eager transformers{agreed and ': ' + agreed}"
    ]
    for error in verification.sites:
        lines.append(
            f"  {error.site:16s} relative error {error.max_rel_error:.1e} (tolerance {error.tolerance:g}), "
            f"cosine {error.min_cosine:.6f}"
        )
    return lines


def show_config(store: TraceStore, num_examples: int) -> None:
    """Print what a configuration holds and its first samples."""
    info = msgspec.to_builtins(store.info())
    facts = {
        "folder": ", ".join(info["paths"]),
        "task": f"{info['task']} ({', '.join(sorted(set(info['configs'])))})" + " - not finished" * info["is_open"],
        "model": "; ".join(_model_text(model) for model in info["models"]),
        "samples": "; ".join(f"{split['num_samples']} in {split['name']}" for split in info["splits"]) or "none yet",
        "size": filesize(info["num_bytes"]),
    }
    for name, text in facts.items():
        out(f"{name:16s} {text}")
    width = max([16, *(len(tensor["name"]) for tensor in info["tensors"])])
    for tensor in info["tensors"]:
        axes = f"({', '.join(tensor['axes'])})"
        out(
            f"{tensor['name']:{width}s} {tensor['dtype']:13s} {axes:16s} {tensor['layout']:7s} "
            f"{filesize(tensor['num_bytes'])}"
        )
    for path, config in zip(info["paths"], info["configs"], strict=False):
        hub = HubPath.parse(path)
        manifest = Layout(open_remote(hub, config).root if hub else Path(path), config).manifest
        if manifest.exists():
            out("\n".join(metric_lines(read_struct(manifest, Manifest))))
    out()
    for key in store.keys[:num_examples]:
        lines = record_lines(store.record(key), store.about.outcome)
        out("\n".join(lines))
        if len(lines) > 1:
            out()


def _model_text(model: dict[str, Any]) -> str:
    extras = [model["dtype"], model["quantization"], model["adapter"] and f"adapter {model['adapter']}"]
    return f"{model['id']} at {model['revision'][:23]}, {', '.join(extra for extra in extras if extra)}"


def show_samples(records: list[Record], outcome: Outcome, *, as_json: bool) -> None:
    """Print every field of some samples."""
    if as_json:
        built = msgspec.to_builtins(records[0] if len(records) == 1 else records)
        out(printable_json(json.dumps(built, indent=2, ensure_ascii=False)))
        return
    for record in records:
        out("\n".join(record_lines(record, outcome)))
        for name in msgspec.structs.fields(type(record)):
            value = getattr(record, name.name)
            if name.name == "tensors":
                for spec in value:
                    out(f"  {spec.name:16s} {spec.dtype:9s} {spec.shape} ({', '.join(spec.axes)}) {spec.layout}")
            elif name.name not in ("model", "generation"):
                text = json.dumps(msgspec.to_builtins(value), ensure_ascii=False)
                out(f"{name.name:20s} {text if len(text) <= _WIDTH else text[: _WIDTH - 3] + '...'}")


def stats_lines(one: ConfigStats) -> list[str]:
    """The stats of a configuration as aligned text."""
    lines = [
        f"{one.config} ({one.task}): {one.num_samples} samples, {filesize(one.num_bytes)}, "
        + ", ".join(one.models)
        + " - not finished" * one.is_open
    ]
    if one.num_extra:
        lines.append(_row("drawn answers, in no number below", f"{one.num_extra}"))
    if one.accuracy is not None:
        lines.append(_row("accuracy", f"{one.accuracy:.4g}  of {one.num_judged} judged answers"))
    if one.accuracy_most_probable is not None:
        lines.append(_row("accuracy of the most probable letter", f"{one.accuracy_most_probable:.4g}"))
    if one.letters:
        reasons = "; ".join(f"{failure.value}: {failure.count}" for failure in one.failures)
        lines.append(_row("nothing parsed", f"{one.num_without_answer}{reasons and f'  ({reasons})'}"))
    lines += _calibration_lines(one)
    lines += [_mean_line(one, mean) for mean in one.means]
    if one.asked_for is not None and one.num_without_answer == one.num_samples - one.num_extra:
        lines.append(_row(number_label("stated_confidence", one.confidence_name), "-  (none parsed)"))
    for name, lengths in (("prompt tokens", one.prompt_tokens), ("generated tokens", one.answer_tokens)):
        if lengths is not None and lengths.longest:
            lines.append(_row(name, f"{lengths.mean:.4g}  ({lengths.shortest} to {lengths.longest})"))
    if one.confidence:
        lines += ["", *_confidence_lines(one.confidence, one.confidence_name)]
    if one.letters and not _is_asked(one.confidence):  # else the bins' letters are counted there
        lines += ["", *_letter_lines(one)]
    if one.subjects:
        lines += ["", _row("accuracy by subject", "")]
        width = max(len(subject.subject) for subject in one.subjects)
        for subject in one.subjects:
            share = "    -" if subject.accuracy is None else f"{bar(subject.accuracy)} {subject.accuracy:5.3f}"
            lines.append(f"    {subject.subject:{width}s}  {share}  of {subject.num}")
    if one.report_lines:
        lines += ["", *one.report_lines]
    if one.metrics and one.accuracy is None and not one.confidence:
        lines += [_row(metric.name, f"{metric.value:.4g}") for metric in one.metrics]
    for summary in one.labels:
        lines += ["", *(f"  {line}" for line in rate_lines(summary))]
    return [printable(line.rstrip()) for line in lines]


def _row(name: str, text: str) -> str:
    return f"  {name:{_LABEL - 2}s} {text}"


def _mean_line(one: ConfigStats, mean: NumberStats) -> str:
    what = " parsed" if mean.name == "stated_confidence" else ""
    count = f"of {mean.num}{what}, " if what or mean.num < one.num_samples - one.num_extra else ""
    return _row(
        number_label(mean.name, one.confidence_name, mean.unit), f"{mean.mean:.4g}  ({count}std {mean.std:.3g})"
    )


def _calibration_lines(one: ConfigStats) -> list[str]:
    found = one.calibration
    note = one.calibration_note or ""
    if found is None:
        return [_row("calibration", f"none: {note}")] if one.confidence else []
    area = "-" if found.auroc is None else f"{found.auroc:.3f}"
    return [
        f"  calibration against {one.calibration_against}",
        f"    ECE {found.ece:.3f} ({len(found.bins)} bins of equal width), Brier {found.brier:.3f}, AUROC {area} over "
        f"{found.num}{note and f'; {note}'}",
    ]


def _confidence_lines(bars: list[Bar], name: str) -> list[str]:
    total = sum(one.num_expected for one in bars)
    asked = _is_asked(bars)
    width = max(len(one.label) for one in bars)
    if asked:
        titles = f"{'expected in bin':>27s}{'answered':>10s}{'mean prob.':>12s}"
        lines = [f"  {'confidence':{width + 2}s}  {titles}"]
    else:
        lines = [f"  samples by {name}"]
    for one in bars:
        mean = "-" if one.mean_probability is None else f"{one.mean_probability:.3f}"
        more = "" if one.num_answered is None else f"{one.num_answered:>10d}{mean:>12s}"
        lines.append(f"    {one.label:{width}s}  {bar(one.num_expected / total)} {one.num_expected:>6d}{more}")
    return lines


def _is_asked(bars: list[Bar]) -> bool:
    """Whether the model was asked for its confidence, so that a letter is a bin."""
    return any(one.num_answered is not None for one in bars)


def _letter_lines(one: ConfigStats) -> list[str]:
    """Answers by letter, beside how often each was the right one."""
    total = sum(letter.num_answered for letter in one.letters) or 1
    lines = [f"  {'answers by letter':20s}{'answered':>12s}{'most probable':>16s}{'right':>8s}"]
    for letter in one.letters:
        probable = "-" if letter.num_most_probable is None else str(letter.num_most_probable)
        right = "-" if letter.num_right is None else str(letter.num_right)
        share = bar(letter.num_answered / total)
        lines.append(f"    {letter.letter}  {share}{letter.num_answered:>7d}{probable:>16s}{right:>8s}")
    return lines
