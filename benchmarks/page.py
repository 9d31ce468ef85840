"""The page of results: results.json in, RESULTS.md out. Pure, but for `write_page`."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

__all__ = ["render", "write_page"]

_TITLES = {
    "writing": "Writing shards",
    "reading": "Reading",
    "loading": "Rows through `datasets`",
    "capture": "Generation and capture",
    "next_token": "Next-token traces",
    "peers": "Capture beside SAELens, nnsight and TransformerLens",
    "growth": "Capture against layers, length and samples",
    "scale": "100,000 samples",
    "prefix": "A prefix shared by three prompts",
    "serve": "The logging server",
    "storage": "Storage forms",
    "degradation": "Perplexity of damaged models",
    "finetune": "Finetuning a multiple-choice head",
}
_HEAD = """\
# Results

Generated from results.json by `make bench` and `python -m benchmarks.<name>`; do not edit. A ratio is of two ways of
doing the same thing, measured turn by turn in one process: its median over the rounds, the lowest and the highest.
"Disturbed" means that other programs kept taking cores while it was measured. A reach is what the project set out for,
met or not.
"""


def render(results: Mapping[str, Any]) -> str:
    """The page as Markdown."""
    names = [name for name in _TITLES if name in results] + sorted(results.keys() - _TITLES.keys())
    return "\n".join([_HEAD, *(_section(name, results[name]) for name in names)])


def write_page(results: Mapping[str, Any], folder: Path) -> None:
    """Write it beside results.json."""
    (folder / "RESULTS.md").write_text(render(results), encoding="utf-8")


def _section(name: str, result: Mapping[str, Any]) -> str:
    lines = [f"## {_TITLES.get(name, name)}", ""]
    if ratios := result.get("ratios"):
        lines += ["| ratio | median | lowest | highest | rounds | reach |", "|---|---|---|---|---|---|"]
        lines += [_ratio_row(ratio) for ratio in ratios]
        lines.append("")
    others = {key: value for key, value in result.items() if key not in ("ratios", "machine")}
    flat = list(_flat(others))
    if flat:
        lines += ["| figure | value |", "|---|---|", *(f"| {key} | {_figure(value)} |" for key, value in flat), ""]
    return "\n".join([*lines, _machine(result["machine"]), ""])


def _ratio_row(ratio: Mapping[str, Any]) -> str:
    met = {True: ", met", False: ", **not met**", None: ""}[ratio["is_met"]]
    calm = "" if ratio["is_calm"] else ", disturbed"
    numbers = " | ".join(_figure(ratio[key]) for key in ("median", "low", "high"))
    return f"| {ratio['name']} | {numbers} | {ratio['num_rounds']}{calm} | {ratio['target']}{met} |"


def _flat(value: Any, path: str = "") -> Any:
    """Numbers and texts of nested results, by dotted path."""
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _flat(inner, f"{path}.{key}" if path else key)
    elif isinstance(value, list):
        for number, inner in enumerate(value):
            yield from _flat(inner, f"{path}[{number}]")
    else:
        yield path, value


def _figure(value: Any) -> str:
    return f"{value:,.4g}" if isinstance(value, float) else f"{value:,}" if type(value) is int else str(value)


def _machine(machine: Mapping[str, Any]) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    return (
        f"On {machine['num_cores']} cores of {machine['cpu']}, {machine['memory_gib']} GiB, torch with "
        f"{machine['torch_threads']} thread, Python {machine['python']}, {machine['system']}; {versions}."
    )
