"""CIFAR pickles: read right, refused with the place and the correction, and never run."""

import builtins
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from app.domain.errors import DataFault
from tests import pictures
from tests.worker.ingested import ingest, pixels_of, table
from tests.worker.published import NAMES, Python2, batch, cifar10
from worker.ingest import pickles

pytestmark = pytest.mark.worker


def test_cifar10_as_its_authors_publish_it(tmp_path: Path) -> None:
    path, train, test, labels = cifar10(tmp_path / "upload.bin")
    made = ingest(path, tmp_path)
    assert (made.format, made.facts.classes) == ("cifar", tuple(NAMES))
    assert made.facts.splits == {"train": 40, "test": 10}
    assert table(made, "train")["label"].to_pylist() == labels
    assert np.array_equal(pixels_of(made, "train"), train)
    assert np.array_equal(pixels_of(made, "test"), test)
    assert table(made, "train")["image"][0]["path"].as_py() == "train/thing_1_0000.png"
    assert ingest(path, tmp_path).facts.sha256 == made.facts.sha256


def test_cifar100_takes_the_fine_labels(tmp_path: Path) -> None:
    pixels, train = batch(1, 12, "training batch 1 of 1", "fine_labels", 100)
    _, test = batch(2, 6, "testing batch 1 of 1", "fine_labels", 100)
    train["coarse_labels"] = test["coarse_labels"] = [0] * 12
    names = [f"thing {n}" for n in range(100)]
    meta = {"fine_label_names": names, "coarse_label_names": ["all"]}
    files = {"c/train": Python2.dumps(train), "c/test": Python2.dumps(test), "c/meta": Python2.dumps(meta)}
    made = ingest(pictures.tarred(tmp_path / "upload", files), tmp_path)
    assert made.facts.classes == tuple(names)
    assert table(made, "train")["label"].to_pylist() == train["fine_labels"]
    assert np.array_equal(pixels_of(made, "train"), pixels)


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@pytest.mark.parametrize("keys", [str, str.encode])
def test_a_pickle_written_again_by_python_3(protocol: int, keys: Any, tmp_path: Path) -> None:
    pixels, content = batch(1, 8, "training batch 1 of 1")
    content = {keys(key): value for key, value in content.items()}
    files = {"c/data_batch_1": pickle.dumps(content, protocol)}
    made = ingest(pictures.zipped(tmp_path / "upload", files), tmp_path)
    assert np.array_equal(pixels_of(made, "train"), pixels)


class Evil:
    """Writes a file when it is unpickled."""

    def __init__(self, call: Any, *arguments: Any) -> None:
        self.call, self.arguments = call, arguments

    def __reduce__(self) -> Any:
        return self.call, self.arguments


def evil_pickles(canary: Path) -> dict[str, bytes]:
    import os
    import subprocess

    touch = f"touch {canary}"
    state = b"(K\x01K\x04K\x04\x86cnumpy\ndtype\nU\x02u1K\x00K\x01\x87R"
    array = b"\x80\x02}U\x04datacnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85U\x01b\x87R"
    good = Python2.dumps(batch(1, 2, "training batch 1 of 1")[1])
    return {
        "os.system": pickle.dumps({"data": Evil(os.system, touch)}, 2),
        "os.system, protocol 0": b"}(S'data'\ncos\nsystem\n(S'" + touch.encode() + b"'\ntRs.",
        "os.system, protocol 4": pickle.dumps({"data": Evil(os.system, touch)}, 4),
        "eval": pickle.dumps({"data": Evil(builtins.eval, f"open({str(canary)!r}, 'w')")}, 2),
        "exec": pickle.dumps({"data": Evil(builtins.exec, f"open({str(canary)!r}, 'w')")}, 2),
        "getattr": pickle.dumps({"data": Evil(getattr, 1, "real")}, 2),
        "Popen": pickle.dumps({"data": Evil(subprocess.Popen, ["touch", str(canary)])}, 2),
        "a class": b"\x80\x02}U\x04data(ios\nsystem\nU\x01x.",
        "an object": b"\x80\x02}U\x04datacos\nsystem\n)\x81s.",
        "an extension": b"\x80\x02}U\x04data\x82\x01s.",
        "a persistent id": b"\x80\x02}U\x04dataU\x01xQs.",
        "numpy's own loader": b"\x80\x02}U\x04datacnumpy\nload\nU\x01x\x85Rs.",
        "a codec that is no text": b"\x80\x02}U\x04datac_codecs\nencode\nX\x01\x00\x00\x00xU\x06base64\x86Rs.",
        "bytes of a number": b"\x80\x02}U\x04datac__builtin__\nbytes\nJ\xff\xff\xff\x7f\x85Rs.",
        "numpy's constructor of something else": b"\x80\x02}U\x04datacnumpy.core.multiarray\n_reconstruct\n)Rs.",
        "calling a number": b"\x80\x02}U\x04dataK\x01)Rs.",
        "calling a string": b"\x80\x02}U\x04dataU\x09os.system)Rs.",
        "state on a dictionary": b"\x80\x02}}b.",
        "an array of objects": array + state.replace(b"u1", b"O8") + b"\x89U\x04abcdtbs.",
        "an array of another size": array + state + b"\x89U\x04abcdtbs.",
        "an array without state": array + b"s.",
        "a negative shape": array + state.replace(b"K\x04K\x04", b"J\xff\xff\xff\xffK\x04") + b"\x89U\x04abcdtbs.",
        "an enormous shape": array + state.replace(b"K\x04K\x04", b"J\xff\xff\xff\x7f" * 2) + b"\x89U\x00tbs.",
        "a string longer than the file": b"\x80\x02}U\x04dataT\xff\xff\xff\x7fabcs.",
        "a string of negative length": b"\x80\x02}U\x04dataT\xff\xff\xff\xffabcs.",
        "cut short": good[:-200],
        "no stop": good[:-1],
        "only a head": b"\x80\x02}",
        "a list": b"\x80\x02}0](K\x01e.",
        "an empty stack": b"\x80\x02}0.",
        "an unknown memo": b"\x80\x02}h\x09.",
        "a missing mark": b"\x80\x02}K\x01u.",
        "odd items": b"\x80\x02}(K\x01u.",
        "a key that is a list": b"\x80\x02}]K\x01s.",
        "a key that is no text": b"\x80\x02}(U\x01\xffK\x01u.",
    }  # fmt: skip


@pytest.mark.parametrize("name", evil_pickles(Path("canary")))
def test_a_pickle_that_is_more_than_data_is_refused_and_never_run(name: str, tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    data = evil_pickles(canary)[name]
    with pytest.raises(DataFault) as caught:
        pickles.load(memoryview(data), "data_batch_1")
    assert caught.value.code == "unsafe_pickle"
    assert "data_batch_1 is not a pickle as the CIFAR files have it" in caught.value.message
    assert not canary.exists()


@pytest.mark.parametrize(
    ("name", "called"),
    [("os.system", "posix.system"), ("os.system, protocol 4", "posix.system"), ("eval", "__builtin__.eval"),
     ("Popen", "commands.Popen"), ("numpy's own loader", "numpy.load")],
)  # fmt: skip
def test_the_refusal_says_which_code_was_called_for(name: str, called: str) -> None:
    with pytest.raises(DataFault, match=f"it calls for '{called}', which is code"):
        pickles.load(memoryview(evil_pickles(Path("canary"))[name]), "data_batch_1")


@pytest.mark.parametrize("name", ["os.system", "eval", "cut short", "an array of objects"])
def test_an_archive_with_such_a_pickle_fails_by_name(name: str, tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    path, *_ = cifar10(tmp_path / "upload", data_batch_2=evil_pickles(canary)[name])
    with pytest.raises(DataFault) as caught:
        ingest(path, tmp_path)
    assert caught.value.code == "unsafe_pickle"
    assert "cifar-10-batches-py/data_batch_2" in caught.value.message
    assert not canary.exists()


def test_the_reader_never_runs_long(tmp_path: Path) -> None:
    deep = b"\x80\x02}" + b"(" * 100_000 + b"t" * 100_000 + b"."
    with pytest.raises(DataFault):
        pickles.load(memoryview(deep), "deep")
    doubling = b"\x80\x02]q\x00" + b"(h\x00h\x00eq\x00" * 50_000 + b"."
    with pytest.raises(DataFault, match="no dictionary"):
        pickles.load(memoryview(doubling), "doubling")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"labels": [0]}, "20 images, but not as many labels"),
        ({"labels": [300] * 20}, "row 0 has a label that is no class number"),
        ({"data": np.zeros((20, 3000), np.uint8)}, "no uint8 array of 3072 values"),
    ],
)
def test_a_cifar_batch_that_does_not_fit_is_named(change: dict[str, Any], words: str, tmp_path: Path) -> None:
    content = batch(2, 20, "training batch 2 of 2")[1] | change
    path, *_ = cifar10(tmp_path / "upload", data_batch_2=Python2.dumps(content))
    with pytest.raises(DataFault) as caught:
        ingest(path, tmp_path)
    assert "data_batch_2" in caught.value.message
    assert words in caught.value.message
