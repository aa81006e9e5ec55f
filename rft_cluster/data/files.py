"""Find the pictures in a folder, count the files that are left out, and read a file safely.

Files left out are counted by kind, so that nobody trains on half of a folder without knowing.
"""

from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from rft_cluster.common.errors import UserError
from rft_cluster.common.text import shown

SUFFIXES = (
    *(".png", ".apng", ".jpg", ".jpeg", ".jpe", ".jfif", ".jif", ".pjpeg", ".pjp", ".mpo"),
    *(".webp", ".avif", ".bmp", ".dib", ".gif", ".tif", ".tiff", ".ppm", ".pgm", ".pbm", ".pnm"),
)
# Picture formats that cannot be read here. They are reported as bad instead of being ignored.
OTHER_SUFFIXES = (".heic", ".heif", ".svg", ".jp2", ".psd", ".dng")
# Folders that operating systems, network storage, version control and notebooks create.
SYSTEM_FOLDERS = {
    *("__macosx", ".ds_store", ".appledouble", ".trashes", ".spotlight-v100", ".fseventsd", ".temporaryitems"),
    *("$recycle.bin", "recycler", "recycled", "system volume information", "found.000", "lost+found"),
    *("@eadir", "#recycle", "#snapshot", "@recycle", "@recently-snapshot", ".thumbnails", ".picasaoriginals"),
    *("__pycache__", "thumbs.db", "desktop.ini"),
}
TABLE_SUFFIXES = (".csv", ".tsv")
NAMED = 5
SIDE_CARS = ("thumbs.db", "desktop.ini")  # Windows; other systems' side-car files begin with a dot


class LeftOut:
    """Counts the files that are left out, by kind, with an example of each kind."""

    def __init__(self) -> None:
        self._kinds: Counter[str] = Counter()
        self._first: dict[str, str] = {}
        self._system: set[Path] = set()

    def file(self, path: Path) -> None:
        """Count a file that is not a picture. Side cars, and hidden files other than pictures, do not count."""
        name = path.name.lower()
        if name.startswith("._") or name in SIDE_CARS:
            return
        if name.startswith("."):
            if path.suffix.lower() in SUFFIXES:
                self._count("hidden", path.name)
        else:
            self._count(path.suffix or "without a suffix", path.name)

    def folder(self, path: Path, why: str) -> None:
        """Count all files below a folder that is not used. `why` says where they are: "in sub-folders of rose/"."""
        files = [file for file in path.rglob("*") if file.is_file() and not _hidden(file.relative_to(path))]
        for file in files:
            self._count(why, str(file.relative_to(path.parent)))

    def beside(self, path: Path, where: str) -> None:
        """Count a picture outside the folders that are used."""
        self._count(where, path.name)

    def system(self, path: Path) -> None:
        self._system.add(path)

    def _count(self, kind: str, example: str) -> None:
        known = next((other for other in self._kinds if other.casefold() == kind.casefold()), kind)
        self._kinds[known] += 1
        self._first.setdefault(known, example)

    def notes(self) -> list[str]:
        notes = []
        if self._kinds:
            kinds = ", ".join(f"{n} {kind} ({self._first[kind]})" for kind, n in self._kinds.most_common())
            total = self._kinds.total()
            notes.append(f"left out {total} file{'s' if total > 1 else ''}: {shown(kinds)}")
        if self._system:
            names_of = Counter(path.name for path in self._system)
            names = some([f"{name}/" + (f" ({n})" if n > 1 else "") for name, n in sorted(names_of.items())])
            notes.append(f"ignored system folders: {shown(names)}")
        return notes


def some(names: list[str]) -> str:
    """The first `NAMED` names as text, and the number of the others."""
    rest = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return ", ".join(names[:NAMED]) + rest


def is_picture(path: Path) -> bool:
    """Return True if the name is that of a picture. Hidden files are not: on a Mac `._a.jpg` has a.jpg's attributes."""
    return path.suffix.lower() in SUFFIXES + OTHER_SUFFIXES and not path.name.startswith(".")


def tables_in(folder: Path) -> list[Path]:
    """The tables directly in a folder."""
    return [path for path in entries(folder) if path.suffix.lower() in TABLE_SUFFIXES and not path.name.startswith(".")]


def entries(folder: Path) -> list[Path]:
    try:
        return sorted(folder.iterdir())
    except OSError as error:
        raise UserError(f"data.path: {folder} cannot be read: {error.strerror}") from error


def pictures_in(folder: Path) -> list[Path]:
    """The pictures directly in a folder."""
    return [path for path in entries(folder) if is_picture(path)]


def folders_in(folder: Path, root: Path, left_out: LeftOut | None = None) -> list[Path]:
    """The sub-folders, without hidden ones and system folders. System folders are counted in `left_out`.

    Raises:
        UserError: a sub-folder is a link out of `root`.
    """
    found = []
    for path in entries(folder):
        if is_system(path):
            if left_out is not None and path.is_dir():
                left_out.system(path)
        elif path.is_dir() and not path.name.startswith(".") and not is_picture(path):
            if not path.resolve().is_relative_to(root.resolve()):
                raise UserError(f"data.path: {path} is a link out of {root}; put the images themselves there")
            found.append(path)
    return found


def is_system(path: Path) -> bool:
    name = path.name.casefold()
    return name in SYSTEM_FOLDERS or name.startswith((".trash", ".ipynb_checkpoints"))


def count_others(paths: Iterable[Path], left_out: LeftOut) -> None:
    """Count the files among `paths` that are not pictures."""
    for path in paths:
        if not path.is_dir() and not is_picture(path):
            left_out.file(path)


def read_file(path: Path, root: Path, max_bytes: int) -> bytes:
    """Read a plain file below `root`, at most `max_bytes` + 1 bytes of it.

    Raises:
        UserError: the path is not a plain file below `root`; the message has its path in `root` and what it is.
        OSError: the file cannot be read.
    """
    where = path.relative_to(root)
    try:
        str(where).encode()
        resolved = path.resolve()
    except UnicodeEncodeError as error:
        raise UserError(f"{where}: its name is not UTF-8; rename it") from error
    except RuntimeError as error:  # Python 3.11 and 3.12 raise this for a link to itself
        raise UserError(f"{where}: a link to itself") from error
    if not resolved.is_relative_to(root.resolve()):
        raise UserError(f"{where}: a link out of the folder")
    if path.is_dir():
        raise UserError(f"{where}: a folder, not a file")
    if not path.is_file():  # opening a named pipe would block for ever
        raise UserError(f"{where}: not a file, or a link to nothing")
    with path.open("rb") as file:
        return file.read(max_bytes + 1)


def _hidden(path: Path) -> bool:
    return any(part.startswith(".") or is_system(Path(part)) for part in path.parts) or path.name.lower() in SIDE_CARS
