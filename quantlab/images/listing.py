"""What is in a folder or an archive of images: every image with its class, and no class in silence.

    folder_files(path)     # [((part, class, file name), file)]
    archive_files(path)    # yields ((part, class, file name), bytes)
"""

import os
import pathlib
import stat
import tarfile
import zipfile

from quantlab.images.files import IMAGE_SUFFIXES, PARTS, base_folder
from quantlab.system.errors import UserError, one_line


def folder_files(path):
    """[((part, class, file name), file)] of every image of a folder."""
    base = base_folder(path)
    if base is None:
        raise UserError(
            f"{path} has no train/ and test/ folders; expected train/CLASS/* and test/CLASS/*"
        )
    classes = _Classes(path)
    found = []
    for part in PARTS:
        for folder in sorted(base.joinpath(part).iterdir()):
            if folder.is_dir():
                classes.add((part, folder.name, ""))
            files = files_below(folder) if folder.is_dir() else []
            named = [(classes.add((part, *file.relative_to(base / part).parts)), file)
                     for file in files]
            found += [(name, file) for name, file in named if name]
    classes.check()
    return found


def files_below(folder):
    """The files below a folder, links followed, hidden ones left out, in order of their names.

    UserError for an image that is none: reading a FIFO or a device may wait forever.
    """
    found, around = [], {}
    for place, folders, names in os.walk(folder, followlinks=True):
        above = around.get(os.path.dirname(place), frozenset())
        around[place] = above | {os.path.realpath(place)}
        folders[:] = [name for name in folders if not name.startswith(".")  # no link into itself
                      and os.path.realpath(os.path.join(place, name)) not in around[place]]
        found += [pathlib.Path(place, name) for name in names if not name.startswith(".")]
    for file in found:
        if is_image(file.name) and not file.is_file():
            raise UserError(f"{one_line(file)} is no file but a device or a link to nothing; "
                            "remove it")
    return sorted(found)


def is_image(name):
    """True for the name of a file that is read as an image."""
    return name.lower().endswith(IMAGE_SUFFIXES) and not name.startswith(".")


def archive_files(path):
    classes = _Classes(path)
    if path.name.lower().endswith(".zip"):
        with zipfile.ZipFile(path) as archive:
            for member in archive.infolist():
                parts = pathlib.PurePosixPath(member.filename).parts
                name = classes.add((*parts, "") if member.is_dir() else parts)
                if stat.S_ISLNK(member.external_attr >> 16):
                    classes.refuse_link(parts)
                if name:
                    yield name, archive.read(member)
    else:
        with tarfile.open(path) as archive:
            for member in archive:
                parts = pathlib.PurePosixPath(member.name).parts
                name = classes.add((*parts, "") if member.isdir() else parts)
                if member.issym() or member.islnk():
                    yield from _behind_link(archive, member, name, classes)
                elif name and member.isfile():
                    yield name, archive.extractfile(member).read()
    classes.check()


def _behind_link(archive, member, name, classes):
    """(name, bytes) of the file in the archive that a link leads to; tar writes one for a file of
    two names.
    """
    parts = pathlib.PurePosixPath(member.name).parts
    try:
        content = archive.extractfile(member) if name else None
    except KeyError:
        content = None
    if content is None:
        classes.refuse_link(parts)
    else:
        yield name, content.read()


class _Classes:
    """The classes of a set, and of which of them an image was seen."""

    def __init__(self, path):
        self.path, self.seen, self.others = path, set(), {}

    def add(self, parts):
        """(…, part, class, …, file) -> (part, class, file); None: no image of the set."""
        inside = _inside(parts)
        if inside is None:
            return None
        part, name, *file = inside
        if not name.isprintable():
            raise UserError(f"{self.path}: the class {name!r} has a name that cannot be printed; "
                            "rename its folder")
        if is_image(file[-1]):
            self.seen.add((part, name))
            return part, name, "/".join(file)
        self.others[part, name] = self.others.get((part, name)) or file[-1]
        return None

    def refuse_link(self, parts):
        """UserError for a link of an archive that may stand for images."""
        if _inside((*parts, "below")) is not None or _inside((*parts, "class", "file")) is not None:
            raise UserError(f"{self.path}: {one_line('/'.join(parts))} is a link; pack the files "
                            "themselves (tar --dereference)")

    def check(self):
        """UserError for a class of which no image can be read."""
        for (part, name), other in sorted(self.others.items()):
            if part in {p for p, _ in self.seen} and (part, name) not in self.seen:
                there = f", only files such as {one_line(other)}" if other else ""
                raise UserError(
                    f"{self.path}: no image of the class {part}/{name} can be read{there}; convert "
                    f"them to {', '.join(IMAGE_SUFFIXES[:3])} or remove the folder")


def _inside(parts):
    """The names from train or test on, of at least three; None for what is hidden or elsewhere."""
    starts = [i for i in range(len(parts) - 2) if parts[i] in PARTS]
    if not starts:
        return None
    inside = parts[starts[-1] if starts[-1] == len(parts) - 3 else starts[0] :]
    return None if any(name.startswith(".") for name in inside) else inside
