"""Python processes for tests, made in a tenth of the time: forks of a process that has imported torch.

A fresh process spends seven seconds of a processor on imports, most of them of torch. huggingface_hub and transformers
read their environment when they are imported: only processes that have the variables of the tests get them ready-made.
Where what Python or OpenMP reads when it starts is another, Python is started as usual. Tests that look at what is
imported take `bare`: a fork has modules that its code did not import. Forks share one seed of hashes, another than that
of pytest: what must not depend on it is compared with what pytest's own process made.
"""

import atexit
import faulthandler
import gc
import inspect
import json
import os
import runpy
import signal
import socket
import subprocess
import sys
import threading
import types
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

__all__ = ["ENVIRONMENT", "ROOT", "Process", "bare", "run", "start"]

ROOT = Path(__file__).parent.parent
ENVIRONMENT = {"HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
"""What every process of a test has beside the environment of the tests."""
_PRELOADED = (
    "torch._dynamo torch.distributed.tensor scipy.optimize pandas pyarrow.dataset pyarrow.parquet httpx2 jinja2 "
    "msgspec tyro psutil fsspec dill multiprocess yaml tqdm.auto xxhash PIL.Image regex safetensors.torch"
)
_TRANSFORMERS = "transformers.models.llama.modeling_llama transformers.generation transformers.models.auto"
_READ_AT_IMPORT = ("HF_", "HUGGING", "TRANSFORMERS_", "TOKENIZERS_", "HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY")
"""Beginnings of variables that huggingface_hub, transformers and tokenizers read when they are imported."""
_READ_AT_START = ("PYTHONHASHSEED", "PYTHONIO", "PYTHONUTF8", "PYTHONWARN", "OMP_", "MKL_", "LANG", "LC_", "HOME")
"""Beginnings of variables that Python or a library of its own reads when the process starts."""
_BECOME_SUBREAPER = 36  # PR_SET_CHILD_SUBREAPER: who loses its parent becomes our child, and can be waited for
_START = """
import sys
sys.path.insert(0, sys.argv[2])
import tests.processes_for_tests as processes
given = processes._serve(int(sys.argv[1]), sys.argv[3:])
processes._end(processes._become, given)
"""


class _Template:
    """A process that is forked, with modules that it has imported."""

    def __init__(self, names: str) -> None:
        import ctypes

        self._lock = threading.Lock()  # a Hub's thread may start a process too
        ctypes.CDLL(None).prctl(_BECOME_SUBREAPER, 1, 0, 0, 0)
        self._ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        environment = {name: value for name, value in (os.environ | ENVIRONMENT).items() if name != "PYTHONPATH"}
        command = [sys.executable, "-c", _START, str(theirs.fileno()), str(ROOT), *names.split()]
        self._process = subprocess.Popen(command, env=environment, cwd=ROOT, pass_fds=[theirs.fileno()])
        theirs.close()

    def fork(self, asked: dict[str, Any], files: list[int]) -> int:
        """A new process that is our child."""
        with self._lock:
            request = os.memfd_create("request")
            os.write(request, json.dumps(asked).encode())
            socket.send_fds(self._ours, [b"?"], [*files, request])
            os.close(request)
            answer = self._ours.recv(32)
        assert answer, "the template of test processes has died"
        return int(answer)


@cache
def _template(is_as_here: bool) -> _Template:
    """One of the two templates of this process of pytest, made when it is first needed."""
    return _Template(f"{_PRELOADED} {_TRANSFORMERS}" if is_as_here else _PRELOADED)


def _is_as_here(environment: Mapping[str, str], names: tuple[str, ...]) -> bool:
    """Whether an environment has the same variables of these beginnings as the tests."""
    here, there = (
        {name: value for name, value in one.items() if name.upper().startswith(names)}
        for one in (os.environ | ENVIRONMENT, environment)
    )
    return here == there


class Process(subprocess.Popen[str]):
    """A process of Python, as `subprocess.Popen` has it: `[sys.executable, "-c" | "-m" | file, ...]`."""

    def _execute_child(self, *given: Any, **named: Any) -> None:
        """Fork the template instead of starting Python; where that cannot be done, do as Popen does."""
        own = super()._execute_child
        asked = inspect.signature(own).bind(*given, **named).arguments
        env = dict(os.environ if asked["env"] is None else asked["env"])
        if sys.platform != "linux" or asked["args"][0] != sys.executable or not _is_as_here(env, _READ_AT_START):
            own(*given, **named)
            return
        template = _template(_is_as_here(env, _READ_AT_IMPORT))
        request = {
            "words": asked["args"][1:],
            "cwd": str(asked["cwd"] or Path.cwd()),
            "env": env,
            "is_session": asked["start_new_session"],
        }
        files = [asked[name] for name in ("p2cread", "c2pwrite", "errwrite")]
        self.pid = template.fork(request, [number if file == -1 else file for number, file in enumerate(files)])
        self._child_created = True
        ends = ("p2cread", "p2cwrite", "c2pread", "c2pwrite", "errread", "errwrite")
        self._close_pipe_fds(*(asked[end] for end in ends))


def start(*words: object, cwd: Path = ROOT, env: Mapping[str, str] | None = None, **files: Any) -> Process:
    """Start Python with a command line, and the environment of the tests with changes."""
    files = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE} | files
    return Process(
        [sys.executable, *map(str, words)],
        cwd=cwd,
        env={**os.environ, **ENVIRONMENT, **(env or {})},
        text=True,
        **files,
    )


def run(
    *words: object, cwd: Path = ROOT, env: Mapping[str, str] | None = None, timeout: float = 280, check: bool = False
) -> subprocess.CompletedProcess[str]:
    """Run Python with a command line; with `check`, fails with what it said if it fails."""
    with start(*words, cwd=cwd, env=env) as process:
        try:
            out, err = process.communicate(timeout=timeout)
        except BaseException:
            process.kill()
            raise
    assert not check or process.returncode == 0, f"ended with {process.returncode}\n{out}\n{err}"
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


def bare(*words: object) -> subprocess.CompletedProcess[str]:
    """Run Python as it is, with nothing imported yet."""
    command, environment = [sys.executable, *map(str, words)], os.environ | ENVIRONMENT
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment, check=False)


def _serve(number: int, names: list[str]) -> dict[str, Any]:
    """Fork whenever it is asked for; returns in the forked process, with what that is to become."""
    for name in names:
        try:
            __import__(name)
        except ImportError:  # an extra that is not installed
            continue
    gc.freeze()  # what is here already needs no looking at, and would be copied by looking
    ours = [name for name in sys.modules if name.split(".")[0] in ("tracekit", "builders", "datasets")]
    assert not ours, ours
    with socket.socket(fileno=number) as theirs:
        while True:
            asked, files, _, _ = socket.recv_fds(theirs, 8, 4)
            if not asked:
                os._exit(0)
            read, write = os.pipe()
            between = os.fork()
            if between == 0:
                if (child := os.fork()) == 0:
                    break
                os.write(write, str(child).encode())
                os._exit(0)
            os.waitpid(between, 0)  # from now on the child's parent is who asked
            theirs.send(os.read(read, 32))
            for file in (read, write, *files):
                os.close(file)
    for file in (read, write):
        os.close(file)
    for to, file in enumerate(files[:3]):
        os.dup2(file, to)
    request = os.pread(files[3], os.fstat(files[3]).st_size, 0)
    for file in files:
        os.close(file)
    return json.loads(request)


def _become(given: dict[str, Any]) -> None:
    """Run a command line as a fresh Python would."""
    if given["is_session"]:
        os.setsid()
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.chdir(given["cwd"])
    os.environ.clear()
    os.environ.update(given["env"])
    faulthandler.enable()
    sys.path[0:2] = ["", *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
    del sys.modules["tests.processes_for_tests"], sys.modules["tests"]
    kind, *words = given["words"]
    main = types.ModuleType("__main__")
    sys.modules["__main__"] = main
    if kind == "-m":
        sys.argv = ["-m", *words[1:]]
        sys.path[0] = given["cwd"]
        runpy._run_module_as_main(words[0])  # as Python itself does
    elif kind == "-c":
        sys.argv = ["-c", *words[1:]]
        exec(compile(words[0], "<string>", "exec"), main.__dict__)  # noqa: S102
    else:
        sys.argv = [kind, *words]
        sys.path[0] = str(Path(kind).resolve().parent)
        main.__file__ = kind
        exec(compile(Path(kind).read_bytes(), kind, "exec"), main.__dict__)  # noqa: S102


def _end(act: Callable[..., object], *given: Any) -> None:
    """Act, and end the process as Python does, except that nothing is taken apart: that takes a second."""
    code: Any = 0
    is_interrupted = False
    try:
        act(*given)
    except SystemExit as ended:
        code = ended.code or 0
        if not isinstance(code, int):
            print(code, file=sys.stderr)
            code = 1
    except BaseException as error:  # noqa: BLE001
        sys.excepthook(type(error), error, error.__traceback__)
        code, is_interrupted = 1, isinstance(error, KeyboardInterrupt)
    threading._shutdown()  # threads that are no daemons are waited for
    atexit._run_exitfuncs()
    try:
        sys.stdout.flush()
    except OSError as error:
        print(f"Exception ignored in: {sys.stdout}\n{error!r}", file=sys.stderr)
        code = 120
    sys.stderr.flush()
    if is_interrupted:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGINT)
    os._exit(code & 255)
