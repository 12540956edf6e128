"""Cases of the fuzz test."""

from __future__ import annotations

import hashlib
import subprocess
import sys
from pathlib import Path

from tools.fuzzing.damage import make_case

ROOT = Path(__file__).resolve().parents[3]


def fingerprint() -> str:
    """Of what some dozens of cases are."""
    digest = hashlib.sha256()
    for number in range(60):
        case = make_case(number, 5)
        digest.update(
            f"{case}{case.command}{case.mapped}{sorted(case.files.items())}".encode(errors="backslashreplace")
        )
    return digest.hexdigest()


def test_cases_are_the_same_in_every_process() -> None:
    command = "from tests.tools.fuzzing.test_damage import fingerprint; print(fingerprint())"
    other = subprocess.run([sys.executable, "-c", command], cwd=ROOT, capture_output=True, text=True, check=True)
    assert other.stdout.strip() == fingerprint()
