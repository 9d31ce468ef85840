"""The loading script: manifests in, text of `load_traces.py` out. Pure.

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
from collections.abc import Sequence
from importlib.resources import files
from typing import Any

import pyarrow as pa

from tracekit.errors import DatasetError
from tracekit.format.layout import records_tar_path, shard_path
from tracekit.format.manifest import Manifest, to_bytes
from tracekit.records import RECORD_TYPES, arrow_schema
from tracekit.tensors import is_companion

__all__ = ["render_script"]

_FINGERPRINT = '\nFINGERPRINT = ""\n'
_DATASET = "\nDATASET: dict[str, Any] = {}\n"


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
    source = files("tracekit").joinpath("load_traces.py").read_text("utf-8")
    for old, new in ((_FINGERPRINT, f'"{fingerprint}"'), (_DATASET, described)):
        assert source.count(old) == 1, old
        name, _, _ = old.rpartition(" = ")
        source = source.replace(old, f"{name} = {new}\n")
    return source


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
