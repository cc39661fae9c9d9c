"""How a test points the Hub's client at its own server: in this process, and in another."""

import os
import subprocess
import sys
from pathlib import Path


def point_client(monkeypatch, url: str, home: Path, token: str | None = None) -> None:
    "What the environment says when the client is imported, said afterwards: address, token, and a home for every file it writes."
    from huggingface_hub import constants
    values = {"ENDPOINT": url, "HUGGINGFACE_CO_URL_TEMPLATE": url + "/{repo_id}/resolve/{revision}/{filename}", "HF_HUB_OFFLINE": False,
              "HF_HOME": str(home), "HF_HUB_CACHE": str(home / "hub"), "HF_XET_CACHE": str(home / "xet"), "HF_TOKEN_PATH": str(home / "token"),
              "HF_STORED_TOKENS_PATH": str(home / "stored_tokens"), "AGENT_HARNESSES_PATH": str(home / "harnesses.json")}
    for name, value in values.items():
        assert hasattr(constants, name), f"huggingface_hub has no constants.{name} any more"
        monkeypatch.setattr(constants, name, value)
    for name, value in {**os.environ, **environment(url, home, token)}.items():
        if name.startswith(("HF_", "HUGGING")):
            monkeypatch.setenv(name, value) if value else monkeypatch.delenv(name, raising=False)


def environment(url: str, home: Path, token: str | None = None) -> dict[str, str]:
    "The client's settings for a process that has not imported it; an empty value is no value."
    return {"HF_ENDPOINT": url, "HF_HOME": str(home), "HF_HUB_OFFLINE": "0", "HF_TOKEN": token or "", "HUGGING_FACE_HUB_TOKEN": "",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "HF_XET_CLIENT_RETRY_MAX_ATTEMPTS": "1",
            "HF_XET_CLIENT_RETRY_BASE_DELAY": "10ms"}


def start(code: str, *arguments: object, url: str, home: Path, token: str | None = None, **more: str) -> subprocess.Popen:
    "A process of its own, which imports the client with these settings."
    settings = {name: value for name, value in {**os.environ, **environment(url, home, token), **more}.items() if value != ""}
    return subprocess.Popen([sys.executable, "-c", code, *map(str, arguments)], env=settings, text=True, stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE)


def ended(process: subprocess.Popen, seconds: float = 120) -> str:
    "What a process wrote to its standard output; it must have ended well."
    out, errors = process.communicate(timeout=seconds)
    assert process.returncode == 0, errors[-3000:]
    return out
