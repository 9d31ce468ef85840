"""The library names no task, no record of one and no field of one; a task is imported when needed, and is light."""

import ast
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import msgspec
import pytest

from tests.tasks_for_tests import RECORD_TYPES, TASKS
from tracekit.config import AnswersConfig
from tracekit.records import AnsweredRecord
from tracekit.task import GROUP, Task

ROOT = Path(__file__).parent.parent
SOURCES = sorted((ROOT / "tracekit").rglob("*.py"))
CARDS = [ROOT / "cards" / f"{name}.md.j2" for name in ("base", "configuration", "loading", "task")]
OTHERS = {name: task for name, task in TASKS.items() if name != "serve"}  # the server's task is the library's own
WORDS = {"replay"}
"""Tasks whose names are words that the library uses, too."""
OF_THE_LIBRARY = {
    "choice_logits",  # what replays of several choices compare
    "config_name",  # an argument of `datasets`, a key of the Hub's cards
    "entropy",  # what `answered()` calls the mean of `token_entropies`
    "max_seq_len",  # a key of models' own configurations
    "num_scored",  # an axis
    "repeat",  # a function of numpy
}
"""Names that stand in the library for something else, beside those that it defines."""


def python(code: str, *arguments: str) -> Any:
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def nodes(path: Path) -> Iterator[ast.AST]:
    return ast.walk(ast.parse(path.read_text("utf-8")))


def defined() -> set[str]:
    """Fields, functions and parameters of the library."""
    found = set(OF_THE_LIBRARY)
    for path in SOURCES:
        for node in nodes(path):
            if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
                found.add(node.target.id)
            elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                found.add(node.name)
            elif isinstance(node, ast.arg | ast.keyword):
                found.add(node.arg or "")
    return found


def fields_of_tasks() -> set[str]:
    """Fields that only a task's record or configuration has."""
    records = {name for task in OTHERS for name in RECORD_TYPES[task].__struct_fields__}
    settings = {name for task in OTHERS.values() for name in task.config.__struct_fields__}
    return records - {*AnsweredRecord.__struct_fields__} | settings - {*AnswersConfig.__struct_fields__}


@pytest.mark.parametrize("path", [*SOURCES, *CARDS], ids=lambda path: str(path.relative_to(ROOT)))
def test_no_file_of_the_library_names_a_task_or_its_record(path: Path):
    text = path.read_text("utf-8")
    packages = {task.module.split(".")[1] for task in OTHERS.values()} | {"finetune_csqa"}
    records = {RECORD_TYPES[name].__name__ for name in OTHERS}
    assert not re.findall(rf"\b(?:{'|'.join(packages - WORDS | records)})\b", text)
    assert not re.findall(rf"builders\.(?:{'|'.join(packages)})\b|(?:task|builder)s? `?(?:{'|'.join(WORDS)})\b", text)
    if path.suffix == ".py":
        own = {node.name for node in nodes(path) if isinstance(node, ast.FunctionDef)}
        own |= set(re.findall(r'task\.call\("(\w+)"', text))  # a function of any task, by its role
        assert not WORDS & {node.value for node in nodes(path) if isinstance(node, ast.Constant)} - own


def test_no_file_of_the_library_names_a_field_of_a_task():
    foreign = fields_of_tasks() - defined()
    assert {"ground_truth_answers", "next_true_logprob", "letter_probs", "self_confidence", "n_rep"} <= foreign
    found: dict[str, set[str]] = {}
    for path in SOURCES:
        for node in nodes(path):
            names: set[str] = set()
            if isinstance(node, ast.Attribute):
                names = {node.attr}
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                words = re.findall(r"\w+", node.value)
                names = {node.value, *re.findall(r"`(\w+)`", node.value), *[word for word in words if "_" in word]}
            for name in names & foreign:
                found.setdefault(name, set()).add(path.relative_to(ROOT).as_posix())
    assert not found


def test_the_tasks_are_found_without_what_is_heavy():
    """Each in one process: what one of them loads, all have loaded."""
    code = f"""
import importlib, json, sys
from importlib.metadata import entry_points
modules = [one.load().module for one in entry_points(group={GROUP!r})]
print(json.dumps([modules, [name for name in ("torch", "transformers", "datasets") if name in sys.modules]]))
"""
    modules, heavy = python(code)
    assert sorted(modules) == sorted(task.module for task in TASKS.values())
    assert heavy == []


def test_reading_loads_only_the_task_that_the_dataset_names(finished: Path):
    code = """
import json, sys
from pathlib import Path
import tracekit
with tracekit.TraceStore(sys.argv[1]) as store:
    name = type(store[0].record).__name__
assert not tracekit.verify(Path(sys.argv[1])).problems
print(json.dumps([name, [name for name in sys.modules if name.startswith(("builders.", "torch.", "transformers."))]]))
"""
    name, loaded = python(code, str(finished))
    assert name == "TriviaQARecord"
    assert {one.split(".")[1] for one in loaded} <= {"trivia_qa", "kit"}


def test_a_task_has_the_name_of_its_entry_point_and_a_folder_of_its_own():
    for one in entry_points(group=GROUP):
        task: Task[Any, Any] = TASKS[one.name]
        assert (task.name, f"{task.module}:TASK") == (one.name, one.value)
        assert msgspec.inspect.type_info(task.record).tag == one.name  # type: ignore[union-attr]
        if one.name in OTHERS:
            assert task.module == f"builders.{one.name}.task"
            assert (ROOT / "builders" / one.name / "__main__.py").is_file()


def test_a_class_has_a_name_of_its_own():
    places: dict[str, list[str]] = {}
    for path in sorted([*ROOT.glob("tracekit/**/*.py"), *ROOT.glob("builders/**/*.py")]):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.ClassDef):
                places.setdefault(node.name, []).append(path.relative_to(ROOT).as_posix())
    assert {name: found for name, found in places.items() if len(found) > 1} == {}
