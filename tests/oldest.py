"""The lower bounds of pyproject.toml as constraints for pip: what `make test-oldest` installs.

torch stays at the version of constraints.txt, since older ones are large and slow to try.
"""

import re
import tomllib
from collections.abc import Iterator
from pathlib import Path

__all__ = ["lower_bounds"]

ROOT = Path(__file__).parent.parent


def lower_bounds() -> Iterator[str]:
    """`name==version` of every requirement with a lower bound, `dev` left out."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    optional = project["optional-dependencies"]
    groups = [project["dependencies"], *(found for name, found in optional.items() if name != "dev")]
    for requirement in sorted({one for group in groups for one in group}):
        bound = re.fullmatch(r"([\w-]+)>=([\d.]+)", requirement)
        if bound is not None and bound[1] != "torch":
            yield f"{bound[1]}=={bound[2]}"
    (torch,) = re.findall(r"^torch==.*$", (ROOT / "constraints.txt").read_text("utf-8"), re.MULTILINE)
    yield torch


if __name__ == "__main__":
    print("\n".join(lower_bounds()))
