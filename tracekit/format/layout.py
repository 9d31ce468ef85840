"""Where every file of a dataset folder lies. A contract; nothing else in tracekit builds these paths.

A dataset may come from a stranger. `inside` is the one way from a name to a path, for reading and for writing: it
refuses a path that leaves the folder, and a pipe, a device or a folder in place of a file.

<out>/
  README.md                            the card
  manifest.json                        index of the configurations, written last
  plans/<config>.json                  written first; replaced whole once the dataset has grown
  plans/<config>.growth.partial        the plan of a dataset that grows, until all of it is done
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
import re
import stat
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from tracekit.errors import DatasetError

__all__ = [
    "Layout",
    "append_line",
    "check_temporary",
    "choose_config",
    "config_names",
    "create_once",
    "cut_torn_line",
    "files_inside",
    "forget",
    "inside",
    "is_ignored",
    "is_no_space",
    "is_same_file",
    "key_fault",
    "locked",
    "may_become_dataset",
    "read_text",
    "read_whole",
    "records_tar_path",
    "shard_name",
    "shard_path",
    "sweep",
    "sync_folder",
    "whole_or_not",
    "write_atomic",
]

MAX_SHARDS = 10_000
"""Files in one folder that the Hub takes."""
IGNORED_FOLDERS = ("hub", "logs", "exports", "output")
_BEFORE_THE_PLAN = ("questions",)
PARTIAL_SUFFIX = ".partial"
MAX_WHOLE_BYTES = 1 << 30
"""Most bytes of a file that is read whole: a plan, a manifest, a sidecar, labels, a card. Real ones are far smaller."""
_KEY = re.compile(r"[A-Za-z0-9_-]{1,80}")
"""A sample's key is the stem of its two tar members. A tar header has room for 100 characters, and a key may end in the
number of a sampled answer."""
_BLOB = re.compile(r"[0-9a-f]{40,64}")
_SWEPT = ("plans", "manifests", "schemas", "data", "sidecars", "records", "questions", "labels", *IGNORED_FOLDERS)


def is_ignored(relative_path: str) -> bool:
    """Whether a file lies beside the dataset rather than in it."""
    return relative_path.split("/")[0] in IGNORED_FOLDERS or relative_path.endswith(PARTIAL_SUFFIX)


def may_become_dataset(folder: Path) -> bool:
    """Whether a dataset may be begun in a folder: one is there, or nothing is but what may lie beside one."""
    if not folder.exists() or (folder / "plans").is_dir():
        return True
    return {path.name for path in folder.iterdir()} <= {*IGNORED_FOLDERS, *_BEFORE_THE_PLAN}


def inside(root: Path, name: str, *, is_folder: bool = False) -> Path:
    """The path of a file of a dataset, or of a folder; it need not be there yet.

    A link may lead to another place of the same dataset. In the Hub's cache it may lead to the cache's own blobs.

    Raises:
        DatasetError: the name or a link leads out of the folder, a link leads nowhere, or something else lies there:
            a pipe, a device, a socket, a folder in place of a file.
    """
    parts = name.split("/")
    if not set(parts).isdisjoint(("", ".", "..")) or "\0" in name:
        raise DatasetError(f"{name!r} is no path inside the dataset {str(root)!r}; it was not opened")
    here = str(root)
    for number, part in enumerate(parts, start=1):
        here = f"{here}/{part}"
        try:
            mode = os.lstat(here).st_mode
            if stat.S_ISLNK(mode):
                mode = os.lstat(_target(root, here)).st_mode
        except FileNotFoundError:
            break
        expects_folder = is_folder or number < len(parts)
        if not (stat.S_ISDIR(mode) if expects_folder else stat.S_ISREG(mode)):
            raise DatasetError(
                f"{here} is {_kind(mode)}, expected {'a folder' if expects_folder else 'a regular file'}; it was not "
                "opened. Delete it, or fetch the dataset again"
            )
    return root / name


def _target(root: Path, link: str) -> Path:
    """Where a link in a dataset leads.

    The Hub's cache holds `<repository>/snapshots/<commit>/<path>`, links to `<repository>/blobs/<hash>`, which may be
    links to `<cache>/blobs/<first two letters>/<hash>`.

    Raises:
        DatasetError: out of the folder, or nowhere.
    """
    target, home = Path(os.path.realpath(link)), root.resolve()
    repository = home.parent.parent
    blobs = (repository / "blobs", repository.parent / "blobs" / target.name[:2])
    is_blob = home.parent.name == "snapshots" and target.parent in blobs and _BLOB.fullmatch(target.name) is not None
    if not is_blob and home not in target.parents:
        raise DatasetError(
            f"{link} is a symbolic link that leads out of the dataset; it was not followed. Put the file in its place"
        )
    if not target.exists():
        raise DatasetError(f"{link} is a symbolic link to nothing; put the file in its place")
    return target


def _kind(mode: int) -> str:
    """What lies at a path, in words."""
    kinds = {stat.S_IFDIR: "a folder", stat.S_IFREG: "a file", stat.S_IFIFO: "a pipe", stat.S_IFSOCK: "a socket"}
    return kinds.get(stat.S_IFMT(mode), "a device")


def files_inside(root: Path, folder: str, pattern: str) -> list[Path]:
    """The files of one folder of a dataset that match a pattern, sorted; none where the folder is not there.

    Raises: as `inside`.
    """
    found = sorted(path.name for path in inside(root, folder, is_folder=True).glob(pattern))
    return [inside(root, f"{folder}/{name}") for name in found]


def check_temporary(path: Path) -> Path:
    """A path that is written before the file gets its name: nothing is there, or what an earlier process left.

    Raises:
        DatasetError: a link or another thing that is no regular file is there: writing would change another file.
    """
    inside(path.parent, path.name)
    try:
        found = path.lstat()
    except FileNotFoundError:  # another process may have given it its name just now
        return path
    if stat.S_ISLNK(found.st_mode):
        raise DatasetError(f"{path} is a symbolic link; it was not written through. Delete it")
    if found.st_nlink > 1:  # another name of a file elsewhere, or of what a crash left
        path.unlink(missing_ok=True)
    return path


def read_whole(path: Path) -> bytes:
    """The bytes of a file.

    Raises:
        DatasetError: it cannot be read, or is larger than any such file is.
    """
    try:
        with path.open("rb") as file:
            if (size := os.fstat(file.fileno()).st_size) > MAX_WHOLE_BYTES:
                raise DatasetError(f"{path} has {size} bytes, expected at most {MAX_WHOLE_BYTES}; it was not read")
            return file.read()
    except OSError as error:
        raise DatasetError(f"{path} cannot be read: {error.strerror}") from error


def read_text(path: Path) -> str:
    """The text of a file.

    Raises:
        DatasetError: as `read_whole`, or it is not UTF-8.
    """
    try:
        return read_whole(path).decode()
    except UnicodeDecodeError as error:
        raise DatasetError(f"{path} is not UTF-8 (byte {error.start}); mend it, or delete it") from error


def key_fault(key: object) -> str | None:
    """Why something is no key of a sample; None where it is one."""
    if isinstance(key, str) and _KEY.fullmatch(key):
        return None
    return f"the key {key!r:.200}; a key has 1 to 80 characters, each a letter of ASCII, a digit, '_' or '-'"


def shard_name(split: str, number: int) -> str:
    """Name of a shard, without its ending."""
    return f"{split}-{number:05d}"


def shard_path(config: str, name: str) -> str:
    """Path of a shard in a dataset."""
    return f"data/{config}/{name}.tar"


def records_tar_path(config: str, split: str) -> str:
    """Path of the records of a split, as a tar, in a dataset."""
    return f"records/{config}/{split}.tar"


class Layout(NamedTuple):
    """The paths of one configuration in one dataset folder.

    Raises:
        DatasetError: as `inside`, from every property and method.
    """

    root: Path
    config: str

    @property
    def plan(self) -> Path:
        return inside(self.root, f"plans/{self.config}.json")

    @property
    def growth(self) -> Path:
        return inside(self.root, f"plans/{self.config}.growth{PARTIAL_SUFFIX}")

    @property
    def manifest(self) -> Path:
        return inside(self.root, f"manifests/{self.config}.json")

    @property
    def schema(self) -> Path:
        return inside(self.root, f"schemas/{self.config}.json")

    @property
    def dataset_index(self) -> Path:
        return inside(self.root, "manifest.json")

    @property
    def card(self) -> Path:
        return inside(self.root, "README.md")

    @property
    def script(self) -> Path:
        return inside(self.root, "load_traces.py")

    @property
    def log(self) -> Path:
        return inside(self.root, f"logs/{self.config}.jsonl")

    @property
    def text_log(self) -> Path:
        return inside(self.root, f"logs/{self.config}.log")

    @property
    def questions(self) -> Path:
        return inside(self.root, f"questions/{self.config}.jsonl")

    @property
    def question_set(self) -> Path:
        return inside(self.root, f"questions/{self.config}.json")

    def labels(self, name: str) -> Path:
        return inside(self.root, f"labels/{self.config}/{name}.jsonl")

    def shard(self, name: str) -> Path:
        return inside(self.root, shard_path(self.config, name))

    def sidecar(self, name: str) -> Path:
        return inside(self.root, f"sidecars/{self.config}/{name}.json")

    def partial_shard(self, name: str) -> Path:
        return inside(self.root, f"data/{self.config}/{name}.tar{PARTIAL_SUFFIX}")

    def journal(self, name: str) -> Path:
        return inside(self.root, f"data/{self.config}/{name}.journal{PARTIAL_SUFFIX}")

    @property
    def keys(self) -> Path:
        return inside(self.root, f"data/{self.config}/keys{PARTIAL_SUFFIX}")

    def records_table(self, split: str) -> Path:
        return inside(self.root, f"records/{self.config}/{split}.parquet")

    def records_tar(self, split: str) -> Path:
        return inside(self.root, records_tar_path(self.config, split))


def config_names(root: Path) -> list[str]:
    """Configurations begun in a folder, by their plans.

    Raises:
        DatasetError: the folder does not exist, or holds no plan.
    """
    if not root.is_dir():
        text = str(root)
        hint = "; it is a file: give the folder of the dataset" if root.is_file() else ""
        if text.startswith("hf:"):
            hint = "; this needs a folder: fetch the dataset with huggingface_hub.snapshot_download first"
        elif not hint and text.count("/") == 1 and not text.startswith((".", "~", "/")):
            hint = f"; if a dataset on the Hub is meant, write hf://datasets/{text}@v1.0.0"
        raise DatasetError(f"no such folder: {text!r}{hint}")
    names = [path.stem for path in files_inside(root, "plans", "*.json")]
    if not names:
        found = sorted({path.parent.parent.name for path in root.glob("*/plans/*.json")})[:5]
        hint = f"; give one of the datasets in it: {', '.join(map(repr, found))}" if found else ""
        raise DatasetError(f"{str(root)!r} is not a tracekit dataset: it holds no plans/<config>.json{hint}")
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
    with whole_or_not(path) as temporary:
        temporary.write_bytes(data)


@contextmanager
def whole_or_not(path: Path) -> Iterator[Path]:
    """A temporary path that takes the file's name once it is written; on return the file survives a crash."""
    with _temporary(path) as (temporary, descriptor):
        yield temporary
        os.fsync(descriptor)
        temporary.replace(path)
    sync_folder(path.parent)


@contextmanager
def _temporary(path: Path) -> Iterator[tuple[Path, int]]:
    """`<path>.partial`, empty, and a descriptor that locks it: other processes wait, and `sweep` leaves it alone."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = check_temporary(path.with_name(path.name + PARTIAL_SUFFIX))
    with _held(temporary, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW) as descriptor:
        os.ftruncate(descriptor, 0)
        yield temporary, descriptor


@contextmanager
def _held(path: Path, flags: int) -> Iterator[int]:
    """Wait for the lock of a file, and hold it: of the file that bears this name then."""
    while True:
        descriptor = os.open(path, flags, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            if is_same_file(descriptor, path):
                yield descriptor
                return
        finally:
            os.close(descriptor)


def sweep(root: Path) -> None:
    """Delete the `*.partial` files that killed processes left in a dataset folder.

    A file stays that a process holds, and one that a run resumes: a growth, an unfinished shard and its journal.
    """
    for folder, folders, files in os.walk(root):  # links are not followed
        if Path(folder) == root:
            folders[:] = [name for name in folders if name in _SWEPT]
        for path in (Path(folder, name) for name in files if name.endswith(PARTIAL_SUFFIX)):
            if not _is_resumed(root, path):
                _delete_unheld(path)


def _is_resumed(root: Path, path: Path) -> bool:
    """Whether a run takes up what is in a `*.partial` file."""
    kind, name = path.relative_to(root).parts[0], path.name.removesuffix(PARTIAL_SUFFIX)
    if kind != "data":
        return kind == "plans" and name.endswith(".growth")
    sidecar = root / "sidecars" / path.parent.name / f"{name.removesuffix('.journal')}.json"
    return not (name.startswith("driver-") or (name.endswith(".journal") and sidecar.exists()))


def _delete_unheld(path: Path) -> None:
    """Delete a file unless a process holds its lock."""
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError:  # gone, or not ours to delete
        return
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if is_same_file(descriptor, path):
            path.unlink()
    except BlockingIOError:
        pass
    finally:
        os.close(descriptor)


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
    with _temporary(path) as (temporary, descriptor):
        temporary.write_bytes(data)
        os.fsync(descriptor)
        try:
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
    with _held(path, os.O_RDWR):
        yield


def forget(layout: Layout) -> None:
    """Delete a configuration with its labels; its plan last, so that a crash in between leaves a run that can go on."""
    layout.manifest.unlink(missing_ok=True)
    layout.growth.unlink(missing_ok=True)
    for folder in ("labels", "sidecars", "data", "records"):
        for path in files_inside(layout.root, f"{folder}/{layout.config}", "*"):
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
