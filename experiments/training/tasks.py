"""Which task a kind of data is for."""

from __future__ import annotations

from experiments.config import Config
from experiments.training.boxes import BoxData
from experiments.training.data import Data
from experiments.training.datasets import ImageData
from experiments.training.detection import Detection
from experiments.training.task import Classification, Task

_TASKS = {ImageData: Classification, BoxData: Detection}


def task_of(config: Config, data: Data) -> Task:
    """The task of a run, which its data decides.

    Raises:
        UserError: values of the configuration that this task has no use for.
    """
    return _TASKS[type(data)](config, data)
