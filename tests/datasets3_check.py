"""The loading script on datasets 3, run by `load_dataset(..., trust_remote_code=True)`; see `make test-datasets3`.

    python -m tests.datasets3_check write FOLDER    with tracekit: two made-up datasets, a run, and what must come back
    python tests/datasets3_check.py check FOLDER    without tracekit, with datasets 3: loads all three and compares

What must come back lies beside each dataset: <dataset>.json, the records by key, and <dataset>-<key>.npz, the tensors.
"""

import json
import os
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

NAMES = ("a", "b", "run")


def write(folder: Path) -> None:
    """Write the datasets. `a` and `b` share script, configuration and shard names, but no row."""
    from tests.datasets_for_tests import make_sample
    from tests.runs_for_tests import run_trivia
    from tests.test_load_traces import add_script
    from tests.test_load_traces import write as write_made
    from tests.tiny_checkpoint import save_tiny_checkpoint
    from tracekit.sites import SITES

    for name, dtype, layout in (("a", "bfloat16", "causal"), ("b", "float16", "full")):
        made = [
            make_sample(f"{name}{i}", sites=tuple(SITES), num_tokens=7 + i, dtype=dtype, layout=layout) for i in (0, 1)
        ]
        write_made(folder / name, made[:1], **{"train-00001": made[1:]})
    run_trivia(folder / "run", save_tiny_checkpoint(folder / "tiny"))
    add_script(folder / "run")
    for name in NAMES:
        write_expected(folder / name)


def write_expected(dataset: Path) -> None:
    """Write what TraceStore reads of a dataset."""
    import msgspec
    import numpy as np

    from tracekit import TraceStore

    with TraceStore(dataset) as store:
        records = {key: msgspec.to_builtins(store.record(key)) for key in store.keys}
        dataset.with_suffix(".json").write_text(json.dumps(records))
        for key, record in records.items():
            tensors: dict[str, Any] = {spec["name"]: store.tensor(key, spec["name"]) for spec in record["tensors"]}
            widened = {
                name: array.astype("float32") if array.dtype == "bfloat16" else array for name, array in tensors.items()
            }
            np.savez(dataset.with_name(f"{dataset.name}-{key}.npz"), **widened)


def check(folder: Path, cache: str) -> None:
    """Load the datasets, map-style and streaming, through one cache, and compare."""
    os.environ |= {"HF_HOME": cache, "HF_HUB_OFFLINE": "1"}  # read when datasets is imported
    import datasets

    assert datasets.__version__.startswith("3."), datasets.__version__
    for name in (*NAMES, "a"):
        dataset = folder / name
        for config in ("trivia_qa", "trivia_qa_records"):
            for streaming in (False, True):
                loaded: Any = datasets.load_dataset(
                    str(dataset / "load_traces.py"), config, trust_remote_code=True, streaming=streaming
                )
                (split,) = loaded.values()
                check_rows(dataset, list(split), has_tensors=config == "trivia_qa")
        # and as users of current versions have it: the script's own class, its hash alone keeping the datasets apart
        check_rows(dataset, load_by_class(dataset), has_tensors=True)
    # another run into the same folder: the same paths, other rows
    expected = [path for path in folder.glob("a*") if path.is_file()]
    for path in (folder / "a", *expected):
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    for path in [folder / "b", *(path for path in folder.glob("b*") if path.is_file())]:
        path.rename(path.with_name("a" + path.name[1:]))
    check_rows(folder / "a", load_by_class(folder / "a"), has_tensors=True)
    print(f"ok: datasets {datasets.__version__}")


def load_by_class(dataset: Path) -> list[dict[str, Any]]:
    """All rows of a dataset, by importing its script."""
    sys.path.insert(0, str(dataset))
    sys.modules.pop("load_traces", None)
    from load_traces import LoadTraces  # pyright: ignore[reportMissingImports]

    sys.path.pop(0)
    builder = LoadTraces(config_name="trivia_qa")
    builder.download_and_prepare()
    (split,) = builder.as_dataset().values()
    return list(split)


def check_rows(dataset: Path, rows: list[dict[str, Any]], *, has_tensors: bool) -> None:
    """Every row is what TraceStore read, and none is missing."""
    import numpy as np

    records = json.loads(dataset.with_suffix(".json").read_text())
    assert sorted(row["key"] for row in rows) == sorted(records), dataset
    for row in rows:
        record = records[row["key"]]
        assert {name: row[name] for name in record} == record, (dataset, row["key"])
        expected = dict(np.load(dataset.with_name(f"{dataset.name}-{row['key']}.npz"))) if has_tensors else {}
        assert {*row} == {*record, *expected}, (dataset, sorted(row))
        for name, array in expected.items():
            np.testing.assert_array_equal(np.asarray(row[name], array.dtype), array, err_msg=f"{dataset}: {name}")


if __name__ == "__main__":
    verb, where = sys.argv[1:]
    if verb == "write":
        write(Path(where).absolute())
    else:
        with tempfile.TemporaryDirectory() as own_cache:
            check(Path(where).absolute(), own_cache)
