"""What a result was measured on, as the benchmarks store it beside their numbers."""

import importlib.metadata
import os
import platform
from pathlib import Path


def cpu_info() -> dict[str, str]:
    "What Linux says of the processor, by its own names such as 'model name'; {} on other systems."
    file = Path("/proc/cpuinfo")
    lines = file.read_text().splitlines() if file.is_file() else []
    return {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in lines) if value}


def machine(
    *packages: str,  # names as pip knows them
) -> dict:  # processor, cores, python, versions: keys that pages read from benchmarks/results
    "The processor's name, the number of cores, and the versions of Python and of `packages`."
    return {"processor": cpu_info().get("model name", platform.processor()), "cores": os.cpu_count(),
            "python": platform.python_version(), "versions": {name: importlib.metadata.version(name) for name in packages}}
