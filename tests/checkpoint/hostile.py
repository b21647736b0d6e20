"""How a damaged file has to be refused."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lacewing.errors import CheckpointError, FormatError, LacewingError, UnsupportedModelError


def refused(open_it: Callable[[Path], Any], path: Path, *places: str) -> LacewingError:
    """Asserts that `open_it(path)` raises a typed error that names every one of `places`, within a
    second of computing (not of waiting: the machine may be busy)."""
    start = time.process_time()
    with pytest.raises((CheckpointError, UnsupportedModelError, FormatError)) as caught:
        open_it(path)
    assert time.process_time() - start < 1
    message = str(caught.value)
    for place in places:
        assert place in message, message
    assert message.isprintable(), message
    return caught.value
