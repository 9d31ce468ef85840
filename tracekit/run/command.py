"""The command that makes a dataset again: every flag that is not at its default, quoted to be pasted.

A command is made of the checked configuration, so `--config` files and flags give the same one. `--out` is left to
whoever types it, and so is what shapes nothing of the dataset: publishing, the engine, `--dry-run` and `--force-run`.
Local files stand in it as `name@sha256:HASH`, local models by their name; `tracekit.config.check` takes the file of
that hash back, or says which file it needs.

A stage that runs no model (`questions`) can be run in a command of its own, before the others. It keeps what it was
asked for, as `asked`, in its summary; the command of the dataset then does both stages. Where one command cannot say
both (two seeds, say), the dataset has two commands, a line each.
"""

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from tracekit.config import RunConfig
from tracekit.errors import ConfigError, DatasetError
from tracekit.flags import flag_words, settings_of
from tracekit.format.layout import Layout
from tracekit.format.manifest import read_growth, read_plan
from tracekit.format.shards import sha256_file

__all__ = [
    "asked",
    "command_line",
    "growth_note",
    "joined_command",
    "named_file",
    "named_model",
    "stage_asked",
    "stage_line",
    "with_out",
]

ConfigT = TypeVar("ConfigT", bound=RunConfig)

_LEFT_OUT = ("publish.", "cluster.", "output.out", "output.dry_run", "output.force_run", "model.offload_folder")
"""What shapes nothing of a dataset, or is a path of this machine."""
_FILES = ("source.source", "prompt.chat_template")
_MODELS = ("model.model", "model.model_path", "model.adapter")


def named_file(path: str) -> str:
    """A local file as it is written down.

    Raises:
        ConfigError: there is no such file.
    """
    file = Path(path).expanduser()
    if not file.is_file():
        raise ConfigError(f"no such file: {path!r}")
    return f"{file.name}@sha256:{sha256_file(file)}"


def named_model(model: str) -> str:
    """A model or adapter as it is written down: a local one by its name."""
    path = Path(model).expanduser()
    return path.resolve().name if model != "demo" and path.exists() else model


def asked(config: RunConfig) -> dict[str, Any]:
    """What a configuration asks for beyond its defaults, by path: names in place of local paths."""
    default = settings_of(type(config)())
    found = {path: value for path, value in settings_of(config).items() if not path.startswith(_LEFT_OUT)}
    for path in (*_FILES, *config.local_files):
        given = found.get(path)
        if given is not None and given != default[path] and Path(given).expanduser().is_file():
            found[path] = named_file(given)
    for path in (*_MODELS, *config.local_models):
        found[path] = None if found[path] is None else named_model(found[path])
    found["model.device"] = found["model.device"].partition(":")[0]
    return {path: value for path, value in found.items() if value != default[path]}


def stage_asked(config: RunConfig, stage: str) -> dict[str, Any]:
    """What a configuration asks of one of its stages that run no model, beyond the defaults."""
    return {path: value for path, value in asked(config).items() if _is_read(path, config, stage)}


def stage_line(program: str, config: RunConfig, stage: str) -> str:
    """The command that does one stage that runs no model; empty where the task has no such stage. `program` is
    what runs it, as `Task.command`."""
    if stage not in config.stages_read:
        return ""
    return _line(program, {"stages": [stage], **stage_asked(config, stage)})


def command_line(program: str, config: RunConfig, layout: Layout | None = None) -> str:
    """The command that makes what a run makes. `layout` is the folder, where an earlier stage may have been run."""
    own = asked(config)
    lines = []
    stages: Sequence[str] = getattr(config, "stages", ())
    for stage, earlier in _earlier(config, layout).items():
        if stage in stages:
            continue
        both = {path: value for path, value in own.items() if not _is_read(path, config, stage)} | earlier
        del both["stages"]
        if _recorded(type(config), both) == _recorded(type(config), own):
            own = both
        else:
            lines.append(_line(program, {"stages": [stage], **earlier}))
    order = {path: place for place, path in enumerate(settings_of(config))}
    return "\n".join([*lines, _line(program, dict(sorted(own.items(), key=lambda pair: order[pair[0]])))])


def with_out(command: str, out: str, *, margin: str = "") -> str:
    """A command that does all its runs in one folder; one that names its folders stays as it is.

    `margin` stands before each run, and not inside a quoted text of several lines, which it would change.
    """
    runs = _runs(command)
    return "\n".join(margin + shlex.join(run if "--out" in run else [*run, "--out", out]) for run in runs)


def growth_note(layout: Layout) -> str | None:
    """What is to be said of a configuration that grows; None where it does not."""
    growth = read_growth(layout)
    if growth is None:
        return None
    new = growth.shards[len(read_plan(layout).shards) :]
    sizes = {shard.name: sum(map(len, shard.batches)) for shard in new}
    num_done = sum(size for name, size in sizes.items() if layout.sidecar(name).exists())
    return (
        f"{layout.config} grows: {sum(sizes.values())} more examples are planned, {num_done} of them are in finished "
        f"shards. They join the dataset when all are done. To resume:\n"
        + with_out(growth.command, str(layout.root), margin="    ")
    )


def joined_command(commands: Sequence[str]) -> str:
    """The commands of all parts, each into a folder of its own, and the merge; empty where a part's is not known."""
    if not all(commands):
        return ""
    parts = [part for command in commands for part in _parts(command)]
    folders = [f"part-{number}" for number in range(len(parts))]
    lines = [shlex.join([*run, "--out", folder]) for part, folder in zip(parts, folders, strict=True) for run in part]
    return "\n".join([*lines, shlex.join(["tracekit", "merge", *folders, "--out", "merged"])])


def _line(program: str, settings: Mapping[str, Any]) -> str:
    return shlex.join([*program.split(), *flag_words(settings)])


def _is_read(path: str, config: RunConfig, stage: str) -> bool:
    return any(path == name or path.startswith(f"{name}.") for name in config.stages_read.get(stage, ()))


def _earlier(config: RunConfig, layout: Layout | None) -> dict[str, dict[str, Any]]:
    """What the stage that wrote the questions of a folder was asked for; nothing where none did, or did not say."""
    summary = None if layout is None else layout.questions.with_suffix(".json")
    if "questions" not in config.stages_read or summary is None or not summary.is_file():
        return {}
    found = msgspec.json.decode(summary.read_bytes()).get("asked")
    return {} if found is None else {"questions": found}


def _recorded(config_type: type[RunConfig], settings: Mapping[str, Any]) -> dict[str, Any]:
    """What a dataset would record of a run that is asked for this."""
    whole = msgspec.to_builtins(config_type())
    for path, value in settings.items():
        section, _, key = path.rpartition(".")
        (whole[section] if section else whole)[key] = value
    whole["output"]["out"] = "."
    config = msgspec.convert(whole, config_type)
    recorded = msgspec.to_builtins(config.settled())
    return {name: value for name, value in recorded.items() if name not in config.not_recorded}


def _runs(command: str) -> list[list[str]]:
    """The runs of a command, in words; the last is the merge where it has one.

    Raises:
        DatasetError: it is no command.
    """
    runs: list[list[str]] = []
    try:
        words = shlex.split(command)
    except ValueError as error:
        raise DatasetError(f"the command {command!r} cannot be read: {error}") from error
    for position, word in enumerate(words):
        following = words[position + 1] if position + 1 < len(words) else ""
        is_run = word == "python" and (following == "-m" or following.endswith(".py"))
        if is_run or (word, following) == ("tracekit", "merge"):
            runs.append([])
        if runs:
            runs[-1].append(word)
    return runs


def _parts(command: str) -> list[list[list[str]]]:
    """The runs of a command by the folder that they fill: one folder, or those that were merged before."""
    runs = _runs(command)
    if runs[-1][0] != "tracekit":
        return [runs]
    parts: dict[str, list[list[str]]] = {}
    for run in runs[:-1]:
        parts.setdefault(run[-1], []).append(run[:-2])
    return list(parts.values())
