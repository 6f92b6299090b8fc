"""Time: what takes how long, measured in turns, and one piece of work on every core."""

import concurrent.futures
import functools
import statistics
import threading
import time

import torch
from tqdm.auto import tqdm


def take_turns(calls, rounds=5, warm_up=1, verbose=False):
    """Wall-clock seconds of each call (name -> function without arguments): name -> [rounds].

    They take turns within every round, so that a machine that slows down slows all of them and
    ratios hold. The first `warm_up` rounds are not counted.
    """
    times = {name: [] for name in calls}
    for turn in tqdm(range(warm_up + rounds), desc="rounds", leave=False, disable=not verbose):
        for name, call in calls.items():
            started = time.perf_counter()
            call()
            if torch.cuda.is_available():
                torch.cuda.synchronize()  # a kernel that is only queued has taken no time yet
            if turn >= warm_up:
                times[name].append(time.perf_counter() - started)
    return times


@torch.inference_mode()
def latency(networks, images, repeats=20):
    """Median seconds a call of networks (name -> callable) on the same float32 [B, C, H, W].

    Measured in turns (`take_turns`), on the CPU.
    """
    images = images.contiguous(memory_format=torch.channels_last)
    calls = {name: functools.partial(network, images) for name, network in networks.items()}
    times = take_turns(calls, repeats, warm_up=2)
    return {name: statistics.median(seconds) for name, seconds in times.items()}


def one_core_each(function, x):
    """function(part) of as many parts of a tensor [N] as torch has threads, in order."""
    threads = torch.get_num_threads()
    return _pool(threads).map(function, x.chunk(threads))


@functools.cache
def _pool(threads):
    """Threads that each run torch on one core: for operations that are serial anyway (bincount)."""
    started = threading.Barrier(threads + 1)

    def start():
        torch.set_num_threads(1)
        started.wait()

    pool = concurrent.futures.ThreadPoolExecutor(threads)
    for _ in range(threads):
        pool.submit(start)
    started.wait()
    torch.set_num_threads(threads)  # what threads to come begin with
    return pool
