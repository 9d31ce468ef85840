"""Prompts: chat messages in, the text and ids that the model reads out, with every part's token range.

With a chat template the rendered text is tokenised without adding special tokens (the template writes its own
beginning-of-sequence token, a second one would shift everything); without one a plain question/answer text, or the bare
text that a model is to go on with, is tokenised as the tokenizer does by default. `--bos` overrides both, and never
leaves two.
"""

import datetime
import hashlib
import random
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from tracekit.config import PromptConfig, template_kwargs
from tracekit.errors import ConfigError, SourceError
from tracekit.model.vocabulary import check_rows
from tracekit.records import Span

__all__ = [
    "Exchange",
    "Prompt",
    "Prompter",
    "draw_shots",
    "is_surely_longer",
    "other_shots",
    "sha256_text",
    "tokens_of",
    "with_bos",
]

PoolT = TypeVar("PoolT")

_CHARACTERS_A_TOKEN = 8
"""Characters of a text that are looked at first for each token that fits; ordinary text has about four a token."""
_CUT_WORD = 1000
"""More tokens than a word that is cut at the end of a beginning can have beyond those of the whole word."""
_DATE_CODES = ("%-d", "%-m", "%A", "%B", "%H", "%I", "%M", "%S", "%Y", "%a", "%b", "%d", "%e", "%j", "%m", "%p", "%y")
_FROZEN_CLOCK = (
    "{%- macro strftime_now(format) -%}{%- set frozen = namespace(text=format) -%}"
    "{%- for code, value in tracekit_date.items() -%}{%- set frozen.text = frozen.text | replace(code, value) -%}"
    "{%- endfor -%}{{ frozen.text }}{%- endmacro %}\n"
)
"""A macro in place of transformers' clock, which takes no date: the same run must give the same bytes."""


class Exchange(NamedTuple):
    """A question, and its answer where it is a solved example."""

    question: str
    answer: str = ""


class Prompt(NamedTuple):
    """What the model reads."""

    text: str
    """Rendered prompt."""
    token_ids: list[int]
    """Its ids."""
    offsets: list[list[int]]
    """Characters of each token in `text`."""
    spans: list[Span]
    """system, shots, user and assistant_header, those that exist."""
    input_text: str
    """The user's own text."""
    template_sha256: str | None
    """Hash of the chat template; None for a plain prompt."""


class Prompter:
    """Renders and tokenises prompts for one tokenizer and one configuration.

    Raises:
        ConfigError: the chat template cannot be read or does not render, or is not what the form of prompts wants; or a
            prompt holds a token that has no row in the model's embedding table.
    """

    def __init__(self, tokenizer: Any, config: PromptConfig, *, default_system: str) -> None:
        self._tokenizer, self._config = tokenizer, config
        self._is_bare = config.prompt_form == "plain"
        self._system = config.system if config.system is not None else "" if self._is_bare else default_system
        self._template = self._read_template()
        self._arguments = template_kwargs(config)
        try:
            self._today = datetime.date.fromisoformat(config.template_date)
        except ValueError as error:
            raise ConfigError(
                f"date {config.template_date!r} - at `$.prompt.template_date`; expected YYYY-MM-DD"
            ) from error

    @property
    def variant(self) -> str:
        """`chat` or `base`."""
        return "base" if self._template is None else "chat"

    @property
    def template(self) -> str | None:
        """The chat template; None for plain prompts."""
        return self._template

    @property
    def template_sha256(self) -> str | None:
        """Hash of the chat template; None for a plain prompt."""
        return None if self._template is None else sha256_text(self._template)

    def prompt(self, question: str, shots: Sequence[Exchange] = ()) -> Prompt:
        """Render one question after the solved examples."""
        exchanges = [*shots, Exchange(question)]
        text, header_start = self._plain(exchanges) if self._template is None else self._chat(exchanges)
        token_ids, offsets = self._tokenize(text, is_plain=self._template is None)
        spans = _spans(text, offsets, question, header_start, system=self._system, has_shots=bool(shots))
        return Prompt(text, token_ids, offsets, spans, question, self.template_sha256)

    def chat(self, messages: Sequence[Mapping[str, str]]) -> Prompt:
        """Render a whole chat, `role` and `content` of each message, as `conversation`; without a template it is
        written out, for models that only go on with a text:

            You judge answers.                  the system message

            User: Is Paris in France?
            Assistant:

        Raises:
            ConfigError: the template does not take these messages.
        """
        if self._template is not None:
            return self.conversation(messages)
        form = {"system": "{}\n\n", "user": "User: {}\n", "assistant": "Assistant: {}\n"}
        return self.plain("".join(form[one["role"]].format(one["content"]) for one in messages) + "Assistant:")

    def conversation(self, messages: Sequence[Mapping[str, str]]) -> Prompt:
        """Render a conversation, each message with `role` and `content`, and no other system message.

        Raises:
            ConfigError: there is no chat template, or it does not take these messages.
        """
        if self._template is None:
            raise ConfigError("the model has no chat template, so it takes no conversation; give the text itself")
        try:
            text, before = (
                self._rendered(self._tokenizer, self._template, [*messages], add_generation_prompt=opens)
                for opens in (True, False)
            )
        except _render_errors() as error:
            raise ConfigError(f"the chat template does not take these messages: {error}") from error
        header_start = len(before) if text.startswith(before) else len(text)
        token_ids, offsets = self._tokenize(text, is_plain=False)
        system = next((one["content"] for one in messages if one["role"] == "system"), "")
        user = next((one["content"] for one in reversed(messages) if one["role"] == "user"), "")
        spans = _spans(text, offsets, user, header_start, system=system)
        return Prompt(text, token_ids, offsets, spans, user, self.template_sha256)

    def plain(self, text: str) -> Prompt:
        """A text to be continued as it is, tokenised as the tokenizer does by default."""
        token_ids, offsets = self._tokenize(text, is_plain=True)
        start, stop = tokens_of(offsets, 0, len(text))
        spans = [Span(name="user", start=start, stop=stop)] if stop > start else []
        return Prompt(text, token_ids, offsets, spans, text, None)

    def render_with_picture(self, processor: Any, question: str) -> str:
        """The text of a question with one picture before it, by a processor's chat template; one placeholder.

        Raises:
            ConfigError: the template does not render, or there is no placeholder for a picture.
        """
        template = self._template
        if template is None and self._config.prompt_form in ("auto", "chat") and self._config.chat_template != "none":
            template = getattr(processor, "chat_template", None)
        mark = getattr(processor, "boi_token", None) or getattr(processor, "image_token", None)
        if mark is None:
            raise ConfigError(f"{type(processor).__name__} has no placeholder for a picture; leave --image out")
        if template is None:
            return f"{mark}\n{self._plain([Exchange(question)])[0]}"
        system = [{"role": "system", "content": self._system}] if self._system else []
        parts = [{"type": "image"}, {"type": "text", "text": question}]
        for content in (parts, f"{mark}\n{question}"):  # templates that know parts, and those that know texts alone
            messages = [*system, {"role": "user", "content": content}]
            try:
                text = self._rendered(processor, template, messages, add_generation_prompt=True)
            except (*_render_errors(), KeyError):
                continue
            if mark in text and "{'type'" not in text:
                return text
        raise ConfigError("the chat template has no place for a picture; give another with --chat-template FILE")

    def prompt_of(self, question: str, text: str, token_ids: list[int], offsets: list[list[int]]) -> Prompt:
        """A prompt that was tokenised elsewhere."""
        found = text.rfind(question.strip())
        header_start = found + len(question.strip()) if found >= 0 else len(text)
        spans = _spans(text, offsets, question, header_start, system=self._system)
        return Prompt(text, token_ids, offsets, spans, question, self.template_sha256)

    def _read_template(self) -> str | None:
        choice, form = self._config.chat_template, self._config.prompt_form
        if form == "chat" and choice == "none":
            raise ConfigError("--prompt-form chat with --chat-template none - at `$.prompt.prompt_form`; leave one out")
        if form in ("question", "plain") and choice not in (None, "none"):
            raise ConfigError(
                f"--prompt-form {form} with --chat-template {choice} - at `$.prompt.prompt_form`; leave one out"
            )
        if choice == "none" or form in ("question", "plain"):
            return None
        if choice is None:
            template = getattr(self._tokenizer, "chat_template", None)
            template = template.get("default") if isinstance(template, dict) else template
            if template is None and form == "chat":
                raise ConfigError(
                    "--prompt-form chat - at `$.prompt.prompt_form`; the tokenizer has no chat template: give one with "
                    "--chat-template FILE, or take question or plain"
                )
            return template
        try:
            return Path(choice).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(
                f"chat template {choice!r} - at `$.prompt.chat_template`; cannot be read: {error}"
            ) from error

    def _plain(self, exchanges: Sequence[Exchange]) -> tuple[str, int]:
        """Question/answer text, or bare text, and where the part after the question starts."""
        if self._is_bare:
            parts = [self._system] * bool(self._system) + [
                f"{question} {answer}" for question, answer in exchanges[:-1]
            ]
            text = "\n\n".join([*parts, exchanges[-1].question])
            return text, len(text)
        solved = [f"Question: {question}\nAnswer: {answer}\n\n" for question, answer in exchanges[:-1]]
        system = f"{self._system}\n\n" if self._system else ""
        before = system + "".join(solved) + f"Question: {exchanges[-1].question}"
        return before + "\nAnswer:", len(before)

    def _chat(self, exchanges: Sequence[Exchange]) -> tuple[str, int]:
        messages = [{"role": "system", "content": self._system}] if self._system else []
        for question, answer in exchanges:
            messages.append({"role": "user", "content": question})
            messages.append({"role": "assistant", "content": answer})
        messages.pop()
        text = self.render(messages, add_generation_prompt=True)
        before = self.render(messages, add_generation_prompt=False)
        if text.startswith(before):
            return text, len(before)
        question = exchanges[-1].question.strip()
        found = text.rfind(question)
        return text, found + len(question) if found >= 0 else len(text)

    def render(self, messages: Sequence[Mapping[str, str]], *, add_generation_prompt: bool) -> str:
        """The text of messages by the chat template, which there has to be.

        Raises:
            ConfigError: the template does not take them.
        """
        assert self._template is not None, "there is no chat template"
        try:
            return self._rendered(
                self._tokenizer, self._template, [*messages], add_generation_prompt=add_generation_prompt
            )
        except _render_errors() as error:
            hint = (
                " (this template takes no system message: pass --system '')" if "system" in str(error).lower() else ""
            )
            raise ConfigError(f"the chat template does not render: {error}{hint}") from error

    def _rendered(self, renderer: Any, template: str, messages: list[Any], *, add_generation_prompt: bool) -> str:
        """Messages by a template, as a tokenizer or a processor renders it; its clock stands still."""
        return renderer.apply_chat_template(
            messages,
            chat_template=_FROZEN_CLOCK + template if "strftime_now" in template else template,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            tracekit_date={code: self._today.strftime(code) for code in _DATE_CODES},
            **self._arguments,
        )

    def _tokenize(self, text: str, *, is_plain: bool) -> tuple[list[int], list[list[int]]]:
        """Ids and offsets of a text; of a plain one, which no template wrote, with what the tokenizer adds."""
        encoded = self._tokenizer(
            text, add_special_tokens=is_plain and self._config.bos != "never", return_offsets_mapping=True
        )
        ids, offsets = list(encoded.input_ids), [list(pair) for pair in encoded.offset_mapping]
        eos = self._tokenizer.eos_token_id
        if is_plain and ids and eos is not None and ids[-1] == eos and not text.endswith(self._tokenizer.eos_token):
            ids, offsets = ids[:-1], offsets[:-1]  # tokenizers that close every text: the answer comes here
        ids, offsets = with_bos(self._tokenizer, ids, offsets, self._config.bos)
        check_rows(self._tokenizer, ids)
        return ids, offsets


def _spans(
    text: str, offsets: list[list[int]], question: str, header_start: int, *, system: str, has_shots: bool = False
) -> list[Span]:
    """Token ranges of the prompt's parts, found in the rendered text."""
    user = text.rfind(question.strip(), 0, header_start)
    user = user if user >= 0 else header_start
    parts: list[tuple[str, int, int]] = []
    system_start = text.find(system.strip()) if system.strip() else -1
    system_end = 0
    if 0 <= system_start < user:
        system_end = system_start + len(system.strip())
        parts.append(("system", system_start, system_end))
    if has_shots:
        parts.append(("shots", system_end, user))
    parts.append(("user", user, min(user + len(question.strip()), header_start)))
    parts.append(("assistant_header", header_start, len(text)))
    spans = [(name, *tokens_of(offsets, start, stop)) for name, start, stop in parts]
    return [Span(name=name, start=start, stop=stop) for name, start, stop in spans if stop > start]


def _render_errors() -> tuple[type[Exception], ...]:
    """What a chat template that does not render raises."""
    import jinja2

    return (jinja2.TemplateError, TypeError, ValueError)


def draw_shots(
    pool: Sequence[PoolT], count: int, *, seed: int, index: int, asked: Callable[[PoolT], bool]
) -> list[PoolT]:
    """Solved examples for one question, drawn by its own seed from a packaged sample without the question itself.

    Not from the run's questions: those would stand in one another's prompts with their answers, on both sides of any
    split, and would differ with the slice of the source. `asked` says whether one is the question.

    Raises: as `other_shots`.
    """
    return random.Random(f"{seed} {index}").sample(other_shots(pool, count, asked), count)


def other_shots(pool: Sequence[PoolT], count: int, asked: Callable[[PoolT], bool]) -> list[PoolT]:
    """The solved examples without the question itself.

    Raises:
        SourceError: fewer than `count`.
    """
    others = [one for one in pool if not asked(one)]
    if count > len(others):
        raise SourceError(
            f"--num-shots {count}: the task has {len(others)} solved examples that ask another question than the "
            f"prompt; use --num-shots {len(others)}, or give the task more"
        )
    return others


def tokens_of(offsets: Sequence[Sequence[int]], start: int, stop: int) -> tuple[int, int]:
    """`[first, last)` tokens that hold a character of `[start, stop)`."""
    inside = [i for i, (first, last) in enumerate(offsets) if first < stop and last > start]
    return (inside[0], inside[-1] + 1) if inside else (0, 0)


def with_bos(tokenizer: Any, ids: list[int], offsets: list[list[int]], rule: str) -> tuple[list[int], list[list[int]]]:
    """Ids and offsets of a text as `--bos` wants them to begin; `auto` only takes a second one away.

    Raises:
        ConfigError: `always`, and the tokenizer has no beginning-of-sequence token.
    """
    bos = tokenizer.bos_token_id
    if rule == "always":
        if bos is None:
            raise ConfigError("--bos always: this tokenizer has no beginning-of-sequence token")
        if ids[:1] != [bos]:
            ids, offsets = [bos, *ids], [[0, 0], *offsets]
    while rule == "never" and bos is not None and ids[:1] == [bos]:
        ids, offsets = ids[1:], offsets[1:]
    while bos is not None and ids[:2] == [bos, bos]:
        ids, offsets = ids[1:], offsets[1:]
    return ids, offsets


def is_surely_longer(tokenizer: Any, text: str, limit: int) -> bool:
    """Whether the beginning of a text is more than `limit` tokens already; no more of it is tokenised than shows that.

    False says nothing: the text may be short, or tokenised as a whole only (a long run of blanks).
    """
    size = _CHARACTERS_A_TOKEN * max(limit, _CUT_WORD)
    while size < len(text):
        beginning = tokenizer(text[:size], add_special_tokens=False, verbose=False).input_ids
        if len(beginning) > limit + _CUT_WORD:
            return True
        size *= 4
    return False


def sha256_text(text: str) -> str:
    """SHA-256 of a text's UTF-8 bytes, hex."""
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()
