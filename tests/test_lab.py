"""JupyterLab starts on the first lesson, as `make lab` starts it."""

import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import requests

CHECKOUT = Path(__file__).resolve().parents[1]


@pytest.fixture
def server(tmp_path):
    """Address and token of a JupyterLab of this checkout; it ends with the test."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    options = [f"--port={port}", "--no-browser", "--allow-root", "--IdentityProvider.token=abc"]
    command = [sys.executable, "-m", "jupyter", "lab", f"--ServerApp.root_dir={CHECKOUT}"]
    process = subprocess.Popen([*command, *options], stderr=subprocess.DEVNULL)
    yield f"http://127.0.0.1:{port}"
    process.terminate()
    process.wait(20)


def get(url: str) -> requests.Response:
    for _ in range(120):
        try:
            return requests.get(url, params={"token": "abc"}, timeout=10)
        except requests.ConnectionError:
            time.sleep(0.5)
    raise AssertionError(f"no answer from {url} within a minute")


def test_lab_serves_itself_and_the_first_lesson(server):
    page = get(f"{server}/lab")
    assert page.status_code == 200
    assert "JupyterLab" in page.text
    lesson = get(f"{server}/api/contents/notebooks/00_start_here.ipynb").json()
    assert lesson["type"] == "notebook"
    assert lesson["content"]["cells"][0]["source"].startswith("# 00")
