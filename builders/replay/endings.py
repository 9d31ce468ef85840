"""Endings: how an answer from elsewhere ended, in the words of each engine, and in this project's.

read as    finish_reason, done_reason, SGLang's {"type", "matched"}; Anthropic's and Inspect's stop_reason
stop       stop eos eos_token end_turn STOP: the model ended its turn; stop_sequence: a stop string did
length     length max_tokens max_length max_output_tokens model_length MAX_TOKENS
as it is   any other; `unknown` where nothing says it

stop_reason matched_stop stop_string stop_sequence      the stop string, or the id of the token that ended the turn
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

from tracekit.errors import SourceError

__all__ = ["Ending", "ending_of"]

_BY_STRING = "stop_sequence"
_NAMES = ("finish_reason", "done_reason", "finishReason", "stopReason")
_STOPS = ("stop_reason", "matched_stop", "stop_string", _BY_STRING)
_REASONS = {
    **dict.fromkeys(("stop", "eos", "eos_token", "end_turn", _BY_STRING), "stop"),
    **dict.fromkeys(("length", "max_tokens", "max_length", "max_output_tokens", "model_length"), "length"),
    **dict.fromkeys(("tool_calls", "tool_use"), "tool_calls"),
    **{word: word for word in ("content_filter", "refusal", "unknown")},
}
_STOP_LISTS = ("stop", "stop_sequences", "stop_strings")
_IN_REQUESTS = ("sampling_params", "parameters", "params", "options", "generation_config")
"""Where requests keep their stop strings, other than at their top."""


class Ending(NamedTuple):
    """How an answer ended."""

    reason: str
    """`stop`, `length`, or what the log says."""
    stop: str | int | None
    """The stop string that ended it, or the id of the token that did; None where it is not said."""
    is_own: bool
    """Whether the model ended its turn by itself: not cut, and not stopped by a string."""


def ending_of(request: Mapping[str, Any], reply: Mapping[str, Any], holder: Mapping[str, Any]) -> Ending:
    """How the answer ended, as the log says it of the answer or beside it.

    Raises:
        SourceError: the reason is no text.
    """
    sides = (holder, reply, request)
    said = next((side[name] for side in sides for name in _NAMES if side.get(name)), None)
    told = [side[name] for side in sides for name in _STOPS if name in side]
    if isinstance(said, dict):
        told += [said["matched"]] if "matched" in said else []
        said = said.get("type")
    if not isinstance(said, str | None):
        raise SourceError(f"'finish_reason' is {said!r}; expected a text, as 'stop' or 'length'")
    stops = [int(one) if isinstance(one, float) and one.is_integer() else one for one in told]  # a column with gaps
    stops = [one for one in stops if isinstance(one, str | int) and not isinstance(one, bool) and one != ""]
    first = stops[0] if stops else None
    if said is None and isinstance(first, str) and first.lower() in _REASONS:
        said, told = first, [one for one in stops if one != first]
        stops = told
    others = [one for one in stops if isinstance(one, str) and one != "stop" and one.lower() in _REASONS]
    if others:  # words beside a finish_reason, and no strings
        told = stops = [one for one in stops if one not in others]
    word, stop = (said or "unknown").lower(), stops[0] if stops else None
    asked = (request, *(request[name] for name in _IN_REQUESTS if isinstance(request.get(name), dict)))
    has_strings = any(side.get(name) for side in asked for name in _STOP_LISTS)
    may_be_string = _BY_STRING in others or (word == "stop" and not told and not others and has_strings)
    is_end = _REASONS.get(word) == "stop" and word != _BY_STRING
    return Ending(_REASONS.get(word, said or word), stop, is_end and not isinstance(stop, str) and not may_be_string)
