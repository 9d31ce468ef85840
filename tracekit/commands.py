"""The `tracekit` command's subcommands, as Structs that tyro reads, and what each does.

stdout is data, stderr is talk; every command ends with the next one to type.
"""

import json
import shlex
import sys
from pathlib import Path
from typing import Annotated, Any

import msgspec
import tyro
from tqdm import tqdm

from tracekit.errors import ConfigError
from tracekit.hub import HubPath
from tracekit.journal import Sent
from tracekit.layout import Layout, config_names
from tracekit.manifest import Manifest, read_struct
from tracekit.remote import open_remote
from tracekit.sizes import filesize
from tracekit.store import TraceStore

__all__ = ["Command", "Merge", "Publish", "Show", "Verify", "metric_lines", "verification_lines"]

_NUM_SHOWN = 5
_WIDTH = 100


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
    device: str = "auto"
    """Device to replay on."""
    hub: bool = False
    """Ask the Hub whether it has the shards that were sent there and deleted here."""

    def run(self) -> int:
        from tracekit.verifier import verify

        root = Path(self.folder)
        total = sum(path.stat().st_size for path in root.glob("data/*/*.tar"))
        with tqdm(total=total, unit="B", unit_scale=True, desc="verify", disable=None) as bar:
            report = verify(root, config=self.dataset_config, progress=bar.update)
        for name in report.open_configs:
            print(f"open: {name} is not finished; what is there was checked. Run its command again to go on")
        for problem in report.problems:
            print(f"wrong: {problem}")
        if report.problems:
            print(f"FAILED: {len(report.problems)} problems in {self.folder}")
            _next(
                "restore the file from where it was made or published, or delete it and run the builder's command again"
            )
            return 1
        if report.sent and not self._sent(report.sent):
            return 1
        print(f"ok: {report.num_samples} samples, {filesize(report.num_bytes)} in finished shards of {self.folder}")
        if self.replay and report.open_configs:
            print("not replayed: only finished configurations are")
        elif self.replay:
            self._replay(root)
        unasked = " --hub" if report.sent and not self.hub else ""
        folder = shlex.quote(self.folder)
        _next(f"tracekit verify {folder}{unasked}  # asks the Hub" if unasked else f"tracekit show {folder}")
        return 0

    def _sent(self, entries: list[Sent]) -> bool:
        """Say where the shards are that are not here, and ask the Hub about them if that is wanted."""
        from tracekit.snapshot import lost_files

        size = filesize(sum(entry.num_bytes for entry in entries))
        where = sorted({f"{entry.repo} {entry.version}" for entry in entries})
        print(f"not here: {len(entries)} shards, {size}; by the journal (hub/) they were sent to {', '.join(where)}")
        if not self.hub:
            return True
        lost = lost_files(entries)
        for entry in lost:
            print(f"wrong: {entry.repo} does not have {entry.path} as it was sent")
        if lost:
            print(f"FAILED: {len(lost)} of {len(entries)} shards are not on the Hub")
            _next("delete the journal in hub/ and run the builder's command again, which makes them anew")
            return False
        print(f"on the Hub: all {len(entries)} shards, each with its SHA-256")
        return True

    def _replay(self, root: Path) -> None:
        from tracekit.replay import replay_stored

        for name in [self.dataset_config] if self.dataset_config else config_names(root):
            result = replay_stored(
                Layout(root, name),
                self.replay,
                model=self.model,
                model_path=self.model_path,
                adapter=self.adapter,
                device=self.device,
            )
            print("\n".join(verification_lines(result)))


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

    def run(self) -> int:
        names = [] if HubPath.parse(self.folder) else config_names(Path(self.folder))
        if self.dataset_config is None and self.key is None and self.prompt_sha256 is None and len(names) > 1:
            for name in names:
                _show_config(TraceStore(self.folder, config=name), self.examples, as_json=self.json)
            return 0
        with TraceStore(self.folder, config=self.dataset_config) as store:
            if self.key is not None:
                _show_samples([store.record(self.key)], as_json=self.json)
            elif self.prompt_sha256 is not None:
                _show_samples([sample.record for sample in store.by_prompt(self.prompt_sha256)], as_json=self.json)
            else:
                _show_config(store, self.examples, as_json=self.json)
                if not self.json and len(store):
                    named = f" --dataset-config {self.dataset_config}" if self.dataset_config else ""
                    _next(f"tracekit show {shlex.quote(self.folder)}{named} --key {store.keys[0]}")
        return 0


class Merge(msgspec.Struct, frozen=True, kw_only=True):
    """Join runs that differ only in their slice of the source."""

    folders: tyro.conf.Positional[tuple[str, ...]]
    """Folders of the runs, two or more."""
    out: str
    """Folder of the joined dataset; must not exist."""
    dataset_config: str | None = None
    """Configuration to join, where there are several."""

    def run(self) -> int:
        from tracekit.merge import merge

        if len(self.folders) < 2:
            raise ConfigError(f"merge needs two folders or more, got {len(self.folders)}")
        manifest = merge([Path(folder) for folder in self.folders], Path(self.out), config=self.dataset_config)
        print(f"{sum(s.num_samples for s in manifest.splits)} samples in {self.out}")
        _next(f"tracekit verify {shlex.quote(self.out)}")
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
        from tracekit.publish import free_shards, publish

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
            print(f"change          {reason}")
        if not (done.change.reasons or done.was_there):
            print("change          none in the data since the latest version")
        for note in done.notes:
            print(f"note: {note}", file=sys.stderr)
        if done.was_there:
            print(f"nothing to do: {self.repo} has this content as {done.version}")
        elif self.dry_run:
            print(f"would send      {done.num_files} files, {filesize(done.num_bytes)}, to {self.repo}")
            print(f"would release   {done.version} (nothing was sent)")
        else:
            print(f"sent            {done.num_files} files, {filesize(done.num_bytes)}")
            print(f"released        {self.repo} {done.version} (commit {done.commit})")
        if self.dry_run:
            return 0
        if self.free_local and (freed := free_shards(Path(self.folder), self.repo)):
            print(f"freed           {filesize(freed)} here")
        name = config_names(Path(self.folder))[0]
        _next(f'tracekit.load_dataset("{self.repo}", "{name}", revision="{done.version}")')
        return 0


Command = Verify | Show | Merge | Publish


def metric_lines(manifest: Manifest) -> list[str]:
    """The task's numbers, a line each; accuracy with the rule behind it."""
    rule = manifest.run.get("correctness")
    lines = []
    for metric in manifest.metrics:
        note = f"  (by {rule})" if metric.name == "accuracy" and rule else ""
        if metric.name == "truncated_share" and metric.value == 1:
            note = "  (every answer ran into --max-new-tokens: raise it?)"
        if metric.name == "fresh_head_share" and metric.value:
            note = "  (the multiple-choice head was drawn at random: predictions mean nothing)"
        lines.append(f"{metric.name:18s} {metric.value:.4g}{note}")
    return lines


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


def _show_config(store: TraceStore, num_examples: int, *, as_json: bool) -> None:
    info = msgspec.to_builtins(store.info())
    if as_json:
        print(json.dumps(info, indent=2))
        return
    facts = {
        "folder": ", ".join(info["paths"]),
        "task": f"{info['task']} ({', '.join(sorted(set(info['configs'])))})" + " - not finished" * info["is_open"],
        "model": "; ".join(_model_text(model) for model in info["models"]),
        "samples": "; ".join(f"{split['num_samples']} in {split['name']}" for split in info["splits"]),
        "size": filesize(info["num_bytes"]),
    }
    for name, text in facts.items():
        print(f"{name:16s} {text}")
    for tensor in info["tensors"]:
        axes = f"({', '.join(tensor['axes'])})"
        print(
            f"{tensor['name']:16s} {tensor['dtype']:9s} {axes:16s} {tensor['layout']:7s} "
            f"{filesize(tensor['num_bytes'])}"
        )
    for path, config in zip(info["paths"], info["configs"], strict=False):
        hub = HubPath.parse(path)
        manifest = Layout(open_remote(hub, config).root if hub else Path(path), config).manifest
        if manifest.exists():
            print("\n".join(metric_lines(read_struct(manifest, Manifest))))
    print()
    for key in store.keys[:num_examples]:
        print(_one_line(store.record(key)))


def _model_text(model: dict[str, Any]) -> str:
    extras = [model["dtype"], model["quantization"], model["adapter"] and f"adapter {model['adapter']}"]
    return f"{model['id']} at {model['revision'][:23]}, {', '.join(extra for extra in extras if extra)}"


def _show_samples(records: list[Any], *, as_json: bool) -> None:
    if as_json:
        print(
            json.dumps(msgspec.to_builtins(records[0] if len(records) == 1 else records), indent=2, ensure_ascii=False)
        )
        return
    for record in records:
        print(_one_line(record))
        for name in msgspec.structs.fields(type(record)):
            value = getattr(record, name.name)
            if name.name == "tensors":
                for spec in value:
                    print(f"  {spec.name:16s} {spec.dtype:9s} {spec.shape} ({', '.join(spec.axes)}) {spec.layout}")
            elif name.name not in ("model", "generation"):
                text = json.dumps(msgspec.to_builtins(value), ensure_ascii=False)
                print(f"{name.name:20s} {text if len(text) <= _WIDTH else text[: _WIDTH - 3] + '...'}")


def _one_line(record: Any) -> str:
    """A sample in a line: key, right or wrong, question, answer."""
    is_correct = getattr(record, "is_correct", None)
    verdict = "" if is_correct is None else "right" if is_correct else "wrong"
    asked, outcome, wanted = (" ".join(text.split()) for text in record.summary())
    accepted = f"  (accepted: {wanted})" if wanted else ""
    return f"{record.key}  {verdict:5s}  {_short(asked, 70)}  ->  {_short(outcome, 70)}{accepted}"


def _short(text: str, width: int) -> str:
    return text if len(text) <= width else text[: width - 3] + "..."


def _next(command: str) -> None:
    print(f"next: {command}", file=sys.stderr)
