"""Every file of `conf/metric` composes, alone and with all others, and builds its metric without opening a model."""

import pytest
from hydra.utils import instantiate

from metrics.base import Metric
from runtime.composition import CONF, compose

METRICS = sorted(path.stem for path in (CONF / "metric").glob("*.yaml"))


def test_all_metrics_compose_together():
    cfg = compose("evaluate", ["run=RUN", f"metric=[{','.join(METRICS)}]"])
    assert sorted(cfg.metric) == METRICS


@pytest.mark.parametrize("name", METRICS)
def test_a_metric_is_built_from_its_file(name):
    cfg = compose("evaluate", ["run=RUN", f"metric=[{name}]"])
    metric = instantiate(cfg.metric[name], _convert_="all")
    assert isinstance(metric, Metric)
    assert isinstance(metric.settings(), dict)
