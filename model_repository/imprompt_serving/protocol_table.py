"""Generate the tables of `docs/protocol.md`: `python -m imprompt_serving.protocol_table docs/protocol.md`.

Each table is placed between `<!-- tensors: NAME -->` and `<!-- end -->`, where NAME is a group of `parameters` or a
tuple of `wire`.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

from imprompt_serving import wire
from imprompt_serving.parameters import Group
from imprompt_serving.wire import Tensor

_PLACE = re.compile(r"(<!-- tensors: (?P<name>\w+) -->\n).*?(<!-- end -->)", re.DOTALL)


def tables() -> dict[str, tuple[Tensor, ...]]:
    """Return the documented tensors by table name."""
    parameters = {group.value: wire.parameter_tensors(group) for group in Group}
    return parameters | {
        "RESPONSE": wire.RESPONSE,
        "VIDEO_RESPONSE": wire.VIDEO_RESPONSE,
        "STREAM_RESPONSE": wire.STREAM_RESPONSE,
    }


def markdown(tensors: tuple[Tensor, ...]) -> str:
    """Format a table in KServe terms, where Triton's STRING is BYTES."""
    rows = ["| tensor | type | shape | description |", "|---|---|---|---|"]
    for tensor in tensors:
        dtype = "BYTES" if tensor.dtype == "STRING" else tensor.dtype
        shape = ", ".join("n" if size == -1 else str(size) for size in tensor.dims)
        rows.append(f"| `{tensor.name}` | {dtype} | [{shape}] | {tensor.doc} |")
    return "\n".join(rows) + "\n"


def filled(page: str) -> str:
    """Return `page` with all generated tables up to date."""
    known = tables()
    return _PLACE.sub(lambda place: place[1] + markdown(known[place["name"]]) + place[3], page)


if __name__ == "__main__":
    path = Path(sys.argv[1])
    path.write_text(filled(path.read_text()))
