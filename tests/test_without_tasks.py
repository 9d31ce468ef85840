"""Where no task is installed, finished datasets of the packaged tasks read, show and merge as where all are."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.runs_for_tests import hashes, run_trivia
from tests.tasks_for_tests import TASKS
from tests.tiny_checkpoint import save_tiny_checkpoint
from tracekit.card.readme import render_card, settings_of
from tracekit.cli import main
from tracekit.format.layout import Layout, config_names
from tracekit.format.manifest import read_manifest, read_plan, read_schema
from tracekit.publish.contents import _not_kept
from tracekit.publish.snapshot import OnHub, read_local
from tracekit.run.finish import finish
from tracekit.run.merge import merge
from tracekit.task import find_task

RELEASED = Path(__file__).parent / "data/schema-2.0"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dataset of every kind of record, finished by this version."""
    root = Path(shutil.copytree(RELEASED, tmp_path_factory.mktemp("tasks") / "run"))
    for name in config_names(root):
        layout = Layout(root, name)
        finish(layout, read_plan(layout), TASKS[read_plan(layout).task])
    return root


@pytest.fixture
def hide(monkeypatch: pytest.MonkeyPatch) -> Iterator[object]:
    """Takes the tasks away."""

    def hidden() -> None:
        find_task.cache_clear()
        monkeypatch.setattr("tracekit.task._entry_points", lambda name: ())

    yield hidden
    find_task.cache_clear()


def card(root: Path) -> str:
    layouts = [Layout(root, name) for name in config_names(root)]
    return render_card(
        [read_manifest(layout) for layout in layouts], {layout.config: read_schema(layout) for layout in layouts}
    )


def shown(root: Path, capsys: pytest.CaptureFixture[str]) -> list[str]:
    texts: list[str] = []
    for name in config_names(root):
        of = [str(root), "--dataset-config", name]
        for flags in ([], ["--json"], ["--stats"], ["--stats", "--json"]):
            assert main(["show", *of, *flags]) == 0
            texts.append(capsys.readouterr().out)
    return texts


def test_the_card_and_what_is_shown_are_the_same(folder: Path, capsys: pytest.CaptureFixture[str], hide):
    text, lines = card(folder), shown(folder, capsys)
    assert "Level 0 leaves every bit as it is" in text
    assert any("repetition" in one for one in lines)
    assert any("nonfinite_share" in one for one in lines)
    hide()
    assert find_task("degradation") is None
    assert shown(folder, capsys) == lines
    assert card(folder) == text


def test_what_a_person_wrote_is_told_from_what_a_task_wrote(folder: Path, hide):
    local = read_local(folder)
    assert local.card is not None
    hide()
    assert (
        _not_kept(
            local, settings_of(local.card, list(local.state.manifests.values())), OnHub("", {}, local.state, None), None
        )
        == []
    )


def test_runs_are_merged_to_the_same_bytes(tmp_path: Path, hide):
    save_tiny_checkpoint(tmp_path / "tiny", chat=True)
    for offset in (0, 2):
        run_trivia(tmp_path / str(offset), tmp_path / "tiny", source={"offset": offset, "limit": 2})
    parts = [tmp_path / "0", tmp_path / "2"]
    merge(parts, tmp_path / "there")
    hide()
    merge(parts, tmp_path / "hidden")
    assert hashes(tmp_path / "hidden") == hashes(tmp_path / "there")
