"""Flags: what the settings of a configuration are called on a command line and in a `--config` file.

    setting                 flag            file
    generation.num_beams    --num-beams 2   [generation] num_beams = 2
    language                --language      language = "fr"

Configurations are nested Structs; a flag is a field's name, whichever part it is in. Errors name a setting by its path,
as msgspec does: `Expected int >= 1 - at $.generation.num_beams`. `located` puts in its place what a person typed.
"""

import json
import re
import shlex
from collections.abc import Mapping, Sequence
from itertools import takewhile
from typing import Any, NamedTuple

import msgspec

__all__ = ["Origins", "flag_of", "flag_words", "located", "settings_of"]

_PATHS = re.compile(r" - at (`\$[^`]*`(?:, `\$[^`]*`)*)")


class Origins(NamedTuple):
    """Where the settings of a command came from."""

    values: Mapping[str, Any]
    """Every setting, by its path."""
    arguments: Sequence[str] = ()
    """The words after the command."""
    file: str | None = None
    """The `--config` file."""
    in_file: Mapping[str, Any] = {}
    """Settings that the file names, by their paths."""


def settings_of(config: Any, path: str = "") -> dict[str, Any]:
    """Every setting of a configuration by its path, `generation.num_beams`, as JSON has it; a dictionary works too."""
    inner = msgspec.to_builtins(config) if isinstance(config, msgspec.Struct) else config
    if not isinstance(inner, dict):
        return {path: list(inner) if isinstance(inner, tuple) else inner}
    found: dict[str, Any] = {}
    for name, value in inner.items():
        found |= settings_of(value, f"{path}.{name}" if path else name)
    return found


def flag_words(settings: Mapping[str, Any]) -> list[str]:
    """Settings by their paths, as flags: to be quoted by `shlex.join`."""
    words: list[str] = []
    for path, value in settings.items():
        name = flag_of(path)
        if isinstance(value, bool):
            words.append(name if value else f"--no-{name.removeprefix('--')}")
        elif isinstance(value, list):
            words += [name, *map(str, value)]
        elif str(value).startswith("-"):  # would be taken for a flag
            words.append(f"{name}={value}")
        else:
            words += [name, str(value)]
    return words


def located(message: str, origins: Origins) -> str:
    """An error's message, without paths: with flag and value as typed, or file, section and key."""
    places: list[str] = []
    for paths in _PATHS.findall(message):
        for path in re.findall(r"\$\.?([^`]*)", paths):
            places += _places(re.sub(r"\[[^\]]*\]", "", path), origins)
    text = _PATHS.sub("", message)
    if text == message:
        return text + "".join(f" ({place})" for place in _quoted(text, origins) if place not in text)
    missing = ", ".join(place for place in dict.fromkeys(places) if place not in text)
    return f"{missing}: {text.removeprefix('configuration: ')}" if missing else text


def flag_of(path: str) -> str:
    """The flag of a setting: `--num-beams` of `generation.num_beams`."""
    return f"--{path.rpartition('.')[2].replace('_', '-')}"


def _places(path: str, origins: Origins) -> list[str]:
    """Where a setting is set, or each of those of a section that are set."""
    inside = [one for one in dict.fromkeys((*origins.values, *origins.in_file)) if one.startswith(f"{path}.")]
    if inside:
        return [_place(one, origins) for one in inside if _is_typed(one, origins) or one in origins.in_file]
    leaf = path.rpartition(".")[2]  # the server has settings of a run's in other places
    found = [one for one in origins.values if one == path or one.rpartition(".")[2] == leaf]
    return [_place(path if path in found else found[0], origins)] if found else []


def _place(path: str, origins: Origins) -> str:
    if path in origins.in_file and not _is_typed(path, origins):
        section, _, key = path.rpartition(".")
        value = json.dumps(origins.in_file[path], ensure_ascii=False, default=str)
        return f"{origins.file} {f'[{section}] ' if section else ''}{key} = {value}"
    value = origins.values[path]
    return shlex.join(_typed(path, origins) or ([flag_of(path)] if value is None else flag_words({path: value})))


def _typed(path: str, origins: Origins) -> list[str]:
    """A flag and its values as they were typed; empty where it was not."""
    for position, word in enumerate(origins.arguments):
        name, equals, value = word.partition("=")
        if name.replace("_", "-") == flag_of(path):
            values = takewhile(lambda one: not one.startswith("--"), origins.arguments[position + 1 :])
            return [flag_of(path), *([value] if equals else values)]
    return []


def _quoted(message: str, origins: Origins) -> list[str]:
    """Where the texts are set that a message without a path quotes."""
    return [
        _place(path, origins)
        for path, value in origins.values.items()
        if isinstance(value, str) and repr(value) in message and (_is_typed(path, origins) or path in origins.in_file)
    ]


def _is_typed(path: str, origins: Origins) -> bool:
    name = flag_of(path)
    words = {word.partition("=")[0].replace("_", "-") for word in origins.arguments}
    return not words.isdisjoint({name, f"--no-{name.removeprefix('--')}"})
