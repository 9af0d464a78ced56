"""The installed package, and which tests are run: those of every day, or with --all-commands all of them."""

from __future__ import annotations

import pytest
from package import Package, build


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--all-commands", action="store_true", help="Run every command of the documentation.")


@pytest.fixture(scope="session")
def package(tmp_path_factory: pytest.TempPathFactory) -> Package:
    return build(tmp_path_factory.mktemp("package"))
