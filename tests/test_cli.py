"""Command lines, run as a user runs them: as processes."""

import json
import os
import re
import signal
import subprocess
import time
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.processes_for_tests import ROOT, bare, run, start
from tests.runs_for_tests import log_lines


def call(*arguments: str, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    return run(*arguments, cwd=cwd)


def trivia(*arguments: str) -> subprocess.CompletedProcess[str]:
    return call("-m", "builders.trivia_qa", *arguments)


def tracekit(*arguments: str) -> subprocess.CompletedProcess[str]:
    return call("-m", "tracekit.cli", *arguments)


class Said(NamedTuple):
    """What became of a command line."""

    code: int
    out: str
    err: str
    heavy: list[str]
    """Heavy packages that were imported by then."""


_SEVERAL = """
import contextlib, io, json, runpy, sys
for module, words in json.loads(sys.argv[1]):
    sys.argv = [module, *words]
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()) as err:
        try:
            runpy.run_module(module, run_name="__main__", alter_sys=True)
        except SystemExit as ended:
            code = ended.code
    heavy = {"torch", "transformers", "datasets", "peft", "accelerate", "ray", "huggingface_hub"} & sys.modules.keys()
    print(json.dumps([code, out.getvalue(), err.getvalue(), sorted(heavy)]))
"""


def several(command_lines: list[tuple[str, list[str]]]) -> list[Said]:
    """Several command lines, one after the other in one process: torch is imported once."""
    done = bare("-c", _SEVERAL, json.dumps(command_lines))
    assert done.returncode == 0, done.stderr
    return [Said(*json.loads(line)) for line in done.stdout.splitlines()]


@pytest.fixture(scope="module")
def small(model: Path) -> list[str]:
    return ["--model", str(model), "--source", "sample", "--limit", "4", "--num-beams", "1", "--max-new-tokens", "4"]


class Told(NamedTuple):
    """What a builder said, and where its dataset is."""

    finished: Path
    said: dict[str, Said]


@pytest.fixture(scope="module")
def told(small: list[str], model: Path, tmp_path_factory: pytest.TempPathFactory) -> Told:
    folder = tmp_path_factory.mktemp("cli")
    run, other, toml = folder / "run", str(folder / "other"), folder / "run.toml"
    toml.write_text(
        f'[model]\nmodel = "{model}"\n[source]\nsource = "sample"\nlimit = 3\n'
        "[generation]\nnum_beams = 2\nmax_new_tokens = 4\n"
    )
    lines = {
        "dry": [*small, "--out", other, "--dry-run"],
        "no model": ["--source", "sample", "--model", "./nowhere", "--out", other],
        "no source": ["--source", "nowhere.jsonl", "--model", "demo", "--out", other],
        "run": [*small, "--out", str(run)],
        "again": [*small, "--out", str(run)],
        "config": ["--config", str(toml), "--limit", "2", "--out", str(folder / "of-config")],
    }
    verify = ("tracekit.cli", ["verify", str(run), "--replay", "2", "--model", str(model)])
    *said, replayed = several([*(("builders.trivia_qa", words) for words in lines.values()), verify])
    assert not Path(other).exists()
    return Told(run, dict(zip(lines, said, strict=True)) | {"replay": replayed})


@pytest.fixture(scope="module")
def finished(told: Told) -> Path:
    run = told.said["run"]
    assert run.code == 0, run.err
    assert f"next: tracekit verify {told.finished}" in run.err
    return told.finished


def test_verify_says_ok_and_what_comes_next(finished: Path):
    done = tracekit("verify", str(finished))
    assert done.returncode == 0
    assert done.stdout.startswith("ok: 4 samples")
    assert done.stderr.endswith(f"next: tracekit show {finished}\n")


def test_verify_with_replay_prints_errors_per_site(told: Told):
    replayed = told.said["replay"]
    assert replayed.code == 0, replayed.err
    assert "replayed 2 samples alone" in replayed.out
    assert "hidden_states" in replayed.out


def test_verify_of_a_damaged_dataset_exits_with_one(finished: Path, tmp_path: Path):
    import shutil

    copy = shutil.copytree(finished, tmp_path / "copy")
    shard = next(copy.glob("data/*/*.tar"))
    os.truncate(shard, 2000)
    done = tracekit("verify", str(copy))
    assert done.returncode == 1
    assert "wrong: data/trivia_qa/validation-00000.tar: 2000 bytes, the manifest says" in done.stdout


def test_show_lists_answers_and_one_sample(finished: Path):
    done = tracekit("show", str(finished))
    assert done.returncode == 0
    assert "hidden_states" in done.stdout
    assert "accuracy" in done.stdout
    assert "What is the capital city of France?" in done.stdout
    one = tracekit("show", str(finished), "--key", "000002")
    assert "prompt_sha256" in one.stdout


def test_show_prints_json_that_scripts_read(finished: Path):
    info = json.loads(tracekit("show", str(finished), "--json").stdout)
    assert info["num_samples"] == 4
    record = json.loads(tracekit("show", str(finished), "--key", "000001", "--json").stdout)
    assert record["key"] == "000001"
    found = json.loads(tracekit("show", str(finished), "--prompt-sha256", record["prompt_sha256"], "--json").stdout)
    assert found["key"] == "000001"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["show", "/nowhere"], "error: no such folder: '/nowhere'"),
        (["verify", str(ROOT / "tests")], "is not a tracekit dataset"),
        (["merge", "a", "--out", "b"], "merge needs two folders or more"),
    ],
)
def test_errors_are_one_line_and_exit_with_one(arguments: list[str], message: str):
    done = tracekit(*arguments)
    assert done.returncode == 1
    assert message in done.stderr
    assert "Traceback" not in done.stderr


def test_an_unknown_key_is_an_error_not_a_trace(finished: Path):
    done = tracekit("show", str(finished), "--key", "999999")
    assert done.returncode == 1
    assert "error:" in done.stderr
    assert "999999" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_mistyped_flag_gets_a_suggestion():
    done = trivia("--num-beens", "3")
    assert done.returncode == 2
    assert "num-beams" in done.stderr


def test_help_lists_the_common_flags():
    text = trivia("--help").stdout
    flags = (
        "--model --adapter --quantize --dtype --device --out --source --split --limit --offset --batch-size --sites "
        "--layers --tokens --samples-per-shard --seed --dataset-config --dry-run --config --system --chat-template "
        "--template-kwargs --num-shots --bos --num-beams --max-new-tokens --num-samples --temperature --top-p --top-k "
        "--trace-samples"
    )
    for flag in flags.split():
        assert flag in text, flag


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--num-beams", "0"], "error: --num-beams 0: Expected `int` >= 1"),
        (["--sites", "hiden"], "unknown site 'hiden'"),
        (["--config", "nowhere.toml"], "'nowhere.toml' cannot be read"),
    ],
)
def test_bad_input_is_an_error_that_says_what_to_do(arguments: list[str], message: str, tmp_path: Path):
    done = trivia("--source", "sample", "--out", str(tmp_path / "run"), *arguments)
    assert done.returncode == 1
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("name", "message"), [("no model", "error: no model at './nowhere'"), ("no source", "nowhere.jsonl")]
)
def test_a_model_or_a_source_that_is_not_there_is_named(told: Told, name: str, message: str):
    assert told.said[name].code == 1
    assert message in told.said[name].err
    assert "Traceback" not in told.said[name].err


def test_a_dry_run_prints_the_plan(told: Told):
    assert told.said["dry"].code == 0, told.said["dry"].err
    for name in ("examples", "prompt tokens", "bytes a sample", "total", "shards", "time"):
        assert name in told.said["dry"].out


def test_flags_override_the_file_and_the_merged_configuration_is_kept(told: Told):
    assert told.said["config"].code == 0, told.said["config"].err
    folder = told.finished.with_name("of-config")
    run = json.loads((folder / "manifests/trivia_qa.json").read_text())["run"]
    assert run["generation"]["num_beams"] == 2
    assert run["source"]["limit"] == 2


def test_the_same_command_again_says_that_there_is_nothing_to_do(told: Told):
    assert told.said["again"].code == 0
    assert "nothing to do" in told.said["again"].err
    assert len(log_lines(told.finished)) == 1, "a batch was computed again"


def test_ctrl_c_finishes_the_batch_and_says_how_to_go_on(model: Path, tmp_path: Path):
    arguments = ["--model", str(model), "--source", "sample", "--num-beams", "4", "--max-new-tokens", "48"]
    arguments += ["--batch-size", "2", "--samples-per-shard", "64", "--out", str(tmp_path / "run")]
    process = start("-m", "builders.trivia_qa", *arguments)
    log = tmp_path / "run/logs/trivia_qa.jsonl"
    deadline = time.monotonic() + 120
    while not log.exists() and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 130, errors
    assert "Run the same command again to go on" in errors
    done = tracekit("verify", str(tmp_path / "run"))
    assert done.returncode == 0
    assert "open: trivia_qa is not finished" in done.stdout


BUILDERS = sorted(path.parent.name for path in (ROOT / "builders").glob("*/__main__.py"))


def test_flags_are_read_before_torch_is_imported():
    commands = ("verify", "show", "export", "diff", "merge", "publish", "serve")
    asked = [(f"builders.{name}", words) for name in BUILDERS for words in (["--help"], ["--num-beens", "3"])]
    asked += [("tracekit.cli", words) for words in (["--help"], ["--hepl"], *([name, "--help"] for name in commands))]
    for (module, words), said in zip(asked, several(asked), strict=True):
        assert (said.code, said.heavy) == (0 if "--help" in words else 2, []), (module, words, said.err)


def test_every_builder_is_there():
    assert len(BUILDERS) == 10


@pytest.mark.parametrize(
    "words",
    [
        ["-m", "builders.trivia_qa", "--help"],
        ["-m", "builders.finetune_csqa", "--help"],
        ["-m", "tracekit.cli", "serve", "--help"],
        *(
            ["-m", "tracekit.cli", command, "FOLDER", *flags]
            for command, flags in (
                ("verify", []),
                ("show", []),
                ("show", ["--json"]),
                ("show", ["--stats"]),
                ("diff", ["FOLDER", "--json"]),
            )
        ),
        ["-m", "builders.trivia_qa", "SMALL"],
    ],
)
def test_a_reader_that_leaves_early_is_no_error(words: list[str], finished: Path, small: list[str], tmp_path: Path):
    """As `| head -1` does, here before the first line."""
    swapped = {"FOLDER": [str(finished)], "SMALL": [*small, "--out", str(tmp_path / "run")]}
    process = start(*(word for one in words for word in swapped.get(one, [one])))
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.close()
    errors = process.stderr.read()
    process.stderr.close()
    assert process.wait() == 0, errors
    assert not re.search("Traceback|Broken pipe|Exception|error:", errors), errors


_WITHOUT = """
import runpy, sys
class Missing:
    def find_spec(name, path=None, target=None):
        if name == {package!r}:
            raise ModuleNotFoundError("No module named " + repr(name), name=name)
sys.meta_path.insert(0, Missing)
sys.argv[1:] = {arguments!r}
runpy.run_module({module!r}, run_name="__main__", alter_sys=True)
"""


@pytest.mark.parametrize(
    ("package", "extra", "words"),
    [
        ("torch", "run", ["verify", "DIR", "--replay", "1"]),
        ("huggingface_hub", "publish", ["publish", "DIR", "owner/name", "--version", "v1.0.0"]),
        ("huggingface_hub", "publish", ["show", "hf://datasets/owner/name@v1.0.0"]),
        ("torch", "run", ["builders.trivia_qa", "--source", "sample"]),
        ("torch", "run", ["builders.wiki_qa", "--source", "sample"]),
        ("transformers", "run", ["builders.finetune_csqa", "--model", "x", "--out", "y"]),
    ],
)
def test_a_plain_installation_says_what_to_install(finished: Path, package: str, extra: str, words: list[str]):
    module, arguments = ("tracekit.cli", words) if "." not in words[0] else (words[0], words[1:])
    code = _WITHOUT.format(package=package, arguments=arguments, module=module).replace("DIR", str(finished))
    done = bare("-c", code)
    assert done.returncode == 1, done.stderr
    assert "Traceback" not in done.stderr
    assert f"the package {package} is needed" in done.stderr
    assert f"pip install 'tracekit-llm[{extra}]'" in done.stderr
