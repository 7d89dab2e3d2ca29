"""`tuneyard db`."""

import os

import typer

from app.commands.call import Exit, HomeOption, JsonOption, Output

group = typer.Typer(no_args_is_help=True, help="The database.")


@group.command("upgrade")
def upgrade(home: HomeOption = None, as_json: JsonOption = False) -> None:
    """Bring the schema of `TUNEYARD_DATABASE_URL`, or of the home's SQLite file, up to date."""
    # Imported here: the other commands need no database libraries and start faster without.
    from app.settings import Settings
    from app.store import migrate

    out = Output(as_json=as_json)
    if home is not None:
        os.environ["TUNEYARD_HOME"] = str(home)
    settings = Settings()  # type: ignore[call-arg]
    if settings.database_url is None:
        settings.home_path.mkdir(mode=0o700, parents=True, exist_ok=True)
    try:
        migrate.upgrade(settings.database)
    except Exception as error:
        out.error(f"{type(error).__name__}: {error}")
        raise typer.Exit(Exit.FAILURE) from None
    out.answer({"revision": migrate.head()}, f"the schema is at {migrate.head()}")
