"""What capture costs as it keeps more: layers, tokens of a text, samples of a run. The demo model, batches of 8.

    layers     1, 2, 4, ... hidden states of the same windows: time, divided by that of half as many
    length     texts of 64, 128, 256, 512 tokens: time a token with all hidden states, divided by that of texts half as
               long; and the time with attention as well, which is stored for each of the T(T+1)/2 pairs of tokens
    samples    whole runs of next_token in a process each: seconds a sample, and the process's largest memory

Growth that is linear has at most 2 for layers (less where the model itself takes longer than keeping), 1 for tokens and
samples.
"""

import json
import resource
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import msgspec
import torch
import transformers

from benchmarks.measure import (
    QUICK,
    Ratio,
    compare,
    interleave,
    parse_arguments,
    ratio_of,
    ratio_table,
    say,
    store_results,
)
from benchmarks.next_token import BATCH_SIZE, config_of
from builders.kit.columns import TextSource
from builders.next_token.task import TASK as NEXT_TOKEN
from tracekit.config import CaptureConfig, OutputConfig
from tracekit.errors import ModelError
from tracekit.model.capture import Text, capture
from tracekit.model.models import load_model, load_tokenizer, model_info
from tracekit.model.traced import TracedModel
from tracekit.run.runner import execute
from tracekit.tensors import encode

TEXT = Path(__file__).parent.parent / "builders" / "wiki_qa" / "wiki_articles.jsonl"
_LAYERS = (1, 2, 4, 8, 16, 31)
_LENGTHS = (64, 128, 256, 512)
_SAMPLES = (32, 64, 128, 256)
_CHARACTERS = 60
"""Of a sample's text: about 14 tokens."""
BOTH = ("hidden_states", "attentions")


def tokens_of(traced: TracedModel) -> list[int]:
    """The packaged articles as tokens."""
    texts = [json.loads(line)["text"] for line in TEXT.read_text(encoding="utf-8").splitlines()]
    return traced.tokenizer("\n\n".join(texts))["input_ids"]


def keep(traced: TracedModel, texts: Sequence[Text], config: CaptureConfig) -> int:
    """Capture and encode; bytes of the payloads."""
    return sum(encode(trace.tensors).size for trace in capture(traced, texts, config))


def measure_layers(traced: TracedModel, tokens: Sequence[int], *, is_quick: bool) -> list[Ratio]:
    """More layers of the same windows."""
    say("\nlayers")
    texts = [Text(list(tokens[i * 64 : i * 64 + 64]), 64) for i in range(BATCH_SIZE)]
    configs = {n: CaptureConfig(sites=("hidden_states",), layers=(f"0-{n - 1}",)) for n in _LAYERS}
    work = {str(n): lambda _, config=config: keep(traced, texts, config) for n, config in configs.items()}
    rounds = interleave(work, **(QUICK if is_quick else {"num_rounds": 4, "max_seconds": 50}))
    ratios = [
        compare(f"layers: time for {2 * n} / for {n}", rounds, str(2 * n), str(n), target="<= 2") for n in _LAYERS[:-2]
    ]
    return [*ratios, compare(f"layers: time for {_LAYERS[-1]} / for 1", rounds, str(_LAYERS[-1]), "1")]


def measure_lengths(traced: TracedModel, tokens: Sequence[int], *, is_quick: bool) -> list[Ratio]:
    """Longer texts, two at a time."""
    say("\nlength")
    lengths = _LENGTHS[: 3 if is_quick else None]
    texts = {n: [Text(list(tokens[start : start + n]), n) for start in (0, n)] for n in lengths}
    variants = {
        f"{name} {n}": lambda _, n=n, sites=sites: keep(traced, texts[n], CaptureConfig(sites=sites))
        for n in lengths
        for name, sites in (("hidden", ("hidden_states",)), ("both", BOTH))
    }
    rounds = interleave(variants, **(QUICK if is_quick else {"num_rounds": 4, "max_seconds": 70}))
    per_token = [
        {name: took._replace(seconds=took.seconds / int(name.split()[1])) for name, took in one.items()}
        for one in rounds
    ]
    ratios = [
        compare(
            f"length: hidden states, time a token, of {long} / of {short}",
            per_token,
            f"hidden {long}",
            f"hidden {short}",
            target="<= 1.25",
        )
        for short, long in pairwise(lengths)
    ]
    for n in lengths:
        ratios.append(compare(f"length {n}: attention as well / hidden states", rounds, f"both {n}", f"hidden {n}"))
    return ratios


def attention_bytes(traced: TracedModel, tokens: Sequence[int]) -> dict[str, float]:
    """Bytes of attention that are stored for each pair of tokens, by length: the same, so it grows with the square."""
    found: dict[str, float] = {}
    for n in _LENGTHS[:2]:
        (trace,) = capture(traced, [Text(list(tokens[:n]), n)], CaptureConfig(sites=("attentions",)))
        found[str(n)] = trace.tensors["attentions"].nbytes / (n * (n + 1) / 2)
    return found


def run_once(count: int, folder: Path) -> dict[str, float]:
    """A whole run over so many texts: seconds a sample without the first batch, and this process's memory (MiB)."""
    words = " ".join(json.loads(line)["text"] for line in TEXT.read_text(encoding="utf-8").splitlines()).replace(
        "\n", " "
    )
    texts = [words[(i * _CHARACTERS) % (len(words) - _CHARACTERS) :][:_CHARACTERS] for i in range(count)]
    folder.mkdir()
    source = folder / "texts.jsonl"
    source.write_text("".join(json.dumps({"id": f"t{i}", "text": text}) + "\n" for i, text in enumerate(texts)))
    base = config_of("")
    config = msgspec.structs.replace(
        base,
        source=TextSource(source=str(source)),
        output=OutputConfig(samples_per_shard=64, batch_size=BATCH_SIZE),
        kind="text",
    )
    execute(NEXT_TOKEN, config, folder / "out")
    lines = [json.loads(line) for line in (folder / "out/logs/next_token.jsonl").read_text().splitlines()][1:]
    return {
        "seconds_per_sample": sum(line["seconds"] for line in lines) / sum(line["num_samples"] for line in lines),
        "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10),
        "written_mb": sum(path.stat().st_size for path in (folder / "out").rglob("*.tar")) / 1e6,
    }


def measure_samples(sizes: Sequence[int]) -> tuple[list[Ratio], dict[str, Any]]:
    """Runs of more and more samples, each in a process of its own."""
    say("\nsamples")
    found: dict[str, Any] = {}
    threads = str(torch.get_num_threads())
    for count in sizes:
        root = Path(tempfile.mkdtemp(prefix="tracekit-growth-"))
        command = [sys.executable, "-m", "benchmarks.growth", "--run", str(count), str(root / "run"), threads]
        try:
            made = subprocess.run(command, check=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
        finally:
            shutil.rmtree(root)
        found[str(count)] = json.loads(made.stdout.splitlines()[-1])
        say(f"  {count}: {found[str(count)]}")
    ratios: list[Ratio] = []
    for name, key, target in (
        ("time a sample", "seconds_per_sample", "<= 1.25"),
        ("largest memory", "peak_mib", "<= 1.05"),
    ):
        for short, long in pairwise(map(str, sizes)):
            value = found[long][key] / found[short][key]
            ratios.append(ratio_of(f"samples: {name}, of {long} / of {short}", [value], target=target))
    return ratios, found


def run(*, is_quick: bool = False) -> dict[str, Any] | None:
    """Measure, print and store; None where the demo model is not installed."""
    transformers.utils.logging.disable_progress_bar()
    model = config_of("").model
    try:
        tokenizer = load_tokenizer(model)
        traced = load_model(model, model_info(model, variant="chat"), tokenizer, BOTH)
    except ModelError as error:
        say(f"growth: skipped. {error}")
        return None
    tokens = tokens_of(traced)
    say(f"growth: {traced.info.id} ({traced.info.dtype}), {torch.get_num_threads()} threads")
    ratios = measure_layers(traced, tokens, is_quick=is_quick)
    ratios += measure_lengths(traced, tokens, is_quick=is_quick)
    per_pair = attention_bytes(traced, tokens)
    del traced
    of_samples, runs = measure_samples(_SAMPLES[: 2 if is_quick else None])
    ratios += of_samples
    say(ratio_table("Growth: what a step of two costs", ratios))
    results = {"ratios": ratios, "runs": runs, "attention_bytes_per_pair": per_pair}
    if not is_quick:
        store_results("growth", results)
    return results


def _child(count: str, folder: str, threads: str) -> None:
    torch.set_num_threads(int(threads))
    print(json.dumps(run_once(int(count), Path(folder))))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--run"]:
        _child(*sys.argv[2:])
        sys.exit(0)
    quick = parse_arguments(__doc__ or "", has_quick=True)
    sys.exit(0 if run(is_quick=quick) else 1)
