"""Where every file of a dataset folder lies. A contract; nothing else in tracekit builds these paths.

<out>/
  README.md                            the card
  manifest.json                        index of the configurations, written last
  plans/<config>.json                  written first; replaced whole where the dataset grows
  manifests/<config>.json              written when the configuration is complete
  schemas/<config>.json                JSON Schema of its record
  data/<config>/<split>-00000.tar      shards
  sidecars/<config>/<split>-00000.json a finished shard's index, records and hash (stays here, not published)
  records/<config>/<split>.parquet     one flat row a sample, where its bytes are, and their checksums
  records/<config>/<split>.tar         the records alone, as WebDataset
  questions/<config>.jsonl             questions that a model wrote, and how: <config>.json
  labels/<config>/<set>.jsonl          labels that a judge gave the samples, and their summary: <set>.json
  load_traces.py                       loading script for `datasets`
  figures/<config>-*.png               figures of a published card
  data/<config>/keys.partial           lock of a server, and the first number it has not given away as a key
  hub/<owner>--<name>.jsonl            what was sent to the Hub (stays here, not published)
  logs/ exports/ output/ *.partial     beside the dataset, neither verified nor published
"""

import errno
import fcntl
import mmap
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from tracekit.errors import DatasetError

__all__ = [
    "Layout",
    "append_line",
    "choose_config",
    "config_names",
    "create_once",
    "cut_torn_line",
    "forget",
    "is_ignored",
    "is_no_space",
    "is_same_file",
    "locked",
    "may_become_dataset",
    "shard_name",
    "sync_folder",
    "write_atomic",
]

MAX_SHARDS = 10_000
"""Files in one folder that the Hub takes."""
IGNORED_FOLDERS = ("hub", "logs", "exports", "output")
_BEFORE_THE_PLAN = ("questions",)
PARTIAL_SUFFIX = ".partial"


def is_ignored(relative_path: str) -> bool:
    """Whether a file lies beside the dataset rather than in it."""
    return relative_path.split("/")[0] in IGNORED_FOLDERS or relative_path.endswith(PARTIAL_SUFFIX)


def may_become_dataset(folder: Path) -> bool:
    """Whether a dataset may be begun in a folder: one is there, or nothing is but what may lie beside one."""
    if not folder.exists() or (folder / "plans").is_dir():
        return True
    return {path.name for path in folder.iterdir()} <= {*IGNORED_FOLDERS, *_BEFORE_THE_PLAN}


def shard_name(split: str, number: int) -> str:
    """Name of a shard, without its ending."""
    return f"{split}-{number:05d}"


class Layout(NamedTuple):
    """The paths of one configuration in one dataset folder."""

    root: Path
    config: str

    @property
    def plan(self) -> Path:
        return self.root / "plans" / f"{self.config}.json"

    @property
    def manifest(self) -> Path:
        return self.root / "manifests" / f"{self.config}.json"

    @property
    def schema(self) -> Path:
        return self.root / "schemas" / f"{self.config}.json"

    @property
    def dataset_index(self) -> Path:
        return self.root / "manifest.json"

    @property
    def card(self) -> Path:
        return self.root / "README.md"

    @property
    def script(self) -> Path:
        return self.root / "load_traces.py"

    @property
    def log(self) -> Path:
        return self.root / "logs" / f"{self.config}.jsonl"

    @property
    def text_log(self) -> Path:
        return self.root / "logs" / f"{self.config}.log"

    @property
    def questions(self) -> Path:
        return self.root / "questions" / f"{self.config}.jsonl"

    def labels(self, name: str) -> Path:
        return self.root / "labels" / self.config / f"{name}.jsonl"

    def shard(self, name: str) -> Path:
        return self.root / "data" / self.config / f"{name}.tar"

    def sidecar(self, name: str) -> Path:
        return self.root / "sidecars" / self.config / f"{name}.json"

    def partial_shard(self, name: str) -> Path:
        return self.root / "data" / self.config / f"{name}.tar{PARTIAL_SUFFIX}"

    def journal(self, name: str) -> Path:
        return self.root / "data" / self.config / f"{name}.journal{PARTIAL_SUFFIX}"

    @property
    def keys(self) -> Path:
        return self.root / "data" / self.config / f"keys{PARTIAL_SUFFIX}"

    def records_table(self, split: str) -> Path:
        return self.root / "records" / self.config / f"{split}.parquet"

    def records_tar(self, split: str) -> Path:
        return self.root / "records" / self.config / f"{split}.tar"


def config_names(root: Path) -> list[str]:
    """Configurations begun in a folder, by their plans.

    Raises:
        DatasetError: the folder does not exist, or holds no plan.
    """
    if not root.is_dir():
        text = str(root)
        hint = ""
        if text.startswith("hf:"):
            hint = "; this needs a folder: fetch the dataset with huggingface_hub.snapshot_download first"
        elif text.count("/") == 1 and not text.startswith((".", "~", "/")):
            hint = f"; if a dataset on the Hub is meant, write hf://datasets/{text}@v1.0.0"
        raise DatasetError(f"no such folder: {text!r}{hint}")
    names = sorted(path.stem for path in (root / "plans").glob("*.json"))
    if not names:
        raise DatasetError(f"{str(root)!r} is not a tracekit dataset: it holds no plans/<config>.json")
    return names


def choose_config(names: Sequence[str], config: str | None, where: object) -> str:
    """The configuration that is meant: the one that was named, or the only one.

    Raises:
        DatasetError: none was named and there are several, or there is none of this name.
    """
    if config is None and len(names) > 1:
        raise DatasetError(
            f"{where} holds several configurations ({', '.join(names)}); name one with `config` (on the command line "
            "--dataset-config, in load_dataset the second argument)"
        )
    chosen = names[0] if config is None else config
    if chosen not in names:
        raise DatasetError(f"{where} holds no configuration {chosen!r}; it holds: {', '.join(names)}")
    return chosen


def write_atomic(path: Path, data: bytes) -> None:
    """Write a file so that it is there whole or not at all, also after a crash."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + PARTIAL_SUFFIX)
    with temporary.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
    sync_folder(path.parent)


def append_line(path: Path, line: str) -> None:
    """Add a line to a log, below what a crash may have cut short."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab+") as file:
        size = file.seek(0, os.SEEK_END)
        is_torn = size > 0 and os.pread(file.fileno(), 1, size - 1) != b"\n"
        file.write(b"\n" * is_torn + line.encode() + b"\n")


def cut_torn_line(descriptor: int) -> None:
    """Cut off the last line of a file of lines where a crash cut it short.

    The file is open for reading and writing, and nobody else writes it meanwhile.
    """
    size = os.fstat(descriptor).st_size
    if size and os.pread(descriptor, 1, size - 1) != b"\n":
        with mmap.mmap(descriptor, size, access=mmap.ACCESS_READ) as whole:
            end = whole.rfind(b"\n") + 1
        os.ftruncate(descriptor, end)


def is_no_space(error: OSError) -> bool:
    """Whether an error says that a file found no more room: on the disk, in a quota, or by a limit of its size."""
    return error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def is_same_file(descriptor: int, path: Path) -> bool:
    """Whether a path still names the file that is open."""
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except OSError:
        return False


def create_once(path: Path, data: bytes) -> bool:
    """Write a file that must not be there yet; False, and nothing changed, where another process was first."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{os.getpid()}{PARTIAL_SUFFIX}")
    try:
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.link(temporary, path)
    except FileExistsError:
        return False
    finally:
        temporary.unlink(missing_ok=True)
    sync_folder(path.parent)
    return True


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold the lock of a file that is only ever replaced whole, by a holder of its lock: waits for other processes.

    What was read of the file before may be of another one by now: read it again in here.
    """
    with path.open("r+b") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def forget(layout: Layout) -> None:
    """Delete a configuration with its labels; its plan last, so that a crash in between leaves a run that can go on."""
    root, config = layout.root, layout.config
    layout.manifest.unlink(missing_ok=True)
    for folder in ("labels", "sidecars", "data", "records"):
        for path in sorted((root / folder / config).glob("*")):
            path.unlink()
    layout.schema.unlink(missing_ok=True)
    layout.plan.unlink(missing_ok=True)


def sync_folder(folder: Path) -> None:
    """Make renames in a folder durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
