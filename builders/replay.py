"""Replay: capture for prompts and answers that were produced elsewhere, by a serving engine or an API.

A fast engine writes the answers, this builder runs each prompt with its answer through the model once, teacher-forced,
and records what the other builders record. Forms of the source are described in builders/answers.py.

    python -m builders.replay --source answers.jsonl --model Qwen/Qwen3-4B-Instruct-2507 --out traces/replayed
"""

from builders.configs import ReplayConfig
from tracekit.cli import run_builder

if __name__ == "__main__":  # flags are read before torch is imported: what follows imports it
    run_builder("builders.replay", ReplayConfig)

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from builders.answering import AnsweringTask, Asked
from builders.answers import AnswerExample, parse_row
from builders.sources import HubSource, read_examples
from tracekit.errors import ConfigError, SourceError
from tracekit.format.manifest import SourceInfo
from tracekit.model.answers import prompt_of_ids
from tracekit.model.generation import Generated
from tracekit.model.prompts import Prompt, Prompter
from tracekit.model.traced import TracedModel
from tracekit.records import NOTHING_GENERATED, Record, ReplayRecord

__all__ = ["BUILDER", "ReplayBuilder", "ReplayConfig"]

_SAMPLE = Path(__file__).parent / "samples" / "replay.jsonl"


class ReplayBuilder:
    """Prompts with answers in, traced samples out."""

    name = "replay"

    def examples(self, config: ReplayConfig) -> tuple[Sequence[AnswerExample], SourceInfo]:
        """The prompts and answers of the source.

        Raises:
            ConfigError: no source was named.
        """
        if config.source.source == "default":
            raise ConfigError("--source - at `$.source.source`; name the file with prompts and answers, or `sample`")
        found = read_examples(config.source, default=HubSource("", None), sample=_SAMPLE, parse=parse_row)
        return found.examples, found.info

    def open(self, config: ReplayConfig, tokenizer: Any, examples: Sequence[AnswerExample]) -> "ReplayTask":
        """Render and check every prompt and answer."""
        return ReplayTask(config, tokenizer, examples)


class ReplayTask(AnsweringTask[AnswerExample]):
    """Answers from elsewhere at work."""

    is_one_line = False

    def __init__(self, config: ReplayConfig, tokenizer: Any, examples: Sequence[AnswerExample]) -> None:
        asked = [Asked(one, f"{one.index:06d}", one.example_id, one.example_id, one.question or "") for one in examples]
        super().__init__(config, tokenizer, asked)
        self._answers = {one.index: self._answer_of(one) for one in examples}

    def num_positions(self, example: AnswerExample) -> int:
        """Prompt and answer."""
        return self.length(example) + len(self._answers[example.index].token_ids)

    def prompt_of(self, prompter: Prompter, asked: Asked[AnswerExample]) -> Prompt:
        """The prompt in the form that the source gives it in.

        Raises:
            SourceError: its ids are not this tokenizer's, or do not say what its text says.
        """
        one = asked.example
        if one.messages:
            prompt = prompter.chat([{"role": m.role, "content": m.content} for m in one.messages])
        elif one.question is not None:
            prompt = prompter.prompt(one.question)
        elif one.prompt is not None:
            prompt = prompter.plain(one.prompt)
        else:
            assert one.prompt_token_ids is not None, "the row was checked"
            return prompt_of_ids(self._tokenizer, self._known(one, one.prompt_token_ids, "prompt_token_ids"))
        if one.prompt_token_ids is None:
            return prompt
        given = prompt_of_ids(self._tokenizer, self._known(one, one.prompt_token_ids, "prompt_token_ids"))
        if given.text != prompt.text:
            raise self._other_text(one, "prompt_token_ids", given.text, prompt.text)
        return prompter.prompt_of(prompt.input_text, given.text, given.token_ids, given.offsets)

    def outputs(self, traced: TracedModel, examples: Sequence[AnswerExample]) -> list[Generated]:
        """The answers as they are given."""
        return [self._answers[example.index] for example in examples]

    def record(self, example: AnswerExample, shared: dict[str, Any]) -> Record:
        """The record of an answer."""
        shared |= {
            "generation": NOTHING_GENERATED,
            "finish_reason": example.finish_reason,
            "is_truncated": example.finish_reason == "length",
        }
        return ReplayRecord(
            **shared,
            messages=list(example.messages),
            question=example.question,
            are_prompt_ids_given=example.prompt_token_ids is not None,
            are_answer_ids_given=example.token_ids is not None,
            source_model=example.model,
        )

    def _answer_of(self, one: AnswerExample) -> Generated:
        """The answer's ids, given or tokenised after the prompt, with an end of sequence where it ended by itself."""
        eos = self._tokenizer.eos_token_id
        if one.token_ids is None:
            assert one.answer is not None, "the row was checked"
            ids = self._tokenised(one.index, one.answer)
        else:
            ids = self._known(one, one.token_ids, "token_ids")
            said = self._tokenizer.decode(ids, skip_special_tokens=True)
            if one.answer is not None and said.strip() != one.answer.strip():
                raise self._other_text(one, "token_ids", said, one.answer)
        if not ids:
            raise SourceError(f"row {one.index} ({one.example_id}): the answer has no token")
        if one.finish_reason == "stop" and eos is not None and ids[-1] != eos:
            ids = [*ids, eos]
        return Generated(ids, "stop" if eos is not None and ids[-1] == eos else "length")

    def _tokenised(self, index: int, answer: str) -> list[int]:
        """Ids of an answer as it reads after its prompt."""
        prompt = self._prompts[index]
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


BUILDER = ReplayBuilder()
