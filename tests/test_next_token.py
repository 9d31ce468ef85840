"""The next-token builder: windows, every number against plain transformers, words and tokens, resume, refusals."""

import json
import math
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel, GPT2TokenizerFast

import builders.next_token.windows
from builders.kit.columns import TextSource
from builders.next_token.config import NextTokenConfig, TextPromptConfig
from builders.next_token.task import TASK
from builders.next_token.task import TASK as NEXT_TOKEN
from builders.next_token.texts import Document, read_documents
from builders.next_token.tracer import NextTokenTracer
from builders.next_token.windows import Window, cut, place_in_text, tokenize
from tests.runs_for_tests import hashes, log_lines
from tests.tiny_checkpoint import save_tiny_checkpoint, tiny_tokenizer
from tracekit import TraceStore, verify
from tracekit.cli import run_task
from tracekit.config import ModelConfig, OutputConfig, ReadingConfig
from tracekit.errors import CaptureError, ConfigError, SourceError
from tracekit.format.layout import Layout
from tracekit.run.merge import merge
from tracekit.run.recheck import replay_stored
from tracekit.run.runner import Ended, execute


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a tiny random GPT-2 with 64 positions, and the tokenizer of the tiny checkpoint."""
    folder = tmp_path_factory.mktemp("checkpoint") / "gpt2"
    tokenizer = tiny_tokenizer()
    torch.manual_seed(3)
    special = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    config = GPT2Config(vocab_size=len(tokenizer), n_positions=64, n_embd=32, n_layer=2, n_head=4, **special)
    config.initializer_range = 0.3
    GPT2LMHeadModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def checkpoints(model: Path, gpt2: Path) -> dict[str, Path]:
    return {"llama": model, "gpt2": gpt2}


def config_of(checkpoint: Path, /, *, source: str | Path = "sample:ud_ewt", **settings: Any) -> NextTokenConfig:
    """A small, fast configuration; dictionaries override parts, anything else is the task's own."""
    parts: dict[str, Any] = {
        "model": ModelConfig(model=str(checkpoint), device="cpu"),
        "source": TextSource(source=str(source)),
        "prompt": TextPromptConfig(),
        "capture": ReadingConfig(sites=("hidden_states",), num_replays=1),
        "output": OutputConfig(samples_per_shard=5, batch_size=3),
    }
    own = {name: value for name, value in settings.items() if name not in parts and name != "rows"}
    changes = {"source": settings.pop("rows", {}), **settings}
    changed = {name: msgspec.structs.replace(part, **changes.get(name, {})) for name, part in parts.items()}
    return NextTokenConfig(**changed, **own)


def run(out: Path, checkpoint: Path, /, **settings: Any) -> Ended:
    return execute(NEXT_TOKEN, config_of(checkpoint, **settings), out)


def metrics(outcome: Ended) -> dict[str, float]:
    assert outcome.manifest is not None
    return {metric.name: metric.value for metric in outcome.manifest.metrics}


def by_hand(checkpoint: Path, text: str, max_length: int, stride: int) -> tuple[float, int]:
    """Sum of the negative log-probabilities of a text and their number, by sliding windows in plain transformers."""
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    plain = AutoModelForCausalLM.from_pretrained(checkpoint, attn_implementation="eager").eval()
    ids = tokenizer(text, return_tensors="pt", verbose=False).input_ids
    total, count, previous = 0.0, 0, 0
    for begin in range(0, ids.shape[1], stride):
        end = min(begin + max_length, ids.shape[1])
        labels = ids[:, begin:end].clone()
        labels[:, : previous - begin] = -100
        num_scored = int((labels[:, 1:] != -100).sum())
        if num_scored:
            with torch.no_grad():
                total += plain(ids[:, begin:end], labels=labels).loss.item() * num_scored
        count, previous = count + num_scored, end
        if end == ids.shape[1]:
            break
    return total, count


# Windows


@pytest.mark.parametrize(
    ("num_tokens", "length", "stride", "expected"),
    [
        (10, 6, 4, [(0, 6, 0), (4, 10, 2)]),
        (10, 5, 5, [(0, 5, 0), (5, 10, 0)]),
        (11, 5, 5, [(0, 5, 0), (5, 10, 0), (10, 11, 0)]),
        (5, 5, 1, [(0, 5, 0)]),
        (6, 5, 1, [(0, 5, 0), (1, 6, 4)]),
        (1, 5, 5, [(0, 1, 0)]),
        (0, 5, 5, []),
    ],
)
def test_windows_advance_by_the_stride(num_tokens: int, length: int, stride: int, expected: list[tuple[int, int, int]]):
    assert cut(num_tokens, length, stride) == expected


@given(st.integers(0, 200), st.integers(2, 40), st.integers(1, 40))
def test_no_token_is_scored_twice_or_left_out(num_tokens: int, length: int, stride: int):
    stride = min(stride, length)
    windows = cut(num_tokens, length, stride)
    scored = [t for start, stop, context in windows for t in range(start + max(context, 1), stop)]
    firsts = {start for start, _, context in windows if not context}  # predicted by nothing
    assert scored == [t for t in range(num_tokens) if t not in firsts]
    assert [t for start, stop, context in windows for t in range(start + context, stop)] == list(range(num_tokens))
    assert firsts <= {0} or stride == length
    assert all(stop - start <= length for start, stop, _ in windows)


# Numbers


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_every_number_is_that_of_plain_transformers(checkpoints: dict[str, Path], tmp_path: Path, family: str):
    """Sentences of different lengths share batches; some are cut into overlapping windows."""
    checkpoint = checkpoints[family]
    run(tmp_path / "run", checkpoint, max_seq_len=32, stride=20, capture={"topk": 3, "sites": ("all",)})
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    plain = AutoModelForCausalLM.from_pretrained(checkpoint, attn_implementation="eager").eval()
    store = TraceStore(str(tmp_path / "run"))
    assert verify(tmp_path / "run").problems == []
    assert len({len(sample.record.token_ids) for sample in store}) > 5
    assert any(sample.record.num_context for sample in store)
    for sample in store:
        record = sample.record
        with torch.no_grad():
            output = plain(torch.tensor([record.token_ids]), output_hidden_states=True, output_attentions=True)
        logprobs = output.logits[0, :-1].log_softmax(-1)
        true = torch.tensor(record.token_ids[1:])
        best = logprobs.topk(3)
        picked = logprobs.gather(1, true[:, None])[:, 0]
        assert record.next_pos == list(range(len(true)))
        assert record.next_true_id == true.tolist()
        assert record.next_pred_id == logprobs.argmax(-1).tolist()
        assert record.next_correct == (logprobs.argmax(-1) == true).tolist()
        assert record.next_topk_ids == best.indices.tolist()
        assert record.next_topk_tokens == [tokenizer.convert_ids_to_tokens(row) for row in best.indices.tolist()]
        close = {"rtol": 1e-4, "atol": 1e-6}
        np.testing.assert_allclose(record.next_topk_probs, best.values.exp(), **close)
        np.testing.assert_allclose(record.next_pred_prob, best.values[:, 0].exp(), **close)
        np.testing.assert_allclose(record.next_true_logprob, picked, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(record.next_true_prob, picked.exp(), **close)
        np.testing.assert_allclose(record.next_entropy, -(logprobs.exp() * logprobs).sum(-1), rtol=1e-4)
        scored = picked[max(record.num_context - 1, 0) :]
        assert record.num_scored == len(scored)
        assert record.loss == pytest.approx(-scored.mean().item(), rel=1e-5)
        assert record.perplexity == pytest.approx(math.exp(-scored.mean().item()), rel=1e-4)
        hidden = torch.stack(output.hidden_states)[:, 0]
        np.testing.assert_allclose(sample.hidden_states(), hidden, rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(sample.attention(layer=1), output.attentions[1][0], atol=1e-5)


@pytest.mark.parametrize(("family", "stride"), [("llama", 24), ("gpt2", None)])
def test_perplexity_of_a_run_is_the_usual_sliding_window_one(
    checkpoints: dict[str, Path], tmp_path: Path, family: str, stride: int | None
):
    outcome = run(
        tmp_path / "run",
        checkpoints[family],
        source="sample:wikitext2",
        rows={"limit": 14},
        max_seq_len=64,
        stride=stride,
        capture={"sites": ("none",)},
    )
    (document,) = read_documents(TextSource(source="sample:wikitext2", limit=14)).examples
    total, count = by_hand(checkpoints[family], document.text, 64, stride or 64)
    found = metrics(outcome)
    assert found["loss"] == pytest.approx(total / count, rel=1e-5)
    assert found["perplexity"] == pytest.approx(math.exp(total / count), rel=1e-4)
    records = [sample.record for sample in TraceStore(str(tmp_path / "run"))]
    assert sum(record.num_scored for record in records) == count
    right = [ok for r in records for ok in r.next_correct[max(r.num_context - 1, 0) :]]
    assert found["next_token_accuracy"] == pytest.approx(sum(right) / count)
    assert "mean_answer_tokens" not in found


def test_perplexity_over_rows_of_the_real_wikitext(model: Path, shared: Path, tmp_path: Path):
    """As a table of lines, joined by two line feeds, with whole windows of the model's length."""
    lines = (
        (shared / "data/wikitext/slice_test_300lines.raw").read_text(encoding="utf-8").splitlines(keepends=True)[:10]
    )
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
    settings: dict[str, Any] = {"source": path, "kind": "wikitext2", "capture": {"sites": ("none",)}}
    outcome = run(tmp_path / "run", model, **settings)
    total, count = by_hand(model, "\n\n".join(lines), 512, 512)
    assert count > 600
    assert metrics(outcome)["perplexity"] == pytest.approx(math.exp(total / count), rel=1e-4)
    assert outcome.manifest is not None
    assert outcome.manifest.source.num_used == 10


def test_a_token_alone_has_no_loss(model: Path, tmp_path: Path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "a"}\n{"text": "Who wrote Romeo and Juliet?"}\n')
    found = metrics(run(tmp_path / "run", model, source=path, capture={"num_replays": 2}))
    store = TraceStore(str(tmp_path / "run"))
    first, second = store.record("000000_000"), store.record("000001_000")
    assert (first.token_ids, first.next_pos, first.next_topk_ids, first.num_scored) == ([first.token_ids[0]], [], [], 0)
    assert (first.loss, first.perplexity) == (None, None)
    assert found["loss"] == pytest.approx(second.loss)
    assert store.hidden_states("000000_000").shape == (3, 1, 32)
    assert verify(tmp_path / "run").problems == []


# Windows in the text


def windows_of(tokenizer: Any, document: Document, length: int, stride: int) -> list[Window]:
    whole = tokenize(tokenizer, document, "auto")
    return [
        Window(index=n, whole=whole, number=n, start=start, stop=stop, num_context=context)
        for n, (start, stop, context) in enumerate(cut(len(whole.token_ids), length, stride))
    ]


def test_windows_say_where_they_come_from_and_tile_the_text(model: Path, tmp_path: Path):
    run(tmp_path / "run", model, source="sample", max_seq_len=50, capture={"sites": ("none",)})
    store = TraceStore(str(tmp_path / "run"))
    records = sorted((sample.record for sample in store), key=lambda record: record.window_start)
    (document,) = read_documents(TextSource(source="sample")).examples
    ids = AutoTokenizer.from_pretrained(model)(document.text).input_ids
    assert "".join(record.text for record in records) == document.text
    assert [token for record in records for token in record.token_ids] == ids
    for number, record in enumerate(records):
        assert record.key == f"000000_{number:03d}"
        assert (record.window_index, record.window_start) == (number, 50 * number)
        assert record.num_document_tokens == len(ids)
        assert record.document_id == record.example_id == record.question_id == "next_token_wikitext.txt 0-37"
        assert record.prompt == record.text
        assert record.prompt_length == len(record.token_ids) == record.last_prompt_index + 1
        for token, (start, stop) in zip(record.tokens, record.token_offsets, strict=True):
            written = record.text[start:stop]
            assert not written.isascii() or token.replace("Ġ", " ").replace("Ċ", "\n") == written
    assert {record.kind for record in records} == {"text"}


@pytest.mark.parametrize("length", [1024, 7])
def test_words_of_the_real_treebank_lie_in_the_tokens_of_the_real_tokenizer(shared: Path, length: int):
    """Every word is covered by its tokens, and no token of its range could be left out."""
    folder = shared / "tokenizers/gpt2"
    tokenizer = GPT2TokenizerFast(vocab=str(folder / "vocab.json"), merges=str(folder / "merges.txt"))
    config = TextSource(source=str(shared / "data/ud_ewt/slice_dev_200.conllu"))
    num_multiword = num_shared = 0
    for document in read_documents(config).examples:
        found: set[str] = set()
        for window in windows_of(tokenizer, document, length, length):
            text, offsets, words = place_in_text(window)
            assert (offsets[0][0], offsets[-1][1]) == (0, len(text))
            for word in words:
                found.add(word.id)
                if word.start_char is None:
                    assert (word.start_token, word.stop_token) == (None, None)
                    continue
                assert word.start_token is not None
                assert word.stop_token is not None
                assert word.stop_char is not None
                inside = offsets[word.start_token : word.stop_token]
                assert inside[0][0] <= word.start_char < inside[0][1]
                assert inside[-1][0] < word.stop_char <= inside[-1][1]
                assert word.form in text or length == 7
                if length > 7:
                    assert text[word.start_char : word.stop_char] == word.form
                num_multiword += "-" in word.id
                num_shared += inside[0][0] < word.start_char - 1 or inside[-1][1] > word.stop_char
        assert found == {word.id for word in document.words}
    assert num_multiword > 10
    assert num_shared > 0


def test_an_emoji_of_several_tokens_is_one_word_and_lies_in_both_windows_that_cut_it():
    document = next(d for d in read_documents(TextSource(source="sample:ud_ewt")).examples if "😋" in d.text)
    tokenizer = tiny_tokenizer()
    (whole,) = windows_of(tokenizer, document, 1024, 1024)
    text, offsets, words = place_in_text(whole)
    emoji = next(word for word in words if word.form == "😋")
    assert emoji.start_token is not None
    assert emoji.stop_token is not None
    assert emoji.start_char == text.index("😋")
    inside = offsets[emoji.start_token : emoji.stop_token]
    assert len(inside) >= 4
    assert all(start <= emoji.start_char < stop for start, stop in inside)
    middle = emoji.start_token + 2
    first, second, *_ = windows_of(tokenizer, document, middle, middle)
    for window, tokens in ((first, [emoji.start_token, middle]), (second, [0, emoji.stop_token - middle])):
        text, _, words = place_in_text(window)
        part = next(word for word in words if word.form == "😋")
        assert "😋" in text
        assert [part.start_token, part.stop_token] == tokens


def test_an_empty_node_stays_with_the_word_before_it():
    document = next(d for d in read_documents(TextSource(source="sample:ud_ewt")).examples if "coffee" in d.text)
    tokenizer = tiny_tokenizer()
    for window in windows_of(tokenizer, document, 6, 6):
        _, _, words = place_in_text(window)
        ids = [word.id for word in words]
        assert ("5.1" in ids) == ("5" in ids)


@pytest.mark.parametrize(
    ("kind", "fields"),
    [
        ("go_emotions", {"labels": ["gratitude"], "question": None, "answer": None, "words": []}),
        ("csqa", {"labels": [], "words": []}),
    ],
)
def test_what_the_source_says_is_in_the_record(model: Path, tmp_path: Path, kind: str, fields: dict[str, Any]):
    run(tmp_path / "run", model, source=f"sample:{kind}", rows={"limit": 2}, capture={"sites": ("none",)})
    record = TraceStore(str(tmp_path / "run")).record("000000_000")
    assert {name: getattr(record, name) for name in fields} == fields
    assert record.kind == kind
    if kind == "csqa":
        assert record.text == f"{record.question} {record.answer}"


# Beginning of sequence


def saved_with_bos(folder: Path) -> Path:
    """The tiny checkpoint with a tokenizer that puts <s> before and </s> after every text."""
    save_tiny_checkpoint(folder)
    path = folder / "tokenizer.json"
    data = json.loads(path.read_text())
    ids = {name: [tiny_tokenizer().convert_tokens_to_ids(name)] for name in ("<s>", "</s>")}
    around = [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]
    data["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [*around, {"SpecialToken": {"id": "</s>", "type_id": 0}}],
        "pair": around,
        "special_tokens": {name: {"id": name, "ids": number, "tokens": [name]} for name, number in ids.items()},
    }
    path.write_text(json.dumps(data))
    return folder


def test_special_tokens_stand_once_around_a_document_and_not_around_windows(tmp_path: Path):
    tokenizer = AutoTokenizer.from_pretrained(saved_with_bos(tmp_path / "tiny"))
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    document = Document(index=0, id="x", kind="text", text="The quick brown fox jumps over the lazy dog")
    whole = tokenize(tokenizer, document, "auto")
    assert whole.token_ids.tolist() == tokenizer(document.text).input_ids
    assert (whole.token_ids == bos).sum() == (whole.token_ids == eos).sum() == 1
    assert whole.offsets[0].tolist() == [0, 0]
    assert whole.offsets[-1].tolist() == [len(document.text)] * 2
    windows = windows_of(tokenizer, document, 4, 4)
    assert "".join(place_in_text(window)[0] for window in windows) == document.text
    twice = tokenize(tokenizer, msgspec.structs.replace(document, text="<s>The fox"), "auto")
    assert (twice.token_ids == bos).sum() == 1
    without = tokenize(tokenizer, document, "never")
    assert without.token_ids.tolist() == tokenizer(document.text, add_special_tokens=False).input_ids


def test_a_beginning_of_sequence_can_be_asked_for(model: Path, tmp_path: Path):
    run(tmp_path / "run", model, prompt={"bos": "always"}, rows={"limit": 2}, max_seq_len=16)
    bos = AutoTokenizer.from_pretrained(model).bos_token_id
    for sample in TraceStore(str(tmp_path / "run")):
        assert [token == bos for token in sample.record.token_ids].count(True) == (sample.record.window_index == 0)
        assert not sample.record.eos_included


# Runs


def test_a_run_that_died_goes_on_and_ends_with_the_same_bytes(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    settings: dict[str, Any] = {"max_seq_len": 24, "stride": 16}
    run(tmp_path / "whole", model, **settings)
    original, calls = NextTokenTracer.trace, iter(range(100))

    def trace(self: Any, *arguments: Any) -> Any:
        if next(calls) == 4:  # the first measures
            raise KeyError("dies")
        return original(self, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(NextTokenTracer, "trace", trace)
        with pytest.raises(KeyError, match="dies"):
            run(tmp_path / "run", model, **settings)
    assert len(log_lines(tmp_path / "run", "next_token")) == 3
    run(tmp_path / "run", model, **settings)
    assert hashes(tmp_path / "run") == hashes(tmp_path / "whole")
    assert run(tmp_path / "run", model, **settings).was_complete


def test_a_dry_run_measures_and_writes_nothing(model: Path, tmp_path: Path):
    outcome = run(tmp_path / "run", model, output={"dry_run": True}, max_seq_len=24)
    assert outcome.estimate is not None
    assert outcome.estimate.num_examples > 12
    assert not (tmp_path / "run").exists()


def test_slices_have_the_keys_of_the_whole_and_merge(model: Path, tmp_path: Path):
    run(tmp_path / "whole", model, max_seq_len=24)
    run(tmp_path / "a", model, max_seq_len=24, rows={"limit": 5})
    run(tmp_path / "b", model, max_seq_len=24, rows={"offset": 5})
    manifest = merge([tmp_path / "b", tmp_path / "a"], tmp_path / "joined")
    whole, joined = TraceStore(str(tmp_path / "whole")), TraceStore(str(tmp_path / "joined"))
    assert sorted(joined.keys) == sorted(whole.keys)
    assert (manifest.run["source"]["offset"], manifest.run["source"]["limit"]) == (0, 12)
    assert manifest.source.num_used == 12
    assert verify(tmp_path / "joined").problems == []
    for key in joined.keys:
        np.testing.assert_allclose(joined.hidden_states(key), whole.hidden_states(key), atol=1e-4)


def test_a_bad_row_is_reported_with_its_line_or_skipped_and_counted(model: Path, tmp_path: Path):
    path = tmp_path / "rows.tsv"
    path.write_text("Oh no\t26\ta\nWhat\t99\tb\nGood\t0\tc\n")
    with pytest.raises(SourceError, match=r"rows\.tsv line 2: label '99'"):
        run(tmp_path / "run", model, source=path)
    outcome = run(tmp_path / "run", model, source=path, rows={"on_bad_row": "skip"})
    assert outcome.manifest is not None
    assert (outcome.manifest.source.num_used, len(outcome.manifest.source.skipped)) == (2, 1)
    assert sorted(TraceStore(str(tmp_path / "run")).keys) == ["000000_000", "000002_000"]


def test_a_document_that_would_fill_the_memory_is_too_long(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(builders.next_token.windows, "_MAX_CHARACTERS", 100)
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "One two."}\n{"text": "' + "word " * 30 + '"}\n')
    with pytest.raises(SourceError, match=r"rows\.jsonl row 1: too long: a text of 150 characters.*on-bad-row skip"):
        NEXT_TOKEN.examples(config_of(model, source=path))
    windows, info = NEXT_TOKEN.examples(config_of(model, source=path, rows={"on_bad_row": "skip"}))
    assert {window.whole.document.index for window in windows} == {0}
    assert (info.num_used, info.left_out) == (1, "0 malformed, 1 too long")


def test_windows_are_as_long_as_the_model_has_positions(gpt2: Path):
    windows, info = NEXT_TOKEN.examples(config_of(gpt2, source="sample", rows={"limit": 10}))
    assert {window.stop - window.start for window in windows[:-1]} == {64}
    assert info.num_used == 10


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"capture": {"tokens": "answer"}}, r"'answer' - at `\$\.capture\.tokens`"),
        ({"capture": {"topk": 999}}, r"--topk 999 - at `\$\.capture\.topk`; there are 3\d\d tokens"),
        ({"max_seq_len": 65}, r"--max-seq-len 65 - at `\$\.max_seq_len`; the model has positions for 64"),
        ({"max_seq_len": 8, "stride": 9}, r"--stride 9 - at `\$\.stride`; it would leave tokens out of windows of 8"),
        ({"max_seq_len": 1}, r"Expected `int` >= 2 - at `\$\.max_seq_len`"),
        ({"stride": 0}, r"Expected `int` >= 1 - at `\$\.stride`"),
        ({"kind": "csqa"}, "--kind csqa"),
    ],
)
def test_settings_without_a_meaning_here_are_refused(
    gpt2: Path, tmp_path: Path, settings: dict[str, Any], message: str
):
    with pytest.raises(ConfigError, match=message):
        run(tmp_path / "run", gpt2, **settings)


def test_the_command_line_takes_every_flag(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    arguments = ["--model", str(model), "--device", "cpu", "--source", "sample:go_emotions", "--limit", "3"]
    arguments += ["--max-seq-len", "16", "--stride", "8", "--topk", "2", "--kind", "go_emotions", "--sites", "none"]
    with pytest.raises(SystemExit) as ended:
        run_task(TASK, [*arguments, "--out", str(tmp_path / "run")])
    assert ended.value.code == 0
    assert "perplexity" in capsys.readouterr().out
    record = TraceStore(str(tmp_path / "run"))[0].record
    assert len(record.next_topk_ids[0]) == 2
    assert len(record.token_ids) == 16
    card = (tmp_path / "run/README.md").read_text(encoding="utf-8")
    assert "windows of a long text 8 tokens apart" in card
    assert "| next_token_accuracy |" in card


def test_without_numbers_tensors_are_the_same_and_records_say_that_nothing_was_predicted(
    checkpoints: dict[str, Path], tmp_path: Path
):
    capture = {"sites": ("hidden", "attn", "resid"), "layers": ("0",)}
    for family, checkpoint in checkpoints.items():
        run(tmp_path / family / "whole", checkpoint, capture=capture, max_seq_len=24)
        found = run(tmp_path / family / "none", checkpoint, capture=capture | {"numbers": "none"}, max_seq_len=24)
        assert verify(tmp_path / family / "none").problems == []
        whole, store = (TraceStore(str(tmp_path / family / name)) for name in ("whole", "none"))
        assert store.keys == whole.keys
        for sample, other in zip(store, whole, strict=True):
            assert sample.record.token_ids == other.record.token_ids
            assert sample.record.tensors == other.record.tensors
            assert sample.record.loss is sample.record.perplexity is None
            lists = {
                name: getattr(sample.record, name)
                for name in sample.record.__struct_fields__
                if name.startswith("next_")
            }
            assert len(lists) == 11
            assert not any(lists.values())
            assert sample.record.num_scored == 0
            for name, tensor in sample.tensors().items():
                np.testing.assert_array_equal(tensor, other.tensors()[name])
        assert {*metrics(found)} == {"mean_tokens"}
        layout = Layout(tmp_path / family / "none", "next_token")
        again = replay_stored(layout, 2, model=str(checkpoint), adapter=None, device="cpu")
        assert (again.num_replayed, again.num_positions) == (2, 0)
        assert {"hidden_states", "attentions"} <= {error.site for error in again.sites}


def test_a_card_without_numbers_promises_none(model: Path, tmp_path: Path):
    arguments = ["--model", str(model), "--device", "cpu", "--source", "sample:go_emotions", "--limit", "3"]
    with pytest.raises(SystemExit) as ended:
        run_task(TASK, [*arguments, "--numbers", "none", "--layers", "0", "--out", str(tmp_path / "run")])
    assert ended.value.code == 0
    card = (tmp_path / "run/README.md").read_text(encoding="utf-8")
    assert "head was left out (`--numbers none`)" in card
    assert "next_token_accuracy |" not in card
    assert "what it expected next" not in card.split("---", 2)[2]
    assert "--numbers none" in card  # in the command


def test_a_replay_holds_every_number_against_the_model(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    run(tmp_path / "run", model)
    layout = Layout(tmp_path / "run", "next_token")
    right = replay_stored(layout, 2, model=str(model), adapter=None, device="cpu")
    assert right.num_agreeing == right.num_positions > 0
    assert {"token_logprobs", "token_entropies"} <= {error.site for error in right.sites}
    own = TraceStore.record

    def altered(self: TraceStore, key: str) -> Any:
        record: Any = own(self, key)
        return msgspec.structs.replace(record, next_true_logprob=[-99.0] * len(record.next_true_logprob))

    monkeypatch.setattr(TraceStore, "record", altered)
    with pytest.raises(CaptureError, match="token_logprobs differs"):
        replay_stored(layout, 2, model=str(model), adapter=None, device="cpu")
