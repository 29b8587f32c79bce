"""An untrained face detector and recognizer with insightface's interfaces; any red disc is a face."""

from pathlib import Path

import numpy as np
import onnx
from onnx import numpy_helper, parser
from PIL import Image, ImageDraw

STRIDES = (8, 16, 32)
ANCHORS = 2
WINDOW = 13
"""Maximum width of a face, in cells of 8 pixels at the detector's resolution."""
# Eyes, nose and corners of the mouth in a face of width 1, relative to its center (insightface's `arcface_dst`).
KEYPOINTS = (-0.158, -0.038, 0.156, -0.040, 0.0, 0.140, -0.129, 0.325, 0.132, 0.323)

# One score, box and set of keypoints for each cell of the finest stride, at its first anchor; zero scores elsewhere.
_DETECTOR = """
<ir_version: 8, opset_import: ["" : 17]>
detector (float[1, 3, h, w] picture) => (
    float[n8, 1] score_8, float[n16, 1] score_16, float[n32, 1] score_32,
    float[n8, 4] bbox_8, float[n16, 4] bbox_16, float[n32, 4] bbox_32,
    float[n8, 10] kps_8, float[n16, 10] kps_16, float[n32, 10] kps_32)
{
    mixed = Conv (picture, redness)
    red = Relu (mixed)
    cells = AveragePool <kernel_shape = [8, 8], strides = [8, 8]> (red)
    near = Conv <pads = [6, 6, 6, 6]> (cells, hill)
    peak = MaxPool <kernel_shape = [5, 5], pads = [2, 2, 2, 2]> (near)
    isnt = Less (near, peak)
    is = Not (isnt)
    here = Cast <to = 1> (is)
    score = Mul (cells, here)
    mass = Conv <pads = [6, 6, 6, 6]> (cells, disc)
    side = Sqrt (mass)
    none = Mul (score, zero)
    none_16 = AveragePool <kernel_shape = [2, 2], strides = [2, 2]> (none)
    none_32 = AveragePool <kernel_shape = [4, 4], strides = [4, 4]> (none)
    scores = Concat <axis = 1> (score, none)
    sides = Concat <axis = 1> (side, side)
    boxes = Conv (sides, box, box_middle)
    points = Conv (sides, point, point_middle)
    %s
}
"""
_FLAT = """
    t_%(name)s = Transpose <perm = [0, 2, 3, 1]> (%(map)s)
    %(name)s = Reshape (t_%(name)s, rows_%(width)d)
"""
_RECOGNIZER = """
<ir_version: 8, opset_import: ["" : 17]>
recognizer (float[n, 3, 112, 112] face) => (float[n, 512] embedding)
{
    cells = AveragePool <kernel_shape = [8, 8], strides = [8, 8]> (face)
    flat = Flatten (cells)
    mixed = MatMul (flat, weight)
    embedding = Sin (mixed)
}
"""
_GENDER_AND_AGE = """
<ir_version: 8, opset_import: ["" : 17]>
genderage (float[n, 3, 96, 96] face) => (float[n, 3] answer)
{
    means = GlobalAveragePool (face)
    answer = Flatten (means)
}
"""


def make_face_models(folder: str | Path, *, width: int = 512, seed: int = 0) -> Path:
    """Write files named as in `buffalo_l`: a detector, a recognizer, and an unused gender and age model."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    weight = np.random.default_rng(seed).normal(0, 0.3, (3 * 14 * 14, width)).astype(np.float32)
    _write(folder / "det_10g.onnx", _DETECTOR % _flat_maps(), _detector_weights())
    _write(folder / "w600k_r50.onnx", _RECOGNIZER.replace("512", str(width)), {"weight": weight})
    _write(folder / "genderage.onnx", _GENDER_AND_AGE, {})
    return folder


def people(*faces: tuple[float, float, float], seed: int = 0, size: tuple[int, int] = (96, 96)) -> Image.Image:
    """Draw faces at each (x, y, radius), as fractions of the picture's size; different seeds draw different faces."""
    rng = np.random.default_rng(seed)
    width, height = size
    picture = Image.new("RGB", size, tuple(int(value) for value in rng.integers(20, 60, 3)))
    draw = ImageDraw.Draw(picture)
    for x, y, radius in faces:
        x, y, r = x * width, y * height, radius * min(size)
        draw.ellipse((x - r, y - r, x + r, y + r), fill="red")
        for _ in range(6):  # facial features near the rim, so that the center stays red
            angle, spot = rng.uniform(0, 2 * np.pi), r * rng.uniform(0.1, 0.2)
            left, top = x + 0.8 * r * np.cos(angle), y + 0.8 * r * np.sin(angle)
            color = tuple(int(value) for value in rng.integers(0, 256, 3))
            draw.ellipse((left - spot, top - spot, left + spot, top + spot), fill=color)
    return picture


def _write(path: Path, text: str, weights: dict[str, np.ndarray]) -> None:
    model = parser.parse_model(text)
    model.graph.initializer.extend(numpy_helper.from_array(value, name) for name, value in weights.items())
    onnx.checker.check_model(model)
    onnx.save(model, path)


def _flat_maps() -> str:
    """Generate the nodes that flatten each map [1, anchors * width, h, w] to rows [h * w * anchors, width]."""
    lines = []
    for stride in STRIDES:
        pad = "" if stride == 8 else f"_{stride}"
        for name, width in (("score", 1), ("bbox", 4), ("kps", 10)):
            source = {"score": "scores", "bbox": "boxes", "kps": "points"}[name]
            if pad:
                source = f"{name}{pad}_map"
                lines.append(f"    {source} = Concat <axis = 1> ({', '.join([f'none{pad}'] * ANCHORS * width)})\n")
            lines.append(_FLAT % {"name": f"{name}_{stride}", "map": source, "width": width})
    return "".join(lines)


def _detector_weights() -> dict[str, np.ndarray]:
    away = np.hypot(*(np.mgrid[:WINDOW, :WINDOW] - WINDOW // 2))
    weights = {
        "redness": np.array([0.5, -0.25, -0.25]).reshape(1, 3, 1, 1),  # 1 for red, 0 for grays
        "hill": np.exp(-((away / 4) ** 2))[None, None],
        "disc": (away <= WINDOW / 2)[None, None] * 4 / np.pi,  # the ratio of a disc's bounding box to its area
        "zero": np.zeros(1),
        "box": _by_anchor(np.full(4, 0.5)),
        "box_middle": np.tile([-0.5, -0.5, 0.5, 0.5], ANCHORS),
        "point": _by_anchor(np.array(KEYPOINTS)),
        "point_middle": np.full(10 * ANCHORS, 0.5),
    }
    rows = {f"rows_{width}": np.array([-1, width], np.int64) for width in (1, 4, 10)}
    return {name: value.astype(np.float32) for name, value in weights.items()} | rows


def _by_anchor(column: np.ndarray) -> np.ndarray:
    """Return weights [anchors * width, anchors, 1, 1] of a 1x1 convolution that keeps the anchors separate."""
    return np.kron(np.eye(ANCHORS), column[:, None])[:, :, None, None]
