"""Publishing from tests: the command in a fresh process with short waits, and what there is to publish."""

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any, NamedTuple

from tests.hub_for_tests import TestHub
from tests.runs_for_tests import run_trivia
from tracekit.format.shards import sha256_file

__all__ = ["COMMAND", "REPO", "Said", "large_files", "make_run", "publish", "tell"]

REPO = "tester/traces"

COMMAND = """
import sys, tracekit.hub, tracekit.publish.publisher
tracekit.hub.FIRST_WAIT_SECONDS = 0.02
for setting in sys.argv.pop(1).split():
    name, value = setting.split("=")
    setattr(tracekit.publish.publisher, name, int(value))
from tracekit.cli import main
sys.exit(main(sys.argv[1:]))
"""

COMMANDS = """
import contextlib, io, json, sys, tracekit.hub
tracekit.hub.FIRST_WAIT_SECONDS = 0.02
from tracekit.cli import main
said = []
for arguments in json.loads(sys.argv[1]):
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()) as err:
        code = main(arguments)
    said.append([code, out.getvalue(), err.getvalue()])
print(json.dumps(said))
"""


def publish(
    hub: TestHub, folder: Path, version: str, *flags: str, limits: str = "", check: bool = True, **kwargs: Any
) -> subprocess.CompletedProcess[str]:
    """`tracekit publish` in a fresh process; `limits` sets constants of publisher.py, as `GROUP_FILES=1`."""
    arguments = ("publish", str(folder), REPO, "--version", version, *flags)
    return hub.python(COMMAND, limits, *arguments, check=check, **kwargs)


class Said(NamedTuple):
    """What a command line said."""

    code: int
    out: str
    err: str


def tell(hub: TestHub, *command_lines: list[Any], **kwargs: Any) -> list[Said]:
    """Several `tracekit` command lines one after another in one fresh process, which none of them ends."""
    lines = [[str(word) for word in line] for line in command_lines]
    done = hub.python(COMMANDS, json.dumps(lines), **kwargs)
    return [Said(*one) for one in json.loads(done.stdout)]


def make_run(out: Path, model: Path, /, limit: int, **sections: dict[str, Any]) -> Path:
    """A finished run over the first questions, five a shard: a larger one has the same first shards."""
    run_trivia(out, model, source={"limit": limit}, **sections)
    shutil.rmtree(out / "logs")
    return out


def large_files(folder: Path) -> dict[str, str]:
    """SHA-256 of the shards and record tables of a folder, by path."""
    found = [*folder.glob("data/*/*.tar"), *folder.glob("records/*/*")]
    return {path.relative_to(folder).as_posix(): sha256_file(path) for path in found}
