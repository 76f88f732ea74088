"""The doctor in the environment that it is for."""

from rlplugins_verl import doctor, settings


def test_the_doctor_finds_every_point_and_every_canary_alive() -> None:
    text, well = doctor.report()
    assert well, text
    assert f"verl {settings.TESTED}" in text
    assert "patched   workers/engine/base.py:BaseEngine.train_batch" in text
    assert "ok    official  v1/sample/logits_processor/interface.py:LogitsProcessor.apply" in text
    assert "ok    canary    trainers" in text
