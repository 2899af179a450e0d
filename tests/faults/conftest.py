"""Tiny recipes, as the tests of the tasks have them."""

from tests.plugins.tasks.conftest import launch, log_of, tiny

__all__ = ["launch", "log_of", "tiny"]
