"""What every record has. A contract: `SCHEMA_VERSION` says which."""

import re

import msgspec

from tracekit.errors import DatasetError
from tracekit.tensors import TensorSpec

__all__ = [
    "NOTHING_GENERATED",
    "SCHEMA_VERSION",
    "GenerationSettings",
    "ModelInfo",
    "Record",
    "Span",
    "check_schema",
]

SCHEMA_VERSION = "2.1"
"""Version of the contract: major changes break readers, minor ones only add. What changed:

    2.1    `captured_from` of records and plans, `num_from_decoding` of manifests: whether traces of answers are those
           of the steps in which they were written; what the card and `--stats` say of a task, in the manifest
    2.0    checksums of every sample, in the record table and the sidecars (tracekit.format.checksums); what reading
           needs of a task, in plan and manifest; `generated_text` is prompt and answer in every task; columns of the
           record table that are no fields begin with `_`
    1.1    tensors in fewer bits, sparse attention
    1.0    the first
"""
_MAJORS = (1, 2)


def check_schema(version: str, *, where: object) -> bool:
    """Check that this tracekit reads a version of the contract; whether data of it has checksums.

    Raises:
        DatasetError: another major version, or no version at all.
    """
    found = re.fullmatch(r"([0-9]{1,6})\.[0-9]{1,6}", version)
    major = int(found[1]) if found else 0
    if major not in _MAJORS:
        raise DatasetError(
            f"{where}: written by tracekit schema {version}; this one reads {_MAJORS[0]}.0 to {_MAJORS[-1]}.x. "
            "Upgrade: pip install -U tracekit-llm"
        )
    return major > 1


class Span(msgspec.Struct, frozen=True, kw_only=True):
    """A named range of tokens."""

    name: str
    """`system`, `shots`, `user`, `assistant_header`, `thinking` or `answer`."""
    start: int
    """First token."""
    stop: int
    """One past the last token."""


class ModelInfo(msgspec.Struct, frozen=True, kw_only=True):
    """The model that made a sample."""

    id: str
    """Hub id, or the name of the local folder or file."""
    revision: str
    """Commit on the Hub, `sha256:...` of a local folder or file, or version of the package."""
    variant: str
    """`chat` where the tokenizer has a chat template, `base` where not."""
    adapter: str | None
    """Adapter, `name@revision`; null without one."""
    quantization: str | None
    """`int8(threshold=6)`, `nf4`; of a checkpoint stored so also `gptq-4bit`, `awq-4bit`, `fp8`, ...; null without.
    Weights that are unpacked on loading: `Q4_1, dequantised to float32`."""
    dtype: str
    """dtype in which the model computes."""
    attention: str
    """Attention of the capture pass: `eager` where probabilities are captured, else `auto`: transformers' choice."""


class GenerationSettings(msgspec.Struct, frozen=True, kw_only=True):
    """How an answer was generated."""

    do_sample: bool
    """False: deterministic (greedy or beams)."""
    num_beams: int
    """Number of beams; 1 is greedy."""
    max_new_tokens: int
    """Longest answer, tokens."""
    temperature: float
    """Softmax temperature; 1.0 where nothing is sampled."""
    top_p: float
    """Nucleus mass; 1.0 keeps all."""
    top_k: int
    """Most likely tokens kept; 0 keeps all."""


NOTHING_GENERATED = GenerationSettings(
    do_sample=False, num_beams=1, max_new_tokens=0, temperature=1.0, top_p=1.0, top_k=0
)
"""For tasks in which the model only reads."""


class Record(msgspec.Struct, frozen=True, kw_only=True, tag_field="task"):
    """Fields that every task's record has. A field that is added after 2.0 has a default, and readers ignore fields
    that they do not know: old readers read new records, and new readers old ones."""

    schema_version: str
    """Version of this contract."""
    key: str
    """Key of the sample, unique in its configuration; the names of its two tar members."""
    example_id: str
    """The source's own id of the example where it has one, else its row."""
    question_id: str
    """Shared by all samples of one question; split by it to keep train and test apart."""
    sample_index: int
    """Which answer to the question: 0 is the deterministic one."""
    config: str
    """Configuration of the dataset this sample belongs to."""
    split: str
    """Split of the source."""
    model: ModelInfo
    """The model."""
    prompt: str
    """The prompt as the model read it, chat template applied."""
    prompt_sha256: str
    """SHA-256 of `prompt` (UTF-8)."""
    input_sha256: str
    """SHA-256 of the user's own text, before any template."""
    template_sha256: str | None
    """SHA-256 of the chat template; null where a plain prompt was used."""
    token_ids: list[int]
    """Prompt and answer, exactly as captured: position t of every tensor is token t of this list."""
    tokens: list[str]
    """The tokens as the tokenizer writes them."""
    token_offsets: list[list[int]]
    """`[start, stop)` characters of each token in `prompt` followed by the generated text."""
    prompt_length: int
    """Number of prompt tokens; the answer starts at this position."""
    spans: list[Span]
    """Named token ranges: system, shots, user, assistant_header, thinking, answer (those that exist); choice_0, ..."""
    last_prompt_index: int
    """Position of the last prompt token, the one that predicts the first generated token."""
    first_answer_index: int | None
    """Position of the first token of the answer (after reasoning); null where the answer is empty."""
    last_answer_index: int | None
    """Position of the last token of the answer (before end-of-sequence); null where the answer is empty."""
    eos_included: bool
    """True where the last captured token is the end-of-sequence token."""
    tensors: list[TensorSpec]
    """Every tensor of the sample."""
    generation: GenerationSettings
    """How the answer was generated."""
    seed: int
    """Seed of the run."""
    captured_from: str = "pass"
    """`decoding`: the tensors are what the model computed while it wrote the answer; `pass`: what it computes in a pass
    over prompt and answer (of beams: over the prompt, and then over the answer). Equal up to rounding."""

    def task_name(self) -> str:
        """Name of the task, the record's tag."""
        return str(type(self).__struct_config__.tag)
