"""Folders as people have them: which folders are parts, which are classes, and what is left out.

If anything looks like parts (train, val_images, TEST ...), it is parts, or nothing is read. Folders
that hold the same sub-folders are never taken as classes unless `data.layout` says so.
"""

import os
import re
import stat
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import combinations
from pathlib import Path

from data.formats import SUFFIXES, UNREAD, ending, printable
from errors import UserError

PARTS = ("train", "validation", "test")
WORDS = {
    "train": ("train", "training", "trn", "trainval"),
    "validation": ("val", "valid", "validation", "validate", "dev", "eval", "evaluation"),
    "test": ("test", "testing", "tst"),
}
ALIASES = {word: part for part, words in WORDS.items() for word in words}
# What may stand before or after such a word: train_images, seg_test, test_set, val2017.
_BESIDE = (
    "(?:sets?|data|dataset|images?|imgs?|photos?|pics?|pictures?|files?|folder|split|seg|part|new|raw"
    "|simple|small|labell?ed|unlabell?ed|samples?|final|cropped|resized|processed|original|jpe?g|png)*"
)
_PARTS = {part: re.compile(f"{_BESIDE}(?:{'|'.join(w)}){_BESIDE}") for part, w in WORDS.items()}
IGNORED = {"__MACOSX", "@eaDir", "lost+found", "$RECYCLE.BIN", "System Volume Information"}
LAYOUTS = ("auto", "class", "part/class", "class/part")


def part_of(name: str) -> str | None:
    """Returns the part that a folder's name stands for, in any case, or None."""
    word = re.sub(r"[\W\d_]+", "", name.casefold())
    return next((part for part, form in _PARTS.items() if form.fullmatch(word)), None)


def natural(name: str) -> tuple:
    """Returns a key that sorts numbers in names by their value: 2 before 10."""
    words = re.split(r"([0-9]+)", name)
    return [int(word) if i % 2 else word for i, word in enumerate(words)], name


@dataclass
class Node:
    """A folder: what lies directly in it, hidden files aside, links followed."""

    path: Path
    folders: dict[str, "Node"] = field(default_factory=dict)
    images: list[Path] = field(default_factory=list)
    others: list[Path] = field(default_factory=list)

    def walk(self) -> Iterator["Node"]:
        """Yields this folder and all below it."""
        yield self
        for node in self.folders.values():
            yield from node.walk()

    def all_images(self) -> list[Path]:
        """Returns the images in it and below it."""
        return [path for node in self.walk() for path in node.images]

    def filled(self) -> dict[str, "Node"]:
        """Returns the sub-folders that hold images, at any depth."""
        return {name: node for name, node in self.folders.items() if node.all_images()}

    def empty(self) -> UserError:
        """Returns the error that no image is in it."""
        others = [path for node in self.walk() for path in node.others]
        text = f"{self.path} holds no images: add some, or remove it"
        if others:
            helps = {UNREAD[ending(path.name)] for path in others if ending(path.name) in UNREAD}
            text += f" ({len(others)} files there are not read, such as {others[0].name}"
            text += f"; {'; '.join(sorted(helps))})" if helps else ")"
        return UserError(text)


@dataclass
class Folder:
    """The images of a folder, each with its part ("" where it is open) and its class.

    Attributes:
      files: (part, class name, path), in the order of their paths.
      class_names: in natural order.
      strays: files in class folders that are no image.
      left_out: images that are not read, by the reason.
      notes: what else a reader should know.
    """

    files: list[tuple[str, str, Path]] = field(default_factory=list)
    class_names: list[str] = field(default_factory=list)
    strays: list[str] = field(default_factory=list)
    left_out: dict[str, list[str]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def read_folder(root: Path, layout: str) -> Folder:
    """Finds the images of a folder; `layout` is one of LAYOUTS.

    Raises:
      UserError: it holds no classes, or leaves open which folders are parts and which are classes.
    """
    found = Folder()
    top = _scan(root, [], found.notes, root)
    guessed = layout == "auto"
    layout = _guess(top) if guessed else layout
    reader = {"class": _by_class, "part/class": _by_part, "class/part": _by_class_and_part}[layout]
    slots = reader(top, found, root)
    if guessed:
        for part in sorted({part for part, _, _ in slots}):
            _refuse_same_folders([node for p, _, node in slots if p == part], layout)
    for part, name, node in slots:
        found.files += [(part, printable(name), path) for path in node.all_images()]
        for below in node.walk():
            found.strays += [_relative(path, root) for path in below.others]
    found.files.sort(key=lambda file: file[2].parts)
    for node in top.walk():
        for path in node.others:
            if help := UNREAD.get(ending(path.name)):
                _leave_out(found, root, f"{ending(path.name)} is not read: {help}", [path])
    unread = {name for names in found.left_out.values() for name in names}
    found.strays = sorted(set(found.strays) - unread)
    found.class_names = _class_names(slots, root)
    return found


def _class_names(slots: list[tuple[str, str, Node]], root: Path) -> list[str]:
    """Returns the classes of the training images; another part may have no others."""
    first = [slot for slot in slots if slot[0] in ("", "train")]
    if slots and not first:
        parts = ", ".join(sorted({part for part, _, _ in slots}))
        raise UserError(
            f"{root} has {parts} but no train folder with class folders in it: add train/<class>/, "
            "or, if these folders are the classes, give --config.data.layout=class"
        )
    names = sorted({printable(name) for _, name, _ in first}, key=natural)
    filled = {printable(name) for _, name, node in first if node.all_images()}
    for _, name, node in first:
        if printable(name) not in filled:
            raise node.empty()
    for _, name, node in slots:
        if printable(name) not in names:
            known = ", ".join(map(repr, names[:12])) + (", ..." if len(names) > 12 else "")
            raise UserError(
                f"{node.path}: class {printable(name)!r} is not in the training images, whose "
                f"classes are {known}"
            )
    return names


# --- layouts ------------------------------------------------------------------------------------


def _guess(top: Node) -> str:
    """Returns the layout that the names of folders show, or raises."""
    named = {name: part for name in top.folders if (part := part_of(name))}
    if any(_enter(top.folders[name]).filled() for name in named):
        return "part/class"
    filled = top.filled()
    flat = [name for name in filled if name in named]
    if len({named[name] for name in flat}) > 1 or (flat and len(flat) == len(filled)):
        raise _no_classes(top.folders[flat[0]])
    inner = [{part_of(name) for name in node.filled()} - {None} for node in filled.values()]
    if any(len(parts) > 1 for parts in inner) or (inner and all(inner)):
        return "class/part"
    if not filled and top.images:
        raise _no_classes(top)
    return "class"


def _no_classes(node: Node) -> UserError:
    folder, images = node.path, node.all_images()
    return UserError(
        f"{folder} holds {len(images)} images, such as {images[0].name}, but no class folders: "
        f"expected {folder.name}/<class>/<image>. If the class stands in the files' names, or in a "
        "table, move each file into a folder named after its class. If the folders beside "
        f"{folder.name} are the classes, give --config.data.layout=class"
    )


def _by_class(top: Node, found: Folder, root: Path) -> list[tuple[str, str, Node]]:
    """root/<class>/..."""
    _leave_out(found, root, "no class folder", top.images)
    found.notes += [
        f"the folder {printable(name)} is taken as a class, though it is named like a part"
        for name in top.folders
        if part_of(name)
    ]
    return [("", name, node) for name, node in top.folders.items()]


def _by_part(top: Node, found: Folder, root: Path) -> list[tuple[str, str, Node]]:
    """root/<part>/<class>/...; other folders, and parts without class folders, are left out."""
    _leave_out(found, root, "no class folder", top.images)
    slots, parts = [], {}
    for name, outer in top.folders.items():
        part, node = part_of(name), _enter(outer)
        if part is None:
            _leave_out(found, root, f"{printable(name)} lies beside the parts", outer.all_images())
            continue
        if not outer.all_images():
            raise outer.empty()
        _leave_out(found, root, f"{printable(name)} has no class folders for them", node.images)
        if not node.folders:
            continue
        if part in parts:
            raise UserError(
                f"{parts[part]} and {outer.path} both hold the {part} images: keep one, or give "
                "the other a name that starts with a dot"
            )
        parts[part] = outer.path
        slots += [(part, child, below) for child, below in node.folders.items()]
    return slots


def _by_class_and_part(top: Node, found: Folder, root: Path) -> list[tuple[str, str, Node]]:
    """root/<class>/<part>/...; a class that holds anything else is refused."""
    _leave_out(found, root, "no class folder", top.images)
    slots = []
    for name, node in top.folders.items():
        parts = {child: part_of(child) for child in node.filled()}
        others = [child for child, part in parts.items() if part is None]
        if node.images or others or not parts or len(set(parts.values())) < len(parts):
            what = others[0] if others else "images directly in it" if node.images else "no part"
            what = "two folders of one part" if not others and parts and not node.images else what
            raise UserError(
                f"{node.path}: some class folders hold parts such as train and test, and this one "
                f"holds {what}. Expected <class>/<part>/<image> in all of them; if the names of "
                "the parts mean nothing, give --config.data.layout=class"
            )
        slots += [(part, name, node.folders[child]) for child, part in parts.items()]
    inner = ", ".join(sorted({printable(node.path.name) for _, _, node in slots}))
    found.notes.append(f"the folders {inner} in the class folders are taken as parts")
    return slots


def _enter(node: Node) -> Node:
    """Returns a folder, or the one of its own name that is all it holds, as Kaggle nests them."""
    same = [name for name in node.folders if name.casefold() == node.path.name.casefold()]
    alone = len(node.folders) == 1 and not node.images
    return node.folders[same[0]] if same and alone else node


def _refuse_same_folders(nodes: list[Node], layout: str) -> None:
    """Raises a UserError if two folders that would be classes hold the same sub-folders."""
    held = [(node, {printable(name).casefold() for name in node.filled()}) for node in nodes]
    for (a, left), (b, right) in combinations([pair for pair in held if len(pair[1]) > 1], 2):
        if len(same := sorted(left & right)) > 1:
            raise UserError(
                f"{a.path} and {b.path} both hold {same[0]} and {same[1]}: they look like parts or "
                f"collections of the same classes. Name them train, validation and test; or, if "
                f"{a.path.name} and {b.path.name} are classes, give --config.data.layout={layout}"
            )


def _leave_out(found: Folder, root: Path, reason: str, paths: list[Path]) -> None:
    if paths:
        found.left_out.setdefault(reason, []).extend(_relative(path, root) for path in paths)


# --- the disk -----------------------------------------------------------------------------------


def _scan(folder: Path, above: list[tuple[int, int]], notes: list[str], root: Path) -> Node:
    """Reads a folder and those below it; links that lead back to a folder above are not followed.

    Raises:
      UserError: a folder cannot be listed, or a link to one leads nowhere.
    """
    node = Node(folder)
    above = [*above, _identity(folder)]
    try:
        names = sorted(os.listdir(folder))
    except OSError as error:
        raise UserError(f"cannot list {folder}: {error.strerror}; make it readable") from error
    for name in names:
        path = folder / name
        if name.startswith(".") or name in IGNORED:
            continue
        if os.path.isdir(path):
            if os.path.islink(path) and _identity(path) in above:
                link = _relative(path, root)
                notes.append(f"{link} is a link back to a folder above it: not followed")
            else:
                node.folders[name] = _scan(path, above, notes, root)
        elif ending(name) in SUFFIXES:
            node.images.append(path)
        elif not ending(name) and not os.path.exists(path):
            raise UserError(f"{path} is a link to {os.readlink(path)}: mend or remove it")
        else:
            node.others.append(path)
    return node


def _identity(path: Path) -> tuple[int, int]:
    status = os.stat(path)
    return status.st_dev, status.st_ino


def read_file(path: Path) -> bytes:
    """Returns the content of a file; raises OSError with a message that stands alone."""
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise OSError("this is no regular file")
        return path.read_bytes()
    except FileNotFoundError as error:
        if path.is_symlink():
            text = f"this is a link to {os.readlink(path)}, which is missing"
            raise OSError(printable(text)) from error
        raise


def _relative(path: Path, root: Path) -> str:
    return printable(path.relative_to(root).as_posix())


def unique_ids(paths: list[Path], root: Path) -> list[str]:
    """Returns a printable id for each path: relative to the root, composed where that is unique."""
    ids = [_relative(path, root) for path in paths]
    counts = Counter(ids)
    for i, path in enumerate(paths):
        if counts[ids[i]] > 1:  # the same name in two Unicode forms
            raw = path.relative_to(root).as_posix().encode("utf-8", "surrogateescape")
            ids[i] = raw.decode("utf-8", "backslashreplace")
    if twice := [name for name, n in Counter(ids).items() if n > 1]:
        raise UserError(f"{root}: two files have names that read {twice[0]}: rename one")
    return ids
