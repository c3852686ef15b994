"""Runs tasks in threads that each compute on one core."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import torch


def worker_threads() -> ThreadPoolExecutor:
    """Return an executor with as many threads as torch uses, in each of which torch uses a single one.

    The threads of one operation wait for each other, which costs more than small operations themselves, and a hundred
    times as much if other programs use the processor. Results do not depend on the number of threads.
    """
    return ThreadPoolExecutor(torch.get_num_threads(), initializer=torch.set_num_threads, initargs=(1,))
