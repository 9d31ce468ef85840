"""Multiple choice: a question's options, each read with the question by an encoder, captured as one sample.

    rows of the batch         stored, one sample               layout
    option 0   (L, T_0, D)
    option 1   (L, T_1, D)    (L, T_0 + T_1 + ..., D)          choice_offsets = [0, T_0, T_0 + T_1, ...]
    attention  (L, H, T_c, T_c) each    (L, H, sum T_c^2)      option by option, row by row

A multiple-choice head gives every row a logit of its own, so options run as rows of one right-padded batch, whatever
their number, and each sees exactly what it would see alone.
"""

from collections.abc import Sequence
from itertools import accumulate
from typing import NamedTuple

import msgspec
import numpy as np
import torch

from tracekit.config import CaptureConfig
from tracekit.errors import CaptureError, ConfigError
from tracekit.model.capture import Text, run_rows
from tracekit.model.traced import TracedModel
from tracekit.sites import SITES, resolve_sites
from tracekit.tensors import TensorSpec

__all__ = ["ChoiceTrace", "Choices", "capture_choices", "check_choice_config"]


class Choices(NamedTuple):
    """The options of one question, each as a text together with the question."""

    texts: list[Text]

    @property
    def token_ids(self) -> list[int]:
        """Tokens of all options, one after the other."""
        return [token for text in self.texts for token in text.token_ids]

    @property
    def prompt_length(self) -> int:
        """Number of those tokens: nothing is generated."""
        return self.offsets[-1]

    @property
    def offsets(self) -> list[int]:
        """Where each option starts among the tokens, and the end."""
        return [0, *accumulate(len(text.token_ids) for text in self.texts)]


class ChoiceTrace(NamedTuple):
    """What was captured of one question."""

    tensors: dict[str, np.ndarray]
    """Stored tensors by name."""
    specs: list[TensorSpec]
    """What each of them is."""
    logits: np.ndarray
    """The head's logit of each option, float32 (C,)."""


def check_choice_config(config: CaptureConfig) -> None:
    """See that what is asked for has a meaning for encoders.

    Raises:
        ConfigError: next-token sites, or positions other than all.
    """
    if config.tokens != "all":
        raise ConfigError(
            f"--tokens {config.tokens} - at `$.capture.tokens`; options have no prompt and answer, only all"
        )
    named = [site for site in config.sites if site.startswith("topk")]
    if named:
        raise ConfigError(f"--sites {named[0]} - at `$.capture.sites`; an encoder predicts no next token")
    if config.attention_top_p < 1:
        raise ConfigError(
            f"--attention-top-p {config.attention_top_p} - at `$.capture.attention_top_p`; attention of options is "
            "stored whole, leave it out"
        )


def capture_choices(traced: TracedModel, items: Sequence[Choices], config: CaptureConfig) -> list[ChoiceTrace]:
    """Run the options of all questions once and keep what the configuration asks for.

    Raises:
        CaptureError: an invariant failed, as in tracekit.model.capture, or a logit is not finite.
        DtypeOverflowError: a value does not fit `store_dtype`.
        UnsupportedSiteError: the model cannot give a requested site.
    """
    check_choice_config(config)
    sites = tuple(site for site in resolve_sites(config.sites) if SITES[site].source != "head")
    settings = msgspec.structs.replace(config, sites=sites or ("none",))
    texts = [text for item in items for text in item.texts]
    logits_N = torch.empty(len(texts))
    parts: dict[int, tuple[dict[str, np.ndarray], list[TensorSpec]]] = {}
    for group in traced.groups([len(text.token_ids) for text in texts]):
        rows = run_rows(traced, [texts[i] for i in group], settings)
        logits_N[group] = rows.output.logits[:, 0].float().cpu()
        parts |= {i: rows.buffers.tensors(row) for row, i in enumerate(group)}
    if not torch.isfinite(logits_N).all():
        raise CaptureError(f"logits of the options: not finite in a {traced.info.dtype} model; use another --dtype")
    stops = accumulate(len(item.texts) for item in items)
    places = [range(stop - len(item.texts), stop) for item, stop in zip(items, stops, strict=True)]
    return [
        _joined(item, [parts[i] for i in place], logits_N[place.start : place.stop].numpy())
        for item, place in zip(items, places, strict=True)
    ]


def _joined(
    item: Choices, parts: Sequence[tuple[dict[str, np.ndarray], list[TensorSpec]]], logits: np.ndarray
) -> ChoiceTrace:
    """One sample of the options' tensors."""
    tensors: dict[str, np.ndarray] = {}
    specs: list[TensorSpec] = []
    for spec in parts[0][1]:
        arrays = [tensors_of[spec.name] for tensors_of, _ in parts]
        axes = list(spec.axes)
        if spec.layout == "full" and axes != ["L", "H", "S"]:
            arrays = [array.reshape(*array.shape[:2], -1) for array in arrays]
            axes = ["L", "H", "S"]
        along = axes.index("S" if "S" in axes else "T")
        whole = tensors[spec.name] = np.concatenate(arrays, axis=along)
        specs.append(
            msgspec.structs.replace(
                spec,
                shape=list(whole.shape),
                axes=axes,
                positions=[[0, item.offsets[-1]]],
                num_keys=0,
                choice_offsets=item.offsets,
            )
        )
    return ChoiceTrace(tensors, specs, logits)
