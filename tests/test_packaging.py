"""The package: lean imports, complete public names, and a wheel that works away from the checkout."""

import inspect
import os
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest

import tracekit
from tests.oldest import lower_bounds

ROOT = Path(__file__).parent.parent
MODULES = sorted(
    ".".join(path.relative_to(ROOT).with_suffix("").parts)
    for package in ("tracekit", "builders")
    for path in (ROOT / package).rglob("[a-z]*.py")
)


def python(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_importing_tracekit_loads_nothing_heavy():
    heavy = python(
        "import sys, tracekit; print([m for m in ('torch', 'transformers', 'pyarrow', 'numpy') if m in sys.modules])"
    )
    assert heavy == "[]"


def test_reading_needs_no_torch():
    code = "import sys, tracekit; tracekit.TraceStore, tracekit.verify; print('torch' in sys.modules)"
    assert python(code) == "False"


@pytest.mark.parametrize("name", MODULES)
def test_every_module_and_every_public_name_has_a_docstring(name: str):
    module = __import__(name, fromlist=["x"])
    assert module.__doc__
    for public in module.__all__:
        thing = getattr(module, public)
        if inspect.isclass(thing) or inspect.isfunction(thing):
            assert thing.__doc__, f"{name}.{public}"


def test_public_names_are_there():
    for name in tracekit.__all__:
        assert getattr(tracekit, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        tracekit.nothing  # noqa: B018


def test_the_wheel_works_from_another_folder(tmp_path: Path):
    """A bare environment gets the wheel alone; its dependencies are borrowed from this one by a .pth file."""
    from tests.tiny_checkpoint import save_tiny_checkpoint

    command = [
        sys.executable,
        "-m",
        "build",
        "--wheel",
        "--no-isolation",
        "--outdir",
        str(tmp_path / "dist"),
        str(ROOT),
    ]
    built = subprocess.run(command, capture_output=True, text=True)
    assert built.returncode == 0, built.stdout + built.stderr
    (wheel,) = (tmp_path / "dist").glob("tracekit_llm-*.whl")
    venv.create(tmp_path / "env", with_pip=True)
    own_python = tmp_path / "env/bin/python"
    install = [own_python, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", wheel]
    subprocess.run(install, check=True, capture_output=True)
    (site,) = (tmp_path / "env/lib").glob("python*/site-packages")
    (site / "borrowed.pth").write_text(sysconfig.get_paths()["purelib"])
    model = save_tiny_checkpoint(tmp_path / "tiny")
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"} | {"HF_HUB_OFFLINE": "1"}

    def run(*arguments: str) -> str:
        done = subprocess.run([own_python, *arguments], capture_output=True, text=True, cwd=elsewhere, env=environment)
        assert done.returncode == 0, done.stderr
        return done.stdout

    assert str(site) in run("-c", "import tracekit, builders; print(tracekit.__file__)")
    assert (site / "tracekit/py.typed").exists()
    small = [
        "-m",
        "builders.trivia_qa",
        "--model",
        str(model),
        "--source",
        "sample",
        "--limit",
        "2",
        "--num-beams",
        "1",
    ]
    assert "bytes a sample" in run(*small, "--max-new-tokens", "2", "--dry-run")
    run(*small, "--max-new-tokens", "2", "--out", "out")
    assert "# Traces of tiny" in (elsewhere / "out/README.md").read_text()
    assert (site / "tracekit/cards/base.md.j2").exists()


def test_every_lower_bound_is_tried_by_make_test_oldest():
    bounds = list(lower_bounds())
    assert len({bound.partition("==")[0] for bound in bounds}) == len(bounds), "a package has two bounds"
    (torch,) = [bound for bound in bounds if bound.startswith("torch==")]
    text = (ROOT / "pyproject.toml").read_text()
    assert f'"torch>={".".join(torch.removeprefix("torch==").split(".")[:2])}"' in text
