"""The set-up script: what it refuses, in which words, and what it asks pip for."""

import ast
import os
import re
import shutil
import subprocess
import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

SCRIPT = Path(__file__).parents[1] / "tools" / "make_environment.py"
GB = 10**9


@pytest.fixture(scope="module")
def setup() -> ModuleType:
    spec = spec_from_file_location("cvxq_setup", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_an_old_python_can_read_the_script() -> None:
    ast.parse(SCRIPT.read_text(), feature_version=(3, 6))


def test_an_old_python_is_refused_by_version(setup: ModuleType) -> None:
    with pytest.raises(setup.SetupError, match=r"Python 3\.9\.18 is too old: cvxq needs 3\.10"):
        setup.check_python((3, 9, 18))
    setup.check_python((3, 10, 0))
    setup.check_python((4, 0, 0))


@pytest.mark.parametrize("missing", ["venv", "ensurepip"])
def test_a_python_without_venv_is_refused(setup: ModuleType, missing: str) -> None:
    def available(name: str) -> object:
        return None if name == missing else object()

    with pytest.raises(setup.SetupError, match=f"no module {missing}.*python3-venv"):
        setup.check_modules(available)
    setup.check_modules()


def test_a_full_disk_is_refused_with_both_figures(setup: ModuleType, tmp_path: Path) -> None:
    def usage(folder: Path) -> SimpleNamespace:
        assert folder == tmp_path  # the nearest folder that exists
        return SimpleNamespace(free=int(1.25 * GB))

    with pytest.raises(setup.SetupError, match=r"1\.2 GB free at .*, the environment needs 3 GB"):
        setup.check_disk(tmp_path / "not" / "yet", 3 * GB, usage)
    setup.check_disk(tmp_path, GB, usage)


@pytest.mark.parametrize(
    ("log", "reason"),
    [
        ("OSError: [Errno 28] No space left on device\nERROR: x", "the disk is full"),
        ("NewConnectionError: Name or service not known", "the package index cannot be reached"),
        ("ReadTimeoutError(...)\nERROR: No matching", "the package index cannot be reached"),
        ("ERROR: first\nERROR: No matching distribution", "pip failed: No matching distribution"),
        ("", "pip failed: no reason given"),
    ],
)
def test_pip_failures_become_one_line(setup: ModuleType, log: str, reason: str) -> None:
    explanation = setup.explain(log)
    assert explanation.startswith(reason)
    assert "\n" not in explanation


def test_constraints_pin_what_the_script_asks_for(setup: ModuleType) -> None:
    constraints = (SCRIPT.parents[1] / "constraints.txt").read_text()
    assert setup.pinned("torch", constraints)[0].isdigit()
    assert "setuptools==" + setup.pinned("setuptools", constraints) in constraints
    with pytest.raises(setup.SetupError, match="does not pin torchvision"):
        setup.pinned("torchvision", constraints)


INDEX = "http://127.0.0.1:9/"  # nobody answers there


def test_cpu_build_first_without_a_gpu_on_linux(setup: ModuleType) -> None:
    choices = [arguments for _, arguments in setup.torch_choices("2.13.0", "Linux", False, INDEX)]
    assert [arguments[-1] for arguments in choices] == [
        "torch==2.13.0+cpu",
        "torch==2.13.0+cpu",
        "torch==2.13.0",
    ]
    assert ["--index-url" in arguments for arguments in choices] == [False, True, False]
    assert choices[1][choices[1].index("--index-url") + 1] == INDEX


def test_without_an_index_named_only_the_sources_of_pip_are_asked(setup: ModuleType) -> None:
    choices = [arguments for _, arguments in setup.torch_choices("2.13.0", "Linux", False)]
    assert [arguments[-1] for arguments in choices] == ["torch==2.13.0+cpu", "torch==2.13.0"]
    assert not any("index" in word for arguments in choices for word in arguments)


@pytest.mark.parametrize(
    "file",
    ["tools/make_environment.py", "Makefile", ".ci/run", "pyproject.toml", "setup.py",
     "constraints.txt", "README.md", "CONTRIBUTING.md"],
)  # fmt: skip
def test_no_host_is_named_where_packages_come_from(file: str) -> None:
    text = (SCRIPT.parents[1] / file).read_text()
    assert re.findall(r"https?://|\b[\w-]+\.(?:org|com|io|co|net)\b", text) == []


@pytest.mark.parametrize(("system", "gpu"), [("Linux", True), ("Darwin", False)])
def test_the_index_default_elsewhere(setup: ModuleType, system: str, gpu: bool) -> None:
    choices = setup.torch_choices("2.13.0", system, gpu)
    assert [arguments for _, arguments in choices] == [["torch==2.13.0"]]


NO_MATCH = "ERROR: No matching distribution found for torch==2.13.0+cpu"
OFFLINE = "NewConnectionError: Name or service not known\n" + NO_MATCH
FULL = "ERROR: Could not install packages due to an OSError: [Errno 28] No space left on device"


@pytest.mark.parametrize(
    ("answers", "index", "reason"),
    [
        (["ok"], INDEX, None),
        ([NO_MATCH, "ok"], INDEX, None),
        ([NO_MATCH, OFFLINE, "ok"], INDEX, None),  # only the index named is out of reach
        ([NO_MATCH, OFFLINE, OFFLINE], INDEX, "index cannot be reached"),
        ([OFFLINE], INDEX, "index cannot be reached"),
        ([FULL], INDEX, "the disk is full"),
        ([NO_MATCH, FULL], INDEX, "the disk is full"),
        ([NO_MATCH, "ok"], None, None),
        ([NO_MATCH, OFFLINE], None, "index cannot be reached"),
        ([OFFLINE], None, "index cannot be reached"),
    ],
)
def test_the_next_build_is_tried_only_where_that_can_help(
    setup: ModuleType,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    answers: list[str],
    index: str | None,
    reason: str | None,
) -> None:
    asked = []

    class Scripted(setup.Environment):  # type: ignore[misc, name-defined]
        def has_torch(self, version: str) -> bool:
            return False

        def pip(self, *arguments: str) -> tuple[bool, str]:
            asked.append(arguments)
            answer = answers[len(asked) - 1]
            return answer == "ok", answer

    monkeypatch.setattr(setup.platform, "system", lambda: "Linux")
    monkeypatch.setattr(setup, "check_disk", lambda folder, needed: None)
    environment = Scripted(tmp_path)
    if reason is None:
        environment.install_torch("2.13.0", gpu=False, index=index)
    else:
        with pytest.raises(setup.SetupError, match=reason):
            environment.install_torch("2.13.0", gpu=False, index=index)
    assert len(asked) == len(answers)


def test_the_fingerprint_follows_the_files_and_the_folder(
    setup: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("pyproject.toml", "setup.py", "constraints.txt", "hashes.txt"):
        (tmp_path / name).write_text("a")
    monkeypatch.setattr(setup, "ROOT", tmp_path)
    first = setup.fingerprint(tmp_path / "v")
    assert setup.fingerprint(tmp_path / "v") == first
    assert setup.fingerprint(tmp_path / "w") != first
    (tmp_path / "constraints.txt").write_text("b")
    second = setup.fingerprint(tmp_path / "v")
    assert second != first
    (tmp_path / setup.NATIVE).mkdir(parents=True)
    (tmp_path / setup.NATIVE / "unit.c").write_text("a")
    assert setup.fingerprint(tmp_path / "v") != second


def test_a_folder_of_something_else_is_left_alone(setup: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("irreplaceable")
    with pytest.raises(setup.SetupError, match="is no virtual environment: move it away"):
        setup.Environment(tmp_path).create()
    assert (tmp_path / "thesis.txt").exists()


@pytest.mark.slow
def test_without_a_network_one_line_and_no_stamp(setup: ModuleType, tmp_path: Path) -> None:
    """A real run, pip's only index being a closed port of this machine."""
    if shutil.disk_usage(tmp_path).free < setup.DISK_CPU:
        pytest.skip("needs as much free disk as the set-up asks for")
    venv = tmp_path / "venv"
    venv.mkdir()
    (venv / "pyvenv.cfg").write_text("")  # as an interrupted run leaves it: no stamp
    (venv / "half-installed.py").write_text("")
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PIP_")}
    environment |= {"PIP_CONFIG_FILE": os.devnull, "PIP_INDEX_URL": "http://127.0.0.1:9/"}
    command = [sys.executable, str(SCRIPT), "--venv", str(venv)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.startswith("setup: the package index cannot be reached: connect to")
    assert done.stderr.count("\n") == 1
    assert not (venv / "half-installed.py").exists()
    assert (venv / "setup.log").exists()
    assert not (venv / "setup.stamp").exists()
