"""Default styles of layers, as QGIS keeps them: QML."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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
    return _qml(
        f'<renderer-v2 type="{kind}" symbollevels="0" enableorderby="0" forceraster="0"'
        + (f' attr="{attribute}"><categories>{categories}</categories>' if attribute else ">")
        + f"<symbols>{symbols}</symbols><rotation/><sizescale/></renderer-v2>"
    )


def _graduated_qml(attribute: str, classes: Sequence[tuple[float, float, _Fill]]) -> str:
    """A QGIS 3 layer style: a symbol for each range of an attribute, lower limits exclusive but for the first."""
    symbols = "".join(_symbol(number, fill) for number, (_, _, fill) in enumerate(classes))
    ranges = "".join(
        f'<range render="true" symbol="{number}" lower="{low:.4f}" upper="{high:.4f}" label="{low:g} to {high:g}"/>'
        for number, (low, high, _) in enumerate(classes)
    )
    return _qml(
        f'<renderer-v2 type="graduatedSymbol" attr="{attribute}" graduatedMethod="GraduatedColor" symbollevels="0"'
        f' enableorderby="0" forceraster="0"><ranges>{ranges}</ranges><symbols>{symbols}</symbols>'
        "<rotation/><sizescale/></renderer-v2>"
    )


def _qml(renderer: str) -> str:
    return (
        "<!DOCTYPE qgis PUBLIC 'http://mrcc.com/qgis.dtd' 'SYSTEM'>\n"
        f'<qgis version="3.22.0" styleCategories="Symbology">{renderer}'
        "<blendMode>0</blendMode><featureBlendMode>0</featureBlendMode><layerGeometryType>2</layerGeometryType></qgis>"
    )


def _raster_qml(stops: Sequence[tuple[float, tuple[int, int, int], str]]) -> str:
    """A QGIS 3 style of a raster of one band: colours interpolated between stops (value, red green blue, label)."""
    items = "".join(
        f'<item value="{value:g}" alpha="255" color="#{red:02x}{green:02x}{blue:02x}" label="{label}"/>'
        for value, (red, green, blue), label in stops
    )
    low, high = stops[0][0], stops[-1][0]
    return (
        "<!DOCTYPE qgis PUBLIC 'http://mrcc.com/qgis.dtd' 'SYSTEM'>\n"
        '<qgis version="3.22.0" styleCategories="Symbology"><pipe>'
        f'<rasterrenderer type="singlebandpseudocolor" band="1" opacity="1" alphaBand="-1"'
        f' classificationMin="{low:g}" classificationMax="{high:g}"><rastershader>'
        f'<colorrampshader colorRampType="INTERPOLATED" classificationMode="1" clip="0" minimumValue="{low:g}"'
        f' maximumValue="{high:g}">{items}</colorrampshader></rastershader></rasterrenderer>'
        "</pipe><blendMode>0</blendMode></qgis>"
    )


RAMP = ((68, 1, 84), (59, 82, 139), (33, 145, 140), (94, 201, 98), (253, 231, 37))
"""Dark for improbable, light for probable, and as far apart for those who see colours otherwise (viridis)."""


def ramp_rgb(share: float) -> tuple[int, int, int]:
    """The colour of a share of 0 to 1."""
    at = min(max(share, 0.0), 1.0) * (len(RAMP) - 1)
    first = min(int(at), len(RAMP) - 2)
    red, green, blue = (round(a + (b - a) * (at - first)) for a, b in zip(*RAMP[first : first + 2], strict=True))
    return red, green, blue


PROBABILITY_QML = _raster_qml(
    [(number / (len(RAMP) - 1), rgb, f"{number / (len(RAMP) - 1):.0%}") for number, rgb in enumerate(RAMP)]
)
"""QGIS shows values with the scale that the raster carries: 0 to 1."""

CONFIDENCE_QML = _graduated_qml(
    "confidence",
    [
        (0.0, 0.5, _Fill("215,48,39,120", "165,0,38,255")),
        (0.5, 0.6, _Fill("252,141,89,120", "215,78,30,255")),
        (0.6, 0.7, _Fill("254,224,139,120", "200,160,40,255")),
        (0.7, 0.8, _Fill("217,239,139,120", "140,170,50,255")),
        (0.8, 0.9, _Fill("145,207,96,120", "80,150,50,255")),
        (0.9, 1.0, _Fill("26,152,80,120", "0,104,55,255")),
    ],
)
"""Red where a building is to be doubted, green where it is sure."""
TILES_QML = _style_qml(
    {
        "used": _Fill("0,0,0,0", "90,90,90,255"),
        "skipped": _Fill("214,39,40,60", "214,39,40,255"),
        "not seen": _Fill("0,0,0,0", "170,170,170,255"),
    },
    attribute="status",
)
SKIPPED_QML = _style_qml({"skipped": _Fill("214,39,40,60", "214,39,40,255", 0.5)})
RUN_QML = _style_qml({"run": _Fill("0,0,0,0", "31,119,180,255", 0.6)})
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
