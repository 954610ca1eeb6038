"""What Hydra itself makes of a configuration, held to its own plugins.

Hydra makes callbacks, launchers, sweepers and log handlers by itself, before a verb runs, of whatever stands under
`hydra` in any yaml that it is shown. It refuses what it knows to be dangerous by a list (1.3.8), on which neither
torch.load nor pathlib.Path.write_text is. Here it goes the other way round: what may be made is listed.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from typing import Any

from draftsmith.errors import ConfigError

MAKES = re.compile(
    r"(hydra\._internal\.core_plugins|hydra_plugins)\.[\w.]+"
    r"|logging\.(StreamHandler|FileHandler|NullHandler|Formatter)|colorlog\.[A-Z]\w*|sys\.std(out|err)"
)


def hydra() -> None:
    """From now on this process's Hydra makes nothing else. (Hydra 1.4 can be told; 1.3 has to be made to.)"""
    from hydra._internal import logging_config
    from hydra._internal.instantiate import _instantiate2

    modules: tuple[Any, ...] = (logging_config, _instantiate2)
    for module in modules:
        if hasattr(module._authorize_target_name, "__wrapped__"):  # by an earlier command of this process
            continue

        @functools.wraps(module._authorize_target_name)
        def checked(name: str, *rest: Any, ask: Callable[..., None] = module._authorize_target_name) -> None:
            if not MAKES.fullmatch(name):
                raise ConfigError(f"hydra: '{name}' is not allowed; only Hydra's own plugins and log handlers are")
            ask(name, *rest)

        module._authorize_target_name = checked
