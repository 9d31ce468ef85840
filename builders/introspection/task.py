"""Introspection: what a model answers, how sure it says it is, and how sure it says another would be.

Three passes over the same questions, each a configuration of the dataset. Their prompts stand in
builders/introspection/prompts.py, the questions' sources in builders/introspection/questions.py. A question has the
same key and `question_id` in every pass.

    python -m builders.introspection --passes mcq self_confidence other_confidence --model Qwen/Qwen3-4B-Instruct-2507

An output is generated and read for a letter; beside it stands how probable every allowed letter was in its place,
whether the output named one or not. Stated confidence as a distribution over bins follows Kadavath et al. 2022,
"Language Models (Mostly) Know What They Know" (https://arxiv.org/abs/2207.05221) in asking the model itself, and reads
the expected percent from the probabilities of the bins' letters.
"""

import msgspec

from builders.introspection.config import PASSES, IntrospectionConfig
from builders.introspection.prompts import bins_of
from builders.introspection.questions import McqQuestion, read_questions, shuffled
from builders.introspection.record import IntrospectionRecord
from tracekit.errors import ConfigError
from tracekit.records import LARGE_SHARE, Mean, Number, Outcome, accuracy
from tracekit.task import Examples, Task, lazy

__all__ = ["TASK", "single_passes"]


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


def examples(config: IntrospectionConfig) -> Examples[McqQuestion]:
    """The questions of the source, options in the order in which they are shown."""
    _check(config)
    found = read_questions(config.source)
    if not config.shuffle_options:
        return found
    return found._replace(examples=[shuffled(one, config.output.seed) for one in found.examples])


def _check(config: IntrospectionConfig) -> None:
    """Refuse settings that have no meaning here."""
    bins_of(config.bin_edges, config.bin_midpoints)
    if len(config.passes) != 1:
        raise ConfigError(
            f"passes {' '.join(config.passes)!r} - at `$.passes`; one run makes one; single_passes() takes them apart"
        )
    generation = config.generation
    if generation.num_beams > 1 and config.do_sample:
        raise ConfigError(f"--num-beams {generation.num_beams} with --do-sample - at `$.generation.num_beams`; give 1")
    if config.prompt.num_shots and config.passes != ("mcq",):
        raise ConfigError(
            f"--num-shots {config.prompt.num_shots} - at `$.prompt.num_shots`; solved examples exist for --passes mcq "
            "only: nobody knows the right confidence"
        )


TASK = Task(
    name="introspection",
    title="Multiple-choice questions: the model's answer, and how sure it says it is, or another would be.",
    category="multiple-choice",
    config=IntrospectionConfig,
    record=IntrospectionRecord,
    examples=examples,
    tracer=lazy("builders.introspection.tracer:IntrospectionTracer"),
    replay=lazy("builders.introspection.tracer:IntrospectionReplay"),
    parts=single_passes,
    card="introspection.md.j2",
    outcome=Outcome(
        asked="question_text",
        answer="parsed_answer",
        output="output_text",
        gold="correct_answer_letter",
        correct="is_correct",
        has_letters=True,
        options="options",
        entropies="token_entropies",
        numbers=[
            Number(name="entropy", field="entropy", unit="nats"),
            Number(name="allowed_mass", field="allowed_mass"),
            Number(name="logit_margin", field="logit_margin"),
        ],
        means=[
            accuracy("is_correct"),
            accuracy("is_pred_correct", name="pred_accuracy"),
            Mean(
                name="parse_failure_share",
                field="parsed_answer",
                of_null=True,
                definition="Share of the outputs from which no letter could be read.",
                warn_above=LARGE_SHARE,
                warning="of the outputs name no letter. Look at some (tracekit show --examples 5); where they are cut, "
                "raise --max-new-tokens",
            ),
            Mean(
                name="mean_allowed_mass",
                field="allowed_mass",
                definition="Mean probability of all allowed letters together.",
            ),
            Mean(
                name="mean_entropy", field="entropy", unit="nats", definition="Mean entropy over the allowed letters."
            ),
            Mean(
                name="mean_self_confidence",
                field="self_confidence",
                unit="percent",
                definition="Mean confidence that the model states in itself.",
            ),
            Mean(
                name="mean_other_confidence",
                field="other_confidence",
                unit="percent",
                definition="Mean confidence that the model states in somebody else.",
            ),
        ],
        probs="probs",
        most_probable="pred_letter",
        most_probable_correct="is_pred_correct",
        confidences=["self_confidence", "other_confidence"],
        about_others=["other_confidence"],
        bins="bins",
        kind="prompt_type",
        judged_in="mcq",
        failure="parse_failure",
        group="subject",
        same=["prompt_type", "question_text", "options", "correct_answer_letter", "bins"],
        conditions=["instruction_sha256"],
    ),
)
