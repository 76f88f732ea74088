"""The command `rlplugins`."""

from __future__ import annotations

import sys
from importlib.metadata import PackageNotFoundError, distribution, entry_points
from pathlib import Path
from typing import Any

import click
from rich.console import Console

from rlplugins import catalogue, matrix, registry
from rlplugins.errors import ConfigurationError, RlpluginsError
from rlplugins.stack import Stack, StackConfig, read_file
from rlplugins.trainer import find_adapter, installed_adapters

COMMANDS = "rlplugins.commands"
"""Entry-point group in which adapters add commands (`train`, ...)."""

FROM_ADAPTERS = {"train": "local"}
"""Commands that an adapter of this repository adds; named in the pip line when it is not installed."""


class _Group(click.Group):
    """The commands of the core and of the installed adapters; rlplugins' own errors are printed, not traced."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        added = {point.name for point in entry_points(group=COMMANDS)}
        return [*super().list_commands(ctx), *sorted(added)]

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        command = super().get_command(ctx, cmd_name)
        points = {point.name: point for point in entry_points(group=COMMANDS)}
        if command is None and cmd_name in points:
            command = points[cmd_name].load()
        if command is None and cmd_name in FROM_ADAPTERS:
            adapter = FROM_ADAPTERS[cmd_name]
            raise click.UsageError(f'{cmd_name} needs the {adapter} adapter: pip install "rlplugins[{adapter}]"')
        return command

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except RlpluginsError as error:
            print(f"error: {error}", file=sys.stderr)
            ctx.exit(2)


@click.group(cls=_Group, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="rlplugins")
def app() -> None:
    """Reinforcement-learning methods as plugins for the trainers that you already run."""


@app.command("list")
def list_plugins() -> None:
    """List the installed plugins, the core's own methods, and the adapters."""
    Console().print(catalogue.table())


@app.command()
@click.argument("plugin")
def show(plugin: str) -> None:
    """Describe one plugin: paper, hooks, configuration, needs and conflicts."""
    Console(highlight=False).print(catalogue.description(registry.find(plugin)))


@app.command()
@click.argument("stack")
@click.option("--trainer", help="Check against this trainer; by default the local one, where it is installed.")
def explain(stack: str, trainer: str | None) -> None:
    """Explain a stack, and say whether it is legal (else the status is 2).

    STACK is names of plugins, separated by commas, or a stack file. Prints who owns which hook, in which order chains
    run, what is needed and given, which facts are assumed; and all violations with the lines that would settle them.
    """
    text, legal = Stack.explain(read_stack(stack), trainer or default_trainer(), width=Console().width)
    print(text)
    if not legal:
        raise SystemExit(2)


@app.command()
@click.argument("study", type=click.Path(path_type=Path))
@click.option(
    "--output", type=click.Path(path_type=Path), help="Where the runs go; by default `runs/<the study's name>`."
)
@click.option("--jobs", type=click.IntRange(min=1), help="Runs at a time; by default as many as there are cores for.")
@click.option("--ray", is_flag=True, help="Run as tasks of a Ray cluster; the output must be on shared storage.")
@click.option("--fresh", is_flag=True, help="Make runs again that are there with another configuration.")
def ablate(study: Path, output: Path | None, jobs: int | None, ray: bool, fresh: bool) -> None:
    """Train several stacks with several seeds and compare them.

    Finished runs are kept and interrupted ones resumed, so the command can be run again after a kill.
    """
    from rlplugins import ablation
    from rlplugins.report import write_html

    loaded = ablation.load_study(study)
    folder = output or Path("runs") / loaded.name
    console = Console()
    results = ablation.run_study(loaded, folder, jobs=jobs, ray=ray, fresh=fresh, console=console)
    console.print(results.table())
    page = folder / "report.html"
    write_html(results, page)
    console.print(f"report: {page}")
    if results.failed:
        raise SystemExit(1)


@app.command()
@click.argument("folder", type=click.Path(path_type=Path))
def report(folder: Path) -> None:
    """Report on a study or a run, finished or not: a table, and `report.html` with learning curves."""
    from rlplugins.report import load, write_html

    results = load(folder)
    console = Console()
    console.print(results.table())
    write_html(results, folder / "report.html")
    console.print(f"report: {folder / 'report.html'}")


@app.command("matrix")
@click.option("--trainer", help="Check against this trainer, too.")
def print_matrix(trainer: str | None) -> None:
    """Print every pair of installed plugins: runs together, or refused with the reason."""
    declared = find_adapter(trainer).configured({}) if trainer else None
    print(matrix.markdown(matrix.pairs(registry.installed(), declared)), end="")


@app.command()
@click.argument("trainer", required=False)
def doctor(trainer: str | None) -> None:
    """Check what is installed here: versions, and whether every hook binds.

    TRAINER is one trainer; by default all that have an adapter here. A trainer that is not installed fails if it is named.
    """
    healthy = True
    print(f"rlplugins {distribution('rlplugins').version}, {len(registry.installed())} plugins installed")
    for name in [trainer] if trainer else sorted(installed_adapters()):
        adapter = find_adapter(name)
        if trainer is None and adapter.distribution is not None and not is_installed(adapter.distribution):
            print(f"\n{name}\n  absent: {adapter.distribution} is not installed here")
            continue
        text, well = adapter.doctor()
        print(f"\n{name}\n{text}")
        healthy = healthy and well
    if not healthy:
        raise SystemExit(1)


def is_installed(name: str) -> bool:
    """Whether there is a distribution of this name."""
    try:
        distribution(name)
    except PackageNotFoundError:
        return False
    return True


def read_stack(text: str) -> StackConfig:
    """A stack from names separated by commas, or from a file."""
    if Path(text).suffix in {".yaml", ".yml"} or Path(text).is_file():
        return read_file(Path(text))
    names = registry.parse_plugins(text)
    if not names:
        raise ConfigurationError(f"{text!r} names no plugin")
    return StackConfig(plugins=list(names))


def default_trainer() -> str | None:
    """The trainer that stacks are checked against if none is named: the local one, where it is installed."""
    return "local" if "local" in installed_adapters() else None


def main() -> None:
    """Entry point of `python -m rlplugins`."""
    app(prog_name="rlplugins")
