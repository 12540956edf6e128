"""Downloads from a server on this machine that answers as the hub does, and breaks off as networks do."""

from __future__ import annotations

import hashlib
import json
import os
import random
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest

from minisdxl import download

REPO, FILE, SMALL = "some/model", "model.safetensors", "unet/config.json"
BODY = random.Random(0).randbytes(3_000_000)
CONFIG = b'{"a": 0}'
CUT = 1_000_000


class Hub(ThreadingHTTPServer):
    """The hub, and the place elsewhere to which it sends those who want a large file."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.files = {f"{REPO}/{FILE}": BODY, f"{REPO}/{SMALL}": CONFIG}
        self.sent: dict[str, bytes] = {}  # other contents than those announced
        # What befalls the next answers: an HTTP status, "cut", "stall", "refuse" or "no ranges".
        self.plan: list[str | int] = []
        self.gets: list[str | None] = []  # the ranges asked for
        self.heads = 0
        self.stalled = threading.Event()
        self.logins: list[str | None] = []  # shown to the hub
        self.leaks: list[str | None] = []  # shown to the other place

    def url(self, host: str) -> str:
        return f"http://{host}:{self.server_address[1]}"


class Handler(BaseHTTPRequestHandler):
    server: Hub

    def do_HEAD(self) -> None:
        name = self._name()
        if name is None:
            return
        body = self.server.files[name]
        self.send_response(302 if name.endswith(FILE) else 200)
        self.send_header("X-Repo-Commit", "0" * 40)
        if name.endswith(FILE):
            self.send_header("X-Linked-Size", str(len(body)))
            self.send_header("X-Linked-ETag", f'"{hashlib.sha256(body).hexdigest()}"')
            self.send_header("Location", f"{self.server.url('localhost')}/elsewhere/{name}")
        else:
            self.send_header("Content-Length", str(len(body)))
            self.send_header("ETag", f'"{hashlib.sha1(body).hexdigest()}"')
        self.end_headers()

    def do_GET(self) -> None:
        name = self._name()
        if name is None:
            return
        elsewhere = self.path.startswith("/elsewhere/")
        (self.server.leaks if elsewhere else self.server.logins).append(self.headers["Authorization"])
        if name.endswith(FILE) and not elsewhere:
            self.send_response(302)
            self.send_header("Location", f"{self.server.url('localhost')}/elsewhere/{name}")
            self.end_headers()
            return
        asked = self.headers["Range"]
        self.server.gets.append(asked)
        fate = self.server.plan.pop(0) if self.server.plan else None
        if fate == "refuse":
            self.connection.shutdown(socket.SHUT_RDWR)
            return
        body = self.server.sent.get(name, self.server.files[name])
        match = re.fullmatch(r"bytes=(\d+)-", asked or "")
        start = int(match[1]) if match and fate != "no ranges" else 0
        self.send_response(206 if match and fate != "no ranges" else 200)
        self.send_header("Content-Length", str(len(body) - start))
        self.end_headers()
        self.wfile.write(body[start : start + CUT] if fate in ("cut", "stall") else body[start:])
        if fate == "stall":
            self.wfile.flush()
            self.server.stalled.wait(60)

    def _name(self) -> str | None:
        """Repository and file, or ``None`` once an error has been answered."""
        name = self.path.removeprefix("/elsewhere").lstrip("/").replace("/resolve/main/", "/")
        # Libraries that tests beside these import report their use to the hub from a thread, at any time.
        if name not in self.server.files:
            self.send_error(404)
            return None
        self.server.heads += self.command == "HEAD"
        if self.server.plan and isinstance(self.server.plan[0], int):
            self.send_error(int(self.server.plan.pop(0)))
            return None
        return name

    def log_message(self, format: str, *args: Any) -> None:
        pass


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    """A running hub, the table of its files in place of the real one, no waiting between tries, and a login."""
    server = Hub()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    endpoint = server.url("127.0.0.1")
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", endpoint)
    monkeypatch.setattr(
        huggingface_hub.constants,
        "HUGGINGFACE_CO_URL_TEMPLATE",
        f"{endpoint}/{{repo_id}}/resolve/{{revision}}/{{filename}}",
    )
    monkeypatch.setenv("HF_TOKEN", "hf_of_the_test")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1,localhost")
    monkeypatch.setattr("minisdxl.download.time.sleep", lambda seconds: None)
    monkeypatch.setattr(download, "TABLE", tmp_path / "downloads.json")
    write_table(download.TABLE)
    yield server
    server.stalled.set()
    server.shutdown()
    thread.join()
    server.server_close()


def write_table(path: Path) -> None:
    def entry(file: str, body: bytes) -> dict[str, Any]:
        known = {"bytes": len(body), "sha256": hashlib.sha256(body).hexdigest()}
        files = [{"repo": REPO, "file": file, "save_as": file, **known}]
        return {"about": "a model", "license": "MIT", "files": files}

    path.write_text(json.dumps({"model": entry(FILE, BODY), "config": entry(SMALL, CONFIG)}))


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    """Exit code, standard output and the line of standard error."""
    code = 0
    try:
        download.main([str(argument) for argument in arguments])
    except SystemExit as end:
        code = int(end.code or 0)
    output, error = capsys.readouterr()
    assert error.count("\n") == (1 if code else 0) and "Traceback" not in error, error
    return code, output, error


def test_a_download_arrives_whole(hub: Hub, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "new" / "folder"
    code, output, _ = run(capsys, "config", "model", "config", "--to", folder)
    assert code == 0 and output.count("sha256 as published") == 2
    found = {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    assert found == {FILE: BODY, SMALL: CONFIG}
    assert hub.heads == 2 and hub.logins == ["Bearer hf_of_the_test"] * 2 and hub.leaks == [None]


def test_what_is_there_is_checked_and_kept(hub: Hub, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / FILE).write_bytes(BODY)
    code, output, _ = run(capsys, "model", "--to", tmp_path)
    assert code == 0 and "already there" in output and hub.heads == 0 and hub.gets == []


@pytest.mark.parametrize(("content", "expected"), [(b"mine", "4 bytes"), (bytes(len(BODY)), "sha256")])
def test_another_file_of_that_name_is_left_alone(
    hub: Hub, tmp_path: Path, capsys: pytest.CaptureFixture[str], content: bytes, expected: str
) -> None:
    (tmp_path / FILE).write_bytes(content)
    code, _, error = run(capsys, "model", "--to", tmp_path)
    assert code == 2 and "is not the published file" in error and expected in error
    assert (tmp_path / FILE).read_bytes() == content and hub.gets == []


def test_a_cut_connection_is_taken_up_again(hub: Hub, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    hub.plan = ["cut", "cut"]
    code, _, _ = run(capsys, "model", "--to", tmp_path, "--retries", 0)  # each brings something, so none of them counts
    assert code == 0 and (tmp_path / FILE).read_bytes() == BODY
    assert hub.gets == ["bytes=0-", f"bytes={CUT}-", f"bytes={2 * CUT}-"]


def test_a_dead_connection_leaves_what_came_for_the_next_run(
    hub: Hub, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    hub.plan = ["cut", "refuse", "refuse", "refuse"]
    code, output, error = run(capsys, "model", "--to", tmp_path, "--retries", 2)
    assert code == 2 and output == "" and f"{CUT:,} of {len(BODY):,} bytes are kept in {tmp_path / FILE}" in error
    assert not (tmp_path / FILE).exists() and (tmp_path / f"{FILE}.partial").read_bytes() == BODY[:CUT]
    hub.gets.clear()
    code, _, _ = run(capsys, "model", "--to", tmp_path)
    assert code == 0 and hub.gets == [f"bytes={CUT}-"] and (tmp_path / FILE).read_bytes() == BODY
    assert not (tmp_path / f"{FILE}.partial").exists()


def test_no_connection_at_all_is_one_line(hub: Hub, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    hub.shutdown()
    hub.server_close()
    code, _, error = run(capsys, "model", "--to", tmp_path, "--retries", 1)
    assert code == 2 and "the connection broke (ConnectError" in error


def test_a_server_without_ranges_is_read_from_the_start(
    hub: Hub, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / f"{FILE}.partial").write_bytes(BODY[:CUT])
    hub.plan = ["no ranges"]
    code, _, _ = run(capsys, "model", "--to", tmp_path)
    assert code == 0 and (tmp_path / FILE).read_bytes() == BODY


@pytest.mark.parametrize(
    ("sent", "expected"),
    [
        (BODY[:-1] + bytes([BODY[-1] ^ 1]), "sha256"),
        (BODY + b"more", f"{len(BODY) + 4:,} bytes, expected {len(BODY):,}"),
    ],
    ids=["one bit", "too long"],
)
def test_wrong_contents_never_get_the_name(
    hub: Hub, tmp_path: Path, capsys: pytest.CaptureFixture[str], sent: bytes, expected: str
) -> None:
    hub.sent[f"{REPO}/{FILE}"] = sent
    code, output, error = run(capsys, "model", "--to", tmp_path)
    assert code == 2 and output == "" and expected in error and "thrown away" in error
    assert not list(tmp_path.glob(f"{FILE}*"))
    hub.sent.clear()
    assert run(capsys, "model", "--to", tmp_path)[0] == 0


def test_a_damaged_partial_file_is_found_out(hub: Hub, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / f"{FILE}.partial").write_bytes(bytes(CUT))
    code, _, error = run(capsys, "model", "--to", tmp_path)
    assert code == 2 and "thrown away" in error and not list(tmp_path.glob(f"{FILE}*"))


@pytest.mark.parametrize("other", [BODY[:-1], bytes(len(BODY))], ids=["size", "sha256"])
def test_another_file_on_the_hub_is_refused_unread(
    hub: Hub, tmp_path: Path, capsys: pytest.CaptureFixture[str], other: bytes
) -> None:
    hub.files[f"{REPO}/{FILE}"] = other
    code, _, error = run(capsys, "model", "--to", tmp_path)
    assert code == 2 and "is another file" in error and hub.gets == []


def test_a_full_disk_is_seen_before(
    hub: Hub, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / f"{FILE}.partial").write_bytes(BODY[:CUT])
    needed = len(BODY) - CUT + len(CONFIG)
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=needed - 1))
    code, _, error = run(capsys, "config", "model", "--to", tmp_path)
    assert code == 2 and f"{needed - 1:,} bytes free, the download needs {needed:,} more" in error and hub.heads == 0
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=needed))
    assert run(capsys, "config", "model", "--to", tmp_path)[0] == 0


def test_a_disk_that_fills_up_leaves_what_came_for_the_next_run(
    hub: Hub, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    most, limits = 2_000_001, resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (most, limits[1]))  # the system itself refuses to write more
    try:
        code, _, error = run(capsys, "model", "--to", tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert code == 2 and f"no room for {tmp_path / FILE}" in error and f"{most:,} of {len(BODY):,} bytes" in error
    assert (tmp_path / f"{FILE}.partial").read_bytes() == BODY[:most] and not (tmp_path / FILE).exists()
    hub.gets.clear()
    assert run(capsys, "model", "--to", tmp_path)[0] == 0 and hub.gets == [f"bytes={most}-"]
    assert (tmp_path / FILE).read_bytes() == BODY


@pytest.mark.parametrize(("status", "expected"), [(401, "hf auth login"), (403, "hf auth login"), (404, "is it gone")])
def test_a_refusal_of_the_hub_is_one_line(
    hub: Hub, tmp_path: Path, capsys: pytest.CaptureFixture[str], status: int, expected: str
) -> None:
    hub.plan = [status]
    code, _, error = run(capsys, "model", "--to", tmp_path)
    assert code == 2 and f"the hub answers {status} to {REPO}/{FILE}" in error and expected in error
    assert hub.heads == 1 and not (tmp_path / FILE).exists()


def test_a_busy_hub_is_asked_again(hub: Hub, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    hub.plan = [503, 429]
    assert run(capsys, "model", "--to", tmp_path)[0] == 0
    (tmp_path / FILE).unlink()
    hub.plan = [503, 503]
    code, _, error = run(capsys, "model", "--to", tmp_path, "--retries", 1)
    assert code == 2 and "the hub answers 503; 0 of 3,000,000 bytes" in error


def test_ctrl_c_leaves_what_came_for_the_next_run(hub: Hub, tmp_path: Path) -> None:
    """The command in a process of its own, with the hub's address from the environment."""
    # What runs in the background, as this test may, ignores Ctrl-C unless told otherwise.
    code = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); "
    code += f"import minisdxl.download as d; d.TABLE = d.Path({str(download.TABLE)!r}); d.main()"
    command = [sys.executable, "-c", code, "model", "--to", str(tmp_path)]
    environment = {**os.environ, "HF_ENDPOINT": hub.url("127.0.0.1"), "HF_HOME": str(tmp_path / "home")}
    hub.plan = ["stall"]
    process = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)
    partial = tmp_path / f"{FILE}.partial"
    waiting = threading.Event()
    while process.poll() is None and not (partial.exists() and partial.stat().st_size == CUT):
        waiting.wait(0.05)
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 130 and error.startswith("interrupted: ") and error.count("\n") == 1
    assert partial.read_bytes() == BODY[:CUT]
    hub.stalled.set()
    again = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert again.returncode == 0 and "sha256 as published" in again.stdout and again.stderr == ""
    assert (tmp_path / FILE).read_bytes() == BODY and hub.gets[-1] == f"bytes={CUT}-"


def test_offline_mode_is_one_line(
    hub: Hub, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    code, _, error = run(capsys, "model", "--to", tmp_path)
    assert code == 2 and "HF_HUB_OFFLINE" in error and hub.heads == 0 and not list(tmp_path.glob(f"{FILE}*"))


@pytest.mark.parametrize("address", ["huggingface.co", "ftp://hub", "http://a:b"])
def test_a_wrong_address_is_one_line(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, address: str
) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", address)
    code, _, error = run(capsys, "lcm-lora")
    assert code == 2 and f"HF_ENDPOINT is {address!r}, expected an address" in error


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["nonsense"], "'nonsense' is not known, expected list or some of sdxl-base,"),
        (["sdxl-base", "list"], "'list' is not known"),
        (["lcm-lora", "--retries", "-1"], "--retries is -1"),
        (["lcm-lora", "--to", __file__], "which is a file, expected a folder"),
        ([], "required: NAME"),
    ],
)
def test_bad_input_is_one_line(capsys: pytest.CaptureFixture[str], arguments: list[str], expected: str) -> None:
    code, _, error = run(capsys, *arguments)
    assert code == 2 and expected in error


def test_the_table(capsys: pytest.CaptureFixture[str]) -> None:
    code, output, _ = run(capsys, "list")
    table = download.read_table()
    assert code == 0 and [line.split()[0] for line in output.splitlines()] == list(table)
    base = table["sdxl-base"].files
    assert [file.save_as for file in base] == ["sd_xl_base_1.0.safetensors"]
    assert base[0].bytes == 6_938_078_334  # two bytes a number, and a header
    for file in (file for entry in table.values() for file in entry.files):
        assert re.fullmatch("[0-9a-f]{64}", file.sha256) and file.bytes > 0 and not Path(file.save_as).is_absolute()
    names = [file.save_as for entry in table.values() for file in entry.files]
    assert len(set(names)) == len(names)  # all can be had in one folder
