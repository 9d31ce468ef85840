"""Pictures: prompts of the model's own processor, damaged answers and states against plain transformers, replays."""

import json
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

from builders.degradation.configs import DegradationConfig, get_config
from builders.degradation.damage import Damaged
from builders.degradation.task import TASK as DEGRADATION
from builders.degradation.weight_groups import find_group
from builders.kit.columns import PromptSource
from tests.tiny_checkpoint import save_tiny_checkpoint
from tests.tiny_vision import draw_picture, save_tiny_gemma3, save_tiny_llava
from tracekit import TraceStore, verify
from tracekit.config import CaptureConfig, DrawConfig, ModelConfig, OutputConfig, PromptConfig
from tracekit.errors import ConfigError, ModelError
from tracekit.format.layout import Layout
from tracekit.format.shards import sha256_file
from tracekit.model.models import load_processor, load_tokenizer
from tracekit.model.pictures import read_picture
from tracekit.model.prompts import Prompter
from tracekit.run.recheck import replay_stored
from tracekit.run.runner import execute

PROMPTS = ["What is in it?", "Describe the picture in as many words as you like, please."]
SAVED = {"llava": save_tiny_llava, "gemma3": save_tiny_gemma3}


@pytest.fixture(scope="module", params=SAVED)
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return SAVED[request.param](tmp_path_factory.mktemp("vision") / request.param)


@pytest.fixture(scope="module")
def picture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return draw_picture(tmp_path_factory.mktemp("picture") / "house.png")


def config_for(checkpoint: Path, picture: Path | None, prompts: Path, /, **changes: Any) -> DegradationConfig:
    return msgspec.structs.replace(
        DegradationConfig(
            model=ModelConfig(model=str(checkpoint), device="cpu"),
            source=PromptSource(source=str(prompts)),
            generation=DrawConfig(num_beams=1, max_new_tokens=5),
            capture=CaptureConfig(sites=("hidden_states", "resid_post_mlp", "queries"), num_replays=2),
            output=OutputConfig(),
            groups=("mlp",),
            levels=(0, 0.5),
            do_sample=False,
            image=None if picture is None else str(picture),
        ),
        **changes,
    )


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("prompts") / "prompts.jsonl"
    path.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in PROMPTS))
    return path


@pytest.fixture(scope="module")
def folder(checkpoint: Path, picture: Path, prompts: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("run") / "pictures"
    execute(DEGRADATION, config_for(checkpoint, picture, prompts), out)
    return out


def plain_inputs(checkpoint: Path, picture: Path, text: str) -> Any:
    """What the processor itself makes of picture and text."""
    processor = AutoProcessor.from_pretrained(checkpoint)
    parts = [{"type": "image"}, {"type": "text", "text": text}]
    if hasattr(processor, "boi_token"):
        rendered = processor.apply_chat_template(
            [{"role": "user", "content": parts}], tokenize=False, add_generation_prompt=True
        )
    else:
        rendered = f"<|user|><image>\n{text}</s><|assistant|>"
    return processor(text=rendered, images=[read_picture(str(picture))], add_special_tokens=False, return_tensors="pt")


def test_answers_and_states_are_those_of_a_plain_model_that_sees_the_picture(
    folder: Path, checkpoint: Path, picture: Path
):
    assert verify(folder).problems == []
    store = TraceStore(str(folder))
    assert len(store) == 4
    for sample in store:
        record = sample.record
        plain = AutoModelForImageTextToText.from_pretrained(checkpoint, attn_implementation="eager").eval()
        from tracekit.model.anatomy import examine

        group = find_group(plain, examine(plain, lambda model=plain: model(torch.tensor([[1, 2, 3]]))), "mlp")
        inputs = plain_inputs(checkpoint, picture, record.prompt_text)
        assert inputs["input_ids"][0].tolist() == record.token_ids[: record.prompt_length]
        further = {name: value for name, value in inputs.items() if name in ("pixel_values", "token_type_ids")}
        with Damaged(group) as damaged, torch.no_grad():
            damaged.apply("mult_gauss", level=record.damage.level, seed=record.damage.seed)
            ids = plain.generate(**inputs, max_new_tokens=5, do_sample=False, pad_token_id=2)
            assert ids[0].tolist() == record.token_ids
            if "token_type_ids" in further:
                answered = torch.zeros(1, ids.shape[1] - record.prompt_length, dtype=torch.long)
                further["token_type_ids"] = torch.cat([further["token_type_ids"], answered], 1)
            output = plain(input_ids=ids, output_hidden_states=True, **further)
            blind = plain(input_ids=ids, output_hidden_states=True)
        hidden = torch.stack(output.hidden_states)[:, 0].numpy()
        np.testing.assert_allclose(sample.hidden_states(), hidden, atol=2e-3, rtol=1e-3)
        assert np.abs(hidden - torch.stack(blind.hidden_states)[:, 0].numpy()).max() > 0.1, "the picture does nothing"
        assert record.image_sha256 == sha256_file(picture)


def test_every_position_of_the_picture_is_a_token_of_the_record(folder: Path, checkpoint: Path):
    tokenizer = load_tokenizer(ModelConfig(model=str(checkpoint)))
    for sample in TraceStore(str(folder)):
        record = sample.record
        marks = [
            i
            for i, token in enumerate(record.tokens)
            if "image" in token and "start" not in token and "end" not in token
        ]
        assert len(marks) == 4
        assert tokenizer.decode(record.token_ids[: record.prompt_length]) == record.prompt
        for token, (start, stop) in zip(record.token_ids, record.token_offsets, strict=True):
            if start < len(record.prompt):
                assert tokenizer.decode([token]).strip() in record.prompt[start:stop] + " "
        user = next(span for span in record.spans if span.name == "user")
        assert user.start > marks[-1]


def test_a_replay_needs_the_picture_and_knows_another_one(
    folder: Path, checkpoint: Path, picture: Path, tmp_path: Path
):
    layout = Layout(folder, "degradation")
    done = replay_stored(layout, 3, model=str(checkpoint), adapter=None, device="cpu", files={"--image": str(picture)})
    assert done.num_replayed == 3
    with pytest.raises(ModelError, match=r"made with the picture house\.png@sha256:.*is not given; .*--image PATH"):
        replay_stored(layout, 1, model=str(checkpoint), adapter=None, device="cpu")
    other = tmp_path / "other.png"
    other.write_bytes(picture.read_bytes() + b" ")
    with pytest.raises(ModelError, match="is another one"):
        replay_stored(layout, 1, model=str(checkpoint), adapter=None, device="cpu", files={"--image": str(other)})


def test_the_same_answers_come_of_any_batch(
    folder: Path, checkpoint: Path, picture: Path, prompts: Path, tmp_path: Path
):
    config = config_for(checkpoint, picture, prompts, max_batch_size=1)
    execute(DEGRADATION, config, tmp_path / "run")
    alone, together = TraceStore(str(tmp_path / "run")), TraceStore(str(folder))
    for key in together.keys:
        assert alone.record(key).token_ids == together.record(key).token_ids


def test_attention_with_a_picture_is_kept_whole(checkpoint: Path, picture: Path, prompts: Path, tmp_path: Path):
    config = config_for(checkpoint, picture, prompts, capture=CaptureConfig(sites=("attentions",)), levels=(0,))
    execute(DEGRADATION, config, tmp_path / "run")
    assert verify(tmp_path / "run").problems == []
    plain = AutoModelForImageTextToText.from_pretrained(checkpoint, attn_implementation="eager").eval()
    for sample in TraceStore(str(tmp_path / "run")):
        inputs = plain_inputs(checkpoint, picture, sample.record.prompt_text)
        with torch.no_grad():
            wanted = plain(**inputs, output_attentions=True).attentions[0][0].numpy()
        length = sample.record.prompt_length
        kept = sample.attention(layer=0)
        assert kept.shape[-1] == len(sample.record.token_ids)
        np.testing.assert_allclose(kept[:, :length, :length], wanted, atol=1e-4)


def test_a_template_with_a_clock_sees_the_date_of_the_run(checkpoint: Path, tmp_path: Path):
    config = ModelConfig(model=str(checkpoint))
    processor, tokenizer = load_processor(config), load_tokenizer(config)
    template = tmp_path / "clock.jinja"
    template.write_text(str(tokenizer.chat_template) + "{{ strftime_now('%Y-%m-%d') }}")
    prompter = Prompter(
        tokenizer, PromptConfig(chat_template=str(template), template_date="2001-02-03"), default_system=""
    )
    assert prompter.render_with_picture(processor, "What is it?").endswith("2001-02-03")


def test_the_limit_rises_with_a_picture(picture: Path):
    config = get_config("cookie_theft_it")
    assert config.sequence_limit == 512
    assert msgspec.structs.replace(config, image=str(picture)).sequence_limit == 1024
    assert msgspec.structs.replace(config, image=str(picture), max_seq_len=700).sequence_limit == 700
    assert config.source.source == "picture"


def test_a_model_without_eyes_is_named(picture: Path, prompts: Path, tmp_path: Path):
    blind = save_tiny_checkpoint(tmp_path / "blind", chat=True)
    with pytest.raises(ModelError, match=r"takes no pictures|processor"):
        execute(DEGRADATION, config_for(blind, picture, prompts), tmp_path / "run")


def test_a_file_that_is_no_picture_is_named(checkpoint: Path, prompts: Path, tmp_path: Path):
    text = tmp_path / "text.png"
    text.write_text("no picture")
    with pytest.raises(ConfigError, match=r"text\.png' - at `\$\.image`; cannot be read"):
        execute(DEGRADATION, config_for(checkpoint, text, prompts), tmp_path / "run")
    with pytest.raises(ConfigError, match=r"nowhere\.png"):
        execute(DEGRADATION, config_for(checkpoint, tmp_path / "nowhere.png", prompts), tmp_path / "run")


def test_a_real_picture_is_taken(checkpoint: Path, shared: Path, prompts: Path, tmp_path: Path):
    (path,) = (shared / "data/pictures").glob("*.png")
    config = config_for(checkpoint, path, prompts, levels=(0,))
    outcome = execute(DEGRADATION, config, tmp_path / "run")
    assert outcome.manifest is not None
    assert TraceStore(str(tmp_path / "run"))[0].record.image_sha256 == sha256_file(path)
    processor = load_processor(ModelConfig(model=str(checkpoint)))
    assert processor.image_processor is not None
