"""Calls between the models of one server, told from those of strangers by a secret that is new at each start.

The launcher puts the secret into the environment of Triton, which hands it on to the processes of its models. Calls of
internal models carry it as an input tensor, and so in the keys of Triton's response cache: Triton 2.51 caches an error
too, and answers the next equal call with an empty success. A stranger who calls an encoder could otherwise spoil the
pictures of others.
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
    """`tensors` of a call of an internal model, with the secret for each of its rows.

    Calls of different generations have different keys in the response cache.
    """
    rows = len(next(iter(tensors.values())))
    secret = _secret() + _SEPARATOR + str(generation).encode()
    return {**tensors, SECRET.name: np.full((rows, 1), secret, dtype=object)}


def warn_if_open(model: str) -> None:
    """Log at load that anyone may call `model`: Triton was started without a secret."""
    if not _secret():
        logger.warning("%s takes calls from anyone: %s is not set", model, SECRET_VARIABLE)


def without_secret(tensors: dict[str, np.ndarray], model: str) -> dict[str, np.ndarray]:
    """The `tensors` of a call of the internal `model`, which comes from another model of this server.

    Raises:
        InvalidRequest: the secret is missing or wrong.
    """
    given = tensors.pop(SECRET.name, np.empty(0, object))
    secrets = {bytes(value).rpartition(_SEPARATOR)[0] for value in given.ravel()} or {b""}
    if _secret() and not all(hmac.compare_digest(secret, _secret()) for secret in secrets):
        raise InvalidRequest("model", f"{model} is internal to its bundle and takes no calls from outside")
    return tensors


def _secret() -> bytes:
    return os.environ.get(SECRET_VARIABLE, "").encode()
