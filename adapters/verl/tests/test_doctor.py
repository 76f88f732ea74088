"""The doctor in the environment that it is for."""

from pathlib import Path

import pytest

from rlplugins_verl import doctor, settings


def test_the_doctor_finds_every_point_and_every_canary_alive() -> None:
    text, well = doctor.report()
    assert well, text
    assert f"verl {settings.TESTED}" in text
    assert "patched   workers/engine/base.py:BaseEngine.train_batch" in text
    assert "ok    official  v1/sample/logits_processor/interface.py:LogitsProcessor.apply" in text
    assert "ok    canary    trainers" in text
    assert "patched   workers/engine/fsdp/transformer_impl.py:FSDPEngineWithLMHead.forward_step" in text
    assert "ok    canary    calls" in text


def test_a_call_that_verl_no_longer_makes_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.py").write_text("class A:\n    def run(self):\n        return self.step(1)\n")
    calls = [("a.py", "A.run", "self.step("), ("a.py", "A.run", "self.stop("), ("b.py", "B", "x(")]
    monkeypatch.setattr(doctor, "CALLS", calls)
    assert doctor.missing_calls(tmp_path) == "a.py:A.run no longer has self.stop; b.py:B no longer has x"
