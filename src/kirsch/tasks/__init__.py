"""Tasks by name: the purposes of models. Importing this package registers the built-in ones."""

from kirsch.tasks.classification import Classification
from kirsch.tasks.task import TASKS, Task

__all__ = ["TASKS", "Classification", "Task"]
