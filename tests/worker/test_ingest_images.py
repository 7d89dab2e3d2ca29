"""Images from strangers: every bad one is named, none takes the trainer down, and limits hold before decoding."""

import os
import random
import resource
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from app.domain.errors import DataFault
from tests import pictures
from tests.pictures import crashing_png, encoded, huge_png, image, jpeg, png, some
from tests.waiting import dead, until
from worker.ingest import ingest_folder, inspectors, sandbox
from worker.ingest.inspectors import Inspector
from worker.report import MadeDataset

pytestmark = pytest.mark.worker


def ingest(files: dict[str, bytes], tmp_path: Path, **options: object) -> MadeDataset:
    path = pictures.zipped(tmp_path / "upload", files)
    return ingest_folder(path, tmp_path / "scratch", limits=pictures.LIMITS, threads=2, **options)  # type: ignore[arg-type]


BAD: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "empty file"),
    "text": (b"hello", "not an image"),
    "truncated jpeg": (jpeg()[:-20], "truncated"),
    "truncated png": (png()[:-40], "truncated"),
    "header only": (jpeg()[:30], "truncated"),
    "crashes the decoder": (crashing_png(), "damaged: the decoder crashed on it"),
    "pixel bomb": (huge_png(), "60000 x 60000 pixels; an image may have 1000000; make it smaller"),
    "a little too large": (huge_png(1001, 1000), "1001 x 1000 pixels"),
    "bitmap": (encoded(image(), "BMP"), "BMP is not supported; convert it to JPEG or PNG"),
    "tiff": (encoded(image(), "TIFF"), "TIFF is not supported; convert it to JPEG or PNG"),
    "a page": (b"<html></html>", "not an image"),
    "svg": (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "not an image"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_image_is_named_and_the_rest_is_kept(name: str, tmp_path: Path) -> None:
    data, reason = BAD[name]
    made = ingest({**some("a/1.jpg", "b/1.jpg", "b/3.jpg"), "a/2.jpg": data}, tmp_path)
    assert made.facts.splits == {"train": 3}
    (bad,) = made.report["bad"]["files"]
    assert bad["name"] == "a/2.jpg"
    assert bad["reason"].startswith(reason)


def test_all_bad_images_at_once_are_named_in_order(tmp_path: Path) -> None:
    files = some("a/good.jpg", "b/good.jpg") | {f"b/{name}.jpg": data for name, (data, _) in BAD.items()}
    made = ingest(files, tmp_path)
    assert made.facts.splits == {"train": 2}
    assert [item["name"] for item in made.report["bad"]["files"]] == sorted(f"b/{name}.jpg" for name in BAD)
    assert sum(made.report["bad"]["reasons"].values()) == len(BAD)


def test_the_first_bad_files_end_the_run_where_that_is_asked(tmp_path: Path) -> None:
    files = some("a/good.jpg") | {f"a/bad{n:02d}.jpg": b"no" for n in range(30)}
    with pytest.raises(DataFault) as caught:
        ingest(files, tmp_path, on_error="fail")
    left = [thread.name for thread in threading.enumerate() if thread.name.startswith("ingest")]
    assert left == [], "ended by name, not when garbage is collected: the fault still holds its frames"
    assert caught.value.code == "bad_files"
    assert "a/bad00.jpg: not an image" in caught.value.message
    assert "a/bad09.jpg" in caught.value.message
    assert not list((tmp_path / "scratch").iterdir())


def test_a_set_of_bad_images_only(tmp_path: Path) -> None:
    with pytest.raises(DataFault) as caught:
        ingest({"a/1.jpg": b"no", "a/2.png": crashing_png()}, tmp_path)
    assert caught.value.code == "no_usable_images"
    assert "none of the 2 images" in caught.value.message
    assert "a/2.png: damaged" in caught.value.message


def test_every_supported_kind_is_kept_as_it_came(tmp_path: Path) -> None:
    sixteen = pictures.Image.fromarray(np.arange(120, dtype=np.uint16).reshape(10, 12) * 500)
    kinds = {
        "a.jpg": jpeg(1), "b.png": png(2), "c.webp": encoded(image(3), "WEBP"), "d.gif": encoded(image(4), "GIF"),
        "e.png": encoded(sixteen, "PNG"), "f.png": png(5, mode="P"), "g.png": png(6, mode="RGBA"),
        "h.jpg": encoded(image(7).convert("CMYK"), "JPEG"), "i.png": png(8, mode="L"),
    }  # fmt: skip
    made = ingest(kinds, tmp_path)
    assert made.facts.splits == {"train": len(kinds)}
    assert made.facts.channels == 3
    assert made.report["formats"] == {"jpeg": 2, "png": 5, "webp": 1, "gif": 1}
    assert made.report["modes"] == {"grey": 2, "sixteen_bit": 1, "alpha": 1, "palette": 2, "cmyk": 1}
    assert any("transparency" in warning for warning in made.report["warnings"])


def test_grey_sets_have_one_channel_and_sizes_are_those_of_the_turned_image(tmp_path: Path) -> None:
    exif = pictures.Image.Exif()
    exif[0x0112] = 6
    made = ingest({"1.png": png(1, 20, 30, "L"), "2.jpg": encoded(image(2, 40, 8, "L"), exif=exif)}, tmp_path)
    assert made.facts.channels == 1
    assert made.facts.image_sizes == {"min_height": 30, "max_height": 40, "min_width": 8, "max_width": 20}


def test_a_file_far_larger_than_its_pixels_is_not_read(tmp_path: Path) -> None:
    limits = pictures.LIMITS.model_copy(update={"max_entry_bytes": 2**26, "max_unpacked_bytes": 2**27})
    padded = jpeg() + os.urandom(9 * 2**20)
    path = pictures.zipped(tmp_path / "upload", {"a/1.jpg": jpeg(1), "a/2.jpg": padded, "a/3.jpg": b"\0" * 5 * 2**20})
    with pytest.raises(DataFault, match="looks like a bomb"):
        ingest_folder(path, tmp_path / "scratch", limits=limits, threads=1)
    path = pictures.zipped(tmp_path / "upload", {"a/1.jpg": jpeg(1), "a/2.jpg": padded})
    made = ingest_folder(path, tmp_path / "scratch", limits=limits, threads=1)
    assert made.report["bad"]["files"][0]["reason"].endswith("bytes for 12 x 10 pixels")


def test_an_inspector_survives_what_kills_its_child() -> None:
    inspector = Inspector(pictures.LIMITS)
    try:
        batch = [jpeg(1), crashing_png(), jpeg(2), b"no", crashing_png(), crashing_png(), png(3)]
        verdicts = inspector.inspect(batch)
        crash = "damaged: the decoder crashed on it"
        assert verdicts.reasons == {1: crash, 3: "not an image", 4: crash, 5: crash}
        assert verdicts.table["width"].tolist() == [12, 0, 12, 0, 0, 0, 12]
        assert len(inspector.inspect([])[0]) == 0
        assert not inspector.inspect([jpeg(4)]).reasons
    finally:
        inspector.close()


def test_an_image_that_hangs_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def slow(data: bytes, limits: object) -> tuple[bytes, bytes, bytes]:
        if bytes(data) == b"slow":
            time.sleep(600)
        return quick(data, pictures.LIMITS)

    quick = inspectors.vet
    monkeypatch.setattr(inspectors, "vet", slow)
    inspector = Inspector(pictures.LIMITS, patience_seconds=4.0)
    try:
        verdicts = inspector.inspect([jpeg(1), b"slow", jpeg(2)])
        assert verdicts.reasons == {1: "decoding it took longer than 4 seconds"}
        assert verdicts.table["height"].tolist() == [10, 0, 10]
    finally:
        inspector.close()


def test_an_image_that_computes_for_ever_is_ended_by_the_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    def busy(data: bytes, limits: object) -> tuple[bytes, bytes, bytes]:
        while bytes(data) == b"busy":
            pass
        return quick(data, pictures.LIMITS)

    quick = inspectors.vet
    monkeypatch.setattr(inspectors, "vet", busy)
    monkeypatch.setattr(sandbox, "CPU_SECONDS", 1)
    inspector = Inspector(pictures.LIMITS)
    try:
        assert inspector.inspect([jpeg(1), b"busy", jpeg(2)]).reasons == {1: "damaged: the decoder crashed on it"}
    finally:
        inspector.close()


def test_decoding_cannot_take_more_memory_than_allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sandbox, "decoder_bytes", lambda limits: 64 * 2**20)
    inspector = Inspector(pictures.LIMITS.model_copy(update={"max_pixels": 10**9}))
    try:
        verdicts = inspector.inspect([jpeg(1), huge_png(12_000, 12_000), jpeg(2)])
        assert list(verdicts.reasons) == [1]
        # A decoder that gets no memory says so or dies of it; either way only its own image is lost.
        assert "memory" in verdicts.reasons[1] or "crashed" in verdicts.reasons[1]
    finally:
        inspector.close()


def test_a_child_holds_nothing_and_may_do_little(monkeypatch: pytest.MonkeyPatch) -> None:
    def look(data: bytes, limits: object) -> tuple[bytes, bytes, bytes]:
        limit = [resource.getrlimit(kind)[1] for kind in (resource.RLIMIT_FSIZE, resource.RLIMIT_CORE)]
        files = sorted(int(name) for name in os.listdir("/proc/self/fd"))
        try:
            Path("/tmp/written-by-an-inspector").write_text("x")
            wrote = True
        except OSError:
            wrote = False
        reason = repr((limit, len([name for name in files if name > 2]), wrote)).encode()
        return inspectors._VERDICT.pack(bytes(32), 0, 0, 0, len(reason), 0, 0, 0, 0), reason, b""

    monkeypatch.setattr(inspectors, "vet", look)
    inspector = Inspector(pictures.LIMITS)
    try:
        assert inspector.inspect([b"x"]).reasons == {0: "([0, 0], 2, False)"}  # its socket, and the folder it lists
    finally:
        inspector.close()


def test_children_end_with_their_parent() -> None:
    program = (
        "import sys, time; from tests import pictures; from worker.ingest.inspectors import Inspector;"
        "i = Inspector(pictures.LIMITS); i.inspect([pictures.jpeg()]); print(i._child, flush=True); time.sleep(600)"
    )
    with subprocess.Popen([sys.executable, "-W", "ignore", "-c", program], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout
        child = int(parent.stdout.readline())
        parent.send_signal(signal.SIGKILL)
    until(lambda: dead(child))


def test_limits_of_the_reader_are_lifted_afterwards() -> None:
    before = resource.getrlimit(resource.RLIMIT_AS), resource.getrlimit(resource.RLIMIT_NOFILE)
    with sandbox.restrict(pictures.LIMITS):
        assert resource.getrlimit(resource.RLIMIT_AS)[0] != resource.RLIM_INFINITY
        with pytest.raises(MemoryError):
            bytearray(2**40)
    assert (resource.getrlimit(resource.RLIMIT_AS), resource.getrlimit(resource.RLIMIT_NOFILE)) == before


def fuzzed(count: int, seed: int) -> dict[str, bytes]:
    """Break images in many ways: flipped bits, cut ends, swapped and repeated parts."""
    draw = random.Random(seed)
    sources = [jpeg(1, 40, 30), png(2, 40, 30), encoded(image(3, 40, 30), "WEBP"), encoded(image(4, 40, 30), "GIF"),
               png(5, 40, 30, "P"), encoded(image(6, 40, 30), "JPEG", progressive=True)]  # fmt: skip
    files: dict[str, bytes] = {}
    for number in range(count):
        data = bytearray(draw.choice(sources))
        for _ in range(draw.choice((1, 1, 3, 10))):
            at = draw.randrange(len(data))
            how = draw.randrange(4)
            if how == 0:
                data[at] ^= 1 << draw.randrange(8)
            elif how == 1:
                del data[at:]
                data += b"\0" * draw.choice((0, 0, 5))
            elif how == 2:
                data[at : at + 4] = draw.randbytes(4)
            else:
                data[at:at] = data[at : at + draw.randrange(1, 30)]
            data = data or bytearray(b"x")
        files[f"{number % 3}/{number:05d}.img.png"] = bytes(data)
    return files


def check_fuzzed(count: int, seed: int, tmp_path: Path) -> None:
    files = some("0/good.jpg", "1/good.jpg", "2/good.jpg") | fuzzed(count, seed)
    limits = pictures.LIMITS.model_copy(update={"max_entries": 20_000, "max_unpacked_bytes": 2**30})
    path = pictures.zipped(tmp_path / "upload", files)
    made = ingest_folder(path, tmp_path / "scratch", limits=limits, threads=2)
    assert made.report["samples"] + made.report["bad"]["count"] == count + 3, "a file was dropped in silence"
    assert made.report["samples"] >= 3
    assert made.report["bad"]["count"] > count // 4
    assert any("crashed" in reason for reason in made.report["bad"]["reasons"])


def test_broken_images_are_each_kept_or_named(tmp_path: Path) -> None:
    check_fuzzed(300, 0, tmp_path)


@pytest.mark.long
def test_ten_thousand_broken_images_are_each_kept_or_named(tmp_path: Path) -> None:
    check_fuzzed(10_000, 1, tmp_path)
