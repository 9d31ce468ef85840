"""The stages of wiki_qa that run no tested model: questions are written, answers are judged."""

from collections.abc import Sequence
from typing import Any

import msgspec

from builders.judging.config import answers_layout
from builders.judging.evaluation import Evaluation, evaluate
from builders.judging.judges import Judged
from builders.kit.sources import read_examples
from builders.wiki_qa.articles import COLUMNS, SAMPLE, SOURCE, Section, draw_sections, parse_article, sections_of
from builders.wiki_qa.config import WikiQAConfig
from builders.wiki_qa.prompts import PROMPTS_SHA256
from builders.wiki_qa.questions import (
    QuestionSet,
    Rejection,
    WikiQuestion,
    read_questions,
    write_questions,
    written,
)
from builders.wiki_qa.record import WikiQARecord
from tracekit.clients.by_name import ENDPOINT_PREFIX, open_client
from tracekit.console import out, say
from tracekit.errors import ConfigError, PlanMismatchError
from tracekit.format.layout import Layout, inside
from tracekit.format.manifest import SourceInfo
from tracekit.model.models import load_tokenizer
from tracekit.model.prompts import is_surely_longer
from tracekit.run.command import stage_asked

__all__ = ["EVALUATION", "judge_answers", "questions"]

NAME = "wiki_qa"


def questions(config: WikiQAConfig) -> int:
    """The first stage: have questions written, or say that they are there.

    Raises:
        SourceError: no article, no section of the right length, or no question was kept.
        PlanMismatchError: the folder holds questions made with other settings.
        ClientError: the question model cannot be asked.
    """
    layout, spec = answers_layout(config, NAME), config.question_model or config.model.model
    if config.min_section_tokens > config.max_section_tokens:
        raise ConfigError(
            f"--min-section-tokens {config.min_section_tokens} is above --max-section-tokens "
            f"{config.max_section_tokens}; no section can be both"
        )
    say("reading articles")
    found = read_examples(config.source, default=SOURCE, sample=SAMPLE, columns=COLUMNS, parse=parse_article)
    counter = _token_counter(config, spec)
    sections = [
        section
        for article in found.examples
        for section in draw_sections(
            sections_of(article, counter, min_tokens=config.min_section_tokens, max_tokens=config.max_section_tokens),
            config.sections_per_article,
            seed=config.output.seed,
        )
    ]
    cache = inside(layout.root, f"output/{layout.config}/cache/questions.jsonl")
    desc = "questions and answers"
    with open_client(
        spec, model=config.model, settings=config.client, cache=None if config.output.dry_run else cache, desc=desc
    ) as client:
        fresh = _about(config, client.name, found.source, len(found.examples), sections)
        if config.output.dry_run:
            return _dry_run(config, fresh, layout)
        if _is_there(layout, fresh, config):
            return 0
        made = written(
            client,
            sections,
            num_questions=config.num_questions,
            seed=config.output.seed,
            max_new_tokens=config.question_max_new_tokens,
        )
        say(f"{client.name}: {client.summary}")
    about = msgspec.structs.replace(
        fresh,
        num_asked=made.num_asked,
        num_kept=len(made.questions),
        rejected=[Rejection(reason=reason, count=count) for reason, count in made.rejected.most_common()],
        by_difficulty=_by_difficulty(made.questions),
    )
    write_questions(layout, made, about)
    _print_questions(layout, about)
    return 0


def _token_counter(config: WikiQAConfig, spec: str) -> Any:
    """Counts tokens as the question model does; for an endpoint, whose tokenizer is not here, as the tested model."""
    own = config.model
    if not spec.startswith(ENDPOINT_PREFIX) and spec != own.model:
        own = msgspec.structs.replace(own, model=spec, model_path=None, adapter=None, merge_adapter=False)
    tokenizer = load_tokenizer(own)
    most = config.max_section_tokens

    def count(text: str) -> int:
        if is_surely_longer(tokenizer, text, most):
            return most + 1  # sections have no more, so that it is enough to know that
        return len(tokenizer(text, add_special_tokens=False, verbose=False).input_ids)

    return count


def _about(
    config: WikiQAConfig, question_model: str, source: SourceInfo, num_articles: int, sections: Sequence[Section]
) -> QuestionSet:
    names = ("num_questions", "sections_per_article", "min_section_tokens", "max_section_tokens")
    names += ("question_max_new_tokens",)
    return QuestionSet(
        question_model=question_model,
        prompts_sha256=PROMPTS_SHA256,
        settings={name: getattr(config, name) for name in names}
        | {"seed": config.output.seed, "offset": config.source.offset, "limit": config.source.limit},
        source=source,
        num_articles=num_articles,
        num_without_section=num_articles - len({section.article.row for section in sections}),
        num_sections=len(sections),
        num_asked=0,
        num_kept=0,
        rejected=[],
        by_difficulty=[],
        asked=stage_asked(config, "questions"),
    )


def _is_there(layout: Layout, fresh: QuestionSet, config: WikiQAConfig) -> bool:
    """Whether the questions were written before, with the same settings."""
    stored = read_questions(layout)
    if stored is None:
        return False
    parts = ("question_model", "prompts_sha256", "settings", "source")
    differences = [
        f"    {name}: {getattr(stored, name)!r} there, {getattr(fresh, name)!r} now"
        for name in parts
        if getattr(stored, name) != getattr(fresh, name)
    ]
    if differences and config.output.force_run and not layout.plan.exists():
        return False
    if differences:
        anew = "" if layout.plan.exists() else ", or --force-run to write them anew"
        raise PlanMismatchError(
            f"{layout.questions} was made with other settings:\n" + "\n".join(differences) + "\nRun the original "
            "command to go on with it, choose another --out, leave questions out of --stages to use what is "
            f"there{anew}"
        )
    say(f"questions: nothing to do, {stored.num_kept} are in {layout.questions}")
    return True


def _by_difficulty(made: Sequence[WikiQuestion]) -> list[Rejection]:
    names = [question.difficulty for question in made if question.difficulty is not None]
    return [Rejection(reason=name, count=names.count(name)) for name in sorted(set(names))]


def _dry_run(config: WikiQAConfig, about: QuestionSet, layout: Layout) -> int:
    num_asked = min(about.num_sections, config.num_questions or about.num_sections)
    rows = {
        "stage": "questions",
        "articles": f"{about.num_articles} of {about.source.id}",
        "sections": f"{about.num_sections} of {config.min_section_tokens} to {config.max_section_tokens} tokens"
        + f"; {about.num_without_section} articles have none" * bool(about.num_without_section),
        "question model": about.question_model,
        "requests": f"{2 * num_asked} at least (a question, then its answer)",
        "file": f"{layout.questions} (nothing was written)",
    }
    out("\n".join(f"{name:15s} {value}" for name, value in rows.items()))
    return 0


def _print_questions(layout: Layout, about: QuestionSet) -> None:
    out(f"questions       {about.num_kept} of {about.num_asked} sections, in {layout.questions}")
    if about.num_without_section:
        out(f"  no section    {about.num_without_section} of {about.num_articles} articles have none of that length")
    wanted = about.settings["num_questions"]
    if wanted is not None and about.num_kept < wanted:
        out(f"  fewer         {wanted} were wanted; more articles (--limit) or --sections-per-article give more")
    for one in about.rejected:
        out(f"  rejected      {one.count} {one.reason}")
    for one in about.by_difficulty:
        out(f"  difficulty    {one.reason}: {one.count}")


def _judged(record: WikiQARecord) -> Judged:
    return Judged(record.key, record.question, record.ground_truth_answers, record.generated_answer)


EVALUATION = Evaluation(task=NAME, what="answers", judged=_judged)


def judge_answers(config: WikiQAConfig) -> int:
    """The last stage: a judge labels the answers."""
    return evaluate(config, EVALUATION, judge=config.judge, client=config.client)
