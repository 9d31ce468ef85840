"""Capture beside SAELens, nnsight and TransformerLens: the same model, windows of 128 tokens, float32, CPU threads.

    make bench-peers      an environment of their own, .venv-peers, with tracekit in it; all run in one process, in turn

    layer 15, on disk     tracekit's next_token into a shard (records, log-probabilities, entropies and hashes with it);
                          SAELens' CacheActivationsRunner into a folder of `datasets`; by hand into files of torch.save
    layer 29, on disk     the same of a late layer: SAELens and `--numbers none` stop the model after that layer
    all layers            tracekit's capture; an nnsight trace; TransformerLens' run_with_cache; `output_hidden_states`
    all layers, on disk   tracekit's next_token into a shard; what nnsight and by hand gave, by torch.save

tracekit is measured twice: as it is, with the head over all tokens, and with `--numbers none`, without the head. The
others run the whole model with its head over all tokens, but SAELens, in batches of 8; models are loaded before. Before
anything is timed, what each of them captured is held against tracekit's.
"""

import io
import logging
import shutil
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import redirect_stderr
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeAlias

import msgspec
import numpy as np
import torch
import transformers

from benchmarks.measure import (
    QUICK,
    Ratio,
    Round,
    compare,
    interleave,
    parse_arguments,
    ratio_table,
    say,
    store_results,
    table,
)
from benchmarks.next_token import BATCH_SIZE, Batch, batches_of, config_of
from builders.kit.columns import TextSource
from builders.next_token.config import NextTokenConfig
from builders.next_token.tracer import NextTokenTracer
from tracekit.config import CaptureConfig, ReadingConfig
from tracekit.errors import ModelError
from tracekit.format.layout import Layout
from tracekit.format.shards import ShardWriter, iter_samples
from tracekit.model.capture import Text, capture
from tracekit.model.demo import demo_model_folder
from tracekit.model.models import load_model, load_tokenizer, model_info
from tracekit.model.traced import TracedModel
from tracekit.records import encode_record
from tracekit.task import Place
from tracekit.tensors import decode, encode

TEXT = Path(__file__).parent.parent / "builders" / "wiki_qa" / "wiki_articles.jsonl"
ENVIRONMENT = Path(__file__).parent.parent / ".venv-peers"
LAYERS = (15, 29)
"""Hidden states that are kept alone: what blocks 14 and 28 put out; 30, the last, is after the final norm."""
NUM_TOKENS = 128
_NUM_BATCHES = 2
_ROUNDS: Any = {"num_rounds": 4, "max_seconds": 50}
_TOLERANCE = 1e-4
"""Largest difference to tracekit's values, divided by the largest of them: float32, another order of the same sums."""
_SAE_LENS, _NNSIGHT, _TRANSFORMER_LENS, _BY_HAND = "SAELens", "nnsight", "TransformerLens", "by hand"
Numbers: TypeAlias = Literal["all", "none"]
_OURS: Mapping[str, Numbers] = {"tracekit": "all", "tracekit --numbers none": "none"}
"""tracekit's own variants, and which numbers each keeps."""
NOTES = {
    "SAELens": "CacheActivationsRunner with model_class_name AutoModelForCausalLM, not shuffled. TransformerLens 3.9.0 "
    "does not list SmolLM2, so HookedTransformer does not load it. It keeps one layer a run, so it is not among all "
    "layers; it stops the model after that layer: of 30 blocks 15 and no head for layer 15, 29 and no head for layer "
    "29. tracekit needs the whole model, for the log-probabilities in its records; with --numbers none it stops where "
    "SAELens does.",
    "nnsight": "TransformersModel from the local folder, everything saved in one trace, inference_mode.",
    "TransformerLens": "TransformerBridge 3.9.0 from the local folder, run_with_cache of the 31 places alone, weights "
    "as they are; 4.3.0 is not measured: sae-lens 6.54.12 takes none from 4 on.",
    "by hand": "AutoModelForCausalLM with output_hidden_states=True, inference_mode.",
    "tracekit": "also writes records with every token's log-probability and entropy, a SHA-256 and a byte index, "
    "syncs every batch to the disk, and checks that every value is finite.",
    "tracekit --numbers none": "the same without log-probabilities and entropies: the head does not run, and the model "
    "stops after the last layer that is kept.",
}

Hidden = Sequence[torch.Tensor]
"""31 hidden states (B, T, D)."""


class Peers(NamedTuple):
    """Everything loaded, over the same batches."""

    traced: TracedModel
    config: NextTokenConfig
    plain: Any
    """The model by hand."""
    nnsight: Any
    bridge: Any
    """TransformerLens'."""
    runners: dict[int, Any]
    """SAELens', by layer."""
    batches: list[Batch]
    ids: list[torch.Tensor]
    """Their tokens (B, T)."""


def keep(peers: Peers, layers: tuple[str, ...], numbers: Numbers, folder: Path) -> Layout:
    """tracekit: hidden states of these layers, traced and written as next_token does it."""
    capture_config = ReadingConfig(sites=("hidden_states",), layers=layers, numbers=numbers)
    config = msgspec.structs.replace(peers.config, capture=capture_config)
    task, layout = NextTokenTracer(config, peers.traced.tokenizer, []), Layout(folder, "next_token")
    layout.sidecar("-").parent.mkdir(parents=True, exist_ok=True)
    with ShardWriter(layout, "train-00000", 0) as writer:
        for batch in peers.batches:
            samples = task.trace(peers.traced, batch, Place("next_token", 0, 0))
            writer.append([(one.record.key, encode_record(one.record), encode(one.trace.tensors)) for one in samples])
        writer.finish()
    return layout


def capture_all(peers: Peers, ids: torch.Tensor, numbers: Numbers = "all") -> list[np.ndarray]:
    """tracekit: every hidden state (L+1, T, D) of each window, with or without next-token numbers, in memory."""
    texts = [Text(row, len(row), scored_from=1) for row in ids.tolist()]
    traces = capture(peers.traced, texts, CaptureConfig(sites=("hidden_states",), numbers=numbers))
    return [trace.tensors["hidden_states"] for trace in traces]


def by_hand(peers: Peers, ids: torch.Tensor) -> Hidden:
    """transformers alone."""
    with torch.inference_mode():
        return peers.plain(input_ids=ids, output_hidden_states=True, use_cache=False).hidden_states


def by_nnsight(peers: Peers, ids: torch.Tensor) -> Hidden:
    """What output_hidden_states gives, from one nnsight trace."""
    model = peers.nnsight
    kept: list[Any] = []
    with torch.inference_mode(), model.trace({"input_ids": ids, "attention_mask": torch.ones_like(ids)}):
        kept = [model.model.embed_tokens.output]
        for block in model.model.layers[:-1]:
            kept.append(block.output)
        kept.append(model.model.norm.output)
        kept.save()
    return kept


def by_transformer_lens(peers: Peers, ids: torch.Tensor) -> Hidden:
    """The same from TransformerLens."""
    blocks = [f"blocks.{number}.hook_out" for number in range(len(peers.plain.model.layers) - 1)]
    names = ["embed.hook_out", *blocks, "ln_final.hook_out"]
    with torch.inference_mode():
        _, cache = peers.bridge.run_with_cache(ids, names_filter=lambda name: name in names)
    return [cache[name] for name in names]


def by_sae_lens(peers: Peers, layer: int, folder: Path) -> Any:
    """SAELens' own run, into a folder of `datasets`; its progress bars are not shown."""
    runner = peers.runners[layer]
    runner.cfg.new_cached_activations_path = str(folder)
    with redirect_stderr(io.StringIO()):
        return runner.run()


def save_each(peers: Peers, run: Callable[[Peers, torch.Tensor], Hidden], layer: int | None, folder: Path) -> None:
    """A way of capturing, and its hidden states by torch.save, a file a batch."""
    folder.mkdir(parents=True)
    for number, ids in enumerate(peers.ids):
        hidden = run(peers, ids)
        kept = torch.stack(list(hidden)) if layer is None else hidden[layer].clone()
        torch.save({"input_ids": ids, "hidden_states": kept}, folder / f"{number}.pt")


def hook(layer: int) -> str:
    """SAELens' name of the place where a hidden state is."""
    return f"model.layers.{layer - 1}"


def load(config: NextTokenConfig) -> Peers:
    """Every library with its own copy of the model, loaded offline from the demo model's folder."""
    tokenizer = load_tokenizer(config.model)
    traced = load_model(config.model, model_info(config.model, variant="chat"), tokenizer, ("hidden_states",))
    import nnsight
    from datasets import Dataset
    from sae_lens import CacheActivationsRunner, CacheActivationsRunnerConfig
    from transformer_lens.model_bridge import TransformerBridge

    batches = batches_of(config)[:_NUM_BATCHES]
    assert all(one.stop - one.start == NUM_TOKENS for batch in batches for one in batch), "windows differ in length"
    ids = [torch.tensor(np.stack([one.whole.token_ids[one.start : one.stop] for one in batch])) for batch in batches]
    rows = [row for batch in ids for row in batch.tolist()]
    folder, dataset = str(demo_model_folder()), Dataset.from_dict({"input_ids": rows})
    width = traced.model.config.hidden_size
    runners: dict[int, Any] = {}
    for layer in LAYERS:
        settings = CacheActivationsRunnerConfig(
            dataset_path="(given)",
            model_name=folder,
            model_class_name="AutoModelForCausalLM",
            model_from_pretrained_kwargs={"dtype": torch.float32},
            model_batch_size=BATCH_SIZE,
            hook_name=hook(layer),
            d_in=width,
            training_tokens=len(rows) * NUM_TOKENS,
            context_size=NUM_TOKENS,
            buffer_size_gb=(len(rows) * NUM_TOKENS * width * 4 + 1) / 1e9,  # all of it, whatever rounding does
            new_cached_activations_path="(given)",
            shuffle=False,
            prepend_bos=False,
            streaming=False,
            device="cpu",
        )
        runners[layer] = CacheActivationsRunner(settings, override_dataset=dataset)
    plain = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    options = {"task": "text-generation", "dispatch": True, "dtype": torch.float32, "device_map": "cpu"}
    return Peers(
        traced=traced,
        config=config,
        plain=plain.eval(),
        nnsight=nnsight.TransformersModel(folder, **options),
        bridge=TransformerBridge.boot_transformers(folder, device="cpu", dtype=torch.float32),
        runners=runners,
        batches=batches,
        ids=ids,
    )


def check_agreement(peers: Peers, root: Path) -> dict[str, float]:
    """That all hold the same numbers: the largest difference to tracekit's, divided by the largest value of a layer.

    What is on disk is read back with the reader of whoever wrote it.
    """
    ours = [torch.from_numpy(np.stack(capture_all(peers, ids))) for ids in peers.ids]
    found: dict[str, float] = {}
    for name, run in ((_NNSIGHT, by_nnsight), (_TRANSFORMER_LENS, by_transformer_lens), (_BY_HAND, by_hand)):
        theirs = [torch.stack(list(run(peers, ids)), dim=1) for ids in peers.ids]
        found[name] = max(_difference(a, b) for a, b in zip(theirs, ours, strict=True))
    whole = torch.cat(ours)
    windows = [one for batch in peers.batches for one in batch]
    for layer in LAYERS:
        cached = by_sae_lens(peers, layer, root / f"sae-{layer}").with_format("torch")[:]
        found[f"{_SAE_LENS}, layer {layer}"] = _difference(cached[hook(layer)][:, None], whole[:, [layer]])
        for name, numbers in _OURS.items():
            kept = _read_shard(keep(peers, (str(layer),), numbers, root / f"shards-{layer}-{numbers}"))
            written = torch.stack([kept[window.key] for window in windows])
            found[f"{name}, shard, layer {layer}"] = _difference(written, whole[:, [layer]])
    for name, difference in found.items():
        assert difference <= _TOLERANCE, f"{name} captured other numbers: relative difference {difference:.3g}"
    return found


def _read_shard(layout: Layout) -> dict[str, torch.Tensor]:
    """By key the hidden states (1, T, D) of the shard that `keep` wrote, which no plan or manifest stands beside."""
    path = layout.shard("train-00000")
    data = path.read_bytes()
    with path.open("rb") as file:
        samples = list(iter_samples(file, where=str(path)))
    spans = {one.key: data[one.payload.offset : one.payload.offset + one.payload.size] for one in samples}
    return {key: torch.from_numpy(decode(raw, where=key)["hidden_states"].copy()) for key, raw in spans.items()}


def _difference(values: torch.Tensor, reference: torch.Tensor) -> float:
    """Of (N, L, T, D): the worst layer's."""
    largest = (values - reference).abs().amax(dim=(0, 2, 3)) / reference.abs().amax(dim=(0, 2, 3))
    return float(largest.max())


def measure(peers: Peers, root: Path, *, is_quick: bool) -> list[Ratio]:
    """The three comparisons; whatever is written is removed before the next is measured."""
    folder = root / "out"

    def clean(name: str) -> None:
        shutil.rmtree(folder, ignore_errors=True)

    def each(run: Callable[[Peers, torch.Tensor], object]) -> Callable[[int], object]:
        return lambda number: run(peers, peers.ids[number % len(peers.ids)])

    def on_disk(work: Callable[[Path], object]) -> Callable[[int], object]:
        return lambda number: work(folder)

    settings: dict[str, dict[str, Callable[[int], object]]] = {
        f"layer {layer}, on disk": {
            **{name: on_disk(partial(keep, peers, (str(layer),), numbers)) for name, numbers in _OURS.items()},
            _SAE_LENS: on_disk(partial(by_sae_lens, peers, layer)),
            _BY_HAND: on_disk(partial(save_each, peers, by_hand, layer)),
        }
        for layer in LAYERS
    } | {
        "all layers, in memory": {
            **{name: each(partial(capture_all, numbers=numbers)) for name, numbers in _OURS.items()},
            _NNSIGHT: each(by_nnsight),
            _TRANSFORMER_LENS: each(by_transformer_lens),
            _BY_HAND: each(by_hand),
        },
        "all layers, on disk": {
            **{name: on_disk(partial(keep, peers, ("all",), numbers)) for name, numbers in _OURS.items()},
            _NNSIGHT: on_disk(partial(save_each, peers, by_nnsight, None)),
            _BY_HAND: on_disk(partial(save_each, peers, by_hand, None)),
        },
    }
    ratios: list[Ratio] = []
    for setting, variants in settings.items():
        say(f"\n{setting}")
        rounds = interleave(variants, **(QUICK if is_quick else _ROUNDS), before=clean)
        ratios += _ratios(setting, rounds)
    return ratios


def _ratios(setting: str, rounds: Sequence[Round]) -> list[Ratio]:
    others = [name for name in rounds[0] if name not in _OURS]
    return [compare(f"{setting}: {name} / {own}", rounds, name, own) for own in _OURS for name in others]


def run(*, is_quick: bool = False) -> Mapping[str, Any] | None:
    """Measure, print and store; in the peers' environment where this one has none of them; None where neither has."""
    if any(find_spec(name) is None for name in ("sae_lens", "nnsight", "transformer_lens")):
        python = ENVIRONMENT / "bin" / "python"
        if not python.exists():
            say("peers: left out, no .venv-peers; `make bench-peers` makes it")
            return None
        options = ["--threads", str(torch.get_num_threads()), *(["--quick"] if is_quick else [])]
        subprocess.run([python, "-m", "benchmarks.peers", *options], check=True)
        return {}
    transformers.utils.logging.disable_progress_bar()
    warnings.filterwarnings("ignore", module="sae_lens")
    logging.disable(logging.INFO)
    try:
        peers = load(msgspec.structs.replace(config_of(""), source=TextSource(source=str(TEXT)), kind="text"))
    except ModelError as error:
        say(f"peers: left out. {error}")
        return None
    num_windows = sum(map(len, peers.ids))
    say(f"peers: {peers.traced.info.id} (float32), {num_windows} windows of {NUM_TOKENS} tokens")
    root = Path(tempfile.mkdtemp(prefix="tracekit-peers-"))
    try:
        agreement = check_agreement(peers, root)
        ratios = measure(peers, root, is_quick=is_quick)
    finally:
        shutil.rmtree(root)
    say(ratio_table("Capture beside others: their time divided by tracekit's", ratios))
    rows = [[name, f"{value:.2g}"] for name, value in agreement.items()]
    say(table("Largest difference to tracekit's values, relative", ["", "value"], rows))
    results = {"ratios": ratios, "agreement": agreement, "notes": NOTES, "num_windows": num_windows}
    if not is_quick:
        store_results("peers", results)
    return results


if __name__ == "__main__":
    quick = parse_arguments(__doc__ or "", has_quick=True)
    sys.exit(0 if run(is_quick=quick) is not None else 1)
