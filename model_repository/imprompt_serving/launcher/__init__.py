"""Start Triton, report when it is ready, drain it, and clean up after it.

`serve` runs in the foreground (`imprompt serve REPO`); `Server` is a context manager, for tests and the demo.
`imprompt_serving.drain` explains what a drain means for the models.
"""

from imprompt_serving.launcher.addresses import Addresses
from imprompt_serving.launcher.backoff import Backoff
from imprompt_serving.launcher.foreground import serve
from imprompt_serving.launcher.install import LaunchError
from imprompt_serving.launcher.server import Server

__all__ = ["Addresses", "Backoff", "LaunchError", "Server", "serve"]
