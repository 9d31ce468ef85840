"""Groups of weights, found in a loaded model: which of its matrices are attention, MLP and embeddings.

    attn = q + k + v + o        mlp = gate + up + down        embed

    attn  mlp  embed  q  k  v  o  gate  up  down       in all layers that have them
    mlp:4-8  q:0  attn:-1                              in these layers, counted as in `--layers`

A group holds what a matrix product multiplies with, and nothing else: no biases, norms, convolutions, relative
positions, output heads, nor the router of a mixture of experts (experts are part of the MLP, shared ones too). `embed`
is the table of token embeddings and the tables beside it (learned positions, segments). An MLP without a gate has `up`
and `down`.

What a matrix is follows from its name inside its block, by a table. Several in one tensor are told apart, as views:

    one      q q q q  k k  v v                               GPT-2, Phi-3, MPT; gate and up of most
    per kv   q q k v  q q k v                                GPT-NeoX, BLOOM, Falcon, GPT-BigCode
    four     q v k    q v k    q v k    q v k                CodeGen
    each     gate up  gate up  gate up ...                   gpt-oss

The number of key heads follows from the tensor's size, and so does which axis of an expert is the output. Where the
arrangement is not known, or where k and v share a factor (multi-head latent attention), the parts are refused by name.
A matrix that no row knows is refused, too: a group is never silently incomplete.
"""

import re
from collections.abc import Iterator, Sequence
from typing import Any, Literal, NamedTuple

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from builders.degradation.methods import GROUPS
from tracekit.errors import ConfigError, ModelError
from tracekit.model.anatomy import Anatomy
from tracekit.model.capture import resolve_layers

__all__ = ["GROUPS", "Group", "WeightPiece", "find_group", "find_pieces"]

_Arrangement = Literal["one", "per kv", "four", "each"]


class _Row(NamedTuple):
    """What the matrices of some name are."""

    pattern: re.Pattern[str]
    """Path inside the block, `.weight` left out."""
    parts: tuple[str, ...]
    """The part, or the parts that lie in one tensor; none for what is in no group."""


def _row(path: str, *parts: str) -> _Row:
    return _Row(re.compile(path), parts)


_ATTENTION = r"(?:.*\.)?(?:self_attn|self_attention|attention|attn)\.(?:.*\.)?"
_ANYWHERE = r"(?:.*\.)?"

_ROWS = (
    _row(_ANYWHERE + r"(?:conv\..*|.*_bias)"),
    _row(_ANYWHERE + r"(?:mlp|feed_forward|block_sparse_moe|moe|ffn)\.(?:gate|router|router\..*|shared_expert_gate)"),
    _row(_ATTENTION + r"(?:q_proj|query|query_proj|pos_query_proj|q_lin|q|q_a_proj|q_b_proj)", "q"),
    _row(_ATTENTION + r"(?:k_proj|key|key_proj|pos_key_proj|k_lin|k)", "k"),
    _row(_ATTENTION + r"(?:v_proj|value|value_proj|v_lin|v)", "v"),
    _row(_ATTENTION + r"(?:o_proj|out_proj|dense|c_proj|out_lin|o)", "o"),
    _row(_ATTENTION + r"(?:query_key_value|qkv_proj|Wqkv|c_attn)", "q", "k", "v"),
    _row(_ATTENTION + r"(?:kv_a_proj_with_mqa|kv_b_proj)", "k", "v"),
    _row(_ANYWHERE + r"(?:gate_proj|w1)", "gate"),
    _row(_ANYWHERE + r"(?:up_proj|w3|fc1|fc_in|c_fc|dense_h_to_4h|intermediate\.dense|lin1)", "up"),
    _row(_ANYWHERE + r"(?:down_proj|w2|fc2|fc_out|c_proj|dense_4h_to_h|output\.dense|lin2)", "down"),
    _row(_ANYWHERE + r"gate_up_proj", "gate", "up"),
)
"""First match counts."""

_ARRANGED: dict[str, tuple[tuple[str, ...], _Arrangement]] = {
    "gpt2": (("q", "k", "v"), "one"),
    "phi3": (("q", "k", "v"), "one"),
    "mpt": (("q", "k", "v"), "one"),
    "bloom": (("q", "k", "v"), "per kv"),
    "falcon": (("q", "k", "v"), "per kv"),
    "gpt_neox": (("q", "k", "v"), "per kv"),
    "gpt_bigcode": (("q", "k", "v"), "per kv"),
    "persimmon": (("q", "k", "v"), "per kv"),
    "codegen": (("q", "v", "k"), "four"),
    "gpt_oss": (("gate", "up"), "each"),
}
"""By `model_type`: order and arrangement of the parts of a fused tensor. Gate and up are in two halves by default."""

_HALVES: tuple[tuple[str, ...], _Arrangement] = (("gate", "up"), "one")


class WeightPiece(NamedTuple):
    """A matrix of a group, or the part of a tensor that belongs to it."""

    path: str
    """Name of the parameter in the model; of an expert with its number behind, `...gate_up_proj[3]`."""
    layer: int | None
    """Number of its block; None for embeddings."""
    part: str
    """q, k, v, o, gate, up, down or embed; joined by + where one tensor holds several that cannot be told apart."""
    weight: Tensor
    """A view of the model's own memory, of any number of axes."""


class Group(NamedTuple):
    """The weights that a name stands for."""

    name: str
    """As it was asked for: `mlp:4-8`."""
    pieces: tuple[WeightPiece, ...]
    """In the order of the blocks; no weight is in two."""
    note: str | None
    """What else is touched by changing them; None where nothing is."""

    @property
    def num_weights(self) -> int:
        """Number of weights."""
        return sum(piece.weight.numel() for piece in self.pieces)


def find_group(model: nn.Module, anatomy: Anatomy, name: str) -> Group:
    """The weights that a group's name stands for: `attn`, `q`, `mlp:4-8`, `attn:-1`.

    Raises:
        ConfigError: no such group or layer, a group that this model has nothing of, parts that lie in one tensor and
            cannot be told apart; weights that are quantised, are offloaded, or have an adapter beside them.
        ModelError: a matrix that no group knows, or a fused tensor whose size contradicts the configuration.
    """
    kind, colon, layers = name.partition(":")
    if kind not in GROUPS:
        raise ConfigError(
            f"group {name!r}; expected one of {', '.join(GROUPS)}, with layers as in mlp:4-8, q:0, attn:-1"
        )
    everything = find_pieces(model, anatomy)
    for piece in everything:
        held = set(piece.part.split("+"))
        if held & set(GROUPS[kind]) and not held <= set(GROUPS[kind]):
            coarse = next(group for group, parts in GROUPS.items() if held <= set(parts))
            raise ConfigError(
                f"group {name!r}: in {anatomy.model_type} {piece.path} holds {piece.part} in one tensor, and they "
                f"cannot be told apart; the coarser group {coarse} exists"
            )
    pieces = [piece for piece in everything if set(piece.part.split("+")) <= set(GROUPS[kind])]
    if not pieces:
        raise ConfigError(f"group {name!r}: {anatomy.model_type} has none; it has {_listed(everything)}")
    if colon:
        if kind == "embed":
            raise ConfigError(f"group {name!r}: embeddings are in no layer; give embed")
        available = sorted({piece.layer for piece in pieces if piece.layer is not None})
        chosen = set(resolve_layers([layers], available, at=name))
        pieces = [piece for piece in pieces if piece.layer in chosen]
    if absent := [piece.path for piece in pieces if piece.weight.is_meta]:
        raise ConfigError(
            f"group {name!r}: {absent[0]} and {len(absent) - 1} more of its weights are offloaded, so that there is "
            "nothing to change between passes. Give them memory (--max-memory), or take a group that is not offloaded"
        )
    return Group(name, tuple(pieces), _note(model) if kind == "embed" else None)


def find_pieces(model: Any, anatomy: Anatomy) -> list[WeightPiece]:
    """Every weight that is in a group, each once and in its finest part: embeddings first, then block by block.

    Raises:
        ConfigError: weights that are quantised, or have an adapter beside them.
        ModelError: a matrix that no group knows, or a fused tensor whose size contradicts the configuration.
    """
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    _check_plain(model)
    pieces = [
        WeightPiece(names[id(table.weight)], None, "embed", table.weight.detach())
        for table in _embeddings(model, anatomy)
    ]
    seen: set[int] = set()
    for layer, block in enumerate(anatomy.blocks):
        for path, parameter in block.named_parameters():
            if parameter.dim() < 2 or id(parameter) in seen:
                continue
            seen.add(id(parameter))
            parts = _parts_of(path.removesuffix(".weight"), anatomy)
            if parts:
                module = block.get_submodule(path.rpartition(".")[0])
                pieces += _pieces(model, anatomy, names[id(parameter)], layer, parts, module, parameter.detach())
    return pieces


def _check_plain(model: Any) -> None:
    """Weights are numbers that can be changed, and all there is.

    Raises:
        ConfigError: quantised weights, or an adapter.
    """
    kinds = sorted({str(p.dtype).removeprefix("torch.") for p in model.parameters() if not p.is_floating_point()})
    if getattr(model, "is_quantized", False) or kinds:
        stored = f" ({', '.join(kinds)})" if kinds else ""
        raise ConfigError(
            f"the weights are quantised{stored}: they are stored as codes and scales, so that a damaged weight would "
            "be quantised once more, and damage of a level would not be that level. Leave --quantize out; where the "
            "checkpoint itself is stored so, give the one that it was made from"
        )
    if any(_is_adapter(module) for module in model.modules()):
        raise ConfigError(
            "the model has an adapter beside its weights, which damage to them would leave out; load it with "
            "--merge-adapter"
        )


def _is_adapter(module: nn.Module) -> bool:
    """Whether peft put a module in the place of one of the model's, with matrices in it. Tuned norms have none."""
    is_of_peft = type(module).__module__.partition(".")[0] == "peft"
    return is_of_peft and any(parameter.dim() > 1 for parameter in module.parameters())


def _embeddings(model: Any, anatomy: Anatomy) -> list[nn.Embedding]:
    """The table of token embeddings, and those beside it."""
    tokens = model.get_input_embeddings()
    parents = [module for module in anatomy.inner.modules() if any(child is tokens for child in module.children())]
    if not parents:
        raise ModelError(f"{anatomy.model_type}: its token embeddings are not inside {type(anatomy.inner).__name__}")
    return [child for child in parents[0].children() if isinstance(child, nn.Embedding)]


def _parts_of(path: str, anatomy: Anatomy) -> tuple[str, ...]:
    """What a matrix holds, by its path in its block; nothing for what is in no group."""
    for row in _ROWS:
        if row.pattern.fullmatch(path):
            return row.parts
    raise ModelError(
        f"{anatomy.model_type}: {path} is a matrix of its blocks that builders/degradation/weight_groups.py has no "
        "row for, so no group of weights of this model is known to be complete; add a row that says what it is"
    )


def _pieces(
    model: Any,
    anatomy: Anatomy,
    path: str,
    layer: int,
    parts: tuple[str, ...],
    module: nn.Module,
    weight: Tensor,
) -> Iterator[WeightPiece]:
    """The pieces of one parameter."""
    experts = [(f"{path}[{e}]", weight[e]) for e in range(len(weight))] if weight.dim() == 3 else [(path, weight)]
    if len(parts) == 1:
        yield from (WeightPiece(name, layer, parts[0], matrix) for name, matrix in experts)
        return
    order, arrangement = _ARRANGED.get(anatomy.model_type, _HALVES)
    if set(order) != set(parts):
        order, arrangement = _HALVES
    if set(order) != set(parts):
        yield from (WeightPiece(name, layer, "+".join(parts), matrix) for name, matrix in experts)
        return
    axis = _output_axis(path, module, weight)
    for name, matrix in experts:
        for part, view in _split(model, anatomy, name, module, matrix, axis, order, arrangement):
            yield WeightPiece(name, layer, part, view)


def _output_axis(path: str, module: Any, weight: Tensor) -> int:
    """Which axis of a fused matrix its outputs lie along; an expert's is told by the size of its way down.

    Raises:
        ModelError: neither axis fits.
    """
    if weight.dim() == 2:
        return 1 if isinstance(module, Conv1D) else 0
    down = getattr(module, "down_proj", None)
    if isinstance(down, Tensor):
        if (weight.shape[1], weight.shape[2]) == (2 * down.shape[2], down.shape[1]):
            return 0
        if (weight.shape[2], weight.shape[1]) == (2 * down.shape[1], down.shape[2]):
            return 1
    raise ModelError(f"{path} {tuple(weight.shape)}: no down_proj beside it that says which axis its outputs lie along")


def _split(
    model: Any,
    anatomy: Anatomy,
    path: str,
    module: Any,
    matrix: Tensor,
    axis: int,
    order: tuple[str, ...],
    arrangement: _Arrangement,
) -> Iterator[tuple[str, Tensor]]:
    """The parts of a fused matrix, as views of it.

    Raises:
        ModelError: its size contradicts the configuration.
    """
    size = matrix.shape[axis]
    if "q" in order:
        settings = model.config.get_text_config()
        heads = settings.num_attention_heads
        unit = _head_size(module, settings)
        kv = (size // unit - heads) // 2
        counts = {"q": heads, "k": kv, "v": kv}
    else:
        unit, kv = 1, 0
        counts = dict.fromkeys(order, size // 2)
    num_groups = {"one": 1, "per kv": kv, "four": 4, "each": size // 2}[arrangement]
    is_whole = num_groups > 0 and all(count > 0 and count % num_groups == 0 for count in counts.values())
    if not is_whole or sum(counts.values()) * unit != size:
        raise ModelError(
            f"{anatomy.model_type}: {path} {tuple(matrix.shape)} should hold {', '.join(order)} along axis {axis}, of "
            f"{' + '.join(str(counts[part]) for part in order)} times {unit}; its size is another"
        )
    per_group = [counts[part] // num_groups for part in order]
    view = matrix.unflatten(axis, (num_groups, sum(per_group), unit))
    start = 0
    for part, count in zip(order, per_group, strict=True):
        yield part, view.narrow(axis + 1, start, count)
        start += count


def _head_size(module: Any, settings: Any) -> int:
    """Size of an attention head: of the attention module where it says so."""
    for owner in (module, settings):
        size = getattr(owner, "head_dim", None)
        if isinstance(size, int):
            return size
    return settings.hidden_size // settings.num_attention_heads


def _note(model: Any) -> str | None:
    head = model.get_output_embeddings()
    if head is not None and head.weight.data_ptr() == model.get_input_embeddings().weight.data_ptr():
        return "embed is tied to the output head: damaging it changes both"
    return None


def _listed(pieces: Sequence[WeightPiece]) -> str:
    """What a model has, with numbers of weights."""
    counts: dict[str, int] = {}
    for name, parts in GROUPS.items():
        found = [piece for piece in pieces if set(piece.part.split("+")) <= set(parts)]
        if found:
            counts[name] = sum(piece.weight.numel() for piece in found)
    return ", ".join(f"{name} ({count:,})" for name, count in counts.items())
