"""The usual way to train as a service: FastAPI puts a Celery task, which starts `python train.py`."""
