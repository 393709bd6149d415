"""Rows of layer `buildings` made up in tests."""

from typing import Any

import numpy as np
import pyarrow as pa
import shapely
from numpy.typing import NDArray

from segpipe.pipeline.rows import SCHEMA


def published_rows(geometries: NDArray[np.object_], **columns: Any) -> pa.RecordBatch:
    """A batch with the columns of SCHEMA: those given, and for the others the same in every row."""
    plain: dict[Any, Any] = {pa.string(): "a", pa.float64(): 0.5, pa.int64(): 4, pa.int32(): 0, pa.bool_(): False}
    values = {field.name: [plain.get(field.type)] * len(geometries) for field in SCHEMA} | columns
    values["geometry"] = shapely.to_wkb(geometries)
    return pa.record_batch([pa.array(values[field.name], field.type) for field in SCHEMA], schema=SCHEMA)
