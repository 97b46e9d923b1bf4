"""What the panels have in common: their look, and common queries."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from grafana_foundation_sdk.builders import heatmap as heatmaps
from grafana_foundation_sdk.builders import stat as stats
from grafana_foundation_sdk.builders import table as tables
from grafana_foundation_sdk.builders import timeseries as lines
from grafana_foundation_sdk.builders.common import (
    ReduceDataOptions,
    StackingConfig,
    VizLegendOptions,
    VizTooltipOptions,
)
from grafana_foundation_sdk.builders.dashboard import ThresholdsConfig
from grafana_foundation_sdk.builders.prometheus import Dataquery
from grafana_foundation_sdk.models.common import (
    BigValueGraphMode,
    LegendDisplayMode,
    LegendPlacement,
    SortOrder,
    StackingMode,
    TooltipDisplayMode,
    VisibilityMode,
)
from grafana_foundation_sdk.models.dashboard import (
    DataTransformerConfig,
    Threshold,
    ThresholdsMode,
)
from grafana_foundation_sdk.models.prometheus import PromQueryFormat

SERVERS = 'instance=~"$instance"'
_ENGINES = f'{SERVERS}, model_name=~"$model_name"'
_HEIGHT, _STAT_HEIGHT = 8, 4

Panel = lines.Panel | stats.Panel | heatmaps.Panel | tables.Panel
AnyPanel = TypeVar("AnyPanel", lines.Panel, stats.Panel, heatmaps.Panel, tables.Panel)
Queries = Mapping[str, str]  # legend -> query


@dataclass(frozen=True)
class Section:
    """A row of the dashboard; Grafana runs the queries of a closed row when it is opened."""

    title: str
    panels: Sequence[Panel]
    closed: bool = False


def select(metric: str, labels: str = "") -> str:
    """The series of the selected servers; for vLLM's metrics, also of the selected models."""
    chosen = _ENGINES if metric.startswith("vllm:") else SERVERS
    return f"{metric}{{{', '.join(filter(None, (chosen, labels)))}}}"


def rate(metric: str, labels: str = "", by: str = "") -> str:
    """A counter's increase per second, summed over the servers."""
    return f"{_sum(by)} (rate({select(metric, labels)}[$__rate_interval]))"


def increase(metric: str, labels: str = "", by: str = "", over: str = "$__range") -> str:
    """A counter's increase, by default over the whole range of the dashboard."""
    return f"{_sum(by)} (increase({select(metric, labels)}[{over}]))"


def total(metric: str, labels: str = "", by: str = "") -> str:
    """A gauge, summed over the servers."""
    return f"{_sum(by)} ({select(metric, labels)})"


def ratio(part: str, whole: str) -> str:
    """Returns no value while the denominator is 0, instead of NaN."""
    return f"{part} / ({whole} > 0)"


def quantile(q: float, histogram: str, labels: str = "", by: str = "") -> str:
    buckets = rate(f"{histogram}_bucket", labels, by=f"{by}, le" if by else "le")
    return f"histogram_quantile({q}, {buckets})"


def mean(histogram: str, labels: str = "") -> str:
    return f"{rate(f'{histogram}_sum', labels)} / {rate(f'{histogram}_count', labels)}"


def percentiles(histogram: str, labels: str = "", legend: str = "") -> Queries:
    """The median, and the slowest 10 and 1 in 100."""
    return {
        f"{legend} p{round(100 * q)}".strip(): quantile(q, histogram, labels)
        for q in (0.5, 0.9, 0.99)
    }


def timeseries(
    title: str,
    description: str,
    unit: str,
    queries: Queries,
    *,
    stack: bool = False,
    width: int = 8,
    maximum: float | None = None,
) -> lines.Panel:
    panel = lines.Panel().unit(unit).min(0).fill_opacity(30 if stack else 8).line_width(1)
    panel.show_points(VisibilityMode.AUTO)
    panel.legend(
        VizLegendOptions()
        .display_mode(LegendDisplayMode.TABLE)
        .placement(LegendPlacement.BOTTOM)
        .calcs(["mean", "max"])
    )
    panel.tooltip(VizTooltipOptions().mode(TooltipDisplayMode.MULTI).sort(SortOrder.DESCENDING))
    if stack:
        panel.stacking(StackingConfig().mode(StackingMode.NORMAL))
    if maximum is not None:
        panel.max(maximum)
    return _ask(_placed(panel, title, description, width, _HEIGHT), queries)


def stat(
    title: str,
    description: str,
    unit: str,
    query: str,
    *,
    steps: Sequence[tuple[float | None, str]] = ((None, "blue"),),
    decimals: int | None = None,
    instant: bool = False,
) -> stats.Panel:
    """One number; `steps` are colours by lowest value. `instant`: one value for the whole range."""
    panel = stats.Panel().unit(unit).reduce_options(ReduceDataOptions().calcs(["lastNotNull"]))
    panel.graph_mode(BigValueGraphMode.NONE if instant else BigValueGraphMode.AREA)
    panel.thresholds(
        ThresholdsConfig()
        .mode(ThresholdsMode.ABSOLUTE)
        .steps([Threshold(value, color) for value, color in steps])
    )
    if decimals is not None:
        panel.decimals(decimals)
    _placed(panel, title, description, 4, _STAT_HEIGHT)
    return _ask(panel, {"": query}, instant=instant)


def heatmap(
    title: str, description: str, unit: str, histogram: str, labels: str = ""
) -> heatmaps.Panel:
    """The distribution of a histogram's values over time."""
    panel = heatmaps.Panel().calculate(False).y_axis(heatmaps.YAxisConfig().unit(unit))
    panel.color(heatmaps.HeatmapColorOptions().scheme("Oranges").steps(64)).hide_legend()
    _placed(panel, title, description, 8, _HEIGHT)
    query = rate(f"{histogram}_bucket", labels, by="le")
    return _ask(panel, {"{{le}}": query}, format=PromQueryFormat.HEATMAP)


def table(
    title: str, description: str, queries: Queries, *, renamed: Mapping[str, str], width: int
) -> tables.Panel:
    """A row for each series; queries with the same labels become columns of the same row.

    The values of the queries are the columns `Value #A`, `Value #B`, ...; `renamed` gives titles.
    """
    panel = tables.Panel()
    panel.with_transformation(DataTransformerConfig("merge", options={}))
    organize: dict[str, Any] = {"excludeByName": {"Time": True}, "renameByName": dict(renamed)}
    panel.with_transformation(DataTransformerConfig("organize", options=organize))
    _placed(panel, title, description, width, _HEIGHT)
    return _ask(panel, queries, instant=True, format=PromQueryFormat.TABLE)


def _placed(panel: AnyPanel, title: str, description: str, width: int, height: int) -> AnyPanel:
    return panel.title(title).description(description).span(width).height(height)


def _ask(
    panel: AnyPanel,
    queries: Queries,
    *,
    instant: bool = False,
    format: PromQueryFormat = PromQueryFormat.TIME_SERIES,
) -> AnyPanel:
    for letter, (legend, query) in zip("ABCDEFGHIJKLMNOP", queries.items(), strict=False):
        target = Dataquery().ref_id(letter).expr(query).legend_format(legend).format(format)
        panel.with_target(target.instant() if instant else target.range())
    return panel


def _sum(by: str) -> str:
    return f"sum by ({by})" if by else "sum"
