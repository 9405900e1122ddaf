"""What one rank of a training job knows of the signals sent to it and of its peers on the same machine.

A rank that waits in a collective for a dead or hung peer runs no Python code in its main thread. `Watch` listens from a
thread of its own, so that a signal is obeyed within its grace time and a peer's death ends the job within seconds.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import math
import os
import select
import signal
import socket
import sys
import threading
import time
from pathlib import Path
from typing import Any

from routewright.errors import PartialRun


def guard_process() -> None:
    """Under torchrun: ask the kernel for SIGTERM when the agent dies, so that a killed launcher leaves no orphans.

    Elsewhere nothing changes: a run started with nohup outlives its shell.
    """
    if "TORCHELASTIC_RUN_ID" not in os.environ or not sys.platform.startswith("linux"):
        return
    parent, set_parent_death_signal = os.getppid(), 1
    ctypes.CDLL(None).prctl(set_parent_death_signal, signal.SIGTERM)
    if os.getppid() != parent:
        os.kill(os.getpid(), signal.SIGTERM)


def process_state(pid: int) -> str:
    """The kernel's letter for a process of this machine (R, S, T stopped, Z dead ...), or '' when it is gone."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        pass
    if Path("/proc/self/stat").exists():
        return ""
    try:
        os.kill(pid, 0)
    except OSError:
        return ""
    return "R"


def machine() -> str:
    """Same for two processes that can see each other's pids."""
    try:
        return f"{socket.gethostname()} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return socket.gethostname()


class Watch:
    """Listens for signals and looks after the peers from a thread, so that it works while the main thread is stuck.

    A rank that waits in a collective for a dead peer runs no Python signal handler. This thread gets the signal through
    the wake-up descriptor, sees the peer's death in the process table, and ends the process when the main thread
    does not come back in time.

    peers: {rank: pid} on this machine, without this process. grace: seconds from a signal to the forced end.
    """

    def __init__(self, peers: dict[int, int], grace: float) -> None:
        self.peers, self.grace = peers, grace
        self.requested: int | None = None
        self.dead_rank: int | None = None
        self._deadline = math.inf
        self._elastic = "TORCHELASTIC_RUN_ID" in os.environ
        self._parent = os.getppid()
        self._first = 0.0
        self._open = True
        self._old: dict[int, Any] = {}
        self._read, self._write = os.pipe()
        os.set_blocking(self._write, False)
        self._main = threading.current_thread() is threading.main_thread()
        if self._main:
            for number in (signal.SIGTERM, signal.SIGINT):
                self._old[number] = signal.signal(number, self._on_signal)
            self._old_wakeup = signal.set_wakeup_fd(self._write, warn_on_full_buffer=False)
        self._thread = threading.Thread(target=self._loop, name="watch", daemon=True)
        self._thread.start()

    def _on_signal(self, number: int, frame: Any) -> None:
        again = self.requested is not None and time.monotonic() - self._first > 1.0
        self._request(number)
        # A second Ctrl-C of a person means now. Under torchrun the agent repeats the first one by itself.
        if again and number == signal.SIGINT and not self._elastic:
            raise KeyboardInterrupt

    def _request(self, number: int) -> None:
        if self.requested is None:
            self._first = time.monotonic()
            self._deadline = min(self._deadline, self._first + self.grace)
            self.requested = number

    def _loop(self) -> None:
        suspect: int | None = None
        while self._open:
            ready, _, _ = select.select([self._read], [], [], 0.5)
            if ready:
                for number in os.read(self._read, 64):
                    if number in (signal.SIGTERM, signal.SIGINT):
                        self._request(number)
            if not self._open:
                return
            if self._elastic and os.getppid() != self._parent:
                self._request(signal.SIGTERM)
            dead = next((rank for rank, pid in self.peers.items() if process_state(pid) in ("", "Z", "X")), None)
            # Twice in a row: a peer that ends well a moment before us is no accident.
            if dead is not None and dead == suspect and self.dead_rank is None:
                self.dead_rank = dead
                self._deadline = min(self._deadline, time.monotonic() + 3.0)
            suspect = dead
            if time.monotonic() > self._deadline:
                self._force()

    def _force(self) -> None:
        why = (f"rank {self.dead_rank} died" if self.dead_rank is not None
               else f"no step ended within {self.grace:g} s of the signal")
        os.write(2, f"stopped: {why}; the newest checkpoint is whole, run the same command again\n".encode())
        os._exit(PartialRun.exit_code)

    def unwell(self, wait: float = 2.5) -> str:
        """What is wrong with a peer, in words: dead, stopped, or ''. Waits a little: a death may be a moment old."""
        until = time.monotonic() + wait
        while True:
            for rank, pid in self.peers.items():
                state = process_state(pid)
                if state in ("", "Z", "X"):
                    return f"rank {rank} (pid {pid}) died"
                if state in ("T", "t"):
                    return f"rank {rank} (pid {pid}) is stopped and does not answer"
            if time.monotonic() > until:
                return ""
            time.sleep(0.1)

    def end_stopped(self) -> None:
        """Kill peers that are stopped: they cannot obey the agent's SIGTERM, which would wait 30 s for them."""
        for pid in self.peers.values():
            if process_state(pid) == "T":
                with contextlib.suppress(OSError):
                    os.kill(pid, signal.SIGKILL)

    def leave(self, seconds: int = 15) -> None:
        """One rank of several ends with an error: it gets this long for its message, whatever its peers do.

        The agent answers the first rank that ends with SIGTERM to the others, so that is no news any more; the kernel's
        alarm ends a process that is stuck in a collective or in a destructor.
        """
        if self._main:
            for number in self._old:
                self._old[number] = signal.SIG_IGN
            signal.signal(signal.SIGALRM, signal.SIG_DFL)
            signal.alarm(seconds)

    @staticmethod
    def end_with(code: int) -> None:
        """When this process comes to its end, end at once, with this code.

        Freeing what it holds takes the interpreter 6 s on a busy machine; the alarm of `leave` would cut that short and
        the agent would read a signal in the place of the code.
        """
        def end() -> None:
            for stream in (sys.stdout, sys.stderr):
                with contextlib.suppress(OSError, ValueError):
                    stream.flush()
            os._exit(code)

        atexit.register(end)

    def close(self) -> None:
        """Give the signals back, and end the thread."""
        if not self._open:
            return
        self._open = False
        if self._main:
            signal.set_wakeup_fd(self._old_wakeup)
            for number, old in self._old.items():
                signal.signal(number, old)
        with contextlib.suppress(OSError):
            os.write(self._write, b"\0")
        self._thread.join(timeout=5)
        os.close(self._read)
        os.close(self._write)
