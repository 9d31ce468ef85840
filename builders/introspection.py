"""Introspection: what a model answers, how sure it says it is, and how sure it says another would be.

Three passes over the same questions, each a configuration of the dataset. Their prompts stand in
builders/introspection_prompts.py, the questions' sources in builders/mcq_questions.py. A question has the same key and
`question_id` in every pass.

    python -m builders.introspection --passes mcq self_confidence other_confidence --model Qwen/Qwen3-4B-Instruct-2507

An output is generated and read for a letter; beside it stands how probable every allowed letter was in its place,
whether the output named one or not. Stated confidence as a distribution over bins follows Kadavath et al. 2022,
"Language Models (Mostly) Know What They Know" (https://arxiv.org/abs/2207.05221) in asking the model itself, and reads
the expected percent from the probabilities of the bins' letters.
"""

from builders.configs import IntrospectionConfig
from tracekit.cli import run_builder

if __name__ == "__main__":  # flags are read before torch is imported: what follows imports it
    run_builder("builders.introspection", IntrospectionConfig)

from collections.abc import Sequence
from typing import Any

import msgspec
import numpy as np

from builders.introspection_prompts import PASSES, SYSTEM, Pass, bins_of, instruction_sha256, message
from builders.letter_parsing import name_letter
from builders.letters import LetterScores, asked_ids, score_letters, spellings_of
from builders.mcq_questions import McqQuestion, read_questions, shuffled
from builders.surface import Rarity, surface_of
from tracekit.config import SourceConfig
from tracekit.errors import ConfigError, SourceError
from tracekit.format.manifest import SourceInfo
from tracekit.model.answers import parse_answer
from tracekit.model.capture import Text, Trace, capture
from tracekit.model.continuations import softmax
from tracekit.model.generation import Generated, answer_once, settings_of
from tracekit.model.prompts import Exchange, Prompter, sha256_text, tokens_of
from tracekit.model.traced import TracedModel
from tracekit.records import IntrospectionRecord
from tracekit.run.replay import scored_of
from tracekit.run.task import Place, Sample, Task, answered_fields

__all__ = ["BUILDER", "IntrospectionBuilder", "IntrospectionConfig", "single_passes"]


def single_passes(config: IntrospectionConfig) -> list[IntrospectionConfig]:
    """A configuration for each pass, named after it; with --dataset-config NAME: NAME_mcq, ..., or NAME for one alone.

    Raises:
        ConfigError: no pass, or one twice.
    """
    passes, name = config.passes, config.output.dataset_config
    if not passes or len(set(passes)) < len(passes):
        raise ConfigError(f"passes {' '.join(passes)!r} - at `$.passes`; expected one or more of {' '.join(PASSES)}")
    names = [one if name is None else f"{name}_{one}" for one in passes] if len(passes) > 1 or name is None else [name]
    return [
        msgspec.structs.replace(
            config, passes=(one,), output=msgspec.structs.replace(config.output, dataset_config=its_name)
        )
        for one, its_name in zip(passes, names, strict=True)
    ]


class IntrospectionBuilder:
    """Questions in, answers and confidences with their probabilities and traces out."""

    name = "introspection"

    def examples(self, config: IntrospectionConfig) -> tuple[Sequence[McqQuestion], SourceInfo]:
        """The questions of the source, options in the order in which they are shown."""
        _check(config)
        found = read_questions(config.source)
        seed = config.output.seed
        return [shuffled(one, seed) if config.shuffle_options else one for one in found.examples], found.info

    def open(self, config: IntrospectionConfig, tokenizer: Any, examples: Sequence[McqQuestion]) -> "IntrospectionTask":
        """Render every prompt."""
        return IntrospectionTask(config, tokenizer, examples)


def _check(config: IntrospectionConfig) -> None:
    """Refuse settings that have no meaning here."""
    bins_of(config.bin_edges, config.bin_midpoints)
    if len(config.passes) != 1:
        raise ConfigError(
            f"passes {' '.join(config.passes)!r} - at `$.passes`; one run makes one; single_passes() takes them apart"
        )
    generation = config.generation
    if generation.num_samples > 1 or generation.trace_samples:
        raise ConfigError(
            "--num-samples and --trace-samples - at `$.generation`; there is one output a question, which --do-sample "
            "draws"
        )
    if generation.num_beams > 1 and config.do_sample:
        raise ConfigError(f"--num-beams {generation.num_beams} with --do-sample - at `$.generation.num_beams`; give 1")
    if config.prompt.num_shots and config.passes != ("mcq",):
        raise ConfigError(
            f"--num-shots {config.prompt.num_shots} - at `$.prompt.num_shots`; solved examples exist for --passes mcq "
            "only: nobody knows the right confidence"
        )


class IntrospectionTask(Task[McqQuestion]):
    """One pass at work."""

    def __init__(self, config: IntrospectionConfig, tokenizer: Any, examples: Sequence[McqQuestion]) -> None:
        self._config, self._tokenizer = config, tokenizer
        self._prompt_type: Pass = config.passes[0]
        self._bins = [] if self._prompt_type == "mcq" else bins_of(config.bin_edges, config.bin_midpoints)
        system = SYSTEM if config.prompt.system is None else config.prompt.system
        self._instruction_sha256 = instruction_sha256(self._prompt_type, system, self._bins)
        prompter = Prompter(tokenizer, config.prompt, default_system=SYSTEM)
        self.variant = prompter.variant
        self._rarity = Rarity(tokenizer)
        self._pool = read_questions(SourceConfig(source="sample")).examples if config.prompt.num_shots else []
        self._prompts = {one.index: prompter.prompt(self._message(one), self._shots(one)) for one in examples}
        self._longest = {one.index: self._longest_prompt(prompter, one) for one in examples}

    def length(self, example: McqQuestion) -> int:
        """Prompt tokens."""
        return len(self._prompts[example.index].token_ids)

    def num_positions(self, example: McqQuestion) -> int:
        """Longest output, and longest prompt of any pass: a question that is too long for one is left out of all."""
        return self._longest[example.index] + self._config.generation.max_new_tokens

    def trace(self, traced: TracedModel, examples: Sequence[McqQuestion], place: Place) -> list[Sample]:
        """Generate the outputs of a batch, capture prompts with outputs, and score the letters."""
        prompts = [self._prompts[example.index] for example in examples]
        ids = [prompt.token_ids for prompt in prompts]
        seeds = [f"{self._config.output.seed} {_key(example)} {self._prompt_type}" for example in examples]
        outputs = answer_once(traced, ids, self._config.generation, seeds if self._config.do_sample else None)
        spellings = [
            spellings_of(self._tokenizer, prompt.text, list(self._allowed(example)))
            for prompt, example in zip(prompts, examples, strict=True)
        ]
        texts = [
            Text(prompt + output.token_ids, len(prompt), asked_ids=asked_ids(some))
            for prompt, output, some in zip(ids, outputs, spellings, strict=True)
        ]
        traces = capture(traced, texts, self._config.capture)
        scores = score_letters(traced, ids, spellings, traces)
        samples: list[Sample] = []
        for i, example in enumerate(examples):
            record = self._record(traced, example, outputs[i], traces[i], scores[i], place)
            samples.append(Sample(record, texts[i], traces[i], scored_of(record)))
        return samples

    def _message(self, example: McqQuestion) -> str:
        return message(self._prompt_type, example.question, example.choices, self._bins)

    def _longest_prompt(self, prompter: Prompter, example: McqQuestion) -> int:
        """Tokens of the longest prompt about a question, whichever passes this run makes."""
        if self._config.prompt.num_shots:  # there is one pass then
            return self.length(example)
        bins = bins_of(self._config.bin_edges, self._config.bin_midpoints)
        texts = [message(one, example.question, example.choices, bins) for one in PASSES]
        return max(len(prompter.prompt(text).token_ids) for text in texts)

    def _shots(self, example: McqQuestion) -> list[Exchange]:
        """Solved examples for one question, drawn by its own seed from the packaged sample (why: trivia_qa)."""
        count = self._config.prompt.num_shots
        others = [other for other in self._pool if other.question != example.question]
        if count > len(others):
            raise SourceError(f"--num-shots {count} needs more than the {len(others)} sample questions there are")
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
        output: Generated,
        trace: Trace,
        scores: LetterScores,
        place: Place,
    ) -> IntrospectionRecord:
        prompt = self._prompts[example.index]
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
            key=_key(example),
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
            token_logprobs=trace.logprobs.tolist(),
            token_entropies=trace.entropies.tolist(),
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


def _key(example: McqQuestion) -> str:
    """Row in the source: unique in a configuration, also after a merge, and the same in every pass."""
    return f"{example.index:06d}"


BUILDER = IntrospectionBuilder()
PARTS = single_passes
"""What one configuration is run as: a pass after the other."""
