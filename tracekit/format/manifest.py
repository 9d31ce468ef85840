"""Plan, sidecar and manifest: what a run set out to do, what each shard became, and what the dataset is.

    plan       plans/<config>.json        written first; the shard tasks of the run
    growth     plans/<config>.growth.partial   the same tasks and more, while a dataset grows; at the end it is the plan
    sidecar    sidecars/<config>/*.json   written when its shard is whole; its existence means "done"
    manifest   manifests/<config>.json    written when every shard is; counts, hashes, verification
    index      manifest.json              every manifest of the folder, written last

None of them holds a clock or an absolute path, so the whole folder is reproducible.
"""

import hashlib
import zlib
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeVar

import msgspec
from msgspec import UNSET, UnsetType

from tracekit.errors import UNREADABLE, DatasetError
from tracekit.format.layout import Layout, files_inside, read_whole
from tracekit.plots import Picture
from tracekit.records import SCHEMA_VERSION, About, ModelInfo, RecordSchema, check_schema
from tracekit.storage import StorageLoss
from tracekit.tensors import TensorIndex

__all__ = [
    "TOO_LONG",
    "ConfigEntry",
    "FigureData",
    "FileInfo",
    "Growth",
    "Index",
    "LayerNorms",
    "Manifest",
    "Metric",
    "Plan",
    "SampleIndex",
    "ShardInfo",
    "ShardTask",
    "Sidecar",
    "SiteError",
    "SourceInfo",
    "SplitInfo",
    "TaskReport",
    "TensorSummary",
    "Verification",
    "check_known",
    "index_entry",
    "newest_schema",
    "read_growth",
    "read_manifest",
    "read_plan",
    "read_schema",
    "read_struct",
    "shard_info",
    "shard_names",
    "shard_number",
    "sidecar_checksum",
    "to_bytes",
]


ShardName = Annotated[str, msgspec.Meta(pattern=r"^\w[\w.-]*-\d{5,9}\Z")]
PlainName = Annotated[str, msgspec.Meta(pattern=r"^\w[\w.-]*\Z")]
FilePath = Annotated[str, msgspec.Meta(pattern=r"^\w[\w-]*(/\w[\w-]*)*(\.\w+)*\Z")]
SchemaVersion = Annotated[str, msgspec.Meta(pattern=r"^[0-9]{1,6}\.[0-9]{1,6}\Z")]
Sha256 = Annotated[str, msgspec.Meta(pattern=r"^[0-9a-f]{64}\Z")]
Size = Annotated[int, msgspec.Meta(ge=0)]


class _Stored(msgspec.Struct, frozen=True, kw_only=True):
    """Base of everything that is written as a JSON file. Readers ignore fields that they do not know; whatever
    continues a dataset refuses them (`read_plan(..., to_continue=True)`)."""


TOO_LONG = "too long"
"""What is said of a row that has more tokens than the model takes; a row of another fault is malformed."""


class SourceInfo(_Stored, frozen=True, kw_only=True):
    """The data a run went over."""

    id: str
    """Hub id, or name of the local file."""
    revision: str
    """Commit on the Hub, or `sha256:...` of the file."""
    subset: str | None
    """Configuration of the dataset on the Hub; null for a file."""
    split: PlainName
    """Split."""
    num_rows: int
    """Rows in the split."""
    num_used: int
    """Rows used, after offset, limit and skipped rows."""
    skipped: list[str]
    """Rows left out: where each was, and what was wrong; `too long` where it has more tokens than the model takes."""

    @property
    def left_out(self) -> str:
        """How many rows were left out, by reason: `3 malformed, 2 too long`."""
        num_long = sum(one.partition(": ")[2].startswith(f"{TOO_LONG}: ") for one in self.skipped)
        return f"{len(self.skipped) - num_long} malformed" + f", {num_long} too long" * (num_long > 0)


class ShardTask(_Stored, frozen=True, kw_only=True):
    """One unit of work: which rows of the source, in which batches, into which shard."""

    name: ShardName
    """Name of the shard, as `train-00000`."""
    number: int
    """Number of the shard in its split."""
    batches: list[list[int]]
    """Rows of the source, batch by batch, in the order in which they are computed and stored."""


class Growth(_Stored, frozen=True, kw_only=True):
    """A step by which a plan grew."""

    num_shards: int
    """Shards that were there before it: those after them were planned by this step, or a later one."""
    command: str
    """The command line until then, without `--out`."""


class Plan(_Stored, frozen=True, kw_only=True):
    """What a run sets out to do: enough for any process on a like machine to do any part of it."""

    schema_version: SchemaVersion
    """Version of the contract."""
    config: PlainName
    """Name of the configuration."""
    task: PlainName
    """Name of the task."""
    run: dict[str, Any]
    """The checked, merged run configuration, without `out` and `dry_run`."""
    model: ModelInfo
    """The model."""
    source: SourceInfo
    """The data."""
    batch_size: int
    """Questions a batch, resolved."""
    device_type: str
    """`cpu`, `cuda` or `mps`: bytes are the same on the same type only."""
    num_threads: int
    """Threads of torch: bf16 and sdpa results depend on it."""
    versions: dict[str, str]
    """Versions of the packages whose behaviour the bytes depend on."""
    shards: list[ShardTask]
    """Every shard task."""
    command: str = ""
    """The command line of this run, without `--out`; empty in plans of older versions. Plans are equal without it. Of a
    plan that grew: of the whole, which in an empty folder makes the same samples, dealt out to other shards."""
    grown: list[Growth] = []
    """How the plan grew, step by step; the same commands, one after the other, make the same shards."""
    about: About | None = None
    """What reading needs to know of the task; null in plans of schema 1.x."""
    code: str | None = None
    """The file that defines the task, where it is one file: `capitals.py@sha256:...`; null for a task in a package."""
    captured_from: Literal["decoding", "pass"] = "pass"
    """How traces of answers are taken, resolved: while answers are decoded, or in a pass afterwards. Samples for which
    the first is not proven take the second, and their records say so; of a server, records alone say it."""
    is_growing: bool = False
    """Whether samples come as they are asked for, as a server's do: its shards are then those that have a sidecar."""


class SampleIndex(_Stored, frozen=True, kw_only=True):
    """Where one sample lies in its shard; all offsets in bytes."""

    key: str
    """Key of the sample."""
    json_offset: int
    """Start of the record's JSON in the shard."""
    json_size: int
    """Its size."""
    tensors_offset: int
    """Start of the safetensors payload in the shard."""
    tensors_size: int
    """Its size."""
    data_offset: int
    """Start of the payload's data part in the shard."""
    tensors: list[TensorIndex]
    """Offset in the data part and size of each tensor."""
    checksums: bytes = b""
    """Packed checksums of its record and tensors (tracekit.format.checksums); empty before schema 2.0."""


class SiteError(_Stored, frozen=True, kw_only=True):
    """How far captured values of one site lie from those of a lone, unpadded, eager run."""

    site: str
    """Name of the site."""
    max_abs_error: float
    """Largest absolute difference."""
    max_rel_error: float
    """Largest, over samples, of the largest difference divided by the largest reference value."""
    min_cosine: float
    """Smallest cosine between captured and reference tensor, over samples."""
    tolerance: float
    """Largest `max_rel_error` that was let pass."""

    def or_worse(self, other: Self | None) -> Self:
        """The larger errors of two."""
        if other is None:
            return self
        return msgspec.structs.replace(
            self,
            max_abs_error=max(self.max_abs_error, other.max_abs_error),
            max_rel_error=max(self.max_rel_error, other.max_rel_error),
            min_cosine=min(self.min_cosine, other.min_cosine),
        )


class Verification(_Stored, frozen=True, kw_only=True):
    """What replaying samples alone, unpadded and eager, showed."""

    num_replayed: int
    """Samples run again alone."""
    num_positions: int
    """Answer positions of those samples."""
    num_agreeing: int
    """Positions among them at which both runs predict the same token."""
    sites: list[SiteError]
    """Largest errors per site."""

    def agreement(self) -> str:
        """How often both runs came to the same, in words; empty where nothing was predicted."""
        if not self.num_positions:
            return ""
        if any(error.site == "choice_logits" for error in self.sites):
            return f"same option in {self.num_agreeing} of {self.num_positions} questions"
        return f"same token at {self.num_agreeing} of {self.num_positions} positions"

    @classmethod
    def nothing(cls) -> Self:
        """Nothing was replayed."""
        return cls(num_replayed=0, num_positions=0, num_agreeing=0, sites=[])

    def with_more(self, other: Self) -> Self:
        """Both together: counts added, the larger errors kept."""
        worst = {error.site: error for error in self.sites}
        for error in other.sites:
            worst[error.site] = error.or_worse(worst.get(error.site))
        return type(self)(
            num_replayed=self.num_replayed + other.num_replayed,
            num_positions=self.num_positions + other.num_positions,
            num_agreeing=self.num_agreeing + other.num_agreeing,
            sites=[worst[site] for site in sorted(worst)],
        )


class LayerNorms(_Stored, frozen=True, kw_only=True):
    """L2 norms of hidden states, added up while the tensors are at hand."""

    layers: list[int]
    """Layers as `hidden_states` counts them: 0 is the embeddings."""
    sums: list[float]
    """Sum over tokens of the norm at each of those layers, added in float64, in the order of the samples."""
    num_tokens: int
    """Tokens in each sum."""

    def with_more(self, other: Self | None) -> Self:
        """Both together; of the same layers."""
        if other is None:
            return self
        assert self.layers == other.layers, (self.layers, other.layers)
        sums = [a + b for a, b in zip(self.sums, other.sums, strict=True)]
        return type(self)(layers=self.layers, sums=sums, num_tokens=self.num_tokens + other.num_tokens)


class Sidecar(_Stored, frozen=True, kw_only=True):
    """A finished shard: everything that finishing the dataset needs, so that the shard itself may be gone by then."""

    name: ShardName
    """Name of the shard."""
    number: int
    """Number of the shard in its split."""
    num_bytes: int
    """Size of the tar."""
    sha256: str
    """SHA-256 of the tar."""
    samples: list[SampleIndex]
    """Byte index, in the order of the tar."""
    records: list[msgspec.Raw]
    """The records, in the same order."""
    verification: Verification
    """What replays of its samples showed."""
    hidden_norms: LayerNorms | None = None
    """Norms of its hidden states; null where none are stored."""
    losses: list[StorageLoss] = []
    """What storing its tensors in smaller forms has cost; empty where they stand as they were captured."""
    checksum: int | None = None
    """`zlib.crc32` of this file's own bytes with null here; null before schema 2.0."""

    def with_checksum(self) -> Self:
        """The same, its checksum that of what it says now."""
        return msgspec.structs.replace(self, checksum=sidecar_checksum(to_bytes(self, compact=True)))


def sidecar_checksum(data: bytes) -> int:
    """What the checksum of a sidecar of these bytes has to be, fields of later versions included."""
    fields = msgspec.json.decode(data, type=dict[str, msgspec.Raw])
    return zlib.crc32(msgspec.json.encode(fields | {"checksum": msgspec.Raw(b"null")}))


class ShardInfo(_Stored, frozen=True, kw_only=True):
    """A shard in the manifest."""

    name: ShardName
    """Name."""
    number: int
    """Number in its split."""
    split: PlainName
    """Split."""
    num_samples: Size
    """Samples."""
    num_bytes: Size
    """Size of the tar."""
    sha256: Sha256
    """SHA-256 of the tar."""
    first_key: str
    """Smallest key."""
    last_key: str
    """Largest key."""


class SplitInfo(_Stored, frozen=True, kw_only=True):
    """A split of a configuration."""

    name: PlainName
    """Name."""
    num_samples: int
    """Samples."""
    num_bytes: int
    """Bytes of its shards."""


class TensorSummary(_Stored, frozen=True, kw_only=True):
    """One kind of tensor over a whole configuration."""

    name: str
    """Name of the tensor."""
    dtype: str
    """dtype."""
    axes: list[str]
    """Axes as stored."""
    layout: str
    """Layout."""
    num_bytes: int
    """Bytes of all of them."""


class Metric(_Stored, frozen=True, kw_only=True):
    """A number over a whole configuration, as its task defines it."""

    name: str
    """What it is."""
    value: float
    """Its value."""
    unit: str = ""
    """Its unit."""
    definition: str = ""
    """What it says, in a sentence; empty in manifests of schema 1.x."""
    warn_above: float | None = None
    """A person is warned where it is larger; null where it is never worrying."""
    warning: str = ""
    """What they are told, after the share in percent."""


class TaskReport(_Stored, frozen=True, kw_only=True):
    """What a task says of a configuration beyond what all tasks have, for `tracekit show --stats`."""

    data: Any
    """For `--json`: plain values."""
    lines: list[str] = []
    """A table for people."""
    pictures: list[Picture] = []
    """Pictures of it, for `--plots`."""
    metrics: list[Metric] = []
    """Numbers besides the plain means; in a manifest they stand among its metrics."""


class FigureData(_Stored, frozen=True, kw_only=True):
    """The numbers behind the card's figures; empty lists where a task or a run has none."""

    layers: list[int] = []
    """Layers of the norms, as `hidden_states` counts them."""
    mean_norms: list[float] = []
    """Mean L2 norm of a token's hidden state at each of those layers."""
    num_tokens: int = 0
    """Tokens each mean is over."""
    num_right: int = 0
    """Answers judged right."""
    num_wrong: int = 0
    """Answers judged wrong."""
    entropy_edges: list[float] = []
    """Edges of the histogram's bins, one more than there are bins, in nats."""
    entropy_right: list[int] = []
    """Right answers by the mean entropy of their tokens, a count a bin."""
    entropy_wrong: list[int] = []
    """Wrong answers, likewise."""


class FileInfo(_Stored, frozen=True, kw_only=True):
    """A file of the dataset other than a shard."""

    path: FilePath
    """Path in the dataset."""
    num_bytes: Size
    """Size."""
    sha256: Sha256
    """SHA-256."""


class Manifest(_Stored, frozen=True, kw_only=True):
    """A complete configuration."""

    schema_version: SchemaVersion
    """Version of the contract."""
    config: PlainName
    """Name of the configuration."""
    task: PlainName
    """Name of the task."""
    model: ModelInfo
    """The model."""
    source: SourceInfo
    """The data."""
    run: dict[str, Any]
    """The checked, merged run configuration."""
    device_type: str
    """Type of device that made it."""
    versions: dict[str, str]
    """Versions of the packages that made it."""
    splits: list[SplitInfo]
    """Splits."""
    shards: list[ShardInfo]
    """Every shard."""
    files: list[FileInfo]
    """Every other file of the configuration."""
    tensors: list[TensorSummary]
    """What is stored of each sample."""
    metrics: list[Metric]
    """The task's own numbers."""
    invariants: list[str]
    """What held for every sample, or it would not be here."""
    verification: Verification
    """What replays showed."""
    command: str = ""
    """What to type to make it again, without `--out`; two lines where a stage needs a command of its own; after a merge
    the commands of the parts, a line each, and the merge. Empty in manifests of older versions."""
    templates: list[str] = []
    """SHA-256 of every chat template that prompts were made with, sorted; empty where prompts are plain."""
    made_from: dict[str, list[str]] = {}
    """What the questions were made from, by field of the record; empty where a task
    takes them as they are."""
    figures: FigureData = FigureData()
    """The numbers behind the card's figures."""
    losses: list[StorageLoss] = []
    """What storing tensors in smaller forms has cost, measured on every sample; empty where they stand as they were
    captured."""
    about: About | None = None
    """What reading needs to know of the task; null in manifests of schema 1.x."""
    num_from_decoding: int = 0
    """Samples whose tensors were captured while their answers were decoded; those of all others are of a pass over the
    whole text. 0 before schema 2.1."""
    card: str | UnsetType = UNSET
    """The card's part about the configuration as its task words it, Markdown; not there in older manifests."""
    report: TaskReport | UnsetType = UNSET
    """What the task says of the configuration besides; not there where it says nothing more, and in older manifests."""


class ConfigEntry(_Stored, frozen=True, kw_only=True):
    """One configuration in the index."""

    name: PlainName
    """Name."""
    task: PlainName
    """Task."""
    num_samples: int
    """Samples."""
    num_bytes: int
    """Bytes of its shards."""
    manifest_sha256: Sha256
    """SHA-256 of its manifest."""


def newest_schema(manifests: Iterable[Manifest]) -> str:
    """The highest schema version among manifests; empty where there is none."""
    versions = [manifest.schema_version for manifest in manifests]
    return max(versions, key=_numbers, default="")


def index_entry(manifest: Manifest, data: bytes) -> ConfigEntry:
    """The index's entry of a configuration; `data` are the bytes of its manifest's file."""
    return ConfigEntry(
        name=manifest.config,
        task=manifest.task,
        num_samples=sum(split.num_samples for split in manifest.splits),
        num_bytes=sum(split.num_bytes for split in manifest.splits),
        manifest_sha256=hashlib.sha256(data).hexdigest(),
    )


class Index(_Stored, frozen=True, kw_only=True):
    """The configurations of a dataset folder."""

    schema_version: SchemaVersion
    """Version of the contract."""
    configs: list[ConfigEntry]
    """Every complete configuration, by name."""


StoredT = TypeVar("StoredT", bound=msgspec.Struct)
NamedT = TypeVar("NamedT", Plan, Manifest)


def read_struct(path: Path, struct: type[StoredT], *, to_continue: bool = False) -> StoredT:
    """Read and check one of these files.

    Args:
        path: The file.
        struct: What it holds.
        to_continue: Whether it is read to continue what it describes: fields that a later version added are refused
            then, because a version that does not know them would not do what they say.

    Raises:
        DatasetError: the file is missing or is not what it should be, or holds fields that are not known here.
    """
    data = b""
    try:
        data = read_whole(path)
        found = msgspec.json.decode(data, type=struct)
    except UNREADABLE as error:
        with suppress(*UNREADABLE):  # another major version has other fields
            check_schema(msgspec.json.decode(data, type=_Versioned).schema_version, where=path)
        raise DatasetError(f"{path} is not a tracekit {struct.__name__.lower()}: {error}") from error
    if to_continue:
        check_known(data, found, where=path)
    return found


def check_known(data: bytes, found: msgspec.Struct, *, where: object) -> None:
    """Refuse to continue what a later version began; `found` is what was decoded of `data`.

    Raises:
        DatasetError: a field is stored that is not known here, or the schema is a later one; as `check_schema`.
    """
    later, version = "", getattr(found, "schema_version", SCHEMA_VERSION)
    check_schema(version, where=where)
    if _numbers(version) > _numbers(SCHEMA_VERSION):
        later = f"schema {version}, and this one has {SCHEMA_VERSION}"
    if unknown := _unknown(msgspec.json.decode(data), found, "$"):
        later = f"the field `{unknown}`, which this one does not know"
    if later:
        raise DatasetError(
            f"{where}: a later tracekit wrote {later}; the dataset can be read, verified and published. To continue "
            "it: pip install -U tracekit-llm"
        )


def _numbers(version: str) -> list[int]:
    return [int(part) for part in version.split(".")]


def _unknown(stored: Any, known: Any, path: str) -> str | None:
    """The path of the first field that is stored and not known."""
    if isinstance(stored, dict) and isinstance(known, msgspec.Struct):
        for name, value in stored.items():
            if name not in known.__struct_fields__:
                return f"{path}.{name}"
            if (found := _unknown(value, getattr(known, name), f"{path}.{name}")) is not None:
                return found
    if isinstance(stored, list) and isinstance(known, list):
        pairs = enumerate(zip(stored, known, strict=True))
        return next((found for i, (a, b) in pairs if (found := _unknown(a, b, f"{path}[{i}]"))), None)
    return None


class _Versioned(msgspec.Struct):
    """The one field that every version of these files has."""

    schema_version: str


def to_bytes(struct: msgspec.Struct, *, compact: bool = False) -> bytes:
    """The bytes of such a file."""
    data = msgspec.json.encode(struct, order="deterministic")
    return data if compact else msgspec.json.format(data, indent=2) + b"\n"


def read_plan(layout: Layout, *, to_continue: bool = False) -> Plan:
    """The plan of a configuration.

    Raises:
        DatasetError: it is missing, is no plan, or is one of another configuration or major version; as `read_struct`.
    """
    return _of(layout, layout.plan, read_struct(layout.plan, Plan, to_continue=to_continue))


def read_manifest(layout: Layout, *, to_continue: bool = False) -> Manifest:
    """The manifest of a configuration.

    Raises:
        DatasetError: it is missing, is no manifest, or is one of another configuration or major version; as
            `read_struct`.
    """
    return _of(layout, layout.manifest, read_struct(layout.manifest, Manifest, to_continue=to_continue))


def _of(layout: Layout, path: Path, stored: NamedT) -> NamedT:
    """A plan or manifest that this version reads, and whose name is that of its file: paths are made of it."""
    if stored.config != layout.config:
        raise DatasetError(f"{path} is of the configuration {stored.config!r}, expected {layout.config!r}")
    check_schema(stored.schema_version, where=path)
    return stored


def read_growth(layout: Layout, *, to_continue: bool = False) -> Plan | None:
    """The plan that a configuration grows to; None where it does not grow.

    Its first shards are those of the plan. The others lie beside the dataset until all of them are done.
    """
    if not layout.growth.exists():
        return None
    return _of(layout, layout.growth, read_struct(layout.growth, Plan, to_continue=to_continue))


def read_schema(layout: Layout) -> RecordSchema:
    """The schema of a configuration's records.

    Raises:
        DatasetError: it is missing, or describes no records.
    """
    return RecordSchema.read(read_whole(layout.schema), where=str(layout.schema))


def shard_names(layout: Layout, plan: Plan) -> list[str]:
    """The shards of a plan, done or not; of a growing one those that have a sidecar, by number."""
    if not plan.is_growing:
        return [shard.name for shard in plan.shards]
    names = [path.stem for path in files_inside(layout.root, f"sidecars/{layout.config}", "*-[0-9]*.json")]
    return sorted(names, key=shard_number)


def shard_info(sidecar: Sidecar, split: str) -> ShardInfo:
    """A finished shard as the manifest describes it."""
    keys = [sample.key for sample in sidecar.samples]
    return ShardInfo(
        name=sidecar.name,
        number=sidecar.number,
        split=split,
        num_samples=len(keys),
        num_bytes=sidecar.num_bytes,
        sha256=sidecar.sha256,
        first_key=min(keys, default=""),
        last_key=max(keys, default=""),
    )


def shard_number(name: str) -> int:
    """Number of a shard, from its name."""
    return int(name.rpartition("-")[2])
