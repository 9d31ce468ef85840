"""The records: what is known of one sample besides its tensors. A contract; see SCHEMA_VERSION.

A record is one JSON object, written by msgspec, tagged by `task`. Rules that keep Arrow and pandas from losing
anything: every key is always present, no maps with data-dependent keys (lists of structs instead), floats carry a
decimal point and are finite, null stands only where a field is declared `| None`. There is no clock, no absolute path
and no machine state in a record: the same run gives the same bytes.

This module knows msgspec and, when asked for a table's schema, pyarrow.
"""

import ast
import inspect
import textwrap
import types
import typing
from functools import cache
from typing import TYPE_CHECKING, Any, get_args, get_origin

import msgspec

from tracekit.errors import CorruptShardError, DatasetError
from tracekit.tensors import TensorSpec

if TYPE_CHECKING:
    import pyarrow as pa

__all__ = [
    "RECORD_TYPES",
    "SCHEMA_VERSION",
    "GenerationSettings",
    "ModelInfo",
    "Record",
    "SampledAnswer",
    "Span",
    "TriviaQARecord",
    "arrow_schema",
    "decode_record",
    "encode_record",
    "field_docs",
    "json_schema",
]

SCHEMA_VERSION = "1.0"
"""Version of the contract: major changes break readers, minor ones only add."""


class Span(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A named range of tokens."""

    name: str
    """`system`, `shots`, `user`, `assistant_header`, `thinking` or `answer`."""
    start: int
    """First token."""
    stop: int
    """One past the last token."""


class ModelInfo(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
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
    """`int8`, `int8(threshold=6.0)`, `nf4`; null without."""
    dtype: str
    """dtype in which the model computes."""
    attention: str
    """Attention of the capture pass: `eager` where probabilities are captured, else `auto`: transformers' choice."""


class GenerationSettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
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


class SampledAnswer(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One more answer to the same question, drawn by sampling."""

    sample_index: int
    """1, 2, ...; 0 is the deterministic answer of the record itself."""
    text: str
    """The answer, cleaned as `generated_answer` is."""
    token_ids: list[int]
    """Generated token ids, end-of-sequence included where there is one."""
    token_logprobs: list[float]
    """Log-probability of each under the raw model (no temperature), nats."""
    finish_reason: str
    """`stop` or `length`."""
    is_correct: bool
    """By the same rule as the record's `is_correct`."""


class Record(msgspec.Struct, frozen=True, kw_only=True, tag_field="task", forbid_unknown_fields=True):
    """Fields that every task's record has."""

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
    """Named token ranges: system, shots, user, assistant_header, thinking, answer (those that exist)."""
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

    def task_name(self) -> str:
        """Name of the task, the record's tag."""
        return str(type(self).__struct_config__.tag)


class TriviaQARecord(Record, frozen=True, kw_only=True, tag="trivia_qa", forbid_unknown_fields=True):
    """One question, one answer, and whether it is right."""

    question: str
    """The question."""
    generated_text: str
    """Everything: prompt and generated tokens, special tokens included; `token_offsets` count in it."""
    generated_answer: str
    """The answer alone: no prompt, no reasoning, no special tokens."""
    generated_token_ids: list[int]
    """Generated token ids, end-of-sequence included where there is one."""
    num_layers: int
    """Number of transformer blocks."""
    ground_truth_answers: list[str]
    """Every accepted answer; the first is the source's main one."""
    global_example_id: int
    """Row of the example in the source, counted from 0."""
    shard: int
    """Number of the shard that holds the sample."""
    index_in_shard: int
    """Place of the sample in its shard."""
    token_logprobs: list[float]
    """Log-probability of each generated token under the raw model, nats."""
    token_entropies: list[float]
    """Entropy of the raw next-token distribution at each generated token, nats."""
    finish_reason: str
    """`stop` (end of sequence) or `length` (cut at max_new_tokens)."""
    is_truncated: bool
    """True where max_new_tokens ran out before the answer came to its end (a plain prompt's ends with its line)."""
    beam_score: float | None
    """Score of the winning beam, transformers' `sequences_scores`: summed log-probability divided by the number of
    generated tokens, nats; null without beams."""
    matched_alias: str | None
    """The accepted answer that was found in the generated one; null where none was."""
    matched_alias_span: list[int] | None
    """`[start, stop)` tokens of that alias; null where none was found."""
    is_correct: bool
    """Whether the answer is right, by `correctness_rule`."""
    correctness_rule: str
    """`exact_match` (normalised, any alias) or `alias_in_answer`."""
    exact_match: bool
    """Normalised exact match with any alias (TriviaQA's normalisation)."""
    f1: float
    """Best token F1 over the aliases, 0 to 1."""
    samples: list[SampledAnswer]
    """Further answers, from num_samples > 1; empty otherwise."""


RECORD_TYPES: dict[str, type[Record]] = {"trivia_qa": TriviaQARecord}
"""Record type of every task."""

_DECODERS = {task: msgspec.json.Decoder(record_type) for task, record_type in RECORD_TYPES.items()}


class _Tag(msgspec.Struct):
    """Just the tag of a record."""

    task: str


def encode_record(record: Record) -> bytes:
    """Encode a record as JSON.

    Raises:
        DatasetError: a value cannot be represented, as a float that is not finite where null is not declared.
    """
    data = msgspec.json.encode(record)
    try:
        decode_record(data)
    except CorruptShardError as error:
        raise DatasetError(f"record {record.key!r} does not survive a round trip (not finite?): {error}") from error
    return data


def decode_record(data: bytes | memoryview, *, where: str = "record") -> Record:
    """Decode and check one record.

    Raises:
        CorruptShardError: not JSON, an unknown task, or a field that is missing, unknown or of the wrong type.
    """
    try:
        task = msgspec.json.decode(data, type=_Tag).task
        if task not in _DECODERS:
            known = ", ".join(RECORD_TYPES)
            raise CorruptShardError(f"{where}: unknown task {task!r}; this tracekit knows: {known}. Upgrade tracekit?")
        return _DECODERS[task].decode(data)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise CorruptShardError(f"{where}: {error}") from error


def json_schema(record_type: type[Record]) -> dict[str, Any]:
    """JSON Schema of a record type, each field with its description."""
    schema = msgspec.json.schema(record_type)
    for struct in _structs_of(record_type):
        properties = schema["$defs"][struct.__name__]["properties"]
        for name, text in field_docs(struct).items():
            if name in properties:
                properties[name]["description"] = text
    return schema


def arrow_schema(record_type: type[Record]) -> "pa.Schema":
    """Arrow schema of a record type: `task`, then its fields in order."""
    import pyarrow as pa

    fields = [pa.field("task", pa.string(), nullable=False)]
    fields += [_arrow_field(field) for field in msgspec.structs.fields(record_type)]
    return pa.schema(fields)


@cache
def field_docs(struct: type) -> dict[str, str]:
    """The docstring under each field of a Struct, inherited ones first."""
    docs: dict[str, str] = {}
    for base in reversed(struct.__mro__):
        if base is msgspec.Struct or not issubclass(base, msgspec.Struct):
            continue
        body = ast.parse(textwrap.dedent(inspect.getsource(base))).body[0]
        assert isinstance(body, ast.ClassDef), base
        for field, text in zip(body.body, body.body[1:], strict=False):
            if isinstance(field, ast.AnnAssign) and isinstance(text, ast.Expr) and isinstance(text.value, ast.Constant):
                assert isinstance(field.target, ast.Name)
                docs[field.target.id] = str(text.value.value)
    return docs


def _arrow_field(field: msgspec.structs.FieldInfo) -> "pa.Field":
    import pyarrow as pa

    arrow_type, nullable = _arrow_type(field.type)
    return pa.field(field.encode_name, arrow_type, nullable=nullable)


def _arrow_type(annotation: Any) -> tuple["pa.DataType", bool]:
    """Arrow type of an annotation, and whether null is declared."""
    import pyarrow as pa

    if get_origin(annotation) in (types.UnionType, typing.Union):
        (inner,) = (argument for argument in get_args(annotation) if argument is not type(None))
        return _arrow_type(inner)[0], True
    if get_origin(annotation) is list:
        return pa.list_(_arrow_type(get_args(annotation)[0])[0]), False
    if isinstance(annotation, type) and issubclass(annotation, msgspec.Struct):
        return pa.struct([_arrow_field(field) for field in msgspec.structs.fields(annotation)]), False
    scalars = {str: pa.string(), int: pa.int64(), float: pa.float64(), bool: pa.bool_()}
    return scalars[annotation], False


def _structs_of(record_type: type[msgspec.Struct]) -> list[type[msgspec.Struct]]:
    """A Struct and all Structs inside it."""
    found: list[type[msgspec.Struct]] = []
    waiting: list[Any] = [record_type]
    while waiting:
        annotation = waiting.pop()
        if isinstance(annotation, type) and issubclass(annotation, msgspec.Struct):
            if annotation not in found:
                found.append(annotation)
                waiting += [field.type for field in msgspec.structs.fields(annotation)]
        else:
            waiting += get_args(annotation)
    return found
