"""The one way from a name in a dataset to a path."""

import os
import socket
from pathlib import Path

import pytest

from tracekit.errors import DatasetError
from tracekit.format.layout import (
    Layout,
    append_line,
    create_once,
    files_inside,
    forget,
    inside,
    read_text,
    write_atomic,
)

pytestmark = pytest.mark.attack


@pytest.mark.parametrize("name", ["../x", "/etc/passwd", "a/../../x", "a//b", "./x", "", "a/", "a\0b", ".."])
def test_a_name_that_leaves_the_folder_is_refused(tmp_path: Path, name: str):
    with pytest.raises(DatasetError, match="no path inside the dataset"):
        inside(tmp_path, name)


@pytest.mark.parametrize("config", ["../other", "/etc", "a/b/../../..", "x\0"])
def test_a_layout_of_such_a_name_has_no_paths(tmp_path: Path, config: str):
    with pytest.raises(DatasetError):
        _ = Layout(tmp_path, config).plan
    with pytest.raises(DatasetError):
        Layout(tmp_path, "c").shard(f"../../{config}")


@pytest.mark.parametrize("level", ["plans/c.json", "plans"])
@pytest.mark.parametrize(
    "target", ["/etc", "/etc/hostname", "../..", "../../sibling/x", "/dev/zero", "nowhere", "itself"]
)
def test_links_at_every_level_stay_inside(tmp_path: Path, level: str, target: str):
    root = tmp_path / "root"
    (root / level).parent.mkdir(parents=True)
    (tmp_path / "sibling").mkdir()
    (tmp_path / "sibling" / "x").write_text("secret")
    (root / level).symlink_to(level.rpartition("/")[2] if target == "itself" else target)
    with pytest.raises(DatasetError, match="symbolic link"):
        inside(root, "plans/c.json")
    with pytest.raises(DatasetError):
        files_inside(root, "plans", "*.json")
    with pytest.raises(DatasetError):
        write_atomic(Layout(root, "c").plan, b"x")


def test_links_inside_a_folder_are_followed(tmp_path: Path):
    (tmp_path / "store").mkdir()
    (tmp_path / "store" / "object").write_text("text")
    (tmp_path / "plans").mkdir()
    (tmp_path / "plans" / "c.json").symlink_to("../store/object")
    assert read_text(inside(tmp_path, "plans/c.json")) == "text"


@pytest.mark.parametrize("store", ["datasets--o--n/blobs", "blobs/ab"])
def test_the_blobs_of_the_hub_cache_are_followed_and_nothing_else_there(tmp_path: Path, store: str):
    root = tmp_path / "datasets--o--n" / "snapshots" / "0123abcd"
    (root / "data").mkdir(parents=True)
    blob, other = tmp_path / store / ("ab" * 32), tmp_path / store / "id_rsa"
    blob.parent.mkdir(parents=True)
    blob.write_text("text")
    other.write_text("secret")
    for name, target in (("right", blob), ("wrong", other)):
        (root / "data" / name).symlink_to(os.path.relpath(target, root / "data"))
    assert read_text(inside(root, "data/right")) == "text"
    with pytest.raises(DatasetError, match="leads out"):
        inside(root, "data/wrong")
    moved = root.rename(tmp_path / "datasets--o--n" / "elsewhere")
    with pytest.raises(DatasetError, match="leads out"):
        inside(moved, "data/right")


@pytest.mark.parametrize("kind", ["pipe", "socket", "folder"])
def test_what_is_no_regular_file_is_refused_before_it_is_opened(
    tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)  # the name of a socket is short
    if kind == "pipe":
        os.mkfifo("x")
    elif kind == "folder":
        Path("x").mkdir()
    else:
        with socket.socket(socket.AF_UNIX) as one:
            one.bind("x")
    with pytest.raises(DatasetError, match=f"is a {kind}, expected a regular file"):
        inside(tmp_path, "x")


def test_nothing_is_written_through_a_link(tmp_path: Path):
    victim = tmp_path / "victim"
    victim.write_text("mine\n")
    root = tmp_path / "root"
    (root / "logs").mkdir(parents=True)
    (root / "x.json.partial").symlink_to(victim)
    (root / "y.json.partial").symlink_to(victim)
    (root / "logs" / "c.jsonl").symlink_to(victim)
    (root / "data").symlink_to(tmp_path)
    for write in (
        lambda: write_atomic(inside(root, "x.json"), b"x"),
        lambda: create_once(inside(root, "y.json"), b"x"),
        lambda: append_line(Layout(root, "c").log, "x"),
        lambda: forget(Layout(root, "victim")),
    ):
        with pytest.raises(DatasetError, match="symbolic link"):
            write()
    assert victim.read_text() == "mine\n"


def test_another_name_of_a_file_is_not_written_through(tmp_path: Path):
    victim = tmp_path / "victim"
    victim.write_bytes(b"mine")
    root = tmp_path / "run"
    root.mkdir()
    (root / "README.md.partial").hardlink_to(victim)
    write_atomic(root / "README.md", b"a card")
    assert victim.read_bytes() == b"mine"
    (root / "plan.json.partial").hardlink_to(root / "README.md")  # as a crash in `create_once` leaves it
    assert create_once(root / "plan.json", b"{}")
    assert (root / "README.md").read_bytes() == b"a card"
