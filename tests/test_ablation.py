"""Studies: designs, files, runs, and what happens when they fail, are killed, or change."""

import io
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from rich.console import Console

from rlplugins.ablation import Study, StudyError, ablate, load_study, run_study, train_command
from rlplugins.ablation.ablate import stack_check
from rlplugins.ablation.progress import Display, MetricsTail
from rlplugins.ablation.runs import RunSpec
from rlplugins.errors import ConfigurationError
from rlplugins.report import load

# A trainer that does nothing but keep the contract of a run's folder, and write down what it was started with.
TRAINER = """
import json, os, sys, time
from pathlib import Path
import yaml

config_path, output, *flags = sys.argv[1:]
output = Path(output)
config = yaml.safe_load(Path(config_path).read_text())

def journal(event):
    name = f"{output.parent.name}/{config['seed']}"
    row = {"event": event, "run": name, "pid": os.getpid(), "time": time.time(), "flags": flags,
           "threads": os.environ["OMP_NUM_THREADS"], "directory": os.getcwd()}
    with open(config["journal"], "a") as file:
        file.write(json.dumps(row) + "\\n")

def wait_until(condition):
    deadline = time.time() + 120
    while not condition():
        if time.time() > deadline:
            sys.exit("waited too long")
        time.sleep(0.02)

journal("start")
print("training", flush=True)
wait_until(lambda: Path(config["journal"]).read_text().count('"start"') >= config.get("waits_for_starts", 0))
first = 1
if "--resume" in flags:
    first = int((output / "checkpoint").read_text()) + 1
for step in range(first, config["steps"] + 1):
    if config.get("gate_before") == step:
        wait_until(Path(config["journal"] + ".gate").exists)
    with (output / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"step": step, "reward": step / 10 + config["seed"], "started_at": first}) + "\\n")
    if config.get("checkpoints"):
        (output / ".checkpoint").write_text(str(step))
        os.replace(output / ".checkpoint", output / "checkpoint")
    if config.get("fails_at") == step and not Path(config["journal"] + ".repaired").exists():
        sys.exit("the reward is infinite")
(output / "result.json").write_text(json.dumps({"status": "finished", "seconds": 0.1}))
journal("end")
"""


class Workshop:
    """A folder for studies with the trainer above."""

    def __init__(self, folder: Path):
        self.trainer = folder / "trainer.py"
        self.trainer.write_text(TRAINER)
        self.journal_path = folder / "journal"
        self.out = folder / "out"

    def study(self, stacks=("a", "b"), seeds=2, **train):
        """A study of named stacks; a stack may come with training options."""
        stacks = stacks if isinstance(stacks, dict) else {name: {"plugins": [name]} for name in stacks}
        train = {"steps": 3, "journal": str(self.journal_path), **train}
        return Study.model_validate({"name": "small", "stacks": stacks, "seeds": seeds, "train": train})

    def command(self, config, output, resume):
        """The command line of the trainer above."""
        return [sys.executable, str(self.trainer), str(config), str(output), *(["--resume"] if resume else [])]

    def run(self, study, **options):
        """Run a study, all of whose stacks are legal, silently."""
        options = {
            "check": lambda stack, options: None,
            "console": Console(quiet=True),
            "command": self.command,
        } | options
        return run_study(study, self.out, **options)

    def journal(self, event="start"):
        """What the trainer has written down."""
        lines = self.journal_path.read_text().splitlines() if self.journal_path.exists() else []
        return [row for row in map(json.loads, lines) if row["event"] == event]

    def started(self):
        """The runs in the order in which they were started."""
        return [row["run"] for row in self.journal()]

    def open_gate(self):
        """Let the runs go on that wait at their `gate_before`."""
        Path(f"{self.journal_path}.gate").touch()

    def start_process(self, study):
        """Run a study in another process."""
        (self.trainer.parent / "study.json").write_text(study.model_dump_json())
        script = self.trainer.parent / "parent.py"
        script.write_text(
            "import sys\n"
            "from pathlib import Path\n"
            "from rlplugins.ablation import Study, run_study\n"
            f"folder = Path({str(self.trainer.parent)!r})\n"
            "study = Study.model_validate_json((folder / 'study.json').read_text())\n"
            "def command(config, output, resume):\n"
            "    flags = ['--resume'] if resume else []\n"
            "    return [sys.executable, str(folder / 'trainer.py'), str(config), str(output), *flags]\n"
            "run_study(study, folder / 'out', jobs=2, check=lambda stack, options: None, command=command)\n"
        )
        return subprocess.Popen(
            [sys.executable, str(script)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            preexec_fn=heed_signals,
        )  # fmt: skip


def heed_signals():
    """Undo what `nohup` and a shell's background leave to their children: signals that are ignored."""
    for number in (signal.SIGHUP, signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_DFL)


@pytest.fixture
def workshop(tmp_path):
    return Workshop(tmp_path)


def wait_until(condition, seconds=60):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited too long"
        time.sleep(0.02)


def is_alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def steps_of(run_folder):
    if not (run_folder / "metrics.jsonl").exists():
        return []
    return [json.loads(line)["step"] for line in (run_folder / "metrics.jsonl").read_text().splitlines()]


# Designs


def design(name, plugins, **fields):
    study = Study.model_validate({"name": "s", "seeds": 1, "design": name, "plugins": plugins, **fields})
    return {cell.name: cell.stack["plugins"] for cell in study.cells}


BAPO = {"bapo": {"target": 0.5}}


def test_one_at_a_time_is_the_base_and_the_base_with_each():
    assert design("one_at_a_time", ["knapsack", BAPO, "d3s"]) == {
        "base": [],
        "base+knapsack": ["knapsack"],
        "base+bapo": [BAPO],
        "base+d3s": ["d3s"],
    }


def test_leave_one_out_is_the_base_all_and_all_without_each():
    assert design("leave_one_out", ["knapsack", BAPO, "d3s"]) == {
        "base": [],
        "all": ["knapsack", BAPO, "d3s"],
        "all-knapsack": [BAPO, "d3s"],
        "all-bapo": ["knapsack", "d3s"],
        "all-d3s": ["knapsack", BAPO],
    }


def test_factorial_is_every_subset_in_stack_order():
    assert design("factorial", ["knapsack", BAPO, "d3s"]) == {
        "base": [],
        "base+knapsack": ["knapsack"],
        "base+bapo": [BAPO],
        "base+d3s": ["d3s"],
        "base+knapsack+bapo": ["knapsack", BAPO],
        "base+knapsack+d3s": ["knapsack", "d3s"],
        "base+bapo+d3s": [BAPO, "d3s"],
        "base+knapsack+bapo+d3s": ["knapsack", BAPO, "d3s"],
    }
    assert len(design("factorial", list("abcdefg"))) == 2**7


def test_of_a_single_plugin_no_stack_appears_twice():
    assert design("leave_one_out", ["spo"]) == {"base": [], "all": ["spo"]}


def test_the_first_cell_is_the_baseline_unless_one_is_named():
    fields = {"name": "s", "seeds": 1, "design": "factorial", "plugins": ["spo"]}
    assert Study.model_validate(fields).baseline_name == "base"
    assert Study.model_validate({**fields, "baseline": "base+spo"}).baseline_name == "base+spo"


def test_a_number_of_seeds_counts_from_zero_and_a_list_is_taken_as_it_is():
    fields = {"name": "s", "design": "factorial", "plugins": ["spo"]}
    assert Study.model_validate({**fields, "seeds": 3}).seeds == [0, 1, 2]
    assert Study.model_validate({**fields, "seeds": [7, 3]}).seeds == [7, 3]


def test_owners_go_to_the_stacks_that_have_the_plugins_they_name():
    owners = {"baseline": "spo", "advantage_scale": "group_std", "compute_advantages": {"bnpo": 0.5, "spo": 0.5}}
    fields = {"name": "s", "seeds": 1, "design": "factorial", "plugins": ["spo", "bnpo"], "owners": owners}
    given = {cell.name: cell.stack.get("owners") for cell in Study.model_validate(fields).cells}
    assert given == {
        "base": {"advantage_scale": "group_std"},
        "base+spo": {"baseline": "spo", "advantage_scale": "group_std"},
        "base+bnpo": {"advantage_scale": "group_std"},
        "base+spo+bnpo": owners,
    }


def test_a_stacks_own_owner_goes_first():
    stacks = {"one": {"plugins": ["spo"], "owners": {"baseline": "zero"}}, "two": {"plugins": ["spo"]}}
    study = Study.model_validate({"name": "s", "seeds": 1, "stacks": stacks, "owners": {"baseline": "spo"}})
    assert [cell.stack["owners"]["baseline"] for cell in study.cells] == ["zero", "spo"]


# Study files

GOOD = """
name: s
seeds: 2
train: {steps: 5}
stacks:
  grpo: {plugins: []}
  long: {stack: {plugins: [spo], off: [spo.baseline]}, train: {steps: 9, learning_rate: 1e-6}}
"""


def test_a_stack_can_have_training_options_of_its_own(tmp_path):
    (tmp_path / "study.yaml").write_text(GOOD)
    grpo, long = load_study(tmp_path / "study.yaml").cells
    assert (grpo.stack, grpo.train) == ({"plugins": []}, {})
    assert (long.stack, long.train) == (
        {"plugins": ["spo"], "off": ["spo.baseline"]},
        {"steps": 9, "learning_rate": 1e-6},
    )


@pytest.mark.parametrize(
    ("text", "told"),
    [
        (GOOD + "seed: 3\n", "seed: unknown field; did you mean seeds?"),
        (GOOD + "colour: red\n", "colour: unknown field; there are: name, trainer, train, seeds"),
        (
            GOOD.replace(" train: {steps: 9", " trains: {steps: 9"),
            "stacks.long.trains: unknown field; did you mean train?",
        ),
        (GOOD.replace("stack: {plugins: [spo], off: [spo.baseline]}, ", ""), "stacks.long.stack: Field required"),
        (GOOD.replace("seeds: 2", "seeds: 0"), "seeds: List should have at least 1 item"),
        (GOOD.replace("seeds: 2", "seeds: [1, 1]"), "seeds: a seed is named twice"),
        (GOOD.replace("seeds: 2\n", ""), "seeds: Field required"),
        (GOOD.replace("steps: 5", "seed: 5"), "train: `seed` is set by `seeds`, not here"),
        (GOOD.replace("steps: 9", "output: x"), "stacks.long.train: `output` is set by the study's folder, not here"),
        (GOOD.replace("long:", "a/b:"), "'a/b' cannot name a folder"),
        (GOOD.replace("long:", "..:"), "'..' cannot name a folder"),
        (GOOD.replace("long:", "grpo:"), 'found duplicate key "grpo"'),
        (GOOD + "baseline: spo\n", "baseline: there is no cell 'spo'; the cells are grpo, long"),
        (GOOD + "plugins: [spo]\n", "design `stacks` takes its stacks from `stacks`: leave `plugins` out"),
        (GOOD + "design: factorial\n", "design `factorial` takes its stacks from `plugins`: leave `stacks` out"),
        ("name: s\nseeds: 1\ndesign: factorial\n", "design `factorial` needs `plugins`"),
        ("name: s\nseeds: 1\ndesign: factorial\nplugins: [spo, {spo: {}}]\n", "plugins: spo is named twice"),
        (
            "name: s\nseeds: 1\ndesign: factorial\nplugins: [{a: {}, b: {}}]\n",
            "is neither a plugin's name nor one name",
        ),
        ("name: s\nseeds: 1\ndesign: half\nplugins: [a]\n", "design: Input should be 'stacks', 'one_at_a_time'"),
        ("- a\n", "is not a study"),
        ("name: [\n", "is not a YAML file"),
    ],
)
def test_a_wrong_study_names_the_file_and_the_field(tmp_path, text, told):
    path = tmp_path / "study.yaml"
    path.write_text(text)
    with pytest.raises(ConfigurationError) as error:
        load_study(path)
    assert str(path) in str(error.value)
    assert told in str(error.value)


def test_all_wrong_fields_are_told_at_once(tmp_path):
    (tmp_path / "study.yaml").write_text(GOOD + "seed: 3\ncpus: 0\n")
    with pytest.raises(StudyError) as error:
        load_study(tmp_path / "study.yaml")
    assert "seed: unknown field" in str(error.value)
    assert "cpus: Input should be greater than or equal to 1" in str(error.value)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(ConfigurationError, match=r"there is no study .*nothing\.yaml"):
        load_study(tmp_path / "nothing.yaml")


# Runs


def test_every_cell_is_run_with_every_seed(workshop):
    results = workshop.run(workshop.study(seeds=[0, 4]), jobs=1)
    assert workshop.started() == ["a/0", "b/0", "a/4", "b/4"]
    assert [(cell.name, run.seed, run.status) for cell in results.cells for run in cell.runs] == [
        ("a", 0, "finished"),
        ("a", 4, "finished"),
        ("b", 0, "finished"),
        ("b", 4, "finished"),
    ]
    assert results.cells[0].finals("reward") == pytest.approx({0: 0.3, 4: 4.3})


def test_a_run_reads_the_options_of_the_study_its_cell_its_stack_and_seed(workshop):
    stacks = {"a": {"plugins": ["a"]}, "b": {"stack": {"plugins": ["b"]}, "train": {"steps": 1}}}
    workshop.run(workshop.study(stacks, seeds=[5]))
    config = yaml.safe_load((workshop.out / "b" / "seed-5" / "config.yaml").read_text())
    journal = str(workshop.journal_path)
    assert config == {"steps": 1, "journal": journal, "stack": {"plugins": ["b"]}, "seed": 5}


def test_the_command_of_a_run_is_that_of_rlplugins_train():
    assert train_command(Path("c.yaml"), Path("out"), True) == [
        *[sys.executable, "-m", "rlplugins", "train", "--config", "c.yaml", "--output", "out", "--resume"]
    ]


def test_an_illegal_stack_is_refused_with_its_reason_and_the_others_run(workshop):
    reason = "[needs] b needs groups\n    no line settles this"
    console = Console(record=True, file=io.StringIO())
    results = workshop.run(
        workshop.study(seeds=1),
        check=lambda stack, options: reason if stack["plugins"] == ["b"] else None,
        console=console,
    )
    assert "b: refused" in console.export_text()
    assert workshop.started() == ["a/0"]
    assert [(cell.name, cell.refused) for cell in results.cells] == [("a", None), ("b", reason)]
    assert not (workshop.out / "b").exists()
    assert not results.failed


def rules(stack, options):
    """The rules of the local trainer, without the options that only the small trainer of these tests knows."""
    return stack_check("local")(stack, {"steps": options["steps"]})


def test_the_rules_are_those_of_the_stack(workshop):
    pytest.importorskip("rlplugins_local")
    results = workshop.run(
        workshop.study({"one": {"plugins": []}, "two": {"plugins": ["grpo", "rloo"]}}, 1), check=rules
    )
    one, two = results.cells
    assert one.refused is None
    assert "[claims] baseline has one owner" in two.refused
    assert workshop.started() == ["one/0"]


@pytest.mark.parametrize(
    ("stack", "told"),
    [
        ({"plugins": ["no-such-plugin"]}, "stack wrong: no plugin 'no-such-plugin' is installed"),
        ({"plugin": ["grpo"]}, "stack wrong: stack: plugin: "),
    ],
)
def test_a_stack_that_cannot_be_read_stops_the_study_before_any_run(workshop, stack, told):
    pytest.importorskip("rlplugins_local")
    with pytest.raises(StudyError, match=told):
        workshop.run(workshop.study({"right": {"plugins": []}, "wrong": stack}), check=rules)
    assert workshop.started() == []


def test_a_wrong_option_of_the_trainer_stops_the_study_before_any_run(workshop):
    pytest.importorskip("rlplugins_local")
    with pytest.raises(StudyError, match="stack a: train: step: Extra inputs"):
        workshop.run(
            workshop.study(["a"], step=3), check=lambda stack, options: stack_check("local")(stack, {"step": 3})
        )
    assert workshop.started() == []


def test_an_option_that_clashes_with_a_stack_refuses_it(workshop):
    pytest.importorskip("rlplugins_local")
    assert "draws 1 response(s) per prompt" in stack_check("local")({"plugins": ["rloo"]}, {"group_size": 1})


def test_a_trainer_without_adapter_stops_the_study_before_any_run(workshop):
    study = workshop.study().model_copy(update={"trainer": "no-such-trainer"})
    with pytest.raises(ConfigurationError, match="no adapter for the trainer 'no-such-trainer' is installed"):
        workshop.run(study, command=None)


def test_jobs_limits_how_many_run_at_a_time_and_shares_the_cores(workshop, monkeypatch):
    monkeypatch.setattr(ablate, "cores", lambda: 7)
    workshop.run(workshop.study(seeds=3, waits_for_starts=3), jobs=3)
    starts, ends = ([row["time"] for row in workshop.journal(event)] for event in ("start", "end"))
    at_once = [sum(start <= moment for start in starts) - sum(end < moment for end in ends) for moment in starts]
    assert max(at_once) == 3
    assert {row["threads"] for row in workshop.journal()} == {"2"}


@pytest.mark.parametrize(
    ("cpus", "gpus", "runs", "ray", "jobs"),
    [
        (1, 0, 40, False, 8),
        (3, 0, 40, False, 2),
        (16, 0, 40, False, 1),
        (1, 0, 5, False, 5),
        (1, 0.5, 40, False, 1),
        (1, 1, 40, True, 40),
    ],
)
def test_by_default_there_are_as_many_jobs_as_the_machine_has_room_for(monkeypatch, cpus, gpus, runs, ray, jobs):
    monkeypatch.setattr(ablate, "cores", lambda: 8)
    study = Study(name="s", seeds=[0], stacks={"a": {"plugins": []}}, cpus=cpus, gpus=gpus)
    assert ablate.default_jobs(study, runs, ray) == jobs


def test_a_failing_run_is_reported_with_its_log_and_the_others_survive(workshop):
    stacks = {"good": {"plugins": []}, "bad": {"stack": {"plugins": ["bad"]}, "train": {"fails_at": 2}}}
    console = Console(record=True, width=60)
    results = workshop.run(workshop.study(stacks), console=console)
    assert [(cell.name, run.seed) for cell, run in results.failed] == [("bad", 0), ("bad", 1)]
    assert "exit status 1" in results.failed[0][1].failure
    assert "the reward is infinite" in results.failed[0][1].failure
    assert [run.status for run in results.cells[0].runs] == ["finished", "finished"]
    assert "bad, seed 1: failed (exit status 1) the reward is infinite" in console.export_text()


def test_a_failed_run_is_made_again_and_the_finished_ones_are_not(workshop):
    stacks = {"good": {"plugins": []}, "bad": {"stack": {"plugins": ["bad"]}, "train": {"fails_at": 2}}}
    study = workshop.study(stacks, seeds=1)
    assert workshop.run(study).failed
    Path(f"{workshop.journal_path}.repaired").touch()
    assert not workshop.run(study).failed
    assert sorted(workshop.started()) == ["bad/0", "bad/0", "good/0"]
    assert steps_of(workshop.out / "bad" / "seed-0") == [1, 2, 3]


def test_a_run_that_ends_without_a_result_has_failed(workshop):
    results = workshop.run(workshop.study(["a"], seeds=1), command=lambda *_: ["true"])
    assert results.failed[0][1].failure.startswith("ended without a result")


def test_a_command_that_does_not_exist_is_a_failure(workshop):
    results = workshop.run(workshop.study(["a"], seeds=1), command=lambda *_: ["no-such-program"])
    assert results.failed[0][1].failure.endswith("no-such-program cannot be started: No such file or directory")


@pytest.mark.parametrize(
    ("status", "told"),
    [(3, "exit status 3"), (-15, "ended by SIGTERM"), (-9, "ended by SIGKILL, perhaps for lack of memory")],
)
def test_the_way_a_process_ended_is_put_in_words(status, told):
    assert ablate.describe_exit(status) == told


def test_without_a_terminal_every_run_is_one_line(workshop, capsys):
    study = workshop.study(["a", "a-stack-with-a-long-name-" * 4], seeds=2)
    workshop.run(study, jobs=1, console=Console(width=40))
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "[1/4] a, seed 0: finished, reward 0.300"
    assert len(lines) == 4
    workshop.run(study, console=Console(width=80))
    assert capsys.readouterr().out == "4 of 4 runs were finished before.\n"


def test_on_a_terminal_there_is_a_bar_with_the_last_reward(tmp_path):
    screen = io.StringIO()
    console = Console(file=screen, force_terminal=True, width=100, height=30)
    with Display(console, total=4, finished=1) as display:
        display.started(RunSpec("a", 1, tmp_path, {"steps": 8}))
        (tmp_path / "metrics.jsonl").write_text('{"step": 5, "reward": 1.5}\n')
        display.refresh()
    assert re.search(r"all runs .*1/4", screen.getvalue())
    assert re.search(r"a, seed 1 .*5/8.*reward 1\.500", screen.getvalue())


def test_there_are_no_more_bars_than_the_terminal_has_room_for(tmp_path):
    screen = io.StringIO()
    console = Console(file=screen, force_terminal=True, width=100, height=10)
    runs = [RunSpec("a", seed, tmp_path, {"steps": 5}) for seed in range(20)]
    with Display(console, 20, 0) as display:
        for run in runs:
            display.started(run)
        display.ended(runs[0], "finished", failed=False)
        screen.truncate(0)
    assert re.findall(r"seed \d+", screen.getvalue()) == ["seed 1", "seed 2", "seed 3", "seed 4"]


# Resuming


def test_finished_runs_are_kept_when_cells_and_seeds_are_added(workshop):
    workshop.run(workshop.study(["a"], seeds=1))
    workshop.run(workshop.study(["a", "b"], seeds=2))
    assert sorted(workshop.started()) == ["a/0", "a/1", "b/0", "b/1"]


def test_a_changed_configuration_is_not_mixed_with_finished_runs(workshop):
    workshop.run(workshop.study())
    changed = workshop.study({"a": {"plugins": ["a"]}, "b": {"plugins": [{"b": {"target": 0.5}}]}})
    with pytest.raises(StudyError) as error:
        workshop.run(changed)
    assert "2 finished runs" in str(error.value)
    assert 'stack.plugins: ["b"] -> [{"b": {"target": 0.5}}]' in str(error.value)
    assert "b, seed 0 / b, seed 1" in str(error.value)
    assert "--fresh" in str(error.value)
    assert load(workshop.out).cells[1].stack == {"plugins": ["b"]}, "a refused study changes nothing"
    assert len(workshop.started()) == 4


def test_fresh_makes_the_changed_runs_again_and_keeps_the_others(workshop):
    workshop.run(workshop.study(seeds=1))
    changed = workshop.study(
        {"a": {"plugins": ["a"]}, "b": {"stack": {"plugins": ["b"]}, "train": {"steps": 5}}}, seeds=1
    )
    results = workshop.run(changed, fresh=True)
    assert sorted(workshop.started()) == ["a/0", "b/0", "b/0"]
    assert [run.last_step for run in results.runs] == [3, 5]


def test_an_interrupted_run_of_another_configuration_starts_again_without_its_checkpoint(workshop):
    study = workshop.study(["a"], seeds=1, checkpoints=True, fails_at=2)
    workshop.run(study)
    workshop.run(workshop.study(["a"], seeds=1, checkpoints=True))
    assert [row["flags"] for row in workshop.journal()] == [[], []]
    assert steps_of(workshop.out / "a" / "seed-0") == [1, 2, 3]


def test_a_folder_with_other_things_in_it_is_left_alone(workshop):
    precious = workshop.out / "a" / "seed-0" / "thesis.tex"
    precious.parent.mkdir(parents=True)
    precious.write_text("ten years")
    with pytest.raises(StudyError, match="is not the folder of a run"):
        workshop.run(workshop.study(["a"]))
    assert precious.read_text() == "ten years"


@pytest.mark.parametrize("checkpoints", [True, False])
def test_a_killed_study_leaves_no_process_loses_no_finished_run_and_continues(workshop, checkpoints):
    stacks = {
        "quick": {"plugins": []},
        "slow": {"stack": {"plugins": ["slow"]}, "train": {"steps": 5, "gate_before": 3, "checkpoints": checkpoints}},
    }
    study = workshop.study(stacks, seeds=2)
    parent = workshop.start_process(study)
    slow = [workshop.out / "slow" / f"seed-{seed}" for seed in (0, 1)]
    wait_until(lambda: all(steps_of(folder) == [1, 2] for folder in slow))
    wait_until(lambda: not checkpoints or all((folder / "checkpoint").read_text() == "2" for folder in slow))
    parent.kill()
    parent.communicate()
    children = [row["pid"] for row in workshop.journal()]
    wait_until(lambda: not any(map(is_alive, children)), seconds=30)
    finished = {row["run"] for row in workshop.journal("end")}
    assert finished == {"quick/0", "quick/1"}
    assert {run.status for run in load(workshop.out).runs} == {"finished", "unfinished"}

    workshop.open_gate()
    results = workshop.run(study)
    assert {run.status for run in results.runs} == {"finished"}
    assert sorted(workshop.started()) == ["quick/0", "quick/1", "slow/0", "slow/0", "slow/1", "slow/1"]
    second = [row for row in workshop.journal() if row["run"].startswith("slow")][2:]
    assert all(row["flags"] == (["--resume"] if checkpoints else []) for row in second)
    for folder in slow:
        started_at = [json.loads(line)["started_at"] for line in (folder / "metrics.jsonl").read_text().splitlines()]
        assert steps_of(folder) == [1, 2, 3, 4, 5]
        assert started_at == ([1, 1, 3, 3, 3] if checkpoints else [1, 1, 1, 1, 1])


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_study_that_is_asked_to_end_stops_its_runs(workshop, number):
    parent = workshop.start_process(workshop.study(seeds=2, gate_before=1))
    wait_until(lambda: len(workshop.journal()) == 2)
    parent.send_signal(number)
    parent.communicate(timeout=20)
    assert parent.returncode == (-signal.SIGINT if number == signal.SIGINT else 128 + number)
    assert not any(is_alive(row["pid"]) for row in workshop.journal())
    assert {run.status for run in load(workshop.out).runs} == {"unfinished", "waiting"}


def test_only_one_process_runs_a_study(workshop):
    parent = workshop.start_process(workshop.study(gate_before=1))
    wait_until(lambda: workshop.journal())
    with pytest.raises(StudyError, match="another process is running the study"):
        workshop.run(workshop.study(gate_before=1))
    parent.terminate()
    parent.communicate(timeout=20)


def test_the_progress_tail_reads_what_was_added_and_waits_for_whole_lines(tmp_path):
    path = tmp_path / "metrics.jsonl"
    tail = MetricsTail(path)
    tail.update()
    assert (tail.step, tail.reward) == (None, None)
    path.write_text('{"step": 1, "reward": 0.5}\n{"step": 2, "rew')
    tail.update()
    assert (tail.step, tail.reward) == (1, 0.5)
    with path.open("a") as file:
        file.write('ard": 0.75}\n{"step": 3, "validation/reward": 0.9}\n')
    tail.update()
    assert (tail.step, tail.reward) == (3, 0.75)
    path.write_text('{"step": 1, "reward": 0.25}\n')
    tail.update()
    assert (tail.step, tail.reward) == (1, 0.25)


def test_the_progress_tail_of_a_large_file_reads_its_end(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text(
        "".join(json.dumps({"step": step, "reward": step, "pad": "x" * 1000}) + "\n" for step in range(500))
    )
    tail = MetricsTail(path)
    tail.update()
    assert (tail.step, tail.reward) == (499, 499)


# Ray


def test_without_ray_the_error_gives_the_pip_line(workshop, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(StudyError, match=r'pip install "rlplugins\[ray\]"'):
        workshop.run(workshop.study(), ray=True)


@pytest.mark.slow
def test_the_same_runs_as_tasks_of_a_ray_cluster(workshop, monkeypatch):
    pytest.importorskip("ray")
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    stacks = {"good": {"plugins": []}, "bad": {"stack": {"plugins": ["bad"]}, "train": {"fails_at": 2}}}
    results = workshop.run(workshop.study(stacks), ray=True)
    assert sorted(workshop.started()) == ["bad/0", "bad/1", "good/0", "good/1"]
    assert [run.status for run in results.runs] == ["finished", "finished", "failed", "failed"]
    assert "the reward is infinite" in results.failed[0][1].failure
    assert {row["directory"] for row in workshop.journal()} == {os.getcwd()}
