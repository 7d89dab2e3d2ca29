"""The trainer: its own process, forked warm; no SQL, no Celery, no credentials. From an order to files in scratch."""
