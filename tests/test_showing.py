"""show, diff and stats on the command line: text for people, JSON for scripts, errors in a line."""

import json
import re
from pathlib import Path
from typing import Any

import msgspec
import pytest

from tests.datasets_for_tests import make_sample, write_dataset
from tests.degradation_for_tests import make_damaged
from tests.introspection_for_tests import Noise, write_passes
from tests.sample_records import confidence_record, introspection_record, trivia_record
from tests.tasks_for_tests import TASKS
from tests.test_diff import A, B
from tracekit.analysis.showing import record_lines, warning_lines
from tracekit.cli import main
from tracekit.errors import DatasetError
from tracekit.format.manifest import FigureData, Manifest, Metric, read_struct
from tracekit.read.store import TraceStore
from tracekit.records import Record
from tracekit.sizes import bar


@pytest.fixture(scope="module")
def a(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_passes(tmp_path_factory.mktemp("a") / "a", A))


@pytest.fixture(scope="module")
def b(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_passes(tmp_path_factory.mktemp("b") / "b", B, noise=Noise(layer=2)))


def metric(task: str, name: str, value: float) -> Metric:
    """A number of a task, as its manifests have it."""
    (mean,) = (one for one in TASKS[task].outcome.means if one.name == name)
    return Metric(name=name, value=value, warn_above=mean.warn_above, warning=mean.warning)


def test_a_share_is_a_bar():
    assert [bar(share, width=4) for share in (-1, 0, 0.5, 1, 2)] == ["....", "....", "##..", "####", "####"]


@pytest.mark.parametrize(
    ("cut", "right", "wrong", "expected"),
    [
        (0.0, 1, 1, []),
        (0.2, 5, 5, []),
        (0.21, 5, 5, ["21% of the answers were cut before they ended; raise --max-new-tokens"]),
        (0.0, 0, 9, ["all 9 judged answers are wrong. A probe needs both classes"]),
        (0.0, 9, 0, ["all 9 judged answers are right. A probe needs both classes"]),
        (1.0, 0, 2, ["100% of the answers were cut", "another --correctness than exact_match"]),
        (0.0, 0, 0, []),
        (0.0, 1, 0, []),
    ],
)
def test_a_run_ends_with_what_is_wrong_with_its_labels(
    tmp_path: Path, cut: float, right: int, wrong: int, expected: list[str]
):
    layout = write_dataset(tmp_path, {"train-00000": [make_sample("000000", sites=())]})
    manifest = msgspec.structs.replace(
        read_struct(layout.manifest, Manifest),
        run={"correctness": "exact_match"},
        metrics=[metric("trivia_qa", "truncated_share", cut), Metric(name="mean_answer_tokens", value=9.0)],
        figures=FigureData(num_right=right, num_wrong=wrong),
    )
    lines = warning_lines(manifest)
    assert len(lines) == len(expected)
    assert all(line.startswith("warning: ") for line in lines)
    for line, text in zip(lines, expected, strict=True):
        assert text in line


def test_answers_that_were_cut_elsewhere_are_no_matter_of_a_flag(tmp_path: Path):
    layout = write_dataset(tmp_path, {"train-00000": [make_sample("000000", sites=())]})
    manifest = msgspec.structs.replace(
        read_struct(layout.manifest, Manifest), metrics=[metric("replay", "truncated_share", 0.5)]
    )
    (line,) = warning_lines(manifest)
    assert "--max-new-tokens" not in line
    assert "50% of the answers were cut before they ended; make them with a larger limit" in line


def test_a_record_is_a_line_unless_its_task_says_more():
    def line(**changes: Any) -> str:
        (line,) = record_lines(trivia_record(**changes), TASKS["trivia_qa"].outcome)
        return line

    assert line() == "000000  right  Q?  ->  bc"
    assert line(is_correct=False) == "000000  wrong  Q?  ->  bc  (accepted: bc)"
    assert "x" * 67 + "...  ->" in line(question="x" * 100)


def letter_lines(record: Record) -> list[str]:
    return record_lines(record, TASKS["introspection"].outcome)


def test_a_question_shows_options_probabilities_and_what_was_read():
    assert letter_lines(introspection_record()) == [
        "000000  mcq  wrong  (home)",
        "  Where is a bed?",
        "    A  in a room    #####...............  25.0 %  right",
        "    B  on the moon  ###############.....  75.0 %  answered",
        "  output 'B.': read as B; entropy 0.5625 nats; allowed_mass 0.5; logit_margin -1",
    ]
    nothing = letter_lines(
        introspection_record(
            parsed_answer=None, is_correct=None, subject=None, parse_failure="no letter", output_text="I cannot\nsay"
        )
    )
    assert nothing[0] == "000000  mcq"
    assert "output 'I cannot\\nsay': nothing parsed, no letter; entropy" in nothing[-1]


def test_a_confidence_pass_shows_bins_and_the_expected_percent():
    assert letter_lines(confidence_record()) == [
        "000000  self_confidence  (home)",
        "  Where is a bed?",
        "    A  under 50 %  #####...............  25.0 %",
        "    B  over 50 %   ###############.....  75.0 %  answered",
        "  output 'B.': read as B; expects 62.5 %; entropy 0.5625 nats; allowed_mass 0.5",
    ]


def test_show_lists_questions_readably(a: str, capsys: pytest.CaptureFixture[str]):
    assert main(["show", a, "--dataset-config", "mcq", "--examples", "2"]) == 0
    text = capsys.readouterr().out
    assert text.count("Which of these is number") == 2
    assert "    A  thing a of 0  ##############......  70.0 %  answered, right\n" in text
    assert "\n\n000001  mcq  wrong  (history)\n" in text


def test_show_stats_sums_every_configuration_up(a: str, capsys: pytest.CaptureFixture[str]):
    assert main(["show", a, "--stats"]) == 0
    done = capsys.readouterr()
    for name in ("mcq", "self_confidence", "other_confidence"):
        assert f"{name} (introspection): 5 samples" in done.out
    assert done.err.startswith("next: tracekit show")
    assert main(["show", a, "--stats", "--json", "--dataset-config", "mcq"]) == 0
    (one,) = json.loads(capsys.readouterr().out)
    assert (one["config"], one["accuracy"]) == ("mcq", 0.75)


def test_show_of_several_configurations_is_one_json_list(a: str, capsys: pytest.CaptureFixture[str]):
    assert main(["show", a, "--json"]) == 0
    done = capsys.readouterr()
    assert [one["configs"] for one in json.loads(done.out)] == [["mcq"], ["other_confidence"], ["self_confidence"]]
    assert done.err == f"next: tracekit show {a} --stats\n"
    assert main(["show", a, "--json", "--dataset-config", "mcq"]) == 0
    assert json.loads(capsys.readouterr().out)["configs"] == ["mcq"]


def test_show_of_several_configurations_shows_each_and_the_next_command(a: str, capsys: pytest.CaptureFixture[str]):
    assert main(["show", a, "--examples", "1"]) == 0
    done = capsys.readouterr()
    assert [done.out.count(f"000000  {name}  ") for name in ("mcq", "self_confidence", "other_confidence")] == [1] * 3
    assert done.err == f"next: tracekit show {a} --stats\n"


def test_show_closes_what_it_opened(a: str, monkeypatch: pytest.MonkeyPatch):
    opened: list[TraceStore] = []

    class Watched(TraceStore):
        def __init__(self, *args: Any, **options: Any) -> None:
            super().__init__(*args, **options)
            opened.append(self)

    monkeypatch.setattr("tracekit.commands.TraceStore", Watched)
    assert main(["show", a]) == 0
    assert len(opened) == 3
    for store in opened:
        with pytest.raises(DatasetError, match="closed"):
            store.record("000000")


def test_show_stats_of_one_sample_is_refused(a: str, capsys: pytest.CaptureFixture[str]):
    assert main(["show", a, "--stats", "--key", "000000"]) == 1
    assert "error: --stats sums up whole configurations" in capsys.readouterr().err


def test_diff_prints_a_table_and_the_next_command(a: str, b: str, capsys: pytest.CaptureFixture[str]):
    assert main(["diff", a, b, "--dataset-config", "mcq", "--layers", "0", "3"]) == 0
    done = capsys.readouterr()
    assert "  answers changed: 4 of 5; right to wrong 2, wrong to right 1\n" in done.out
    assert [line.split()[0] for line in done.out.splitlines() if line[:3] in ("  0", "  1", "  2", "  3")][:2] == [
        "0",
        "3",
    ]
    assert f"next: tracekit diff {a} {b} --dataset-config mcq --plots plots" in done.err


def test_diff_prints_json_that_scripts_read(a: str, b: str, capsys: pytest.CaptureFixture[str]):
    assert main(["diff", a, b, "--json", "--sites", "none"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [one["config"] for one in found["configs"]] == ["mcq", "other_confidence", "self_confidence"]
    assert found["configs"][0]["answers"]["num_right_to_wrong"] == 2
    assert found["configs"][0]["activations"] == []


def test_diff_of_slices_takes_filters(a: str, capsys: pytest.CaptureFixture[str]):
    assert (
        main(["diff", a, a, "--where-a", "parsed_answer=A", "--where-b", "correct_answer_letter=A", "subject=history"])
        == 1
    )
    assert (
        "no sample of other_confidence passes the filter 'parsed_answer=A'" in capsys.readouterr().err
    )  # not so in self_confidence
    only = ["--dataset-config", "mcq"]
    assert main(["diff", a, a, *only, "--where-a", "parsed_answer=A", "--where-b", "correct_answer_letter=A"]) == 0
    text = capsys.readouterr().out
    assert f"a                       {a}  where parsed_answer=A" in text
    assert "2 samples in common, aligned by question; only in a 0, only in b 2" in text


def test_several_filters_of_a_side_must_all_hold(a: str, capsys: pytest.CaptureFixture[str]):
    counts = {}
    for filters in (["is_correct=true"], ["correct_answer_letter=A"], ["is_correct=true", "correct_answer_letter=A"]):
        assert main(["diff", a, a, "--dataset-config", "mcq", "--sites", "none", "--where-a", *filters, "--json"]) == 0
        counts[len(filters), filters[0]] = json.loads(capsys.readouterr().out)["configs"][0]["num_common"]
    assert list(counts.values()) == [3, 4, 2]


def test_diff_writes_pictures(a: str, b: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["diff", a, b, "--dataset-config", "mcq", "--plots", str(tmp_path / "plots")]) == 0
    names = sorted(path.name for path in (tmp_path / "plots").iterdir())
    kinds = ("confidence-shift", "entropy-shift", "hidden_states", "reliability", "resid_post_mlp")
    assert names == [f"mcq-{kind}.png" for kind in kinds]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in (tmp_path / "plots").iterdir())
    assert f"wrote {tmp_path / 'plots' / names[0]}" in capsys.readouterr().err


def test_what_cannot_be_compared_is_one_line(a: str, capsys: pytest.CaptureFixture[str]):
    assert main(["diff", a, "/nowhere"]) == 1
    done = capsys.readouterr()
    assert done.err == "error: no such folder: '/nowhere'\n"
    assert done.out == ""


@pytest.fixture(scope="module")
def damaged(tmp_path_factory: pytest.TempPathFactory) -> str:
    samples = [
        make_damaged(prompt, level=level, generated_answer=text)
        for level, text in ((0.0, "one two three four five"), (0.5, "no no no no no"))
        for prompt in ("p0", "p1")
    ]
    folder = tmp_path_factory.mktemp("damaged") / "run"
    write_dataset(folder, {"train-00000": samples}, config="degradation")
    return str(folder)


def test_stats_of_a_damaged_model_are_by_level(damaged: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["show", damaged, "--stats", "--plots", str(tmp_path / "plots")]) == 0
    out = capsys.readouterr().out
    rows = [line.split() for line in out.splitlines() if line.split()[:2] in (["0", "2"], ["0.5", "2"])]
    assert [row[3] for row in rows] == ["0.000", "0.500"]
    assert (tmp_path / "plots/degradation-levels-ablation.png").read_bytes().startswith(b"\x89PNG")
    assert main(["show", damaged, "--stats", "--json"]) == 0
    (one,) = json.loads(capsys.readouterr().out)
    assert [level["level"] for level in one["report"]] == [0.0, 0.5]


def test_pictures_of_what_was_not_damaged_are_refused(a: str, damaged: str, capsys: pytest.CaptureFixture[str]):
    assert main(["show", a, "--stats", "--plots", "x"]) == 1
    assert "error: --plots draws what the task of a dataset has to draw" in capsys.readouterr().err
    assert main(["show", damaged, "--plots", "x"]) == 1
    assert "--plots goes with --stats" in capsys.readouterr().err


def test_control_characters_of_a_text_do_not_reach_the_terminal(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    text = "a\x1b[2J\x00\x07\x7f\x9b31m"
    made = make_sample("a")
    made = made._replace(record=msgspec.structs.replace(made.record, question=text))
    root = str(write_dataset(tmp_path / "run", {"train-00000": [made]}).root)
    assert main(["show", root]) == 0
    assert main(["show", root, "--key", "a"]) == 0
    out = capsys.readouterr().out
    assert not [character for character in out if ord(character) < 32 and character not in "\n\t"]
    assert not {"\x7f", "\x9b"} & set(out)
    assert "a\\x1b[2J\\x00\\x07\\x7f\\x9b31m" in out
    assert main(["show", root, "--key", "a", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["question"] == text


@pytest.mark.parametrize(("share", "is_said"), [(0.2, False), (0.5, True)])
def test_outputs_without_a_letter_are_warned_about(tmp_path: Path, share: float, is_said: bool):
    layout = write_dataset(tmp_path, {"train-00000": [make_sample("000000", sites=())]})
    manifest = msgspec.structs.replace(
        read_struct(layout.manifest, Manifest),
        metrics=[metric("introspection", "parse_failure_share", share)],
        figures=FigureData(),
    )
    lines = warning_lines(manifest)
    assert len(lines) == is_said
    assert all("--max-new-tokens" in line and "50%" in line for line in lines)


def test_a_run_without_a_finished_shard_says_that_it_has_no_sample(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    layout = write_dataset(tmp_path / "run", {"train-00000": [make_sample("a")]}, is_finished=False)
    layout.sidecar("train-00000").unlink()
    layout.shard("train-00000").unlink()
    assert main(["show", str(layout.root)]) == 0
    assert re.search(r"^samples +none yet$", capsys.readouterr().out, re.MULTILINE)
