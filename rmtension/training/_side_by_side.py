"""Trains several reward models at a time, each in a process of its own."""

import os
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from functools import partial
from multiprocessing import get_context
from typing import Any

import torch

from rmtension.training._train_reward_model import train_reward_model

# Called with the label of a training and a line about it.
OnLog = Callable[[str, str], object]


def run_side_by_side(
    trainings: Sequence[Mapping[str, Any]],
    labels: Sequence[str],
    *,
    jobs: int,
    on_start: Callable[[int], object],
    on_log: OnLog,
) -> None:
    """Call `train_reward_model` with each of the mappings of arguments, `jobs` at a time.

    With `jobs` of 1 they run in this process. Otherwise each runs in a new process with its share of this process's
    threads, which on few cores is faster than one training with all threads. `on_start` is called with the number of a
    training when it begins, `on_log` with its label and a line about its losses. After an error no further training
    begins; those that run finish, and the error is raised.
    """
    if jobs == 1 or len(trainings) < 2:
        for number, arguments in enumerate(trainings):
            on_start(number)
            train_reward_model(**arguments, on_log=partial(on_log, labels[number]))
        return
    context = get_context("spawn")
    lines: Any = context.SimpleQueue()
    reader = threading.Thread(target=_pass_on, args=(lines, on_log), daemon=True)
    reader.start()
    threads = max(1, torch.get_num_threads() // jobs)
    running: set[Future[None]] = set()
    waiting = list(range(len(trainings)))
    try:
        with ProcessPoolExecutor(jobs, context, initializer=_begin, initargs=(threads, os.getpid(), lines)) as pool:
            while waiting or running:
                while waiting and len(running) < jobs:
                    number = waiting.pop(0)
                    on_start(number)
                    # Bars of several processes would overwrite each other.
                    running.add(pool.submit(_train, {**trainings[number], "progress": False}, labels[number]))
                done, running = wait(running, return_when=FIRST_COMPLETED)
                for future in done:
                    future.result()
    finally:
        lines.put(None)
        reader.join()


def _pass_on(lines: Any, on_log: OnLog) -> None:
    while (entry := lines.get()) is not None:
        on_log(*entry)


def _begin(threads: int, parent: int, lines: Any) -> None:
    """Set the threads of a new process, keep where its lines go, and let it end when its parent is killed."""
    torch.set_num_threads(threads)
    _LINES.append(lines)
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()


# The queue of a process that trains.
_LINES: list[Any] = []


def _train(arguments: Mapping[str, Any], label: str) -> None:
    train_reward_model(**arguments, on_log=lambda line: _LINES[0].put((label, line)))


def _end_with(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)
