"""``minisdxl.sample --workers`` on Ray while processes are killed, a disk is full, or memory runs out."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import psutil
import pytest
from PIL import Image

from minisdxl.scale.folder import RESULTS, whole_record
from tools.chaos import last_line, workers_of

pytestmark = [pytest.mark.scale, pytest.mark.timeout(240)]
ROOT = Path(__file__).parents[3]
PROMPTS = ["a small red circle on a white background", "a big blue square on a black background"]
QUICK = ["--steps", "1", "--size", "64x64", "--device", "cpu"]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}


def command(out: Path, each: int, *more: str) -> list[str]:
    """The command for pictures with two workers."""
    program = [sys.executable, "-m", "minisdxl.sample", *PROMPTS, "--images-per-prompt", str(each)]
    return [*program, *QUICK, "--out", str(out), *more]


def start(arguments: list[str], environment: Mapping[str, str] = ENVIRONMENT) -> subprocess.Popen[str]:
    return subprocess.Popen(
        arguments,
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def pictures(out: Path) -> list[Path]:
    return sorted(out.glob("*.png"))


def wait_for(count: int, out: Path, driver: subprocess.Popen[str]) -> None:
    """Until there are so many pictures."""
    while len(pictures(out)) < count:
        assert driver.poll() is None, driver.communicate()
        time.sleep(0.02)


def test_a_run_whose_worker_and_driver_are_killed_ends_complete(tmp_path: Path) -> None:
    out, plain, each = tmp_path / "run", tmp_path / "plain", 30
    at_scale = command(out, each, "--workers", "2")
    driver = start(at_scale)
    wait_for(5, out, driver)
    workers_of(driver)[0].kill()
    wait_for(15, out, driver)
    driver.kill()
    driver.communicate()
    assert 15 <= len(pictures(out)) < 2 * each
    ended = subprocess.run(at_scale, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True)
    print(ended.stdout, ended.stderr)
    assert ended.returncode == 0
    assert ended.stdout.count("\n") == 1  # one line, and the bar on stderr
    assert f"{2 * each} of {2 * each} pictures are in {out}" in ended.stdout

    subprocess.run(command(plain, each), cwd=ROOT, env=ENVIRONMENT, check=True, capture_output=True)
    assert [path.name for path in pictures(out)] == [path.name for path in pictures(plain)]
    for path in pictures(out):
        assert whole_record(path.read_bytes()) is not None
        assert np.array_equal(np.asarray(Image.open(path)), np.asarray(Image.open(plain / path.name))), path.name
    rows = [json.loads(line)["path"] for line in (out / RESULTS).read_text().splitlines()]
    assert sorted(rows) == [path.name for path in pictures(out)]
    assert {path.name for path in out.iterdir()} == {*rows, RESULTS, "manifest.json", "pictures.jsonl"}


def lives(process: psutil.Process) -> bool:
    """Whether it runs. One that has ended and waits to be noted by the system's first process does not."""
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def test_ctrl_c_ends_a_run_within_seconds(tmp_path: Path) -> None:
    driver = start(command(tmp_path / "run", 100, "--workers", "2"))
    wait_for(3, tmp_path / "run", driver)
    workers = workers_of(driver)
    began = time.perf_counter()
    os.killpg(driver.pid, signal.SIGINT)  # as a terminal does
    _, said = driver.communicate(timeout=60)
    print(f"ended within {time.perf_counter() - began:.1f} s: {last_line(said)}")
    assert driver.returncode == 130
    assert last_line(said) == "interrupted: no partial picture was left"
    assert "Traceback" not in said
    assert [worker for worker in workers if lives(worker)] == []
    assert all(whole_record(path.read_bytes()) for path in pictures(tmp_path / "run"))


def can_mount() -> bool:
    unshare = shutil.which("unshare")
    tried = [unshare or "", "--map-root-user", "--mount", "mount", "-t", "tmpfs", "none", "/mnt"]
    return unshare is not None and subprocess.run(tried, capture_output=True).returncode == 0


@pytest.mark.skipif(not can_mount(), reason="needs a Linux that lets users mount a small disk of their own")
def test_a_full_disk_ends_a_run_that_can_go_on(tmp_path: Path) -> None:
    """On a disk of 200 kB, and then with more room on the same disk."""
    disk = tmp_path / "disk"
    disk.mkdir()
    at_scale = subprocess.list2cmdline(command(disk / "run", 20, "--workers", "2"))
    script = (
        f"mount -t tmpfs -o size=200k none {disk}\n{at_scale} 2> {tmp_path}/first\necho $? >> {tmp_path}/codes\n"
        f"mount -o remount,size=10m {disk}\n{at_scale} 2> {tmp_path}/second\necho $? >> {tmp_path}/codes\n"
        f"cp -r {disk}/run {tmp_path}/run\n"
    )
    subprocess.run(
        ["unshare", "--map-root-user", "--mount", "sh", "-c", script], cwd=ROOT, env=ENVIRONMENT, stdout=subprocess.PIPE
    )
    said = (tmp_path / "first").read_text()
    print(last_line(said))
    assert (tmp_path / "codes").read_text().split() == ["2", "0"], (tmp_path / "second").read_text()
    assert f"No space left on device: '{disk}/run/" in last_line(said)
    assert "Traceback" not in said
    assert len(pictures(tmp_path / "run")) == 40


def test_workers_out_of_memory_end_a_run_that_can_go_on(tmp_path: Path) -> None:
    """Ray ends workers when memory runs out, which is at 1 % here."""
    at_scale = command(tmp_path / "run", 4, "--workers", "2")
    scarce = {"RAY_memory_usage_threshold": "0.01", "RAY_memory_monitor_refresh_ms": "50"}
    driver = start(at_scale, {**ENVIRONMENT, **scarce})
    _, said = driver.communicate()
    print(last_line(said))
    assert driver.returncode == 2
    assert "each ended their worker 3 times, as one does that needs more memory" in last_line(said)
    assert "Traceback" not in said
    assert pictures(tmp_path / "run") == []
    subprocess.run(at_scale, cwd=ROOT, env=ENVIRONMENT, check=True, capture_output=True)
    assert len(pictures(tmp_path / "run")) == 8
