"""`tuneyard`: the command line, wired together. Each noun has its file in `app/commands/`."""

from importlib.metadata import version
from typing import Annotated

import typer

from app.commands import (
    database,
    datasets,
    demo,
    doctor,
    jobs,
    keys,
    models,
    projects,
    recipes,
    stack,
    training,
    workers,
)

application = typer.Typer(
    name="tuneyard",
    help="Self-hosted training: unlabelled images in, weights out.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
application.command("up")(stack.up)
application.command("demo")(demo.demo)
application.add_typer(datasets.group, name="datasets")
application.add_typer(jobs.group, name="jobs")
application.add_typer(models.group, name="models")
application.add_typer(recipes.group, name="recipes")
application.add_typer(keys.group, name="keys")
application.add_typer(projects.group, name="projects")
application.add_typer(workers.group, name="workers")
application.add_typer(database.group, name="db")
application.command("worker")(workers.worker)
application.command("run")(training.run)
application.command("doctor")(doctor.doctor)


def _version(asked: bool) -> None:
    if asked:
        print(version("tuneyard"))
        raise typer.Exit


@application.callback()
def _root(
    _asked: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and end.")
    ] = False,
) -> None:
    pass


def main() -> None:
    """The console script."""
    application()


if __name__ == "__main__":
    main()
