"""The Grafana dashboard: `python deploy/grafana/build.py > deploy/grafana/saccade.json`."""

from dashboard import caches, engine, images, overview, tokens
from dashboard.panels import SERVERS, Section
from grafana_foundation_sdk.builders.dashboard import (
    AnnotationQuery,
    Dashboard,
    DatasourceVariable,
    QueryVariable,
    Row,
    TextBoxVariable,
)
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models.dashboard import Dashboard as Model
from grafana_foundation_sdk.models.dashboard import (
    DashboardCursorSync,
    DataSourceRef,
    VariableOption,
    VariableRefresh,
    VariableSort,
)

SOURCE = DataSourceRef(type_val="prometheus", uid="${datasource}")
SECTIONS = (overview.SECTION, images.SECTION, tokens.SECTION, caches.SECTION, engine.SECTION)
ENGINE = "vllm:kv_cache_usage_perc"  # every server has this metric
RESTARTS = f"changes(process_start_time_seconds{{{SERVERS}}}[$__rate_interval]) > 0"
ALERTS = 'ALERTS{alertname=~"Saccade.*", alertstate="firing"}'


def build() -> Model:
    dashboard = (
        Dashboard("Saccade")
        .uid("saccade")
        .description("Serving of vision-language models: requests, the path of images, tokens and"
                     " their cost, caches, and the engine.")
        .tags(["saccade", "vllm", "inference"])
        .time("now-1h", "now")
        .refresh("30s")
        .tooltip(DashboardCursorSync.CROSSHAIR)
        .annotation(_annotation("Alerts", ALERTS, "red"))
        .annotation(_annotation("Restarts", RESTARTS, "blue"))
        .with_variable(DatasourceVariable("datasource").label("Data source").type("prometheus"))
        .with_variable(_choice("model_name", "Model", f"label_values({ENGINE}, model_name)"))
        .with_variable(_choice(
            "instance", "Server",
            f'label_values({ENGINE}{{model_name=~"$model_name"}}, instance)'))
        .with_variable(
            QueryVariable("ttft").label("Goal for the first token (s)")
            .description("Requests whose first token came within this time are goodput."
                         " The buckets of the histogram are the choices.")
            .datasource(SOURCE)
            .query("label_values(saccade_time_to_first_token_seconds_bucket, le)")
            .regex("/^[0-9.]+$/")
            .sort(VariableSort.NUMERICAL_ASC)
            .refresh(VariableRefresh.ON_DASHBOARD_LOAD)
            .current(VariableOption(True, "2.5", "2.5")))
        .with_variable(
            TextBoxVariable("price").label("$ per GPU and hour")
            .description("What one accelerator costs per hour.")
            .default_value("2.50").current(VariableOption(True, "2.50", "2.50")))
    )  # fmt: skip
    for section in SECTIONS:
        _add(dashboard, section)
    model = dashboard.build()
    for number, panel in enumerate(_all_panels(model), 1):
        panel.id_val = number
    return model


def _add(dashboard: Dashboard, section: Section) -> None:
    """A closed row contains its panels; the panels of an open row follow it."""
    row = Row(section.title)
    for panel in section.panels:
        panel.datasource(SOURCE)
        if section.closed:
            row.with_panel(panel)
    dashboard.with_row(row)
    for panel in () if section.closed else section.panels:
        dashboard.with_panel(panel)


def _all_panels(model: Model) -> list:
    panels = model.panels or []
    return [each for panel in panels for each in (panel, *(getattr(panel, "panels", None) or ()))]


def _choice(name: str, label: str, query: str) -> QueryVariable:
    return (
        QueryVariable(name).label(label).datasource(SOURCE).query(query)
        .sort(VariableSort.NATURAL_ASC).refresh(VariableRefresh.ON_TIME_RANGE_CHANGED)
        .multi(True).include_all(True).current(VariableOption(True, ["All"], ["$__all"]))
    )  # fmt: skip


def _annotation(name: str, query: str, color: str) -> AnnotationQuery:
    annotation = AnnotationQuery().name(name).datasource(SOURCE).enable(True)
    return annotation.icon_color(color).expr(query)


if __name__ == "__main__":
    print(JSONEncoder(sort_keys=True, indent=2).encode(build()))
