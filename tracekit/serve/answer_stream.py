"""An answer stream: one request of a batch while its answer comes, by tokens, and what the client can be told of it."""

from typing import Any

from tracekit.model.generation import Generated, NewToken
from tracekit.serve.replies import TextPiece, TokenUsage
from tracekit.serve.samples import More, ServeJob, WholeAnswer
from tracekit.serve.texts import TextStream

__all__ = ["AnswerStream"]


class AnswerStream:
    """Text and log-probabilities of one answer. The tokens that are told of join to the text, as far as it is sent."""

    def __init__(self, tokenizer: Any, job: ServeJob) -> None:
        self.job = job
        self._stream = TextStream(tokenizer, job.prompt.token_ids, job.asked.stop)
        self._waiting: list[TextPiece] = []
        self._new_ids: list[int] = []

    @property
    def has_stopped(self) -> bool:
        """Whether a stop string came."""
        return self._stream.stop_string is not None

    def take(self, made: NewToken) -> None:
        """Take in a token, and send what is certain by it."""
        stream = self._stream
        self._new_ids.append(made.token_id)
        best = [(stream.alternative(token_id), value) for token_id, value in made.best]
        start = len(stream.whole)
        text = stream.add(made.token_id)
        if made.logprob is not None:
            self._waiting.append(TextPiece(stream.whole[start:], made.logprob, best, start))
        self._send(text, self._settled())

    def finish(self, generated: Generated) -> WholeAnswer:
        """Send the rest; the answer, once no more tokens come."""
        stream = self._stream
        text = stream.finish()
        if self.has_stopped:
            self._send(text, self._settled())
        else:
            if self._waiting:  # bytes that are no character come with the last token
                last = self._waiting[-1]
                self._waiting[-1] = last._replace(token=stream.whole[last.start :])
            self._send(text, self._waiting)
        usage = TokenUsage(len(self.job.prompt.token_ids), len(generated.token_ids))
        return WholeAnswer(generated, stream.text, stream.stop_string, usage)

    def _send(self, text: str, pieces: list[TextPiece]) -> None:
        if text or pieces:
            self.job.send(More(text, pieces, self._new_ids))
            self._new_ids = []

    def _settled(self) -> list[TextPiece]:
        """The tokens whose text is sent. Of one that a stop string cuts, the part before it; none that come later."""
        end = len(self._stream.text)
        count = 0
        for piece in self._waiting:
            is_whole = piece.start + len(piece.token) <= end
            if piece.start >= end or not (is_whole or self.has_stopped):
                break
            count += 1
        settled = [piece._replace(token=piece.token[: end - piece.start]) for piece in self._waiting[:count]]
        self._waiting = self._waiting[count:]
        return settled
