"""Settings of nonsense_entities."""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, ClassVar, Literal

import msgspec

from builders.judging.config import JUDGED_BY, JudgeConfig
from builders.nonsense_entities.names import SAMPLES
from tracekit.clients.client import ClientConfig
from tracekit.config import GenerationConfig, PromptedConfig, SourceConfig

__all__ = ["NamesConfig", "NonsenseConfig"]


class NamesConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Which names are invented; the stage `questions` alone reads it."""

    species: str | None = None
    """TSV of real animals (class, genus, scientific_name, english_name); a small list of our own by default."""
    plants: str | None = None
    """JSON of real plants ({"plants": [{"name", "species"}]}); likewise."""
    medicines: str | None = None
    """JSON of real medicines ({"drugs": [...]}); likewise."""
    num_names: Annotated[int, msgspec.Meta(ge=1)] = 12
    """Names to invent in each domain."""
    num_wordings: Annotated[int, msgspec.Meta(ge=1)] = 12
    """Wordings in which each name is asked about."""
    controls: Annotated[int, msgspec.Meta(ge=0)] = 0
    """Real names in each domain that are asked about in the same way."""

    def files(self) -> dict[str, Path]:
        """The list of each domain."""
        given = {"animals": self.species, "plants": self.plants, "medicines": self.medicines}
        return {name: SAMPLES[name] if path is None else Path(path).expanduser() for name, path in given.items()}


class NonsenseConfig(PromptedConfig, frozen=True, kw_only=True):
    """Questions about things that do not exist: invented, answered and traced, judged."""

    not_recorded: ClassVar[tuple[str, ...]] = ("stages", "names", "judge", "client")
    local_files: ClassVar[tuple[str, ...]] = ("names.species", "names.plants", "names.medicines")
    local_models: ClassVar[tuple[str, ...]] = ("judge.judge",)
    stages_read: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "questions": ("names", "output.seed", "output.dataset_config"),
        "evaluate": JUDGED_BY,
    }
    source: SourceConfig = SourceConfig(split="test")
    """Which of the questions."""
    generation: GenerationConfig = GenerationConfig(num_beams=1, max_new_tokens=96)
    """How answers are generated: one a question."""
    stages: tuple[Literal["questions", "answers", "evaluate"], ...] = ("questions", "answers", "evaluate")
    """What to do, in this order."""
    names: NamesConfig = NamesConfig()
    """Which names are invented."""
    judge: JudgeConfig = JudgeConfig()
    """Who judges."""
    client: ClientConfig = ClientConfig()
    """How a judge that is a model is asked."""
