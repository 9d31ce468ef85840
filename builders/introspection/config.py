"""Settings of introspection."""

from typing import Literal, get_args

from builders.kit.columns import ChoiceSource
from tracekit.config import AnswerCaptureConfig, DrawConfig, PromptedConfig, ShotsConfig

__all__ = ["PASSES", "IntrospectionConfig", "Pass"]

Pass = Literal["mcq", "self_confidence", "other_confidence"]
"""What introspection asks of a question."""
PASSES: tuple[Pass, ...] = get_args(Pass)


class IntrospectionConfig(PromptedConfig, frozen=True, kw_only=True):
    """Multiple-choice questions: the model's answer, its confidence in itself, and in somebody else; traced."""

    source: ChoiceSource = ChoiceSource(split="test")
    """Which data."""
    prompt: ShotsConfig = ShotsConfig()
    """How a question becomes a prompt."""
    generation: DrawConfig = DrawConfig(num_beams=1, max_new_tokens=8)
    """How outputs are generated: one a question."""
    capture: AnswerCaptureConfig = AnswerCaptureConfig(sites=("hidden_states", "resid_post_mlp"))
    """What is recorded."""
    passes: tuple[Pass, ...] = PASSES
    """What is asked of every question, each pass a configuration of the dataset."""
    bin_edges: tuple[float, ...] = (0, 5, 10, 20, 40, 60, 80, 90, 100)
    """Edges of the confidence bins, percent, from 0 to 100."""
    bin_midpoints: tuple[float, ...] = ()
    """What each bin counts for, percent; its middle by default."""
    shuffle_options: bool = False
    """Show the options of each question in an order drawn by --seed; the same in every pass."""
    do_sample: bool = False
    """Draw outputs at --temperature, --top-p and --top-k; otherwise the most probable one is taken."""
