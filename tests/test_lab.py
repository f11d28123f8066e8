"""JupyterLab starts on the first lesson, as `make lab` starts it."""

import re
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import requests

CHECKOUT = Path(__file__).resolve().parents[1]


@pytest.fixture
def server():
    """Address of a JupyterLab of this checkout that answers; it ends with the test."""
    options = ["--port=0", "--no-browser", "--allow-root", "--IdentityProvider.token=abc"]
    command = [sys.executable, "-m", "jupyter", "lab", f"--ServerApp.root_dir={CHECKOUT}"]
    process = subprocess.Popen([*command, *options], stderr=subprocess.PIPE, text=True)
    with process:
        port = announced_port(process)
        wait_until_it_listens(process, port)
        yield f"http://127.0.0.1:{port}"
        process.terminate()
        process.stderr.read()  # to the end, as a full pipe would stop the server


def announced_port(process: subprocess.Popen) -> int:
    """The port in the server's log, or an error where the log ends without one."""
    log = []
    for line in process.stderr:
        log.append(line)
        if found := re.search(r"http://127\.0\.0\.1:([1-9]\d*)", line):
            return int(found[1])
    raise AssertionError(f"the server ended before it had a port:\n{''.join(log)}")


def wait_until_it_listens(process: subprocess.Popen, port: int) -> None:
    """Without a limit: a slow machine takes longer, and a server that fails ends."""
    while process.poll() is None:
        with socket.socket() as client:
            if client.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.05)
    raise AssertionError(f"the server ended with status {process.returncode} before it listened")


def get(url: str) -> requests.Response:
    return requests.get(url, params={"token": "abc"})


def test_lab_serves_itself_and_the_first_lesson(server):
    page = get(f"{server}/lab")
    assert page.status_code == 200
    assert "JupyterLab" in page.text
    lesson = get(f"{server}/api/contents/notebooks/00_start_here.ipynb").json()
    assert lesson["type"] == "notebook"
    assert lesson["content"]["cells"][0]["source"].startswith("# 00")
