"""Evaluate a run: reload its own configuration, generate, score, report."""

from omegaconf import DictConfig

from runtime.command import command


def main(cfg: DictConfig) -> None:
    """Scores the run, or the pictures, that the configuration names."""
    from runtime.run_directory import load_run_config

    run_cfg = load_run_config(cfg.run, cfg)

    from evaluation.wording import verdict
    from runtime.evaluation import evaluate

    result = evaluate(cfg, run_cfg)
    print(verdict({arm: {n: v.__dict__ for n, v in values.items()} for arm, values in result["values"].items()}))
    print(f"{result['out'] / 'metrics.json'}\n{result['out'] / 'report.html'}")


if __name__ == "__main__":
    command("evaluate", main)
