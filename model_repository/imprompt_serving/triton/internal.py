"""Authenticate calls between the models of one server with a secret that is new at each start.

The launcher puts the secret in the environment of Triton, and model processes inherit it. Calls to internal models
carry the secret as an input tensor, so it is also part of the keys of Triton's response cache. That matters because
Triton 2.51 also caches errors, and answers the next equal call with an empty success: without the secret, an outside
caller of an encoder could break the pictures of others.
"""

from __future__ import annotations

import hmac
import logging
import os
from collections.abc import Mapping

import numpy as np

from imprompt_serving.errors import InvalidRequest
from imprompt_serving.wire import SECRET

logger = logging.getLogger(__name__)

SECRET_VARIABLE = "IMPROMPT_SECRET"
_SEPARATOR = b":"


def with_secret(tensors: Mapping[str, np.ndarray], generation: int = 0) -> dict[str, np.ndarray]:
    """Add the secret, for each row, to the `tensors` of a call to an internal model.

    Calls of different generations have different keys in the response cache.
    """
    rows = len(next(iter(tensors.values())))
    secret = _secret() + _SEPARATOR + str(generation).encode()
    return {**tensors, SECRET.name: np.full((rows, 1), secret, dtype=object)}


def warn_if_open(model: str) -> None:
    """Log a warning if Triton was started without a secret, so that anyone may call `model`."""
    if not _secret():
        logger.warning("%s accepts calls from anyone: %s is not set", model, SECRET_VARIABLE)


def without_secret(tensors: dict[str, np.ndarray], model: str) -> dict[str, np.ndarray]:
    """Check that a call to the internal `model` comes from this server, and return its `tensors` without the secret.

    Raises:
        InvalidRequest: the secret is missing or wrong.
    """
    sent = tensors.pop(SECRET.name, np.empty(0, object))
    secrets = {bytes(value).rpartition(_SEPARATOR)[0] for value in sent.ravel()} or {b""}
    if _secret() and not all(hmac.compare_digest(secret, _secret()) for secret in secrets):
        raise InvalidRequest("model", f"{model} is internal to its bundle and accepts no calls from outside")
    return tensors


def is_secret(value: object) -> bool:
    """Return whether `value`, which a caller sent, is the secret of this server. Without a secret, nothing is."""
    secret = _secret()
    return bool(secret) and isinstance(value, str) and hmac.compare_digest(value.encode(), secret)


def _secret() -> bytes:
    return os.environ.get(SECRET_VARIABLE, "").encode()
