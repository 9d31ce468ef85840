"""The `tracekit` command's subcommands, as Structs that tyro reads, and what each does.

stdout is data, stderr is talk; every command ends with the next one to type.
"""

import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import msgspec
import tyro
from tqdm import tqdm

from tracekit.analysis.diff_table import difference_lines
from tracekit.analysis.distances import COMPARED_SITES
from tracekit.analysis.showing import show_config, show_samples, stats_lines, verification_lines
from tracekit.analysis.stats import ConfigStats, stats
from tracekit.config import AnswerCaptureConfig, DeviceMap, ModelConfig, PromptConfig
from tracekit.console import out, printable_json, say
from tracekit.errors import ConfigError
from tracekit.format.journal import Sent
from tracekit.format.layout import Layout, choose_config, config_names, write_atomic
from tracekit.format.manifest import read_plan
from tracekit.hub import HubPath
from tracekit.plots import draw_picture
from tracekit.read.remote import list_configs
from tracekit.read.store import TraceStore
from tracekit.run.command import growth_note
from tracekit.serve.settings import ServerSettings, check_installed
from tracekit.sizes import filesize
from tracekit.task import claim_fault, the_task

__all__ = ["Command", "Diff", "Export", "Merge", "Publish", "Serve", "Show", "Verify"]

_NUM_SHOWN = 5


class Verify(msgspec.Struct, frozen=True, kw_only=True):
    """Re-read a dataset and prove it: hashes, counts, structure, every record and tensor. Exits 1 if it is wrong."""

    folder: tyro.conf.Positional[str]
    """Folder of the dataset."""
    dataset_config: str | None = None
    """Check this configuration only."""
    replay: Annotated[int, msgspec.Meta(ge=0)] = 0
    """Load the model and run so many samples again."""
    model: str | None = None
    """Where the model is, if it was a local one."""
    model_path: str | None = None
    """Where the fine-tuned checkpoint is, if it was a local one."""
    adapter: str | None = None
    """Where the adapter is, if it was a local one."""
    image: str | None = None
    """Where the picture is that was shown with the prompts, if one was."""
    chat_template: str | None = None
    """With --image: where the chat template file of the run is, if it had one."""
    trust_remote_code: bool = False
    """Run Python code of the model repository that you name with --model. A dataset cannot ask for it."""
    device: str = "auto"
    """Device to replay on."""
    device_map: DeviceMap = "none"
    """Share out a model larger than one device, as a builder does."""
    max_memory: tuple[str, ...] = ()
    """With --device-map: the most that weights take of each device, `0=20GiB cpu=60GiB`."""
    offload_folder: str | None = None
    """With --device-map: folder for weights that fit into no memory."""
    hub: bool = False
    """Ask the Hub whether it has the shards that were sent there and deleted here."""

    def run(self) -> int:
        from tracekit.read.verifier import verify

        root = Path(self.folder)
        for name in ([self.dataset_config] if self.dataset_config else config_names(root)) if self.replay else ():
            the_task(read_plan(Layout(root, name)).task, where=Layout(root, name).plan, to_do="--replay")
        total = sum(path.stat().st_size for path in root.glob("data/*/*.tar"))
        with tqdm(total=total, unit="B", unit_scale=True, desc="verify", disable=None) as bar:
            report = verify(root, config=self.dataset_config, progress=bar.update)
        for name in report.open_configs:
            more = "Run its command again to go on"
            if read_plan(Layout(root, name)).is_growing:
                more = "It grows while `tracekit serve` runs, which finishes it when it is stopped"
            out(f"open: {name} is not finished; what is there was checked. {more}")
        _say_growth(root, [self.dataset_config] if self.dataset_config else config_names(root))
        for problem in report.problems:
            out(f"wrong: {problem}".replace("\n", "\\n"))
        if report.problems:
            out(f"FAILED: {len(report.problems)} problems in {self.folder}")
            _next(
                "restore the file from where it was made or published, or delete it and run the builder's command again"
            )
            return 1
        if report.sent and not self._sent(report.sent):
            return 1
        names = [self.dataset_config] if self.dataset_config else config_names(root)
        for fault in sorted(filter(None, {claim_fault(read_plan(Layout(root, name)).task) for name in names})):
            say(f"warning: {fault}; until then, other commands refuse the dataset")
        out(f"ok: {report.num_samples} samples, {filesize(report.num_bytes)} in finished shards of {self.folder}")
        if self.replay and report.open_configs:
            out("not replayed: only finished configurations are")
        elif self.replay:
            self._replay(root)
        unasked = " --hub" if report.sent and not self.hub else ""
        folder = shlex.quote(self.folder)
        _next(f"tracekit verify {folder}{unasked}  # asks the Hub" if unasked else f"tracekit show {folder}")
        return 0

    def _sent(self, entries: list[Sent]) -> bool:
        """Say where the shards are that are not here, and ask the Hub about them if that is wanted."""
        from tracekit.publish.snapshot import lost_files

        size = filesize(sum(entry.num_bytes for entry in entries))
        where = sorted({f"{entry.repo} {entry.version}" for entry in entries})
        out(f"not here: {len(entries)} shards, {size}; by the journal (hub/) they were sent to {', '.join(where)}")
        if not self.hub:
            return True
        lost = lost_files(entries)
        for entry in lost:
            out(f"wrong: {entry.repo} does not have {entry.path} as it was sent")
        if lost:
            out(f"FAILED: {len(lost)} of {len(entries)} shards are not on the Hub")
            _next("delete the journal in hub/ and run the builder's command again, which makes them anew")
            return False
        out(f"on the Hub: all {len(entries)} shards, each with its SHA-256")
        return True

    def _replay(self, root: Path) -> None:
        from tracekit.run.recheck import replay_stored

        for name in [self.dataset_config] if self.dataset_config else config_names(root):
            result = replay_stored(
                Layout(root, name),
                self.replay,
                model=self.model,
                model_path=self.model_path,
                adapter=self.adapter,
                device=self.device,
                device_map=self.device_map,
                max_memory=self.max_memory,
                offload_folder=self.offload_folder,
                files={
                    flag: path
                    for flag, path in (("--image", self.image), ("--chat-template", self.chat_template))
                    if path is not None
                },
                trust_remote_code=self.trust_remote_code,
            )
            out("\n".join(verification_lines(result)))


class Show(msgspec.Struct, frozen=True, kw_only=True):
    """Show a dataset, or one sample of it."""

    folder: tyro.conf.Positional[str]
    """Folder of the dataset, or `hf://datasets/owner/name@v1.0.0`."""
    key: str | None = None
    """Key of a sample."""
    prompt_sha256: str | None = None
    """SHA-256 of a prompt, or of the user's text: shows every sample of it."""
    dataset_config: str | None = None
    """Configuration, where there are several."""
    examples: Annotated[int, msgspec.Meta(ge=0)] = _NUM_SHOWN
    """Answers to list."""
    json: bool = False
    """Print JSON."""
    stats: bool = False
    """Sum the run up: accuracy, calibration, confidence, parse failures, sizes; and what its task says besides."""
    plots: str | None = None
    """Folder for the pictures that the task draws of it, as answers by level of damage; with --stats."""

    def run(self) -> int:
        if self.stats:
            return self._stats()
        if self.plots is not None:
            raise ConfigError("--plots goes with --stats")
        names = list_configs(HubPath.parse(self.folder) or Path(self.folder)).configs
        if self.dataset_config is None and self.key is None and self.prompt_sha256 is None and len(names) > 1:
            return self._every(names)
        with TraceStore(self.folder, config=self.dataset_config) as store:
            if self.key is not None:
                show_samples([store.record(self.key)], store.about.outcome, as_json=self.json)
            elif self.prompt_sha256 is not None:
                samples = store.by_prompt(self.prompt_sha256)
                show_samples([one.record for one in samples], store.about.outcome, as_json=self.json)
            else:
                self._config(store)
                if not self.json and len(store):
                    named = f" --dataset-config {self.dataset_config}" if self.dataset_config else ""
                    _next(f"tracekit show {shlex.quote(self.folder)}{named} --key {shlex.quote(store.keys[0])}")
        return 0

    def _config(self, store: TraceStore) -> None:
        if HubPath.parse(self.folder) is None:
            _say_growth(Path(self.folder), store.info().configs)
        if self.json:
            out(_json(store.info()))
        else:
            show_config(store, self.examples)

    def _every(self, names: Sequence[str]) -> int:
        """Show several configurations; as JSON they are one list."""
        infos = []
        for name in names:
            with TraceStore(self.folder, config=name) as store:
                infos.append(store.info())
                if not self.json:
                    self._config(store)
        if self.json:
            out(_json(infos))
        _next(f"tracekit show {shlex.quote(self.folder)} --stats")
        return 0

    def _stats(self) -> int:
        if self.key is not None or self.prompt_sha256 is not None:
            raise ConfigError("--stats sums up whole configurations; leave --key and --prompt-sha256 out")
        found = stats(self.folder, config=self.dataset_config)
        self._draw(found)
        if self.json:
            out(_json(found))
            return 0
        out("\n\n".join("\n".join(stats_lines(one)) for one in found))
        _next(f"tracekit show {shlex.quote(self.folder)} --examples 3")
        return 0

    def _draw(self, found: Sequence[ConfigStats]) -> None:
        if self.plots is None:
            return
        pictures = [(f"{one.config}-{picture.file}", picture) for one in found for picture in one.pictures]
        if not pictures:
            raise ConfigError("--plots draws what the task of a dataset has to draw; this one has nothing")
        for name, picture in pictures:
            path = Path(self.plots) / name
            write_atomic(path, draw_picture(picture))
            out(f"wrote {path}", file=sys.stderr)


class Diff(msgspec.Struct, frozen=True, kw_only=True):
    """Compare two datasets of the same questions: answers, calibration, entropy and activations, b against a."""

    a: tyro.conf.Positional[str]
    """Folder of the first dataset, or `hf://datasets/owner/name@v1.0.0`."""
    b: tyro.conf.Positional[str]
    """Folder of the second; the same as the first where filters tell two slices apart."""
    dataset_config: tuple[str, ...] = ()
    """Configuration to compare, or its name in a and its name in b; all that both have by default."""
    where_a: tuple[str, ...] = ()
    """Samples of a to compare: `field=value` on their records, as `subject=history`; several must all hold."""
    where_b: tuple[str, ...] = ()
    """Samples of b, likewise."""
    sites: tuple[str, ...] = COMPARED_SITES
    """Activations to compare, where both have them; `none` reads no activations, which is fast."""
    layers: tuple[int, ...] = ()
    """Layers to compare, negative from the last that both have; all that both have by default."""
    plots: str | None = None
    """Folder to write PNG pictures into."""
    json: bool = False
    """Print JSON."""

    def run(self) -> int:
        from tracekit.analysis.diff import diff

        found = diff(
            self.a,
            self.b,
            config=self.dataset_config or None,
            where_a=self.where_a,
            where_b=self.where_b,
            sites=[] if self.sites == ("none",) else self.sites,
            layers=self.layers or None,
            progress=True,
        )
        if self.json:
            out(_json(found))
        else:
            out("\n".join(difference_lines(found)))
        if self.plots is None:
            flags = {"dataset-config": self.dataset_config, "where-a": self.where_a, "where-b": self.where_b}
            given = [word for name, values in flags.items() if values for word in (f"--{name}", *values)]
            again = shlex.join([self.a, self.b, *given, "--plots", "plots"])
            _next(f"tracekit diff {again}  # draws pictures; --json has every layer and bin")
            return 0
        from tracekit.analysis.diff_figures import draw_difference

        for name, data in draw_difference(found).items():
            path = Path(self.plots, name)
            write_atomic(path, data)
            out(f"wrote {path}", file=sys.stderr)
        return 0


class Merge(msgspec.Struct, frozen=True, kw_only=True):
    """Join runs that differ only in their slice of the source."""

    folders: tyro.conf.Positional[tuple[str, ...]]
    """Folders of the runs, two or more."""
    out: str
    """Folder of the joined dataset: a new one, or one in which the same merge was stopped."""
    dataset_config: str | None = None
    """Configuration to join, where there are several."""

    def run(self) -> int:
        from tracekit.run.merge import merge

        if len(self.folders) < 2:
            raise ConfigError(f"merge needs two folders or more, got {len(self.folders)}")
        manifest = merge([Path(folder) for folder in self.folders], Path(self.out), config=self.dataset_config)
        out(f"{sum(s.num_samples for s in manifest.splits)} samples in {self.out}")
        _next(f"tracekit verify {shlex.quote(self.out)}")
        return 0


class Export(msgspec.Struct, frozen=True, kw_only=True):
    """Write a dataset in a form that other tools read, into its folder exports/."""

    folder: tyro.conf.Positional[str]
    """Folder of the dataset."""
    format: str | None = None
    """The form, one of those that the dataset's task has; by default the only one."""
    dataset_config: str | None = None
    """Configuration, where there are several."""
    sample: Annotated[int, msgspec.Meta(ge=1)] | None = None
    """So many samples alone, drawn over the whole run."""

    def run(self) -> int:
        root = Path(self.folder)
        config = choose_config(config_names(root), self.dataset_config, root)
        task = the_task(read_plan(Layout(root, config)).task, where=root, to_do="export")
        if not task.exports:
            raise ConfigError(f"the task {task.name} has no form to export to; give its Task `exports=`")
        name = self.format or (next(iter(task.exports)) if len(task.exports) == 1 else None)
        if name is None or name not in task.exports:
            given = f"--format {self.format}" if self.format else "export"
            raise ConfigError(
                f"{given}: the task {task.name} has these forms: {', '.join(task.exports)}; name one with --format"
            )
        path = task.exports[name](root, config=config, num_samples=self.sample)
        out(f"wrote {path}, {filesize(path.stat().st_size)}")
        return 0


class Publish(msgspec.Struct, frozen=True, kw_only=True):
    """Publish a dataset to the Hub under a version. The same command again sends only what is missing."""

    folder: tyro.conf.Positional[str]
    """Folder of the dataset."""
    repo: tyro.conf.Positional[str]
    """Repository on the Hub, `owner/name`; created if it is not there."""
    version: str
    """Version, as `v1.0.0`."""
    private: bool = False
    """Create the repository as a private one."""
    dry_run: bool = False
    """Say what would be sent, and send nothing."""
    free_local: bool = False
    """Delete each shard here once the version is on the Hub."""
    license: str | None = None
    """Licence of the dataset, as the Hub writes it (`apache-2.0`, `cc-by-4.0`, ...)."""
    language: tuple[str, ...] = ()
    """Languages of the texts, as ISO 639-1 codes."""
    pretty_name: str | None = None
    """Title of the dataset."""

    def run(self) -> int:
        from tracekit.publish.publisher import free_shards, publish

        settings = {"license": self.license, "language": list(self.language) or None, "pretty_name": self.pretty_name}
        done = publish(
            Path(self.folder),
            self.repo,
            self.version,
            private=self.private,
            dry_run=self.dry_run,
            settings={name: value for name, value in settings.items() if value is not None},
        )
        for reason in done.change.reasons:
            out(f"change          {reason}")
        if not (done.change.reasons or done.was_there):
            out("change          none in the data since the latest version")
        for note in done.notes:
            out(f"note: {note}", file=sys.stderr)
        _say_growth(Path(self.folder), config_names(Path(self.folder)))
        if done.was_there:
            out(f"nothing to do: {self.repo} has this content as {done.version}")
        elif self.dry_run:
            out(f"would send      {done.num_files} files, {filesize(done.num_bytes)}, to {self.repo}")
            out(f"would release   {done.version} (nothing was sent)")
        else:
            out(f"sent            {done.num_files} files, {filesize(done.num_bytes)}")
            out(f"released        {self.repo} {done.version} (commit {done.commit})")
        if self.dry_run:
            return 0
        if self.free_local and (freed := free_shards(Path(self.folder), self.repo)):
            out(f"freed           {filesize(freed)} here")
        name = config_names(Path(self.folder))[0]
        _next(f"tracekit.load_dataset({self.repo!r}, {name!r}, revision={str(done.version)!r})")
        return 0


class Serve(msgspec.Struct, frozen=True, kw_only=True):
    """Answer as OpenAI's API does, and log a trace of every request as a sample of a dataset that grows."""

    out: str
    """Folder of the dataset; one that a server began goes on."""
    model: tyro.conf.OmitArgPrefixes[ModelConfig] = ModelConfig()
    """The model."""
    capture: tyro.conf.OmitArgPrefixes[AnswerCaptureConfig] = AnswerCaptureConfig(
        sites=("hidden_states",), num_replays=1
    )
    """What is recorded."""
    server: tyro.conf.OmitArgPrefixes[ServerSettings] = ServerSettings()
    """Where it listens, how much it takes, when it closes shards."""
    chat_template: str | None = None
    """File with a Jinja chat template to use instead of the tokenizer's; `none` for completions alone."""
    template_kwargs: tuple[str, ...] = ()
    """Arguments for the chat template, `name=value` (`enable_thinking=false`)."""
    seed: int = 41
    """Seed of what is drawn for requests that give none."""
    dataset_config: str | None = None
    """Name of the configuration inside the dataset; `serve` by default."""

    def run(self) -> int:
        check_installed()
        from tracekit.serve.server import LoggingServer

        prompt = PromptConfig(chat_template=self.chat_template, template_kwargs=self.template_kwargs)
        with LoggingServer(
            Path(self.out),
            model=self.model,
            capture=self.capture,
            prompt=prompt,
            settings=self.server,
            seed=self.seed,
            config=self.dataset_config,
        ) as server:
            out("\n".join(server.about()), flush=True)
            server.run()
        if server.manifest is None:
            out(f"{self.out} has no sample yet; the same command goes on with it")
            return 0
        out(f"{sum(split.num_samples for split in server.manifest.splits)} samples in {self.out}")
        _next(f"tracekit verify {shlex.quote(self.out)}")
        return 0


Command = Verify | Show | Export | Diff | Merge | Publish | Serve


def _json(value: Any) -> str:
    return printable_json(msgspec.json.format(msgspec.json.encode(value), indent=2).decode())


def _say_growth(root: Path, configs: Sequence[str]) -> None:
    """Say which configurations of a folder grow."""
    for name in configs:
        if (note := growth_note(Layout(root, name))) is not None:
            out(f"note: {note}", file=sys.stderr)


def _next(command: str) -> None:
    out(f"next: {command}", file=sys.stderr)
