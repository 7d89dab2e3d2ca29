"""What the doctor says of `auto`, and of what this machine can multiply."""

import json
from pathlib import Path

import pytest

from app.local import compute, health
from worker.parts import machine

pytestmark = pytest.mark.unit


def write(home: Path, content: str) -> None:
    (home / "cache").mkdir(exist_ok=True)
    (home / "cache" / "tuning.json").write_text(content)


def test_the_doctor_says_whether_auto_was_measured_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = {"torch": "2.15.0+cpu", "processor": "One"}
    now = {**kept, "bfloat16": True}
    monkeypatch.setattr(compute, "installed", lambda _: "2.15.0")
    monkeypatch.setattr(compute, "probe", lambda: {"fingerprints": {"cpu": now}})
    assert "follows the table; `tuneyard doctor --measure`" in health.measured(tmp_path).message
    write(tmp_path, json.dumps({"cpu": {"date": "2026-01-02", "fingerprint": now, "rows": []}}))
    assert health.measured(tmp_path).message == "follows what was measured here: cpu on 2026-01-02"
    # The same torch, but a file of before the doctor asked about bfloat16: `auto` does not follow it.
    write(tmp_path, json.dumps({"cpu": {"date": "2026-01-02", "fingerprint": kept, "rows": []}}))
    says = "follows the table; what was measured on 2026-01-02 for cpu does not count (another bfloat16); "
    assert health.measured(tmp_path).message.startswith(says)
    monkeypatch.setattr(
        compute, "probe", lambda: {"fingerprints": {"cpu": {**now, "torch": "2.16.0", "processor": "B"}}}
    )
    assert "(another bfloat16, processor, torch)" in health.measured(tmp_path).message
    monkeypatch.setattr(compute, "probe", lambda: "no module named torch")
    assert "for cpu does not count (this device is not to be seen)" in health.measured(tmp_path).message


def test_what_the_doctor_compares_is_what_auto_compares() -> None:
    compute.probe.cache_clear()
    seen = compute.probe()
    assert isinstance(seen, dict), seen
    assert seen["fingerprints"]["cpu"] == machine.fingerprint("cpu")


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"cpu": {}}', '{"cpu": []}', '{"cpu": null}'])
def test_a_memo_that_cannot_be_read_counts_as_none(content: str, tmp_path: Path) -> None:
    write(tmp_path, content)
    found = health.measured(tmp_path)
    assert (found.state, found.message.split(";")[0]) == ("ok", "follows the table")


@pytest.mark.parametrize(
    ("flags", "on_gpu", "state", "says"),
    [
        ({"avx2"}, False, "warning", "not native on this processor (AVX2)"),
        ({"avx2", "avx512_bf16"}, False, "ok", "native on the processor (avx512_bf16)"),
        ({"asimd", "bf16"}, False, "ok", "native on the processor (bf16)"),
        ({"avx2"}, True, "ok", "native on the GPU"),
    ],
)
def test_the_doctor_says_what_multiplies_bfloat16(
    flags: set[str], on_gpu: bool, state: str, says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = {"gpus": [], "gpu_bf16": on_gpu, "capability": "AVX2"}
    monkeypatch.setattr(compute, "installed", lambda _: "2.15.0")
    monkeypatch.setattr(compute, "wanted_torch", lambda: None)
    monkeypatch.setattr(compute, "probe", lambda: seen)
    monkeypatch.setattr(compute, "cpu_flags", lambda: flags)
    found = {finding.name: finding for finding in health.torch()}["bfloat16"]
    assert (found.state, found.message, found.remedy is None) == (state, says, state == "ok")
