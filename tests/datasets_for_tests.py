"""Small dataset folders of random numbers, written through the library's own writer, and what reading must give back.

made = make_sample("000000", num_tokens=9, prompt_length=5)
write_dataset(tmp_path, {"train-00000": [made]})
made.expected["hidden_states"]          # what TraceStore has to hand back, whole

made = make_choices("000000", lengths=(3, 2, 4))
write_dataset(tmp_path, {"train-00000": [made]}, config="csqa_mcq")
made.expected["hidden_states"][1]       # of the second choice
"""

import hashlib
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import msgspec
import numpy as np

from builders.csqa_mcq.record import CsqaMcqRecord
from builders.kit.choices import Choice
from builders.trivia_qa.record import TriviaQARecord
from tests.tasks_for_tests import TASKS
from tracekit.format.layout import Layout, write_atomic
from tracekit.format.manifest import (
    Manifest,
    Plan,
    ShardInfo,
    ShardTask,
    Sidecar,
    SiteError,
    SourceInfo,
    SplitInfo,
    TensorSummary,
    Verification,
    to_bytes,
)
from tracekit.format.shards import ShardWriter
from tracekit.read.tables import write_records_table
from tracekit.records import SCHEMA_VERSION, GenerationSettings, ModelInfo, Record, RecordSchema, Span, encode_record
from tracekit.sites import SITES
from tracekit.tensors import DTYPES, TensorSpec, encode, positions_of

NUM_LAYERS, NUM_HEADS, NUM_KV_HEADS, HEAD_SIZE, D_MODEL, TOP_K = 3, 4, 2, 3, 8, 2
MODEL = ModelInfo(
    id="test/model",
    revision="sha256:0",
    variant="chat",
    adapter=None,
    quantization=None,
    dtype="float32",
    attention="eager",
)
SITE_ERROR = SiteError(site="hidden_states", max_abs_error=0.5, max_rel_error=0.25, min_cosine=0.75, tolerance=1.0)
VERIFICATION = Verification(num_replayed=1, num_positions=3, num_agreeing=2, sites=[SITE_ERROR])


class Made(NamedTuple):
    """A sample that was made up."""

    record: TriviaQARecord
    """Its record."""
    stored: dict[str, np.ndarray]
    """Tensors as they go into the shard."""
    expected: dict[str, np.ndarray]
    """The same as a reader hands them back: attention as (L, H, T_query, T)."""


def make_sample(
    key: str,
    *,
    sites: Sequence[str] = ("hidden_states", "attentions"),
    num_tokens: int = 9,
    prompt_length: int = 5,
    has_answer: bool = True,
    kept: Sequence[Sequence[int]] | None = None,
    layers: Sequence[int] | None = None,
    dtype: str = "float32",
    layout: str = "causal",
    heads_by_layer: Mapping[str, Sequence[int]] | None = None,
    question_id: str | None = None,
    split: str = "train",
    model: ModelInfo = MODEL,
) -> Made:
    """A sample with random tensors, the same for the same key.

    `kept` are position ranges, `layers` the layers of each site; sites in `heads_by_layer` get one tensor a layer.
    """
    rng = np.random.default_rng(int(hashlib.sha256(key.encode()).hexdigest()[:8], 16))
    ranges = [list(one) for one in ([[0, num_tokens]] if kept is None else kept)]
    positions = positions_of(ranges)
    stored: dict[str, np.ndarray] = {}
    expected: dict[str, np.ndarray] = {}
    specs: list[TensorSpec] = []
    for site in sites:
        for name, numbers, num_heads in _tensors_of(site, layers, heads_by_layer or {}):
            array = _random(rng, site, len(numbers), num_heads, num_tokens, dtype)
            axes, form = list(SITES[site].axes), "dense"
            if site == "attentions":
                array = array[:, :, positions]
                form = layout
                if form == "causal":
                    array = np.tril(np.ones((num_tokens, num_tokens)))[positions].astype(array.dtype) * array
            else:
                array = array.take(positions, axis=axes.index("T"))
            expected[name] = array
            if form == "causal":
                axes = ["L", "H", "S"]
                flat = array.reshape(*array.shape[:2], -1)
                local = np.concatenate(
                    [i * num_tokens + np.arange(p + 1) for i, p in enumerate(positions)] or [np.arange(0)]
                )
                array = flat[..., local]
            stored[name] = array
            num_keys = num_tokens if site == "attentions" else 0
            specs.append(_spec(name, array, axes, numbers, [r for r in ranges if r[1] > r[0]], form, num_keys))
    record = make_record(
        key,
        specs,
        num_tokens=num_tokens,
        prompt_length=prompt_length,
        has_answer=has_answer,
        question_id=question_id or f"q{key}",
        split=split,
        model=model,
    )
    return Made(record, stored, expected)


class MadeChoices(NamedTuple):
    """A sample of several choices that was made up."""

    record: CsqaMcqRecord
    """Its record."""
    stored: dict[str, np.ndarray]
    """Tensors as they go into the shard: the choices one after the other."""
    expected: dict[str, list[np.ndarray]]
    """By site, what a reader hands back of each choice: attention as (L, H, T_c, T_c)."""


CHOICE_SITES = tuple(site for site in SITES if not site.startswith("topk"))
"""What an encoder can give."""


def make_choices(
    key: str,
    *,
    lengths: Sequence[int] = (3, 2, 4),
    sites: Sequence[str] = CHOICE_SITES,
    dtype: str = "float32",
    split: str = "train",
) -> MadeChoices:
    """A sample of choices of these lengths with random tensors, the same for the same key."""
    rng = np.random.default_rng(int(hashlib.sha256(key.encode()).hexdigest()[:8], 16))
    offsets = [sum(lengths[:i]) for i in range(len(lengths) + 1)]
    stored: dict[str, np.ndarray] = {}
    expected: dict[str, list[np.ndarray]] = {}
    specs: list[TensorSpec] = []
    for site in sites:
        ((name, layers, num_heads),) = _tensors_of(site, None, {})
        arrays = [_random(rng, site, len(layers), num_heads, length, dtype) for length in lengths]
        axes, layout = list(SITES[site].axes), "dense"
        if site == "attentions":
            axes, layout = ["L", "H", "S"], "full"
            flat = [array.reshape(len(layers), num_heads, -1) for array in arrays]
            stored[name] = np.concatenate(flat, axis=-1)
        else:
            stored[name] = np.concatenate(arrays, axis=axes.index("T"))
        expected[name] = arrays
        spec = _spec(name, stored[name], axes, layers, [[0, offsets[-1]]], layout, 0)
        specs.append(msgspec.structs.replace(spec, choice_offsets=offsets))
    base = make_record(
        key,
        specs,
        num_tokens=offsets[-1],
        prompt_length=offsets[-1],
        has_answer=False,
        question_id=f"q{key}",
        split=split,
        model=MODEL,
    )
    shared = {name: getattr(base, name) for name in Record.__struct_fields__}
    num_choices = len(lengths)
    record = CsqaMcqRecord(
        **{**shared, "config": "csqa_mcq", "eos_included": False, "spans": choice_spans(offsets)},
        question=base.question,
        concept=None,
        choices=[Choice(label="ABCDE"[i], text=f"option {i}") for i in range(num_choices)],
        label_idx=0,
        gold_label="A",
        pred_idx=0,
        pred_label="A",
        is_correct=True,
        entropy=0.5,
        margin=0.25,
        num_layers=NUM_LAYERS,
        num_truncated=0,
        choice_offsets=offsets,
        choice_logits=[0.5] * num_choices,
        choice_probs=[1 / num_choices] * num_choices,
        is_head_fresh=False,
        token_type_ids=None,
    )
    return MadeChoices(record, stored, expected)


def choice_spans(offsets: Sequence[int]) -> list[Span]:
    """Spans of choices that lie at these offsets."""
    return [Span(name=f"choice_{i}", start=a, stop=b) for i, (a, b) in enumerate(pairwise(offsets))]


def make_record(
    key: str,
    specs: list[TensorSpec],
    *,
    num_tokens: int,
    prompt_length: int,
    has_answer: bool,
    question_id: str,
    split: str,
    model: ModelInfo,
) -> TriviaQARecord:
    """A record; the last token is end-of-sequence, so an answer needs two generated tokens."""
    prompt, question = f"<user>{key}<assistant>", f"What is {key}?"
    ids = list(range(num_tokens))
    generated = ids[prompt_length:]
    return TriviaQARecord(
        schema_version=SCHEMA_VERSION,
        key=key,
        example_id=f"e{key}",
        question_id=question_id,
        sample_index=0,
        config="trivia_qa",
        split=split,
        model=model,
        prompt=prompt,
        prompt_sha256=hashlib.sha256(prompt.encode()).hexdigest(),
        input_sha256=hashlib.sha256(question.encode()).hexdigest(),
        template_sha256=None,
        token_ids=ids,
        tokens=[f"t{i}" for i in ids],
        token_offsets=[[i, i + 1] for i in ids],
        prompt_length=prompt_length,
        spans=[Span(name="user", start=0, stop=prompt_length)],
        last_prompt_index=prompt_length - 1,
        first_answer_index=prompt_length if has_answer else None,
        last_answer_index=num_tokens - 2 if has_answer else None,
        eos_included=True,
        tensors=specs,
        generation=GenerationSettings(
            do_sample=False, num_beams=1, max_new_tokens=8, temperature=1.0, top_p=1.0, top_k=0
        ),
        seed=41,
        question=question,
        generated_text=prompt,
        generated_answer="",
        generated_token_ids=generated,
        num_layers=NUM_LAYERS,
        ground_truth_answers=["a"],
        global_example_id=0,
        shard=0,
        index_in_shard=0,
        token_logprobs=[-0.5] * len(generated),
        token_entropies=[0.5] * len(generated),
        finish_reason="stop",
        is_truncated=False,
        beam_score=None,
        matched_alias=None,
        matched_alias_span=None,
        is_correct=False,
        correctness_rule="exact_match",
        exact_match=False,
        f1=0.0,
        samples=[],
    )


def write_dataset(
    root: Path,
    shards: Mapping[str, Sequence[Made] | Sequence[MadeChoices]],
    *,
    config: str = "trivia_qa",
    planned: Sequence[str] = (),
    is_finished: bool = True,
) -> Layout:
    """Write a dataset folder: shards by name, each with its samples in tar order.

    `planned` are shards of the plan that were not made; a dataset that is not finished has no manifest and no tables.
    """
    layout = Layout(root, config)
    made = [sample for samples in shards.values() for sample in samples]
    model = made[0].record.model if made else MODEL
    task = made[0].record.task_name() if made else "trivia_qa"
    names = [*shards, *planned]
    plan = Plan(
        schema_version=SCHEMA_VERSION,
        config=config,
        task=task,
        run={},
        model=model,
        source=_source(len(made)),
        batch_size=2,
        device_type="cpu",
        num_threads=1,
        versions={},
        shards=[ShardTask(name=name, number=int(name[-5:]), batches=[]) for name in names],
        about=TASKS[task].about,
    )
    write_atomic(layout.plan, to_bytes(plan))
    schema = RecordSchema.of(type(made[0].record) if made else TriviaQARecord)
    write_atomic(layout.schema, schema.to_bytes())
    sidecars = {name: write_shard(layout, name, samples) for name, samples in shards.items()}
    if is_finished:
        _finish(layout, plan, schema, sidecars, made)
    return layout


def write_shard(layout: Layout, name: str, samples: Sequence[Made] | Sequence[MadeChoices]) -> Sidecar:
    """Write one shard and its sidecar."""
    layout.sidecar(name).parent.mkdir(parents=True, exist_ok=True)
    with ShardWriter(layout, name, int(name[-5:])) as writer:
        for made in samples:
            writer.append([(made.record.key, encode_record(made.record), encode(made.stored))], VERIFICATION)
        return writer.finish()


def _finish(
    layout: Layout,
    plan: Plan,
    schema: RecordSchema,
    sidecars: Mapping[str, Sidecar],
    made: Sequence[Made | MadeChoices],
) -> None:
    """Tables and manifest, as a finished run has them."""
    by_split: dict[str, list[Sidecar]] = {}
    for name, sidecar in sidecars.items():
        by_split.setdefault(name[:-6], []).append(sidecar)
    for split, of_split in by_split.items():
        write_records_table(layout.records_table(split), schema, of_split)
    summaries = {
        spec.name: TensorSummary(name=spec.name, dtype=spec.dtype, axes=spec.axes, layout=spec.layout, num_bytes=1)
        for sample in made
        for spec in sample.record.tensors
    }
    manifest = Manifest(
        schema_version=SCHEMA_VERSION,
        config=layout.config,
        task=plan.task,
        model=plan.model,
        source=plan.source,
        run={},
        device_type="cpu",
        versions={},
        splits=[
            SplitInfo(
                name=split,
                num_samples=sum(len(one.samples) for one in of_split),
                num_bytes=sum(one.num_bytes for one in of_split),
            )
            for split, of_split in by_split.items()
        ],
        shards=[_shard_info(split, one) for split, of_split in by_split.items() for one in of_split],
        files=[],
        tensors=list(summaries.values()),
        metrics=[],
        invariants=[],
        verification=VERIFICATION,
    )
    write_atomic(layout.manifest, to_bytes(manifest))


def _shard_info(split: str, sidecar: Sidecar) -> ShardInfo:
    keys = sorted(sample.key for sample in sidecar.samples)
    return ShardInfo(
        name=sidecar.name,
        number=sidecar.number,
        split=split,
        num_samples=len(keys),
        num_bytes=sidecar.num_bytes,
        sha256=sidecar.sha256,
        first_key=keys[0],
        last_key=keys[-1],
    )


def _source(num_rows: int) -> SourceInfo:
    return SourceInfo(
        id="test.jsonl",
        revision="sha256:0",
        subset=None,
        split="train",
        num_rows=num_rows,
        num_used=num_rows,
        skipped=[],
    )


def _tensors_of(
    site: str, layers: Sequence[int] | None, heads_by_layer: Mapping[str, Sequence[int]]
) -> list[tuple[str, list[int], int]]:
    """Name, layers and number of heads of each tensor of a site."""
    num_heads = NUM_KV_HEADS if "K" in SITES[site].axes else NUM_HEADS
    if "L" not in SITES[site].axes:
        return [(site, [], num_heads)]
    every = list(range(NUM_LAYERS + (site == "hidden_states")))
    chosen = every if layers is None else list(layers)
    if site in heads_by_layer:
        return [(f"{site}.{layer}", [layer], heads_by_layer[site][layer]) for layer in chosen]
    return [(site, chosen, num_heads)]


def _random(
    rng: np.random.Generator, site: str, num_layers: int, num_heads: int, num_tokens: int, dtype: str
) -> np.ndarray:
    """Random values of a site, over all tokens."""
    sizes = {"L": num_layers, "H": num_heads, "K": num_heads, "T": num_tokens, "E": HEAD_SIZE, "D": D_MODEL, "k": TOP_K}
    shape = [sizes[letter] for letter in SITES[site].axes]
    if site == "topk_ids":
        return rng.integers(0, 100, shape)
    return (rng.random(shape, dtype=np.float32) + 0.01).astype(DTYPES[dtype])


def _spec(
    name: str,
    array: np.ndarray,
    axes: list[str],
    layers: list[int],
    positions: list[list[int]],
    layout: str,
    num_keys: int,
) -> TensorSpec:
    return TensorSpec(
        name=name,
        dtype=str(array.dtype),
        shape=list(array.shape),
        axes=axes,
        layers=layers,
        positions=positions,
        layout=layout,
        num_keys=num_keys,
        choice_offsets=[],
    )
