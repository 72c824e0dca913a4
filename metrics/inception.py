"""The Inception network of FID, KID and Inception Score, in each of its published forms with that form's own resizing.

Everywhere it is Szegedy et al.'s network of 2015-12-05 with TensorFlow's pooling, as two files: NVIDIA's TorchScript, which
clean-fid takes, and pytorch-fid's state dict. What is done with the features lives in `metrics.fid` and
`metrics.inception_score`. Torch, torchvision and clean-fid are imported with the network, not before.

Legend: B pictures.
"""

from __future__ import annotations

import platform
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np

from metrics.base import NotAvailable
from metrics.weights import file_hash, quiet, weights_file

if TYPE_CHECKING:
    from torch import Tensor

TORCHSCRIPT = "inception-2015-12-05.pt"
STATE_DICT = "pt_inception-2015-12-05-6726825d.pth"
SOURCES = {
    TORCHSCRIPT: f"https://nvlabs-fi-cdn.nvidia.com/stylegan2-ada-pytorch/pretrained/metrics/{TORCHSCRIPT}",
    STATE_DICT: f"https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/{STATE_DICT}",
}
FORMS = {
    "clean": TORCHSCRIPT,
    "legacy_tensorflow": TORCHSCRIPT,
    "legacy_pytorch": STATE_DICT,
    "laion_sg": STATE_DICT,
}
WIDTH = 2048
_SIDE = 299


class Inception:
    """A form of the network.

    Args:
        form: "clean" (clean-fid's: PIL's antialiased bicubic to 299 px, in float), "legacy_tensorflow" (resized bilinearly
            in the network as TensorFlow did), "legacy_pytorch" (bilinear to 299 px without antialiasing), or "laion_sg"
            (LAION-SG's script: bilinear to 256 px without antialiasing, brought to [-1, 1], then to 299 px and normalised
            a second time by pytorch-fid, so that the network sees [-3, 1]).
        weights: The form's file; None for where clean-fid or pytorch-fid keep it.
        batch_size: Pictures that go through the network at once.
        setting: What `weights` is called in the configuration.

    Raises:
        ValueError: An unknown form, or a batch size below 1.

    Source:
        Parmar, Zhang, Zhu 2022, On Aliased Resizing and Surprising Subtleties in GAN Evaluation (the first three forms, as in
        clean-fid 0.1.35); LAION-SG, test/caculate_fid.py (the last).
    """

    def __init__(
        self, form: str = "clean", *, weights: str | Path | None = None, batch_size: int = 32, setting: str = "weights"
    ) -> None:
        if form not in FORMS:
            raise ValueError(f"mode: {form} is no form of the network; choose one of {', '.join(FORMS)}")
        if batch_size < 1:
            raise ValueError(f"batch_size: {batch_size} is too few; give 1 or more")
        self.form, self.weights, self.batch_size, self.setting = form, weights, batch_size, setting
        self.network: Any = None
        self.device: Any = "cpu"

    def file(self) -> Path:
        """The file of the weights.

        Returns:
            The file; it is there.

        Raises:
            NotAvailable: It is not.
        """
        name = FORMS[self.form]
        return weights_file(self.weights, _cached(name), setting=self.setting, source=SOURCES[name])

    def settings(self) -> dict[str, Any]:
        """The form, and its weights by name and hash (None where they are not there), as JSON values."""
        try:
            path = self.file()
        except NotAvailable:
            return {"mode": self.form, "weights": FORMS[self.form], "sha256": None}
        return {"mode": self.form, "weights": path.name, "sha256": file_hash(path)}

    def to(self, device: Any) -> Self:
        """The network on a torch device, loaded where it was not yet.

        Args:
            device: Where it is to work.

        Returns:
            The same.

        Raises:
            NotAvailable: Its weights are not there, or are not those of this form.
        """
        if self.network is None:
            path = self.file()
            try:
                with quiet():
                    self.network = _LOADERS[FORMS[self.form]](path, resize_inside=self.form == "legacy_tensorflow")
            except (RuntimeError, AttributeError, KeyError, OSError) as error:
                raise NotAvailable(
                    f"{path}: not the network of mode {self.form} ({str(error).strip().splitlines()[0]}); "
                    f"download it from {SOURCES[FORMS[self.form]]} and name it by {self.setting}=FILE"
                ) from error
        self.network.to(device)
        self.device = device
        return self

    def features(self, images: Sequence[np.ndarray]) -> np.ndarray:
        """The features before the classifier.

        Args:
            images: B pictures (H, W, 3) uint8 RGB, of any sizes.

        Returns:
            (B, 2048) float32.
        """
        return self._through(images, self._features, WIDTH)

    def probabilities(self, images: Sequence[np.ndarray]) -> np.ndarray:
        """The probabilities of the classes, without the classifier's bias as Salimans et al.'s code computes them.

        Args:
            images: B pictures (H, W, 3) uint8 RGB, of any sizes.

        Returns:
            (B, 1008) float32.

        Raises:
            ValueError: The form has no classifier.
        """
        if self.form != "legacy_tensorflow":
            raise ValueError(f"mode: {self.form} has no classifier here; Inception Score takes legacy_tensorflow")
        return self._through(images, lambda batch: self.network.base(batch, no_output_bias=True), 1008)

    def _features(self, batch: Tensor) -> Tensor:
        out = self.network(batch)
        return out if FORMS[self.form] == TORCHSCRIPT else out[0].flatten(1)

    def _through(self, images: Sequence[np.ndarray], network: Callable[[Tensor], Tensor], width: int) -> np.ndarray:
        import torch

        if self.network is None:
            self.to("cpu")
        resize = _resizer(self.form)
        out = np.empty((len(images), width), dtype=np.float32)
        for places in batches(images, self.batch_size, by_size=self.form == "legacy_tensorflow"):
            batch = torch.stack([resize(images[place]) for place in places])
            with torch.inference_mode():
                out[places] = network(batch.to(self.device)).float().cpu().numpy()
        return out


def _cached(name: str) -> Path:
    """Where clean-fid and pytorch-fid keep a file once they have downloaded it."""
    if name == TORCHSCRIPT:
        return Path("./" if platform.system() == "Windows" else "/tmp") / name
    import torch

    return Path(torch.hub.get_dir()) / "checkpoints" / name


def _torchscript(path: Path, *, resize_inside: bool) -> Any:
    from cleanfid.inception_torchscript import InceptionV3W

    if path.name != TORCHSCRIPT:
        raise OSError(f"clean-fid opens files called {TORCHSCRIPT} alone")
    return InceptionV3W(str(path.parent), download=False, resize_inside=resize_inside).eval()


def _state_dict(path: Path, **_: Any) -> Any:
    """pytorch-fid's network, which left alone would fetch its weights from the network while it is built."""
    import torch
    from cleanfid import inception_pytorch

    stored = torch.load(path, map_location="cpu", weights_only=True)
    download = inception_pytorch.load_state_dict_from_url
    inception_pytorch.load_state_dict_from_url = lambda *_, **__: stored
    try:
        return inception_pytorch.InceptionV3(output_blocks=[3], resize_input=False).eval()
    finally:
        inception_pytorch.load_state_dict_from_url = download


_LOADERS = {TORCHSCRIPT: _torchscript, STATE_DICT: _state_dict}


def _resizer(form: str) -> Callable[[np.ndarray], Tensor]:
    """What brings a picture (H, W, 3) uint8 to what the form's network takes, (3, h, w) float32."""
    import torch
    from cleanfid.resize import build_resizer
    from torch.nn.functional import interpolate

    def planes(array: np.ndarray) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(array.transpose(2, 0, 1), dtype=np.float32))

    def laion_sg(image: np.ndarray) -> Tensor:
        small = interpolate(planes(image)[None] / 255, size=(256, 256), mode="bilinear", align_corners=False)
        return interpolate(2 * small - 1, size=(_SIDE, _SIDE), mode="bilinear", align_corners=False)[0]

    if form == "laion_sg":
        return laion_sg
    with quiet():  # it would switch warnings off for the whole process
        resize = build_resizer(form)
    if form == "legacy_pytorch":
        return lambda image: planes(resize(image.copy())) / 255  # torch warns of arrays that cannot be written to
    return lambda image: planes(resize(image))


def batches(images: Sequence[np.ndarray], batch_size: int, *, by_size: bool) -> Iterator[list[int]]:
    """Places of pictures that can go through a network together: of one size, where it takes them as they are."""
    groups: dict[Any, list[int]] = {}
    for place, image in enumerate(images):
        groups.setdefault(image.shape if by_size else None, []).append(place)
    for places in groups.values():
        for begin in range(0, len(places), batch_size):
            yield places[begin : begin + batch_size]
