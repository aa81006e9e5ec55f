"""What a check of this machine has found."""

import sys
from collections.abc import Callable
from contextlib import redirect_stdout
from dataclasses import dataclass
from typing import Literal

from rft_cluster.common.errors import ClusterError, UserError, described

SETUP = "make setup"

Status = Literal["ok", "warning", "error"]


@dataclass(frozen=True)
class Finding:
    """The result of the check `name`. The text of a warning or an error says what to do."""

    name: str
    status: Status
    text: str


def warning(name: str, text: str) -> Finding:
    return Finding(name, "warning", text)


def error(name: str, text: str) -> Finding:
    return Finding(name, "error", text)


Check = Callable[[], str | Finding]
"""Returns what is all right, in words, or a finding of its own. Raises as the checks of a launch do."""


def finding_of(name: str, check: Check) -> Finding:
    """Make a check. What would end a launch is an error."""
    try:
        with redirect_stdout(sys.stderr):  # what a check prints is no finding
            found = check()
    except (UserError, ClusterError, OSError) as mistake:
        return error(name, described(mistake))
    except ImportError as missing:
        return error(name, f"not checked, because a package is missing: {missing}. Type: {SETUP}")
    return found if isinstance(found, Finding) else Finding(name, "ok", found)
