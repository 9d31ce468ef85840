"""The schema of a task's records: from the record type, or from the JSON Schema that lies in a dataset.

    record type --msgspec--> JSON Schema --> fields --> Arrow schema, field descriptions
                             schemas/<config>.json  --> a record type, where the task's own is not installed

A schema that lies in a dataset may come from a stranger. It uses the keywords below and no others, its names are plain
names, and it has an end: no type holds itself.
"""

import ast
import copy
import inspect
import keyword
import re
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from functools import cache, cached_property, partial
from types import NoneType, UnionType
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple, Union, get_args, get_origin

import msgspec

from tracekit.errors import UNREADABLE, ConfigError, DatasetError
from tracekit.records.base import Record

if TYPE_CHECKING:
    import pyarrow as pa

__all__ = ["Field", "Node", "RecordSchema", "field_docs", "schema_differences", "too_large"]

_SCALARS: Mapping[str, type] = {"string": str, "integer": int, "number": float, "boolean": bool}
_HELD = (*_SCALARS.values(), NoneType, ...)
_HOLDERS = (list, tuple, Sequence, Union, UnionType)
_KEYWORDS = {
    *("$defs", "$ref", "additionalProperties", "anyOf", "default", "description", "enum"),
    *("items", "properties", "required", "title", "type"),
}
_NAME = re.compile(r"[A-Za-z][A-Za-z0-9_]{0,99}")
_TAG = "task"
_MAX_NODES = 5000
"""Types in a schema, each counted where it is used; the largest of tracekit's own have 100."""
_MAX_DEPTH = 40
"""Types inside one another, references and nulls counted; those of tracekit's own have 7."""
_DOCS = "_FIELD_DOCS"


class Node(NamedTuple):
    """The type of a value."""

    kind: str
    """`string`, `integer`, `number`, `boolean`, `array` or `object`."""
    is_nullable: bool = False
    """Whether null is declared."""
    items: "Node | None" = None
    """Type of an array's items."""
    name: str = ""
    """Name of an object's type."""
    fields: "tuple[Field, ...]" = ()
    """Fields of an object."""


class Field(NamedTuple):
    """A field of an object."""

    name: str
    node: Node
    doc: str
    """What it says."""
    is_required: bool
    """Whether every record has it."""
    default: Any
    """What a record has that lacks it; None where it is required."""


class RecordSchema:
    """The fields of a task's records.

    Raises:
        DatasetError: the document describes no records.
    """

    def __init__(self, document: Mapping[str, Any], *, where: str = "record schema") -> None:
        self.document = document
        """The JSON Schema."""
        root = _SchemaReader(document, where).root()
        self.name = root.name
        self.task = next(str(field.default) for field in root.fields if field.name == _TAG)
        """The task, as every record names it."""
        self.fields = root.fields
        """Its fields, the task's name first."""

    @staticmethod
    @cache
    def of(record_type: type[Record]) -> "RecordSchema":
        """The schema of a record type, each field with its docstring.

        Raises:
            ConfigError: a field has a type that a table cannot hold.
        """
        try:
            structs = _structs_of(record_type)
            document = msgspec.json.schema(record_type)
            for struct in structs:
                properties = document["$defs"][struct.__name__]["properties"]
                for name, text in field_docs(struct).items():
                    if name in properties:
                        properties[name]["description"] = text
            return RecordSchema(document, where=record_type.__name__)
        except (DatasetError, TypeError) as error:
            fault = str(error) if isinstance(error, DatasetError) else _type_fault(record_type, error)
            raise ConfigError(
                f"{fault}; records have texts, numbers, true and false, lists and Structs of these, each perhaps "
                "`| None`"
            ) from error

    @classmethod
    def read(cls, data: bytes, *, where: str) -> "RecordSchema":
        """The schema in a file.

        Raises:
            DatasetError: it is no schema of records.
        """
        try:
            return cls(msgspec.json.decode(data, type=dict[str, Any]), where=where)
        except UNREADABLE as error:
            raise DatasetError(f"{where} is not a JSON Schema: {error}") from error

    def without_added(self) -> "RecordSchema":
        """The same without the fields of every record that have a default: those that were added after 2.0."""
        added = {one.name for one in self.fields if not one.is_required and one.name in Record.__struct_fields__}
        document = copy.deepcopy(self.document)
        own = document["$defs"][self.name]
        own["properties"] = {name: value for name, value in own["properties"].items() if name not in added}
        return RecordSchema(document, where=self.name)

    @property
    def names(self) -> list[str]:
        """Names of the fields, in order."""
        return [field.name for field in self.fields]

    @property
    def docs(self) -> dict[str, str]:
        """What each field says; the task's name is none of them."""
        return {field.name: field.doc for field in self.fields if field.name != _TAG}

    def to_bytes(self) -> bytes:
        """The file."""
        return msgspec.json.format(msgspec.json.encode(self.document), indent=2)

    @cached_property
    def arrow(self) -> "pa.Schema":
        """Arrow schema: `task`, then the fields in order."""
        import pyarrow as pa

        return pa.schema([_arrow_field(field) for field in self.fields])

    @cached_property
    def record_type(self) -> type[Record]:
        """A record type of these fields: those that every record has, and the others."""
        own = [field for field in self.fields if field.name != _TAG and field.name not in Record.__struct_fields__]
        return self._struct(own, bases=(Record,), namespace={_DOCS: self.docs})

    @cached_property
    def strict_type(self) -> type[msgspec.Struct]:
        """A type that takes these fields alone, none of them missing."""
        own = [field for field in self.fields if field.name != _TAG]
        return self._struct(own, bases=(), namespace={}, is_strict=True)

    def _struct(
        self,
        own: Sequence[Field],
        *,
        bases: tuple[type, ...],
        namespace: dict[str, Any],
        is_strict: bool = False,
    ) -> Any:
        return msgspec.defstruct(
            self.name,
            _defined(own, is_strict=is_strict),
            bases=bases,
            namespace=namespace,
            module=__name__,
            tag_field=_TAG,
            tag=self.task,
            kw_only=True,
            frozen=True,
            forbid_unknown_fields=is_strict,
        )


def schema_differences(old: RecordSchema, new: RecordSchema) -> dict[str, tuple[Any, Any]]:
    """Fields that two schemas have differently, by path: the type in the first and in the second."""
    before, after = (dict(_kinds("record", schema.fields)) for schema in (old, new))
    absent = "(absent)"
    return {
        path: (before.get(path, absent), after.get(path, absent))
        for path in sorted(before.keys() | after.keys())
        if before.get(path) != after.get(path)
    }


def _kinds(path: str, fields: Sequence[Field]) -> Iterator[tuple[str, str]]:
    """Type of every field, and of what is inside it, by dotted path; whatever is said of it is left out."""
    for field in fields:
        node: Node | None = field.node
        where = f"{path}.{field.name}"
        while node is not None:
            yield where, f"{node.kind} or null" if node.is_nullable else node.kind
            yield from _kinds(where, node.fields)
            node, where = node.items, f"{where}[]"


class _SchemaReader:
    """Reads one document."""

    def __init__(self, document: Mapping[str, Any], where: str) -> None:
        self._where, self._num_nodes = where, 0
        definitions = document.get("$defs", {})
        self._definitions: Mapping[str, Any] = definitions if isinstance(definitions, dict) else {}
        self._document = document
        self._used: set[str] = set()

    def root(self) -> Node:
        """The record."""
        self._check_keywords(self._document, "$")
        node = self._node({"$ref": self._document.get("$ref")}, "$", ())
        for name in self._definitions.keys() - self._used:
            self._node(self._definitions[name], f"$defs.{name}", (name,))
        names = [field.name for field in node.fields]
        if _TAG not in names or node.fields[names.index(_TAG)].default is None:
            raise self._error("$", "no task is named: it has to begin with `task`, an enum of one name")
        missing = [name for name in Record.__struct_fields__ if name not in names]
        if self._is_required(missing):
            raise self._error("$", f"no field {missing[0]!r}, which every record has")
        if shadowed := [one for one in names if hasattr(Record, one) and one not in Record.__struct_fields__]:
            raise self._error("$", f"no field may be named {shadowed[0]!r}")
        return node

    def _is_required(self, names: Sequence[str]) -> bool:
        fields = {field.name: field for field in msgspec.structs.fields(Record)}
        return any(fields[name].required for name in names)

    def _node(self, schema: Any, path: str, inside: tuple[str, ...]) -> Node:
        self._num_nodes += 1
        if self._num_nodes > _MAX_NODES:
            raise self._error(path, f"more than {_MAX_NODES} types")
        if len(inside) > _MAX_DEPTH:
            raise self._error(path, f"more than {_MAX_DEPTH} types inside one another")
        if not isinstance(schema, dict):
            raise self._error(path, f"{schema!r} is no type")
        self._check_keywords(schema, path)
        if "anyOf" in schema:
            return self._either(schema["anyOf"], path, inside)
        if "$ref" in schema:
            return self._reference(schema["$ref"], path, inside)
        if "enum" in schema:
            return self._enum(schema["enum"], path)
        kind = schema.get("type")
        if isinstance(kind, str) and kind in _SCALARS:
            return Node(kind)
        if kind == "array" and "items" in schema:
            return Node("array", items=self._node(schema["items"], f"{path}[]", (*inside, "")))
        if kind == "object" and isinstance(schema.get("properties"), dict):
            return self._object(schema, path, inside)
        others = sorted(schema.keys() - {"default", "description", "title", "type"})
        raise self._error(path, f"type {kind!r}{' with ' * bool(others)}{', '.join(others)}, which no table holds")

    def _check_keywords(self, schema: Mapping[str, Any], path: str) -> None:
        if unknown := sorted(schema.keys() - _KEYWORDS):
            raise self._error(path, f"unknown keyword {unknown[0]!r}")

    def _either(self, kinds: Any, path: str, inside: tuple[str, ...]) -> Node:
        others = [one for one in kinds if one != {"type": "null"}] if isinstance(kinds, list) else []
        if len(others) != 1 or len(kinds) != 2:
            raise self._error(path, "a choice of types; one type, or one and null, is what a table holds")
        return self._node(others[0], path, (*inside, ""))._replace(is_nullable=True)

    def _reference(self, reference: Any, path: str, inside: tuple[str, ...]) -> Node:
        prefix, _, name = str(reference).rpartition("/")
        if prefix != "#/$defs" or name not in self._definitions:
            raise self._error(path, f"{reference!r} refers to nothing")
        if name in inside:
            raise self._error(path, f"{name!r} holds itself")
        self._used.add(name)
        return self._node(self._definitions[name], path, (*inside, name))

    def _enum(self, values: Any, path: str) -> Node:
        if isinstance(values, list) and values and all(isinstance(one, str) for one in values):
            return Node("string")
        raise self._error(path, f"an enum of {values!r}; texts are allowed")

    def _object(self, schema: dict[str, Any], path: str, inside: tuple[str, ...]) -> Node:
        title = schema.get("title", "")
        self._check_name(title, path)
        required = schema.get("required", [])
        if not isinstance(required, list):
            raise self._error(path, f"`required` is {required!r}, expected a list")
        fields: list[Field] = []
        for name, one in schema["properties"].items():
            self._check_name(name, path)
            node = self._node(one, f"{path}.{name}", (*inside, ""))
            doc, default = one.get("description", ""), one.get("default")
            if name == _TAG and path == "$":
                default = self._task_name(one.get("enum"))
            elif "default" in one:
                self._check_default(default, node, f"{path}.{name}")
            fields.append(Field(name, node, doc if isinstance(doc, str) else "", name in required, default))
        return Node("object", name=title, fields=tuple(fields))

    def _task_name(self, names: Any) -> str | None:
        """The one name of an enum; None where it is none that a task may have."""
        one = names[0] if isinstance(names, list) and len(names) == 1 else None
        return one if isinstance(one, str) and _NAME.fullmatch(one) else None

    def _check_name(self, name: Any, path: str) -> None:
        if not isinstance(name, str) or not _NAME.fullmatch(name) or keyword.iskeyword(name):
            raise self._error(path, f"{name!r} is no name that a field may have")

    def _check_default(self, default: Any, node: Node, path: str) -> None:
        try:
            value = msgspec.convert(default, _annotation(node, is_strict=False))
        except msgspec.ValidationError as error:
            raise self._error(path, f"its default {default!r} is none of its values: {error}") from error
        if (place := too_large(msgspec.to_builtins(value), path)) is not None:
            raise self._error(place, "its default has an integer past 64 bits, which no table holds")

    def _error(self, path: str, what: str) -> DatasetError:
        return DatasetError(f"{self._where}: {what[:200]} - at `{path[:200]}`")


def too_large(value: Any, path: str) -> str | None:
    """Where an integer does not fit 64 bits, sign included; None where all do."""
    if isinstance(value, int):
        return None if -(2**63) <= value < 2**63 else path
    items: list[tuple[str, Any]] = []
    if isinstance(value, dict):
        items = [(f"{path}.{name}", one) for name, one in value.items()]
    elif isinstance(value, list | tuple):
        items = [(f"{path}[{number}]", one) for number, one in enumerate(value)]
    return next((found for name, one in items if (found := too_large(one, name)) is not None), None)


def _defined(fields: Sequence[Field], *, is_strict: bool) -> list[tuple[str, Any, Any]]:
    """Fields as `msgspec.defstruct` takes them."""
    found: list[tuple[str, Any, Any]] = []
    for field in fields:
        annotation, default = _annotation(field.node, is_strict=is_strict), msgspec.field()
        if not (field.is_required or is_strict):
            is_unset = field.default is None and not field.node.is_nullable
            annotation = annotation | None if is_unset else annotation
            default = msgspec.field(default_factory=partial(msgspec.convert, field.default, annotation))
        found.append((field.name, annotation, default))
    return found


def _annotation(node: Node, *, is_strict: bool) -> Any:
    """The Python type of a node."""
    if node.kind == "array":
        assert node.items is not None, node
        annotation: Any = list[_annotation(node.items, is_strict=is_strict)]
    elif node.kind == "object":
        annotation = msgspec.defstruct(
            node.name,
            _defined(node.fields, is_strict=is_strict),
            module=__name__,
            kw_only=True,
            frozen=True,
            forbid_unknown_fields=is_strict,
        )
    else:
        annotation = _SCALARS[node.kind]
    return annotation | None if node.is_nullable else annotation


def _arrow_field(field: Field) -> "pa.Field":
    import pyarrow as pa

    return pa.field(field.name, _arrow_type(field.node), nullable=field.node.is_nullable)


def _arrow_type(node: Node) -> "pa.DataType":
    import pyarrow as pa

    if node.kind == "array":
        assert node.items is not None, node
        return pa.list_(_arrow_type(node.items))
    if node.kind == "object":
        return pa.struct([_arrow_field(field) for field in node.fields])
    return {"string": pa.string(), "integer": pa.int64(), "number": pa.float64(), "boolean": pa.bool_()}[node.kind]


@cache
def field_docs(struct: type) -> dict[str, str]:
    """The docstring under each field of a Struct, inherited ones first; empty where its source is not to be had."""
    docs: dict[str, str] = {}
    for base in reversed(struct.__mro__):
        if base is msgspec.Struct or not issubclass(base, msgspec.Struct):
            continue
        if _DOCS in vars(base):
            docs |= vars(base)[_DOCS]
            continue
        try:
            body = ast.parse(textwrap.dedent(inspect.getsource(base))).body[0]
        except (OSError, TypeError):  # typed in by hand
            continue
        assert isinstance(body, ast.ClassDef), base
        for field, text in zip(body.body, body.body[1:], strict=False):
            if isinstance(field, ast.AnnAssign) and isinstance(text, ast.Expr) and isinstance(text.value, ast.Constant):
                assert isinstance(field.target, ast.Name)
                docs[field.target.id] = str(text.value.value)
    return docs


def _type_fault(record_type: type[msgspec.Struct], error: TypeError) -> str:
    """Which field has a type without a schema, and why it has none."""
    for field in msgspec.structs.fields(record_type):
        try:
            _structs_of(field.type)
            msgspec.json.schema(field.type)
        except TypeError as fault:
            return f"{record_type.__name__}.{field.name}: {str(fault).splitlines()[-1]}"
    return f"{record_type.__name__}: {error}"


def _structs_of(annotation: Any) -> list[type[msgspec.Struct]]:
    """All Structs inside a type, itself included.

    Raises:
        TypeError: a type that no table holds, or that is not read as it is written.
    """
    found: list[type[msgspec.Struct]] = []
    waiting: list[Any] = [annotation]
    while waiting:
        annotation = waiting.pop()
        annotation = getattr(annotation, "__supertype__", annotation)  # of a NewType
        origin = get_origin(annotation)
        if isinstance(annotation, type) and issubclass(annotation, msgspec.Struct):
            if annotation not in found:
                _check_struct(annotation, [one.__name__ for one in found])
                found.append(annotation)
                waiting += [field.type for field in msgspec.structs.fields(annotation)]
        elif origin in (set, frozenset) or annotation in (set, frozenset):
            raise TypeError(f"{annotation} has no order; use a list")
        elif origin is Annotated:
            waiting.append(annotation.__origin__)
        elif origin in _HOLDERS:
            waiting += get_args(annotation)
        elif origin is not Literal and annotation not in _HELD:
            raise TypeError(f"type {annotation} is not supported")
    return found


def _check_struct(struct: type[msgspec.Struct], names: Sequence[str]) -> None:
    """See that a Struct is read as it is written; `names` are those of the other ones.

    Raises:
        TypeError: it is not.
    """
    settings, fields = struct.__struct_config__, msgspec.structs.fields(struct)
    if wrong := [name for name in ("omit_defaults", "forbid_unknown_fields", "array_like") if getattr(settings, name)]:
        raise TypeError(f"{struct.__name__} is defined with {wrong[0]}=True; leave it out")
    if not settings.eq:
        raise TypeError(f"{struct.__name__} is defined with eq=False; leave it out")
    if not fields:
        raise TypeError(f"{struct.__name__} has no field, and no table holds that")
    if renamed := [field for field in fields if field.encode_name != field.name]:
        raise TypeError(
            f"{struct.__name__}.{renamed[0].name} is stored as {renamed[0].encode_name!r}; rename the field"
        )
    if struct.__name__ in names:
        raise TypeError(f"there are two Structs {struct.__name__}; rename one")
