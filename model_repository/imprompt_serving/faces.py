"""Detect, align, and embed faces with insightface, as in the diffusers guide."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnxruntime
from insightface.app import FaceAnalysis
from insightface.utils import face_align

from imprompt_serving.pipeline import images
from imprompt_serving.specs import FaceEncoder
from imprompt_serving.wire import FACE_CROP


class FaceFinder:
    """Runs insightface's `FaceAnalysis` with the detector and the recognizer in a folder."""

    def __init__(self, folder: Path, spec: FaceEncoder) -> None:
        options = onnxruntime.SessionOptions()
        # Sessions of several processes share the cores: a spinning thread pool would starve the others.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        self._app = FaceAnalysis(name=str(folder), providers=["CPUExecutionProvider"], sess_options=options)
        self._app.prepare(ctx_id=0, det_size=spec.det_size, det_thresh=spec.det_thresh)
        self._width: int = self._app.models["recognition"].output_shape[-1]

    def largest(self, data: bytes) -> dict[str, np.ndarray]:
        """Find the largest face (by its box) of an encoded picture.

        Returns:
            The tensors of `wire.FACE_OUTPUT`, with zero rows if the picture shows no face.

        Raises:
            InvalidRequest: the picture is not readable.
        """
        rgb = np.asarray(images.rgb(images.decode(data, "ip_adapter_image")))
        picture = np.ascontiguousarray(rgb[..., ::-1])
        faces = self._app.get(picture, max_num=1, det_metric="max")
        crops = [face_align.norm_crop(picture, landmark=face.kps, image_size=FACE_CROP) for face in faces]
        return {
            "embeddings": np.array([face.normed_embedding for face in faces], np.float32).reshape(-1, self._width),
            "boxes": np.array([face.bbox for face in faces], np.float32).reshape(-1, 4),
            "keypoints": np.array([face.kps for face in faces], np.float32).reshape(-1, 5, 2),
            "crops": np.array(crops, np.uint8).reshape(-1, FACE_CROP, FACE_CROP, 3),
        }
