"""The package as it is installed, once for all tests of this folder."""

from __future__ import annotations

import pytest
from package import Package, build


@pytest.fixture(scope="session")
def package(tmp_path_factory: pytest.TempPathFactory) -> Package:
    return build(tmp_path_factory.mktemp("package"))
