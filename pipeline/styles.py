"""Default styles of layers, as QGIS keeps them: QML."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class _Fill:
    """How a polygon is drawn. Colours are red, green, blue and opacity, 0 to 255."""

    fill_rgba: str
    outline_rgba: str
    outline_mm: float = 0.3


def _symbol(number: int, fill: _Fill) -> str:
    """A simple fill in QGIS's terms. Options are read by 3.18 and newer, props by older ones."""
    values = {
        "color": fill.fill_rgba,
        "joinstyle": "miter",
        "offset": "0,0",
        "offset_unit": "MM",
        "outline_color": fill.outline_rgba,
        "outline_style": "solid",
        "outline_width": str(fill.outline_mm),
        "outline_width_unit": "MM",
        "style": "solid",
    }
    options = "".join(f'<Option name="{name}" type="QString" value="{value}"/>' for name, value in values.items())
    props = "".join(f'<prop k="{name}" v="{value}"/>' for name, value in values.items())
    return (
        f'<symbol type="fill" name="{number}" alpha="1" clip_to_extent="1" force_rhr="0">'
        f'<layer class="SimpleFill" enabled="1" locked="0" pass="0">'
        f'<Option type="Map">{options}</Option>{props}</layer></symbol>'
    )


def _style_qml(fills: Mapping[str, _Fill], attribute: str | None = None) -> str:
    """A QGIS 3 layer style: one symbol for all, or one for each value of an attribute."""
    symbols = "".join(_symbol(number, fill) for number, fill in enumerate(fills.values()))
    categories = "".join(
        f'<category render="true" type="string" symbol="{number}" value="{value}" label="{value}"/>'
        for number, value in enumerate(fills)
    )
    kind = "singleSymbol" if attribute is None else "categorizedSymbol"
    return (
        "<!DOCTYPE qgis PUBLIC 'http://mrcc.com/qgis.dtd' 'SYSTEM'>\n"
        '<qgis version="3.22.0" styleCategories="Symbology">'
        f'<renderer-v2 type="{kind}" symbollevels="0" enableorderby="0" forceraster="0"'
        + (f' attr="{attribute}"><categories>{categories}</categories>' if attribute else ">")
        + f"<symbols>{symbols}</symbols><rotation/><sizescale/></renderer-v2>"
        "<blendMode>0</blendMode><featureBlendMode>0</featureBlendMode><layerGeometryType>2</layerGeometryType></qgis>"
    )


STYLE_QML = _style_qml({"buildings": _Fill("255,127,14,80", "214,78,0,255")})
CHANGES_QML = _style_qml(
    {
        "added": _Fill("44,160,44,110", "23,110,23,255"),
        "removed": _Fill("214,39,40,110", "140,15,20,255"),
        "modified": _Fill("31,119,180,110", "15,75,125,255"),
    },
    attribute="change",
)
VERDICTS_QML = _style_qml(
    {
        "hit": _Fill("44,160,44,90", "23,110,23,255"),
        "false alarm": _Fill("255,127,14,110", "190,80,0,255"),
        "miss": _Fill("214,39,40,110", "140,15,20,255"),
        "not judged": _Fill("150,150,150,90", "90,90,90,255"),
    },
    attribute="verdict",
)
