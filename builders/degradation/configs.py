"""Configurations of the degradation builder: a base, and named ones for each of the methods.

    get_config("dreams_it")                          dream narration, multiplicative noise
    get_config("iq_it_ablation")                     IQ-style tasks, ablation
    get_config("cookie_theft_it_uni_quant")          picture description (give --image), uniform quantisation
    msgspec.structs.replace(get_config("dreams_it"), n_rep=5)

A name without a method means mult_gauss; `--method` changes it, and the levels with it unless they are given.
"""

from collections.abc import Mapping
from typing import Annotated, ClassVar, Literal, Self

import msgspec

from builders.degradation.methods import GROUPS, METHODS, Method, check_level
from builders.kit.columns import PromptSource
from tracekit.config import AnswerCaptureConfig, DrawConfig, ModelConfig, Positive, PromptedConfig
from tracekit.errors import ConfigError

__all__ = ["CONFIGS", "LEVELS", "DegradationConfig", "get_config"]

LEVELS: Mapping[Method, tuple[float, ...]] = {
    "mult_gauss": (0.0, 0.1, 0.2, 0.3, 0.4, 0.5),
    "ablation": (0.0, 0.05, 0.1, 0.2, 0.3, 0.4),
    "uni_quant": (0.0, 0.01, 0.02, 0.05, 0.1, 0.2),
}
"""Levels of each method where none are given."""


_MAX_SEQ_LEN, _MAX_SEQ_LEN_WITH_PICTURE = 512, 1024


class WholeCaptureConfig(AnswerCaptureConfig, frozen=True, kw_only=True):
    """What is recorded. Forms with scales do not know values that are not finite, as damaged models have them."""

    store_dtype: Literal["same", "float32", "bfloat16", "float16"] = "same"
    """dtype of the stored tensors; `same` is what the model computes in. A value that overflows becomes inf, and is
    counted; of the undamaged model it stops the run."""
    attention_top_p: Annotated[float, msgspec.Meta(ge=1, le=1)] = 1.0
    """Attention is stored whole: 1."""


class WholeModelConfig(ModelConfig, frozen=True, kw_only=True):
    """Which model, and how it is loaded. Quantised weights cannot be damaged like others."""

    quantize: Literal["none"] = "none"
    """The weights stay as they are stored."""


class DegradationConfig(PromptedConfig, frozen=True, kw_only=True):
    """Prompts to a model whose weights are damaged, group by group and level by level; answered and traced."""

    model: WholeModelConfig = WholeModelConfig()
    """Which model."""
    source: PromptSource = PromptSource(source="dreams")
    """`dreams`, `iq` or `picture` (the project's own prompts), or a file with `prompt`, and `id`, `kind`, `answer` if
    any; --limit counts prompts."""
    generation: DrawConfig = DrawConfig(num_beams=1, max_new_tokens=256, temperature=0.7, top_p=0.95, top_k=50)
    """How answers are generated: one a prompt."""
    capture: WholeCaptureConfig = WholeCaptureConfig(sites=("none",))
    """What is recorded: texts and their numbers alone, unless --sites asks for more."""
    name: str = "custom"
    """Name of these settings, written into every record; a named configuration has its own."""
    method: Method = "mult_gauss"
    """How weights are damaged."""
    groups: tuple[str, ...] = ("attn", "mlp", "embed")
    """Which weights: attn mlp embed q k v o gate up down, with layers as in mlp:4-8; one after the other."""
    levels: tuple[float, ...] = ()
    """How much, see the method; 0 is untouched. The method's own levels by default."""
    n_rep: Positive = 1
    """Repeats of each level, with other draws."""
    seed_base: int = 0
    """Repeat r damages by seed `seed_base` + r."""
    do_sample: bool = True
    """Draw answers at --temperature, --top-p and --top-k; otherwise the most probable tokens are taken."""
    local_files: ClassVar[tuple[str, ...]] = ("image", "perplexity_text")
    grows: ClassVar[tuple[str, ...]] = ("groups", "levels", "n_rep", "source.limit")
    eases: ClassVar[tuple[str, ...]] = ("output.batch_size", "max_batch_size")
    max_batch_size: Positive = 40
    """Most prompts generated together; --batch-size of them to begin with."""
    max_seq_len: Annotated[int, msgspec.Meta(ge=2)] | Literal["auto"] = "auto"
    """Most tokens of a prompt and its answer; `auto`: 512, with a picture 1024."""
    image: str | None = None
    """Picture file that is shown with every prompt, to a model that takes pictures."""
    perplexity_text: str | None = None
    """Text file whose perplexity is computed once a level."""
    perplexity_stride: Positive = 256
    """Tokens by which its windows, of at most 512, advance."""

    @property
    def all_levels(self) -> tuple[float, ...]:
        """The levels as given, or the method's own."""
        return self.levels or LEVELS[self.method]

    def settled(self) -> Self:
        """The same run with its levels as they are."""
        return msgspec.structs.replace(self, levels=self.all_levels)

    @property
    def sequence_limit(self) -> int:
        """Most tokens of a prompt and its answer."""
        if self.max_seq_len == "auto":
            return _MAX_SEQ_LEN if self.image is None else _MAX_SEQ_LEN_WITH_PICTURE
        return self.max_seq_len

    def batch_size(self, num_prompts: int) -> int:
        """Prompts a batch: 100 prompts make batches of 40, 40 and 20."""
        return min(num_prompts, self.max_batch_size)


_BASES = {
    "dreams_it": DegradationConfig(),
    "iq_it": DegradationConfig(
        source=PromptSource(source="iq"),
        generation=DrawConfig(num_beams=1, max_new_tokens=64),
        do_sample=False,
    ),
    "cookie_theft_it": DegradationConfig(source=PromptSource(source="picture")),
}

CONFIGS: dict[str, DegradationConfig] = {
    name: msgspec.structs.replace(base, name=name) for name, base in _BASES.items()
} | {
    f"{name}_{method}": msgspec.structs.replace(base, name=name, method=method)
    for name, base in _BASES.items()
    for method in METHODS
}
"""Named configurations."""


def get_config(name: str) -> DegradationConfig:
    """A named configuration.

    Raises:
        ConfigError: no such name; the message lists those that there are.
    """
    if name not in CONFIGS:
        raise ConfigError(f"no configuration {name!r}; expected one of {', '.join(CONFIGS)}")
    return CONFIGS[name]


def check_grid(config: DegradationConfig) -> None:
    """See that groups and levels have a meaning.

    Raises:
        ConfigError: none, one twice, or a level that the method does not have; with the path.
    """
    for name, values in (("groups", config.groups), ("levels", config.all_levels)):
        if not values or len(set(values)) < len(values):
            raise ConfigError(f"{' '.join(map(str, values))!r} - at `$.{name}`; expected one or more, each once")
    for number, name in enumerate(config.groups):
        if name.partition(":")[0] not in GROUPS:
            raise ConfigError(
                f"group {name!r} - at `$.groups[{number}]`; expected one of {', '.join(GROUPS)}, with layers"
            )
    for number, level in enumerate(config.all_levels):
        check_level(level, method=config.method, at=f"$.levels[{number}]")
