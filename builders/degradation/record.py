"""The record of the task degradation: what a model writes when a group of its weights is damaged to a level."""

import msgspec

from tracekit.records import ResponseRecord

__all__ = ["DamageInfo", "DegradationRecord"]


class DamageInfo(msgspec.Struct, frozen=True, kw_only=True):
    """What was done to the weights. With the model it says all that is needed to do it again."""

    method: str
    """`mult_gauss`, `ablation` or `uni_quant`; what a level means to each stands in builders/degradation/damage.py."""
    group: str
    """Weights that were damaged: `attn`, `mlp`, `embed`, `q`, ..., with layers as in `mlp:4-8`."""
    level: float
    """How much; 0 leaves every bit as it is."""
    seed: int
    """Seed of what was drawn: `--seed-base` and the number of the repeat added up."""
    num_weights: int
    """Weights of the group."""
    share_changed: float
    """Share of them that have another value than before."""
    relative_change: float
    """L2 norm of the change, divided by that of the weights before; weights that are not finite left out."""
    num_nonfinite: int
    """Weights that are not finite any more."""
    note: str | None
    """What else the damage touches, such as an output head tied to the embeddings; null where nothing is."""


class DegradationRecord(ResponseRecord, frozen=True, kw_only=True, tag="degradation"):
    """A prompt, the damage, and what the damaged model made of it.

    Numbers that are not finite, as badly damaged models have them, are null here; in the tensors they stand.
    """

    prompt_id: str
    """The prompt's id, the same at all levels; `question_id` too."""
    prompt_group: str
    """Set of prompts it is of: `dreams`, `iq`, `picture`, or the name of a file."""
    prompt_kind: str
    """What is asked for: `dream`, `mathematics`, `language`, `logic`, `factual`, `creativity`, `picture`, or the
    source's own."""
    prompt_text: str
    """The user's message, before the chat template."""
    image_filename: str | None
    """Name of the picture's file; null without one."""
    image_sha256: str | None
    """SHA-256 of it; null without one."""
    config_name: str
    """Name of the settings, `dreams_it`; `custom` where they have none."""
    damage: DamageInfo
    """What was done to the weights."""
    level_index: int
    """Number of the level, in the order in which levels came into the dataset: as the run that began it gave them, then
    as they were added. It stays what it is when the grid grows; `tracekit export` counts by size instead."""
    repeat: int
    """Number of the repeat: other draws of the same damage."""
    token_logprobs: list[float | None]  # pyright: ignore[reportIncompatibleVariableOverride]
    """Log-probability of each generated token under the damaged model, nats; null where it is not finite."""
    token_entropies: list[float | None]  # pyright: ignore[reportIncompatibleVariableOverride]
    """Entropy at each generated token, nats; null where it is not finite."""
    expected_answer: str | None
    """A short expected answer; null where there is no single one."""
    is_correct: bool | None
    """Whether the expected answer occurs in the answer, word for word; null without one."""
    perplexity: float | None
    """Perplexity of the run's text under the level's first damage; null where none was asked for, or not finite."""
    is_perplexity_finite: bool | None
    """Whether it is a number; null where none was asked for."""
    num_nonfinite_values: int
    """Values in the sample's tensors that are not finite."""
    num_overflowed_values: int
    """Those of them that the damaged model had as finite ones: they stand as inf, since `--store-dtype` does not reach
    so far. Always 0 at level 0, where such a value stops the run."""
    num_nonfinite_tokens: int
    """Generated tokens whose log-probability or entropy is not finite."""

    @property
    def is_spoilt(self) -> bool:
        """Whether the model gave values that are not finite; what only the stored dtype cannot hold does not count."""
        return bool(self.num_nonfinite_values - self.num_overflowed_values or self.num_nonfinite_tokens)
