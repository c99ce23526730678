"""Run a script and leave without Python's shutdown: `python leave_at_end.py SCRIPT ARGS`.

While Python shuts down, a thread of gloo that is still busy aborts the process now and then, after
everything was done (docs/troubleshooting.md, "The job aborts at its end"), and torchrun then ends
the other ranks, which may still be writing. All else is as `python SCRIPT ARGS` has it: threads are
waited for, and what is registered for the exit is called.
"""

from __future__ import annotations

import atexit
import os
import runpy
import sys
import threading
import traceback
from pathlib import Path

if __name__ == "__main__":
    sys.argv = sys.argv[1:]
    sys.path[0] = str(Path(sys.argv[0]).parent)
    code: object = 0
    try:
        runpy.run_path(sys.argv[0], run_name="__main__")
    except SystemExit as error:
        code = error.code
        if not isinstance(code, int | None):
            print(code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
        code = 1
    threading._shutdown()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code if isinstance(code, int) else int(code is not None))
