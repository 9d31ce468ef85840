"""The figures: their numbers are those of the tensors and records, their bytes depend on nothing else."""

import json
import shutil
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path

import matplotlib as mpl
import ml_dtypes
import msgspec
import numpy as np
import pytest

from tests.runs_for_tests import hashes, run_trivia
from tests.sample_records import serve_record, trivia_record
from tests.tasks_for_tests import TASKS
from tracekit import TraceStore
from tracekit.card.figures import draw, figures_of
from tracekit.errors import ConfigError
from tracekit.format.layout import Layout
from tracekit.format.manifest import FigureData, LayerNorms, Manifest, Sidecar, read_plan, read_struct
from tracekit.run.finish import finish
from tracekit.run.merge import merge
from tracekit.run.metrics import Tally, hidden_norms
from tracekit.tensors import TensorSpec

DATA = FigureData(
    layers=[0, 1, 2],
    mean_norms=[1.5, 4.0, 90.0],
    num_tokens=70,
    num_right=3,
    num_wrong=4,
    entropy_edges=[i / 10 for i in range(21)],
    entropy_right=[3, *[0] * 19],
    entropy_wrong=[0, 2, *[0] * 17, 2],
)


@pytest.fixture(scope="module")
def manifest(finished: Path) -> Manifest:
    return read_struct(finished / "manifests/trivia_qa.json", Manifest)


def with_data(manifest: Manifest, **changes: object) -> Manifest:
    return msgspec.structs.replace(manifest, figures=msgspec.structs.replace(DATA, **changes))


def chunks(png: bytes) -> Iterator[tuple[bytes, bytes]]:
    assert png.startswith(b"\x89PNG\r\n\x1a\n")
    position = 8
    while position < len(png):
        (size,) = struct.unpack(">I", png[position : position + 4])
        kind, data = png[position + 4 : position + 8], png[position + 8 : position + 8 + size]
        assert struct.unpack(">I", png[position + 8 + size :][:4])[0] == zlib.crc32(kind + data)
        yield kind, data
        position += 12 + size


def spec(name: str, layers: list[int]) -> TensorSpec:
    return TensorSpec(
        name=name,
        dtype="float32",
        shape=[],
        axes=["L", "T", "D"],
        layers=layers,
        positions=[],
        layout="dense",
        num_keys=0,
        choice_offsets=[],
    )


def test_two_figures_wide_enough_to_read_and_without_a_clock(manifest: Manifest):
    drawn = draw(with_data(manifest))
    assert list(drawn) == ["figures/trivia_qa-entropy.png", "figures/trivia_qa-norms.png"]
    for png in drawn.values():
        found = dict(chunks(png))
        assert set(found) == {b"IHDR", b"pHYs", b"IDAT", b"IEND"}
        width, height = struct.unpack(">II", found[b"IHDR"][:8])
        assert width == 1200
        assert height >= 600
        assert len(png) < 300_000


def test_the_same_numbers_give_the_same_bytes_whatever_style_is_set(manifest: Manifest):
    first = draw(with_data(manifest))
    with mpl.rc_context({"font.size": 30, "axes.facecolor": "black", "savefig.dpi": 20}):
        assert draw(with_data(manifest)) == first
        assert mpl.rcParams["font.size"] == 30


def test_other_numbers_give_other_bytes(manifest: Manifest):
    first = draw(with_data(manifest))
    other = draw(with_data(manifest, mean_norms=[1.5, 4.0, 5.0], entropy_right=[*[0] * 19, 3]))
    assert all(first[path] != other[path] for path in first)


@pytest.mark.parametrize(
    ("changes", "names"),
    [
        ({"mean_norms": [], "layers": []}, ["entropy"]),
        ({"entropy_right": [], "entropy_wrong": [], "entropy_edges": []}, ["norms"]),
        ({"entropy_right": [0] * 20, "num_right": 0}, ["entropy", "norms"]),
    ],
)
def test_what_has_no_numbers_is_left_out(manifest: Manifest, changes: dict, names: list[str]):
    paths = [f"figures/trivia_qa-{name}.png" for name in names]
    changed = with_data(manifest, **changes)
    assert list(draw(changed)) == paths
    assert [figure.path for figure in figures_of(changed)] == paths


def test_nothing_is_drawn_of_an_older_manifest(manifest: Manifest):
    assert draw(msgspec.structs.replace(manifest, figures=FigureData())) == {}


def test_missing_matplotlib_is_said_with_the_command(manifest: Manifest, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(__import__("sys").modules, "matplotlib", None)
    with pytest.raises(ConfigError, match=r"pip install 'tracekit-llm\[publish\]'"):
        draw(with_data(manifest))


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_norms_are_summed_over_samples_and_tokens(dtype: type):
    draws = np.random.default_rng(0)
    tensors = [
        (300 * draws.normal(size=(3, length, 64))).astype(dtype) for length in (5, 0, 2)
    ]  # float16: 300² overflows
    norms = hidden_norms([([spec("hidden_states", [0, 4, 7])], {"hidden_states": tensor}) for tensor in tensors])
    assert norms is not None
    assert (norms.layers, norms.num_tokens) == ([0, 4, 7], 7)
    expected = sum(np.linalg.norm(tensor.astype(np.float64), axis=-1).sum(1) for tensor in tensors)
    np.testing.assert_allclose(norms.sums, expected, rtol=1e-12)


def test_norms_of_layers_that_are_stored_apart():
    tensors = {
        "hidden_states.0": np.ones((1, 2, 4)),
        "hidden_states.1": np.ones((1, 2, 9)),
        "resid_embed": np.ones((2, 4)),
    }
    specs = [spec("hidden_states.0", [0]), spec("hidden_states.1", [1]), spec("resid_embed", [])]
    assert hidden_norms([(specs, tensors)]) == LayerNorms(layers=[0, 1], sums=[4.0, 6.0], num_tokens=2)


def test_no_hidden_states_no_norms():
    assert hidden_norms([([], {})]) is None


def test_answers_are_counted_by_entropy_and_judgement():
    tally = Tally(TASKS["trivia_qa"].outcome)
    for entropies, is_correct in (([0.0, 0.1], True), ([2.0], False), ([1.0, 2.0, 0.0], False), ([], False)):
        tally.add(trivia_record(token_entropies=entropies, is_correct=is_correct, template_sha256="ab"))
    data = tally.figures()
    assert (data.num_right, data.num_wrong) == (1, 3)
    assert (len(data.entropy_edges), data.entropy_edges[0], data.entropy_edges[-1]) == (21, 0.0, 2.0)
    assert data.entropy_right == [1, *[0] * 19]
    assert data.entropy_wrong == [*[0] * 10, 1, *[0] * 8, 1]
    assert tally.templates() == ["ab"]
    assert (data.layers, data.mean_norms, data.num_tokens) == ([], [], 0)


def test_drawn_answers_beside_the_deterministic_one_count_in_no_mean_and_no_class():
    alone, beside = Tally(TASKS["trivia_qa"].outcome), Tally(TASKS["trivia_qa"].outcome)
    record = trivia_record(is_correct=True, f1=1.0, is_truncated=False)
    alone.add(record)
    beside.add(record)
    beside.add(trivia_record(sample_index=2, is_correct=False, f1=0.0, is_truncated=True, token_ids=[1] * 99))
    assert beside.metrics() == alone.metrics()
    assert beside.figures() == alone.figures()


def test_of_a_server_drawn_answers_count():
    tally = Tally(TASKS["serve"].outcome)
    tally.add(serve_record(sample_index=1, is_truncated=True))
    assert {metric.name: metric.value for metric in tally.metrics()}["truncated_share"] == 1.0


def test_answers_that_are_all_certain_have_a_histogram_too():
    tally = Tally(TASKS["trivia_qa"].outcome)
    tally.add(trivia_record(token_entropies=[0.0]))
    assert tally.figures().entropy_right == [1, *[0] * 19]


def test_a_run_keeps_the_norms_of_its_tensors(finished: Path, manifest: Manifest):
    store = TraceStore(str(finished))
    hidden = np.concatenate([store.hidden_states(key) for key in store.keys], axis=1)
    assert manifest.figures.num_tokens == hidden.shape[1]
    assert manifest.figures.layers == list(range(hidden.shape[0]))
    np.testing.assert_allclose(manifest.figures.mean_norms, np.linalg.norm(hidden, axis=-1).mean(1), rtol=1e-6)
    assert manifest.figures.num_right + manifest.figures.num_wrong == len(store)


def test_finishing_needs_no_shard(finished: Path, tmp_path: Path):
    out = Path(shutil.copytree(finished, tmp_path / "run"))
    for path in [*out.glob("data/*/*.tar"), out / "manifests/trivia_qa.json"]:
        path.unlink()
    layout = Layout(out, "trivia_qa")
    finish(layout, read_plan(layout), TASKS["trivia_qa"])
    expected = {name: value for name, value in hashes(finished).items() if not name.startswith("data/")}
    assert hashes(out) == expected


def test_merging_adds_up(model: Path, tmp_path: Path):
    for offset in (0, 6):
        run_trivia(tmp_path / str(offset), model, source={"offset": offset, "limit": 6})
    joined = merge([tmp_path / "0", tmp_path / "6"], tmp_path / "joined").figures
    parts = [read_struct(tmp_path / name / "manifests/trivia_qa.json", Manifest).figures for name in ("0", "6")]
    assert joined.num_tokens == sum(part.num_tokens for part in parts)
    expected = sum(np.array(part.mean_norms) * part.num_tokens for part in parts) / joined.num_tokens
    np.testing.assert_allclose(joined.mean_norms, expected, rtol=1e-12)
    assert joined.num_wrong == sum(part.num_wrong for part in parts)


def test_a_run_without_hidden_states_has_no_norms(model: Path, tmp_path: Path):
    outcome = run_trivia(tmp_path / "run", model, source={"limit": 2}, capture={"sites": ("none",)})
    assert outcome.manifest is not None
    assert outcome.manifest.figures.mean_norms == []
    assert outcome.manifest.figures.entropy_edges


def test_files_of_older_versions_are_read(finished: Path, tmp_path: Path):
    for path, struct_type, names in (
        ("manifests/trivia_qa.json", Manifest, ("command", "templates", "figures")),
        ("sidecars/trivia_qa/validation-00000.json", Sidecar, ("hidden_norms",)),
    ):
        data = json.loads((finished / path).read_text())
        for name in names:
            del data[name]
        (tmp_path / "old.json").write_text(json.dumps(data))
        assert getattr(read_struct(tmp_path / "old.json", struct_type), names[-1]) in (None, FigureData())
