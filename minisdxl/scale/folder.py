"""The output folder of a run, which is its state: what is whole in it is done, and all else is to be made.

    manifest.json      settings of all pictures, their number, versions; other settings are refused
    pictures.jsonl     every picture of the run with its prompt; other prompts are refused
    NAME.png           the pictures, with their settings in the metadata
    rows/NAME.png.json what is known of a picture: time, FLOPs, machine, sha256 of its file. It is written before the
                       picture, so a picture never lacks its row
    results.jsonl      at the end: all rows, in the order of the run
    failures.jsonl     at the end: what could not be made, and why; the next run tries it again

Every file appears whole or not at all.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from io import BytesIO
from typing import Any

from PIL import Image

from minisdxl.cli.picture_files import DAMAGED
from minisdxl.cli.runs import REALIZED
from minisdxl.scale.store import Store

MANIFEST, PICTURES, RESULTS, FAILURES, ROWS = (
    *("manifest.json", "pictures.jsonl", "results.jsonl", "failures.jsonl"),
    "rows",
)
END_OF_PNG = b"\0\0\0\0IEND\xaeB`\x82"
Record = Mapping[str, Any]


@dataclass(frozen=True)
class RunFolder:
    """The folder of a run: ``settings`` are shared, ``records`` hold the rest of each picture's metadata by its file.

    Methods raise ``OSError`` as the file system does.
    """

    store: Store
    settings: Record
    records: Mapping[str, Record]

    def begin(self, versions: Record) -> bytes:
        """Writes the manifest, or checks the one that is there. Returns its bytes.

        Raises ``ValueError``, which names the difference, if the folder is of a run with other settings or prompts.
        """
        there = self.store.names()
        lines = [_json({"path": name, **record}) for name, record in self.records.items()]
        if MANIFEST not in there:
            self.store.write(PICTURES, _lines(lines))
            manifest = {"settings": self.settings, "pictures": len(self.records), "versions": versions}
            self.store.write(MANIFEST, (json.dumps(manifest, indent=1, ensure_ascii=False) + "\n").encode())
        data = self.store.read(MANIFEST)
        self._refuse(MANIFEST, self._parsed(MANIFEST, data)["settings"], self.settings)
        begun = self._parsed_lines(PICTURES)
        for number, (then, now) in enumerate(zip(begun, map(json.loads, lines), strict=False), start=1):
            self._refuse(f"picture {number}", then, now)
        if len(begun) != len(lines):
            raise ValueError(
                f"{self.store.url} was begun with {len(begun)} pictures, not {len(lines)}: "
                "expected the same prompts, or another folder"
            )
        return data

    def done(self) -> set[str]:
        """The pictures whose files are whole and say that these settings made them; cut ones do not count.

        Raises ``ValueError`` for one of other settings.
        """
        there = sorted(self.store.names() & self.records.keys())
        found = set()
        for name, record in zip(there, self.store.each(there, whole_record), strict=True):
            if record is not None:
                record.pop(REALIZED, None)
                self._refuse(name, record, json.loads(_json({**self.settings, **self.records[name]})))
                found.add(name)
        return found

    def finish(self, failures: Sequence[Record]) -> None:
        """Merges all rows into one file, and removes what killed processes left half-written."""
        names = self.store.names()
        rows = {row["path"]: row for row in (self._parsed_lines(RESULTS) if RESULTS in names else [])}
        parts = sorted(name for name in names if name.startswith(f"{ROWS}/"))
        rows |= {row["path"]: row for row in self.store.each(parts, json.loads)}
        here = {name: rows.get(name, {"path": name, **record}) for name, record in self.records.items()}
        self.store.write(RESULTS, _lines(_json(row) for name, row in here.items() if name in names))
        if failures:
            self.store.write(FAILURES, _lines(map(_json, failures)))
        elif FAILURES in names:
            self.store.remove([FAILURES])
        if parts:
            self.store.remove_folder(ROWS)
        self.store.remove_partial()

    def _refuse(self, what: str, there: Record, here: Record) -> None:
        """Raises ``ValueError`` for the first difference between what is there and what would be."""
        for key in {**there, **here}:
            if there.get(key) != here.get(key):
                raise ValueError(
                    f"{what} in {self.store.url} has {key} {_shown(there, key)}, not {_shown(here, key)}: "
                    "expected the same settings and prompts, or another folder"
                )

    def _parsed_lines(self, name: str) -> list[Any]:
        return [self._parsed(name, line) for line in self.store.read(name).splitlines()]

    def _parsed(self, name: str, data: bytes) -> Any:
        try:
            return json.loads(data)
        except ValueError as error:
            raise ValueError(f"{name} in {self.store.url} is damaged ({error}), expected JSON") from error


def write_whole(store: Store, row: Record, picture: bytes) -> None:
    """Writes a picture's row, which gets the sha256 of the picture's file, and then the picture."""
    row = {**row, "sha256": hashlib.sha256(picture).hexdigest()}
    store.write(f"{ROWS}/{row['path']}.json", _json(row).encode())
    store.write(row["path"], picture)


def whole_record(data: bytes) -> Any:
    """What the metadata of a PNG file says of how it was made, or ``None`` if the file is cut, damaged or another."""
    if not data.endswith(END_OF_PNG):
        return None
    try:
        with Image.open(BytesIO(data)) as image:
            record = json.loads(image.info["minisdxl"])
            image.verify()  # the checksums of all chunks
    except (OSError, *DAMAGED):
        return None
    return record


def _shown(record: Record, key: str) -> str:
    return f"{record[key]!r:.80}" if key in record else "unset"


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


def _lines(lines: Iterable[str]) -> bytes:
    return "".join(f"{line}\n" for line in lines).encode()
