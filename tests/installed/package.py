"""The package as a user has it: a wheel, installed into a folder, with the dependencies of the running environment."""

from __future__ import annotations

import os
import pty
import re
import select
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from documents import CHECKOUT

LIMIT = 900  # seconds of one command; all take far less, unless they hang


@dataclass(frozen=True)
class Package:
    """A wheel and a source distribution of this checkout, and the folder that the wheel is installed in."""

    wheel: Path
    sdist: Path
    site: Path

    def environment(self, home: Path) -> dict[str, str]:
        """Variables of a user who has this package and nothing of ours: no checkout on the path, no cache, no hub."""
        ours = ("REELBATCH_", "PYTEST_", "PYTHON", "HF_", "XDG_")
        kept = {name: value for name, value in os.environ.items() if not name.startswith(ours)}
        path = [str(self.site / "bin"), str(Path(sys.executable).parent), kept.get("PATH", os.defpath)]
        return {
            **kept,
            "PATH": os.pathsep.join(path),
            "PYTHONPATH": str(self.site),
            "HOME": str(home),
            "MPLCONFIGDIR": str(self.site.parent / "matplotlib"),  # its list of fonts takes seconds: made once
            "HF_HUB_OFFLINE": "1",
            "OMP_NUM_THREADS": "1",
            "COLUMNS": "200",
            "SITE": str(self.site),  # these two for commands of the table
            "DIST": str(self.wheel.parent),
        }

    def run(self, command: str, folder: Path, home: Path) -> tuple[int, str]:
        """A shell command run in `folder`: its exit code, and what it printed to stdout and stderr."""
        done = subprocess.run(
            ["bash", "-c", f"{command}\nexit $?"],  # with a second line bash stays, as the shell of a person does
            cwd=folder,
            env=self.environment(home),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=LIMIT,
        )
        return done.returncode, done.stdout

    def run_until(self, text: str, command: str, folder: Path, home: Path) -> tuple[int, str]:
        """The same on a terminal, and with Ctrl-C once it has shown `text` (a regular expression)."""
        ours, theirs = pty.openpty()
        process = subprocess.Popen(
            ["bash", "-c", f"exec {command}"], cwd=folder, env=self.environment(home), stdout=theirs, stderr=theirs
        )
        os.close(theirs)
        shown, stopped = "", False
        while select.select([ours], [], [], LIMIT)[0]:
            try:
                shown += os.read(ours, 65536).decode(errors="replace")
            except OSError:  # the terminal's other end is closed: the process has ended
                break
            if not stopped and re.search(text, shown):
                process.send_signal(signal.SIGINT)
                stopped = True
        os.close(ours)
        return process.wait(LIMIT), shown


def build(folder: Path) -> Package:
    """The wheel and the source distribution of this checkout, and the wheel installed in `folder`/site."""
    _python("-m", "hatchling", "build", "-t", "wheel", "-t", "sdist", "-d", str(folder / "dist"))
    (wheel,), (sdist,) = folder.glob("dist/*.whl"), folder.glob("dist/*.tar.gz")
    install(wheel, folder / "site")
    return Package(wheel, sdist, folder / "site")


def install(wheel: Path, site: Path) -> None:
    _python("-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--target", str(site), str(wheel))


def _python(*words: str, cwd: Path = CHECKOUT) -> None:
    command: Sequence[str] = [sys.executable, *words]
    done = subprocess.run(command, cwd=cwd, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert done.returncode == 0, f"{' '.join(words)}: {done.stdout}"
