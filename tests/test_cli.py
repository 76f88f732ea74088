"""The commands as a user meets them: output, errors, exit status."""

from __future__ import annotations

from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from rlplugins import cli
from rlplugins.cli import app


def call(*arguments: str) -> Result:
    """The result of one command in this process."""
    return CliRunner().invoke(app, list(arguments), catch_exceptions=False, env={"COLUMNS": "140"})


def test_list_shows_plugins_methods_and_trainers() -> None:
    done = call("list")
    assert done.exit_code == 0
    for name in ("spo", "knapsack", "bnpo", "bapo", "d3s", "gtpo", "grpo", "rloo"):
        assert name in done.output
    assert "trainers:" in done.output and "local" in done.output


def test_show_names_paper_hooks_options_needs_and_conflicts() -> None:
    text = " ".join(call("show", "bnpo").output.split())
    for part in ("2506.02864", "advantage_scale", "w_max", "1000000.0", "Largest weight", "2 or more", "unit_rewards"):
        assert part in text
    assert "spo" in text.partition("conflicts:")[2]


def test_explain_says_who_does_what() -> None:
    done = call("explain", "spo,bapo")
    assert done.exit_code == 0, done.output
    text = " ".join(done.output.split())
    for part in ("clip_range │ owner │ bapo", "baseline │ owner │ spo", "exactly 1", "unit_rewards", "legal"):
        assert part in text


def test_explain_of_two_owners_gives_the_lines_that_settle_it(tmp_path: Path) -> None:
    done = call("explain", "bnpo,gtpo")
    assert done.exit_code == 2
    line = "owners: {advantage_scale: bnpo}"
    assert line in done.output and "owners: {advantage_scale: gtpo}" in done.output
    stack = tmp_path / "stack.yaml"
    for settled in (line, "owners: {advantage_scale: {bnpo: 0.5, gtpo: 0.5}}"):
        stack.write_text(f"plugins: [bnpo, gtpo]\n{settled}\n")
        assert call("explain", str(stack)).exit_code == 0


def test_explain_of_a_clash_of_group_sizes_says_that_no_line_settles_it() -> None:
    done = call("explain", "spo,bnpo")
    assert done.exit_code == 2
    text = " ".join(done.output.split())
    assert "advantage_scale has one owner" in text  # all violations at once
    assert "spo needs exactly 1" in text and "bnpo needs 2 or more" in text
    assert "no line of the stack file settles this" in text


def test_a_weighted_mix_of_methods_is_legal(tmp_path: Path) -> None:
    stack = tmp_path / "stack.yaml"
    stack.write_text("owners: {compute_advantages: {grpo: 0.5, rloo: 0.5}}\n")
    done = call("explain", str(stack))
    assert done.exit_code == 0, done.output
    assert "0.5 x grpo (group_mean" in done.output


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("plugins: [bapo\n", "is not a YAML file"),
        ("plugin: [bapo]\n", "plugin: Extra inputs"),
        ("plugins: [{bapo: {targt: 1}}]\n", "bapo.targt"),
        ("plugins: [{bapo: {target: high}}]\n", "bapo.target"),
        ("plugins: [bappo]\n", "did you mean bapo"),
        ("plugins: [{bapo: 3}]\n", "plugins.0"),
        ("owners: {clip_rang: bapo}\n", "'clip_rang' is not a hook"),
        ("off: [bapo.clip_range]\n", "'bapo.clip_range' is not a claim"),
        ("allow: [magic]\n", "'magic' is not a fact"),
        ("- bapo\n", "valid dictionary"),
    ],
)
def test_a_wrong_stack_file_is_refused_by_name(tmp_path: Path, text: str, problem: str) -> None:
    stack = tmp_path / "stack.yaml"
    stack.write_text(text)
    done = CliRunner().invoke(app, ["explain", str(stack)], env={"COLUMNS": "140"})
    assert done.exit_code == 2
    assert problem in " ".join((done.output + done.stderr).split())


def test_a_missing_stack_file_and_an_unknown_plugin_are_told_apart() -> None:
    assert "there is no stack file" in call("explain", "nowhere.yaml").stderr
    done = call("explain", "knapsac")
    assert done.exit_code == 2
    assert "did you mean knapsack?" in done.stderr and 'pip install "rlplugins[knapsac]"' in done.stderr


def test_an_unknown_trainer_gets_the_pip_line() -> None:
    done = call("explain", "bapo", "--trainer", "nemo")
    assert done.exit_code == 2 and 'pip install "rlplugins[nemo]"' in done.stderr


def test_doctor_reports_every_trainer() -> None:
    done = call("doctor", "local")
    assert done.exit_code == 0, done.output
    assert "generation and log-probs agree with transformers" in done.output
    assert call("doctor", "nemo").exit_code == 2


def test_doctor_fails_for_an_absent_trainer_only_if_it_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    class Absent:
        distribution = "no-such-trainer"

        def doctor(self) -> tuple[str, bool]:
            return "  FAIL  it is missing", False

    monkeypatch.setattr(cli, "installed_adapters", lambda: {"absent": None})
    monkeypatch.setattr(cli, "find_adapter", lambda name: Absent())
    done = call("doctor")
    assert done.exit_code == 0 and "absent: no-such-trainer is not installed here" in done.output
    assert call("doctor", "absent").exit_code == 1
    Absent.distribution = "rlplugins"
    assert call("doctor").exit_code == 1


def test_report_of_an_empty_folder_is_an_error(tmp_path: Path) -> None:
    assert call("report", str(tmp_path)).exit_code == 2
