"""The batcher: one thread that has the model. Requests in by a bounded queue, answers out as they come, samples kept.

    submit -> queue (at most max_queue) -> batch -> generate, texts sent as they come -> capture -> write -> their ends
    sent -> next batch

The end of an answer is sent once its sample is written, so that who has a whole answer has its sample, whatever happens
to the server; one that opted out ends at once. A batch is captured and written before the next one is generated, so
that at most one batch of tensors is in memory, however slow the disk is; what comes meanwhile waits in the queue, and
past its end is refused.
"""

import json
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from tracekit.config import AnswerCaptureConfig
from tracekit.console import now, say
from tracekit.errors import CaptureError, DatasetError, TracekitError
from tracekit.format.layout import Layout, append_line, is_no_space
from tracekit.format.manifest import Verification
from tracekit.model.capture import Trace, capture
from tracekit.model.decoding import DecodedTraces, ToAnswer
from tracekit.model.generation import Generated, Listener, NewToken, answer_variously
from tracekit.model.memory import is_out_of_memory
from tracekit.model.proof import replay
from tracekit.model.traced import TracedModel
from tracekit.run.padding import Padded, padded, to_replay
from tracekit.serve.answer_stream import AnswerStream
from tracekit.serve.forms import Asked, RequestError
from tracekit.serve.growing import GrowingDataset, full_for_now, told_of_space
from tracekit.serve.samples import Failed, ServeJob, WholeAnswer, make_sample, text_of
from tracekit.serve.settings import ServerSettings

__all__ = ["Batcher"]

_RETRY_SECONDS = 1
_STOPPED = "the server stopped before this request was answered; ask again later"
_GONE = "the folder of the server's dataset was deleted, moved or replaced, so nothing can be logged; the server stops"
_FULL = (
    "the disk of the server is full, so this request could not be logged and is not answered; free some space and ask "
    'again, or opt out of logging ("store": false)'
)


class Batcher:
    """Answers requests with one model and logs them. Use as a context manager: leaving it finishes what was admitted.

    `failure` says why it stopped by itself, if it did: what proves wrong ends the server, and so does a folder that is
    deleted or replaced; the requests of that batch get an error in place of their end. Where the disk is full they get
    one too, and the server goes on. `on_end` is called from its thread when it has stopped.

    Raises (on leaving): nothing; see `failure`.
    """

    def __init__(
        self,
        traced: TracedModel,
        dataset: GrowingDataset,
        layout: Layout,
        capture_config: AnswerCaptureConfig,
        settings: ServerSettings,
        *,
        split: str,
        seed: int,
        on_end: Callable[[], object],
    ) -> None:
        self._traced, self._dataset, self._layout = traced, dataset, layout
        self._capture_config, self._settings = capture_config, settings
        self._split, self._seed, self._on_end = split, seed, on_end
        self._waiting: deque[ServeJob] = deque()
        self._in_hand: list[ServeJob] = []
        self._changed = threading.Condition()
        self._is_draining = False
        self._max_batch = settings.max_batch
        self._padding = 0
        self._unreplayed: list[Padded] = []
        self._thread = threading.Thread(target=self._run, name="tracekit-engine")
        self.has_ended_well = False
        self.failure: TracekitError | OSError | None = None

    def __enter__(self) -> "Batcher":
        self._layout.log.parent.mkdir(parents=True, exist_ok=True)
        self._thread.start()
        return self

    def __exit__(self, *of: object) -> None:
        self.drain()
        self._thread.join()

    def drain(self) -> None:
        """Take nothing more; end once everything that was admitted is answered and written."""
        with self._changed:
            self._is_draining = True
            self._changed.notify()

    @property
    def is_draining(self) -> bool:
        """Whether no more requests are taken."""
        return self._is_draining

    def check_room(self, num_prompts: int = 1) -> None:
        """Refuse a request before work goes into it.

        Raises:
            RequestError: the queue is full (429) or never has room for so many (400), or the server is stopping (503).
        """
        if self._is_draining:
            raise RequestError("the server is stopping; it takes no more requests", status=503, code="stopping")
        try:
            self._dataset.check_place()
        except DatasetError as error:
            raise self._fail(error) from error
        if num_prompts > self._settings.max_queue:
            raise RequestError(
                f"{num_prompts} prompts in one request, and --max-queue is {self._settings.max_queue}; send fewer",
                param="prompt",
                code="invalid_value",
            )
        if len(self._waiting) + num_prompts > self._settings.max_queue:
            raise RequestError(
                f"{len(self._waiting)} requests are waiting, and --max-queue is {self._settings.max_queue}; try again",
                status=429,
                code="queue_full",
                retry_after=_RETRY_SECONDS,
            )

    def submit(self, make_jobs: Sequence[Callable[[str | None], ServeJob]], *, is_logged: bool) -> list[ServeJob]:
        """Admit a request, all of its prompts or none; each of `make_jobs` is given the key of its sample, None for one
        that opted out.

        Raises: as `check_room`; RequestError (503) too where no key can be noted, since the disk is full.
        """
        with self._changed:
            self.check_room(len(make_jobs))
            try:
                jobs = [make_job(self._dataset.take_key() if is_logged else None) for make_job in make_jobs]
            except (TracekitError, OSError) as error:
                if isinstance(error, OSError) and is_no_space(error):
                    raise RequestError(_FULL, status=503, code="disk_full") from error
                raise self._fail(error) from error
            self._waiting.extend(jobs)
            self._changed.notify()
        return jobs

    def _fail(self, error: TracekitError | OSError) -> RequestError:
        """End the server by an error; what the request that met it is answered."""
        with self._changed:
            self.failure = self.failure or error
            self._is_draining = True
            self._changed.notify()
        return RequestError(self._why_stopped, status=503, code="not_answered")

    @property
    def _why_stopped(self) -> str:
        """What a client is told of the end: nothing of this machine's paths."""
        return _GONE if isinstance(self.failure, DatasetError) else _STOPPED

    def log(self, asked: Asked | None, status: int, **numbers: Any) -> None:
        """One line a request: what differs from run to run lives here, not in the data; and nothing of a text."""
        line = {
            "time": now(),
            "status": status,
            "endpoint": None if asked is None else asked.endpoint,
            **numbers,
        }
        told = [f"{name} {value}" for name, value in numbers.items() if value is not None]
        try:
            self._dataset.check_place()  # or the folder would be made again
            append_line(self._layout.log, json.dumps(line))
        except (OSError, DatasetError) as error:  # no sample needs it: a request is answered, or refused, all the same
            why = "the folder is gone" if isinstance(error, DatasetError) else os.strerror(error.errno or 0)
            told.append(f"not in {self._layout.log.name}: {why}")
        more = ", ".join(told)
        say(f"{status} {line['endpoint'] or 'refused'}{f' ({more})' if told else ''}")

    def _run(self) -> None:
        try:
            while self._next_batch():
                self._work()
                if self._dataset.seconds_left() == 0:
                    self._close_shard()
            self._close_shard()
            self._dataset.close_shard()
            self.has_ended_well = True
        except (TracekitError, OSError) as error:
            told = told_of_space(error, self._layout.root) if isinstance(error, OSError) else error
            self.failure = self.failure or told
        finally:  # whatever it was, nobody is left waiting
            with self._changed:
                self._is_draining = True
                left = [*self._in_hand, *self._waiting]
                self._waiting.clear()
            for job in left:
                job.send(Failed(self._why_stopped))
            self._on_end()

    def _next_batch(self) -> bool:
        """Take the next requests in hand, or none where a shard is due; False where nothing more will come."""
        with self._changed:
            while not self._waiting:
                left = self._dataset.seconds_left()
                if self._is_draining or left == 0:
                    return not self._is_draining
                self._changed.wait(left)
            deadline = time.monotonic() + self._settings.batch_wait_ms / 1000
            while len(self._waiting) < self._max_batch and not self._is_draining:
                if (left := deadline - time.monotonic()) <= 0:
                    break
                self._changed.wait(left)
            self._in_hand = [self._waiting.popleft() for _ in range(min(self._max_batch, len(self._waiting)))]
        return True

    def _work(self) -> None:
        """Answer the requests in hand; capture and write those that are logged, and then send their ends."""
        if not self._in_hand:
            return
        jobs = list(self._in_hand)
        decoded = DecodedTraces(
            self._traced,
            [ToAnswer(job.prompt.token_ids) for job in jobs],
            [job.key is not None for job in jobs],
            self._capture_config,
            max_new_tokens=max(job.decoding.max_new_tokens for job in jobs),
        )
        answers = self._answer(jobs, decoded)
        rows = {row: (job, one) for row, (job, one) in enumerate(zip(jobs, answers, strict=True)) if job.key and one}
        logged = list(rows.values())
        try:
            kept = self._keep(self._decoded(decoded, rows) or self._captured(logged)) if logged else set()
        except OSError as error:
            if not is_no_space(error):
                raise
            say(full_for_now(error, self._layout.root))
            for job, _ in logged:
                self._in_hand.remove(job)
                job.send(Failed(_FULL, code="disk_full"))
            return
        for job, answer in logged:
            self._send_end(job, answer._replace(is_kept=job.key in kept), len(jobs))

    def _answer(self, jobs: Sequence[ServeJob], decoded: DecodedTraces) -> list[WholeAnswer | None]:
        """Generate the answers of a batch and send each as it comes; None for one that memory did not suffice for."""
        rows = [AnswerStream(self._traced.tokenizer, job) for job in jobs]
        answers: list[WholeAnswer | None] = [None] * len(jobs)

        def step(number: int, made: NewToken) -> bool:
            rows[number].take(made)
            return rows[number].has_stopped

        def end(number: int, generated: Generated) -> None:
            answers[number] = answer = rows[number].finish(generated)
            if jobs[number].key is None:
                self._send_end(jobs[number], answer, len(jobs))

        ids, decodings = [job.prompt.token_ids for job in jobs], [job.decoding for job in jobs]
        try:
            answer_variously(self._traced, ids, decodings, Listener(step, end), recording=decoded.recording)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            self._max_batch = max(1, len(jobs) // 2)
            say(f"out of memory with {len(jobs)} requests; from here on {self._max_batch} at once")
            for job, answer in zip(jobs, answers, strict=True):
                if answer is None:
                    self._in_hand.remove(job)
                    job.send(Failed("the server ran out of memory; ask again, for fewer tokens"))
        return answers

    def _send_end(self, job: ServeJob, answer: WholeAnswer, num_together: int) -> None:
        self._in_hand.remove(job)
        job.send(answer)
        self._log_answered(job, answer, num_together)

    def _keep(self, kept: Sequence[tuple[ServeJob, WholeAnswer, Trace]]) -> set[str | None]:
        """Write what was answered and captured; the keys of what is written now."""
        if not kept:
            return set()
        place, is_first = self._dataset.place(), self._dataset.is_shard_empty
        samples = [
            make_sample(self._traced, job, answer, trace, place, split=self._split, seed=self._seed)
            for job, answer, trace in kept
        ]
        batch = padded(self._traced, samples)
        self._padding = 0 if is_first else self._padding
        verification = self._replayed(batch, is_outer=is_first or self._dataset.fills(len(samples)))
        self._dataset.add(samples, verification)
        count = self._capture_config.num_replays if verification is None else 0
        self._unreplayed = to_replay(batch, count, is_outer=True, so_far=0)
        return {job.key for job, _, _ in kept}

    def _close_shard(self) -> None:
        """Close the open shard, or later where the disk is full; only now is it known which batch is its last one."""
        verification = self._replayed(self._unreplayed, is_outer=True) if self._unreplayed else None
        if self._dataset.try_to_close(verification):
            self._unreplayed = []

    def _decoded(
        self, decoded: DecodedTraces, rows: Mapping[int, tuple[ServeJob, WholeAnswer]]
    ) -> list[tuple[ServeJob, WholeAnswer, Trace]]:
        """Texts with what was captured while they were decoded; those that were not are captured now. None of them,
        where one cannot be captured or memory runs out."""
        try:
            traces = decoded.traces({row: text_of(*pair) for row, pair in rows.items()})
        except (CaptureError, RuntimeError, MemoryError) as error:
            if not isinstance(error, CaptureError) and not is_out_of_memory(error):
                raise
            return []
        rest = [pair for row, pair in rows.items() if row not in traces]
        whole = [*((*rows[row], trace) for row, trace in traces.items()), *(self._captured(rest) if rest else [])]
        order = [job.key for job, _ in rows.values()]
        return sorted(whole, key=lambda one: order.index(one[0].key))

    def _captured(self, pairs: Sequence[tuple[ServeJob, WholeAnswer]]) -> list[tuple[ServeJob, WholeAnswer, Trace]]:
        """Capture texts together; in smaller parts where memory runs out, or to find the one that cannot be captured.
        That one is left out, and said so."""
        try:
            traces = capture(self._traced, [text_of(job, answer) for job, answer in pairs], self._capture_config)
            return [(job, answer, trace) for (job, answer), trace in zip(pairs, traces, strict=True)]
        except (CaptureError, RuntimeError, MemoryError) as error:
            if not isinstance(error, CaptureError) and not is_out_of_memory(error):
                raise
            if len(pairs) == 1:
                reason = str(error) if isinstance(error, CaptureError) else "out of memory"
                say(f"{pairs[0][0].key} is answered but not logged: {reason}")
                return []
        middle = len(pairs) // 2
        return self._captured(pairs[:middle]) + self._captured(pairs[middle:])

    def _replayed(self, batch: Sequence[Padded], *, is_outer: bool) -> Verification | None:
        """Run some samples of a batch again alone, those of `to_replay`; None where that is none of them.

        Raises:
            CaptureError: an error is past the tolerance, or there is no memory for it.
        """
        chosen = to_replay(batch, self._capture_config.num_replays, is_outer=is_outer, so_far=self._padding)
        self._padding = max([self._padding, *(one.padding for one in chosen)])
        result = Verification.nothing()
        for sample in (one.sample for one in chosen):
            try:
                once = replay(self._traced, sample.record.key, sample.text, sample.trace, self._capture_config)
            except (RuntimeError, MemoryError) as error:
                if isinstance(error, CaptureError) or not is_out_of_memory(error):
                    raise
                raise CaptureError("out of memory at replaying a sample; --num-replays 0 leaves it out") from error
            result = result.with_more(once)
        return result if chosen else None

    def _log_answered(self, job: ServeJob, answer: WholeAnswer, num_together: int) -> None:
        self.log(
            job.asked,
            200,
            key=job.key if answer.is_kept else None,
            num_prompt_tokens=answer.usage.num_prompt,
            num_new_tokens=answer.usage.num_new,
            finish_reason=answer.finish_reason,
            ms=round(1000 * (time.monotonic() - job.started)),
            num_together=num_together,
        )
