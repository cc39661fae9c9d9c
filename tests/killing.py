"""How a test kills a process, exactly where it wants to."""

import multiprocessing
import time
from pathlib import Path


def imported(*modules: str):
    "A context that starts processes in which these modules are imported already."
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(modules))
    return context


def kill_at(process, flag: Path, seconds: float = 120) -> None:
    "Start a process and kill it (SIGKILL) when it has made the file `flag`; it must have come that far, and end by the kill."
    process.start()
    end = time.monotonic() + seconds
    while not flag.exists() and process.is_alive() and time.monotonic() < end:
        time.sleep(0.02)
    process.kill()
    process.join()
    assert flag.exists() and process.exitcode == -9
