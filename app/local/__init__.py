"""The one-machine stack: Redis, the API and one worker as children of one process, everything under one home."""

from app.local.child import bind_to_parent
from app.local.compute import cores
from app.local.home import HomeTaken
from app.local.redis import find_redis
from app.local.stack import Stack, StackError

__all__ = ["HomeTaken", "Stack", "StackError", "bind_to_parent", "cores", "find_redis"]
