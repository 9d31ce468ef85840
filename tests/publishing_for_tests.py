"""Publishing from tests: the command in a fresh process with short waits, and what there is to publish."""

import shutil
import subprocess
from pathlib import Path
from typing import Any

from tests.hub_for_tests import TestHub
from tests.runs_for_tests import run_trivia
from tracekit.shards import sha256_file

__all__ = ["COMMAND", "REPO", "large_files", "make_run", "publish"]

REPO = "tester/traces"

COMMAND = """
import sys, tracekit.hub, tracekit.publish
tracekit.hub.FIRST_WAIT_SECONDS = 0.02
for setting in sys.argv.pop(1).split():
    name, value = setting.split("=")
    setattr(tracekit.publish, name, int(value))
from tracekit.cli import main
sys.exit(main(sys.argv[1:]))
"""


def publish(
    hub: TestHub, folder: Path, version: str, *flags: str, limits: str = "", check: bool = True, **kwargs: Any
) -> subprocess.CompletedProcess[str]:
    """`tracekit publish` in a fresh process; `limits` sets constants of tracekit.publish, as `GROUP_FILES=1`."""
    arguments = ("publish", str(folder), REPO, "--version", version, *flags)
    return hub.python(COMMAND, limits, *arguments, check=check, **kwargs)


def make_run(out: Path, model: Path, /, limit: int, **sections: dict[str, Any]) -> Path:
    """A finished run over the first questions, five a shard: a larger one has the same first shards."""
    run_trivia(out, model, source={"limit": limit}, **sections)
    shutil.rmtree(out / "logs")
    return out


def large_files(folder: Path) -> dict[str, str]:
    """SHA-256 of the shards and record tables of a folder, by path."""
    found = [*folder.glob("data/*/*.tar"), *folder.glob("records/*/*")]
    return {path.relative_to(folder).as_posix(): sha256_file(path) for path in found}
