"""The multiple-choice builder: from question to verified dataset on a tiny encoder, and what it refuses."""

import json
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.normalizers import Lowercase
from tokenizers.pre_tokenizers import BertPreTokenizer
from tokenizers.processors import TemplateProcessing
from transformers import (
    AutoModelForMultipleChoice,
    BertConfig,
    BertForSequenceClassification,
    BertModel,
    PreTrainedTokenizerFast,
)

from builders.csqa_mcq.record import CsqaMcqRecord
from builders.csqa_mcq.task import TASK, CsqaMcqConfig
from builders.kit.columns import ChoiceSource
from builders.kit.csqa_questions import SAMPLE
from tests.runs_for_tests import hashes
from tracekit import TraceStore, verify
from tracekit.config import ModelConfig, OutputConfig, SiteConfig
from tracekit.errors import ConfigError, ModelError
from tracekit.format.layout import Layout
from tracekit.run.recheck import replay_stored
from tracekit.run.runner import Ended, execute

SITES = ("hidden", "attn", "qkv", "resid")


def tokenizer_for(texts: list[str]) -> PreTrainedTokenizerFast:
    words = sorted(
        {word for text in texts for word in BertPreTokenizer().pre_tokenize_str(text.lower()) for word in word[:1]}
    )
    vocab = {word: number for number, word in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", *words])}
    raw = Tokenizer(WordLevel(vocab, unk_token="[UNK]"))
    raw.normalizer, raw.pre_tokenizer = Lowercase(), BertPreTokenizer()
    raw.post_processor = TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=raw,
        unk_token="[UNK]",
        pad_token="[PAD]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
    )


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny encoder without a multiple-choice head."""
    texts = SAMPLE.read_text("utf-8").splitlines()
    tokenizer = tokenizer_for(texts)
    torch.manual_seed(0)
    model = BertModel(
        BertConfig(
            vocab_size=len(tokenizer),
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            intermediate_size=37,
            max_position_embeddings=64,
            initializer_range=0.2,
        )
    )
    folder = tmp_path_factory.mktemp("encoder") / "tiny"
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def finetuned(encoder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with a head; weights alone, as a checkpoint may come."""
    torch.manual_seed(1)
    folder = tmp_path_factory.mktemp("finetuned") / "tuned"
    AutoModelForMultipleChoice.from_pretrained(encoder).save_pretrained(folder)
    return folder


def run(out: Path, encoder: Path, /, **sections: Any) -> Ended:
    parts: dict[str, Any] = {
        "model": ModelConfig(model=str(encoder), device="cpu"),
        "source": ChoiceSource(source="sample", limit=6),
        "capture": SiteConfig(sites=SITES, num_replays=1),
        "output": OutputConfig(samples_per_shard=4, batch_size=2),
    }
    own = {name: value for name, value in sections.items() if name not in parts}
    changed = {name: msgspec.structs.replace(part, **sections.get(name, {})) for name, part in parts.items()}
    return execute(TASK, CsqaMcqConfig(**changed, **own), out)


@pytest.fixture(scope="module")
def folder(encoder: Path, finetuned: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("mcq") / "run"
    run(out, encoder, model={"model_path": str(finetuned)})
    return out


def test_a_run_is_verified_read_and_replayed(folder: Path, finetuned: Path, encoder: Path):
    assert verify(folder).problems == []
    with TraceStore(folder) as store:
        assert len(store) == 6
        for sample in store:
            record = sample.record
            assert isinstance(record, CsqaMcqRecord)
            assert record.choice_offsets[-1] == len(record.token_ids) == len(record.token_offsets)
            assert not record.is_head_fresh
            assert record.model.id == "tuned"
            for number in range(len(record.choices)):
                length = record.choice_offsets[number + 1] - record.choice_offsets[number]
                assert sample.hidden_states(choice=number).shape == (3, length, 32)
                assert sample.attention(layer=1, head=2, choice=number).shape == (length, length)
    result = replay_stored(
        Layout(folder, "csqa_mcq"), 2, model=str(encoder), adapter=None, device="cpu", model_path=str(finetuned)
    )
    assert result.num_replayed == result.num_agreeing == 2


@pytest.mark.parametrize("dtype", ["int8", "float8"])
def test_options_in_few_bits_are_read_one_by_one(
    folder: Path, encoder: Path, finetuned: Path, tmp_path: Path, dtype: str
):
    run(tmp_path / "few", encoder, model={"model_path": str(finetuned)}, capture={"store_dtype": dtype})
    assert verify(tmp_path / "few").problems == []
    with TraceStore(folder) as whole, TraceStore(tmp_path / "few") as few:
        for key in whole.keys:
            joined = few.hidden_states(key, layer=1)
            parts = [few.hidden_states(key, layer=1, choice=number) for number in range(5)]
            np.testing.assert_array_equal(np.concatenate(parts), joined)
            np.testing.assert_array_equal(few.hidden_states(key, choice=3)[1], parts[3])
            before = whole.hidden_states(key, layer=1)
            errors = np.linalg.norm(joined - before, axis=-1) / np.linalg.norm(before, axis=-1)
            assert 0 < errors.max() < {"int8": 0.02, "float8": 0.05}[dtype]
            query = few.qkv(key, "q", layer=0, choice=2)
            np.testing.assert_allclose(query, whole.qkv(key, "q", layer=0, choice=2), atol=0.1)
    layout = Layout(tmp_path / "few", "csqa_mcq")
    result = replay_stored(layout, 2, model=str(encoder), adapter=None, device="cpu", model_path=str(finetuned))
    assert result.num_replayed == result.num_agreeing == 2


def test_numbers_are_those_of_plain_transformers(folder: Path, finetuned: Path, encoder: Path):
    from transformers import AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(encoder)
    model = AutoModelForMultipleChoice.from_pretrained(finetuned, attn_implementation="eager").eval()
    rows = [json.loads(line) for line in SAMPLE.read_text("utf-8").splitlines()]
    with TraceStore(folder) as store:
        for row, sample in zip(rows, store, strict=False):
            record: Any = sample.record
            options = [choice["text"] for choice in row["question"]["choices"]]
            stem = row["question"]["stem"]
            inputs = tokenizer([stem] * len(options), options, padding=True, return_tensors="pt")
            with torch.inference_mode():
                output = model(**{name: value[None] for name, value in inputs.items()}, output_hidden_states=True)
            logits = output.logits[0]
            assert np.allclose(record.choice_logits, logits.numpy(), atol=1e-5)
            assert np.allclose(record.choice_probs, logits.double().softmax(-1).numpy(), atol=1e-6)
            assert record.pred_idx == int(logits.argmax())
            assert record.gold_label == row["answerKey"]
            assert record.is_correct == (record.pred_label == row["answerKey"])
            for number, mask in enumerate(inputs["attention_mask"]):
                length = int(mask.sum())
                mine = sample.hidden_states(choice=number)
                theirs = torch.stack([layer[number, :length] for layer in output.hidden_states]).numpy()
                assert np.allclose(mine, theirs, atol=2e-5)


def test_offsets_are_characters_of_the_prompt(folder: Path):
    with TraceStore(folder) as store:
        for sample in store:
            record: Any = sample.record
            for token, (start, stop) in zip(record.tokens, record.token_offsets, strict=True):
                if stop > start:
                    assert record.prompt[start:stop].lower() == token
            assert len(record.prompt.split("\n")) == len(record.choices)


def test_a_fresh_head_is_said_loudly(encoder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    outcome = run(tmp_path / "fresh", encoder)
    assert "WARNING: tiny has no multiple-choice head" in capsys.readouterr().err
    with TraceStore(tmp_path / "fresh") as store:
        assert all(sample.record.is_head_fresh for sample in store)  # pyright: ignore[reportAttributeAccessIssue]
    assert outcome.manifest is not None
    assert {metric.name: metric.value for metric in outcome.manifest.metrics}["fresh_head_share"] == 1
    assert "drawn at random" in (tmp_path / "fresh/README.md").read_text()


def test_the_same_again_gives_the_same_bytes(encoder: Path, tmp_path: Path):
    run(tmp_path / "a", encoder)
    run(tmp_path / "b", encoder)
    assert hashes(tmp_path / "a") == hashes(tmp_path / "b")


def test_an_unlabelled_question_is_neither_right_nor_wrong(encoder: Path, tmp_path: Path):
    rows = [json.loads(line) for line in SAMPLE.read_text("utf-8").splitlines()[:3]]
    rows[1]["answerKey"] = ""
    source = tmp_path / "rows.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    outcome = run(tmp_path / "run", encoder, source={"source": str(source), "limit": None})
    with TraceStore(tmp_path / "run") as store:
        record: Any = store["000001"].record
        assert (record.label_idx, record.gold_label, record.is_correct) == (None, None, None)
    assert outcome.manifest is not None
    assert outcome.manifest.figures.num_right + outcome.manifest.figures.num_wrong == 2


def test_what_is_cut_is_counted_and_never_the_option(encoder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    run(tmp_path / "run", encoder, max_seq_len=12)
    assert "exceed --max-seq-len 12" in capsys.readouterr().err
    with TraceStore(tmp_path / "run") as store:
        for sample in store:
            record: Any = sample.record
            assert max(np.diff(record.choice_offsets)) <= 12
            for choice, line in zip(record.choices, record.prompt.split("\n"), strict=True):
                assert line.endswith(choice.text)
        assert sum(sample.record.num_truncated for sample in store) > 0  # pyright: ignore[reportAttributeAccessIssue]


def test_what_is_refused(encoder: Path, finetuned: Path, tmp_path: Path):
    with pytest.raises(ConfigError, match="leaves no room"):
        run(tmp_path / "x", encoder, max_seq_len=4)
    ranked = tmp_path / "ranked"
    BertForSequenceClassification.from_pretrained(encoder, num_labels=1).save_pretrained(ranked)
    with pytest.raises(ModelError, match="is a checkpoint of BertForSequenceClassification"):
        run(tmp_path / "z", encoder, model={"model_path": str(ranked)})
    other = tmp_path / "other"
    BertModel(BertConfig(vocab_size=40, hidden_size=16, num_hidden_layers=1, num_attention_heads=2)).save_pretrained(
        other
    )
    with pytest.raises(ModelError, match="is no checkpoint of --model"):
        run(tmp_path / "y", encoder, model={"model_path": str(other)})
