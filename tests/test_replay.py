"""Replaying a folder from a stranger: no code, no file and no model of it is loaded."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest

from builders.degradation.replaying import DegradationReplay
from tests.datasets_for_tests import MODEL, make_sample, write_dataset
from tracekit.config import ModelConfig
from tracekit.errors import DatasetError, ModelError
from tracekit.format.layout import Layout, write_atomic
from tracekit.format.manifest import read_manifest, to_bytes
from tracekit.format.shards import sha256_file
from tracekit.run import recheck as replay
from tracekit.run.recheck import Shown, replay_stored

pytestmark = pytest.mark.attack


@pytest.fixture
def layout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Layout:
    """A dataset with a model in it that runs code, and the current folder inside it."""
    layout = write_dataset(tmp_path / "received", {"train-00000": [make_sample("000000")]})
    evil = layout.root / "org" / "name"
    evil.mkdir(parents=True)
    auto = {"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.Model", "AutoTokenizer": ["code.T", "code.T"]}
    (evil / "config.json").write_text(json.dumps({"model_type": "evil", "auto_map": auto}))
    (evil / "tokenizer_config.json").write_text(json.dumps({"auto_map": auto}))
    (evil / "adapter_config.json").write_text("{}")
    (evil / "code.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    (tmp_path / "link").symlink_to(evil)
    monkeypatch.chdir(layout.root)
    return layout


def stored(layout: Layout, model: dict[str, Any], **changes: Any) -> None:
    """Write what the manifest says of the model."""
    manifest = read_manifest(layout)
    run = {"model": {"trust_remote_code": True, **model}, "capture": {}, "prompt": {}}
    info = msgspec.structs.replace(MODEL, **changes)
    write_atomic(layout.manifest, to_bytes(msgspec.structs.replace(manifest, run=run, model=info)))


def again(layout: Layout, **given: Any) -> None:
    replay_stored(layout, 1, **{"model": None, "adapter": None, "device": "cpu", **given})


PLACES: dict[str, Callable[[Path], str]] = {
    "absolute": lambda root: str(root / "org" / "name"),
    "as on the Hub": lambda root: "org/name",
    "relative": lambda root: "./org/name",
    "up and down": lambda root: "../received/org/name",
    "by a link": lambda root: str(root.parent / "link"),
}


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("field", ["model", "model_path", "adapter"])
@pytest.mark.parametrize("by", ["the dataset", "the person"])
def test_a_model_in_the_folder_is_not_loaded(layout: Layout, tmp_path: Path, place: str, field: str, by: str):
    name = PLACES[place](layout.root)
    is_stored = by == "the dataset"
    given = {"model": "demo"} if field != "model" and is_stored else {}
    adapter = f"{name}@main" if field == "adapter" else None
    stored(layout, {field: name} if is_stored else {}, id=name, revision="0" * 40, adapter=adapter)
    with pytest.raises(ModelError, match="--"):
        again(layout, **given, **({} if is_stored else {field: name, "trust_remote_code": True}))
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("flag", [True, False])
def test_only_the_person_allows_code_and_only_of_a_model_that_they_name(
    layout: Layout, flag: bool, monkeypatch: pytest.MonkeyPatch
):
    seen: list[Any] = []

    def identified(manifest: Any, settings: Any) -> Any:
        seen.append(settings)
        raise ModelError("stop")

    monkeypatch.setattr(replay, "_identified", identified)
    stored(layout, {"model": "owner/other"}, id="owner/other", revision="a" * 40)
    with pytest.raises(ModelError):
        again(layout, trust_remote_code=flag)
    assert len(seen) == (not flag)  # code of a model that the dataset chose is refused even with the flag
    with pytest.raises(ModelError, match="stop"):
        again(layout, trust_remote_code=flag, model="owner/other")
    assert seen[-1].trust_remote_code is flag
    assert seen[-1].model == f"owner/other@{'a' * 40}"  # at the commit that made the dataset
    assert (seen[-1].offload_folder, seen[-1].max_memory, seen[-1].device_map) == (None, (), "none")


def test_another_model_is_refused_before_anything_of_it_is_loaded(
    layout: Layout, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    other = tmp_path / "other"
    (layout.root / "org" / "name").rename(other)
    monkeypatch.setattr(replay, "model_info", lambda *_, **__: pytest.fail("its configuration was loaded"))
    stored(layout, {"model": "other"}, id="other", revision="sha256:" + "0" * 64)
    with pytest.raises(ModelError, match="was made by other at sha256:000"):
        again(layout, model=str(other), trust_remote_code=True)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("chat_template", "/etc/passwd"),
        ("chat_template", "../../victim.jinja"),
        ("chat_template", "org/name/config.json"),
    ],
)
def test_no_file_is_read_because_a_manifest_names_it(layout: Layout, field: str, value: str):
    manifest = msgspec.structs.replace(
        read_manifest(layout), run={"image": "a.png@sha256:" + "0" * 64, "prompt": {field: value}}
    )
    picture = layout.root.parent / "a.png"
    picture.write_bytes(b"a picture")
    shown = Shown(manifest, ModelConfig(), None, {"--image": str(picture)})
    with pytest.raises(ModelError, match="--image PATH"):
        DegradationReplay().begin(shown)
    manifest.run["image"] = f"a.png@sha256:{sha256_file(picture)}"
    with pytest.raises(ModelError, match="--chat-template PATH"):
        DegradationReplay().begin(shown)


@pytest.mark.parametrize("run", [{}, {"model": None}, {"model": {"model": 3}}, {"model": [[]]}, {"model": {"x": 1}}])
def test_a_manifest_without_a_model_is_an_error_with_its_place(layout: Layout, run: dict[str, Any]):
    write_atomic(layout.manifest, to_bytes(msgspec.structs.replace(read_manifest(layout), run=run)))
    with pytest.raises(DatasetError, match="trivia_qa"):
        again(layout)
