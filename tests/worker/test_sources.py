"""The digest of our own code: other contents are another one, the same contents anywhere the same."""

import os
from pathlib import Path

import pytest

import app.domain
import worker
from worker import sources

pytestmark = pytest.mark.unit


def test_the_digest_follows_names_and_contents_and_neither_times_nor_folders(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def digest_in(folder: Path, texts: dict[str, str]) -> str:
        for package, name in ((worker, "worker"), (app.domain, "domain")):
            (folder / name / "parts").mkdir(parents=True)
            monkeypatch.setattr(package, "__path__", [str(folder / name)])
        for number, (name, text) in enumerate(texts.items()):
            (folder / name).write_text(text)
            os.utime(folder / name, (number, len(str(folder))))
        return sources.digest.__wrapped__()

    usual = {"worker/loop.py": "a", "worker/parts/x.py": "b", "worker/parts/table.json": "c", "domain/spec.py": "d"}
    expected = digest_in(tmp_path / "one", usual)
    assert digest_in(tmp_path / "elsewhere", dict(reversed(usual.items()))) == expected
    assert digest_in(tmp_path / "notes", {**usual, "worker/parts/notes.txt": "e"}) == expected
    others = [{**usual, name: "x"} for name in usual]
    others += [{**usual, "worker/parts/y.py": ""}, {**usual, "worker/loop.py": "", "worker/parts/x.py": "ab"}]
    others += [{"worker/parts/z.py" if name == "worker/parts/x.py" else name: text for name, text in usual.items()}]
    found = {digest_in(tmp_path / str(number), texts) for number, texts in enumerate(others)}
    assert len(found | {expected}) == len(others) + 1


def test_the_digest_is_of_this_program() -> None:
    names = {name for name, _ in sources.files()}
    assert {"worker/loop.py", "worker/parts/architectures.json", "worker/pretrain/simclr.py"} <= names
    assert "app.domain/spec.py" in names
    assert sources.digest() == sources.digest.__wrapped__()
