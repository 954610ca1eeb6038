"""What integration/forked.py does, in a process whose address space may grow by no more than ORDER["more"] bytes from
the first call of ORDER["place"] on, a (module, function): as on a machine with so little memory left."""

import os
import resource
import runpy
from functools import reduce
from importlib import import_module
from pathlib import Path
from typing import Any

ORDER: dict[str, Any] = globals()["ORDER"]

module, name = ORDER["place"]
*path, name = name.split(".")
owner = reduce(getattr, path, import_module(module))
real = getattr(owner, name)


def in_little_memory(*given: Any, **named: Any) -> Any:
    setattr(owner, name, real)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * os.sysconf("SC_PAGE_SIZE") + ORDER["more"]
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    return real(*given, **named)


setattr(owner, name, in_little_memory)
runpy.run_path(str(Path(__file__).parents[1] / "integration" / "forked.py"), {"ORDER": ORDER})
