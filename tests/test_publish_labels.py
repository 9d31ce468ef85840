"""Publishing label sets: a minor step, beside shards that stay as they are; read back from the Hub."""

import json
import shutil
from pathlib import Path

import pytest

from builders.judging.config import JudgeConfig
from builders.judging.evaluation import Evaluation, evaluate
from builders.judging.judges import Judged
from builders.trivia_qa.record import TriviaQARecord
from tests.hub_for_tests import TestHub
from tests.publishing_for_tests import REPO, publish
from tests.runs_for_tests import trivia_config
from tests.tasks_for_tests import SCHEMAS
from tracekit import TraceStore
from tracekit.card.readme import render_card
from tracekit.clients.client import ClientConfig
from tracekit.errors import DatasetError
from tracekit.format.labels import label_sets, read_summaries
from tracekit.format.layout import Layout
from tracekit.format.manifest import Manifest, read_struct
from tracekit.publish.snapshot import read_local

READ = """
import json, sys
from tracekit import TraceStore
from tracekit.analysis.stats import stats
with TraceStore(sys.argv[1]) as store:
    found = store.labels("rules").to_pylist()
print(json.dumps([found, [one.name for one in stats(sys.argv[1])[0].labels]]))
"""

DAMAGE = """
import os
from pathlib import Path
(path,) = Path(os.environ["HF_HOME"]).rglob("snapshots/*/labels/trivia_qa/*.jsonl")
whole = path.read_bytes()
assert b'"incorrect"' in whole
os.chmod(path, 0o644)
path.resolve().write_bytes(whole.replace(b'"incorrect"', b'"correct"  '))
"""


def judged_of(record: TriviaQARecord) -> Judged:
    return Judged(record.key, record.question, record.ground_truth_answers, record.generated_answer)


def judge(folder: Path) -> Layout:
    config = trivia_config(Path("demo"), output={"out": str(folder)})
    evaluate(config, Evaluation("trivia_qa", "answers", judged_of), judge=JudgeConfig(), client=ClientConfig())
    return Layout(folder, "trivia_qa")


@pytest.fixture
def folder(finished: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "run"))


def test_labels_are_a_minor_step_and_are_read_from_the_hub(folder: Path, xet_hub: TestHub):
    publish(xet_hub, folder, "v1.0.0")
    layout = judge(folder)
    layout.questions.parent.mkdir()
    layout.questions.write_text('{"question": "?"}\n')
    refused = publish(xet_hub, folder, "v1.0.1", check=False)
    assert refused.returncode == 1
    (name,) = label_sets(layout)
    assert "The next free version is v1.1.0" in refused.stderr
    done = publish(xet_hub, folder, "v1.1.0")
    assert f"label set {name} of trivia_qa is new" in done.stdout
    assert "sent            0 files" in done.stdout
    assert "nothing to do" in publish(xet_hub, folder, "v1.1.0").stdout
    read = xet_hub.python(READ + DAMAGE + READ, f"hf://datasets/{REPO}@v1.1.0").stdout
    (found, names), again = map(json.loads, read.splitlines())
    with TraceStore(str(folder)) as store:
        assert found == store.labels("rules").to_pylist()
    assert names == [name]
    assert again == [found, names]  # it was damaged, and fetched again


def test_the_card_names_label_sets_with_their_rates(folder: Path):
    layout = judge(folder)
    manifest = read_struct(layout.manifest, Manifest)
    (summary,) = read_summaries(layout)
    card = render_card([manifest], SCHEMAS, labels=[summary])
    refused = next(rate for rate in summary.rates if rate.name == "refusal_rate")
    shown = f"refusal_rate {refused.value:.3f} [{refused.low:.3f}, {refused.high:.3f}]"
    assert f"| `{summary.name}` | rules | 12 samples, 0 without a label | {shown}" in card
    assert "\n\n\n" not in card.partition("### Label sets")[2].partition("### How")[0]
    assert "|\n\n### Tensors" in card
    assert "### Label sets" not in render_card([manifest], SCHEMAS)


def test_labels_that_are_not_those_of_their_summary_are_not_published(folder: Path):
    layout = judge(folder)
    (name,) = label_sets(layout)
    path = layout.labels(name)
    whole = path.read_bytes()
    path.write_bytes(whole[: whole.index(b"\n") + 1])
    with pytest.raises(DatasetError, match="not those of its summary"):
        read_local(folder)
    path.unlink()
    with pytest.raises(DatasetError, match="is gone, its summary is there"):
        read_local(folder)


def test_a_set_that_is_not_judged_to_the_end_stays_here(folder: Path):
    layout = judge(folder)
    (name,) = label_sets(layout)
    layout.labels(name).with_suffix(".json").unlink()
    assert read_local(folder).beside == []
