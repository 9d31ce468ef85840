"""Generation: prompts in, answers out, in batches, with the attention that transformers itself selects.

The deterministic answer is greedy or beam search. Sampled answers use one random generator each, seeded by (run
seed, key, sample index): the Gumbel-max trick turns argmax over noisy scores into an exact draw from their softmax, so
a text does not depend on what else is in its batch.
"""

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import (
    GenerationConfig as HFGenerationConfig,
)
from transformers import (
    LogitsProcessor,
    LogitsProcessorList,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from tracekit.config import GenerationConfig
from tracekit.model.traced import TracedModel
from tracekit.records import GenerationSettings

__all__ = ["Generated", "answer_deterministically", "answer_once", "answer_sampled", "settings_of"]


class Generated(NamedTuple):
    """One generated answer."""

    token_ids: list[int]
    """Generated ids, end-of-sequence included where there is one."""
    finish_reason: str
    """`stop` or `length`."""

    @property
    def eos_included(self) -> bool:
        """Whether the last id is an end-of-sequence token."""
        return self.finish_reason == "stop"


def answer_deterministically(
    traced: TracedModel, prompts: Sequence[list[int]], config: GenerationConfig, **further: Any
) -> list[Generated]:
    """Greedy or beam-search answers to a batch of prompts. `further` as in `answer_once`."""
    none = LogitsProcessorList()
    return _generate(traced, prompts, config, num_beams=config.num_beams, processors=none, **further)


def answer_sampled(
    traced: TracedModel, prompts: Sequence[list[int]], config: GenerationConfig, seeds: Sequence[str], **further: Any
) -> list[Generated]:
    """One sampled answer to each prompt; `seeds` decide the draw, whatever the batch. `further` as in `answer_once`."""
    processors = LogitsProcessorList([TemperatureLogitsWarper(config.temperature)])
    if config.top_k > 0:
        processors.append(TopKLogitsWarper(config.top_k))
    if config.top_p < 1:
        processors.append(TopPLogitsWarper(config.top_p))
    processors.append(_GumbelNoise(seeds))
    return _generate(traced, prompts, config, num_beams=1, processors=processors, **further)


def answer_once(
    traced: TracedModel,
    prompts: Sequence[list[int]],
    config: GenerationConfig,
    seeds: Sequence[str] | None,
    *,
    inputs: Sequence[Mapping[str, Tensor]] = (),
    segments: Sequence[Sequence[int]] = (),
) -> list[Generated]:
    """One answer to each prompt: drawn by `seeds`, deterministic where there are none.

    `inputs` is what the model takes beside the tokens of each prompt (`pixel_values`), `segments` their token types.
    """
    if seeds is None:
        return answer_deterministically(traced, prompts, config, inputs=inputs, segments=segments)
    return answer_sampled(traced, prompts, config, seeds, inputs=inputs, segments=segments)


def settings_of(config: GenerationConfig, *, do_sample: bool) -> GenerationSettings:
    """What a record says of how its answer was generated."""
    return GenerationSettings(
        do_sample=do_sample,
        num_beams=1 if do_sample else config.num_beams,
        max_new_tokens=config.max_new_tokens,
        temperature=config.temperature if do_sample else 1.0,
        top_p=config.top_p if do_sample else 1.0,
        top_k=config.top_k if do_sample else 0,
    )


class _GumbelNoise(LogitsProcessor):
    """Adds Gumbel noise row by row, so that argmax is a draw from the softmax."""

    def __init__(self, seeds: Sequence[str]) -> None:
        digests = [hashlib.sha256(seed.encode()).digest() for seed in seeds]
        self._generators = [torch.Generator().manual_seed(int.from_bytes(d[:8], "little") >> 1) for d in digests]

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        uniform = torch.stack([torch.rand(scores.shape[1], generator=g, dtype=torch.float64) for g in self._generators])
        gumbel = -torch.log(-torch.log(uniform.clamp(min=1e-300)))
        return scores + gumbel.to(device=scores.device, dtype=torch.float32)


def _generate(
    traced: TracedModel,
    prompts: Sequence[list[int]],
    config: GenerationConfig,
    *,
    num_beams: int,
    processors: LogitsProcessorList,
    inputs: Sequence[Mapping[str, Tensor]] = (),
    segments: Sequence[Sequence[int]] = (),
) -> list[Generated]:
    model: Any = traced.model
    own = model.generation_config
    longest = max(len(prompt) for prompt in prompts)
    pad = own.pad_token_id
    ids = torch.tensor([[pad] * (longest - len(p)) + list(p) for p in prompts], device=traced.device)
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts], device=traced.device)
    names = inputs[0] if inputs else ()
    further = {name: torch.cat([one[name] for one in inputs]).to(traced.device) for name in names}
    if segments:
        rows = [[0] * (longest - len(row)) + list(row) for row in segments]
        further["token_type_ids"] = torch.tensor(rows, device=traced.device)
    settings = HFGenerationConfig(
        do_sample=False,
        num_beams=num_beams,
        max_new_tokens=config.max_new_tokens,
        eos_token_id=own.eos_token_id,
        pad_token_id=pad,
        bos_token_id=own.bos_token_id,
    )
    with torch.inference_mode():
        output = model.generate(
            input_ids=ids, attention_mask=mask, generation_config=settings, logits_processor=processors, **further
        )
    eos_ids = set(own.eos_token_id or [])
    return [_cut(row, eos_ids, config.max_new_tokens) for row in output[:, longest:].tolist()]


def _cut(ids: list[int], eos_ids: set[int], max_new_tokens: int) -> Generated:
    """An answer ends with its first end-of-sequence token; what follows is padding, whatever its id."""
    for length, token in enumerate(ids, start=1):
        if token in eos_ids:
            return Generated(ids[:length], "stop")
    return Generated(ids[:max_new_tokens], "length")
