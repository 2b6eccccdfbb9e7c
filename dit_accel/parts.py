"""Work that goes on where it was broken off: its finished parts in a folder, beside the settings that made them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .files import refuse_unwritable_folder, write_text
from .plain_data import as_plain, first_difference

RECORD = "settings.json"
FOLDER = "parts"
ANOTHER = "give another folder (--out)"
ANEW = f"{ANOTHER}, or start over (--start-over)"


@dataclass(frozen=True)
class Parts:
    """A folder of finished parts.

    Parts are written whole, so that one that is there is finished. A record says which settings made them, and parts of
    other settings are never taken for one's own.

    Attributes:
        folder: of the record, and of the parts below it.
        advice: what a user can do where the folder is of other settings.
    """

    folder: Path
    advice: str = ANEW

    def claim(self, settings: Mapping[str, Any], finished: Sequence[Path] | None = None, record: str = RECORD) -> None:
        """Keep the settings in the folder, which is made if it is missing, or find them there.

        Args:
            settings: all that a part depends on.
            finished: what is done already; the parts if None.
            record: name of the file of the settings. A second one holds what is known later, such as the weights.

        Raises:
            ValueError: the folder cannot be written, holds what other settings made, or what
                nobody knows the settings of.
        """
        refuse_unwritable_folder(self.folder)
        path, here = self.folder / record, as_plain(settings)
        there = _read(path)
        done = self._all() if finished is None else finished
        if there is None and done:
            raise ValueError(
                f"{done[0]} is there already, and no readable {record} beside it says what made it; {self.advice}."
            )
        if there is not None and (difference := first_difference(there, here)):
            raise ValueError(f"{self.folder} holds outputs made with {difference}; {self.advice}.")
        if there is None:
            write_text(path, json.dumps(here, indent=1, ensure_ascii=False) + "\n")

    def is_of(self, settings: Mapping[str, Any]) -> bool:
        """Whether the folder was claimed for these settings."""
        there = _read(self.folder / RECORD)
        return there is not None and first_difference(there, as_plain(settings)) is None

    def path(self, name: str, suffix: str = ".json") -> Path:
        """Where a part is, or will be."""
        return self.folder / FOLDER / f"{name}{suffix}"

    def count(self) -> int:
        """How many parts are finished."""
        return len(self._all())

    def read(self, name: str) -> Any:
        """A finished part as plain data; None where it is not finished.

        Raises:
            ValueError: its file is damaged.
        """
        path = self.path(name)
        if not path.exists():
            return None
        try:
            return json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ValueError(f"{path} is damaged ({str(error).rstrip('.')}); delete it, or {self.advice}.") from error

    def write(self, name: str, data: Any) -> None:
        """Keep a part, plain data without NaN.

        Raises:
            ValueError: the file cannot be written.
        """
        write_text(self.path(name), json.dumps(data, ensure_ascii=False, allow_nan=False) + "\n")

    def clear(self) -> None:
        """Delete the parts: what they were for is written."""
        shutil.rmtree(self.folder / FOLDER, ignore_errors=True)

    def forget(self, *records: str) -> None:
        """Delete the parts and the records, and nothing else.

        Args:
            records: further ones beside :data:`RECORD`.
        """
        self.clear()
        for record in (RECORD, *records):
            (self.folder / record).unlink(missing_ok=True)

    def _all(self) -> list[Path]:
        folder = self.folder / FOLDER
        # A name with a dot is a draft of a run that was killed.
        return sorted(path for path in folder.glob("*") if not path.name.startswith(".")) if folder.is_dir() else []


def _read(record: Path) -> Any:
    try:
        return json.loads(record.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
