"""What is taken of a stored tensor (tokens by name, heads), and samples of different lengths as one array.

    tokens          a name, a position, positions or a slice          what is left of the token axis
    "last_prompt"   the token that predicts the first answer token    nothing: one position
    "first_answer"  first token of the answer, after reasoning        nothing
    "last_answer"   last token of the answer, before end-of-sequence  nothing
    12, -1          position in prompt and answer; -1 is the last     nothing
    "prompt"        0 .. prompt_length                                the prompt's tokens
    "answer"        first_answer .. last_answer, both included        the answer's tokens, none where it is empty
    [3, 5], 2:9     positions in prompt and answer                    these
    "all", None     every position that was kept                      all that are stored

Choices of a multiple-choice question have no answer, so of the names only "all" has a meaning there. Positions count
within the choice: 0 is its first token, an encoder's [CLS], and -1 its last.

This module knows numpy and nothing of files. A `Selected` goes through it: values with the letters of their axes.
"""

from collections.abc import Sequence
from typing import NamedTuple, TypeAlias

import msgspec
import numpy as np

from tracekit.errors import ConfigError, DatasetError, SampleNotFoundError
from tracekit.tensors import TensorSpec, positions_of, unpack_causal

__all__ = [
    "OneChoice",
    "Selected",
    "Stacked",
    "TokenMarks",
    "Tokens",
    "check_choice_tokens",
    "expand_heads",
    "is_single",
    "one_choice",
    "stack_choices",
    "stack_layers",
    "stack_samples",
    "take_head",
    "take_rows",
    "take_single",
    "token_positions",
]

Tokens: TypeAlias = str | int | np.integer | slice | Sequence[int] | np.ndarray | None
"""How tokens are chosen; see the table above."""

_SINGLE_NAMES = ("last_prompt", "first_answer", "last_answer")
_NAMES = (*_SINGLE_NAMES, "prompt", "answer", "all")


class TokenMarks(NamedTuple):
    """The places in one sample's tokens that have a name."""

    num_tokens: int
    """Tokens of prompt and answer."""
    prompt_length: int
    """Tokens of the prompt."""
    last_prompt: int
    """Position of the last prompt token."""
    first_answer: int | None
    """Position of the answer's first token; None where the answer is empty."""
    last_answer: int | None
    """Position of the answer's last token; None where the answer is empty."""


class Selected(NamedTuple):
    """Values of one site of one sample."""

    array: np.ndarray
    """The values."""
    axes: str
    """Letter of each axis, see tracekit.axes; the first `T` is the token axis (attention: the queries)."""
    layers: list[int]
    """Numbers of the layers it holds; empty for a site without layers."""
    where: str
    """Site and sample, for messages."""


class Stacked(NamedTuple):
    """Samples as one array."""

    values: np.ndarray
    """(N, ...), zero where the mask is False."""
    mask: np.ndarray
    """bool: (N,) whether the sample has the position, or (N, T_max) which positions are real; of choices (N, C, ..)."""
    keys: list[str]
    """The samples' keys, in order."""


class OneChoice(NamedTuple):
    """One choice of a sample, as if it were a sample of its own."""

    selected: Selected
    """Its values; attention as (.., T_c, T_c)."""
    spec: TensorSpec
    """What they are: every position of the choice, counted from its own start."""


def one_choice(selected: Selected, spec: TensorSpec, number: int) -> OneChoice:
    """The values of one choice, already cut out, as if they were a sample's own."""
    length = spec.choice_offsets[number + 1] - spec.choice_offsets[number]
    own = msgspec.structs.replace(spec, positions=[[0, length]], choice_offsets=[])
    if spec.layout != "full":
        return OneChoice(selected, own)
    array = selected.array.reshape(*selected.array.shape[:-1], length, length)
    own = msgspec.structs.replace(own, num_keys=length)
    return OneChoice(selected._replace(array=array, axes=selected.axes.replace("S", "TT")), own)


def check_choice_tokens(tokens: Tokens, *, where: str) -> None:
    """Refuse names of tokens that have no meaning in a multiple-choice question.

    Raises:
        ConfigError: a name other than `all`.
    """
    if isinstance(tokens, str) and tokens != "all":
        raise ConfigError(
            f"{where} holds choices, in which there are no tokens {tokens!r}; expected all, a position (0 is the "
            "first, an encoder's [CLS]), positions or a slice"
        )


def is_single(tokens: Tokens) -> bool:
    """Whether a choice of tokens stands for one position, which leaves no token axis."""
    return tokens in _SINGLE_NAMES if isinstance(tokens, str) else isinstance(tokens, int | np.integer)


def token_positions(marks: TokenMarks, tokens: Tokens, *, where: str) -> np.ndarray:
    """Positions (n,) that a choice of tokens stands for in one sample.

    A single position that the sample does not have (an empty answer, past the end) gives no position.

    Raises:
        ConfigError: no such name.
        SampleNotFoundError: one of several positions is past the end.
    """
    if isinstance(tokens, str):
        return _named_positions(marks, tokens)
    every = np.arange(marks.num_tokens)
    if tokens is None or isinstance(tokens, slice):
        return every if tokens is None else every[tokens]
    positions = np.atleast_1d(np.asarray(tokens, dtype=np.int64))
    is_past = (positions < -marks.num_tokens) | (positions >= marks.num_tokens)
    if is_past.any():
        if is_single(tokens):
            return every[:0]
        raise SampleNotFoundError(
            f"{where}: no token {positions[is_past][0]}; the sample has {marks.num_tokens} tokens"
        )
    return every[positions]


def take_head(selected: Selected, head: int, *, num_heads: int | None = None) -> Selected:
    """One head, its axis gone; of `num_heads` heads where grouped ones are counted as the queries' are.

    Raises:
        ConfigError: the site has no heads.
        SampleNotFoundError: no such head.
    """
    axis = _head_axis(selected)
    number = head_number(selected.array.shape[axis], head, num_heads=num_heads, where=selected.where)
    return selected._replace(array=_at(selected.array, axis, number), axes=_without(selected.axes, axis))


def head_number(stored: int, head: int, *, num_heads: int | None, where: str) -> int:
    """Which of the stored heads is meant.

    Raises:
        SampleNotFoundError: no such head.
    """
    total = stored if num_heads is None else num_heads
    if not -total <= head < total:
        raise SampleNotFoundError(f"{where}: no head {head}; heads are 0 to {total - 1}")
    return head % total // (total // stored)


def expand_heads(selected: Selected, *, num_heads: int) -> Selected:
    """Grouped key/value heads repeated, so that there are as many as the queries have: K becomes H."""
    axis = _head_axis(selected)
    times = num_heads // selected.array.shape[axis]
    array = selected.array if times == 1 else np.repeat(selected.array, times, axis=axis)
    return selected._replace(array=array, axes=selected.axes.replace("K", "H"))


def take_rows(selected: Selected, spec: TensorSpec, positions: np.ndarray | None) -> Selected:
    """Values at these positions (None: all that were kept); packed attention becomes (.., T_query, T).

    Raises:
        SampleNotFoundError: a position was not kept; the message says which were.
    """
    rows = None if positions is None else _kept_rows(spec, positions, selected.where)
    if spec.layout == "causal":
        array = _unpack(selected.array, positions_of(spec.positions), rows, spec.num_keys)
        return selected._replace(array=array, axes=selected.axes.replace("S", "TT"))
    if rows is None:
        return selected
    return selected._replace(array=selected.array[(slice(None),) * selected.axes.index("T") + (rows,)])


def take_single(selected: Selected) -> Selected:
    """The one position that is there, its axis gone.

    Raises:
        SampleNotFoundError: the sample does not have the position.
    """
    axis = selected.axes.index("T")
    if selected.array.shape[axis] == 0:
        raise SampleNotFoundError(
            f"{selected.where}: the sample has no such token (an empty answer, or past its end); "
            "`stack` leaves such samples out by its mask"
        )
    return selected._replace(array=_at(selected.array, axis, 0), axes=_without(selected.axes, axis))


def stack_samples(samples: Sequence[Selected], keys: list[str], *, reduce: str) -> Stacked:
    """Stack samples, with `reduce` one of `single`, `mean` (float32) and `pad`.

    `single` and `mean` take the token axis away; `pad` fills it with zeros up to the longest sample. The key axis of
    attention is padded in every case.

    Raises:
        ConfigError: no samples.
        DatasetError: samples differ in layers, dtype, or an axis other than tokens.
    """
    if not samples:
        raise ConfigError("nothing to stack: no keys were given, or the dataset has no sample yet")
    axis = samples[0].axes.index("T")
    lengths = np.array([sample.array.shape[axis] for sample in samples])
    if reduce == "pad":
        return Stacked(_padded(samples), np.arange(lengths.max()) < lengths[:, None], keys)
    return Stacked(_padded([_reduced(sample, reduce) for sample in samples]), lengths > 0, keys)


def stack_choices(samples: Sequence[Sequence[Selected]], keys: list[str], *, reduce: str) -> Stacked:
    """Stack the choices of samples: values (N, C, ...) and mask (N, C, ...), False where a sample has fewer choices.

    `reduce` and errors as in `stack_samples`.
    """
    width = max((len(choices) for choices in samples), default=0)
    flat = stack_samples([choice for choices in samples for choice in choices], [], reduce=reduce)
    if all(len(choices) == width for choices in samples):
        values, mask = flat.values, flat.mask
    else:
        places = [row * width + number for row, choices in enumerate(samples) for number in range(len(choices))]
        values = np.zeros((len(samples) * width, *flat.values.shape[1:]), flat.values.dtype)
        mask = np.zeros((len(samples) * width, *flat.mask.shape[1:]), np.bool_)
        values[places], mask[places] = flat.values, flat.mask
    shape = (len(samples), width)
    return Stacked(values.reshape(*shape, *values.shape[1:]), mask.reshape(*shape, *mask.shape[1:]), keys)


def stack_layers(layers: Sequence[Selected]) -> Selected:
    """Layers of one sample, each without its layer axis, as one."""
    first = layers[0]
    numbers = [number for one in layers for number in one.layers]
    return Selected(np.stack([one.array for one in layers]), f"L{first.axes}", numbers, first.where)


def _at(array: np.ndarray, axis: int, number: int) -> np.ndarray:
    return array[(slice(None),) * axis + (number,)]


def _without(axes: str, axis: int) -> str:
    return axes[:axis] + axes[axis + 1 :]


def _head_axis(selected: Selected) -> int:
    for axis, letter in enumerate(selected.axes):
        if letter in "HK":
            return axis
    raise ConfigError(f"{selected.where} has no heads; leave `head` and `expand_heads` out")


def _kept_rows(spec: TensorSpec, positions: np.ndarray, where: str) -> slice | np.ndarray:
    """Where positions lie among those that were kept; a slice where they are neighbours, so that nothing is copied."""
    kept = positions_of(spec.positions)
    rows = np.searchsorted(kept, positions)
    is_missing = rows == len(kept)
    is_missing[~is_missing] = kept[rows[~is_missing]] != positions[~is_missing]
    if is_missing.any():
        stored = ", ".join(f"{start} to {stop - 1}" for start, stop in spec.positions) or "none"
        raise SampleNotFoundError(
            f"{where}: position {positions[is_missing][0]} was not kept; kept: {stored}. Without `tokens` you get these"
        )
    if len(rows) and (np.diff(rows) == 1).all():
        return slice(int(rows[0]), int(rows[-1]) + 1)
    return rows


def _unpack(packed: np.ndarray, kept: np.ndarray, rows: slice | np.ndarray | None, num_keys: int) -> np.ndarray:
    """Chosen query rows of packed attention, touching no others."""
    if rows is None:
        return unpack_causal(packed, kept, num_keys)
    starts: list[int] = [0, *np.cumsum(kept + 1).tolist()]
    if isinstance(rows, slice):
        chosen: slice | np.ndarray = slice(starts[rows.start], starts[rows.stop])
    else:
        chosen = positions_of([starts[row], starts[row + 1]] for row in rows)
    return unpack_causal(packed[..., chosen], kept[rows], num_keys)


def _named_positions(marks: TokenMarks, name: str) -> np.ndarray:
    if name not in _NAMES:
        raise ConfigError(f"no tokens {name!r}; expected {', '.join(_NAMES)}, a position, positions or a slice")
    if name in ("prompt", "all"):
        return np.arange(marks.prompt_length if name == "prompt" else marks.num_tokens)
    if name == "last_prompt":
        return np.array([marks.last_prompt])
    if marks.first_answer is None or marks.last_answer is None:
        return np.arange(0)
    if name == "answer":
        return np.arange(marks.first_answer, marks.last_answer + 1)
    return np.array([marks.first_answer if name == "first_answer" else marks.last_answer])


def _reduced(selected: Selected, reduce: str) -> Selected:
    """Values without their token axis; zeros where there is no token."""
    axis = selected.axes.index("T")
    if selected.array.shape[axis] == 0:
        shape = selected.array.shape[:axis] + selected.array.shape[axis + 1 :]
        array = np.zeros(shape, np.float32 if reduce == "mean" else selected.array.dtype)
    elif reduce == "mean":
        array = selected.array.astype(np.float32).mean(axis=axis)
    else:
        return take_single(selected)
    return selected._replace(array=array, axes=_without(selected.axes, axis))


def _padded(samples: Sequence[Selected]) -> np.ndarray:
    """Arrays as one, every `T` axis filled with zeros up to the longest."""
    first = _fixed(samples[0])
    for sample in samples:
        if _fixed(sample) != first:
            raise DatasetError(
                f"cannot stack {sample.where} ({_fixed(sample)}) with {samples[0].where} ({first}); "
                "choose samples that differ in tokens alone with `keys`, or one `layer`"
            )
    shape = np.max([sample.array.shape for sample in samples], axis=0)
    values = np.zeros((len(samples), *shape), samples[0].array.dtype)
    for row, sample in zip(values, samples, strict=True):
        row[tuple(slice(length) for length in sample.array.shape)] = sample.array
    return values


def _fixed(sample: Selected) -> str:
    """What has to be the same in all samples of a stack."""
    sizes = [
        f"{letter}={length}" for letter, length in zip(sample.axes, sample.array.shape, strict=True) if letter != "T"
    ]
    return " ".join([str(sample.array.dtype), *sizes, f"layers={sample.layers}"])
