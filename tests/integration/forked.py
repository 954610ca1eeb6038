"""What a forked process does to be `python -m draftsmith.<verb>` (conftest.py, Fork): its own folder, environment,
output and end. Run by runpy with ORDER: module or file, arguments, cwd, environment, output."""

import atexit
import os
import runpy
import sys
import tempfile
from typing import Any

ORDER: dict[str, Any] = globals()["ORDER"]

told = os.open(ORDER["output"], os.O_WRONLY | os.O_APPEND | os.O_CREAT)
for stream in (1, 2):
    os.dup2(told, stream)
os.setsid()
os.chdir(ORDER["cwd"])
os.environ.clear()
os.environ.update(ORDER["environment"])
tempfile.tempdir = None  # it was chosen for the process that was forked
sys.argv = ["-m", *ORDER["arguments"]]
sys.path[0] = ORDER["cwd"]
try:
    if ORDER["module"].endswith(".py"):
        runpy.run_path(ORDER["module"], run_name="__main__")
    else:
        runpy.run_module(ORDER["module"], run_name="__main__", alter_sys=True)
finally:
    atexit._run_exitfuncs()  # which multiprocessing leaves out
