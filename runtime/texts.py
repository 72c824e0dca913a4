"""Texts that a configuration names by their file: read once, when it is composed.

So a run, a picture's record and a manifest have the text itself, and do not depend on what becomes of the file.
"""

from pathlib import Path

from omegaconf import DictConfig, OmegaConf, open_dict

from runtime.overrides import ConfigError


def read_texts(cfg: DictConfig) -> None:
    """Puts the text of `negative_prompt_file` in the place of `negative_prompt`.

    Args:
        cfg: A composed configuration, changed in place: the key goes, of the sampler and of a protocol's.

    Raises:
        ConfigError: The file cannot be read or is empty, or there is a text beside it.
    """
    for where in ("sampler", "protocol.sampler"):
        node = OmegaConf.select(cfg, where)
        if not isinstance(node, DictConfig) or "negative_prompt_file" not in node:
            continue
        with open_dict(node):
            if (file := node.pop("negative_prompt_file")) is None:
                continue
            said = f"{where}.negative_prompt_file={file}"
            if node.get("negative_prompt") is not None:
                raise ConfigError(f"{said}: {where}.negative_prompt is set too; leave one of them out")
            try:
                text = " ".join(Path(file).read_text(encoding="utf-8").split())
            except (OSError, UnicodeDecodeError) as error:
                why = error.strerror if isinstance(error, OSError) else "it is no UTF-8 text"
                raise ConfigError(f"{said}: cannot be read ({why}); name a file with the text") from error
            if not text:
                raise ConfigError(f"{said}: holds no text; put it there, or leave this out")
            node.negative_prompt = text
