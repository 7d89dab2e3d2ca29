"""The manners of HTTP, the same on every route: bodies, keys against repeats, uploads, downloads, waits."""
