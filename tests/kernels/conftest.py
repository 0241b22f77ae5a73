"""Fixtures of the kernels' tests."""

from sm90 import compile_for_sm90  # noqa: F401 - a fixture
