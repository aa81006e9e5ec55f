"""Files in folders: which are pictures, which are passed over, and a safe way to read one.

What is not read is counted by kind, so that nobody trains on half of what lies there without knowing.
"""

from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from rft_cluster.common.errors import UserError
from rft_cluster.common.text import shown
from rft_cluster.data.images import MAX_BYTES

SUFFIXES = (
    *(".png", ".apng", ".jpg", ".jpeg", ".jpe", ".jfif", ".jif", ".pjpeg", ".pjp", ".mpo"),
    *(".webp", ".avif", ".bmp", ".dib", ".gif", ".tif", ".tiff", ".ppm", ".pgm", ".pbm", ".pnm"),
)
# Pictures as well, which cannot be read here: named as bad rather than passed over.
OTHER_SUFFIXES = (".heic", ".heif", ".svg", ".jp2", ".psd", ".dng")
# What operating systems, network storage, version control and notebooks leave beside people's files.
SYSTEM_FOLDERS = {
    *("__macosx", ".ds_store", ".appledouble", ".trashes", ".spotlight-v100", ".fseventsd", ".temporaryitems"),
    *("$recycle.bin", "recycler", "recycled", "system volume information", "found.000", "lost+found"),
    *("@eadir", "#recycle", "#snapshot", "@recycle", "@recently-snapshot", ".thumbnails", ".picasaoriginals"),
    *("__pycache__", "thumbs.db", "desktop.ini"),
}
TABLE_SUFFIXES = (".csv", ".tsv")
NAMED = 5
SIDE_CARS = ("thumbs.db", "desktop.ini")  # of Windows; those of others begin with a dot


class LeftOut:
    """Counts what is not read, by kind, with an example of each."""

    def __init__(self) -> None:
        self._kinds: Counter[str] = Counter()
        self._first: dict[str, str] = {}
        self._system: set[Path] = set()

    def file(self, path: Path) -> None:
        """A file among pictures that is none. Hidden ones that are no pictures, and side cars, are of no interest."""
        name = path.name.lower()
        if name.startswith("._") or name in SIDE_CARS:
            return
        if name.startswith("."):
            if path.suffix.lower() in SUFFIXES:
                self._count("hidden", path.name)
        else:
            self._count(path.suffix or "without a suffix", path.name)

    def folder(self, path: Path, why: str) -> None:
        """A folder that is not looked into, with all files in it and below; `why` is where they are, e.g. in
        sub-folders of rose/."""
        files = [file for file in path.rglob("*") if file.is_file() and not _hidden(file.relative_to(path))]
        for file in files:
            self._count(why, str(file.relative_to(path.parent)))

    def beside(self, path: Path, where: str) -> None:
        """A picture where none is expected."""
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
            notes.append(f"passed over system folders: {shown(names)}")
        return notes


def some(names: list[str]) -> str:
    """At most `NAMED` of the names, and how many more there are."""
    rest = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return ", ".join(names[:NAMED]) + rest


def is_picture(path: Path) -> bool:
    """By its name. A hidden one (on a Mac `._a.jpg` holds a.jpg's attributes) is none."""
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
    """Its sub-folders, without hidden ones and those of systems, which are counted.

    Raises:
        UserError: one is a link out of `root`.
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
    """Count the files among `paths` that are no pictures."""
    for path in paths:
        if not path.is_dir() and not is_picture(path):
            left_out.file(path)


def read_file(path: Path, root: Path, max_bytes: int = MAX_BYTES) -> bytes:
    """The bytes of a plain file below `root`, at most one more than `max_bytes`: never all of a huge file.

    Raises:
        UserError: it is not one; says what it is, after its path in `root`.
        OSError: it cannot be read.
    """
    where = path.relative_to(root)
    try:
        str(where).encode()
        resolved = path.resolve()
    except UnicodeEncodeError as error:
        raise UserError(f"{where}: its name is not UTF-8; rename it") from error
    except RuntimeError as error:  # what Python 3.11 and 3.12 say of a link to itself
        raise UserError(f"{where}: a link to itself") from error
    if not resolved.is_relative_to(root.resolve()):
        raise UserError(f"{where}: a link out of the folder")
    if path.is_dir():
        raise UserError(f"{where}: a folder, not a file")
    if not path.is_file():  # opening a named pipe would wait for ever
        raise UserError(f"{where}: not a file, or a link to nothing")
    with path.open("rb") as file:
        return file.read(max_bytes + 1)


def _hidden(path: Path) -> bool:
    return any(part.startswith(".") or is_system(Path(part)) for part in path.parts) or path.name.lower() in SIDE_CARS
