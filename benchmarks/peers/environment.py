"""The virtual environment that a peer runs in, made by this project's own set-up script."""

import hashlib
import platform
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
TOOLS = HERE.parent.parent / "tools"
if str(TOOLS) not in sys.path:
    sys.path.append(str(TOOLS))

from setup import (  # noqa: E402 (found through the line above)
    DISK_CPU,
    Environment,
    SetupError,
    check_disk,
    check_modules,
    has_gpu,
    pinned,
    say,
)

REQUIREMENTS = HERE / "requirements-gptq.txt"

__all__ = ["REQUIREMENTS", "SetupError", "peer_python"]


class PeerEnvironment(Environment):
    """Pinned packages of one requirements file, PyTorch's CPU build where there is no GPU."""

    def digest(self) -> str:
        """Digest of all that decides what the environment holds."""
        text = f"{sys.version} {self.venv.resolve()}".encode() + REQUIREMENTS.read_bytes()
        return hashlib.sha256(text).hexdigest()

    def is_current(self) -> bool:
        return self.stamp.exists() and self.stamp.read_text() == self.digest()


def peer_python(folder: Path) -> Path:
    """Path of the interpreter of the environment in `folder`, made when missing or out of date.

    Raises SetupError, one line, when it cannot be made.
    """
    environment = PeerEnvironment(folder / "venv-gptq")
    if environment.is_current():
        return environment.python
    check_modules()
    check_disk(folder, DISK_CPU)
    say(f"filling {environment.venv} (Python {platform.python_version()})")
    folder.mkdir(parents=True, exist_ok=True)
    environment.create()
    environment.install_torch(pinned("torch", REQUIREMENTS.read_text()), has_gpu())
    ok, printed = environment.pip("-r", str(REQUIREMENTS))
    if not ok:
        raise environment.fail(printed)
    environment.stamp.write_text(environment.digest())
    return environment.python
