"""Detectors with a list of their own: transformers' (DETR, RT-DETR and their kin) and YOLO in ONNX files.

Detectors that are asked for words are in `grounding.py`. Pictures of one size are looked at together and others apart: padding to
a common size would change what is found.

Legend: B pictures, N objects of one picture, K classes, A places of a network's grid, S side of its square input in px.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterable, Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np
import torch
from torchvision.ops import batched_nms

from files.quiet import quiet_libraries
from labelling.coco_names import COCO_NAMES
from labelling.parts import Detections, Detector, PartMissing

STRIDES = (8, 16, 32)  # px of the input to a place of YOLOX's three grids
FILL = 114.0  # grey beside a picture that is not square, of both YOLO families
KEPT = 100  # objects of a picture that COCO's evaluator counts at most


class ClosedDetector(Detector):
    """A detector of its own classes; asked for some of them, it gives those alone.

    Args:
        threshold: Objects of a lower score are left out; in [0, 1], low where a whole precision-recall curve is wanted.
        top: Objects of a picture at most, the most certain.
        batch_size: Pictures of one size that are looked at together.

    Raises:
        ValueError: A setting is out of its range.
    """

    def __init__(self, *, threshold: float, top: int = KEPT, batch_size: int = 8) -> None:
        if not 0 <= threshold <= 1:
            raise ValueError(f"detector.threshold={threshold}: no score; give a number between 0 and 1")
        for name, value in (("top", top), ("batch_size", batch_size)):
            if value < 1:
                raise ValueError(f"detector.{name}={value}: must be at least 1")
        self.threshold, self.top, self.batch_size = threshold, top, batch_size

    def __call__(
        self, pictures: Sequence[np.ndarray], asked: Sequence[Sequence[str]] | None = None
    ) -> list[Detections]:
        """Find objects in B pictures (H, W, 3) uint8 RGB, of any sizes; see `Detector`."""
        words = [self._wanted(words) for words in asked] if asked is not None else [self._wanted(None)] * len(pictures)
        found: dict[int, Detections] = {}
        for places in _of_one_size(pictures, self.batch_size):
            raw = self.find([pictures[place] for place in places])
            for place, (boxes, scores, numbers) in zip(places, raw, strict=True):
                found[place] = self._named(boxes, scores, numbers, words[place])
        return [found[place] for place in range(len(pictures))]

    @property
    @abstractmethod
    def classes(self) -> tuple[str, ...]:
        """The name of each class by its number; "" for one that is not used."""

    @property
    def names(self) -> tuple[str, ...]:
        """Return the classes that it can find."""
        return tuple(name for name in self.classes if name)

    @abstractmethod
    def find(self, pictures: Sequence[np.ndarray]) -> list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
        """Find objects in pictures of one size.

        Args:
            pictures: At most `batch_size` pictures (H, W, 3) uint8 RGB.

        Returns:
            For each boxes (N, 4) xyxy in [0, 1] of the picture, scores (N,) and numbers of classes (N,), in any order.
        """

    def _wanted(self, words: Sequence[str] | None) -> torch.Tensor:
        """Return a mask (K,) bool of the classes that are asked for."""
        if unknown := sorted(set(words or ()) - set(self.names)):
            raise ValueError(
                f"detector: {unknown[0]!r} is not among the {len(self.names)} names that it knows; "
                "choose a detector that can be asked for words"
            )
        return torch.tensor([bool(name) and (words is None or name in words) for name in self.classes])

    def _named(
        self, boxes: torch.Tensor, scores: torch.Tensor, numbers: torch.Tensor, wanted: torch.Tensor
    ) -> Detections:
        boxes, scores, numbers = boxes.float().cpu().clip(0, 1), scores.float().cpu(), numbers.cpu()
        inside = (boxes[:, 2:] > boxes[:, :2]).all(-1)  # what lies beside the picture is no object of it
        kept = (scores >= self.threshold) & wanted[numbers] & inside
        boxes, scores, numbers = boxes[kept], scores[kept], numbers[kept]
        order = scores.argsort(descending=True, stable=True)[: self.top]
        return Detections(
            boxes=boxes[order].numpy(),
            scores=scores[order].numpy(),
            labels=tuple(self.classes[number] for number in numbers[order].tolist()),
        )


class HubDetector(ClosedDetector):
    """A detector of transformers' `AutoModelForObjectDetection`, such as DETR and RT-DETR.

    Args:
        model: Name on the hub, or a local folder with the model and its preprocessor's settings.
        revision: Branch, tag or commit on the hub; null for the newest.
        names: "coco", a file with a name in each line, or a list, by the class's number; null for the model's own names.
        threshold: As in `ClosedDetector`.
        top: As in `ClosedDetector`.
        batch_size: As in `ClosedDetector`.

    Source:
        Carion et al. 2020, End-to-End Object Detection with Transformers; Zhao et al. 2024, DETRs Beat YOLOs on Real-time Object
        Detection.
    """

    def __init__(
        self,
        *,
        model: str,
        revision: str | None = None,
        names: str | Sequence[str] | None = None,
        threshold: float = 0.001,
        top: int = KEPT,
        batch_size: int = 8,
    ) -> None:
        super().__init__(threshold=threshold, top=top, batch_size=batch_size)
        self.model, self.revision = model, revision
        self._names = None if names is None else read_names(names)
        self._network: Any = None
        self._prepare: Any = None

    def settings(self) -> dict[str, Any]:
        """Model, revision, names that replace its own, threshold and number."""
        return {
            "model": self.model,
            "revision": self.revision,
            "names": None if self._names is None else list(self._names),
            "threshold": self.threshold,
            "top": self.top,
        }

    def to(self, device: Any) -> Self:
        """The detector with its model on a torch device; see `Part.to`."""
        if self._network is None:
            from transformers import AutoImageProcessor, AutoModelForObjectDetection

            try:
                with quiet_libraries():
                    self._prepare = AutoImageProcessor.from_pretrained(self.model, revision=self.revision)
                    network = AutoModelForObjectDetection.from_pretrained(self.model, revision=self.revision)
            except (OSError, ValueError, ImportError) as error:
                raise PartMissing(
                    f"detector.model={self.model}: cannot be opened ({_line(error)}); "
                    "give the folder of an object detector of transformers, or its name where the hub can be reached"
                ) from error
            self._network = network.eval().requires_grad_(False)
            if self._names is not None and len(self._names) != network.config.num_labels:
                raise ValueError(
                    f"detector.names: {len(self._names)} names for the {network.config.num_labels} classes of "
                    f"{self.model}; give one for each, or null for its own"
                )
        self._network.to(device)
        return self

    @property
    def classes(self) -> tuple[str, ...]:
        """The names given, or the model's own; DETR's numbers without a class are called "N/A" there."""
        if self._names is not None:
            return self._names
        own = self._loaded().config.id2label
        return tuple("" if own[number] == "N/A" else own[number] for number in sorted(own))

    @torch.inference_mode()
    def find(self, pictures: Sequence[np.ndarray]) -> list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
        """Boxes, scores and numbers; see `ClosedDetector.find`."""
        network = self._loaded()
        inputs = self._prepare(images=list(pictures), return_tensors="pt").to(network.device)
        # Sizes of 1 keep the boxes in [0, 1].
        found = self._prepare.post_process_object_detection(
            network(**inputs), threshold=0.0, target_sizes=[(1, 1)] * len(pictures)
        )
        return [(one["boxes"], one["scores"], one["labels"]) for one in found]

    def _loaded(self) -> Any:
        if self._network is None:
            raise PartMissing(f"detector.model={self.model}: not loaded yet; call to(device) first")
        return self._network


class OnnxDetector(ClosedDetector):
    """A YOLO network in an ONNX file, with the preprocessing and decoding of its family.

    "yolox": the picture stands at the top left of a grey square, BGR in 0..255; outputs (B, A, 5 + K) over the grids of strides
    8, 16 and 32 are decoded as (xy + place) * stride and exp(wh) * stride, and a score is objectness times class. "yolov8", also
    the form of YOLO11 and of YOLOv9's export: the picture stands in the middle, RGB in 0..1; outputs (B, 4 + K, A) are centres
    and sizes in px of the input and scores of classes. Exports that suppress overlaps themselves are not read. Of each place the
    best class counts, and overlaps are suppressed within a class.

    Args:
        file: The ONNX file.
        form: "yolox" or "yolov8".
        names: "coco", a file with a name in each line, or a list, by the class's number.
        side: Side of the square input in px, where the file leaves it open.
        threshold: As in `ClosedDetector`; 0.01 is YOLOX's own for COCO's evaluator, 0.001 YOLOv8's.
        overlap: Of two boxes of a class with a larger IoU the less certain goes.
        top: As in `ClosedDetector`.
        batch_size: As in `ClosedDetector`; a file may fix it to 1.

    Raises:
        ValueError: A setting is out of its range.

    Source:
        Ge et al. 2021, YOLOX: Exceeding YOLO Series in 2021; Jocher et al. 2023, Ultralytics YOLOv8.
    """

    def __init__(
        self,
        *,
        file: str,
        form: Literal["yolox", "yolov8"],
        names: str | Sequence[str] = "coco",
        side: int = 640,
        threshold: float = 0.01,
        overlap: float = 0.65,
        top: int = KEPT,
        batch_size: int = 8,
    ) -> None:
        super().__init__(threshold=threshold, top=top, batch_size=batch_size)
        if form not in ("yolox", "yolov8"):
            raise ValueError(f"detector.form={form}: no such form; choose yolox or yolov8")
        if not 0 < overlap <= 1:
            raise ValueError(f"detector.overlap={overlap}: no IoU; give a number above 0, at most 1")
        self.file, self.form, self.side, self.overlap = file, form, side, overlap
        self._names = read_names(names)
        self._session: Any = None
        self._device = torch.device("cpu")

    @property
    def classes(self) -> tuple[str, ...]:
        """The names given."""
        return self._names

    def settings(self) -> dict[str, Any]:
        """The file's name and hash, form, thresholds; null for the hash where the file is not there."""
        path = Path(self.file)
        return {
            "file": path.name,
            "sha256": sha256(path.read_bytes()).hexdigest() if path.is_file() else None,
            "form": self.form,
            "side": self.side,
            "threshold": self.threshold,
            "overlap": self.overlap,
            "top": self.top,
            "names": len(self._names),
        }

    def to(self, device: Any) -> Self:
        """The detector with its network on a torch device; see `Part.to`.

        onnxruntime works on an accelerator where its build can, and else on the CPU.
        """
        device = torch.device(device)
        if self._session is None or device != self._device:
            self._session, self._device = self._opened(device), device
            shape = self._session.get_inputs()[0].shape
            if isinstance(shape[0], int):
                self.batch_size = shape[0] if shape[0] == 1 else self._refuse(f"takes {shape[0]} pictures at once")
            if isinstance(shape[-1], int):
                self.side = shape[-1]
        return self

    def _opened(self, device: torch.device) -> Any:
        try:
            import onnxruntime
        except ImportError as error:
            raise PartMissing(f"detector.file={self.file}: needs onnxruntime; install onnxruntime") from error
        if not Path(self.file).is_file():
            raise PartMissing(f"detector.file={self.file}: not there; give the ONNX file of a {self.form} network")
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        wanted = ["CUDAExecutionProvider"] if device.type == "cuda" else []
        providers = [one for one in (*wanted, "CPUExecutionProvider") if one in onnxruntime.get_available_providers()]
        try:
            return onnxruntime.InferenceSession(self.file, options, providers=providers)
        except Exception as error:  # onnxruntime's own errors have no common base that it exports
            raise PartMissing(
                f"detector.file={self.file}: not an ONNX network ({_line(error)}); fetch it again"
            ) from error

    def find(self, pictures: Sequence[np.ndarray]) -> list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
        """Boxes, scores and numbers; see `ClosedDetector.find`."""
        if self._session is None:
            raise PartMissing(f"detector.file={self.file}: not loaded yet; call to(device) first")
        squares = [letterbox(picture, self.side, centred=self.form == "yolov8") for picture in pictures]
        inputs = torch.stack([square for square, _ in squares])
        inputs = inputs / 255 if self.form == "yolov8" else inputs.flip(1)
        outputs = self._session.run(None, {self._session.get_inputs()[0].name: inputs.numpy()})
        read: Callable[..., tuple[torch.Tensor, torch.Tensor]] = read_yolox if self.form == "yolox" else read_yolov8
        boxes, scores = read(torch.from_numpy(outputs[0]), side=self.side, classes=len(self._names))
        size = pictures[0].shape[:2]
        return [
            self._thinned(place(one), best, number, size)
            for one, best, number, (_, place) in zip(boxes, *scores.max(-1), squares, strict=True)
        ]

    def _thinned(
        self, boxes: torch.Tensor, scores: torch.Tensor, numbers: torch.Tensor, size: Sequence[int]
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Boxes xyxy px of the picture to [0, 1], without those of low scores and those that overlap better ones."""
        likely = scores >= self.threshold
        boxes, scores, numbers = boxes[likely], scores[likely], numbers[likely]
        kept = batched_nms(boxes, scores, numbers, self.overlap)
        height, width = size
        return boxes[kept] / torch.tensor([width, height, width, height]), scores[kept], numbers[kept]

    def _refuse(self, what: str) -> Any:
        raise ValueError(f"detector.file={self.file}: {what}; export the network for 1 picture or for any number")


def letterbox(
    picture: np.ndarray, side: int, *, centred: bool
) -> tuple[torch.Tensor, Callable[[torch.Tensor], torch.Tensor]]:
    """A picture in a grey square, scaled without being distorted.

    Args:
        picture: (H, W, 3) uint8 RGB.
        side: Side of the square in px.
        centred: It stands in the middle; else at the top left.

    Returns:
        (3, side, side) float32 RGB in 0..255, and what takes boxes xyxy in px of the square to px of the picture.
    """
    height, width = picture.shape[:2]
    scale = min(side / height, side / width)
    rows, columns = max(1, int(height * scale)), max(1, int(width * scale))
    if centred:
        rows, columns = max(1, round(height * scale)), max(1, round(width * scale))
    pixels = torch.tensor(picture).permute(2, 0, 1)[None].float()
    # Without smoothing, as both families do it; they keep whole numbers.
    small = torch.nn.functional.interpolate(pixels, (rows, columns), mode="bilinear", align_corners=False)[0].round()
    top, left = ((side - rows) // 2, (side - columns) // 2) if centred else (0, 0)
    square = torch.full((3, side, side), FILL)
    square[:, top : top + rows, left : left + columns] = small
    corner = torch.tensor([left, top, left, top], dtype=torch.float32)
    return square, lambda boxes: (boxes - corner) / scale


def read_yolox(output: torch.Tensor, *, side: int, classes: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Boxes and scores of YOLOX's raw output.

    Args:
        output: (B, A, 5 + K): centre, size, objectness, classes; over the places of the grids, row by row.
        side: Side of the input in px.
        classes: K.

    Returns:
        Boxes (B, A, 4) xyxy in px of the input, scores (B, A, K).

    Raises:
        ValueError: The output has another shape.

    Source:
        Ge et al. 2021, section 2.1, and the decoding of its ONNX export.
    """
    counts = [side // stride for stride in STRIDES]
    _check_output(output, (sum(count**2 for count in counts), 5 + classes), "yolox")
    places = [
        torch.stack(torch.meshgrid(torch.arange(n), torch.arange(n), indexing="xy"), -1).reshape(-1, 2) for n in counts
    ]
    strides = torch.cat([torch.full((n * n, 1), float(s)) for n, s in zip(counts, STRIDES, strict=True)])
    centres = (output[..., :2] + torch.cat(places)) * strides
    halves = output[..., 2:4].exp() * strides / 2
    return torch.cat([centres - halves, centres + halves], -1), output[..., 4:5] * output[..., 5:]


def read_yolov8(output: torch.Tensor, *, side: int, classes: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Boxes and scores of YOLOv8's output.

    Args:
        output: (B, 4 + K, A): centre and size in px of the input, scores of classes.
        side: Side of the input in px.
        classes: K.

    Returns:
        Boxes (B, A, 4) xyxy in px of the input, scores (B, A, K).

    Raises:
        ValueError: The output has another shape.
    """
    _check_output(output, (4 + classes, sum((side // stride) ** 2 for stride in STRIDES)), "yolov8")
    centres, halves = output[:, :2].mT, output[:, 2:4].mT / 2
    return torch.cat([centres - halves, centres + halves], -1), output[:, 4:].mT


def read_names(names: str | Sequence[str]) -> tuple[str, ...]:
    """The names of a detector's classes.

    Args:
        names: "coco", a file with a name in each line, or the names.

    Returns:
        The names by the class's number.

    Raises:
        ValueError: The file is not there, or there is no name.
    """
    if names == "coco":
        return COCO_NAMES
    if isinstance(names, str):
        if not Path(names).is_file():
            raise ValueError(
                f"detector.names={names}: no such file; give one with a name in each line, a list, or coco"
            )
        names = Path(names).read_text(encoding="utf-8").splitlines()
    if not names:
        raise ValueError("detector.names: no names; give one for each class")
    return tuple(name.strip() for name in names)


def _of_one_size(pictures: Sequence[np.ndarray], most: int) -> Iterable[list[int]]:
    """Places of pictures that share a size, at most so many together."""
    sizes: dict[tuple[int, ...], list[int]] = {}
    for place, picture in enumerate(pictures):
        sizes.setdefault(picture.shape, []).append(place)
    for places in sizes.values():
        yield from (places[begin : begin + most] for begin in range(0, len(places), most))


def _check_output(output: torch.Tensor, form: tuple[int, int], name: str) -> None:
    if tuple(output.shape[1:]) != form:
        raise ValueError(
            f"detector.form={name}: the network gives {tuple(output.shape)} and not (B, {form[0]}, {form[1]}); "
            "set detector.form, detector.side and detector.names to the file's"
        )


def _line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
