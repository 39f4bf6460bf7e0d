"""The command line. Exit 0 only when the work was done; 2 for refused input, with one line; other
codes in rayhf.errors."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from launch.cluster_auth import INSECURE, settle
from launch.sanitize import plain
from rayhf import __version__
from rayhf.errors import ConfigError, RayhfError

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help=__doc__,
)
console = Console()

Config = Annotated[Path, typer.Argument(help="YAML file, see configs/")]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="for example learner.lr=1e-6")
]

RunDirectory = Annotated[Path, typer.Argument(metavar="RUN", help="A run directory.")]
RunOrNone = Annotated[
    Path | None, typer.Argument(metavar="[RUN]", help="A run directory; or --address.")
]
Address = Annotated[
    str | None, typer.Option(metavar="HOST:PORT", help="Where a campaign serves its control.")
]
Security = Annotated[
    Path | None,
    typer.Option(metavar="YAML", help="With --address: ca, certificate, key, token_file."),
]


def _version(wanted: bool) -> None:
    if wanted:
        console.print(f"rayhf {__version__}", highlight=False)
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks.")] = False,
    insecure_cluster: Annotated[
        bool,
        typer.Option(
            "--insecure-cluster",
            envvar=INSECURE,
            help="Use clusters that ask nobody for a token, too.",
        ),
    ] = False,
) -> None:
    settle(insecure=insecure_cluster)
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
            help="Start it again when it dies, until it is done; at most 5 times without a commit.",
        ),
    ] = False,
) -> None:
    """Start a campaign, or continue the one in its run directory."""
    from rayhf.config.load import load_config
    from rayhf.run_dir.lock import RunLock

    loaded = load_config(config, overrides or ())
    if not supervised:
        lock = RunLock(
            loaded.run.dir
        )  # before the heavy imports: a second launcher is refused at once
        try:
            from launch.campaign import run_campaign

            run_campaign(loaded, console, lock)
        finally:
            lock.release()
        return
    from launch.supervise import supervise

    raise typer.Exit(supervise(["run", str(config), *(overrides or ())], loaded.run.dir, console))


@app.command()
def submit(
    config: Config,
    address: Annotated[
        str,
        typer.Option(metavar="URL", help="The cluster's job server, for example http://HEAD:8265"),
    ],
    overrides: Overrides = None,
    follow: Annotated[
        bool,
        typer.Option("--follow", help="Show its log until it is over, and end with its exit code."),
    ] = False,
    env: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME", help="Give it this environment variable, too."),
    ] = None,
    entrypoint_cpus: Annotated[
        float | None,
        typer.Option(
            metavar="N",
            min=0.01,
            help="Run it on any node that has N CPUs to spare, not on the head.",
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
            console=console,
        )
    )


@app.command()
def status(run_dir: RunOrNone = None, address: Address = None, security: Security = None) -> None:
    """How a campaign is doing: state, round, phase, health, faults, what to do next. From files
    alone."""
    from launch.operate import control_of, show_status

    show_status(control_of(run_dir, address, security), console)


@app.command()
def watch(run_dir: RunOrNone = None, address: Address = None, security: Security = None) -> None:
    """What a campaign's event log says, as it happens, until the campaign ends."""
    from launch import operate

    operate.watch(operate.control_of(run_dir, address, security), console)


@app.command()
def verify(
    run_dir: RunDirectory,
    deep: Annotated[bool, typer.Option(help="Also read every tensor.")] = False,
) -> None:
    """Check that everything committed is there as it was written, and every sample exactly once."""
    from launch.operate import show_audit

    show_audit(run_dir, console, deep=deep)


@app.command()
def pause(run_dir: RunOrNone = None, address: Address = None, security: Security = None) -> None:
    """Pause a running campaign after its round; its actors stay up."""
    _ask("pause", run_dir, address, security)


@app.command()
def unpause(run_dir: RunOrNone = None, address: Address = None, security: Security = None) -> None:
    """Let a paused campaign go on; a guard that paused it only warns from now on."""
    _ask("unpause", run_dir, address, security)


@app.command()
def stop(run_dir: RunOrNone = None, address: Address = None, security: Security = None) -> None:
    """Stop a running campaign after its round; the same `rayhf run` command continues it."""
    _ask("stop", run_dir, address, security)


def _ask(wanted: str, run_dir: Path | None, address: str | None, security: Path | None) -> None:
    from launch.operate import ask, control_of

    ask(control_of(run_dir, address, security), wanted, console)


@app.command("add-prompts")
def add_prompts(
    file: Annotated[
        Path, typer.Argument(metavar="FILE", help="JSONL or Parquet, like prompts.train.")
    ],
    run_dir: RunOrNone = None,
    address: Address = None,
    security: Security = None,
) -> None:
    """Hand in prompts; each takes a place in a campaign's next round, once."""
    from launch import operate

    operate.add_prompts(operate.control_of(run_dir, address, security), file, console)


@app.command()
def pairs(
    run_dir: RunOrNone = None,
    count: Annotated[int, typer.Option(min=1, help="At most so many.")] = 20,
    address: Address = None,
    security: Security = None,
) -> None:
    """The pairs of answers that the scorers are least sure about, one JSON object per line."""
    from launch.operate import control_of, show_pairs

    show_pairs(control_of(run_dir, address, security), count, console)


@app.command()
def label(
    run_dir: RunOrNone = None,
    file: Annotated[
        Path | None,
        typer.Option(help="JSONL of pair_id and verdict (first, second, tie); else you are asked."),
    ] = None,
    count: Annotated[int, typer.Option(min=1, help="Ask about at most so many.")] = 20,
    address: Address = None,
    security: Security = None,
) -> None:
    """Judge pairs of answers; the verdicts are trained on in the campaign's next round."""
    from launch import operate

    operate.label(operate.control_of(run_dir, address, security), console, file=file, count=count)


@app.command("serve-campaign")
def serve_campaign(run_dir: RunDirectory, overrides: Overrides = None) -> None:
    """Serve a campaign's control over gRPC, also while it does not run. KEY=VALUE are those of the
    config's `service` section."""
    from launch.serve import serve_run

    serve_run(run_dir, overrides or (), console)


@app.command()
def explain(
    code: Annotated[
        int | None, typer.Argument(help="An exit code; all of them by default.")
    ] = None,
) -> None:
    """What an exit code of rayhf means, and what to do."""
    from launch.operate import explain

    explain(code, console)


@app.command()
def check(
    config: Config,
    overrides: Overrides = None,
    hardware: Annotated[
        bool,
        typer.Option(
            help="Also check what only the machine itself has: models, prompts, scorers, GPUs."
        ),
    ] = True,
    engine_rate: Annotated[
        float | None, typer.Option(min=1e-3, help="Tokens per second that one engine writes.")
    ] = None,
    learner_rate: Annotated[
        float | None,
        typer.Option(min=1e-3, help="Tokens per second that one learner rank trains on."),
    ] = None,
    calibrate: Annotated[
        bool, typer.Option("--calibrate", help="Play two rounds and report their pace.")
    ] = False,
) -> None:
    """Refuse a bad run before anything starts, and print the plan: batches, placement, memory,
    disk, pace."""
    from launch.check import Pace, check_config
    from rayhf.config.load import load_config

    if calibrate and not hardware:
        raise ConfigError(
            "--calibrate plays two rounds and needs the hardware; leave --no-hardware out"
        )
    pace = Pace(writes=engine_rate, learns=learner_rate, calibrate=calibrate)
    check_config(load_config(config, overrides or ()), console, hardware=hardware, pace=pace)


@app.command("list")
def list_(
    kind: Annotated[
        str,
        typer.Argument(
            help="algorithms, losses, scorers, sources, trackers, evaluations or metrics."
        ),
    ],
) -> None:
    """Print what a config's `type` can name, or the metrics, with one sentence each."""
    from launch.listing import show

    show(kind, console)


@app.command("fit-scorer")
def fit_scorer(config: Config, overrides: Overrides = None) -> None:
    """Train a scorer on preference pairs and write a directory that serves as one."""
    from launch import fit
    from rayhf.config.fit import FitConfig
    from rayhf.config.load import load_section

    fit.fit_scorer(load_section(config, overrides or (), FitConfig), console)


@app.command("serve-scorer")
def serve_scorer(config: Config, overrides: Overrides = None) -> None:
    """Serve scorers over gRPC until SIGTERM; campaigns reach them with a scorer of type grpc."""
    from launch import serve
    from rayhf.config.load import load_section
    from rayhf.config.serve import ServeScorerConfig

    serve.serve_scorer(load_section(config, overrides or (), ServeScorerConfig), console)


@app.command()
def tiny(
    directory: Annotated[
        Path, typer.Argument(metavar="DIR", help="Where to build; kept and reused.")
    ],
    task: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME", help="Build only this task; may be repeated."),
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
def export(
    run_dir: RunDirectory,
    directory: Annotated[
        Path,
        typer.Argument(metavar="DIR", help="Where to put the Hugging Face model; must not exist."),
    ],
) -> None:
    """Copy a campaign's latest policy: a Hugging Face model directory (safetensors, tokenizer)."""
    policy = run_dir / "policy"
    if not (policy / "config.json").is_file():
        raise ConfigError(
            f"{run_dir} has no exported policy yet; expected {policy} (written with every checkpoint)"
        )
    if directory.exists():
        raise ConfigError(f"{directory} exists; expected a new directory")
    try:
        shutil.copytree(policy, directory)
    except OSError as error:
        raise ConfigError(f"{directory}: cannot be written ({error.strerror or error})") from None
    table = Table("file", "bytes")
    for file in sorted(directory.iterdir()):
        table.add_row(file.name, f"{file.stat().st_size:,}")
    console.print(table)


def main() -> None:
    """Run a command; turn errors into one line and an exit code."""
    # A config may name classes of modules that lie where the command is given, as with `python -m`.
    # Last on the path: nothing there can stand in for an installed package.
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    try:
        app()
    except RayhfError as error:
        if os.environ.get("RAYHF_DEBUG"):
            raise
        print(f"rayhf: {plain(' '.join(str(error).split()))}", file=sys.stderr)  # noqa: T201
        sys.exit(error.exit_code)
    except Exception as error:
        if os.environ.get("RAYHF_DEBUG"):
            raise
        first = plain((str(error).strip().splitlines() or [""])[0][:500])
        print(
            f"rayhf: unexpected {type(error).__name__}: {first} (rayhf --debug ... shows the traceback)",
            file=sys.stderr,
        )  # noqa: T201
        sys.exit(1)


if __name__ == "__main__":
    main()
