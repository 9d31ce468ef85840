"""The card: manifests in, README.md text out. Pure; placeholders are filled in cards/*.md.j2, which hold no logic.

The YAML head declares two configurations for each of ours, both WebDataset, because `datasets` opens a whole
repository with one module: `<config>_records` (the records alone; the first one is the default) and `<config>` (records
and tensors). Features are declared, because those that `datasets` infers from five samples lose data silently.
"""

from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

import jinja2
import msgspec
import pyarrow as pa
import yaml

from tracekit.axes import LEGEND
from tracekit.manifest import Manifest
from tracekit.records import RECORD_TYPES, arrow_schema, field_docs
from tracekit.sizes import filesize

__all__ = ["card_features", "render_card"]

_SIZES = ((1_000, "n<1K"), (10_000, "1K<n<10K"), (100_000, "10K<n<100K"), (1_000_000, "100K<n<1M"))


def render_card(manifests: Sequence[Manifest], *, here: str = ".") -> str:
    """The card of a dataset of these configurations; `here` is what `load_dataset` is to be given."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(str(_templates())),
        undefined=jinja2.StrictUndefined,
        trim_blocks=False,
        keep_trailing_newline=True,
        autoescape=False,  # noqa: S701 - Markdown, not HTML
    )
    environment.filters["filesize"] = filesize
    title = f"Traces of {', '.join(sorted({m.model.id for m in manifests}))}"
    body = environment.get_template("base.md.j2").render(
        title=title, here=here, manifests=[_for_template(manifest) for manifest in manifests], legend=LEGEND
    )
    head = yaml.safe_dump(_metadata(manifests), sort_keys=False, allow_unicode=True, width=1000)
    return f"---\n{head}---\n\n{body.rstrip()}\n"


def card_features(task: str, *, with_tensors: bool) -> list[dict[str, Any]]:
    """Features of a configuration as the card declares them."""
    features: list[dict[str, Any]] = [{"name": "json", "struct": _struct_features(arrow_schema(RECORD_TYPES[task]))}]
    if with_tensors:
        features.append({"name": "safetensors", "dtype": "binary"})
    return [*features, {"name": "__key__", "dtype": "string"}, {"name": "__url__", "dtype": "string"}]


def _templates() -> Path:
    """The folder of templates: inside the package in a wheel, beside it in a checkout."""
    packaged = Path(str(files("tracekit"))) / "cards"
    return packaged if packaged.is_dir() else packaged.parent.parent / "cards"


def _for_template(manifest: Manifest) -> dict[str, Any]:
    record_type = RECORD_TYPES[manifest.task]
    docs = field_docs(record_type)
    names = [field.name for field in msgspec.structs.fields(record_type)]
    return {
        **msgspec.structs.asdict(manifest),
        "num_samples": sum(split.num_samples for split in manifest.splits),
        "num_bytes": sum(split.num_bytes for split in manifest.splits),
        "fields": {name: docs[name] for name in names},
        "template": f"{manifest.task}.md.j2",
    }


def _metadata(manifests: Sequence[Manifest]) -> dict[str, Any]:
    """The YAML head."""
    configs: list[dict[str, Any]] = []
    infos: list[dict[str, Any]] = []
    for manifest in manifests:
        for suffix, folder, pattern in (("_records", "records", "{}.tar"), ("", "data", "{}-*.tar")):
            name = manifest.config + suffix
            paths = [
                {"split": split.name, "path": f"{folder}/{manifest.config}/{pattern.format(split.name)}"}
                for split in manifest.splits
            ]
            configs.append({"config_name": name, "data_files": paths} | ({} if configs else {"default": True}))
            splits = [
                {"name": split.name, "num_bytes": split.num_bytes, "num_examples": split.num_samples}
                for split in manifest.splits
            ]
            features = card_features(manifest.task, with_tensors=not suffix)
            infos.append({"config_name": name, "features": features, "splits": splits})
    total = sum(split.num_samples for manifest in manifests for split in manifest.splits)
    return {
        "pretty_name": f"Traces of {', '.join(sorted({m.model.id for m in manifests}))}",
        "tags": ["tracekit", "interpretability", "activations", "webdataset"],
        "size_categories": [next((name for limit, name in _SIZES if total < limit), "n>1M")],
        "configs": configs,
        "dataset_info": infos,
    }


def _struct_features(fields: Any) -> list[dict[str, Any]]:
    return [{"name": field.name, **_feature(field.type)} for field in fields]


def _feature(arrow_type: pa.DataType) -> dict[str, Any]:
    """One Arrow type in the card's notation."""
    if pa.types.is_list(arrow_type):
        inner = _feature(arrow_type.value_type)
        return {"list": inner.get("dtype", inner.get("struct", inner))}
    if pa.types.is_struct(arrow_type):
        return {"struct": _struct_features(arrow_type.fields)}
    names = {"double": "float64"}
    return {"dtype": names.get(str(arrow_type), str(arrow_type))}
