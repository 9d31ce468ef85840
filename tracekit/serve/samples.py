"""Samples: a request, its answer and what was captured in, a sample out. Pure."""

from collections.abc import Callable
from typing import NamedTuple

from tracekit.answering import answered_fields
from tracekit.model.answers import parse_answer
from tracekit.model.capture import Text, Trace
from tracekit.model.generation import Decoding, Generated
from tracekit.model.prompts import Prompt, sha256_text
from tracekit.model.traced import TracedModel
from tracekit.records import GenerationSettings
from tracekit.serve.forms import Asked
from tracekit.serve.record import ServeRecord
from tracekit.serve.replies import TextPiece, TokenUsage
from tracekit.task import Place, TracedSample

__all__ = ["Failed", "More", "ServeJob", "WholeAnswer", "make_sample", "text_of"]


class More(NamedTuple):
    """More of an answer's text."""

    text: str
    pieces: list[TextPiece]
    token_ids: list[int]
    """The tokens that came since the last of it."""


class WholeAnswer(NamedTuple):
    """An answer that is complete."""

    generated: Generated
    """The tokens; `finish_reason` is `stop` after an end-of-sequence token alone."""
    text: str
    """What the client receives."""
    stop_string: str | None
    """The stop string that ended it."""
    usage: TokenUsage
    is_kept: bool = False
    """Whether its sample is written and survives a crash."""

    @property
    def finish_reason(self) -> str:
        """`stop` or `length`, as the API says it."""
        return "stop" if self.stop_string is not None else self.generated.finish_reason


class Failed(NamedTuple):
    """A request that was admitted and could not be answered."""

    message: str
    code: str = "not_answered"


class ServeJob(NamedTuple):
    """One admitted request on its way."""

    key: str | None
    """Key of its sample; None where nothing of it is to be written."""
    asked: Asked
    prompt: Prompt
    decoding: Decoding
    send: Callable[[More | WholeAnswer | Failed], object]
    """Takes what there is to say to the client; called from the thread that has the model."""
    started: float
    """When it was admitted, by the monotonic clock."""


def text_of(job: ServeJob, answer: WholeAnswer) -> Text:
    """Prompt and answer as they are captured."""
    return Text(job.prompt.token_ids + answer.generated.token_ids, len(job.prompt.token_ids))


def make_sample(
    traced: TracedModel, job: ServeJob, answer: WholeAnswer, trace: Trace, place: Place, *, split: str, seed: int
) -> TracedSample:
    """The sample of a request that was answered and captured."""
    assert job.key is not None, "this one opted out"
    generated, asked, decoding = answer.generated, job.asked, job.decoding
    parsed = parse_answer(
        traced.tokenizer, job.prompt, generated.token_ids, eos_included=generated.eos_included, is_one_line=False
    )
    is_sampled = decoding.temperature > 0
    fields = answered_fields(traced, job.prompt, parsed, generated, trace, place)
    fields["finish_reason"] = answer.finish_reason
    record = ServeRecord(
        **fields,
        key=job.key,
        example_id=job.key,
        question_id=sha256_text(job.prompt.text),
        sample_index=int(is_sampled),
        split=split,
        input_sha256=sha256_text(job.prompt.input_text),
        generation=GenerationSettings(
            do_sample=is_sampled,
            num_beams=1,
            max_new_tokens=decoding.max_new_tokens,
            temperature=decoding.temperature if is_sampled else 1.0,
            top_p=decoding.top_p if is_sampled else 1.0,
            top_k=decoding.top_k if is_sampled else 0,
        ),
        seed=seed,
        endpoint=asked.endpoint,
        messages=asked.messages,
        generated_text=parsed.whole_text,
        generated_answer=answer.text,
        generated_token_ids=generated.token_ids,
        token_logprobs=trace.next_tokens.logprobs.tolist(),
        token_entropies=trace.next_tokens.entropies.tolist(),
        stop_string=answer.stop_string,
        stop=asked.stop,
        request_seed=asked.seed,
        is_streamed=asked.is_streamed,
        is_truncated=answer.finish_reason == "length",
        shard=place.shard,
    )
    return TracedSample(record, text_of(job, answer), trace)
