"""Jobs in processes of their own. One that is killed ends the run with a message instead of letting it hang."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from typing import TypeVar

Job = TypeVar("Job")
Result = TypeVar("Result")


def in_processes(function: Callable[[Job], Result], jobs: Iterable[Job], workers: int) -> Iterator[Result]:
    """The results as they come. With one worker the jobs are done in this process, one after the other."""
    jobs = list(jobs)
    if workers <= 1 or len(jobs) <= 1:
        yield from map(function, jobs)
        return
    before = set(multiprocessing.active_children())
    executor = ProcessPoolExecutor(min(workers, len(jobs)), multiprocessing.get_context("spawn"))
    try:
        for done in as_completed([executor.submit(function, job) for job in jobs]):
            yield done.result()
    except BrokenProcessPool:
        raise OSError("a worker process was killed (was memory short?); the same command goes on from here") from None
    except BaseException:
        for process in set(multiprocessing.active_children()) - before:
            process.terminate()
        raise
    finally:
        executor.shutdown(wait=True, cancel_futures=True)
