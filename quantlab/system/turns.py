"""One call at a time of what keeps state between calls, whatever threads and processes do.

    with turn():
        ...

A process that ends waits for the call that another thread is in, and lets no further one begin: it
would be killed within torch, which aborts. A forked process goes on with a lock of its own and one
thread: those of the OpenMP that torch uses do not survive a fork, and waiting for them never ends.
"""

import atexit
import contextlib
import os
import threading

import torch


class _Inside(threading.local):
    here = False


_inside = _Inside()
_gate, _lock = threading.Lock(), threading.Lock()


@contextlib.contextmanager
def turn():
    """A block that one thread of the process is in at a time; a thread inside may enter again."""
    if _inside.here:
        yield
        return
    with _gate:  # closed when the process ends
        pass
    with _lock:
        _inside.here = True
        try:
            yield
        finally:
            _inside.here = False


@atexit.register
def _close():
    _gate.acquire()
    _lock.acquire()


def _start_anew():
    global _gate, _lock
    _gate, _lock = threading.Lock(), threading.Lock()
    torch.set_num_threads(1)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_start_anew)
