"""Projects over the API."""

from app.client.connection import Connection
from app.client.objects import Json, Page, Project


class Projects:
    """Walls between users; needs scope `operator`."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    def create(self, name: str) -> Project:
        """Make a project."""
        return self._connection.post("/v1/projects", {"name": name})

    def list(self, *, limit: int = 20, after: str | None = None) -> Page[Project]:
        """Give one page, newest first."""
        return self._connection.get("/v1/projects", limit=limit, after=after)

    def delete(self, project: str) -> Json:
        """Delete a project."""
        return self._connection.delete(f"/v1/projects/{project}")
