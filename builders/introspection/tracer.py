"""introspection at work: outputs generated and captured, every allowed letter scored."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from builders.introspection.config import PASSES, IntrospectionConfig, Pass
from builders.introspection.prompts import SYSTEM, bins_of, instruction_sha256, message
from builders.introspection.questions import McqQuestion, read_questions
from builders.introspection.record import IntrospectionRecord
from builders.introspection.surface import Rarity, surface_of
from builders.kit.columns import ChoiceSource
from builders.kit.letter_parsing import name_letter
from builders.kit.letters import LetterScores, asked_ids, score_letters, spellings_of
from tracekit.answering import answered_fields
from tracekit.model.answers import parse_answer
from tracekit.model.capture import NextTokens, Trace
from tracekit.model.continuations import softmax
from tracekit.model.decoding import ToAnswer, answer_traced
from tracekit.model.generation import Generated, settings_of
from tracekit.model.prompts import Exchange, Prompt, Prompter, other_shots, sha256_text, tokens_of
from tracekit.model.proof import Scored
from tracekit.model.traced import TracedModel
from tracekit.read.store import Sample
from tracekit.run.recheck import Replay
from tracekit.task import Place, TracedSample, Tracer

__all__ = ["IntrospectionReplay", "IntrospectionTracer", "scored_of"]


def scored_of(record: IntrospectionRecord) -> list[Scored]:
    """The answers that a record has scores of."""
    return [Scored("logprobs", *pair) for pair in zip(record.answer_token_ids, record.logprobs, strict=True)]


class IntrospectionReplay(Replay[IntrospectionRecord]):
    """A stored output, run again."""

    def trace(self, sample: Sample, record: IntrospectionRecord) -> Trace:
        """What is stored of it."""
        numbers = [np.array(values, np.float64) for values in (record.token_logprobs, record.token_entropies)]
        return Trace(sample.tensors(), record.tensors, NextTokens(*numbers))

    def scored(self, record: IntrospectionRecord) -> list[Scored]:
        """The answers that it has scores of."""
        return scored_of(record)


class IntrospectionTracer(Tracer[McqQuestion]):
    """One pass at work."""

    answers = True

    def __init__(self, config: IntrospectionConfig, tokenizer: Any, examples: Sequence[McqQuestion]) -> None:
        self._config, self._tokenizer = config, tokenizer
        self._prompt_type: Pass = config.passes[0]
        self._bins = [] if self._prompt_type == "mcq" else bins_of(config.bin_edges, config.bin_midpoints)
        system = SYSTEM if config.prompt.system is None else config.prompt.system
        self._instruction_sha256 = instruction_sha256(self._prompt_type, system, self._bins)
        self._prompter = Prompter(tokenizer, config.prompt, default_system=SYSTEM)
        self.variant = self._prompter.variant
        self._rarity = Rarity(tokenizer)
        self._pool = read_questions(ChoiceSource(source="sample")).examples if config.prompt.num_shots else []
        self._lengths: dict[int, int] = {}

    def length(self, example: McqQuestion) -> int:
        """Prompt tokens."""
        if example.index not in self._lengths:
            self._lengths[example.index] = len(self._prompt(example).token_ids)
        return self._lengths[example.index]

    def num_positions(self, example: McqQuestion) -> int:
        """Longest output, and longest prompt of any pass: a question that is too long for one is left out of all."""
        return self._longest_prompt(example) + self._config.generation.max_new_tokens

    def trace(self, traced: TracedModel, examples: Sequence[McqQuestion], place: Place) -> list[TracedSample]:
        """Answer a batch and capture it, and score the letters."""
        prompts = [self._prompt(example) for example in examples]
        ids = [prompt.token_ids for prompt in prompts]
        seeds = [f"{self._config.output.seed} {example.key} {self._prompt_type}" for example in examples]
        spellings = [
            spellings_of(self._tokenizer, prompt.text, list(self._allowed(example)))
            for prompt, example in zip(prompts, examples, strict=True)
        ]
        asked = [
            ToAnswer(prompt, seed if self._config.do_sample else None, asked_ids(some))
            for prompt, seed, some in zip(ids, seeds, spellings, strict=True)
        ]
        generation, settings = self._config.generation, self._config.capture
        made = answer_traced(traced, asked, generation, settings, from_decoding=place.from_decoding)
        scores = score_letters(traced, ids, spellings, [one.trace for one in made])
        samples: list[TracedSample] = []
        for example, prompt, (output, text, trace), some in zip(examples, prompts, made, scores, strict=True):
            record = self._record(traced, example, prompt, output, trace, some, place)
            samples.append(TracedSample(record, text, trace, scored_of(record)))
        return samples

    def _message(self, example: McqQuestion) -> str:
        return message(self._prompt_type, example.question, example.choices, self._bins)

    def _prompt(self, example: McqQuestion) -> Prompt:
        return self._prompter.prompt(self._message(example), self._shots(example))

    def _longest_prompt(self, example: McqQuestion) -> int:
        """Tokens of the longest prompt about a question, whichever passes this run makes."""
        if self._config.prompt.num_shots:  # there is one pass then
            return self.length(example)
        bins = bins_of(self._config.bin_edges, self._config.bin_midpoints)
        texts = [message(one, example.question, example.choices, bins) for one in PASSES]
        return max(len(self._prompter.prompt(text).token_ids) for text in texts)

    def _shots(self, example: McqQuestion) -> list[Exchange]:
        """Solved examples for one question, drawn by its own seed from the packaged sample (why: trivia_qa)."""
        count = self._config.prompt.num_shots
        others = other_shots(self._pool, count, lambda other: other.question == example.question)
        draw = np.random.default_rng([self._config.output.seed, example.index])
        chosen = draw.choice(len(others), count, replace=False).tolist() if count else []
        return [Exchange(self._message(others[i]), str(others[i].correct_letter)) for i in chosen]

    def _allowed(self, example: McqQuestion) -> dict[str, str]:
        """The letters that answer, and what each stands for."""
        if self._prompt_type == "mcq":
            return {choice.label: choice.text for choice in example.choices}
        return {one.label: one.text() for one in self._bins}

    def _record(
        self,
        traced: TracedModel,
        example: McqQuestion,
        prompt: Prompt,
        output: Generated,
        trace: Trace,
        scores: LetterScores,
        place: Place,
    ) -> IntrospectionRecord:
        parsed = parse_answer(self._tokenizer, prompt, output.token_ids, eos_included=output.eos_included)
        allowed = self._allowed(example)
        named = name_letter(parsed.text, allowed)
        thinking, span = parsed.span("thinking"), parsed.span("answer")
        failure = named.failure
        if failure is not None and thinking is not None and span is None:
            failure = "the reasoning did not end within max_new_tokens"
        first_char = parsed.start_char + named.start
        position = tokens_of(parsed.offsets, first_char, first_char + 1)[0] if named.letter else None
        settings = settings_of(self._config.generation, do_sample=self._config.do_sample)
        is_mcq = self._prompt_type == "mcq"
        return IntrospectionRecord(
            **answered_fields(traced, prompt, parsed, output, trace, place),
            key=example.key,
            example_id=example.example_id,
            question_id=example.example_id,
            sample_index=0,
            split=self._config.source.split,
            input_sha256=sha256_text(example.question),
            generation=settings,
            seed=self._config.output.seed,
            prompt_type=self._prompt_type,
            question_text=example.question,
            subject=example.subject,
            options=example.choices,
            option_order=example.order,
            correct_answer_letter=example.correct_letter,
            model_name=traced.info.id,
            checkpoint_id=traced.info.adapter or traced.info.revision,
            prompt_text=prompt.input_text,
            instruction_sha256=self._instruction_sha256,
            bins=self._bins,
            temperature=settings.temperature,
            top_p=settings.top_p,
            max_new_tokens=settings.max_new_tokens,
            output_text=parsed.text,
            token_logprobs=trace.next_tokens.logprobs.tolist(),
            token_entropies=trace.next_tokens.entropies.tolist(),
            parsed_answer=named.letter,
            parse_failure=failure,
            answer_token_index=position if is_mcq else None,
            confidence_token_index=None if is_mcq else position,
            **self._scored(example, named.letter, list(allowed), scores),
            **surface_of(self._tokenizer, self._rarity, example.question)._asdict(),
        )

    def _scored(
        self, example: McqQuestion, letter: str | None, letters: list[str], scores: LetterScores
    ) -> dict[str, Any]:
        """The fields of a record that follow from the letters' scores."""
        probs = softmax(scores.logits)
        predicted = letters[int(np.argmax(probs))]
        wanted, is_mcq = example.correct_letter, self._prompt_type == "mcq"
        is_judged = is_mcq and wanted is not None
        confidence = None if is_mcq else float(probs @ [one.midpoint for one in self._bins])
        return {
            "is_correct": letter == wanted if is_judged and letter is not None else None,
            "pred_letter": predicted,
            "is_pred_correct": predicted == wanted if is_judged else None,
            "answer_spelling": scores.spelling.form,
            "answer_scoring": "token" if scores.spelling.is_single else "sequence",
            "answer_token_ids": scores.spelling.token_ids,
            "logits": scores.logits,
            "logprobs": scores.logprobs,
            "probs": probs.tolist(),
            "allowed_mass": scores.mass,
            "other_spelling_mass": scores.other_mass,
            "entropy": float(-(probs * np.log(np.maximum(probs, np.finfo(float).tiny))).sum()),
            "logit_margin": _margin(scores.logits, example.label_idx) if is_judged else None,
            "self_confidence": confidence if self._prompt_type == "self_confidence" else None,
            "other_confidence": confidence if self._prompt_type == "other_confidence" else None,
        }


def _margin(logits: Sequence[float], right: int | None) -> float | None:
    """Logit of the right letter less that of the best wrong one."""
    if right is None:
        return None
    return logits[right] - max(value for number, value in enumerate(logits) if number != right)
