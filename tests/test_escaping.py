"""Names from data in cards, snippets and on the terminal: shown as they are, and nothing else."""

import ast
import json
import re
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.datasets_for_tests import make_sample, write_dataset
from tests.tasks_for_tests import SCHEMAS
from tracekit.card.escaping import Markdown, cell, code, escaped, fence, finalize, python
from tracekit.card.readme import CardSettings, own_section, render_card, settings_of, split_card
from tracekit.card.script import render_script, script_problem
from tracekit.console import printable, printable_json
from tracekit.format.layout import Layout, config_names
from tracekit.format.manifest import FileInfo, Manifest, Metric, read_manifest, read_schema
from tracekit.read.verifier import verify

pytestmark = pytest.mark.attack

BEGIN, END = "<!-- yours: begin -->", "<!-- yours: end -->"
PARTS = st.sampled_from(
    [
        BEGIN,
        END,
        "\n",
        "\r",
        "\u2028",
        "|",
        "`",
        "```",
        '"',
        "'",
        "\\",
        "](http://x)",
        "<script>",
        "&lt;",
        "{{ 7 }}",
        "_",
        '"); import os; os.system("x") #',
        "---\n",
        "# ",
        "\x1b[2J",
        "\u202e",
        "~~~\n",
        "$(id)",
        "name",
        "org/name",
        "*",
    ]
)
NAMES = st.lists(PARTS, min_size=1, max_size=6).map("".join)


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    layout = write_dataset(tmp_path_factory.mktemp("card"), {"train-00000": [make_sample("000000")]})
    file = FileInfo(path="records/trivia_qa/train.tar", num_bytes=1, sha256="0" * 64)
    return msgspec.structs.replace(read_manifest(layout), files=[file])


def card_of(manifest: Manifest, section: str | None = None) -> str:
    return render_card([manifest], SCHEMAS, settings=CardSettings(section=section))


def lines_of(text: str) -> list[str]:
    """Lines as Markdown has them."""
    return re.split(r"\r\n?|\n", text)


def forged(manifest: Manifest, name: str) -> Manifest:
    """A manifest that says this name wherever it says a name that makes no path."""
    replace = msgspec.structs.replace
    run: dict[str, Any] = {
        "correctness": "exact_match",
        "prompt": {"num_shots": name},
        "capture": {"layers": [name], "tokens": name},
        name: {name: [name]},
    }
    return replace(
        manifest,
        model=replace(
            manifest.model, id=name, revision=name, adapter=name, variant=name, dtype=name, quantization=name
        ),
        source=replace(manifest.source, id=name, revision=name, subset=name, skipped=[name]),
        run=run,
        device_type=name,
        versions={name: name},
        tensors=[replace(manifest.tensors[0], name=name, dtype=name, axes=[name], layout=name)],
        metrics=[Metric(name=name, value=0.5)],
        invariants=[name],
        verification=replace(
            manifest.verification, sites=[replace(one, site=name) for one in manifest.verification.sites]
        ),
        command=name,
        templates=[name],
    )


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(name=NAMES, section=st.sampled_from([None, "Mine.\n\n- all of it"]))
def test_no_name_forges_the_own_section_or_leaves_its_place(manifest: Manifest, name: str, section: str | None):
    text = card_of(forged(manifest, name), section)
    assert own_section(text) == section
    assert settings_of(text).section == section
    assert [line for line in lines_of(text) if line.startswith("<!--")] == [BEGIN, END]
    _, body = split_card(text)
    shape = re.sub(r"(?m)^(`{3,})\w*\n.*?^\1$", "", body, flags=re.DOTALL)
    plain = card_of(forged(manifest, "name"), section)
    usual = re.sub(r"(?m)^(`{3,})\w*\n.*?^\1$", "", split_card(plain)[1], flags=re.DOTALL)
    assert len(lines_of(shape)) == len(lines_of(usual))  # no name makes a line of its own
    for line, other in zip(lines_of(shape), lines_of(usual), strict=True):
        assert len(re.findall(r"(?<!\\)\|", line)) == len(re.findall(r"(?<!\\)\|", other))  # nor a cell
        assert "<script>" not in re.sub(r"(`+)(?!`).*?(?<!`)\1(?!`)", "", line)


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(name=NAMES)
def test_snippets_are_python_that_only_names_the_name(manifest: Manifest, name: str):
    text = card_of(forged(manifest, name))
    (snippet,) = [block for block in re.findall(r"(?ms)^```python\n(.*?)^```$", text) if "TraceStore" in block]
    called = {ast.unparse(node.func) for node in ast.walk(ast.parse(snippet)) if isinstance(node, ast.Call)}
    assert called <= {
        "tracekit.load_dataset",
        "tracekit.TraceStore",
        "store.tensor",
        "store.hidden_states",
        "store.record",
    }
    assert name.partition(".")[0] in [
        node.value for node in ast.walk(ast.parse(snippet)) if isinstance(node, ast.Constant)
    ]


@settings(max_examples=40, deadline=None)
@given(text=st.text() | NAMES)
def test_escaped_forms(text: str):
    assert ast.literal_eval(python(text)) == text
    for form in (escaped(text), cell(text), code(text)):
        assert len(lines_of(form)) == 1
        assert not re.search("[\x00-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]", form)
        assert not re.search(r"(?<!\\)\|", form) or "\\" in text
    assert "<" not in escaped(text)
    opened, *lines, closed = fence(text, "bash").split("\n")
    assert opened == closed + "bash"
    assert closed not in lines
    assert escaped(Markdown(text)) == text


@settings(max_examples=40, deadline=None)
@given(text=st.text(st.characters(exclude_categories=())) | NAMES)
def test_what_a_terminal_is_given(text: str):
    shown = printable(text)
    shown.encode()
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]", shown)
    said = json.dumps({text: text}, ensure_ascii=False)
    assert json.loads(printable_json(said)) == json.loads(said)


SCRIPTS = {
    "code before": lambda script: script.replace("import ", "import os\nimport ", 1),
    "code behind": lambda script: script + "\nimport os\n",
    "code in the fingerprint": lambda script: re.sub(
        r'(FINGERPRINT = "\w+")', r"\1 + str(open('/etc/passwd'))", script
    ),
    "a second fingerprint": lambda script: script + '\nFINGERPRINT = "' + "0" * 64 + '"\n',
    "code in the literal": lambda script: script.replace("Any] = {", "Any] = __import__('os').environ and {", 1),
    "a call in the literal": lambda script: script.replace('"splits": {', '"splits": print() or {', 1),
    "code behind the literal": lambda script: script.replace("\n}\n", "\n}; import os\n", 1),
    "deep": lambda script: script.replace("Any] = {", "Any] = " + "[" * 100_000, 1),
    "no UTF-8": lambda script: script + "\udcff",
    "empty": lambda script: "",
}


LITERALS = {
    "another path": lambda script: script.replace("data/trivia_qa/train-00000", "../../../etc/passwd"),
    "a key twice": lambda script: script.replace('"splits": {', '"splits": {}, "splits": {', 1),
    "another dtype": lambda script: script.replace('"dtype": "float32"', '"dtype": "int32"', 1),
    "axes in another order": lambda script: script.replace(
        '"T",\n                    "D"', '"D",\n                    "T"', 1
    ),
    "another layout": lambda script: script.replace('"layout": "dense"', '"layout": "full"', 1),
    "another number of samples": lambda script: script.replace('"num_samples": 1', '"num_samples": 2', 1),
    "a field of another type": lambda script: script.replace('"question": "string"', '"question": "int64"', 1),
    "another field": lambda script: script.replace('"question": "string"', '"xuestion": "string"', 1),
    "another configuration": lambda script: script.replace('"trivia_qa": {', '"trivia_aq": {', 1),
    "another fingerprint": lambda script: re.sub(
        r'FINGERPRINT = "(.)', lambda found: f'FINGERPRINT = "{"1" if found[1] == "0" else "0"}', script
    ),
}


@pytest.mark.parametrize("change", [*SCRIPTS, *LITERALS])
def test_a_script_with_anything_of_its_own_is_named(manifest: Manifest, change: str):
    script = render_script([manifest], SCHEMAS)
    assert script_problem(script.encode(), [manifest], SCHEMAS) is None
    changed = (SCRIPTS | LITERALS)[change](script)
    assert changed != script
    problem = script_problem(changed.encode(errors="surrogateescape"), [manifest], SCHEMAS)
    assert problem is not None
    assert "do not run it" in problem or "Fetch it again" in problem


@pytest.mark.parametrize("version", ["1.0", "1.1"])
def test_a_released_script_is_right_and_no_other_byte_of_it_is(version: str):
    root = Path(__file__).parent / "data" / f"schema-{version}"
    script = (root / "load_traces.py").read_bytes()
    layouts = [Layout(root, name) for name in config_names(root)]
    manifests = [read_manifest(layout) for layout in layouts]
    schemas = {layout.config: read_schema(layout) for layout in layouts}
    assert script_problem(script, manifests, schemas) is None
    start = script.index(b"FINGERPRINT = ") + 80  # later versions may have made it of other bytes
    for at in [*range(0, start - 80, 41), *range(start, len(script), 41)]:
        broken = bytearray(script)
        broken[at] ^= 1
        if not script[at : at + 1].isspace():  # between values of JSON
            assert script_problem(bytes(broken), manifests, schemas) is not None, script[at - 20 : at + 20]


def test_verify_says_that_a_script_differs(tmp_path: Path):
    layout = write_dataset(tmp_path, {"train-00000": [make_sample("000000")]})
    Layout(tmp_path, "trivia_qa").script.write_text("import os\n")
    assert any(problem.startswith("load_traces.py: differs") for problem in verify(layout.root).problems)


def test_a_separator_of_a_template_keeps_its_space(manifest: Manifest):
    assert "the embeddings are index 0); T tokens" in card_of(forged(manifest, "x"))
    assert finalize("; ") == "; "
    assert finalize(" name ").strip() == "name"
    assert finalize("\n") == ""
