"""Environments of other libraries: one for each, made from its pins in benchmarks/peers and kept between runs."""

import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent


def peer_python(
    peer: str,  # a file of benchmarks/peers without its .txt
    folder: Path = HERE / ".envs",  # holds the environments
) -> str:  # the interpreter of the peer's own environment
    "The peer's own environment, made with its pins where it is missing or the pins have changed."
    pins, env = HERE / "peers" / f"{peer}.txt", folder / peer
    python, stamp = env / "bin" / "python", env / "pins.txt"
    if not stamp.is_file() or stamp.read_text() != pins.read_text():
        print(f"making the environment of {peer} in {env}", file=sys.stderr)
        subprocess.run([sys.executable, "-m", "venv", str(env)], check=True)
        subprocess.run([str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "-r", str(pins)], check=True)
        stamp.write_text(pins.read_text())
    return str(python)
