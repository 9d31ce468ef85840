"""Errors name what a person typed: a flag and its value, a key of a file, or, from code, a field."""

import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

import msgspec
import pytest

from tests.tasks_for_tests import TASKS
from tracekit.cli import main, run_task
from tracekit.commands import Serve
from tracekit.config import RunConfig, check
from tracekit.errors import ConfigError
from tracekit.flags import Origins, flag_words, located, settings_of

CONFIGS: dict[str, type[RunConfig]] = {name: task.config for name, task in TASKS.items() if name != "serve"}


def bad_values(struct: type[msgspec.Struct], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every setting that has a bound or a list of words, with a value that it refuses."""
    for name, hint in get_type_hints(struct, include_extras=True).items():
        if name not in struct.__struct_fields__:
            continue
        if isinstance(hint, type) and issubclass(hint, msgspec.Struct):
            yield from bad_values(hint, f"{prefix}{name}.")
        elif (value := _refused(hint)) is not None:
            yield prefix + name, value


def _refused(hint: Any) -> Any:
    if get_origin(hint) is Annotated:
        bounds = [one for one in get_args(hint)[1:] if isinstance(one, msgspec.Meta)]
        for bound in bounds:
            for low in (bound.ge, bound.gt):
                if low is not None:
                    return low - 1
        return _refused(get_args(hint)[0])
    if get_origin(hint) is Literal:
        return "no such word"
    for inner in get_args(hint):
        if (value := _refused(inner)) is not None:
            return [value] if get_origin(hint) is tuple else value
    return None


ALL = [(name, path, value) for name, config in CONFIGS.items() for path, value in bad_values(config)]


def flags_of(path: str, value: Any) -> list[str]:
    return flag_words({path: value})


def error_of(capsys: pytest.CaptureFixture[str]) -> str:
    return capsys.readouterr().err.replace("│", " ")


@pytest.mark.parametrize(("name", "path", "value"), ALL)
def test_a_refused_setting_is_named_as_it_was_set(
    name: str, path: str, value: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    shown = str(value[0] if isinstance(value, list) else value)
    flag = f"--{path.rpartition('.')[2].replace('_', '-')}"

    def said(*words: str) -> str:
        with pytest.raises(SystemExit) as ended:
            run_task(TASKS[name], [*words, "--out", str(tmp_path / "run")])
        assert ended.value.code in (1, 2)
        text = error_of(capsys)
        assert "$" not in text
        return text

    typed = said(*flags_of(path, value))
    assert flag in typed
    assert shown in typed
    section, _, key = path.rpartition(".")
    file = tmp_path / "run.toml"
    quoted = msgspec.json.encode(value).decode()
    file.write_text(f"{f'[{section}]' if section else ''}\n{key} = {quoted}\n")
    assert f"{file} {f'[{section}] ' if section else ''}{key} = {quoted}: " in said("--config", str(file))
    with pytest.raises(ConfigError, match=rf"`\$\.{path.replace('.', '[.]')}"):
        check(with_setting(CONFIGS[name](), path, value))


def with_setting(config: Any, path: str, value: Any) -> Any:
    first, _, rest = path.partition(".")
    inner = with_setting(getattr(config, first), rest, value) if rest else value
    return msgspec.structs.replace(config, **{first: inner})


@pytest.mark.parametrize(("path", "value"), list(bad_values(Serve)))
def test_a_refused_setting_of_the_server_is_named_as_it_was_typed(
    path: str, value: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    words = flags_of(path, value)
    with pytest.raises(SystemExit) as ended:
        sys.exit(main(["serve", "--out", str(tmp_path / "run"), *words]))
    assert ended.value.code in (1, 2)
    text = error_of(capsys)
    assert words[0].partition("=")[0] in text
    assert str(value) in text
    assert "$" not in text


@pytest.mark.parametrize(
    ("words", "file", "said"),
    [
        (["--device", "cuda:9"], None, "--device cuda:9: device 'cuda:9'; torch cannot"),
        (["--num_beams=0"], None, "--num-beams 0: Expected"),
        (["--levels", "0", "7"], None, "--levels 0 7: level 7"),
        (["--seed", "3"], {"model.device": "cuda:9"}, 'run.toml [model] device = "cuda:9": device'),
        (["--device", "cuda:9"], {"model.device": "cpu"}, "--device cuda:9: device"),
        (["--num-samples", "3"], {"generation.top_p": 0.5}, "--num-samples 3, run.toml [generation] top_p = 0.5: "),
        (["--publish", "o/n"], None, "--publish o/n: --publish needs --version"),
        (["--version", "v1"], None, "--version v1: --version, --private"),
        (["--merge-adapter"], None, "--merge-adapter; there is no adapter"),
        (["--model", "./no"], None, "no model at './no'; expected a folder (--model ./no)"),
        ([], {"model.model": "./no"}, "no model at './no'; expected a folder (run.toml [model] model = \"./no\")"),
    ],
)
def test_what_is_said_of_a_setting(words: list[str], file: Mapping[str, Any] | None, said: str):
    messages = {
        "device": "device 'cuda:9' - at `$.model.device`; torch cannot use it",
        "num-beams": "configuration: Expected `int` >= 1 - at `$.generation.num_beams`",
        "levels": "level 7 - at `$.levels[1]`; too much",
        "num-samples": "--num-samples and --trace-samples - at `$.generation`; there is one",
        "publish": "--publish needs --version, as in --version v1.0.0 - at `$.publish.publish`",
        "version": "--version, --private and --license go with --publish owner/name - at `$.publish`",
        "merge-adapter": "--merge-adapter - at `$.model.merge_adapter`; there is no adapter; give --adapter",
        "model": "no model at './no'; expected a folder",
    }
    flag = words[0].partition("=")[0].replace("_", "-").removeprefix("--") if words else "model"
    message = messages["device" if flag == "seed" else flag]
    typed = {
        "model.model": "./no",
        "model.device": "cuda:9",
        "model.merge_adapter": True,
        "generation.num_beams": 0,
        "generation.num_samples": 3,
        "generation.top_p": 0.5,
        "publish.publish": "o/n",
        "publish.version": "v1",
        "publish.private": False,
        "levels": [0, 7],
        "output.seed": 3,
    }
    assert located(message, Origins(typed, words, file and "run.toml", file or {})).startswith(said)


def test_settings_are_found_by_path_and_written_as_flags():
    config = {"a": {"num_x": 1, "is_y": False}, "b_c": ["-1", "x y"], "d": "-q", "e": None}
    assert settings_of(config) == {"a.num_x": 1, "a.is_y": False, "b_c": ["-1", "x y"], "d": "-q", "e": None}
    assert flag_words(settings_of(config)) == [
        *("--num-x", "1", "--no-is-y", "--b-c", "-1", "x y", "--d=-q", "--e", "None"),
    ]
