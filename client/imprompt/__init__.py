"""Client for a served bundle: Stable Diffusion with image prompts.

with Client("localhost:8001") as client:
    client.generate(model="sd15", prompt="a garden", ip_adapter_image="statue.png", seed=0).save("out.png")
"""

from importlib.metadata import version

from imprompt._async_client import AsyncClient
from imprompt._client import Client
from imprompt._errors import (
    Cancelled,
    ConnectionFailed,
    DeadlineExceeded,
    ImpromptError,
    InvalidRequest,
    Overloaded,
    ServerError,
)
from imprompt._images import ImageInput
from imprompt._model import Capabilities
from imprompt._result import Progress, Result

__version__ = version("imprompt")

__all__ = [
    "AsyncClient",
    "Cancelled",
    "Capabilities",
    "Client",
    "ConnectionFailed",
    "DeadlineExceeded",
    "ImageInput",
    "ImpromptError",
    "InvalidRequest",
    "Overloaded",
    "Progress",
    "Result",
    "ServerError",
    "__version__",
]
