"""kill -9 at random moments, again and again: nothing finished is lost, and the bytes are those of a run left alone."""

from pathlib import Path

from tests.processes_for_tests import run
from tests.runs_for_tests import hashes, log_lines
from tests.tiny_checkpoint import save_tiny_checkpoint

ROOT = Path(__file__).parent.parent

# One process loads everything once and forks a child for every attempt, so that most kills land inside the run itself.
_SCRIPT = """
import os, random, signal, sys, time
import torch
torch.set_num_threads(1)
from pathlib import Path
from tests.runs_for_tests import run_trivia

def attempt(out, seconds):
    child = os.fork()
    if child == 0:
        try:
            run_trivia(out, model, source={"limit": 24}, generation={"max_new_tokens": 16}, capture={"sites": ("all",)},
                       output={"samples_per_shard": 10, "batch_size": 1})
            os._exit(0)
        except BaseException as error:
            print(repr(error), file=sys.stderr)
            os._exit(1)
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        pid, status = os.waitpid(child, os.WNOHANG)
        if pid:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.001)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return None

model, root = Path(sys.argv[1]), Path(sys.argv[2])
started = time.monotonic()
assert attempt(root / "whole", 300) == 0
whole = time.monotonic() - started
draw, kills = random.Random(1), 0
for number in range(30):
    for tries in range(100):
        code = attempt(root / f"killed{number}", whole * draw.uniform(0.3, 0.8) if tries < 20 else 300)
        if code == 0:
            whole *= 0.7 if tries == 0 else 1  # the first run was slow, and this one quicker than the kill
            break
        assert code is None, code
        kills += 1
    if kills >= 8:
        break
print(kills)
"""


def test_kill_9_at_random_moments_many_times(tmp_path: Path):
    model = save_tiny_checkpoint(tmp_path / "tiny")
    done = run("-c", _SCRIPT, model, tmp_path)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout.split()[-1]) >= 8, "the runs were too fast to be killed"
    for folder in tmp_path.glob("killed*"):
        assert hashes(folder) == hashes(tmp_path / "whole")
        computed = [(line["shard"], line["batch"]) for line in log_lines(folder)]
        assert len(computed) == len(set(computed)), "a finished batch was computed again"
