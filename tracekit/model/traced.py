"""A model ready to be traced: the model itself, its tokenizer, and what was measured of it on loading."""

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, TypeAlias

import torch

from tracekit.errors import CaptureError, ModelError
from tracekit.model.anatomy import Anatomy, ResidRule, examine, find_resid_rule
from tracekit.model.early_stop import PassOrder
from tracekit.model.lengths import RotaryState, groups_within, length_limit, longest_text
from tracekit.model.placement import devices_of, input_device, is_offloaded
from tracekit.model.vocabulary import without_row
from tracekit.records import ModelInfo

__all__ = [
    "CaptureFrom",
    "DecodingRule",
    "Head",
    "Loads",
    "SiteLayout",
    "Tolerance",
    "TracedModel",
    "is_quantized",
    "probe_tokens",
    "rounding_of",
    "tolerance_of",
]


Head: TypeAlias = Literal["lm", "choices"]
"""What a model ends in: a language-model head, or a multiple-choice head."""
Loads: TypeAlias = Literal["lm", "image_lm", "choices"]
"""As what a checkpoint is loaded: `image_lm` is a language model that takes pictures beside its text."""


class Tolerance(NamedTuple):
    """How far a captured tensor may lie from a lone eager run."""

    max_rel_error: float
    """Largest difference divided by the largest reference value."""
    min_cosine: float
    """Smallest cosine of the flattened tensors."""


_TOLERANCES = {
    "float32": Tolerance(1e-3, 0.99999),
    "float16": Tolerance(3e-2, 0.999),
    "bfloat16": Tolerance(1e-1, 0.99),
    "int8": Tolerance(1e-2, 0.999),
    "float8_e4m3fn": Tolerance(1e-1, 0.99),
}
_QUANTIZED = Tolerance(1e-1, 0.99)


def is_quantized(info: ModelInfo) -> bool:
    """Whether a model computes with quantised weights; one that was dequantised on loading does not."""
    return info.quantization is not None and "dequantised" not in info.quantization


def tolerance_of(info: ModelInfo, stored_dtype: str | None = None, *, captured_from: str = "pass") -> Tolerance:
    """The tolerance for a model's dtype and quantisation, and for the dtype its tensors are stored in.

    In half precision and in few bits, what was captured while decoding may lie twice as far from a pass: both are
    rounded at every layer, each in its own way.
    """
    model = _QUANTIZED if is_quantized(info) else _TOLERANCES[info.dtype]
    if captured_from == "decoding" and (is_quantized(info) or info.dtype != "float32"):
        model = Tolerance(2 * model.max_rel_error, 1 - 2 * (1 - model.min_cosine))
    stored = _TOLERANCES.get(stored_dtype or info.dtype, model)
    return Tolerance(max(model.max_rel_error, stored.max_rel_error), min(model.min_cosine, stored.min_cosine))


def rounding_of(info: ModelInfo) -> float:
    """Relative change of a row by what runs beside it that is still rounding."""
    is_exact = info.dtype == "float32" and not is_quantized(info)
    return 1e-4 if is_exact else tolerance_of(info).max_rel_error


def probe_tokens(tokenizer: Any) -> Sequence[int]:
    """A short text as ids: a real sentence where there is a tokenizer, else the first ids."""
    if tokenizer is None:
        return [3, 1, 4, 1, 5, 9, 2, 6]
    return tokenizer("The cat sat on the mat and looked at the moon.", add_special_tokens=False).input_ids


class SiteLayout(NamedTuple):
    """What a model gives at one site."""

    layers: tuple[int, ...]
    """Layers that give it."""
    tails: tuple[tuple[int, ...], ...]
    """Per layer the sizes that do not depend on the text: (D,), (H, E) or (H,)."""
    dtype: torch.dtype
    """dtype in which the model hands it over."""

    @property
    def is_uniform(self) -> bool:
        """Whether all layers have one shape."""
        return len(set(self.tails)) <= 1


CaptureFrom: TypeAlias = Literal["auto", "decoding", "pass"]
"""How traces of answers are asked for: while they are decoded, in a pass afterwards, or as the model proves."""


class DecodingRule(NamedTuple):
    """Whether a model computes in the steps of decoding what it computes in a pass over the whole text."""

    fault: str | None = None
    """What differs; None where nothing does."""
    by_length: bool = False
    """Whether that holds of prompts of one length alone."""
    limit: int | None = None
    """Longest text, in tokens, that it holds for; None where there is no such limit."""
    repeats: bool | None = None
    """Whether one reading of a prompt may serve all of its beams or drawn answers, by copies of its cache; None where
    it was not measured."""
    keeps_queries: bool = False
    """Whether attention is computed once, of the queries of all steps, and not in every step."""


class TracedModel:
    """A model, its tokenizer, and what its proof found.

    `head` says what the model ends in: `lm`, a language-model head, or `choices`, a multiple-choice head, which gives
    every sequence a logit of its own. `run` calls either with rows of token ids. `is_head_fresh` is set by the loader
    where the checkpoint had no weights for the head.

    `layouts`, `is_causal`, `rows_sum_to_one` and `order` are set by `tracekit.model.proof.prove`, which every model
    goes through before anything of it is captured; it sets `is_row_coupled`, too, where it finds that padding changes a
    row, and `length_limit`, where it finds that the longest row changes others in a way that the configuration does not
    tell.
    The loader sets `is_moved_by_padding` where padding before a prompt changes its answer. `decoding` is None until
    `tracekit.model.proof.prove_decoding` has measured it.
    """

    def __init__(
        self, model: Any, tokenizer: Any, info: ModelInfo, *, is_row_coupled: bool = False, head: Head = "lm"
    ) -> None:
        self.model = model.eval()
        self.tokenizer = tokenizer
        self.info = info
        self.is_row_coupled = is_row_coupled
        self.head: Head = head
        self.layouts: dict[str, SiteLayout] = {}
        self.is_causal = False
        self.rows_sum_to_one = True
        self.order = PassOrder()
        self.is_head_fresh = False
        self.is_moved_by_padding = False
        self.decoding: DecodingRule | None = None
        self.length_limit = length_limit(model.config)
        self._longest = longest_text(model.config)
        self._rotary: RotaryState | None = None
        if self.length_limit is not None:
            with torch.no_grad():
                self.run(self.probe_ids()[:, :1])  # a short pass undoes what long ones before this have left
            self._rotary = RotaryState(model)
        self.anatomy: Anatomy = examine(self.model, lambda: self.run(self.probe_ids()))
        self.resid_rule: ResidRule | None = None

    def run(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None, **arguments: Any) -> Any:
        """Run rows of token ids (B, T); the model's output. A multiple-choice head gives logits (B, 1).

        Without a mask all tokens are real. Tensors among the further arguments are rows (B, T) as well.
        """
        if (wrong := int(input_ids.max())) >= self.num_rows:
            raise ModelError(f"{self.info.id}: {without_row(self.tokenizer, wrong, self.num_rows)}")
        self.begin_pass()
        inputs = {"input_ids": input_ids, "attention_mask": attention_mask, **arguments}
        if attention_mask is None:
            inputs["attention_mask"] = torch.ones_like(input_ids)
        if self.head == "choices":  # every row as a question with a single option
            inputs = {name: v[:, None] if isinstance(v, torch.Tensor) else v for name, v in inputs.items()}
        else:
            inputs["use_cache"] = False
        return self.model(**inputs)

    def begin_pass(self) -> None:
        """Forget the length of earlier passes, where the model keeps it; before each pass, and before `generate`."""
        if self._rotary is not None:
            self._rotary.restore()

    def groups(self, lengths: Sequence[int]) -> list[list[int]]:
        """Rows of these lengths that may run through the model together, by their numbers; each is in one group.

        Raises:
            CaptureError: the model computes a text of such a length in another way than short ones.
        """
        if self._longest is not None and max(lengths) > self._longest:
            raise CaptureError(
                f"{self.anatomy.model_type} ({self.info.id}): a text of {max(lengths)} tokens; it is traced with full "
                f"attention, which it has up to {self._longest} tokens alone. Give shorter texts"
            )
        return groups_within(lengths, 0 if self.is_row_coupled else self.length_limit)

    @property
    def device(self) -> torch.device:
        """Device of the model's inputs."""
        self._embeddings()
        return input_device(self.model)

    @property
    def devices(self) -> list[torch.device]:
        """Devices that hold weights or compute, that of the inputs first."""
        return devices_of(self.model)

    @property
    def is_offloaded(self) -> bool:
        """Whether some weights have values only while their module runs."""
        return is_offloaded(self.model)

    def _embeddings(self) -> torch.Tensor:
        """Weights of the token embeddings (V, D)."""
        try:
            return self.model.get_input_embeddings().weight
        except (NotImplementedError, AttributeError) as error:
            raise ModelError(f"{type(self.model).__name__}: it has no table of token embeddings") from error

    @property
    def num_layers(self) -> int:
        """Number of blocks."""
        return len(self.anatomy.blocks)

    @property
    def num_rows(self) -> int:
        """Rows of the embedding table: ids that the model can read."""
        return self._embeddings().shape[0]

    def probe_ids(self) -> torch.Tensor:
        """A short text as ids (1, T)."""
        return torch.tensor([[i % self.num_rows for i in probe_tokens(self.tokenizer)]], device=self.device)

    def find_resid_rule(self) -> None:
        """Search the place of resid_post_attn."""
        self.resid_rule = find_resid_rule(self.anatomy, lambda: self.run(self.probe_ids()))
