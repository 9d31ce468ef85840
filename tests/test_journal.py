"""The journal: what survives a crash, which repository has what, and which shards count as made."""

import shutil
from pathlib import Path

import msgspec
import pytest

from tracekit.format.journal import Sent, can_write_journal, is_last, is_sent, read_journal, sent_shards, write_journal
from tracekit.format.layout import Layout
from tracekit.format.manifest import Sidecar, read_struct

PATH = "data/trivia_qa/validation-00000.tar"


def sent(path: str = PATH, sha256: str = "aa", *, repo: str = "tester/traces", branch: str = "staging/v1.0.0") -> Sent:
    return Sent(repo=repo, branch=branch, path=path, num_bytes=1, sha256=sha256)


def test_what_was_written_is_read_by_path_in_order(tmp_path: Path):
    first, second, other = sent(), sent(sha256="bb"), sent("records/trivia_qa/validation.tar")
    write_journal(tmp_path, [first, other])
    write_journal(tmp_path, [second])
    assert read_journal(tmp_path) == {PATH: [first, second], other.path: [other]}


def test_the_file_is_one_json_line_a_file(tmp_path: Path):
    write_journal(tmp_path, [sent(), sent(sha256="bb")])
    raw = (tmp_path / "hub" / "tester--traces.jsonl").read_bytes()
    assert raw.endswith(b"\n")
    assert [msgspec.json.decode(line) for line in raw.splitlines()] == [
        {"repo": "tester/traces", "branch": "staging/v1.0.0", "path": PATH, "num_bytes": 1, "sha256": sha256}
        for sha256 in ("aa", "bb")
    ]


def test_no_folder_and_no_entries_are_an_empty_journal(tmp_path: Path):
    assert read_journal(tmp_path) == {}
    write_journal(tmp_path, [])
    assert not (tmp_path / "hub").exists()


@pytest.mark.parametrize("kept", [1, 20, -2, -1], ids=["one byte", "some", "all but brace", "all but newline"])
def test_a_torn_line_does_not_count_and_harms_no_other(tmp_path: Path, kept: int):
    journal = tmp_path / "hub" / "tester--traces.jsonl"
    write_journal(tmp_path, [sent("a")])
    whole = journal.read_bytes()
    write_journal(tmp_path, [sent("b")])
    torn = journal.read_bytes()[len(whole) :][:kept]
    journal.write_bytes(whole + torn)
    assert set(read_journal(tmp_path)) == ({"a", "b"} if kept == -1 else {"a"})
    write_journal(tmp_path, [sent("c"), sent("d")])
    assert set(read_journal(tmp_path)) == ({"a", "b", "c", "d"} if kept == -1 else {"a", "c", "d"})


def test_garbage_in_the_journal_is_passed_over(tmp_path: Path):
    journal = tmp_path / "hub" / "tester--traces.jsonl"
    write_journal(tmp_path, [sent("a")])
    with journal.open("ab") as file:
        file.write(b'\xff\xfe\n\n{"repo": 1}\nnull\n\x00\x00\x00\n{"path": "\xff"}\n')
    write_journal(tmp_path, [sent("b")])
    assert set(read_journal(tmp_path)) == {"a", "b"}


def test_every_repository_has_its_own_file_and_all_are_read(tmp_path: Path):
    here, there = sent(), sent(repo="org/traces")
    write_journal(tmp_path, [here])
    write_journal(tmp_path, [there])
    assert sorted(path.name for path in (tmp_path / "hub").iterdir()) == ["org--traces.jsonl", "tester--traces.jsonl"]
    assert set(read_journal(tmp_path)[PATH]) == {here, there}


def test_is_sent_finds_the_last_entry_with_this_content():
    old, new = sent(), sent(branch="main")
    journal = {PATH: [old, sent(sha256="bb"), new, sent(sha256="cc")]}
    assert is_sent(journal, PATH, "aa") is new
    assert is_sent(journal, PATH, "dd") is None
    assert is_sent(journal, "data/other/validation-00000.tar", "aa") is None
    assert is_sent({}, PATH, "aa") is None


def test_sent_shards_are_those_that_the_sidecars_know_with_this_content(finished: Path, tmp_path: Path):
    root = Path(shutil.copytree(finished, tmp_path / "run"))
    layout = Layout(root, "trivia_qa")
    names = ["validation-00000", "validation-00001", "validation-00002"]
    made = {name: read_struct(layout.sidecar(name), Sidecar).sha256 for name in names}
    assert sent_shards(layout) == set()
    for name in [*names, "validation-00007"]:
        layout.shard(name).unlink(missing_ok=True)
    entries = {
        "data/trivia_qa/validation-00000.tar": made[names[0]],
        "data/trivia_qa/validation-00001.tar": made[names[0]],  # the Hub has other content
        "data/trivia_qa/validation-00007.tar": made[names[0]],  # no sidecar
        "data/other/validation-00002.tar": made[names[2]],  # another configuration
        "records/trivia_qa/validation-00002.tar": made[names[2]],  # no shard
        "README.md#yours": made[names[2]],
    }
    write_journal(root, [sent(path, sha256) for path, sha256 in entries.items()])
    assert sent_shards(layout) == {names[0]}
    # sent once more, as it is now; the older entry does not hide it, nor does another repository's
    write_journal(root, [sent("data/trivia_qa/validation-00001.tar", made[names[1]], repo="org/traces")])
    write_journal(root, [sent("data/trivia_qa/validation-00001.tar", "zz")])
    assert sent_shards(layout) == {names[0], names[1]}
    layout.shard(names[1]).write_bytes(b"made again")  # what is here is not elsewhere
    assert sent_shards(layout) == {names[0]}
    layout.sidecar(names[0]).unlink()
    assert sent_shards(layout) == set()


def test_the_last_entry_of_a_repository_is_what_counts_there():
    journal = {PATH: [sent(), sent(sha256="bb"), sent(sha256="aa", repo="org/traces")]}
    assert is_last(journal, PATH, "bb", "tester/traces")
    assert not is_last(journal, PATH, "aa", "tester/traces")
    assert is_last(journal, PATH, "aa", "org/traces")
    assert not is_last(journal, PATH, "aa", "org/other")
    assert not is_last({}, PATH, "aa", "org/traces")


def test_an_entry_says_at_which_version_it_is_once_that_is_released():
    assert sent(branch="staging/v1.2.0").version == "v1.2.0"
    assert sent(branch="main").version == "main"


def test_whether_a_journal_can_be_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    assert can_write_journal(tmp_path)
    assert read_journal(tmp_path) == {}
    assert list((tmp_path / "hub").iterdir()) == []

    def refuse(*arguments: object, **options: object) -> None:
        raise PermissionError(30, "Read-only file system")

    monkeypatch.setattr(Path, "touch", refuse)  # root may write anywhere
    assert not can_write_journal(tmp_path)
    (tmp_path / "file").write_bytes(b"")
    assert not can_write_journal(tmp_path / "file")
