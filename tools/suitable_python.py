"""Exit with status 0 if this Python can create the virtual environment; otherwise print the reason.

Triton runs Python models in a process that loads libpython as a shared library, so this Python must have one. The
folders are those that `imprompt serve` searches. This script must also run on older Pythons.
"""

import importlib.util
import os
import sys
import sysconfig

VERSIONS = ("3.11", "3.12")

version = f"{sys.version_info[0]}.{sys.version_info[1]}"
if version not in VERSIONS:
    sys.exit(f"{sys.executable} is Python {version}, not {' or '.join(VERSIONS)}")

libdir = sysconfig.get_config_var("LIBDIR") or "/usr/lib"
folders = [libdir, os.path.join(libdir, sysconfig.get_config_var("MULTIARCH") or ""), sys.base_prefix + "/lib"]
library = f"libpython{version}.so.1.0"
if not any(os.path.isfile(os.path.join(folder, library)) for folder in folders):
    sys.exit(
        f"{sys.executable} has no shared {library}: install libpython{version} (Debian, Ubuntu), "
        "or use a Python that was built with --enable-shared"
    )

if not importlib.util.find_spec("ensurepip"):
    sys.exit(f"{sys.executable} cannot create virtual environments: install python{version}-venv (Debian, Ubuntu)")
