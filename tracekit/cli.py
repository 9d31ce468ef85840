"""Command lines: `tracekit ...`, and those of tasks through `run_task`, which is `tracekit.main`.

tyro turns Structs into flags; their bounds are checked afterwards, once, by tracekit.config.check.
"""

import os
import select
import shlex
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from importlib import import_module
from pathlib import Path
from typing import Any, TextIO, TypeVar

import msgspec
import tyro

from tracekit.config import RunConfig, check, load_toml, read_toml
from tracekit.console import out
from tracekit.errors import ConfigError, TracekitError
from tracekit.flags import Origins, located, settings_of
from tracekit.format.layout import Layout
from tracekit.ranks import this_rank
from tracekit.task import Task, check_name_is_free, find_task, import_file, is_file_of, task_in

__all__ = ["main", "run_main", "run_task"]

ConfigT = TypeVar("ConfigT", bound=RunConfig)

_INTERRUPTED = 130
_EXTRAS = {
    "huggingface_hub": "publish",
    **dict.fromkeys(("accelerate", "datasets", "gguf", "peft", "safetensors", "torch", "transformers"), "run"),
}
"""Which extra brings a package that a plain `pip install tracekit-llm` does not install."""
_STOPPED = "stopped; everything finished is kept. Run the same command again to go on"


def main(argv: list[str] | None = None) -> int:
    """The `tracekit` command; returns its exit code."""
    from tracekit.commands import Command

    arguments = list(sys.argv[1:] if argv is None else argv)
    with _readers_may_leave():
        command: Any = tyro.cli(
            Command,  # pyright: ignore[reportArgumentType] - a union of Structs becomes subcommands
            prog="tracekit",
            description="Traces of language models as datasets: verify, show, export, diff, merge, publish, serve.",
            args=arguments,
            config=(tyro.conf.OmitSubcommandPrefixes,),
        )
        again = "stopped; run the same command again to go on"
        return _exit_code(lambda: check(command).run(), Origins(settings_of(command), arguments), again)


def run_main(program: str, module: str, config_type: type[msgspec.Struct], argv: list[str] | None = None) -> int:
    """Parse flags, then import a module and call its `run` with the configuration; returns the exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    with _readers_may_leave():
        config = _parsed(arguments, config_type(), f"python -m {program}", str(config_type.__doc__))
        origins = Origins(settings_of(config), arguments)
        return _exit_code(lambda: import_module(module).run(config), origins, _STOPPED)


def _parsed(arguments: list[str], default: Any, program: str, description: str) -> Any:
    """The flags of a command over defaults."""
    flags: Any = tyro.conf.OmitArgPrefixes[type(default)]
    return tyro.cli(flags, default=default, prog=program, description=description, args=arguments)


def _exit_code(do: Callable[[], int], origins: Origins, stopped: str) -> int:
    """The exit code of what a command does; errors are one line, and name what was typed."""
    try:
        return do()
    except BrokenPipeError:
        raise
    except (TracekitError, OSError) as error:
        out(f"error: {located(str(error), origins)}", file=sys.stderr)
        return 1
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package not in _EXTRAS:
            raise
        missing = f"the package {package} is needed for this, and is not installed"
        out(f"error: {missing}: pip install 'tracekit-llm[{_EXTRAS[package]}]'", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        out(f"\n{stopped}", file=sys.stderr)
        return _INTERRUPTED


@contextmanager
def _readers_may_leave() -> Iterator[None]:
    """Nothing is wrong where whoever reads the output leaves early, as in `tracekit show ... | head -1`."""
    try:
        try:
            yield
        finally:
            sys.stdout.flush()
    except BrokenPipeError as error:
        left = [stream for stream in (sys.stdout, sys.stderr) if _is_left(stream)]
        if not left:
            raise
        for stream in left:  # what is still in a buffer is written when Python ends
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
        ended = error.__context__
        sys.exit(ended.code if isinstance(ended, SystemExit) else 0)


def _is_left(stream: TextIO) -> bool:
    """Whether nobody reads what a stream writes."""
    poll = select.poll()
    poll.register(stream, select.POLLERR)
    return bool(poll.poll(0))


def run_task(task: Task[Any, Any], argv: list[str] | None = None) -> None:
    """Run a task by its command line: parse flags (over `--config`, over defaults), do its stages, say what became of
    it, and exit. `tracekit.main(TASK)` under `if __name__ == "__main__"` makes a file a builder."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    with _readers_may_leave():
        found: list[Any] = []

        def begin() -> int:
            own = _as_imported(task)
            check_name_is_free(own)
            found.extend((own, *_take_config(arguments, own.config, own.configs)))
            return 0

        if code := _exit_code(begin, Origins({}, arguments), _STOPPED):
            sys.exit(code)
        own, default, file = found
        config = _parsed(arguments, default, own.command, f"{own.title}\n\n{_about_configs(own.configs)}")
        in_file = {} if file is None else settings_of(read_toml(file))
        origins = Origins(settings_of(config), arguments, file, in_file)
        sys.exit(_exit_code(lambda: _execute_stages(own, check(config)), origins, _STOPPED))


def _as_imported(task: Task[Any, Any]) -> Task[Any, Any]:
    """A task of the file that is run, as every other process finds it: its module is called `__main__` here.

    `python -m package.module` says its name. A file that is run by its path may be the module of an installed task.
    """
    if task.module != "__main__":
        return task
    main = sys.modules["__main__"]
    spec = getattr(main, "__spec__", None)
    if spec is not None and spec.name != "__main__":
        return task_in(import_module(spec.name), task.name)
    file = Path(str(main.__file__))
    installed = find_task(task.name)
    if installed is not None and is_file_of(installed.module, file):
        return installed
    return task_in(import_file(file), task.name)


def _about_configs(configs: Mapping[str, Any]) -> str:
    names = f"--config NAME begins with one of: {', '.join(configs)}. " if configs else ""
    return f"{names}--config FILE.toml reads settings from a file. Flags override them."


def _take_config(
    arguments: list[str], config_type: type[ConfigT], configs: Mapping[str, ConfigT]
) -> tuple[ConfigT, str | None]:
    """Take `--config NAME` or `--config FILE` out of the arguments; the defaults of all flags, and the file."""
    for position, argument in enumerate(arguments):
        name, equals, value = argument.partition("=")
        if name == "--config":
            if not equals:
                if position + 1 == len(arguments):
                    return config_type(), None
                value = arguments.pop(position + 1)
            arguments.pop(position)
            if value in configs:
                return configs[value], None
            if configs and "." not in value and not Path(value).exists():
                raise ConfigError(f"--config {value!r}: no such file, and no name of {', '.join(configs)}")
            return load_toml(value, config_type), value
    return config_type(), None


def _execute_stages(task: Task[ConfigT, Any], config: ConfigT) -> int:
    """Do the stages that a configuration names, in their order; the exit code of the first that does not end well."""
    names: Sequence[str] = getattr(config, "stages", ("",))
    alone = [name for name in names if name in task.stages]
    if alone and (world_size := this_rank().world_size) > 1:
        raise ConfigError(
            f"--stages {' '.join(alone)}: run in one process; {world_size} were started, for answers alone"
        )
    folder = config.output.out or default_folder(task.name, config)
    config = msgspec.structs.replace(config, output=msgspec.structs.replace(config.output, out=folder))
    for name in names:
        if name not in task.stages and config.output.dry_run and not task.call("can_estimate", config):
            out(f"not estimated   --stages {name}: an earlier stage has to write the examples first")
            continue
        code = task.stages[name](config) if name in task.stages else _execute(task, config)
        if code:
            return code
    return 0


def _execute(task: Task[ConfigT, Any], config: ConfigT) -> int:
    from tracekit.run.runner import preflight

    assert config.output.out is not None
    folder = Path(config.output.out)
    all_parts = task.call("parts", config)
    for part in all_parts[1:]:  # before hours go into the first
        preflight(task, part)
    with _opened_engine(config) as engine:
        for part in all_parts:
            code = _execute_part(task, part, folder, engine)
            if code:
                return code
    if config.output.dry_run:
        return 0
    if config.publish.publish is not None and config.publish.version is not None:
        from tracekit.commands import Publish

        settings = config.publish
        command = Publish(
            folder=str(folder),
            repo=config.publish.publish,
            version=config.publish.version,
            private=settings.private,
            free_local=settings.free_local,
            license=settings.license,
        )
        return command.run()
    out(f"next: tracekit verify {shlex.quote(str(folder))}", file=sys.stderr)
    return 0


def _opened_engine(config: RunConfig) -> AbstractContextManager[Any]:
    """Who does the work: it keeps its models for all parts of a configuration."""
    if config.cluster.engine == "ray":
        from tracekit.cluster import RayEngine

        return RayEngine(config.cluster)
    from tracekit.run.engine import LocalEngine

    return nullcontext(LocalEngine())


def _execute_part(task: Task[Any, Any], config: RunConfig, folder: Path, engine: Any) -> int:
    """Run one configuration and say what became of it; the exit code, 0 where it was finished."""
    from tracekit.run.runner import run
    from tracekit.sizes import filesize

    layout = Layout(folder, config.output.dataset_config or task.name)
    stager = None
    if config.publish.publish is None:
        outcome = run(task, config, folder, engine=engine)
    else:
        from tracekit.publish.stager import Stager

        stager = Stager(layout, config.publish)
        if config.output.dry_run:
            stager.check()
            outcome = run(task, config, folder, engine=engine)
        else:
            with stager:
                outcome = run(task, config, folder, on_shard=stager.add, engine=engine)
    if outcome.estimate is not None and config.output.dry_run:
        _print_estimate(outcome, folder)
        return 0
    if outcome.interrupted:
        out(f"stopped; every finished batch is in {folder}. Run the same command again to go on", file=sys.stderr)
        return _INTERRUPTED
    if outcome.num_left:
        left = f"{outcome.num_left} shards are in other processes' hands; the last of them finishes"
        out(f"{layout.config}: {left}. Where none is left, run the same command again", file=sys.stderr)
        return 0
    if outcome.was_complete:
        out(f"nothing to do: {layout.config} is complete", file=sys.stderr)
    _print_outcome(folder, outcome)
    if stager is not None and stager.num_shards:
        freed = ", each deleted here" if config.publish.free_local else ""
        out(f"staged          {stager.num_shards} shards, {filesize(stager.num_bytes)}, while running{freed}")
    return 0


def default_folder(task: str, config: RunConfig) -> str:
    """A readable name under traces/, from what tells runs apart."""
    parts = [task, Path(config.model.model.partition("@")[0]).name]
    if config.model.adapter:
        parts.append(Path(config.model.adapter).name + "-merged" * config.model.merge_adapter)
    if config.model.quantize != "none":
        parts.append(config.model.quantize)
    source = getattr(config.source, "source", "default")
    parts.append(config.source.split if source == "default" else Path(source).stem)
    return "traces/" + "-".join("".join(c if c.isalnum() or c in "._" else "_" for c in part) for part in parts)


def _print_estimate(outcome: Any, folder: Path) -> None:
    from tracekit.sizes import duration, filesize

    estimate = outcome.estimate
    has_overhead = estimate.overhead_seconds >= 1
    once = f"; {duration(estimate.overhead_seconds)} of it: {estimate.overhead}" if has_overhead else ""
    rows = {
        "configuration": outcome.config,
        "examples": f"{estimate.num_examples}" + f" more; {estimate.num_there} are there" * (estimate.num_there > 0),
        "prompt tokens": f"{estimate.num_prompt_tokens}",
        "bytes a sample": f"{estimate.bytes_per_sample} ({filesize(estimate.bytes_per_sample)})",
        "total": f"{estimate.total_bytes} ({filesize(estimate.total_bytes)})",
        "shards": f"{estimate.num_shards}",
        "time": f"about {duration(estimate.seconds)} (from {estimate.num_measured} examples measured here{once})",
        "folder": f"{folder} (nothing was written)",
    }
    for name, value in rows.items():
        out(f"{name:15s} {value}")


def _print_outcome(folder: Path, outcome: Any) -> None:
    from tracekit.analysis.showing import metric_lines, verification_lines, warning_lines
    from tracekit.sizes import filesize

    manifest = outcome.manifest
    out(f"dataset         {folder}, configuration {manifest.config}")
    for split in manifest.splits:
        out(f"{split.name:15s} {split.num_samples} samples, {len(manifest.shards)} shards, {filesize(split.num_bytes)}")
    out("\n".join(metric_lines(manifest)))
    out("\n".join(verification_lines(manifest.verification)))
    if manifest.source.skipped:
        out(f"rows left out   {manifest.source.left_out} (listed in the manifest)")
    for line in warning_lines(manifest):
        out(line, file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
