"""What can be run, over the API."""

from app.client.connection import Connection
from app.client.objects import Json, Page, Recipe


class Recipes:
    """The recipes and architectures that workers published."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    def list(self) -> Page[Recipe]:
        """Give every recipe."""
        return self._connection.get("/v1/recipes")

    def get(self, name: str) -> Recipe:
        """Give one, with its schema and a template to fill in."""
        return self._connection.get(f"/v1/recipes/{name}")

    def architectures(self) -> Page[Json]:
        """Give every network that can be built."""
        return self._connection.get("/v1/architectures")
