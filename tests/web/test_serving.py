"""Who may open the page, and what is refused before anything is loaded."""

import socket

import pytest

from runtime.composition import compose
from web.painters import choices
from web.serving import is_loopback, serve, warning


def test_only_addresses_of_this_machine_go_without_a_warning():
    assert [is_loopback(host) for host in ("127.0.0.1", "127.8.8.8", "::1", "localhost")] == [True] * 4
    assert [is_loopback(host) for host in ("0.0.0.0", "::", "192.168.0.7", "10.0.0.1", "example.org")] == [False] * 5
    assert warning("127.0.0.1") is None
    assert warning("0.0.0.0").startswith("warning: host=0.0.0.0: whoever reaches this machine can draw")


def test_a_port_that_is_taken_is_refused_in_one_line():
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        with pytest.raises(ValueError, match=f"^host=127.0.0.1 port={port}: .*; name another with port=N"):
            serve(compose("app", [f"port={port}"]))


def test_the_runs_of_a_folder_can_be_chosen_and_the_named_one_comes_first(short_run, tmp_path):
    run = str(short_run[0].run)
    cfg = compose("app", [f"paths.runs={tmp_path}", f"run={run}", "++sampler.steps=3"])
    (found,) = choices(cfg)
    assert (found.title, found.method, found.run_cfg.sampler.steps) == (f"{run} (regions)", "regions", 3)
    assert found.file.name == "step=4.ckpt"
    (tmp_path / "begun").mkdir()
    (tmp_path / "begun" / "config.yaml").write_text("conditioning: {}\n")  # without a checkpoint
    assert [choice.title for choice in choices(cfg)] == [found.title]
    with pytest.raises(ValueError, match=f"^paths.runs={tmp_path}: holds no run with a checkpoint; train one"):
        choices(compose("app", [f"paths.runs={tmp_path}"]))
