"""Calls between the models of one server, told from those of strangers by a secret that is new at each start.

The launcher puts the secret into the environment of Triton, which hands it on to the processes of its models. Requests
between models carry it as a request parameter, so it is part of no tensor and of no key of the response cache.
"""

from __future__ import annotations

import hmac
import json
import logging
import os
from typing import Any

from imprompt_serving.errors import InvalidRequest

logger = logging.getLogger(__name__)

SECRET_VARIABLE = "IMPROMPT_SECRET"
_PARAMETER = "imprompt_secret"


def secret_parameters() -> dict[str, str]:
    """Parameters for a request to an internal model."""
    secret = os.environ.get(SECRET_VARIABLE)
    return {_PARAMETER: secret} if secret else {}


def warn_if_open(model: str) -> None:
    """Log at load that anyone may call `model`: Triton was started without a secret."""
    if not os.environ.get(SECRET_VARIABLE):
        logger.warning("%s takes calls from anyone: %s is not set", model, SECRET_VARIABLE)


def check_internal(request: Any, model: str) -> None:
    """Refuse a request to the internal `model` that does not come from another model of this server.

    Raises:
        InvalidRequest: the secret is missing or wrong.
    """
    secret = os.environ.get(SECRET_VARIABLE)
    if not secret:
        return
    given = json.loads(request.parameters() or "{}").get(_PARAMETER)
    if not isinstance(given, str) or not hmac.compare_digest(given.encode(), secret.encode()):
        raise InvalidRequest("model", f"{model} is internal to its bundle and takes no calls from outside")
