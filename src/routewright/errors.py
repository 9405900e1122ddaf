"""The errors a user can cause or meet, and the exit codes they end in.

`launch` turns each of them into one sentence on stderr and the exit code of its class; a traceback appears only
with `--debug`. A message says what was seen, where (file and line where there is one), and what to do next.
"""

from __future__ import annotations


class UserError(ValueError):
    """Bad input: a flag, a file, a row, a key. Nothing was spent and nothing was written."""

    exit_code = 2


class PartialRun(RuntimeError):
    """The work stopped half-way and what was done is kept: a NaN loss, a signal, a failed check. Resumable."""

    exit_code = 3


class MissingSetup(RuntimeError):
    """The machine lacks something: weights, a package, a GPU, the network, disk."""

    exit_code = 4
