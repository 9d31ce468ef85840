"""Judges: answers in, labels out. By rules, which need no model, or by a model that is asked.

    rules          abstention by phrases, then right where the answer names a gold one and stands by it; the default
    a model        two questions in JSON: does it abstain? then: correct, incorrect or unverifiable?

Both leave two cases unasked: an answer that is empty, and one without any gold answer, are unverifiable. An abstention
without a gold answer is still one; an empty answer is none, because nothing says why there is nothing.

A model's reply that cannot be read is asked for again, drawn with another seed and with a reminder. After the last time
the sample has no label, and says why.
"""

import hashlib
import json
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol

from builders.judging.abstention import without_abstentions
from builders.judging.config import JudgeConfig
from builders.judging.existence import treats_as_real
from builders.judging.prompts import (
    ABSTENTION,
    EXISTENCE,
    REMINDER,
    VERDICT,
    JudgeQuestion,
    parse_reply,
    prompts_sha256,
)
from builders.judging.rule_matching import names_gold
from builders.kit.scoring import exact_match
from tracekit.clients.client import ChatMessage, Client, ClientConfig, Request
from tracekit.config import ModelConfig
from tracekit.format.labels import Label

__all__ = [
    "RULES_SHA256",
    "RULES_VERSION",
    "Judge",
    "JudgeConfig",
    "Judged",
    "ModelJudge",
    "RuleJudge",
    "What",
    "open_judge",
    "set_name",
]

What = Literal["answers", "existence"]
"""What is judged: whether answers are right, or whether they take an invented thing for real."""

MAX_REASKS = 2
"""Times that a reply which cannot be read is asked for again."""
REASK_TEMPERATURE = 0.7
"""Re-asked replies are drawn: the most probable one was just seen to be of no use."""
_CHUNK = 64


class Judged(NamedTuple):
    """One answer, with what is needed to judge it."""

    key: str
    """Key of its sample."""
    question: str
    """What was asked."""
    gold: Sequence[str]
    """Answers that count as right; none where nobody knows, and for questions about invented things."""
    answer: str
    """The answer."""
    subject: str | None = None
    """Name of the thing that was asked about; None where the question is not about one."""

    def sha256(self) -> str:
        """SHA-256 of what is judged: the key is left out, and the subject, which stands in the question."""
        whole = json.dumps([self.question, list(self.gold), self.answer], ensure_ascii=False)
        return hashlib.sha256(whole.encode()).hexdigest()


OnLabels = Callable[[Sequence[Label]], object]


class Judge(Protocol):
    """Anything that labels answers."""

    name: str
    """Who judges: stands in every label."""
    prompt_sha256: str
    """SHA-256 of its prompts or rules."""
    settings: dict[str, Any]
    """What else shapes its labels."""

    @property
    def summary(self) -> str | None:
        """What was asked so far and what it took; None for rules."""
        ...

    def judge(self, examples: Sequence[Judged], on_labels: OnLabels) -> None:
        """Label all of these; `on_labels` is given labels some at a time, in order, as soon as they are there."""
        ...


def set_name(judge: Judge) -> str:
    """Name of the label set that a judge makes: a short name, and eight hex digits of all that shapes its labels."""
    whole = json.dumps([judge.name, judge.prompt_sha256, judge.settings], sort_keys=True)
    short = re.sub(r"[^A-Za-z0-9]+", "-", judge.name.partition("@")[0].rstrip("/").rpartition("/")[2]).strip("-")
    return f"{short[:40] or 'judge'}-{hashlib.sha256(whole.encode()).hexdigest()[:8]}"


RULES_VERSION = "1"
"""Version of all rules: raised with every change of a label that they give, and with nothing else."""
RULES_SHA256 = hashlib.sha256(f"tracekit rules {RULES_VERSION}".encode()).hexdigest()
"""What names their label sets, as the SHA-256 of its prompts names those of a model."""


class RuleJudge:
    """Phrases and aliases: fast, without any model, and blind to whatever is said in other words."""

    name = "rules"
    prompt_sha256 = RULES_SHA256
    summary: str | None = None

    def __init__(self, what: What = "answers") -> None:
        self._what: What = what
        self.settings: dict[str, Any] = {"what": what}

    def judge(self, examples: Sequence[Judged], on_labels: OnLabels) -> None:
        """Label all of these."""
        on_labels([self.label(example) for example in examples])

    def label(self, example: Judged) -> Label:
        """Label one answer."""
        if not example.answer.strip():
            return _unverifiable(self, example, self._what)
        if self._what == "existence":
            return _label(self, example, verdict=treats_as_real(example.answer, example.subject))
        said = None if exact_match(example.answer, example.gold) else without_abstentions(example.answer)
        if said == "":
            return _label(self, example, is_abstention=True)
        if not example.gold:
            return _label(self, example, is_abstention=False, verdict="unverifiable")
        is_correct = names_gold(example.answer if said is None else said, example.gold, question=example.question)
        return _label(self, example, is_abstention=False, verdict="correct" if is_correct else "incorrect")


class ModelJudge:
    """A model that is asked, one question after the other."""

    def __init__(self, client: Client, what: What = "answers", *, max_new_tokens: int = 64) -> None:
        self._client, self._max_new_tokens = client, max_new_tokens
        self._what: What = what
        self.name = client.name
        self.prompt_sha256 = prompts_sha256([EXISTENCE] if what == "existence" else [ABSTENTION, VERDICT])
        self.settings: dict[str, Any] = {
            "what": what,
            "max_new_tokens": max_new_tokens,
            "max_reasks": MAX_REASKS,
            "reask_temperature": REASK_TEMPERATURE,
        }

    @property
    def summary(self) -> str | None:
        """What was asked so far and what it took."""
        return getattr(self._client, "summary", None)

    def judge(self, examples: Sequence[Judged], on_labels: OnLabels) -> None:
        """Label all of these, some at a time.

        Raises:
            ClientError: the model cannot be asked; labels handed over so far stand, replies so far are in the cache.
        """
        for start in range(0, len(examples), _CHUNK):
            chunk = examples[start : start + _CHUNK]
            on_labels(self._existence(chunk) if self._what == "existence" else self._answers(chunk))

    def _existence(self, examples: Sequence[Judged]) -> list[Label]:
        """Whether each takes the thing for real."""
        asked = [example for example in examples if example.answer.strip()]
        replies = self._first(EXISTENCE, asked)
        labels = []
        for example in examples:
            if (reply := replies.get(example.key)) is None:
                labels.append(_unverifiable(self, example, self._what))
                continue
            verdict = None if reply.value is None else "accepted" if reply.value else "rejected"
            labels.append(_label(self, example, [reply], verdict=verdict))
        return labels

    def _answers(self, examples: Sequence[Judged]) -> list[Label]:
        """Whether each abstains; of the others with a gold answer, what they are."""
        asked = [example for example in examples if example.answer.strip()]
        first = self._first(ABSTENTION, asked)
        tried = [one for one in asked if one.gold and first[one.key].value is False]
        material = [{"question": o.question, "right_answers": list(o.gold), "reply": o.answer} for o in tried]
        second = dict(zip([one.key for one in tried], self._ask(VERDICT, material), strict=True))
        labels = []
        for example in examples:
            if (reply := first.get(example.key)) is None:
                labels.append(_unverifiable(self, example, self._what))
                continue
            then = second.get(example.key)
            nothing_known = "unverifiable" if reply.value is False else None
            labels.append(
                _label(
                    self,
                    example,
                    [reply, *([then] if then else [])],
                    is_abstention=None if reply.value is None else bool(reply.value),
                    verdict=then.value if then else nothing_known,
                )
            )
        return labels

    def _first(self, question: JudgeQuestion, examples: Sequence[Judged]) -> "dict[str, _Replied]":
        """A question of question and answer alone, by key."""
        material = [{"question": one.question, "reply": one.answer} for one in examples]
        return dict(zip([one.key for one in examples], self._ask(question, material), strict=True))

    def _ask(self, question: JudgeQuestion, material: Sequence[dict[str, Any]]) -> "list[_Replied]":
        """Ask a question of each material, again where the reply cannot be read."""
        found = [_Replied(value=None, outputs=[], failure=None, is_final=True) for _ in material]
        left = list(range(len(material)))
        for attempt in range(1 + MAX_REASKS):
            requests = [_request(question, material[number], attempt, self._max_new_tokens) for number in left]
            replies = self._client.ask(requests) if requests else []
            for number, reply in zip(left, replies, strict=True):
                if reply.error is not None:
                    why = f"{question.name}: no reply: {reply.error}"
                    found[number] = found[number]._replace(failure=why, is_final=False)
                    continue
                value, failure = parse_reply(reply.text, question)
                if failure is not None and reply.finish_reason == "length":
                    failure += f" (cut after {self._max_new_tokens} tokens: --judge-max-new-tokens)"
                found[number] = _Replied(value, [*found[number].outputs, reply.text], failure, is_final=True)
            left = [number for number in left if found[number].value is None and found[number].is_final]
        return found


class _Replied(NamedTuple):
    """What came of a question."""

    value: str | bool | None
    outputs: list[str]
    failure: str | None
    is_final: bool
    """False where the last request failed."""


def _request(question: JudgeQuestion, material: dict[str, Any], attempt: int, max_new_tokens: int) -> Request:
    """One request. From the second attempt on a reminder stands at its end, and the reply is drawn."""
    parts = [question.instruction, json.dumps(material, ensure_ascii=False, indent=1)]
    parts += [REMINDER] if attempt else []
    return Request(
        messages=[ChatMessage(role="user", content="\n\n".join(parts))],
        max_new_tokens=max_new_tokens,
        temperature=REASK_TEMPERATURE if attempt else 0.0,
        seed=attempt,
        json_schema=question.schema(),
    )


def _unverifiable(judge: Judge, example: Judged, what: What) -> Label:
    """The label of an empty answer."""
    return _label(judge, example, is_abstention=False if what == "answers" else None, verdict="unverifiable")


def _label(
    judge: Judge,
    example: Judged,
    replies: "Sequence[_Replied]" = (),
    *,
    is_abstention: bool | None = None,
    verdict: Any = None,
) -> Label:
    return Label(
        key=example.key,
        judged_sha256=example.sha256(),
        is_abstention=is_abstention,
        verdict=verdict,
        judge=judge.name,
        prompt_sha256=judge.prompt_sha256,
        raw_outputs=[text for reply in replies for text in reply.outputs],
        failure=next((reply.failure for reply in replies if reply.failure is not None), None),
        is_final=all(reply.is_final for reply in replies),
    )


@contextmanager
def open_judge(
    config: JudgeConfig, what: What, *, model: ModelConfig, client: ClientConfig, cache: Path | None
) -> Iterator[Judge]:
    """The judge that is asked for, closed at the end.

    Args:
        config: Who judges.
        what: What is judged.
        model: How a local model is loaded (device, dtype, quantisation).
        client: How a model is asked.
        cache: File that keeps what it replied, so that nothing is asked twice.

    Raises:
        ClientError: the model cannot be asked.
    """
    if config.judge == "rules":
        yield RuleJudge(what)
        return
    from tracekit.clients.by_name import open_client

    with open_client(config.judge, model=model, settings=client, cache=cache, desc="judging") as opened:
        yield ModelJudge(opened, what, max_new_tokens=config.judge_max_new_tokens)
