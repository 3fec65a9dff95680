"""Tests of the worker as it is installed; the system that they share ends with the last of them."""
