"""The configuration of trained weights: a run's own, or that of an adapter file; torch is imported for the second alone."""

from omegaconf import DictConfig

from runtime.run_directory import load_run_config


def restored_config(cfg: DictConfig) -> DictConfig:
    """The configuration of trained weights.

    Args:
        cfg: What a script was asked for: `run`, or `weights` with `backbone`, and what is laid over.

    Returns:
        The run's own, or that of a file of weights, resolved.

    Raises:
        ValueError: There is no such run, it lacks a key that is set, or the file does not say enough.
    """
    if cfg.run is not None:
        return load_run_config(cfg.run, cfg)

    from runtime.restoring import weights_config

    return weights_config(cfg.weights, cfg)
