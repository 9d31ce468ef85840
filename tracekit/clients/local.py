"""A local model that is asked: a Hub id, a folder, a GGUF file or `demo`, loaded as builders load theirs.

Requests are rendered by the chat template (with its date standing still, see tracekit.model.prompts) and answered in
batches of like length, so that little is padded; what is drawn is drawn from a generator of each request's own. A
system message that the template refuses is put before the first message of the user. A base model without template
goes on with `User: ...`, `Assistant:`; its reply ends where it begins to ask the next question itself.
"""

import hashlib
import json
from collections import defaultdict
from collections.abc import Sequence
from typing import NamedTuple

import msgspec
import torch

from tracekit.clients.client import (
    DEFAULT_SETTINGS,
    ChatMessage,
    ClientConfig,
    OnReply,
    Reply,
    Request,
    failed_reply,
    ignore_reply,
)
from tracekit.config import DrawConfig, ModelConfig, PromptConfig
from tracekit.console import say
from tracekit.errors import ConfigError
from tracekit.model.answers import parse_answer
from tracekit.model.generation import Generated, answer_once
from tracekit.model.memory import is_out_of_memory
from tracekit.model.models import load_model, load_tokenizer, max_positions, model_info
from tracekit.model.prompts import Prompt, Prompter
from tracekit.model.traced import TracedModel
from tracekit.records import ModelInfo

__all__ = ["LocalClient"]

_HASH_LENGTH = 12
"""Hex digits of a revision that stand in a name."""


class _Question(NamedTuple):
    """A request that is ready to be run."""

    place: int
    """Where it stands among the requests."""
    prompt: Prompt
    max_new_tokens: int
    """As requested, or what the model has positions for."""
    temperature: float
    seed: str


class LocalClient:
    """Asks a model that runs here; its weights are loaded when something is asked first.

    `json_schema` of a request holds the model to nothing. int8 with outliers couples the rows of a batch, so there
    prompts run one by one.

    Raises:
        ModelError: no such model, or it cannot be loaded.
        ConfigError: no such device; a GGUF file that is to be quantised.
    """

    def __init__(self, model: ModelConfig, settings: ClientConfig = DEFAULT_SETTINGS) -> None:
        self._config, self._batch_size = model, settings.concurrency
        self._tokenizer = load_tokenizer(model)
        self._prompter = Prompter(self._tokenizer, PromptConfig(), default_system="")
        added = [token.content for token in self._tokenizer.added_tokens_decoder.values() if token.special]
        self._special_tokens = sorted({*added, *self._tokenizer.all_special_tokens}, key=len, reverse=True)
        self._info = model_info(model, variant=self._prompter.variant)
        self._limit = max_positions(model)
        self._traced: TracedModel | None = None
        self.name = _name_of(self._info)

    def ask(self, requests: Sequence[Request], on_reply: OnReply = ignore_reply) -> list[Reply]:
        """Replies in the order of the requests; a prompt that the model cannot take has an error instead."""
        replies: dict[int, Reply] = {}

        def settle(index: int, reply: Reply) -> None:
            replies[index] = reply
            on_reply(index, reply)

        groups: dict[tuple[int, float], list[_Question]] = defaultdict(list)
        for index, request in enumerate(requests):
            question = self._question(index, request)
            if isinstance(question, Reply):
                settle(index, question)
            else:
                groups[question.max_new_tokens, question.temperature].append(question)
        for group in groups.values():
            traced = self._load()
            waiting = sorted(group, key=lambda one: (-len(one.prompt.token_ids), one.place))
            while waiting:  # the longest first: where memory runs out, it does so at once
                batch = waiting[: self._batch_size]
                answered = self._answer(traced, batch)
                if answered is None and len(batch) > 1:
                    self._batch_size = len(batch) // 2
                    say(f"{self.name}: out of memory, going on with {self._batch_size} prompts at a time")
                    continue
                for question, reply in zip(batch, answered or [_no_memory(batch[0])], strict=True):
                    settle(question.place, reply)
                waiting = waiting[len(batch) :]
        return [replies[index] for index in range(len(requests))]

    def close(self) -> None:
        """Let go of the weights; asking again loads them again."""
        self._traced = None
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def _question(self, index: int, request: Request) -> _Question | Reply:
        """A request as the model reads it, or why it cannot."""
        try:
            prompt = self._render(request.messages)
        except ConfigError as error:
            return failed_reply(str(error))
        length = len(prompt.token_ids)
        room = request.max_new_tokens if self._limit is None else min(request.max_new_tokens, self._limit - length)
        if room < 1:
            return failed_reply(
                f"the prompt has {length} tokens and {self.name} positions for {self._limit}; shorten it"
            )
        return _Question(index, prompt, room, request.temperature, _seed_of(request))

    def _render(self, messages: Sequence[ChatMessage]) -> Prompt:
        chat = [{"role": message.role, "content": self._plain_text(message.content)} for message in messages]
        try:
            return self._prompter.chat(chat)
        except ConfigError:
            if [one["role"] for one in chat[:2]] != ["system", "user"]:
                raise
            merged = {"role": "user", "content": f"{chat[0]['content']}\n\n{chat[1]['content']}"}
            return self._prompter.chat([merged, *chat[2:]])

    def _plain_text(self, text: str) -> str:
        """A text in which no special token stands: a space after its first character makes it ordinary text."""
        for token in self._special_tokens:
            text = text.replace(token, f"{token[0]} {token[1:]}")
        return text

    def _load(self) -> TracedModel:
        if self._traced is None:
            say(f"loading {self.name}")
            self._traced = load_model(self._config, self._info, self._tokenizer, ())
            if self._traced.is_row_coupled:
                self._batch_size = 1
        return self._traced

    def _answer(self, traced: TracedModel, batch: Sequence[_Question]) -> list[Reply] | None:
        """Replies to questions of equal settings; None where memory ran out."""
        first = batch[0]
        is_drawn = first.temperature > 0
        config = DrawConfig(
            num_beams=1, max_new_tokens=first.max_new_tokens, temperature=first.temperature if is_drawn else 1.0
        )
        seeds = [question.seed for question in batch] if is_drawn else None
        try:
            generated = answer_once(traced, [list(one.prompt.token_ids) for one in batch], config, seeds)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            generated = None
        if generated is None:
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            return None
        return [self._reply(question, one) for question, one in zip(batch, generated, strict=True)]

    def _reply(self, question: _Question, generated: Generated) -> Reply:
        answer = parse_answer(
            self._tokenizer,
            question.prompt,
            generated.token_ids,
            eos_included=generated.eos_included,
            is_one_line=False,
        )
        text, finish_reason = answer.text, generated.finish_reason
        if question.prompt.template_sha256 is None and "\nUser:" in text:
            text, finish_reason = text.partition("\nUser:")[0].rstrip(), "stop"
        return Reply(
            text=text,
            finish_reason=finish_reason,
            num_input_tokens=len(question.prompt.token_ids),
            num_output_tokens=len(generated.token_ids),
        )


def _name_of(info: ModelInfo) -> str:
    """`org/name@12fd25f77366`, and what was done to it: two folders of one name are two models."""
    kind, colon, digits = info.revision.rpartition(":")
    is_hash = len(digits) >= 40 and set(digits) <= set("0123456789abcdef")
    revision = f"{kind}{colon}{digits[:_HASH_LENGTH]}" if is_hash else info.revision
    changes = [change for change in (info.adapter, info.quantization) if change]
    return f"{info.id}@{revision}" + f" ({', '.join(changes)})" * bool(changes)


def _seed_of(request: Request) -> str:
    """What decides a draw: the request's seed and its text, so that no two questions share their noise."""
    text = json.dumps(msgspec.to_builtins(request.messages), sort_keys=True)
    return f"{request.seed} {hashlib.sha256(text.encode()).hexdigest()}"


def _no_memory(question: _Question) -> Reply:
    return failed_reply(
        f"out of memory at one prompt of {len(question.prompt.token_ids)} tokens alone; "
        "shorten it, or quantise the model"
    )
