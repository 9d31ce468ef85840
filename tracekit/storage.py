"""Storage forms that give up accuracy for size: what a capture hands over in, what a shard holds out, and back again.

    --store-dtype int8     hidden_states         (L, T, D) int8        layout "scaled"
    --store-dtype float8   hidden_states.scales  (L, D) float32        value = stored * scale of its layer and channel
                           hidden_states.token_scales    (L, T)                * scale of its layer and token

    --attention-top-p 0.9  attentions            (W,) as captured      layout "sparse": the weights that were kept,
                           attentions.indices    (W,) uint16           query row by query row, the key of each,
                           attentions.counts     (L, H, T) uint16      how many each row has,
                           attentions.mass       (L, H, T) float32     and what they add up to

Scales are a sample's own. A token's is the largest of its values; a channel's makes the largest value of the channel,
divided by the tokens', the largest number of the dtype. Both are needed: some channels are large in every token, and in
many models the first token is a thousand times larger than the others in a few. They stand for every tensor that has
channels (hidden states, residual stream, queries, keys, values); probabilities have none and keep their dtype.

Of attention, each row keeps the fewest largest weights that reach the share `top_p` of its sum, the others read as 0.
What either costs is measured on every value that is stored.

This module knows numpy and nothing of models, records or shards.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Self

import ml_dtypes
import msgspec
import numpy as np

from tracekit.errors import CaptureError, CorruptShardError
from tracekit.tensors import TensorSpec, is_companion, positions_of, site_of, unpack_causal

__all__ = [
    "QUANTIZED_DTYPES",
    "Kept",
    "StorageForm",
    "StorageLoss",
    "added_up",
    "companion_names",
    "content_problem",
    "for_storage",
    "keep_top_p",
    "plain_spec",
    "problem_of",
    "quantize",
    "spread",
    "unpacked",
    "upscale",
]

QUANTIZED_DTYPES = {"int8": np.dtype(np.int8), "float8": np.dtype(ml_dtypes.float8_e4m3fn)}
"""Values of `--store-dtype` that come with scales, and the dtypes behind them."""

_CHANNELLED = "DE"
_WEIGHTS = ("float32", "bfloat16", "float16")
_COMPANIONS = {"scaled": ("scales", "token_scales"), "sparse": ("indices", "counts", "mass")}
_MAX_KEYS = (1 << 16) - 1
_TINY = np.finfo(np.float32).tiny
_BLOCK_VALUES = 1 << 21
"""Weights that are sorted at once: what that takes is some twenty times their size."""


class StorageLoss(msgspec.Struct, frozen=True, kw_only=True):
    """What storing a tensor in another form than it was captured in has cost, over all samples."""

    name: str
    """Name of the tensor."""
    form: str
    """`int8`, `float8_e4m3fn`, or `sparse`."""
    layers: list[int]
    """Layers that the sums by layer are of; empty where the tensor has none."""
    errors: list[float]
    """Sum over vectors (of one token, and one head where there are heads; of attention a query row) of the norm of the
    difference divided by the vector's norm, by layer; of one entry without layers. So every token counts alike, though
    the values of a first token may be a thousand times the others'."""
    num_vectors: int
    """Vectors in each of these sums."""
    max_error: float
    """The largest of one vector."""
    max_abs_error: float
    """Largest absolute difference."""
    num_values: int
    """Values that were captured."""
    num_kept: int
    """Values that are stored; of sparse attention fewer."""
    num_rows: int = 0
    """Sparse attention: query rows."""
    mass: float = 0.0
    """Sparse attention: sum over the rows of the weights that were kept."""
    min_mass: float = 0.0
    """Sparse attention: the least that a row kept."""

    def __post_init__(self) -> None:
        if len(self.errors) != max(1, len(self.layers)):
            raise ValueError(f"{len(self.errors)} errors of {len(self.layers)} layers")

    @property
    def relative_errors(self) -> list[float]:
        """Mean relative error of a vector, by layer."""
        return [error / max(1, self.num_vectors) for error in self.errors]

    @property
    def relative_error(self) -> float:
        """The same over all layers."""
        return sum(self.relative_errors) / len(self.errors)

    def in_words(self) -> str:
        """What it cost, as a line for people."""
        if self.form == "sparse":
            share, mass = self.num_kept / max(1, self.num_values), self.mass / max(1, self.num_rows)
            return f"{share:.1%} of the weights, {mass:.4f} of a row's mass on average and {self.min_mass:.4f} at least"
        errors = self.relative_errors
        worst = max(range(len(errors)), key=errors.__getitem__)
        where = f" (largest in layer {self.layers[worst]}: {errors[worst]:.2e})" if self.layers else ""
        return f"relative error of a token's vector {self.relative_error:.2e}{where}, {self.max_error:.2e} at most"

    def with_more(self, other: Self) -> Self:
        """Both together; of the same tensor in the same form."""
        assert (self.name, self.form, self.layers) == (other.name, other.form, other.layers), (self, other)
        return type(self)(
            name=self.name,
            form=self.form,
            layers=self.layers,
            errors=[a + b for a, b in zip(self.errors, other.errors, strict=True)],
            num_vectors=self.num_vectors + other.num_vectors,
            max_error=max(self.max_error, other.max_error),
            max_abs_error=max(self.max_abs_error, other.max_abs_error),
            num_values=self.num_values + other.num_values,
            num_kept=self.num_kept + other.num_kept,
            num_rows=self.num_rows + other.num_rows,
            mass=self.mass + other.mass,
            min_mass=min(self.min_mass, other.min_mass),
        )


class StorageForm(NamedTuple):
    """The tensors of one sample as a shard holds them."""

    tensors: dict[str, np.ndarray]
    """By name."""
    specs: list[TensorSpec]
    """What each of them is."""
    losses: list[StorageLoss]
    """What it cost; empty where nothing changed."""


def for_storage(
    specs: Sequence[TensorSpec], tensors: Mapping[str, np.ndarray], *, dtype: str, top_p: float
) -> StorageForm:
    """Bring captured tensors into the forms that were asked for: `dtype` as `--store-dtype`, 1 keeps all attention.

    Raises:
        CaptureError: a value is not finite, which these forms do not know, or a text is too long for sparse attention.
    """
    stored = StorageForm({}, [], [])
    for spec in specs:
        array = tensors[spec.name]
        if dtype in QUANTIZED_DTYPES and spec.axes[-1] in _CHANNELLED:
            _add_scaled(stored, spec, array, QUANTIZED_DTYPES[dtype])
        elif top_p < 1 and site_of(spec.name) == "attentions":
            _add_sparse(stored, spec, array, top_p)
        else:
            stored.tensors[spec.name] = array
            stored.specs.append(spec)
    return stored


def added_up(losses: Iterable[StorageLoss]) -> list[StorageLoss]:
    """Losses of many samples, those of one tensor as one."""
    found: dict[str, StorageLoss] = {}
    for loss in losses:
        found[loss.name] = found[loss.name].with_more(loss) if loss.name in found else loss
    return list(found.values())


# ---------------------------------------------------------------- scaled


class Quantized(NamedTuple):
    """Values in few bits, and the scales that they are to be multiplied with."""

    values: np.ndarray
    """(..., T, D) int8 or float8_e4m3fn."""
    scales: np.ndarray
    """(..., D) float32."""
    token_scales: np.ndarray
    """(..., T) float32."""


def quantize(array: np.ndarray, dtype: np.dtype) -> Quantized:
    """Round finite values (..., T, D) to `dtype`, with a scale for each channel of the last axis and for each token.

    Rounding is to nearest. The error of int8 is at most half the product of the scales, so a 254th of the token's
    largest value; that of float8_e4m3fn at most a 16th of the value itself, or a 2^10th of that product.
    """
    wide = array.astype(np.float32)
    token_scales = np.maximum(np.abs(wide).max(axis=-1, initial=0.0), _TINY)
    wide /= token_scales[..., None]
    top = 127.0 if dtype == np.int8 else float(ml_dtypes.finfo(dtype).max)
    scales = np.maximum(np.abs(wide).max(axis=-2, initial=0.0) / np.float32(top), _TINY)
    wide /= scales[..., None, :]
    return Quantized((np.rint(wide) if dtype == np.int8 else wide).astype(dtype), scales, token_scales)


def upscale(values: np.ndarray, scales: np.ndarray, token_scales: np.ndarray) -> np.ndarray:
    """Undo `quantize` up to its error: (..., T, D) float32.

    Raises:
        CorruptShardError: the scales are not those of these values.
    """
    expected = (*values.shape[:-2], *values.shape[-1:]), values.shape[:-1]
    if values.ndim < 2 or (scales.shape, token_scales.shape) != expected:
        raise CorruptShardError(f"scales {scales.shape} and {token_scales.shape} of values {values.shape}")
    wide = values.astype(np.float32)
    wide *= scales[..., None, :]
    wide *= token_scales[..., None]
    return wide


def _add_scaled(stored: StorageForm, spec: TensorSpec, array: np.ndarray, dtype: np.dtype) -> None:
    """Add a tensor and its scales."""
    if not _is_finite(array):
        raise CaptureError(
            f"{spec.name}: not finite, which {dtype} with scales does not know; use another --store-dtype"
        )
    is_layered = bool(spec.layers)
    parts: list[Quantized] = []
    errors: list[np.ndarray] = []
    max_abs_error = 0.0
    for layer in array if is_layered else [array]:  # one by one: their wide copies take a multiple of the memory
        parts.append(quantize(layer, dtype))
        wide = layer.astype(np.float32)
        difference = wide - upscale(*parts[-1])
        errors.append(_relative_errors(difference, wide))
        max_abs_error = max(max_abs_error, float(np.abs(difference).max(initial=0.0)))
    quantized = Quantized(*(np.stack(column) if is_layered else column[0] for column in zip(*parts, strict=True)))
    stored.losses.append(_loss(spec, str(dtype), errors, max_abs_error, num_values=array.size, num_kept=array.size))
    _add(stored, spec, quantized.values, dtype=str(dtype), layout="scaled")
    axes = [*spec.axes[:-2], spec.axes[-1]]
    _add(stored, spec, quantized.scales, name=f"{spec.name}.scales", dtype="float32", axes=axes)
    _add(stored, spec, quantized.token_scales, name=f"{spec.name}.token_scales", dtype="float32", axes=spec.axes[:-1])


# ---------------------------------------------------------------- sparse


class Kept(NamedTuple):
    """Rows of attention of which the largest weights were kept."""

    values: np.ndarray
    """(W,) the weights, row after row, in each row by key."""
    indices: np.ndarray
    """(W,) uint16: the key of each."""
    counts: np.ndarray
    """(..., T_query) uint16: how many each row has."""
    mass: np.ndarray
    """(..., T_query) float32: what they add up to."""


def keep_top_p(weights: np.ndarray, top_p: float) -> Kept:
    """Of each row of attention (..., T_query, T) the fewest largest weights that reach the share `top_p` of its sum.

    Among equal weights those of earlier keys are kept first.
    """
    return _kept(weights, _largest(weights, top_p))


def _kept(weights: np.ndarray, is_kept: np.ndarray) -> Kept:
    """These of the weights, by row and key."""
    indices = np.broadcast_to(np.arange(weights.shape[-1], dtype=np.uint16), weights.shape)[is_kept]
    mass = np.where(is_kept, weights, 0).sum(-1, dtype=np.float64).astype(np.float32)
    return Kept(weights[is_kept], indices, is_kept.sum(-1, dtype=np.uint16), mass)


def _largest(weights: np.ndarray, top_p: float) -> np.ndarray:
    """Which weights (..., T_query, T) `keep_top_p` keeps."""
    wide = weights.astype(np.float32)
    descending = -np.sort(-wide, axis=-1)
    reached = np.cumsum(descending, axis=-1, dtype=np.float64)
    counts = np.minimum((reached < top_p * reached[..., -1:]).sum(-1) + 1, (wide > 0).sum(-1))
    last = np.take_along_axis(descending, np.maximum(counts - 1, 0)[..., None], axis=-1)
    is_kept, is_last = wide > last, wide == last
    num_last = counts - is_kept.sum(-1)
    is_kept |= is_last & (np.cumsum(is_last, axis=-1, dtype=np.int32) <= num_last[..., None])
    return is_kept & (counts > 0)[..., None]


def spread(values: np.ndarray, indices: np.ndarray, counts: np.ndarray, num_keys: int) -> np.ndarray:
    """Undo `keep_top_p` but for the weights that were left out: (..., T_query, num_keys), 0 where nothing was kept.

    Raises:
        CorruptShardError: the counts do not go with the weights, or a key is past the end.
    """
    if (problem := _counts_problem(len(values), indices, counts, num_keys)) is not None:
        raise CorruptShardError(problem)
    full = np.zeros((counts.size, num_keys), values.dtype)
    full[np.repeat(np.arange(counts.size), counts.ravel()), indices] = values
    return full.reshape(*counts.shape, num_keys)


def _add_sparse(stored: StorageForm, spec: TensorSpec, array: np.ndarray, top_p: float) -> None:
    """Add the kept weights and what tells where they belong; layer by layer, so that no more is unpacked at once."""
    if not _is_finite(array):
        raise CaptureError(
            f"{spec.name}: not finite, which sparse attention does not know; leave --attention-top-p out"
        )
    if spec.num_keys > _MAX_KEYS:
        raise CaptureError(
            f"{spec.name}: {spec.num_keys} tokens are more than the {_MAX_KEYS} that sparse attention can name; leave "
            "--attention-top-p out"
        )
    parts: list[Kept] = []
    errors: list[list[np.ndarray]] = []
    max_abs_error = 0.0
    for layer in array:
        errors.append([])
        for block in _blocks(layer, spec):
            is_kept, wide = _largest(block, top_p), block.astype(np.float32)
            parts.append(_kept(block, is_kept))
            dropped = np.where(is_kept, np.float32(0), wide)
            errors[-1].append(_relative_errors(dropped, wide))
            max_abs_error = max(max_abs_error, float(dropped.max(initial=0.0)))
    shape = (*array.shape[:2], len(positions_of(spec.positions)))
    kept = Kept(
        np.concatenate([part.values for part in parts]),
        np.concatenate([part.indices for part in parts]),
        np.concatenate([part.counts.ravel() for part in parts]).reshape(shape),
        np.concatenate([part.mass.ravel() for part in parts]).reshape(shape),
    )
    loss = _loss(
        spec,
        "sparse",
        [np.concatenate(some) for some in errors],
        max_abs_error,
        num_values=array.size,
        num_kept=len(kept.values),
        num_rows=kept.mass.size,
        mass=float(kept.mass.sum(dtype=np.float64)),
        min_mass=float(kept.mass.min(initial=1.0)),
    )
    stored.losses.append(loss)
    _add(stored, spec, kept.values, layout="sparse", axes=["W"])
    _add(stored, spec, kept.indices, name=f"{spec.name}.indices", dtype="uint16", axes=["W"])
    for name, values in (("counts", kept.counts), ("mass", kept.mass)):
        _add(stored, spec, values, name=f"{spec.name}.{name}", dtype=str(values.dtype), axes=["L", "H", "T"])


def _blocks(layer: np.ndarray, spec: TensorSpec) -> Iterator[np.ndarray]:
    """Rows (h, q, T) of a layer's attention in order, unpacked, so many at once as memory should hold."""
    rows, num_keys = positions_of(spec.positions), spec.num_keys
    heads_at_once = max(1, _BLOCK_VALUES // max(1, len(rows) * num_keys))
    rows_at_once = max(1, len(rows) if heads_at_once > 1 else _BLOCK_VALUES // max(1, num_keys))
    for head in range(0, len(layer), heads_at_once):
        some = layer[head : head + heads_at_once]
        whole = unpack_causal(some, rows, num_keys) if spec.layout == "causal" else some
        for row in range(0, max(1, len(rows)), rows_at_once):
            yield whole[:, row : row + rows_at_once]


# ---------------------------------------------------------------- what is stored, as it was captured


def companion_names(spec: TensorSpec) -> list[str]:
    """Names of the tensors without which this one cannot be read."""
    return [f"{spec.name}.{suffix}" for suffix in _COMPANIONS.get(spec.layout, ())]


def plain_spec(spec: TensorSpec, counts: TensorSpec | None = None) -> TensorSpec:
    """What a tensor is once it is unpacked; `counts` is the spec of a sparse tensor's counts."""
    if spec.layout == "scaled":
        return msgspec.structs.replace(spec, layout="dense", dtype="float32")
    if spec.layout != "sparse":
        return spec
    assert counts is not None, spec.name
    return msgspec.structs.replace(spec, layout="full", axes=["L", "H", "T", "T"], shape=[*counts.shape, spec.num_keys])


def unpacked(spec: TensorSpec, tensors: Mapping[str, np.ndarray]) -> np.ndarray:
    """A stored tensor as `plain_spec` says; one that was stored as it was captured comes back as it is.

    Raises:
        CorruptShardError: what belongs to it does not go with it.
    """
    array = tensors[spec.name]
    companions = [tensors[name] for name in companion_names(spec)]
    if spec.layout == "scaled":
        return upscale(array, *companions)
    if spec.layout == "sparse":
        return spread(array, companions[0], companions[1], spec.num_keys)
    return array


def problem_of(spec: TensorSpec, specs: Mapping[str, TensorSpec]) -> str | None:
    """What is wrong with the specs of the tensors that belong to one; None where nothing is."""
    if is_companion(spec.name):
        owner = specs.get(spec.name.rpartition(".")[0])
        is_known = owner is not None and spec.name in companion_names(owner)
        if owner is None or not is_known:
            return f"belongs to no tensor with layout {' or '.join(_COMPANIONS)}"
        return None if spec.layers == (owner.layers if "L" in spec.axes else []) else f"is of layers {spec.layers}"
    number = spec.name.partition(".")[2]
    if number and spec.layers != [int(number)]:
        return f"is of layers {spec.layers}"
    missing = [name for name in companion_names(spec) if name not in specs]
    if missing:
        return f"{', '.join(missing)} is missing, without which layout {spec.layout!r} cannot be read"
    if spec.layout == "scaled":
        scales, of_tokens = (specs[name] for name in companion_names(spec))
        kinds = {scales.dtype, of_tokens.dtype}
        if spec.dtype not in map(str, QUANTIZED_DTYPES.values()) or kinds != {"float32"}:
            return f"{spec.dtype} with scales in {', '.join(kinds)}, expected int8 or float8_e4m3fn, and float32"
        expected = [*spec.shape[:-2], spec.shape[-1]], spec.shape[:-1]
        if len(spec.shape) < 2 or (scales.shape, of_tokens.shape) != expected:
            return f"scales {scales.shape} and {of_tokens.shape} of {spec.shape}"
        if spec.axes[-1] not in _CHANNELLED or spec.axes[-2] != "T":
            return f"scales of axes {spec.axes}, which end in no tokens and channels"
    if spec.layout == "sparse":
        indices, counts, mass = (specs[name] for name in companion_names(spec))
        num_rows = len(positions_of(spec.positions))
        is_right = indices.shape == spec.shape and len(spec.shape) == 1 and mass.shape == counts.shape
        if site_of(spec.name) != "attentions" or spec.choice_offsets or spec.dtype not in _WEIGHTS:
            return f"layout sparse in {spec.dtype}, which attention in {', '.join(_WEIGHTS)} alone has"
        if (
            not is_right
            or len(counts.shape) != 3
            or not counts.shape[1]
            or (counts.shape[0], counts.shape[2]) != (len(spec.layers), num_rows)
        ):
            return (
                f"weights {spec.shape}, indices {indices.shape}, counts {counts.shape} and mass {mass.shape} of "
                f"{len(spec.layers)} layers and {num_rows} query rows"
            )
        if (indices.dtype, counts.dtype, mass.dtype) != ("uint16", "uint16", "float32"):
            return f"indices {indices.dtype}, counts {counts.dtype} and mass {mass.dtype}"
    return None


def content_problem(spec: TensorSpec, tensors: Mapping[str, np.ndarray]) -> str | None:
    """What is wrong with the values of a tensor and of those that belong to it, whose specs are right; nothing is
    unpacked for it."""
    companions = [tensors[name] for name in companion_names(spec)]
    if spec.layout == "scaled":
        is_finite = all(np.isfinite(scales).all() for scales in companions)
        is_number = spec.dtype == "int8" or not np.isnan(tensors[spec.name].astype(np.float16)).any()
        return None if is_finite and is_number else "holds values or scales that are not finite"
    if spec.layout == "sparse":
        indices, counts, mass = companions
        values = tensors[spec.name].astype(np.float64)
        if (problem := _counts_problem(len(values), indices, counts, spec.num_keys)) is not None:
            return problem
        rows = np.repeat(np.arange(counts.size), counts.ravel())
        if (np.diff(indices.astype(np.int64)) <= 0)[np.diff(rows) == 0].any():
            return "keys of a row that do not rise"
        sums = np.bincount(rows, weights=values, minlength=counts.size)
        if not np.allclose(sums, mass.ravel(), rtol=1e-5, atol=1e-6):
            return "rows that do not add up to their mass"
    return None


def _counts_problem(num_weights: int, indices: np.ndarray, counts: np.ndarray, num_keys: int) -> str | None:
    total = int(counts.sum(dtype=np.int64))
    if not total == num_weights == len(indices):
        return f"{total} weights are counted, {num_weights} are there"
    if num_weights and indices.max() >= num_keys:
        return f"a weight of key {indices.max()}, in a text of {num_keys} tokens"
    return None


def _add(stored: StorageForm, like: TensorSpec, array: np.ndarray, **changes: object) -> None:
    spec = msgspec.structs.replace(like, **{"shape": list(array.shape), **changes})
    if spec.name != like.name:  # what belongs to it
        layers = like.layers if "L" in spec.axes else []
        positions = like.positions if "T" in spec.axes else []
        spec = msgspec.structs.replace(
            spec, layout="dense", num_keys=0, choice_offsets=[], layers=layers, positions=positions
        )
    stored.tensors[spec.name] = np.ascontiguousarray(array)
    stored.specs.append(spec)


def _loss(
    spec: TensorSpec, form: str, errors: Sequence[np.ndarray], max_abs_error: float, **counts: Any
) -> StorageLoss:
    """What one tensor lost: the relative errors of its vectors, layer by layer, and what was counted."""
    return StorageLoss(
        name=spec.name,
        form=form,
        layers=spec.layers,
        errors=[float(error.sum()) for error in errors],
        num_vectors=len(errors[0]),
        max_error=max(float(error.max(initial=0.0)) for error in errors),
        max_abs_error=max_abs_error,
        **counts,
    )


def _relative_errors(difference: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Norm of each vector's difference divided by the vector's norm, 0 for a vector of zeros; of all in order."""
    errors, norms = (
        np.sqrt(np.einsum("...d,...d->...", one, one, dtype=np.float64)).ravel() for one in (difference, values)
    )
    return np.divide(errors, norms, out=np.zeros_like(errors), where=norms > 0)


def _is_finite(array: np.ndarray) -> bool:
    return all(bool(np.isfinite(part.astype(np.float32, copy=False)).all()) for part in array)
