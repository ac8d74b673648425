"""Threads of our own beside those that torch's operations share."""

import threading
from concurrent.futures import ThreadPoolExecutor
from functools import cache

import torch


def workers_pool(n: int) -> ThreadPoolExecutor:
    """Threads in each of which torch's operations take one thread.

    torch keeps a number for the process, which a thread takes at its first operation, and one for each thread; to set
    the one sets the other too.  So a thread first takes the process's, then sets its own, and that is set back.
    """
    all_threads, ready = torch.get_num_threads(), threading.Barrier(n + 1)

    def begin() -> None:
        torch.get_num_threads()
        torch.set_num_threads(1)
        ready.wait()

    pool = ThreadPoolExecutor(n, "workers", begin)
    for _ in range(n):  # one is started for each call that finds no idle one
        pool.submit(int)
    ready.wait()
    torch.set_num_threads(all_threads)
    return pool


workers = cache(workers_pool)  # those that stay as long as the process does
