"""Scripts as processes of their own, forked from one that has imported the libraries: each would import them for 12 s."""

import atexit
import multiprocessing
import os
import resource
import runpy
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

REPO = Path(__file__).parents[1]
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["tests.preloaded"])


class Forked:
    """A script under way, used as a `subprocess.Popen` with text pipes is.

    Args:
        script: of the repository's root.
        arguments: of its command line.
        environment: all of it.
        largest_file: bytes; it cannot write longer ones, which is what a full disk does, for root too.
        folder: that it runs in.
    """

    def __init__(self, script, *arguments, environment, largest_file=None, folder=REPO):
        self._told = Path(tempfile.mkdtemp())
        self._files = [self._told / name for name in ("out", "err")]
        given = (script, arguments, environment, largest_file, folder, *map(str, self._files))
        self._process = CONTEXT.Process(target=_work, args=given)
        self._process.start()
        self.pid = self._process.pid

    @property
    def returncode(self):
        return self._process.exitcode

    def poll(self):
        return self._process.exitcode

    def send_signal(self, number):
        os.kill(self.pid, number)

    def communicate(self, timeout=None):
        """Waits for its end; what it has said on stdout and stderr."""
        deadline = None if timeout is None else time.monotonic() + timeout
        self._process.join(timeout)
        if self._process.exitcode is None and deadline is not None:
            os.kill(self.pid, signal.SIGKILL)
            raise subprocess.TimeoutExpired(str(self.pid), timeout)
        told = tuple(file.read_text() for file in self._files)
        shutil.rmtree(self._told)
        return told


def _work(script, arguments, environment, largest_file, folder, out, err):
    assert "tests.preloaded" in sys.modules  # a failed import of it would only be slow
    for path, number in ((out, 1), (err, 2)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    if largest_file is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (largest_file, largest_file))
    sys.argv = [script, *arguments]
    sys.path[0] = str(REPO)
    try:
        runpy.run_path(str(REPO / script), run_name="__main__")
    finally:
        atexit._run_exitfuncs()
