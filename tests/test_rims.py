"""Law of publishing in blocks: which buildings beside a block are held in memory changes nothing that is published."""

from collections.abc import Callable

import pytest
from conftest import City, map_it, outputs

from segpipe.pipeline import publish

pytestmark = pytest.mark.usefixtures("in_process")


def test_rows_do_not_depend_on_how_many_neighbours_are_held(
    make_city: Callable[..., City], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(publish, "ORDER_CELL_PX", 128)
    vector = {"min_area_m2": 2, "simplify_m": 1.5, "regularize": "orthogonal"}
    config = make_city(grid={"chunk_px": 64, "block_px": 128}, vectorize=vector).config
    found = []
    for rim_px, blocks in ((64, 32), (8, 32), (0, 3), (8, 0)):
        monkeypatch.setattr(publish, "RIM_PX", rim_px)
        monkeypatch.setattr(publish, "RIM_BLOCKS", blocks)
        for name in ("manifest.json", "buildings.gpkg"):
            (config.parent / "run" / name).unlink(missing_ok=True)
        map_it(config)
        found.append(outputs(config.parent / "run")["rows"])
    assert "raw" in found[0]["outline"]
    assert all(rows == found[0] for rows in found)
