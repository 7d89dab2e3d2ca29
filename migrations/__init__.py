"""The history of the schema; `app.store.migrate` walks it."""
