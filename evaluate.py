"""Evaluate a run, an adapter file or given pictures: draw, score, report; over any number of processes."""

from omegaconf import DictConfig

from runtime.command import command


def main(cfg: DictConfig) -> None:
    """Scores the run, or the pictures, that the configuration names."""
    from evaluation.settings import evaluated_config, sweep_job

    run_cfg, job = evaluated_config(cfg), sweep_job(cfg)

    from evaluation.evaluate import evaluate
    from evaluation.report.wording import verdict
    from evaluation.sweep_table import keep_job

    result = evaluate(cfg, run_cfg, job=job)
    if "pending" in result:
        print(f"{result['out']}: done here; {result['pending']} pictures or rows are still to come from other ranks")
        return
    print(verdict({arm: {n: v.__dict__ for n, v in values.items()} for arm, values in result["values"].items()}))
    print(f"{result['out'] / 'metrics.json'}\n{result['out'] / 'report.html'}")
    if job is not None:
        keep_job(result["out"])


if __name__ == "__main__":
    command("evaluate", main)
