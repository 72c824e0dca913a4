"""A negative prompt that is named by its file is in the configuration itself."""

import re

import pytest

from evaluation.settings import evaluated_config
from runtime.composition import compose

TEXT = "out of frame, lowres"


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "negative.txt"
    path.write_text(f"  {TEXT.replace(', ', ',')}\n".replace(",", ",\n"))
    return path


def test_the_text_takes_the_place_of_the_file(file, short_run):
    cfg = compose("train", [f"sampler.negative_prompt_file={file}"])
    assert cfg.sampler.negative_prompt == TEXT
    assert "negative_prompt_file" not in cfg.sampler
    assert "negative_prompt_file" not in compose("train").sampler
    run = f"run={short_run[0].run}"
    for given in (
        [f"++sampler.negative_prompt_file={file}"],
        ["sampler=euler", f"sampler.negative_prompt_file={file}"],
        ["protocol=rich_context_coco", "protocol.size=null", f"protocol.sampler.negative_prompt_file={file}"],
    ):
        drawn = evaluated_config(compose("evaluate", [run, *given]))
        assert drawn.sampler.negative_prompt == TEXT, given
    own = [f"protocol.sampler.negative_prompt_file={file}", "protocol=rich_context_coco", "++sampler.negative_prompt=b"]
    assert evaluated_config(compose("evaluate", [run, *own])).sampler.negative_prompt == "b"


def test_a_file_that_gives_no_text_is_refused(file, tmp_path):
    (tmp_path / "empty").write_text(" \n")
    (tmp_path / "bytes").write_bytes(b"\xff\xfe\xff")
    for name, message in (("empty", "holds no text"), ("bytes", "it is no UTF-8 text"), ("away", "cannot be read")):
        with pytest.raises(
            ValueError, match=f"sampler.negative_prompt_file={re.escape(str(tmp_path / name))}: .*{message}"
        ):
            compose("train", [f"sampler.negative_prompt_file={tmp_path / name}"])
    with pytest.raises(ValueError, match="sampler.negative_prompt is set too"):
        compose("train", [f"sampler.negative_prompt_file={file}", "sampler.negative_prompt=a"])
