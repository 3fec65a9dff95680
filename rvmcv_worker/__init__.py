"""The pull-based computer-vision worker of RVM-Server."""

from importlib.metadata import version

__version__ = version("rvmcv-worker")
