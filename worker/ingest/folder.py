"""An image folder: `[train|validation|test/]class/image`, or flat and so without labels; one folder may wrap it all."""

import os
from collections.abc import Callable, Iterator, Sequence

from app.domain.datasets import SPLITS, Split
from app.domain.errors import DataFault
from worker.ingest.archive import SPAN, Archive, Bytes, Problem, Refused, shown
from worker.ingest.rows import SPLIT_NAMES, UNLABELLED, Rows, Source, chunks, nothing_found
from worker.parts import decode

IMAGES = frozenset({
    ".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".apng", ".webp", ".gif", ".bmp", ".dib", ".tif",
    ".tiff", ".heic", ".heif", ".avif", ".jp2", ".jxl", ".ico", ".ppm", ".pgm", ".pnm",
})  # fmt: skip
_JUNK = frozenset({"thumbs.db", "ehthumbs.db", "desktop.ini", ".ds_store"})
_NESTED = (b"PK\3\4", b"\x1f\x8b", b"BZh", b"\xfd7zXZ\0", b"7z\xbc\xaf\x27\x1c", b"Rar!\x1a\7", b"\x28\xb5\x2f\xfd")
_OUTSIDE = "lies beside the folders train, validation and test"

Place = tuple[Split, str | None]


def is_junk(name: str) -> bool:
    """Tell whether an operating system left this file behind."""
    base = name[name.rfind("/") + 1 :]
    return base.casefold() in _JUNK or base.startswith("._") or name.startswith("__MACOSX/") or "/__MACOSX/" in name


def is_image_name(name: str) -> bool:
    """Tell whether a file claims by its name to be an image."""
    return os.path.splitext(name)[1].lower() in IMAGES


def read(archive: Archive, what: str, asked: str | None) -> Source:
    """Arrange an archive's images. Raises `DataFault` when there are none, or none with the labels that are asked."""
    numbers, problems, ignored = _images(archive)
    if not numbers and not problems:
        raise nothing_found(what, archive.names)
    skip, warnings = _wrapping([archive.names[n] for n in numbers], asked)
    names = [archive.names[n][skip:] for n in numbers]
    locate = _layout(names)
    rows: dict[Split, list[tuple[str, str | None, int]]] = {split: [] for split in SPLITS}
    for name, number in zip(names, numbers, strict=True):
        place = locate(name)
        if place:
            label = place[1] if asked != "unlabelled_images" else None
            rows[place[0]].append((archive.names[number], label, number))
        else:
            ignored.append(Problem(shown(archive.names[number]), _OUTSIDE))
    for part in rows.values():
        part.sort()
    classes = tuple(sorted({label for part in rows.values() for _, label, _ in part if label is not None}))
    if asked == "image_classification" and not classes and any(rows.values()):
        raise DataFault(
            "the task image_classification was asked, but no image lies in a class folder",
            code="no_labels", phase="read", hint="expected [train|validation|test/]class/image.jpg",
        )  # fmt: skip
    return Source(
        "image_folder",
        classes,
        _rows(archive, rows, {name: number for number, name in enumerate(classes)}),
        sum(archive.sizes[n] for part in rows.values() for _, _, n in part),
        problems,
        ignored,
        warnings,
    )


def _images(archive: Archive) -> tuple[list[int], list[Problem], list[Problem]]:
    """Find the images: by name, or by content where the name says nothing."""
    numbers: list[int] = []
    problems: list[Problem] = []
    ignored: list[Problem] = []
    for number, name in enumerate(archive.names):
        if is_junk(name):
            continue
        if name.startswith(".") or "/." in name:
            ignored.append(Problem(shown(name), "hidden"))
        elif is_image_name(name):
            numbers.append(number)
        else:
            head = archive.head(number, 300)
            if decode.sniff(head) in ("jpeg", "png", "webp", "gif"):
                numbers.append(number)
            elif head.startswith(_NESTED) or head[257:262] == b"ustar":
                problems.append(Problem(shown(name), "an archive inside the archive; unpack it first"))
            else:
                ignored.append(Problem(shown(name), "not an image"))
    return numbers, problems, ignored


def _top(name: str) -> str | None:
    head, slash, _ = name.partition("/")
    return head if slash else None


def _special(folder: str | None) -> bool:
    return folder is not None and (folder.casefold() in SPLIT_NAMES or folder.casefold() in UNLABELLED)


def _wrapping(names: Sequence[str], asked: str | None) -> tuple[int, list[str]]:
    """Give how many characters of the names belong to folders that only wrap the rest."""
    skip = 0
    while True:
        tops = {_top(name[skip:]) for name in names}
        top = next(iter(tops), None)
        if len(tops) != 1 or top is None or _special(top):
            return skip, []
        inner = {_top(name[skip + len(top) + 1 :]) for name in names}
        if inner == {None}:  # all images lie in this one folder
            if asked == "image_classification" or skip:
                return skip, []
            return len(top) + 1, [f"all images lie in the one folder {shown(top)!r}, so they have no labels"]
        if skip and not any(_special(folder) for folder in inner):
            return skip, []
        skip += len(top) + 1


def _layout(names: Sequence[str]) -> Callable[[str], Place | None]:
    """Decide whether the top folders are splits, and give what tells a name's split and class.

    Two names of splits, or one and nothing else beside it, make splits; one among others is a class called `test`.
    """
    tops = {top for name in names if (top := _top(name)) is not None}
    splits = {SPLIT_NAMES[top.casefold()] for top in tops if top.casefold() in SPLIT_NAMES}
    others = [top for top in tops if not _special(top)]
    if splits and (len(splits) > 1 or not others):

        def of_split(name: str) -> Place | None:
            top, slash, rest = name.partition("/")
            if not slash or not _special(top):
                return None
            split = SPLIT_NAMES.get(top.casefold())
            return (split, _class(rest)) if split else ("train", None)

        return of_split
    return lambda name: ("train", _class(name))


def _class(rest: str) -> str | None:
    top = _top(rest)
    return None if top is None or top.casefold() in UNLABELLED else top


def _rows(
    archive: Archive, rows: dict[Split, list[tuple[str, str | None, int]]], labels: dict[str, int]
) -> Iterator[Rows]:
    for split, part in rows.items():
        start = 0
        for numbers in chunks(archive, [number for _, _, number in part]):
            here = part[start : start + len(numbers)]
            start += len(numbers)
            yield Rows(
                split,
                [name for name, _, _ in here],
                [labels[label] if label is not None else None for _, label, _ in here],
                sum(archive.sizes[number] for number in numbers),
                lambda numbers=numbers: _read(archive, numbers),
            )


def _read(archive: Archive, numbers: Sequence[int]) -> Sequence[Bytes | Refused]:
    """Read a chunk; a file too large to be read on trust shows its header first."""
    if len(numbers) == 1 and archive.sizes[numbers[0]] > SPAN:
        try:
            found = decode.header(archive.head(numbers[0], 2**16))
        except decode.Undecodable as error:
            if str(error) != "truncated":  # a long preface: the size stands further on
                return [Refused(str(error))]
        else:
            if archive.sizes[numbers[0]] > found.width * found.height * 8 + SPAN:
                return [Refused(f"{archive.sizes[numbers[0]]} bytes for {found.width} x {found.height} pixels")]
    return archive.read(numbers)
