"""Write and check the SHA-256 of an archive's data files, in the format of sha256sum."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path

from damoyolo.errors import CheckpointError

SUMS_FILE = "SHA256SUMS"


def sums_of(files: Iterable[Path]) -> str:
    """The content of SUMS_FILE for these files, by their names."""
    return "".join(f"{file_sha256(path)}  {path.name}\n" for path in sorted(files))


def check_sums(folder: Path, required: str) -> None:
    """Compare the files of an unpacked archive with its SUMS_FILE, before anything reads them.

    Finds damage, and files that were exchanged by themselves. Whoever can change the whole archive can change
    the sums as well. An archive without the file, of version 0.1.0, is not checked.

    required: the name of a file that has to be among those listed.

    Raises:
        CheckpointError: a file differs, is missing or cannot be read, or the list is damaged.
    """
    path = folder / SUMS_FILE
    if not path.is_file():
        return
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    expected = {name: digest for digest, _, name in (line.partition("  ") for line in lines)}
    if required not in expected:
        raise CheckpointError(f"{path} does not list {required}; rebuild the archive")
    for name, digest in expected.items():
        try:
            found = file_sha256(folder / name)
        except OSError as error:
            raise CheckpointError(
                f"{path} lists {name}, which cannot be read ({error.strerror or error}); rebuild the archive"
            ) from error
        if found != digest:
            raise CheckpointError(
                f"{folder / name} has the SHA-256 {found}, {SUMS_FILE} says {digest}: the file is damaged or "
                "was exchanged; take the archive from its source again, or rebuild it"
            )


def file_sha256(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal; read in blocks, as weights and archives are large."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()
