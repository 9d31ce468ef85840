"""A Hub for one test, and real clients of it: fresh processes that see this Hub and no other network."""

import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any, Literal

from tests.hubserver import serve
from tests.hubserver_state import Hub, Request
from tests.processes_for_tests import ROOT, Process

__all__ = ["TestHub"]

# nothing listens there: a client that asks for anything but the test Hub fails at once
NOWHERE = "http://127.0.0.1:9"
DEFAULT_TOKEN = "hf_test"
# what huggingface_hub, datasets and the proxies of their HTTP libraries would read from the surroundings
FOREIGN = ("HF_", "HUGGING_FACE_", "HUGGINGFACE_", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY")


class TestHub:
    """A running Hub in this process; `hub` is what lies behind it.

    `mode` is how its clients upload: "xet", their default, or "lfs", which HF_HUB_DISABLE_XET=1 brings about.
    """

    __test__ = False

    def __init__(self, folder: Path, *, mode: Literal["xet", "lfs"]) -> None:
        self.folder, self.mode = folder, mode
        self.num_homes = 0
        self.started: list[Process] = []
        self.working = folder / "working"
        self.working.mkdir(parents=True)
        self.serving = serve(folder / "hub", xet=mode == "xet")

    @property
    def hub(self) -> Hub:
        """Repositories, log and faults."""
        return self.serving.hub

    @property
    def url(self) -> str:
        """What clients have as HF_ENDPOINT."""
        return self.hub.url

    def new_home(self) -> Path:
        """An empty folder for a client's caches."""
        self.num_homes += 1
        home = self.folder / "homes" / str(self.num_homes)
        home.mkdir(parents=True)
        return home

    def environment(self, home: Path, token: str | None = DEFAULT_TOKEN) -> dict[str, str]:
        """The environment of a client that keeps its caches in `home`; without a token it is nobody."""
        kept = {name: value for name, value in os.environ.items() if not name.upper().startswith(FOREIGN)}
        quiet = ("HF_HUB_DISABLE_PROGRESS_BARS", "HF_DATASETS_DISABLE_PROGRESS_BARS", "HF_HUB_DISABLE_UPDATE_CHECK")
        changed = {
            "HF_ENDPOINT": self.url,
            "HF_HOME": str(home),
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_XET": "0" if self.mode == "xet" else "1",
            "HTTP_PROXY": NOWHERE,
            "HTTPS_PROXY": NOWHERE,
            "NO_PROXY": "127.0.0.1,localhost",
            "OMP_NUM_THREADS": "1",
            "TRACEKIT_CACHE": str(home / "tracekit"),
            "PYTHONPATH": str(ROOT),
            **dict.fromkeys(quiet, "1"),
        }
        return {**kept, **changed, **({} if token is None else {"HF_TOKEN": token})}

    def start(
        self, code: str, *args: object, home: Path | None = None, token: str | None = DEFAULT_TOKEN, **env: str
    ) -> Process:
        """Start Python code in a fresh process and return at once. The process ends with the Hub at the latest."""
        process = Process(
            [sys.executable, "-c", textwrap.dedent(code), *map(str, args)],
            cwd=self.working,
            env={**self.environment(home or self.new_home(), token), **env},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self.started.append(process)
        return process

    def python(
        self,
        code: str,
        *args: object,
        home: Path | None = None,
        token: str | None = DEFAULT_TOKEN,
        timeout: float = 120,
        check: bool = True,
        **env: str,
    ) -> subprocess.CompletedProcess[str]:
        """Run Python code in a fresh process, with fresh caches unless `home` is given.

        Fails with the process's stderr if it fails and `check` is set, or if it takes longer than `timeout` seconds.
        """
        done = self.finished(self.start(code, *args, home=home, token=token, **env), timeout)
        assert not check or done.returncode == 0, f"ended with {done.returncode}\n{done.stdout}\n{done.stderr}"
        return done

    def finished(self, process: Process, timeout: float) -> subprocess.CompletedProcess[str]:
        """What came of a process that was started; fails with where it was if it takes longer."""
        try:
            out, err = process.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGABRT)  # it says where it is
            out, err = process.communicate(timeout=10)
            raise AssertionError(f"not finished after {timeout} s\n{out}\n{err}") from None
        return subprocess.CompletedProcess(process.args, process.returncode, out, err)

    def faults(self, *faults: dict[str, Any]) -> None:
        """Make requests fail from now on, instead of the faults before: the fields of `hubserver_state.Fault`."""
        self.hub.set_faults(*faults)

    def log(self, clear: bool = True) -> list[Request]:
        """The requests since the log was cleared, complete: none is in flight."""
        return self.hub.take_log(clear=clear)

    def close(self) -> None:
        """End clients and server; fails if a request was not known to the server or an error came up in it."""
        for process in self.started:
            if process.poll() is None:
                process.kill()
            process.communicate()
        self.serving.close()
        assert self.hub.errors == [], "\n".join(self.hub.errors)
        assert self.hub.unrouted == [], f"the test Hub does not know these requests: {self.hub.unrouted}"
