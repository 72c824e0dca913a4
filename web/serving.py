"""Serves the page on this machine, and nothing else: it loads nothing from elsewhere and tells nobody that it runs."""

from __future__ import annotations

import atexit
import ipaddress
import os
import shutil
import socket
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from omegaconf import DictConfig

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

# The browser itself refuses what the page would fetch elsewhere. Gradio needs inline scripts and workers made of text.
POLICY = (
    "default-src 'self' data: blob:; script-src 'self' 'unsafe-inline' 'unsafe-eval' blob:; "
    "style-src 'self' 'unsafe-inline'; frame-ancestors 'none'; form-action 'self'; base-uri 'self'"
)
MOST_PIXELS = 40_000_000  # of a picture that a browser may send


def serve(cfg: DictConfig) -> None:
    """Serves the page until the process is interrupted.

    Args:
        cfg: What `app.py` was asked for.

    Raises:
        ValueError: Gradio is not installed, the port is taken, or there is nothing to draw with.
    """
    _check_free(cfg.host, cfg.port)
    folder = _prepared()
    try:
        import gradio
    except ImportError as error:
        raise ValueError(
            f"app.py: {error.name} is not installed; make setup, or pip install -r requirements.txt"
        ) from None

    from PIL import Image
    from starlette.middleware import Middleware
    from starlette.middleware.trustedhost import TrustedHostMiddleware

    from web.page import CSS, build_page

    Image.MAX_IMAGE_PIXELS = MOST_PIXELS
    page = build_page(cfg, folder)
    # A page of another name that leads here is refused, so that no site a browser visits can ask.
    hosts = ["127.0.0.1", "localhost", "[::1]", cfg.host] if is_loopback(cfg.host) else ["*"]
    if (said := warning(cfg.host)) is not None:
        print(said, flush=True)
    page.queue(max_size=32)
    _, url, _ = page.launch(
        server_name=cfg.host,
        server_port=cfg.port,
        share=False,
        inbrowser=False,
        quiet=True,
        prevent_thread_lock=True,
        max_file_size=cfg.upload_bytes,
        enable_monitoring=False,
        run_history=False,
        footer_links=[],
        ssr_mode=False,
        pwa=False,
        mcp_server=False,
        css=CSS,
        # without fonts that a theme would fetch
        theme=gradio.themes.Default(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"]),
        app_kwargs={
            "middleware": [
                Middleware(TrustedHostMiddleware, allowed_hosts=hosts),
                Middleware(_Headers),
            ]
        },
    )
    print(f"{url} (stop it with Ctrl-C)", flush=True)
    page.block_thread()


class _Headers:
    """Adds the policy to every answer.

    Args:
        app: What answers.
    """

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answers as the application does, with two headers more."""

        async def with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                added = [(b"content-security-policy", POLICY.encode()), (b"x-content-type-options", b"nosniff")]
                message["headers"] = [*message.get("headers", []), *added]
            await send(message)

        await self.app(scope, receive, with_headers if scope["type"] == "http" else send)


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches what listens at a host."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def warning(host: str) -> str | None:
    """What to say of a host that others reach; None for this machine alone."""
    if is_loopback(host):
        return None
    return f"warning: host={host}: whoever reaches this machine can draw with its runs; there is no password"


def _check_free(host: str, port: int) -> None:
    """Refuses a port that something else listens at, before anything is loaded."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise ValueError(
                f"host={host} port={port}: {error.strerror}; name another with port=N, or an address of this machine with "
                "host=127.0.0.1"
            ) from None


def _prepared() -> Path:
    """A folder for what the page makes, gone with the process; Gradio is told to keep its files there and to call nobody."""
    folder = Path(tempfile.mkdtemp(prefix="scenograph-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    os.environ.update(
        GRADIO_ANALYTICS_ENABLED="False",
        GRADIO_TEMP_DIR=str(folder / "gradio"),
        HF_HUB_DISABLE_TELEMETRY="1",
        DO_NOT_TRACK="1",
    )
    return folder
