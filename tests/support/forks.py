"""Work in a forked child: kernels give there what they gave in the parent.

torch's own ops need not: OpenMP's threads do not come along, and an op on more than 32,768 elements waits for them,
unless torch.set_num_threads(1) is called in the child. So the parent computes what is right, bytes are compared by
Python, and a child that hangs is ended.
"""

import os
import signal
import traceback
from collections.abc import Callable, Iterable

import pytest
import torch

SECONDS = 30  # for milliseconds of work, beside other processes
needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")


def assert_same_in_a_forked_child(call: Callable[[], Iterable[torch.Tensor]]) -> None:
    """The tensors that `call` gives have the same bits in a child, forked after torch's threads have worked."""

    def found() -> list[bytes]:
        return [t.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes() for t in call()]

    torch.ones(1 << 20).abs()  # starts the threads
    want = found()
    child = os.fork()
    if not child:
        status = 1
        try:
            signal.signal(signal.SIGALRM, signal.SIG_DFL)
            signal.alarm(SECONDS)
            torch.use_deterministic_algorithms(False)  # would fill empty tensors by torch's threads
            status = 0 if found() == want else 3
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert status != -signal.SIGALRM, f"the child hung: nothing came in {SECONDS} s"
    assert status == 0, "other bits in the child" if status == 3 else f"the child ended with {status}"
