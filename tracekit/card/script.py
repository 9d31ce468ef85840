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
from collections.abc import Collection, Sequence
from importlib.resources import files
from typing import Any

import pyarrow as pa

from tracekit.errors import DatasetError
from tracekit.format.layout import records_tar_path, shard_path
from tracekit.format.manifest import Manifest, to_bytes
from tracekit.records import RECORD_TYPES, arrow_schema
from tracekit.tensors import is_companion

__all__ = ["render_script", "script_problem"]

_FINGERPRINT = '\nFINGERPRINT = ""\n'
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


def render_script(manifests: Sequence[Manifest]) -> str:
    """The loading script of a dataset of these configurations; records of the first are the default.

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
    ordered = sorted(manifests, key=lambda manifest: manifest.config)
    fingerprint = hashlib.sha256(b"".join(to_bytes(manifest) for manifest in ordered)).hexdigest()
    # JSON without booleans and null is Python too, and its layout is the same in every version
    described = json.dumps({m.config: _describe(m) for m in manifests}, indent=4, ensure_ascii=False)
    source = _template()
    for old, new in ((_FINGERPRINT, f'"{fingerprint}"'), (_DATASET, described)):
        assert source.count(old) == 1, old
        name, _, _ = old.rpartition(" = ")
        source = source.replace(old, f"{name} = {new}\n")
    return source


def script_problem(script: bytes, paths: Collection[str]) -> str | None:
    """How a script differs from those of all released versions, or reads a file that is not in `paths`; None where it
    does neither.

    Its two literals are blanked before the rest is compared: they have to be JSON, which holds no code.
    """
    different = "differs from the script of every released version; do not run it. Fetch the dataset again"
    try:
        text, described = _blanked(script.decode())
    except (ValueError, RecursionError):
        return different
    if text != _template() and hashlib.sha256(text.encode()).hexdigest() not in RELEASED_TEMPLATES:
        return different
    strange = sorted(_paths_in(described) - {*paths})
    return f"reads {strange[0]!r}, which no manifest lists; do not run it" if strange else None


def _template() -> str:
    """The script of this version, its literals empty."""
    return files("tracekit").joinpath("load_traces.py").read_text("utf-8")


def _blanked(script: str) -> tuple[str, Any]:
    """A script with its literals empty, and what its second one says.

    Raises:
        ValueError: it has no such literals.
    """
    text, count = re.subn(r'\nFINGERPRINT = "[0-9a-f]{64}"\n', _FINGERPRINT, script)
    before, equals, after = text.partition(_DATASET.removesuffix("{}\n"))
    if count != 1 or not equals:
        raise ValueError("no literals")
    described, end = json.JSONDecoder().raw_decode(after)
    if not isinstance(described, dict):
        raise ValueError("no dictionary")
    return f"{before}{equals}{{}}{after[end:]}", described


def _paths_in(described: Any) -> set[str]:
    """Every path that a script reads, by its second literal."""
    if isinstance(described, list):
        return {path for one in described for path in _paths_in(one)}
    if not isinstance(described, dict):
        return set()
    found = {path for value in described.values() for path in _paths_in(value)}
    return found | ({str(described["path"])} if "path" in described else set())


def _describe(manifest: Manifest) -> dict[str, Any]:
    """What the script has to know of one configuration."""
    sizes = {file.path: file.num_bytes for file in manifest.files}
    splits: dict[str, Any] = {split.name: [] for split in manifest.splits}
    records: dict[str, Any] = {}
    for shard in manifest.shards:
        path = shard_path(manifest.config, shard.name)
        splits[shard.split].append({"path": path, "num_samples": shard.num_samples, "num_bytes": shard.num_bytes})
    for split in manifest.splits:
        path = records_tar_path(manifest.config, split.name)
        records[split.name] = [{"path": path, "num_samples": split.num_samples, "num_bytes": sizes[path]}]
    features = {field.name: _plain(field.type) for field in arrow_schema(RECORD_TYPES[manifest.task])}
    tensors = [
        {"name": tensor.name, "dtype": tensor.dtype, "axes": tensor.axes, "layout": tensor.layout}
        for tensor in manifest.tensors
        if not is_companion(tensor.name)
    ]
    assert not features.keys() & {tensor.name for tensor in manifest.tensors}, "a tensor is named like a field"
    return {"splits": splits, "records": records, "features": features, "tensors": tensors}


def _plain(arrow_type: pa.DataType) -> Any:
    """An Arrow type as name of a dtype, [type of the elements] or {name: type}."""
    if isinstance(arrow_type, pa.ListType):
        return [_plain(arrow_type.value_type)]
    if isinstance(arrow_type, pa.StructType):
        return {field.name: _plain(field.type) for field in arrow_type}
    return {"double": "float64"}.get(str(arrow_type), str(arrow_type))
