"""What a child process of the quickstart's tests runs."""

import functools
import os
import resource
import signal


def invoke(words, log, fault=None, largest_file=None):
    """Run the command in this (child) process.

    `fault` is (stage, n): killed at the n-th save's stage. `largest_file` makes writes beyond it fail, as a full disk
    does.
    """
    if largest_file is not None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (largest_file, largest_file))
    out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(out, 1)
    os.dup2(out, 2)
    if fault is not None:
        import dovetail_checkpoint

        seen = []

        def kill(stage):
            seen.append(stage)
            if stage == fault[0] and seen.count(stage) == fault[1]:
                os.kill(os.getpid(), signal.SIGKILL)

        dovetail_checkpoint.Manager = functools.partial(dovetail_checkpoint.Manager, _fault=kill)
    from dovetail.cli import main

    os._exit(main(words))
