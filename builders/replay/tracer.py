"""replay at work: prompts and answers from elsewhere, read by the model once."""

import json
from collections.abc import Sequence
from typing import Any

from builders.replay.answers import AnswerExample
from builders.replay.task import TASK, ReplayConfig
from tracekit.answering import Answered, AnsweringTracer
from tracekit.config import CaptureConfig, template_kwargs
from tracekit.errors import SourceError
from tracekit.model.answers import end_of_thinking, parse_answer, prompt_of_ids
from tracekit.model.decoding import AnswerTrace, ToAnswer, captured_answers
from tracekit.model.generation import Generated
from tracekit.model.models import end_token_ids
from tracekit.model.prompts import Prompt
from tracekit.model.traced import TracedModel
from tracekit.model.turns import turn_of
from tracekit.records import NOTHING_GENERATED
from tracekit.task import Place

__all__ = ["ReplayTracer"]


class ReplayTracer(AnsweringTracer[AnswerExample]):
    """Answers from elsewhere at work."""

    answers = False
    is_one_line = False

    def __init__(self, config: ReplayConfig, tokenizer: Any, examples: Sequence[AnswerExample]) -> None:
        super().__init__(TASK, config, tokenizer)
        self._ends = end_token_ids(config.model, tokenizer)
        self._turn = turn_of(self._prompter)

    def num_positions(self, example: AnswerExample) -> int:
        """Prompt and answer."""
        return self.length(example) + len(self.given(example, self.prompt(example)).token_ids)

    def prompt(self, example: AnswerExample) -> Prompt:
        """The prompt in the form that the source gives it in.

        Raises:
            SourceError: its ids are not this tokenizer's, or do not say what its text says.
        """
        one, ids, prompter = example, example.prompt_token_ids, self._prompter
        given = None if ids is None else prompt_of_ids(self._tokenizer, self._known(one, ids, "prompt_token_ids"))
        told = template_kwargs(self._config.prompt)
        if other := {name: value for name, value in one.template_kwargs.items() if told.get(name) != value}:
            flags = " ".join(f"{name}={json.dumps(value)}" for name, value in other.items())
            raise SourceError(
                f"row {one.index} ({one.example_id}): its request has chat_template_kwargs {other}; pass "
                f"--template-kwargs {flags}, or give 'prompt_token_ids'"
            )
        if one.messages:
            prompt = prompter.chat([{"role": m.role, "content": m.content} for m in one.messages])
        elif one.question is not None:
            prompt = prompter.prompt(one.question)
        elif one.prompt is not None:
            prompt = prompter.plain(one.prompt)
        else:
            assert given is not None, "the row was checked"
            return given if one.prompt_spans is None else given._replace(spans=one.prompt_spans)
        if given is None or given.token_ids == prompt.token_ids:
            return prompt
        if self._without_bos(given.text) != self._without_bos(prompt.text):
            raise self._other_text(one, "prompt_token_ids", given.text, prompt.text)
        if prompt.template_sha256 is None:
            return given._replace(input_text=prompt.input_text)
        return prompter.prompt_of(prompt.input_text, given.text, given.token_ids, given.offsets)

    def _without_bos(self, text: str) -> str:
        """A text without what begins every sequence: an engine adds it to the ids, and not to the text."""
        bos = self._tokenizer.bos_token or ""
        while bos and text.startswith(bos):
            text = text.removeprefix(bos)
        return text

    def answer(
        self,
        traced: TracedModel,
        examples: Sequence[AnswerExample],
        asked: Sequence[ToAnswer],
        settings: CaptureConfig,
        place: Place,
    ) -> list[list[AnswerTrace]]:
        """The answers as they are given, captured."""
        given = [self.given(one, self.prompt(one)) for one in examples]
        return [[one] for one in captured_answers(traced, asked, given, settings)]

    def fields(self, example: AnswerExample, answer: Answered, shared: dict[str, Any]) -> dict[str, Any]:
        """The fields of a record."""
        stop = example.stop
        text = shared["generated_answer"]
        return shared | {
            "generation": NOTHING_GENERATED,
            "finish_reason": example.finish_reason,
            "is_truncated": example.finish_reason == "length",
            "generated_answer": text.partition(stop)[0].rstrip() if isinstance(stop, str) else text,
            "messages": list(example.messages),
            "question": example.question,
            "are_prompt_ids_given": example.prompt_token_ids is not None,
            "are_answer_ids_given": example.token_ids is not None,
            "source_model": example.model,
        }

    def given(self, one: AnswerExample, prompt: Prompt) -> Generated:
        """The answer's ids: as they are given; else of its text, with the end of turn where the model ended it."""
        if one.token_ids is not None:
            ids = self._known(one, one.token_ids, "token_ids")
            self._check_ids(one, prompt, ids)
        else:
            ids = self._tokenised(prompt, self._up_to_end(self._whole_text(one, prompt.text)))
            end = self._end_token(one, prompt)
            if ids and end is not None and ids[-1] not in self._ends:
                ids = [*ids, end]
        if not ids:
            raise SourceError(f"row {one.index} ({one.example_id}): the answer has no token")
        return Generated(ids, "stop" if ids[-1] in self._ends else "length")

    def _up_to_end(self, text: str) -> str:
        """A text without the white space that a template writes after an end token."""
        bare, ends = text.rstrip(), self._tokenizer.convert_ids_to_tokens(sorted(self._ends))
        return bare if bare.endswith(tuple(end for end in ends if end)) else text

    def _whole_text(self, one: AnswerExample, prompt: str) -> str:
        """Everything that the model wrote, its reasoning between the template's markers.

        Raises:
            SourceError: there is no place for the reasoning, or the answer would be taken for reasoning.
        """
        answer, is_cut = one.answer or "", one.finish_reason == "length"
        where = f"row {one.index} ({one.example_id})"
        if not one.reasoning:
            is_as_written = not one.messages and one.question is None  # else an API may have taken the reasoning out
            if end_of_thinking(prompt, answer) == len(answer) and not (is_cut and is_as_written):
                raise SourceError(
                    f"{where}: the prompt opens the model's reasoning, and the answer {answer[:60]!r} does not close "
                    "it, so it would be filed as reasoning; give 'reasoning_content' or 'token_ids', or close the "
                    "reasoning in the prompt (--template-kwargs enable_thinking=false)"
                )
            return answer if is_as_written or self._turn is None else self._turn.with_lead(prompt, answer)
        if end_of_thinking("", answer) and one.reasoning.strip() in answer:
            raise SourceError(
                f"{where}: the answer holds the reasoning that stands beside it too; leave one of the two out"
            )
        whole = None if self._turn is None else self._turn.with_reasoning(prompt, one.reasoning, answer, is_cut=is_cut)
        if whole is None or whole[end_of_thinking(prompt, whole) :].strip() != answer.strip():
            raise SourceError(
                f"{where}: there is reasoning beside the answer, and the prompt or its chat template has no place to "
                "put it back; give 'token_ids', or a template that has one (--chat-template FILE)"
            )
        return whole

    def _end_token(self, one: AnswerExample, prompt: Prompt) -> int | None:
        """The token with which the model ended its turn; None where it did not, or where it has none."""
        if not one.has_ended:
            return None
        if isinstance(one.stop, int):
            return one.stop if one.stop in self._ends else None
        of_turn = None if self._turn is None else self._turn.end_token(self._tokenizer, self._ends)
        is_chat = prompt.template_sha256 is not None or of_turn in prompt.token_ids
        return of_turn if is_chat and of_turn is not None else self._tokenizer.eos_token_id

    def _check_ids(self, one: AnswerExample, prompt: Prompt, ids: list[int]) -> None:
        """Refuse ids that begin with the prompt, as `generate` of transformers returns them, and those that do not say
        what the text beside them says: all that was written, or the answer alone."""
        special = {token for token, form in self._tokenizer.added_tokens_decoder.items() if form.special}
        begins = ids[: len(prompt.token_ids)] == prompt.token_ids
        if begins and not special.isdisjoint(prompt.token_ids):  # a text of words alone may be said again
            raise SourceError(
                f"row {one.index} ({one.example_id}): 'token_ids' begin with the prompt; give those of the answer "
                "alone, or 'prompt_length' beside them"
            )
        if one.answer is None or not ids:
            return
        parsed = parse_answer(
            self._tokenizer, prompt, ids, eos_included=ids[-1] in self._ends, is_one_line=False
        ).text.strip()
        kept = ids[:-1] if isinstance(one.stop, int) and ids[-1] == one.stop else ids  # the text leaves that one out
        decoded = [self._tokenizer.decode(kept, skip_special_tokens=leaves_out) for leaves_out in (True, False)]
        texts = [parsed] if one.reasoning else [parsed, *decoded]
        if isinstance(one.stop, str):
            texts += [text.partition(one.stop)[0] for text in texts]
        if one.answer.strip() not in [text.strip() for text in texts]:
            raise self._other_text(one, "token_ids", texts[-1], one.answer)

    def _tokenised(self, prompt: Prompt, answer: str) -> list[int]:
        """Ids of an answer as it reads after its prompt."""
        whole = self._tokenizer(prompt.text + answer, add_special_tokens=False).input_ids
        alone = self._tokenizer(prompt.text, add_special_tokens=False).input_ids
        if whole[: len(alone)] == alone:
            return list(whole[len(alone) :])
        return list(self._tokenizer(answer, add_special_tokens=False).input_ids)  # the seam is one token with it

    def _known(self, one: AnswerExample, ids: list[int], name: str) -> list[int]:
        """Ids that the tokenizer has."""
        unknown = [token for token in ids if not 0 <= token < len(self._tokenizer)]
        if unknown:
            raise SourceError(
                f"answer {one.example_id!r} (row {one.index}, counted from 0): {name!r} holds {unknown[0]}, and the "
                f"tokenizer has {len(self._tokenizer)} tokens; are the ids of another model? Mend or delete the row: "
                "--on-bad-row skips rows that cannot be read, not such ones"
            )
        return ids

    def _other_text(self, one: AnswerExample, name: str, said: str, given: str) -> SourceError:
        return SourceError(
            f"row {one.index} ({one.example_id}): {name!r} say {said[:80]!r}, the text beside them {given[:80]!r}; are "
            "the ids of another model? Leave the ids out to have the text tokenised here"
        )
