"""torchrun with our exit codes: `python -m routewright.torchrun --standalone --nproc_per_node=2 -- script.py --flags`.

torchrun ends with code 1 and a page of traceback whatever its ranks ended with. Launchers go through here, so that a
stopped job ends in 3 and one line, bad input in 2, a machine that lacks something in 4, as a single process does.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Sequence

GO_ON = "run the same line again to go on from the last checkpoint"
# They retell each end below the sentence that explains it; LOGLEVEL in the environment brings them back.
CHATTY = ("torch.distributed.elastic.multiprocessing.api", "torch.distributed.elastic.agent.server.api")


def run(argv: Sequence[str]) -> int:
    """Run torchrun's command line. Returns the exit code: 0, the code of the rank that explains the end, or 1."""
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import main

    for name in CHATTY if "LOGLEVEL" not in os.environ else ():
        logging.getLogger(name).setLevel(logging.CRITICAL)
    try:
        main(list(argv))
        return 0
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        codes = {f.exitcode for f in error.failures.values()}
        known = [code for code in (3, 2, 4) if code in codes]  # that rank has told its sentence already
        if known and 1 not in codes:  # a defect of ours is not cured by running the line again
            return known[0]
        how, cure = ((failure.signal_name(), GO_ON) if failure.exitcode < 0 else
                     (f"code {failure.exitcode}", "its message stands above"))
        print(f"error: rank {rank} ended with {how}; all ranks were stopped, {cure}", file=sys.stderr)
        return 1
    except SignalException as error:
        print(f"stopped by {error.sigval.name}; {GO_ON}", file=sys.stderr)
        return 3


if __name__ == "__main__":
    sys.exit(run(sys.argv[1:]))
