"""The loading script: manifests in, text of `load_traces.py` out; and what is wrong with one that arrived. Pure.

The script is tracekit/load_traces.py itself, read as text and never imported, with its two empty literals filled in:

    FINGERPRINT = "<sha256>"     over the manifests' bytes, in the order of the configurations' names
    DATASET = {<config>: {
        "splits":   {<split>: [{"path": "data/<config>/<split>-00000.tar", "num_samples": 256, "num_bytes": 1048576}]},
        "records":  {<split>: [{"path": "records/<config>/<split>.tar", "num_samples": 256, "num_bytes": 4096}]},
        "features": {"key": "string", "token_ids": ["int64"], "spans": [{"name": "string", "start": "int64"}]},
        "tensors":  [{"name": "hidden_states", "dtype": "float16", "axes": ["L", "T", "D"], "layout": "dense"}]}}
"""

import hashlib
import json
import re
from collections.abc import Collection, Mapping, Sequence
from importlib.resources import files
from typing import Any

import pyarrow as pa

from tracekit.errors import DatasetError
from tracekit.format.layout import records_tar_path, shard_path
from tracekit.format.manifest import Manifest, to_bytes
from tracekit.records import SCHEMA_VERSION, RecordSchema
from tracekit.tensors import is_companion

__all__ = ["render_script", "script_problem"]

_FINGERPRINT = '\nFINGERPRINT = ""\n'
_FILLED_IN = r'\nFINGERPRINT = "([0-9a-f]{64})"\n'
_DATASET = "\nDATASET: dict[str, Any] = {}\n"

RELEASED_TEMPLATES = {
    "9cbeb74e0dea6436048fe3563002f3f15cea8675acfae5d81331d2c6f19e058b": "1.0",
    "ffb2dd62a50fcfb39fda219c48517c23a84f9d7ec7f1c773e57ec68b046376e1": "1.0",
    "3c046f7a5c1e320a0535795e52208ac5c5bfa11f5c8fb830e69f5ef174d4b5de": "1.0",
    "77dd43d5b02318896072817ad979d73c0a0ba05ba66ae5ccfbcd144d26000f67": "1.0",
    "d3aabfb287f61c08ea98e4b36555dc7150afa87c6f0f3f71ac7625e2fe5e3f5e": "1.1",
    "16978683a35ecd22481c6bb85548ac4d7946a028522e511d2a10c62259c32208": "1.1",
    "fb4b9e1a5aef6c1289be0b7bdb0465a878bf1ada021e653a93239ecb90ccfb94": "1.1",
}
"""SHA-256 of tracekit/load_traces.py as earlier versions had it, and their schema. Before the file changes, the hash of
its released text is added here."""


def render_script(manifests: Sequence[Manifest], schemas: Mapping[str, RecordSchema]) -> str:
    """The loading script of a dataset of these configurations; records of the first are the default. `schemas` are of
    their records, by the configuration's name.

    Raises:
        DatasetError: two configurations would share a name in the script.
    """
    names = [name for manifest in manifests for name in (manifest.config, f"{manifest.config}_records")]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise DatasetError(
            f"two configurations of load_traces.py would be named {twice[0]!r}: each configuration also has "
            "<config>_records. Choose another --dataset-config"
        )
    fingerprint = _fingerprint(manifests)
    # JSON without booleans and null is Python too, and its layout is the same in every version
    described = json.dumps({m.config: _describe(m, schemas[m.config]) for m in manifests}, indent=4, ensure_ascii=False)
    source = _template()
    for old, new in ((_FINGERPRINT, f'"{fingerprint}"'), (_DATASET, described)):
        assert source.count(old) == 1, old
        name, _, _ = old.rpartition(" = ")
        source = source.replace(old, f"{name} = {new}\n")
    return source


def script_problem(
    script: bytes, manifests: Sequence[Manifest], schemas: Mapping[str, RecordSchema], paths: Collection[str] = ()
) -> str | None:
    """How a script differs from those of all released versions, or what its literals say that the manifests do not:
    another shape, dtype or file would be read from right bytes. None where neither is so.

    Its two literals are blanked before the rest is compared: they have to be JSON, which holds no code. `paths` are the
    files of configurations without a manifest; nothing else is known of these.
    """
    different = "differs from the script of every released version; do not run it. Fetch the dataset again"
    try:
        text, fingerprint, described = _blanked(script.decode())
    except (ValueError, RecursionError):
        return different
    if text != _template() and hashlib.sha256(text.encode()).hexdigest() not in RELEASED_TEMPLATES:
        return different
    listed = {manifest.config: manifest for manifest in manifests}
    strange = sorted(_paths_in({name: said for name, said in described.items() if name not in listed}) - {*paths})
    if strange:
        return f"reads {strange[0]!r}, which no manifest lists; do not run it"
    for name, manifest in listed.items():
        field = _wrong_field(manifest, schemas[name], described.get(name))
        if field is not None:
            return f"says other {field} of {name!r} than its manifest; do not run it. Fetch the dataset again"
    is_whole = described.keys() == listed.keys() and {m.schema_version for m in manifests} == {SCHEMA_VERSION}
    if is_whole and fingerprint != _fingerprint(manifests):  # other versions may have written other bytes
        return "has the fingerprint of other manifests: `datasets` would take its rows for theirs. Fetch it again"
    return None


def _wrong_field(manifest: Manifest, schema: RecordSchema, said: Any) -> str | None:
    """The first field of a configuration's entry that is not what its manifest says; None where all are."""
    expected = _describe(manifest, schema)
    if not isinstance(said, dict) or said.keys() != expected.keys():
        return "fields"
    return next((field for field in expected if said[field] != expected[field]), None)


def _fingerprint(manifests: Sequence[Manifest]) -> str:
    """What tells the script of one dataset from that of another."""
    ordered = sorted(manifests, key=lambda manifest: manifest.config)
    return hashlib.sha256(b"".join(to_bytes(manifest) for manifest in ordered)).hexdigest()


def _template() -> str:
    """The script of this version, its literals empty."""
    return files("tracekit").joinpath("load_traces.py").read_text("utf-8")


def _blanked(script: str) -> tuple[str, str, dict[str, Any]]:
    """A script with its literals empty, and what they say.

    Raises:
        ValueError: it has no such literals.
    """
    fingerprints = re.findall(_FILLED_IN, script)
    text = re.sub(_FILLED_IN, _FINGERPRINT, script)
    before, equals, after = text.partition(_DATASET.removesuffix("{}\n"))
    if len(fingerprints) != 1 or not equals:
        raise ValueError("no literals")
    described, end = json.JSONDecoder(object_pairs_hook=_without_twins).raw_decode(after)
    if not isinstance(described, dict):
        raise ValueError("no dictionary")
    return f"{before}{equals}{{}}{after[end:]}", fingerprints[0], described


def _without_twins(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object; Python and JSON readers may differ in which of two equal names counts."""
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a name stands twice")
    return found


def _paths_in(described: Any) -> set[str]:
    """Every path that a script reads, by its second literal."""
    if isinstance(described, list):
        return {path for one in described for path in _paths_in(one)}
    if not isinstance(described, dict):
        return set()
    found = {path for value in described.values() for path in _paths_in(value)}
    return found | ({str(described["path"])} if "path" in described else set())


def _describe(manifest: Manifest, schema: RecordSchema) -> dict[str, Any]:
    """What the script has to know of one configuration.

    Raises:
        DatasetError: the manifest contradicts itself.
    """
    where = f"the manifest of {manifest.config!r}"
    sizes = {file.path: file.num_bytes for file in manifest.files}
    splits: dict[str, Any] = {split.name: [] for split in manifest.splits}
    records: dict[str, Any] = {}
    for shard in manifest.shards:
        if shard.split not in splits:
            raise DatasetError(f"{where}: shard {shard.name} is of the split {shard.split!r}, which it does not list")
        path = shard_path(manifest.config, shard.name)
        splits[shard.split].append({"path": path, "num_samples": shard.num_samples, "num_bytes": shard.num_bytes})
    for split in manifest.splits:
        path = records_tar_path(manifest.config, split.name)
        if path not in sizes:
            raise DatasetError(f"{where}: it does not list {path}. Run `tracekit verify` on the dataset")
        records[split.name] = [{"path": path, "num_samples": split.num_samples, "num_bytes": sizes[path]}]
    features = {field.name: _plain(field.type) for field in schema.arrow}
    tensors = [
        {"name": tensor.name, "dtype": tensor.dtype, "axes": tensor.axes, "layout": tensor.layout}
        for tensor in manifest.tensors
        if not is_companion(tensor.name)
    ]
    if twice := sorted(features.keys() & {tensor.name for tensor in manifest.tensors}):
        raise DatasetError(f"{where}: a tensor is named {twice[0]!r}, like a field of its records")
    return {"splits": splits, "records": records, "features": features, "tensors": tensors}


def _plain(arrow_type: pa.DataType) -> Any:
    """An Arrow type as name of a dtype, [type of the elements] or {name: type}."""
    if isinstance(arrow_type, pa.ListType):
        return [_plain(arrow_type.value_type)]
    if isinstance(arrow_type, pa.StructType):
        return {field.name: _plain(field.type) for field in arrow_type}
    return {"double": "float64"}.get(str(arrow_type), str(arrow_type))
