import pytest

from loggers.metrics_csv import MetricsCsv, read_metrics


@pytest.fixture
def log(tmp_path):
    return MetricsCsv(file=tmp_path / "run" / "metrics.csv")


def test_figures_are_appended_and_epochs_left_out(log):
    log.log_metrics({"loss": 0.5, "epoch": 0}, step=1)
    MetricsCsv(file=log.file).log_metrics({"loss": 0.25, "iou": 0.125}, step=2)
    assert read_metrics(log.file) == [(1, "loss", 0.5), (2, "loss", 0.25), (2, "iou", 0.125)]


def test_rewinding_drops_what_came_after_the_step(log):
    for step in range(5):
        log.log_metrics({"loss": float(step)}, step=step)
    log.rewind(2)
    assert [step for step, _, _ in read_metrics(log.file)] == [0, 1, 2]
    log.log_metrics({"loss": 9.0}, step=3)
    assert read_metrics(log.file)[-1] == (3, "loss", 9.0)


def test_what_comes_again_at_the_step_itself_is_there_once(log):
    rows = [(1, "loss", 0.5), (2, "score", 0.25), (2, "loss", 0.125), (3, "score", 1.0), (3, "loss", 2.0)]
    for step, name, value in rows:
        log.log_metrics({name: value}, step=step)
    again = MetricsCsv(file=log.file)
    again.rewind(2)
    for step, name, value in rows[2:]:
        again.log_metrics({name: value}, step=step)
    assert read_metrics(log.file) == rows


@pytest.mark.parametrize("torn", ["4,lo", "4,loss", "4,loss,"])
def test_a_torn_last_line_is_passed_over(torn, log):
    log.log_metrics({"loss": 1.0}, step=3)
    with log.file.open("a") as lines:
        lines.write(torn)
    assert read_metrics(log.file) == [(3, "loss", 1.0)]
    log.rewind(3)
    log.log_metrics({"loss": 2.0}, step=4)
    assert read_metrics(log.file) == [(3, "loss", 1.0), (4, "loss", 2.0)]


def test_no_file_is_no_figures(log):
    assert read_metrics(log.file) == []
    log.rewind(0)
    assert not log.file.exists()


def test_lines_without_a_figure_are_passed_over_and_counted(tmp_path):
    file = tmp_path / "metrics.csv"
    file.write_bytes(b"step,name,value\r\n1,loss,0.5\r\n\xff,\x9b,x\r\n2,loss,much\r\n3,loss,0.25\r\n")
    with pytest.warns(UserWarning, match="metrics.csv: 2 lines"):
        assert read_metrics(file) == [(1, "loss", 0.5), (3, "loss", 0.25)]
