"""The card: manifests in, README.md text out. Pure; placeholders are filled in cards/*.md.j2, which hold no logic.

    ---
    YAML       what the Hub and `datasets` read: licence, tags, configurations, features, counts, sizes
    ---
    # title, table of the configurations
    <!-- yours: begin -->
               the person's own Markdown, kept from version to version (`own_section` reads it back)
    <!-- yours: end -->
    body       how to load it; what is inside; each configuration: labels, figures, tensors, making, verification;
               known limits; citation

The YAML head declares two configurations for each of ours, both WebDataset, because `datasets` opens a whole
repository with one module: `<config>_records` (the records alone; the first one is the default) and `<config>` (records
and tensors). Features are declared, because those that `datasets` infers from five samples lose data silently. Globs
match the manifest's shards and no other number, so that shards of a release that is just being uploaded stay unseen.
"""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

import jinja2
import msgspec
import pyarrow as pa
import yaml
from msgspec import UNSET

from tracekit.axes import LEGEND
from tracekit.card.escaping import Markdown, cell, code, escaped, fence, finalize, prose, python
from tracekit.card.figures import figures_of
from tracekit.errors import ConfigError, DatasetError, TracekitError
from tracekit.format.labels import LabelSummary
from tracekit.format.layout import records_tar_path, shard_name
from tracekit.format.manifest import Manifest, ShardInfo
from tracekit.records import RecordSchema
from tracekit.sizes import filesize
from tracekit.task import Task, about_of, find_task

__all__ = [
    "MADE_KEYS",
    "CardSettings",
    "card_features",
    "card_template",
    "own_section",
    "render_card",
    "settings_of",
    "shard_globs",
    "split_card",
    "task_part",
]

_BEGIN, _END = "<!-- yours: begin -->", "<!-- yours: end -->"
_HEAD = re.compile(r"\A---[ \t]*\n(.*?)^---[ \t]*$", re.DOTALL | re.MULTILINE)
_INVITATION = (
    "*What is this for, and what did you find? Write it here, between the two comment markers in README.md: this part "
    "is yours and stays as it is when tracekit renders the card again.*"
)
_MADE_TITLE = "Traces of "
_PLAIN = ("license", "language", "pretty_name")
_MADE_LISTS = ("tags", "task_categories", "base_model", "source_datasets")
"""Keys whose entries follow from the manifests, and that a person may add entries to or take entries from."""
MADE_KEYS = ("size_categories", "configs", "dataset_info")
"""Keys that follow from the manifests alone: `datasets` reads shards and counts by them."""
_HIDDEN_STATES = "hidden-states"
_SIZES = ("1K", "10K", "100K", "1M", "10M", "100M", "1B")  # from 1,000 on, each ten times the one before
_TAGS = ("tracekit", "interpretability", "activations", "webdataset")
_AGENT_TRACES = "agent-traces"  # on the Hub these are sessions of agents, with a viewer of their own
_DEMO = ("SmolLM2-135M-Instruct", "HuggingFaceTB/SmolLM2-135M-Instruct")  # its package is no repository on the Hub
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+", re.ASCII)
_COMMIT = re.compile(r"[0-9a-f]{40}")
_HUB = "https://huggingface.co"
_CURRENT = "str(Path.cwd())"  # datasets 5.2 names a dataset after its folder and fails on "."


class CardSettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a card says that no manifest knows."""

    license: str | list[str] = "unknown"
    """Licence, as the Hub names it (`apache-2.0`, `cc-by-4.0`, `unknown`)."""
    language: list[str] = msgspec.field(default_factory=lambda: ["en"])
    """Languages of the texts, ISO 639 codes."""
    pretty_name: str | None = None
    """Title; made from the models by default."""
    tags: list[str] = []
    """Tags besides tracekit's own."""
    added: dict[str, list[str]] = {}
    """Entries that a person added to other lists of the head, as `task_categories`, by key."""
    removed: dict[str, list[str]] = {}
    """Entries that a person took out of lists of the head, by key."""
    section: str | None = None
    """The person's own Markdown; None leaves an invitation to write some."""
    extra: dict[str, Any] = {}
    """Further keys of the head, as `extra_gated_prompt`; kept as they are."""


def render_card(
    manifests: Sequence[Manifest],
    schemas: Mapping[str, RecordSchema],
    *,
    here: str = ".",
    version: str | None = None,
    settings: CardSettings = CardSettings(),  # noqa: B008 - frozen
    has_figures: bool = False,
    labels: Sequence[LabelSummary] = (),
) -> str:
    """The card of a dataset of these configurations.

    Args:
        manifests: Its configurations; records of the first are the default.
        schemas: Schema of the records of each, by the configuration's name.
        here: What `load_dataset` is to be given: `owner/name` on the Hub, or a folder (`.`, `./name`, `/path`).
        version: Tag on the Hub that every line for loading names.
        settings: What no manifest knows.
        labels: Label sets that lie beside the card.
        has_figures: Whether the figures that `tracekit.card.figures.draw` makes lie beside the card.

    Raises:
        ConfigError: a setting would spoil the card.
        DatasetError: there is no manifest, or one lists no records tar.
    """
    if not manifests:
        raise DatasetError("a card needs at least one finished configuration, there is none; finish a run first")
    section = (settings.section or _INVITATION).strip()
    if _BEGIN in section or _END in section:
        raise ConfigError(
            f"card section: it holds {_BEGIN} or {_END}, which mark where it starts and ends; take it out"
        )
    title = settings.pretty_name or _MADE_TITLE + ", ".join(sorted({m.model.id for m in manifests}))
    parts = {m.config: task_part(m, find_task(m.task)) if m.card is UNSET else m.card for m in manifests}
    if any(marker in part for part in parts.values() for marker in (_BEGIN, _END)):
        raise DatasetError(f"a manifest's part of the card holds {_BEGIN} or {_END}; run `tracekit verify` on it")
    with _telling(manifests):
        text = (
            _environment()
            .get_template("base.md.j2")
            .render(
                title=title,
                manifests=[
                    _for_template(manifest, labels, has_figures=has_figures)
                    | {"part": Markdown(parts[manifest.config])}
                    for manifest in manifests
                ],
                writing=[manifest for manifest in manifests if _generates(manifest)],
                int8=[manifest for manifest in manifests if (manifest.model.quantization or "").startswith("int8")],
                tasks=_tasks(manifests, schemas),
                load=_loading(manifests, here, version),
                legend=LEGEND,
                section=Markdown(section),
                begin=Markdown(_BEGIN),
                end=Markdown(_END),
                bibtex=_bibtex(title, here, version),
            )
        )
        metadata = _metadata(manifests, schemas, settings, title)
    head = yaml.safe_dump(metadata, sort_keys=False, allow_unicode=True, width=1000)
    return f"---\n{head}---\n\n{text.rstrip()}\n"


def settings_of(card_text: str, manifests: Sequence[Manifest] = ()) -> CardSettings:
    """What a card says that no manifest knows; the defaults where it says nothing.

    `manifests` are those that the card was made from: what they do not explain is a person's doing. Without them
    nobody can tell, and lists other than `tags` are left out.

    Raises:
        DatasetError: its head is not YAML, or holds something else than the Hub allows there.
    """
    head, _ = split_card(card_text)
    kept = {key: head[key] for key in _PLAIN if head.get(key) is not None}
    if isinstance(kept.get("language"), str):  # the Hub takes one alone for a list of one
        kept["language"] = [kept["language"]]
    if str(kept.get("pretty_name", "")).startswith(_MADE_TITLE):  # nobody's choice: made from the models
        del kept["pretty_name"]
    made = _made_lists(manifests, CardSettings()) if manifests and head else {}
    if made and head.get("language") is None:
        kept["language"] = []
    added: dict[str, Any] = {}
    removed: dict[str, Any] = {}
    for key in _MADE_LISTS if made else ("tags",):
        entries, ours = head.get(key) or [], made.get(key, [])
        entries = [entries] if isinstance(entries, str) else entries
        known = (*_TAGS, _HIDDEN_STATES, *ours) if key == "tags" else ours
        is_list = isinstance(entries, list)
        added[key] = [one for one in entries if one not in known] if is_list else entries  # what is none is refused
        removed[key] = [one for one in ours if one not in entries]
    kept["tags"] = added.pop("tags")
    kept["added"], kept["removed"] = ({k: v for k, v in one.items() if v} for one in (added, removed))
    extra = {key: value for key, value in head.items() if key not in (*_PLAIN, *_MADE_LISTS, *MADE_KEYS)}
    try:
        return msgspec.convert({"section": own_section(card_text), "extra": extra, **kept}, CardSettings)
    except msgspec.ValidationError as error:
        raise DatasetError(f"the head of the card (README.md): {error}; mend it") from error


def split_card(card_text: str) -> tuple[dict[Any, Any], str]:
    """Head and body of a card.

    Raises:
        DatasetError: its head is not YAML, or no mapping.
    """
    text = card_text.replace("\r\n", "\n")
    match = _HEAD.match(text)
    if match is None:
        return {}, text
    try:
        head = yaml.safe_load(match[1])
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # a date that is none; lists too deep
        raise DatasetError(f"the head of the card (README.md) is not YAML: {error}; mend it") from error
    if head is not None and not isinstance(head, dict):
        raise DatasetError("the head of the card (README.md) is no mapping of names to values; mend it")
    return head or {}, text[match.end() :]


def own_section(card_text: str) -> str | None:
    """The person's own part of a card; None where there is none, or only the invitation to write it."""
    body = _HEAD.sub("", card_text.replace("\r\n", "\n"), count=1)
    found = re.search(rf"^{_BEGIN}[ \t]*\n(.*?)^{_END}", body, re.DOTALL | re.MULTILINE)
    text = found[1].strip() if found else ""
    return text if text not in ("", _INVITATION) else None


def card_features(schema: RecordSchema, *, with_tensors: bool) -> list[dict[str, Any]]:
    """Features of a configuration as the card declares them."""
    features: list[dict[str, Any]] = [{"name": "json", "struct": _struct_features(schema.arrow)}]
    if with_tensors:
        features.append({"name": "safetensors", "dtype": "binary"})
    return [*features, {"name": "__key__", "dtype": "string"}, {"name": "__url__", "dtype": "string"}]


def shard_globs(config: str, split: str, shards: Sequence[ShardInfo]) -> list[str]:
    """Patterns that match exactly these shards of a split and no other number.

    shards 0 to 12      data/c/train-0000[0-9].tar, data/c/train-0001[0-2].tar
    shards 3 and 7      data/c/train-00003.tar, data/c/train-00007.tar
    """
    folder = f"data/{config}/"
    names = {shard.name for shard in shards if shard.split == split}
    count = len(names)
    if names != {shard_name(split, number) for number in range(count)} or len(shard_name("", count)) > 6:
        return [f"{folder}{name}.tar" for name in sorted(names)]
    prefix = shard_name(split, 0)[:-5]
    digits = f"{count:05d}"
    globs: list[str] = []
    for place, digit in enumerate(digits):  # [0, count): for each digit, the numbers that are smaller from there on
        if digit != "0":
            smaller = "0" if digit == "1" else f"[0-{int(digit) - 1}]"
            globs.append(f"{folder}{prefix}{digits[:place]}{smaller}{'[0-9]' * (len(digits) - place - 1)}.tar")
    return globs


@cache
def _environment() -> jinja2.Environment:
    packaged = Path(str(files("tracekit"))) / "cards"  # in a wheel; in a checkout they lie beside the package
    folder = packaged if packaged.is_dir() else packaged.parent.parent / "cards"
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(str(folder)),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        autoescape=False,  # noqa: S701 - Markdown, not HTML: `finalize` escapes it
        finalize=finalize,
    )
    environment.filters |= {one.__name__: one for one in (cell, code, fence, filesize, prose, python)}
    environment.filters["markdown"] = Markdown
    return environment


def _tasks(manifests: Sequence[Manifest], schemas: Mapping[str, RecordSchema]) -> list[dict[str, Any]]:
    """Each task, with the fields of the records of its first configuration."""
    first: dict[str, str] = {}
    for manifest in manifests:
        first.setdefault(manifest.task, manifest.config)
    return [
        {"name": name, "fields": {field: prose(doc) for field, doc in schemas[config].docs.items()}}
        for name, config in first.items()
    ]


def card_template(task: Task[Any, Any] | None) -> jinja2.Template:
    """The card's part about a configuration: the task's, or one that names the task alone.

    Raises:
        ConfigError: the task's cannot be read.
    """
    name, card = (None, None) if task is None else (task.name, task.card)
    try:
        if isinstance(card, Path):
            return _environment().from_string(card.read_text(encoding="utf-8"))
        return _environment().get_template(card or "task.md.j2")
    except jinja2.TemplateNotFound as error:
        raise ConfigError(
            f"task {name!r}: card={card!r} is no template of tracekit; give the Path of a file of your own"
        ) from error
    except (OSError, UnicodeDecodeError, jinja2.TemplateError) as error:
        line = f", line {error.lineno}" if isinstance(error, jinja2.TemplateSyntaxError) else ""
        raise ConfigError(f"task {name!r}: its card {str(card)!r}{line} cannot be used: {error}; mend it") from error


def task_part(manifest: Manifest, task: Task[Any, Any] | None) -> str:
    """The card's part about a configuration as its task words it, for the manifest.

    Raises:
        ConfigError: the task's template cannot be read.
        DatasetError: it asks for what the manifest does not have.
    """
    template = card_template(task)
    with _telling([manifest]):
        return template.render(m=_for_template(manifest, (), has_figures=False)).strip()


@contextmanager
def _telling(manifests: Sequence[Manifest]) -> Iterator[None]:
    """Name the manifests that no card can be made of."""
    try:
        yield
    except TracekitError:
        raise
    except (jinja2.TemplateError, LookupError, TypeError, ValueError, AttributeError) as error:  # `run` has no types
        names = ", ".join(repr(manifest.config) for manifest in manifests)
        raise DatasetError(
            f"no card can be made of the manifests of {names}; one lacks what a run writes, or the `card` of its task "
            f"asks for more: {error}"
        ) from error


def _for_template(manifest: Manifest, labels: Sequence[LabelSummary], *, has_figures: bool) -> dict[str, Any]:
    """A manifest and every text about it that has a condition in it."""
    figures, replayed = manifest.figures, manifest.verification
    num_samples = sum(split.num_samples for split in manifest.splits)
    num_bytes = sum(split.num_bytes for split in manifest.splits)
    judged = figures.num_right + figures.num_wrong
    return {
        **{name: getattr(manifest, name) for name in manifest.__struct_fields__},
        "num_samples": num_samples,
        "num_bytes": num_bytes,
        "bytes_per_sample": num_bytes / max(1, num_samples),
        "title": about_of(manifest).title,
        "model_link": _link(manifest.model.id, None, ""),
        "decoding": _decoding(manifest.run),
        "balance": f"Class balance: {figures.num_right} right, {figures.num_wrong} wrong, which is "
        f"{100 * figures.num_right / judged:.1f} % right."
        if judged
        else "",
        "drawn": figures_of(manifest) if has_figures else [],
        "label_sets": [_label_set(summary) for summary in labels if summary.config == manifest.config],
        "making": _making(manifest),
        "commands": [manifest.command] if manifest.command else [],
        "run_json": json.dumps(manifest.run, indent=1, ensure_ascii=False),
        "replays": f"{replayed.num_replayed} samples were run again alone, unpadded, in plain eager transformers"
        + (f"; {replayed.agreement()}." if replayed.agreement() else ".")
        if replayed.num_replayed
        else "No sample was replayed (`num_replays = 0`).",
    }


def _label_set(summary: LabelSummary) -> dict[str, Any]:
    """A label set for the template: its rates over all samples, in words."""
    whole = [rate for rate in summary.rates if rate.group is None and rate.value is not None]
    rates = [f"{escaped(r.name)} {r.value:.3f} [{r.low:.3f}, {r.high:.3f}] ({r.count} of {r.num})" for r in whole]
    counted = f"{summary.num_samples} samples, {summary.num_failures} without a label"
    return {
        "name": summary.name,
        "judge": summary.judge,
        "counted": counted,
        "rates": Markdown("; ".join(rates) or "none"),
        "command": summary.command,
    }


def _decoding(run: dict[str, Any]) -> str:
    """How answers were decoded, in words."""
    if "generation" not in run:
        return "as each request asked, see `generation` of its record"
    generation = run["generation"]
    beams, more = generation.get("num_beams", 1), generation.get("num_samples", 1) - 1
    words = f"beam search, {beams} beams" if beams > 1 else "greedy"
    if run.get("do_sample"):
        top_k = f", top_k {generation['top_k']}" if generation["top_k"] else ""
        words = f"sampled at temperature {generation['temperature']:g}, top_p {generation['top_p']:g}{top_k}"
    words += f", at most {generation.get('max_new_tokens', '?')} new tokens"
    if more > 0:
        words += (
            f"; {more} more answers sampled at temperature {generation['temperature']:g}, top_p {generation['top_p']:g}"
        )
    return words


def _generates(manifest: Manifest) -> bool:
    """Whether the model wrote anything."""
    return any(metric.name == "mean_answer_tokens" for metric in manifest.metrics)


def _making(manifest: Manifest) -> list[tuple[str, str]]:
    """How a configuration was made, row by row."""
    model, source, run = manifest.model, manifest.source, manifest.run
    prompt, capture = run.get("prompt", {}), run.get("capture", {})
    templates = ", ".join(code(sha) for sha in manifest.templates)
    subset = f", {escaped(source.subset)}" if source.subset else ""
    rows = [
        ("model", Markdown(f"{_link(model.id, model.revision, '')}, {escaped(f'{model.variant}, {model.dtype}')}")),
        ("model revision", code(model.revision)),
        ("adapter", code(model.adapter) if model.adapter else "none"),
        ("quantisation", model.quantization or "none"),
        ("source", Markdown(_link(source.id, source.revision, "datasets/") + subset)),
        ("source revision", code(source.revision)),
        ("rows", f"split {source.split}: {source.num_used} of {source.num_rows} used, {source.left_out}"),
        *(
            (name.replace("_", " "), Markdown(", ".join(code(one) for one in made)))
            for name, made in manifest.made_from.items()
        ),
        ("prompt template", Markdown(f"chat template, SHA-256 {templates}") if templates else "none: a plain prompt"),
        ("solved examples", str(prompt.get("num_shots", 0))),
        ("answers", _decoding(run) if _generates(manifest) else "nothing is generated"),
        ("captured", f"layers {' '.join(capture.get('layers', ['?']))}, tokens: {capture.get('tokens', 'all')}"),
        ("attention", f"{model.attention} in the capture pass"),
        ("device", manifest.device_type),
        ("versions", ", ".join(f"{name} {version}" for name, version in manifest.versions.items())),
    ]
    return [(name, text) for name, text in rows if text]


def _link(identity: str, revision: str | None, kind: str) -> Markdown:
    """A Hub id as a link, at its commit where it is known; anything else as it stands."""
    hub_id = _DEMO[1] if identity == _DEMO[0] else identity
    if not _HUB_ID.fullmatch(hub_id):
        return code(identity)
    tree = f"/tree/{revision}" if revision and _COMMIT.fullmatch(revision) else ""
    return Markdown(f"[{identity}]({_HUB}/{kind}{hub_id}{tree})")


def _is_hub(here: str) -> bool:
    return _HUB_ID.fullmatch(here) is not None


def _loading(manifests: Sequence[Manifest], here: str, version: str | None) -> dict[str, str]:
    """What stands in the lines for loading."""
    first = manifests[0]
    config, split = first.config, first.splits[0].name
    revision = f", revision={python(version)}" if version else ""
    store = f"hf://datasets/{here}{f'@{version}' if version else ''}" if _is_hub(here) else here
    script = f"load_dataset({python(f'{here}/load_traces.py')}, {python(config)}, trust_remote_code=True)"
    if _is_hub(here):
        script = (
            f'folder = snapshot_download({python(here)}, repo_type="dataset"{revision})\n'
            f'load_dataset(f"{{folder}}/load_traces.py", {python(config)}, trust_remote_code=True)'
        )
        script = f"from huggingface_hub import snapshot_download\n\n{script}"
    others = ", ".join(code(manifest.config) for manifest in manifests[1:])
    return {
        "here": here,
        "quoted": Markdown(_CURRENT) if here == "." else python(here),
        "also": Markdown("\nfrom pathlib import Path") if here == "." else "",
        "config": config,
        "revision": Markdown(revision),
        "table": f"records/{config}/{split}.parquet",
        "store": store,
        "read": _reading(first),
        "shards": f"{store}/data/{config}/{_braces(first, split)}.tar",
        "script": Markdown(f"from datasets import load_dataset\n{script}"),
        "others": Markdown(f"; likewise {others}") if others else "",
    }


def _reading(manifest: Manifest) -> Markdown:
    """A line that reads one thing of one sample."""
    names = [tensor.name for tensor in manifest.tensors]
    if "hidden_states" in names:
        layers = manifest.figures.layers or [0]
        return Markdown(
            f"hidden = store.hidden_states(key, layer={layers[len(layers) // 2]})  # (T, D): these bytes and no others"
        )
    if names:
        return Markdown(f"values = store.tensor(key, {python(names[0].partition('.')[0])})")
    return Markdown("record = store.record(key)")


def _braces(manifest: Manifest, split: str) -> str:
    """The shards of a split in the notation of webdataset."""
    numbers = sorted(shard.number for shard in manifest.shards if shard.split == split)
    if len(numbers) == 1:
        return shard_name(split, numbers[0])
    span = f"{numbers[0]:05d}..{numbers[-1]:05d}"
    is_whole = numbers == list(range(numbers[0], numbers[-1] + 1))
    return f"{split}-{{{span if is_whole else ','.join(f'{number:05d}' for number in numbers)}}}"


def _bibtex(title: str, here: str, version: str | None) -> str:
    owner, _, name = here.partition("/") if _is_hub(here) else ("", "", "")
    plain = re.sub(r"([#$%&_{}])", r"\\\1", " ".join(title.split()).replace("\\", "/"))
    lines = [f'  title = "{{{plain}}}"']
    lines += [f'  author = "{{{owner}}}"', f"  howpublished = {{\\url{{{_HUB}/datasets/{here}}}}}"] if owner else []
    lines.append(f"  note = {{{f'Version {version}. ' if version else ''}Recorded with tracekit}}")
    key = re.sub(r"\W+", "_", f"{owner}_{name}" if owner else title).strip("_").lower()
    return f"@misc{{{key},\n" + ",\n".join(lines) + "\n}"


def _metadata(
    manifests: Sequence[Manifest], schemas: Mapping[str, RecordSchema], settings: CardSettings, title: str
) -> dict[str, Any]:
    """The YAML head."""
    if _AGENT_TRACES in settings.tags:
        raise ConfigError(
            f"card tag {_AGENT_TRACES!r}: on the Hub it means logs of agents, not activations; take it out"
        )
    configs, infos = [], []
    for manifest in manifests:
        for suffix in ("_records", ""):
            configs.append(_config(manifest, suffix) | ({} if configs else {"default": True}))
            infos.append(_info(manifest, schemas[manifest.config], suffix))
    lists = _made_lists(manifests, settings)
    head = {
        "license": settings.license,
        "language": settings.language,
        "pretty_name": title,
        "tags": lists.pop("tags"),
        "size_categories": [_size_category(sum(s.num_samples for m in manifests for s in m.splits))],
        **lists,
        "configs": configs,
        "dataset_info": infos,
    }
    return {key: value for key, value in head.items() if value != []} | settings.extra


def _made_lists(manifests: Sequence[Manifest], settings: CardSettings) -> dict[str, list[str]]:
    """Lists of the head that follow from the manifests, with what a person added and took out."""
    tensors = {tensor.name.partition(".")[0] for manifest in manifests for tensor in manifest.tensors}
    tasks = list(dict.fromkeys(manifest.task for manifest in manifests))
    hidden = ["hidden-states"] if "hidden_states" in tensors else []
    models = dict.fromkeys(_DEMO[1] if m.model.id == _DEMO[0] else m.model.id for m in manifests)
    lists = {
        "tags": list(dict.fromkeys([*_TAGS, *hidden, *tasks, *settings.tags])),
        "task_categories": sorted({category for m in manifests if (category := about_of(m).category)}),
        "base_model": [model for model in models if _is_hub(model)],
        "source_datasets": [source for source in dict.fromkeys(m.source.id for m in manifests) if _is_hub(source)],
    }
    for key, entries in lists.items():
        kept = [one for one in entries if one not in settings.removed.get(key, ())]
        lists[key] = list(dict.fromkeys([*kept, *settings.added.get(key, ())]))
    return lists


def _size_category(total: int) -> str:
    """How many samples, as the Hub says it."""
    place = max(0, len(str(total)) - 3)
    if place >= len(_SIZES):
        return f"n>{_SIZES[-1]}"
    return f"{_SIZES[place - 1]}<n<{_SIZES[place]}" if place else f"n<{_SIZES[0]}"


def _config(manifest: Manifest, suffix: str) -> dict[str, Any]:
    """A configuration for `datasets`: which files, split by split."""
    data_files: list[dict[str, Any]] = []
    for split in manifest.splits:
        paths = (
            [_records_tar(manifest, split.name)]
            if suffix
            else shard_globs(manifest.config, split.name, manifest.shards)
        )
        data_files.append({"split": split.name, "path": paths[0] if len(paths) == 1 else paths})
    return {"config_name": manifest.config + suffix, "data_files": data_files}


def _info(manifest: Manifest, schema: RecordSchema, suffix: str) -> dict[str, Any]:
    """Features, counts and sizes of a configuration; `datasets` checks the counts."""
    sizes = {file.path: file.num_bytes for file in manifest.files}
    splits: list[dict[str, Any]] = []
    for split in manifest.splits:
        path = _records_tar(manifest, split.name)
        if suffix and path not in sizes:
            raise DatasetError(f"manifest of {manifest.config!r} lists no {path}; delete it and finish the run again")
        num_bytes = sizes[path] if suffix else split.num_bytes
        splits.append({"name": split.name, "num_bytes": num_bytes, "num_examples": split.num_samples})
    total = sum(split["num_bytes"] for split in splits)
    return {
        "config_name": manifest.config + suffix,
        "features": card_features(schema, with_tensors=not suffix),
        "splits": splits,
        "download_size": total,
        "dataset_size": total,
    }


def _records_tar(manifest: Manifest, split: str) -> str:
    return records_tar_path(manifest.config, split)


def _struct_features(fields: Any) -> list[dict[str, Any]]:
    return [{"name": field.name, **_feature(field.type)} for field in fields]


def _feature(arrow_type: pa.DataType) -> dict[str, Any]:
    """One Arrow type in the card's notation."""
    if pa.types.is_list(arrow_type):
        inner = _feature(arrow_type.value_type)
        return {"list": inner.get("dtype", inner.get("struct", inner))}
    if pa.types.is_struct(arrow_type):
        return {"struct": _struct_features(arrow_type.fields)}
    names = {"double": "float64"}
    return {"dtype": names.get(str(arrow_type), str(arrow_type))}
