"""The virtual environments that peers run in, made by this project's own set-up script."""

import hashlib
import platform
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
TOOLS = HERE.parent.parent / "tools"
if str(TOOLS) not in sys.path:
    sys.path.append(str(TOOLS))

from make_environment import (  # noqa: E402 (found through the line above)
    DISK_CPU,
    Environment,
    SetupError,
    check_disk,
    check_modules,
    has_gpu,
    pinned,
    say,
)

__all__ = ["SetupError", "peer_python", "pinned", "requirements"]


def requirements(peer: str) -> Path:
    """File that pins what a peer runs on."""
    return HERE / f"requirements-{peer}.txt"


class PeerEnvironment(Environment):
    """Pinned packages of one requirements file, PyTorch's CPU build where there is no GPU."""

    def __init__(self, folder: Path, peer: str):
        super().__init__(folder / f"venv-{peer}")
        self.requirements = requirements(peer)

    def digest(self) -> str:
        """Digest of all that decides what the environment holds."""
        text = f"{sys.version} {self.venv.resolve()}".encode()
        text += self.requirements.read_bytes()
        return hashlib.sha256(text).hexdigest()

    def is_current(self) -> bool:
        return self.stamp.exists() and self.stamp.read_text() == self.digest()


def peer_python(folder: Path, peer: str) -> Path:
    """Path of the interpreter of a peer's environment in `folder`, made when missing or stale.

    Raises SetupError, one line, when it cannot be made.
    """
    environment = PeerEnvironment(folder, peer)
    if environment.is_current():
        return environment.python
    check_modules()
    check_disk(folder, DISK_CPU)
    say(f"filling {environment.venv} (Python {platform.python_version()})")
    folder.mkdir(parents=True, exist_ok=True)
    environment.create()
    environment.install_torch(pinned("torch", environment.requirements.read_text()), has_gpu())
    ok, printed = environment.pip("-r", str(environment.requirements))
    if not ok:
        raise environment.fail(printed)
    environment.stamp.write_text(environment.digest())
    return environment.python
