"""The kernel families that this CPU runs."""

from __future__ import annotations

import pytest

from support.kernel_library import Family, Library, open_library


@pytest.fixture(scope="session")
def library() -> Library:
    """The installed package's library."""
    return open_library()


@pytest.fixture(scope="session")
def families(library: Library) -> list[Family]:
    """Every family this CPU runs, best first."""
    return library.available()
